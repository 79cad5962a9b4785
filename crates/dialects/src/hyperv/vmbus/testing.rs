//! A guest that is none, for tests of VMBus and of devices: it speaks the messages, lends pages, and has the other ends of rings.
//!
//! Its pages go downwards from the end of its memory, so that ranges of several pages never lie together. Nothing here judges: a test sends what it
//! likes and looks at what came.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use abi::hyperv::hypercall::Status;
use abi::hyperv::ring::{CONTROL_BYTES, Descriptor, GpaDirect, GpaRange, TRAILER_BYTES, control};
use abi::hyperv::vmbus::{
    GPADL_BODY_PFNS, GPADL_HEADER_PFNS, GpadlBody, GpadlHeader, GpadlTeardown, Header, InitiateContact, MESSAGE_CONNECTION,
    MESSAGE_CONNECTION_5, MESSAGE_TYPE, Offer, Open, OpenResult, Relid, SINT, USER_BYTES, VersionResponse, message, version,
};
use vm_memory::{Bytes, GuestAddress};
use vmm::GuestMemory;
use vmm::memory::PAGE_SIZE;
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Connections, Synic, VmBus};

/// Bytes of the guest's memory.
pub const MEMORY: u64 = 64 << 20;

/// What the host has sent: messages and event flags, by processor.
#[derive(Default)]
pub struct Mail {
    messages: Mutex<VecDeque<(u32, Vec<u8>)>>,
    events: Mutex<HashMap<(u32, u16), usize>>,
}

impl Synic for Mail {
    fn post_message(&self, vp: u32, sint: u8, kind: u32, payload: &[u8]) -> bool {
        assert_eq!(kind, MESSAGE_TYPE);
        assert!(sint < 16);
        lock(&self.messages).push_back((vp, payload.to_vec()));
        true
    }

    fn signal_event(&self, vp: u32, sint: u8, flag: u16) -> bool {
        assert!(sint < 16);
        *lock(&self.events).entry((vp, flag)).or_default() += 1;
        true
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The guest.
pub struct Guest {
    /// Its memory.
    pub memory: GuestMemory,
    /// Its host.
    pub bus: Arc<VmBus>,
    mail: Arc<Mail>,
    next_page: u64,
    next_gpadl: u32,
}

impl Default for Guest {
    fn default() -> Guest {
        Guest::new()
    }
}

impl Guest {
    /// A guest that has not said anything yet.
    ///
    /// # Panics
    /// When the host has no memory; here and below, tests end by panics.
    #[expect(clippy::unwrap_used, reason = "tests end by panics, and this is for tests alone")]
    pub fn new() -> Guest {
        let memory = vmm::memory::map(&[(0, MEMORY)]).unwrap();
        let mail = Arc::new(Mail::default());
        let bus = VmBus::new(memory.clone(), mail.clone());
        Guest { memory, bus, mail, next_page: MEMORY / PAGE_SIZE, next_gpadl: 0xe1e10 }
    }

    /// Posts a message.
    pub fn post(&self, message: &(impl IntoBytes + Immutable + ?Sized)) {
        let status = self.bus.post_message(MESSAGE_CONNECTION, MESSAGE_TYPE, message.as_bytes());
        assert_eq!(status, Status::SUCCESS);
    }

    /// The next message of the host, and the processor that it came to.
    pub fn next(&self) -> Option<(u32, Vec<u8>)> {
        lock(&self.mail.messages).pop_front()
    }

    /// The next message of the host, which is such a one.
    ///
    /// # Panics
    /// When there is none, or it is another one.
    #[expect(clippy::unwrap_used, reason = "as above")]
    pub fn expect<M: FromBytes + KnownLayout + Immutable>(&self, kind: u32) -> M {
        let (_, bytes) = self.next().unwrap_or_else(|| panic!("no message of kind {kind}"));
        assert_eq!(Header::ref_from_prefix(&bytes).unwrap().0.kind.get(), kind);
        // The whole message and no more: Linux drops shorter ones.
        M::read_from_bytes(&bytes).unwrap()
    }

    /// Asks for a version and says what the host answered.
    pub fn contact(&self, version: u32) -> VersionResponse {
        let message = InitiateContact {
            header: Header::new(message::INITIATE_CONTACT),
            version: version.into(),
            target_vp: 0.into(),
            interrupt_page: u64::from(SINT).into(),
            monitor_to_guest: 0.into(),
            monitor_to_host: 0.into(),
        };
        let status = self.bus.post_message(MESSAGE_CONNECTION_5, MESSAGE_TYPE, message.as_bytes());
        assert_eq!(status, Status::SUCCESS);
        self.expect(message::VERSION_RESPONSE)
    }

    /// Connects with the newest version and says what is offered.
    pub fn connect(&self) -> Vec<Offer> {
        assert_eq!(self.contact(version::WIN10_V5_3).supported, 1);
        self.offers()
    }

    /// Asks what is there.
    pub fn offers(&self) -> Vec<Offer> {
        self.post(&Header::new(message::REQUEST_OFFERS));
        let mut offers = Vec::new();
        while let Some((_, bytes)) = self.next() {
            match Offer::read_from_bytes(&bytes) {
                Ok(offer) => offers.push(offer),
                Err(_) => return offers,
            }
        }
        panic!("the offers have no end")
    }

    /// Numbers of `count` pages that nobody uses.
    pub fn pages(&mut self, count: u32) -> Vec<u64> {
        self.next_page -= u64::from(count);
        (self.next_page..self.next_page + u64::from(count)).rev().collect()
    }

    /// Lends pages to a channel, and says by which number and whether the host took them.
    pub fn lend(&mut self, relid: u32, pfns: &[u64]) -> (u32, bool) {
        self.next_gpadl += 1;
        let gpadl = self.next_gpadl;
        self.lend_as(gpadl, relid, pfns);
        let created: abi::hyperv::vmbus::GpadlCreated = self.expect(message::GPADL_CREATED);
        assert_eq!((created.gpadl.get(), created.relid.get()), (gpadl, relid));
        (gpadl, created.status.get() == 0)
    }

    /// Sends the messages that lend pages.
    pub fn lend_as(&self, gpadl: u32, relid: u32, pfns: &[u64]) {
        let pfns: Vec<U64> = pfns.iter().map(|pfn| U64::new(*pfn)).collect();
        let (first, rest) = pfns.split_at(pfns.len().min(GPADL_HEADER_PFNS));
        let header = GpadlHeader {
            header: Header::new(message::GPADL_HEADER),
            relid: relid.into(),
            gpadl: gpadl.into(),
            range_buflen: (8 + 8 * pfns.len() as u16).into(),
            range_count: 1.into(),
            byte_count: ((pfns.len() as u64 * PAGE_SIZE) as u32).into(),
            byte_offset: 0.into(),
        };
        self.post([header.as_bytes(), first.as_bytes()].concat().as_slice());
        for piece in rest.chunks(GPADL_BODY_PFNS) {
            let body = GpadlBody { header: Header::new(message::GPADL_BODY), message_number: 0.into(), gpadl: gpadl.into() };
            self.post([body.as_bytes(), piece.as_bytes()].concat().as_slice());
        }
    }

    /// Asks for lent pages back.
    pub fn tear_down(&self, relid: u32, gpadl: u32) {
        self.post(&GpadlTeardown { header: Header::new(message::GPADL_TEARDOWN), relid: relid.into(), gpadl: gpadl.into() });
    }

    /// A message that names a channel alone.
    pub fn post_relid(&self, kind: u32, relid: u32) {
        self.post(&Relid { header: Header::new(kind), relid: relid.into() });
    }

    /// Asks to open a channel; whether the host did.
    pub fn open_with(&self, relid: u32, gpadl: u32, downstream: u32, target_vp: u32) -> bool {
        self.post_open(relid, gpadl, downstream, target_vp);
        let result: OpenResult = self.expect(message::OPEN_RESULT);
        assert_eq!((result.relid.get(), result.open_id.get()), (relid, 0x77));
        result.status.get() == 0
    }

    /// Sends the message that opens a channel.
    pub fn post_open(&self, relid: u32, gpadl: u32, downstream: u32, target_vp: u32) {
        self.post(&Open {
            header: Header::new(message::OPEN),
            relid: relid.into(),
            open_id: 0x77.into(),
            ring_gpadl: gpadl.into(),
            target_vp: target_vp.into(),
            downstream_page_offset: downstream.into(),
            user_data: [0; USER_BYTES],
        });
    }

    /// Opens a channel with rings of `pages` pages each, the control page among them.
    ///
    /// # Panics
    /// When the host refuses.
    pub fn open(&mut self, relid: u32, pages: u32) -> GuestChannel {
        let pfns = self.pages(2 * pages);
        let (gpadl, is_lent) = self.lend(relid, &pfns);
        assert!(is_lent);
        let (to_host, to_guest) = pfns.split_at(pages as usize);
        let ring = |pfns: &[u64]| GuestRing { memory: self.memory.clone(), pfns: pfns.to_vec(), index: 0 };
        let channel = GuestChannel { relid, gpadl, to_host: ring(to_host), to_guest: ring(to_guest) };
        for ring in [&channel.to_host, &channel.to_guest] {
            ring.set_word(control::FEATURE_BITS, control::FEATURE_PENDING_SEND_SIZE);
        }
        assert!(self.open_with(relid, gpadl, pages, 0));
        channel
    }

    /// Closes a channel and takes its rings back; whether the host has let go of them.
    pub fn close(&self, channel: GuestChannel) -> bool {
        self.post_relid(message::CLOSE, channel.relid);
        self.tear_down(channel.relid, channel.gpadl);
        let torn = |message: &(u32, Vec<u8>)| message.1.first() == Some(&(message::GPADL_TORNDOWN as u8));
        let mut messages = lock(&self.mail.messages);
        let place = messages.iter().position(torn);
        place.and_then(|place| messages.remove(place)).is_some()
    }

    /// How often the event flag came since this was last asked.
    pub fn events(&self, vp: u32, flag: u16) -> usize {
        lock(&self.mail.events).remove(&(vp, flag)).unwrap_or(0)
    }
}

/// The guest's end of a channel.
pub struct GuestChannel {
    /// Its number.
    pub relid: u32,
    /// The rings' GPADL.
    pub gpadl: u32,
    /// Where the guest writes.
    pub to_host: GuestRing,
    /// Where the guest reads.
    pub to_guest: GuestRing,
}

/// One ring.
pub struct GuestRing {
    memory: GuestMemory,
    pfns: Vec<u64>,
    /// Where the guest goes on.
    index: u32,
}

/// A packet of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// [`abi::hyperv::ring::kind`].
    pub kind: u16,
    /// Whether the host wants a completion.
    pub flags: u16,
    /// Transaction.
    pub transaction: u64,
    /// Between descriptor and payload.
    pub extra: Vec<u8>,
    /// Payload with padding.
    pub payload: Vec<u8>,
}

#[expect(clippy::unwrap_used, reason = "tests end by panics, and this is for tests alone")]
impl GuestRing {
    /// Bytes of data.
    pub fn size(&self) -> u32 {
        (self.pfns.len() as u64 * PAGE_SIZE - CONTROL_BYTES) as u32
    }

    /// A word of the control page.
    ///
    /// # Panics
    /// Never, as the page is memory; here and below.
    pub fn word(&self, offset: u64) -> u32 {
        self.memory.read_obj(GuestAddress(self.pfns[0] * PAGE_SIZE + offset)).unwrap()
    }

    /// Sets a word of the control page.
    pub fn set_word(&self, offset: u64, value: u32) {
        self.memory.write_obj(value, GuestAddress(self.pfns[0] * PAGE_SIZE + offset)).unwrap();
    }

    fn gpa(&self, index: u32) -> GuestAddress {
        let at = u64::from(index % self.size()) + CONTROL_BYTES;
        GuestAddress(self.pfns[(at / PAGE_SIZE) as usize] * PAGE_SIZE + at % PAGE_SIZE)
    }

    /// Writes bytes where the guest goes on, without showing them to the host. Words never cross pages, as indices are multiples of 8.
    pub fn write(&mut self, bytes: &[u8]) {
        for word in bytes.chunks(8) {
            self.memory.write_slice(word, self.gpa(self.index)).unwrap();
            self.index = (self.index + word.len() as u32) % self.size();
        }
    }

    fn read(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        for word in bytes.chunks_mut(8) {
            self.memory.read_slice(word, self.gpa(self.index)).unwrap();
            self.index = (self.index + word.len() as u32) % self.size();
        }
        bytes
    }
}

#[expect(clippy::unwrap_used, reason = "as above")]
impl GuestChannel {
    /// Sends a packet.
    pub fn send(&mut self, kind: u16, flags: u16, transaction: u64, extra: &[u8], payload: &[u8]) {
        let mut body = [extra, payload].concat();
        body.resize(body.len().next_multiple_of(8), 0);
        let head = size_of::<Descriptor>() + extra.len();
        let descriptor = Descriptor {
            kind: kind.into(),
            data_offset8: (head as u16 / 8).into(),
            total_length8: ((size_of::<Descriptor>() + body.len()) as u16 / 8).into(),
            flags: flags.into(),
            transaction: transaction.into(),
        };
        self.send_bytes(&[descriptor.as_bytes(), &body, &[0; TRAILER_BYTES]].concat());
    }

    /// Sends a packet with data in pages.
    pub fn send_with_pages(&mut self, transaction: u64, ranges: &[(u32, u32, &[u64])], payload: &[u8]) {
        let mut extra = GpaDirect { reserved: 0.into(), range_count: (ranges.len() as u32).into() }.as_bytes().to_vec();
        for (len, offset, pfns) in ranges {
            extra.extend_from_slice(GpaRange { byte_count: (*len).into(), byte_offset: (*offset).into() }.as_bytes());
            pfns.iter().for_each(|pfn| extra.extend_from_slice(&pfn.to_le_bytes()));
        }
        self.send(abi::hyperv::ring::kind::GPA_DIRECT, abi::hyperv::ring::COMPLETION_REQUESTED, transaction, &extra, payload);
    }

    /// Puts bytes into the ring and shows them to the host.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        self.to_host.write(bytes);
        self.to_host.set_word(control::WRITE_INDEX, self.to_host.index);
    }

    /// The next packet of the host.
    ///
    /// # Panics
    /// When its trailer is not right.
    pub fn receive(&mut self) -> Option<Received> {
        let begin = self.to_guest.index;
        if self.to_guest.word(control::WRITE_INDEX) == begin {
            return None;
        }
        let head = self.to_guest.read(size_of::<Descriptor>());
        let descriptor = Descriptor::read_from_bytes(&head).unwrap();
        let (offset, total) = (usize::from(descriptor.data_offset8.get()) * 8, usize::from(descriptor.total_length8.get()) * 8);
        let extra = self.to_guest.read(offset - head.len());
        let payload = self.to_guest.read(total - offset);
        assert_eq!(self.to_guest.read(TRAILER_BYTES), (u64::from(begin) << 32).to_le_bytes());
        self.to_guest.set_word(control::READ_INDEX, self.to_guest.index);
        let (kind, flags, transaction) = (descriptor.kind.get(), descriptor.flags.get(), descriptor.transaction.get());
        Some(Received { kind, flags, transaction, extra, payload })
    }
}
