//! A guest that is none, for tests of devices: it finds them on the bus, opens their channels, and puts into the rings what it likes.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use abi::hyperv::hypercall::Status;
use abi::hyperv::ring::{ALIGN, COMPLETION_REQUESTED, CONTROL_BYTES, Descriptor, GpaDirect, GpaRange, TRAILER_BYTES, control, kind};
use abi::hyperv::vmbus::{
    GpadlHeader, Header, InitiateContact, MESSAGE_CONNECTION_5, MESSAGE_TYPE, Offer, Open, Relid, USER_BYTES, message, version,
};
use vm_memory::{Bytes, GuestAddress};
use vmm::GuestMemory;
use vmm::memory::PAGE_SIZE;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::connections::{Connections, Synic};
use super::vmbus::VmBus;

const RAM: u64 = 64 << 20;
/// Its free pages.
const PAGES: u64 = 0x10_0000;
/// Pages of a ring, with the control page.
const RING_PAGES: u64 = 4;

/// What the host told.
#[derive(Default)]
struct Heard {
    messages: Mutex<Vec<Vec<u8>>>,
    events: AtomicU32,
}

impl Synic for Heard {
    fn post_message(&self, _vp: u32, _sint: u8, _kind: u32, payload: &[u8]) -> bool {
        self.messages.lock().unwrap().push(payload.to_vec());
        true
    }

    fn signal_event(&self, _vp: u32, _sint: u8, _flag: u16) -> bool {
        self.events.fetch_add(1, Ordering::Relaxed);
        true
    }
}

pub(crate) struct Guest {
    pub memory: GuestMemory,
    pub bus: Arc<VmBus>,
    heard: Arc<Heard>,
    pages: AtomicU64,
    gpadls: AtomicU32,
}

impl Guest {
    /// A guest that has not said anything yet.
    pub fn new() -> Guest {
        let memory = vmm::memory::map(&[(0, RAM)]).unwrap();
        let heard = Arc::new(Heard::default());
        let bus = VmBus::new(memory.clone(), heard.clone());
        Guest { memory, bus, heard, pages: AtomicU64::new(0), gpadls: AtomicU32::new(1) }
    }

    /// Connects, and asks what there is.
    pub fn connect(&self) {
        let contact = InitiateContact {
            header: Header::new(message::INITIATE_CONTACT),
            version: version::WIN10_V5_3.into(),
            interrupt_page: 2.into(),
            ..InitiateContact::new_zeroed()
        };
        self.post(&contact);
        self.post(&Header::new(message::REQUEST_OFFERS));
    }

    pub fn post(&self, message: &(impl IntoBytes + Immutable + ?Sized)) {
        assert_eq!(self.bus.post_message(MESSAGE_CONNECTION_5, MESSAGE_TYPE, message.as_bytes()), Status::SUCCESS);
    }

    /// Channels that were offered since the last time: their numbers and indices.
    pub fn offers(&self) -> Vec<(u32, u16)> {
        let messages = std::mem::take(&mut *self.heard.messages.lock().unwrap());
        let offers = messages.iter().filter(|bytes| bytes.starts_with(&message::OFFER.to_le_bytes()));
        offers.map(|bytes| Offer::read_from_bytes(bytes).unwrap()).map(|offer| (offer.relid.get(), offer.sub_channel_index.get())).collect()
    }

    /// Neighbouring pages that nobody has yet.
    pub fn pages(&self, count: u64) -> u64 {
        PAGES + self.pages.fetch_add(count, Ordering::Relaxed) * PAGE_SIZE
    }

    /// Lends pages to a channel: the GPADL's number.
    pub fn lend(&self, relid: u32, gpa: u64, pages: u64) -> u32 {
        let number = self.gpadls.fetch_add(1, Ordering::Relaxed);
        let pfns: Vec<u64> = (0..pages).map(|page| gpa / PAGE_SIZE + page).collect();
        let (head, bodies) = pfns.split_at(pfns.len().min(26));
        let header = GpadlHeader {
            header: Header::new(message::GPADL_HEADER),
            relid: relid.into(),
            gpadl: number.into(),
            range_buflen: (8 + 8 * pages as u16).into(),
            range_count: 1.into(),
            byte_count: ((pages * PAGE_SIZE) as u32).into(),
            byte_offset: 0.into(),
        };
        self.post([header.as_bytes(), head.as_bytes()].concat().as_slice());
        for body in bodies.chunks(28) {
            let header = [message::GPADL_BODY, 0, 0, number];
            self.post([header.as_bytes(), body.as_bytes()].concat().as_slice());
        }
        number
    }

    /// Opens a channel; the device has to be let work to hear of it.
    pub fn open(&self, relid: u32) -> Front {
        let rings = self.pages(2 * RING_PAGES);
        let open = Open {
            header: Header::new(message::OPEN),
            relid: relid.into(),
            open_id: relid.into(),
            ring_gpadl: self.lend(relid, rings, 2 * RING_PAGES).into(),
            target_vp: 0.into(),
            downstream_page_offset: (RING_PAGES as u32).into(),
            user_data: [0; USER_BYTES],
        };
        self.post(&open);
        Front { memory: self.memory.clone(), relid, to_host: rings, to_guest: rings + RING_PAGES * PAGE_SIZE, write: 0, read: 0 }
    }

    pub fn close(&self, relid: u32) {
        self.post(&Relid { header: Header::new(message::CLOSE), relid: relid.into() });
    }

    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    pub fn read(&self, gpa: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }
}

/// The other side of a channel's rings.
pub(crate) struct Front {
    memory: GuestMemory,
    pub relid: u32,
    /// Control pages.
    pub to_host: u64,
    to_guest: u64,
    write: u64,
    read: u64,
}

/// A packet of the host.
#[derive(Debug)]
pub(crate) struct Received {
    pub kind: u16,
    pub transaction: u64,
    /// What is between descriptor and payload.
    pub extra: Vec<u8>,
    pub payload: Vec<u8>,
}

impl Front {
    const SIZE: u64 = (RING_PAGES - 1) * PAGE_SIZE;

    fn word(&self, gpa: u64) -> u64 {
        self.memory.read_obj::<u32>(GuestAddress(gpa)).unwrap().into()
    }

    fn set_word(&self, gpa: u64, value: u64) {
        self.memory.write_obj(value as u32, GuestAddress(gpa)).unwrap();
    }

    /// Sends a packet with a completion wanted.
    pub fn send(&mut self, kind: u16, transaction: u64, extra: &[u8], payload: &[u8]) {
        let head = size_of::<Descriptor>() + extra.len();
        let total = (head + payload.len()).next_multiple_of(ALIGN);
        let descriptor = Descriptor {
            kind: kind.into(),
            data_offset8: ((head / ALIGN) as u16).into(),
            total_length8: ((total / ALIGN) as u16).into(),
            flags: COMPLETION_REQUESTED.into(),
            transaction: transaction.into(),
        };
        let mut bytes = [descriptor.as_bytes(), extra, payload].concat();
        bytes.resize(total + TRAILER_BYTES, 0);
        for (at, byte) in (self.write..).zip(&bytes) {
            self.memory.write_obj(*byte, GuestAddress(self.to_host + CONTROL_BYTES + at % Front::SIZE)).unwrap();
        }
        self.write = (self.write + bytes.len() as u64) % Front::SIZE;
        self.set_word(self.to_host + control::WRITE_INDEX, self.write);
    }

    /// Sends a payload alone.
    pub fn in_band(&mut self, transaction: u64, payload: &[u8]) {
        self.send(kind::IN_BAND, transaction, &[], payload);
    }

    /// Sends a payload with pages: address and length of each range.
    pub fn direct(&mut self, transaction: u64, ranges: &[(u64, u32)], payload: &[u8]) {
        let mut extra = GpaDirect { reserved: 0.into(), range_count: (ranges.len() as u32).into() }.as_bytes().to_vec();
        for (gpa, length) in ranges {
            let offset = gpa % PAGE_SIZE;
            extra.extend(GpaRange { byte_count: (*length).into(), byte_offset: (offset as u32).into() }.as_bytes());
            (0..(offset + u64::from(*length)).div_ceil(PAGE_SIZE)).for_each(|page| extra.extend((gpa / PAGE_SIZE + page).to_le_bytes()));
        }
        self.send(kind::GPA_DIRECT, transaction, &extra, payload);
    }

    /// The host's next packet.
    pub fn receive(&mut self) -> Option<Received> {
        if self.word(self.to_guest + control::WRITE_INDEX) == self.read {
            return None;
        }
        let byte = |at: u64| self.memory.read_obj::<u8>(GuestAddress(self.to_guest + CONTROL_BYTES + at % Front::SIZE)).unwrap();
        let bytes = |from: u64, to: u64| (from..to).map(|at| byte(self.read + at)).collect::<Vec<u8>>();
        let descriptor = Descriptor::read_from_bytes(&bytes(0, 16)).unwrap();
        let (head, total) = (u64::from(descriptor.data_offset8.get()) * 8, u64::from(descriptor.total_length8.get()) * 8);
        let (extra, payload) = (bytes(16, head), bytes(head, total));
        self.read = (self.read + total + TRAILER_BYTES as u64) % Front::SIZE;
        self.set_word(self.to_guest + control::READ_INDEX, self.read);
        Some(Received { kind: descriptor.kind.get(), transaction: descriptor.transaction.get(), extra, payload })
    }
}
