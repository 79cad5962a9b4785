//! The host's end of an open channel: both rings, and the ways to signal the guest.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use abi::hyperv::vmbus::{USER_BYTES, interrupt_page};
use vmm::GuestMemory;

use super::gpadl::Buffer;
use super::packet::{Outgoing, Packet, PacketBuf};
use super::ring::{BrokenRing, Incoming, Outbound};
use super::{Shared, Synic};
use crate::atomic;

/// How a channel's events reach the guest.
pub(super) struct Signal {
    pub(super) synic: Weak<dyn Synic>,
    pub(super) memory: GuestMemory,
    pub(super) sint: u8,
    pub(super) relid: u32,
    /// The processor; the guest may change it.
    pub(super) target_vp: AtomicU32,
    /// Where the guest looks instead of event flags, if its version is so old.
    pub(super) interrupt_page: Option<u64>,
}

impl Signal {
    fn raise(&self) {
        // A machine without its controllers is over.
        let Some(synic) = self.synic.upgrade() else { return };
        let Some(page) = self.interrupt_page else {
            synic.signal_event(self.target_vp.load(Ordering::Relaxed), self.sint, self.relid as u16);
            return;
        };
        let word = page + interrupt_page::TO_GUEST + u64::from(self.relid / 32) * 4;
        let bit = 1u32 << (self.relid % 32);
        atomic::with(&self.memory, word, |bits: &AtomicU32| bits.fetch_or(bit.to_le(), Ordering::SeqCst));
        // Flag 0 of the first processor says that there is something in the page.
        synic.signal_event(0, self.sint, 0);
    }
}

/// A channel that the guest has opened.
///
/// The rings' memory is in use until this is dropped, which is what [`Device::closed`](super::Device::closed) is for.
pub struct Channel {
    pub(super) index: u16,
    pub(super) relid: u32,
    pub(super) user_data: [u8; USER_BYTES],
    pub(super) incoming: Incoming,
    pub(super) outbound: Outbound,
    pub(super) signal: Arc<Signal>,
    pub(super) memory: GuestMemory,
    pub(super) bus: Weak<Shared>,
    /// What we write next into the ring.
    pub(super) packet: Vec<u8>,
    /// Says that the channel is in use. After the rings, so that it goes last.
    pub(super) _in_use: InUse,
}

/// Tells VMBus when it is gone.
pub(super) struct InUse {
    pub(super) token: Option<Arc<()>>,
    pub(super) bus: Weak<Shared>,
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.token = None;
        if let Some(bus) = self.bus.upgrade() {
            bus.settle();
        }
    }
}

impl Channel {
    /// 0 for the device's first channel, else which subchannel.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// What the guest had to say when it opened the channel.
    pub fn user_data(&self) -> &[u8; USER_BYTES] {
        &self.user_data
    }

    /// The guest's memory, where the ranges of packets are.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The next packet of the guest. `None`: there is none, and the device's bell rings when there is one.
    ///
    /// # Errors
    /// [`BrokenRing`]: the channel is of no use any more.
    pub fn receive<'b>(&mut self, into: &'b mut PacketBuf) -> Result<Option<Packet<'b>>, BrokenRing> {
        let Some(signal) = self.incoming.next(&mut into.0)? else { return Ok(None) };
        if signal {
            self.signal.raise();
        }
        Packet::parse(&into.0).map(Some)
    }

    /// Sends a packet. `false`: there is no room now, and the device's bell rings when there is.
    ///
    /// # Errors
    /// [`BrokenRing`]: the channel is of no use any more.
    pub fn send(&mut self, packet: &Outgoing<'_>) -> Result<bool, BrokenRing> {
        packet.write_to(&mut self.packet);
        let Some(signal) = self.outbound.put(&self.packet)? else { return Ok(false) };
        if signal {
            self.signal.raise();
        }
        Ok(true)
    }

    /// The memory that the guest lends to this channel under a GPADL's number.
    pub fn gpadl(&self, number: u32) -> Option<Buffer> {
        self.bus.upgrade()?.gpadl(self.relid, number)
    }

    /// Offers subchannels with the indices 1 to `count`, or as many as [`Offer::sub_channels`](super::Offer::sub_channels) allows, beside those that
    /// are offered already. They go when the first channel is closed.
    pub fn offer_sub_channels(&self, count: u16) {
        if let Some(bus) = self.bus.upgrade() {
            bus.offer_sub_channels(self.relid, count);
        }
    }
}
