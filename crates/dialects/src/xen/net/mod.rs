//! Netback: a network for the guest's netfront (`io/netif.h`).
//!
//! Several queues, separate event channels for both directions, receive by copy, checksums and segmentation left to the network.
//! Outside, a packet is a virtio network header and an Ethernet frame ([`crate::network`]).
//!
//! ```text
//!   netfront --tx ring--> transmit.rs --packet--> network     a packet's header says what is left to the network
//!   netfront <--rx ring-- receive.rs  <--packet-- network     a packet takes as many of the guest's buffers as it needs
//! ```

mod receive;
#[cfg(test)]
mod tests;
mod transmit;

use std::sync::Arc;

use abi::xen::io::netif::{RX_SLOT, TX_SLOT};
use frames::Offloads;

use super::ring::{BackRing, BrokenRing};
use super::xenbus::{ConnectError, Driver, Frontend};
use super::{Peer, Xen};
use crate::network::{Network, Worked};
use receive::Receiver;
use transmit::Transmitter;

/// Most queues.
const MAX_QUEUES: u32 = 4;
/// What ends the work on a card.
pub type NetError = crate::network::NetError<BrokenRing>;

/// One card's backend.
pub struct Netback {
    xen: Arc<Xen>,
    /// Called when the guest has sent something.
    bell: Peer,
    queues: Vec<Queue>,
    guest: Offloads,
    receiver: Receiver,
}

struct Queue {
    transmitter: Transmitter,
    tx: BackRing,
    rx: BackRing,
    tx_port: u32,
    rx_port: u32,
}

impl Netback {
    /// A backend for a network; `bell` is rung when the guest has sent something, and [`Netback::work`] is to be called.
    pub fn new(xen: Arc<Xen>, bell: Peer) -> Netback {
        Netback { xen, bell, queues: Vec::new(), guest: Offloads::default(), receiver: Receiver::new() }
    }

    /// What the connected guest can do; nothing when none is.
    pub fn guest_offloads(&self) -> Offloads {
        self.guest
    }

    /// Moves what can be moved, in both directions. `None` as network: frames go nowhere.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn work(&mut self, mut network: Option<&mut (dyn Network + '_)>) -> Result<Worked, NetError> {
        let mut worked = Worked::default();
        for queue in &mut self.queues {
            let moved = queue.transmitter.pump(&self.xen, &mut queue.tx, network.as_deref_mut())?;
            if queue.tx.publish() {
                self.xen.notify(queue.tx_port);
            }
            worked.more |= moved.more || !moved.blocked && queue.tx.ask_for_event()?;
            worked.blocked |= moved.blocked;
        }
        if let Some(network) = network
            && !self.queues.is_empty()
        {
            let moved = self.receiver.pump(&self.xen, &mut self.queues, network)?;
            worked.more |= moved.more;
            worked.has_room = moved.has_room;
        }
        Ok(worked)
    }

    /// The queue whose keys are at `prefix`.
    fn open_queue(&self, frontend: &Frontend<'_>, prefix: &str) -> Result<Queue, ConnectError> {
        let number = |name: &str| frontend.number(&format!("{prefix}{name}"));
        let shared = frontend.optional(&format!("{prefix}event-channel"))?;
        let (tx_port, rx_port) = match shared {
            Some(port) => (port, port),
            None => (number("event-channel-tx")?, number("event-channel-rx")?),
        };
        let tx = BackRing::new(&self.xen, &[number("tx-ring-ref")?], TX_SLOT)?;
        let rx = BackRing::new(&self.xen, &[number("rx-ring-ref")?], RX_SLOT)?;
        self.xen.bind(tx_port, Arc::clone(&self.bell))?;
        if rx_port != tx_port
            && let Err(error) = self.xen.bind(rx_port, Arc::clone(&self.bell))
        {
            self.xen.unbind(tx_port);
            return Err(error.into());
        }
        Ok(Queue { transmitter: Transmitter::new(), tx, rx, tx_port, rx_port })
    }
}

impl Driver for Netback {
    fn offers(&self) -> Vec<(&'static str, String)> {
        let has = [
            "feature-sg",
            "feature-gso-tcpv4",
            "feature-gso-tcpv6",
            "feature-rx-copy",
            "feature-ipv6-csum-offload",
            "feature-split-event-channels",
        ];
        let mut offers: Vec<_> = has.into_iter().map(|name| (name, "1".into())).collect();
        offers.extend([("feature-rx-flip", "0".into()), ("multi-queue-max-queues", MAX_QUEUES.to_string())]);
        offers
    }

    fn connect(&mut self, frontend: &Frontend<'_>) -> Result<Vec<(&'static str, String)>, ConnectError> {
        if frontend.number("request-rx-copy")? != 1 {
            return Err(ConnectError::Key("request-rx-copy".into()));
        }
        let count = frontend.optional("multi-queue-num-queues")?.unwrap_or(1);
        if count == 0 || count > MAX_QUEUES {
            return Err(ConnectError::Key("multi-queue-num-queues".into()));
        }
        for number in 0..count {
            let prefix = if count == 1 { String::new() } else { format!("queue-{number}/") };
            match self.open_queue(frontend, &prefix) {
                Ok(queue) => self.queues.push(queue),
                Err(error) => {
                    self.disconnect();
                    return Err(error);
                }
            }
        }
        let has = |name: &str| frontend.text(name).is_some_and(|value| value.trim() == "1");
        let scatter = has("feature-sg");
        self.receiver.set_scatter(scatter);
        self.guest = Offloads {
            checksum: !has("feature-no-csum-offload"),
            tso4: scatter && has("feature-gso-tcpv4"),
            tso6: scatter && has("feature-gso-tcpv6") && has("feature-ipv6-csum-offload"),
        };
        Ok(Vec::new())
    }

    fn disconnect(&mut self) {
        for queue in self.queues.drain(..) {
            self.xen.unbind(queue.tx_port);
            self.xen.unbind(queue.rx_port);
        }
        self.guest = Offloads::default();
    }
}
