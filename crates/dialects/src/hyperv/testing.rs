//! What tests of devices need beside VMBus' guest ([`super::vmbus::testing`]): memory whose pages lie together, and packets as drivers send them.

use abi::hyperv::ring::{COMPLETION_REQUESTED, control, kind};
use abi::hyperv::vmbus::{Offer, message};
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::PAGE_SIZE;
use zerocopy::FromBytes;

use super::vmbus::testing::{Guest, GuestChannel, Received};

/// Where pages that lie together begin; VMBus' guest takes its own from the other end.
const PAGES: u64 = 0x10_0000;
/// Pages of a ring, with the control page.
const RING_PAGES: u32 = 4;

/// A driver's side of the machine.
pub(super) struct Driver {
    pub guest: Guest,
    next_page: u64,
}

impl Driver {
    /// On a guest that has not said anything yet.
    pub fn new() -> Driver {
        Driver { guest: Guest::new(), next_page: PAGES }
    }

    /// Numbers and indices of channels that were offered since the last time.
    pub fn offers(&self) -> Vec<(u32, u16)> {
        let messages = std::iter::from_fn(|| self.guest.next());
        let offers = messages.filter(|(_, bytes)| bytes.starts_with(&message::OFFER.to_le_bytes()));
        offers
            .map(|(_, bytes)| Offer::read_from_bytes(&bytes).unwrap())
            .map(|offer| (offer.relid.get(), offer.sub_channel_index.get()))
            .collect()
    }

    /// Opens a channel; the device has to be let work to hear of it.
    pub fn open(&mut self, relid: u32) -> Front {
        Front(self.guest.open(relid, RING_PAGES))
    }

    pub fn close(&self, front: &Front) {
        self.guest.post_relid(message::CLOSE, front.relid());
    }

    /// Address of pages that nobody has yet.
    pub fn pages(&mut self, count: u64) -> u64 {
        self.next_page += count * PAGE_SIZE;
        self.next_page - count * PAGE_SIZE
    }

    /// Lends pages to a channel: the GPADL's number.
    pub fn lend(&mut self, front: &Front, gpa: u64, pages: u64) -> u32 {
        let pfns: Vec<u64> = (0..pages).map(|page| gpa / PAGE_SIZE + page).collect();
        let (number, is_lent) = self.guest.lend(front.relid(), &pfns);
        assert!(is_lent);
        number
    }

    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.guest.memory.write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    pub fn read(&self, gpa: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.guest.memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }
}

/// A channel, of which the driver wants all its packets completed.
pub(super) struct Front(GuestChannel);

impl Front {
    pub fn relid(&self) -> u32 {
        self.0.relid
    }

    /// Sends a payload alone.
    pub fn in_band(&mut self, transaction: u64, payload: &[u8]) {
        self.0.send(kind::IN_BAND, COMPLETION_REQUESTED, transaction, &[], payload);
    }

    /// Sends a payload with memory: address and length of each range.
    pub fn direct(&mut self, transaction: u64, ranges: &[(u64, u32)], payload: &[u8]) {
        let pfns = |(gpa, length): &(u64, u32)| {
            let pages = (gpa % PAGE_SIZE + u64::from(*length)).div_ceil(PAGE_SIZE);
            (0..pages).map(|page| gpa / PAGE_SIZE + page).collect::<Vec<u64>>()
        };
        let pfns: Vec<Vec<u64>> = ranges.iter().map(pfns).collect();
        let ranges: Vec<(u32, u32, &[u64])> =
            ranges.iter().zip(&pfns).map(|((gpa, length), pfns)| (*length, (gpa % PAGE_SIZE) as u32, pfns.as_slice())).collect();
        self.0.send_with_pages(transaction, &ranges, payload);
    }

    /// Completes a packet of the host.
    pub fn complete(&mut self, transaction: u64, payload: &[u8]) {
        self.0.send(kind::COMPLETION, 0, transaction, &[], payload);
    }

    /// The host's next packet.
    pub fn receive(&mut self) -> Option<Received> {
        self.0.receive()
    }

    /// Shows the host an index that cannot be.
    pub fn lie(&self, index: u32) {
        self.0.to_host.set_word(control::WRITE_INDEX, index);
    }
}
