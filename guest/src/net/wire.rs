//! A network card as smoltcp wants it.

use alloc::sync::Arc;
use alloc::vec::Vec;

use pvbus::net::{Checksum, ETHERNET_HEADER, NetDevice, VLAN_TAG, checksum};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

/// The card, with memory for a frame each way.
pub struct Wire {
    card: Arc<dyn NetDevice>,
    received: Vec<u8>,
    sent: Vec<u8>,
}

impl Wire {
    pub fn new(card: Arc<dyn NetDevice>) -> Wire {
        let length = card.mtu() + ETHERNET_HEADER + VLAN_TAG;
        Wire { card, received: alloc::vec![0; length], sent: alloc::vec![0; length] }
    }

    pub fn card(&self) -> &dyn NetDevice {
        &*self.card
    }
}

impl Device for Wire {
    type RxToken<'a> = Frame<'a>;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Frame<'_>, Room<'_>)> {
        // A card that is gone has no frames.
        let received = self.card.receive(&mut self.received).ok()??;
        let frame = self.received.get_mut(..received.length)?;
        if received.checksum == Checksum::Blank {
            checksum::complete(frame);
        }
        Some((Frame(frame), Room { card: &*self.card, buffer: &mut self.sent }))
    }

    fn transmit(&mut self, _: Instant) -> Option<Room<'_>> {
        Some(Room { card: &*self.card, buffer: &mut self.sent })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.card.mtu() + ETHERNET_HEADER;
        capabilities
    }
}

/// A frame that came.
pub struct Frame<'a>(&'a [u8]);

impl RxToken for Frame<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(self.0)
    }
}

/// Room for a frame to be sent.
pub struct Room<'a> {
    card: &'a dyn NetDevice,
    buffer: &'a mut [u8],
}

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        let frame = &mut self.buffer[..length];
        let result = fill(frame);
        // What finds no room is lost, as on any wire.
        let _ = self.card.send(frame, Checksum::Complete);
        result
    }
}
