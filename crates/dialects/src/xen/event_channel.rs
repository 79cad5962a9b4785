//! Event channels: which ports there are and what is at their other end (`event_channel.h`). The bits are in `shared.rs`.
//!
//! ```text
//!   closed --alloc_unbound--> unbound --a backend binds--> interdomain --it unbinds--> unbound
//!          --bind_ipi-------> for the guest itself          --bind_virq--> raised by the dialect
//! ```

use std::sync::Arc;

use abi::xen::event_channel::{PORTS, VIRQ_TIMER, VIRQS, status};
use abi::xen::hypercall::errno::{EEXIST, EINVAL, ENOSPC, EPERM};
use vmm::VcpuId;

use super::BACKEND_DOMAIN;

/// Who is at the host's end of a channel: called when the guest sends. Must not block.
pub type Peer = Arc<dyn Fn() + Send + Sync>;

/// Why a port cannot be used so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// No such port, or not in that state.
    #[error("no event channel of that kind at this port")]
    Invalid,
    /// The virtual interrupt has a port already.
    #[error("the virtual interrupt is bound already")]
    Taken,
    /// All ports are in use.
    #[error("no event channel is free")]
    Full,
    /// The port is for somebody else.
    #[error("the event channel is for another domain")]
    NotYours,
}

impl PortError {
    /// As Xen says it.
    pub(super) fn errno(self) -> i64 {
        match self {
            PortError::Invalid => EINVAL,
            PortError::Taken => EEXIST,
            PortError::Full => ENOSPC,
            PortError::NotYours => EPERM,
        }
    }
}

#[derive(Clone, Default)]
enum End {
    #[default]
    Closed,
    Unbound {
        remote: u16,
    },
    Backend(Peer),
    Virq(u32),
    Ipi,
}

#[derive(Clone, Default)]
struct Channel {
    end: End,
    /// Whom it interrupts.
    vcpu: VcpuId,
}

/// What became of a send.
pub(super) enum Sent {
    /// The port is for the guest itself.
    Itself,
    /// Nobody is at the other end.
    Nobody,
    /// This one is to be called.
    Peer(Peer),
}

/// All ports of the guest.
#[derive(Default)]
pub(super) struct Channels {
    /// By port, up to the highest that was in use.
    channels: Vec<Channel>,
}

impl Channels {
    /// EVTCHNOP_alloc_unbound.
    pub fn allocate(&mut self, remote: u16) -> Option<u32> {
        self.open(End::Unbound { remote }, 0).ok()
    }

    /// EVTCHNOP_bind_virq.
    pub fn bind_virq(&mut self, virq: u32, vcpu: VcpuId) -> Result<u32, PortError> {
        if virq >= VIRQS {
            return Err(PortError::Invalid);
        }
        if self.channels.iter().any(|channel| matches!(channel.end, End::Virq(bound) if bound == virq) && channel.vcpu == vcpu) {
            return Err(PortError::Taken);
        }
        self.open(End::Virq(virq), vcpu)
    }

    /// EVTCHNOP_bind_ipi.
    pub fn bind_ipi(&mut self, vcpu: VcpuId) -> Result<u32, PortError> {
        self.open(End::Ipi, vcpu)
    }

    /// EVTCHNOP_bind_vcpu. Timers and interrupts between processors stay where they are.
    pub fn bind_vcpu(&mut self, port: u32, vcpu: VcpuId) -> Result<(), PortError> {
        let channel = self.open_mut(port)?;
        match channel.end {
            End::Ipi | End::Virq(VIRQ_TIMER) => Err(PortError::Invalid),
            _ => {
                channel.vcpu = vcpu;
                Ok(())
            }
        }
    }

    /// EVTCHNOP_close.
    pub fn close(&mut self, port: u32) -> Result<(), PortError> {
        *self.open_mut(port)? = Channel::default();
        Ok(())
    }

    /// EVTCHNOP_send.
    pub fn send(&mut self, port: u32) -> Result<Sent, PortError> {
        match &self.open_mut(port)?.end {
            End::Ipi => Ok(Sent::Itself),
            End::Backend(peer) => Ok(Sent::Peer(Arc::clone(peer))),
            End::Unbound { .. } => Ok(Sent::Nobody),
            End::Closed | End::Virq(_) => Err(PortError::Invalid),
        }
    }

    /// EVTCHNOP_status: what the port is, whom it interrupts, and the other end's domain or the virtual interrupt.
    pub fn status(&self, port: u32) -> Result<(u32, VcpuId, u32), PortError> {
        let channel = self.channels.get(port as usize).filter(|_| port != 0).cloned();
        let channel = match channel {
            Some(channel) => channel,
            None if (1..PORTS).contains(&port) => Channel::default(),
            None => return Err(PortError::Invalid),
        };
        let (kind, detail) = match channel.end {
            End::Closed => (status::CLOSED, 0),
            End::Unbound { remote } => (status::UNBOUND, remote.into()),
            End::Backend(_) => (status::INTERDOMAIN, BACKEND_DOMAIN.into()),
            End::Virq(virq) => (status::VIRQ, virq),
            End::Ipi => (status::IPI, 0),
        };
        Ok((kind, channel.vcpu, detail))
    }

    /// A backend takes the other end of a port that waits for one.
    pub fn connect(&mut self, port: u32, peer: Peer) -> Result<(), PortError> {
        let channel = self.open_mut(port)?;
        match channel.end {
            End::Unbound { remote: BACKEND_DOMAIN } => channel.end = End::Backend(peer),
            End::Unbound { .. } => return Err(PortError::NotYours),
            _ => return Err(PortError::Invalid),
        }
        Ok(())
    }

    /// The backend leaves.
    pub fn disconnect(&mut self, port: u32) {
        if let Ok(channel) = self.open_mut(port)
            && matches!(channel.end, End::Backend(_))
        {
            channel.end = End::Unbound { remote: BACKEND_DOMAIN };
        }
    }

    /// Whom an open port interrupts.
    pub fn target(&self, port: u32) -> Option<VcpuId> {
        self.channels.get(port as usize).filter(|channel| !matches!(channel.end, End::Closed)).map(|channel| channel.vcpu)
    }

    /// The port of a processor's timer.
    pub fn timer_of(&self, vcpu: VcpuId) -> Option<u32> {
        let is_timer = |channel: &Channel| matches!(channel.end, End::Virq(VIRQ_TIMER)) && channel.vcpu == vcpu;
        (0u32..).zip(&self.channels).find(|(_, channel)| is_timer(channel)).map(|(port, _)| port)
    }

    /// Closes all ports but those that the domain's builder made.
    pub fn reset(&mut self, kept: &[Option<u32>]) {
        for (port, channel) in (0u32..).zip(&mut self.channels) {
            if !kept.contains(&Some(port)) {
                *channel = Channel::default();
            }
        }
    }

    fn open(&mut self, end: End, vcpu: VcpuId) -> Result<u32, PortError> {
        // Port 0 is none.
        let free = (0u32..).zip(&self.channels).skip(1).find(|(_, channel)| matches!(channel.end, End::Closed)).map(|(port, _)| port);
        let port = free.unwrap_or((self.channels.len() as u32).max(1));
        if port >= PORTS {
            return Err(PortError::Full);
        }
        if self.channels.len() <= port as usize {
            self.channels.resize(port as usize + 1, Channel::default());
        }
        if let Some(channel) = self.channels.get_mut(port as usize) {
            *channel = Channel { end, vcpu };
        }
        Ok(port)
    }

    fn open_mut(&mut self, port: u32) -> Result<&mut Channel, PortError> {
        self.channels.get_mut(port as usize).filter(|channel| !matches!(channel.end, End::Closed)).ok_or(PortError::Invalid)
    }
}
