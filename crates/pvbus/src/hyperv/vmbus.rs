//! VMBus: which channels there are, and how each is opened and closed. A state machine: messages of the host go in, messages to the host come out.
//!
//! ```text
//!   Offered --open--> Sharing --created, all--> Opening --result--> Open
//!      |                 |                         |                 |
//!      +-- rescinded ----+-- rescinded, refused, or closed ----------+--> Closing --torn down, all--> Unused, or released
//! ```
//!
//! Whatever else a host says changes nothing: answers that nobody waits for, channels that nobody was offered. Memory that the host was given
//! comes back when the host says that it has let go of it, and otherwise stays where it is. (The words and the order: [`abi::hyperv::vmbus`].)

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;

use abi::hyperv::ring::CONTROL_BYTES;
use abi::hyperv::vmbus::{
    GPA_RANGE, GPADL_BODY_PFNS, GPADL_HEADER_PFNS, GpadlBody, GpadlCreated, GpadlHeader, GpadlTeardown, GpadlTorndown, Header,
    MAX_CHANNELS, Offer, Open, OpenResult, Relid, STATUS_SUCCESS, USER_BYTES, message,
};
use zerocopy::{FromBytes, IntoBytes};

use super::channel::page_numbers;
use crate::hal::Dma;

/// The first GPADL's number: any will do, this is OpenBSD's.
const FIRST_GPADL: u32 = 0x10000;

/// What the host tells of, for whoever has the devices.
#[derive(Debug)]
pub(super) enum Notice {
    /// There is a channel.
    Offered(Offer),
    /// These were all that there are at the beginning.
    AllOffered,
    /// A channel is open; the buffer that was shared with it has this GPADL.
    Opened {
        /// Which.
        relid: u32,
        /// The buffer's GPADL.
        buffer: Option<u32>,
    },
    /// The host does not open a channel.
    Refused(u32),
    /// A channel is the host's again.
    Rescinded(u32),
    /// The host has let go of this memory.
    Freed(Arc<Dma>),
    /// The host has let go of everything.
    Unloaded,
}

/// The guest's end of the bus.
pub(super) struct VmBus {
    /// Messages that are to be posted.
    outgoing: VecDeque<Vec<u8>>,
    channels: BTreeMap<u32, Channel>,
    next_gpadl: u32,
    /// Processor that gets events.
    vp: u32,
}

/// A channel that was offered.
struct Channel {
    state: State,
    is_rescinded: bool,
    gpadls: Vec<Gpadl>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Unused,
    Sharing,
    Opening,
    Open,
    Closing,
}

/// Memory that the host has, or will have.
struct Gpadl {
    number: u32,
    memory: Arc<Dma>,
    is_created: bool,
}

impl VmBus {
    /// A bus whose host's events go to processor `vp`.
    pub const fn new(vp: u32) -> VmBus {
        VmBus { outgoing: VecDeque::new(), channels: BTreeMap::new(), next_gpadl: FIRST_GPADL, vp }
    }

    /// Asks for what there is.
    pub fn request_offers(&mut self) {
        self.say(&[Header::new(message::REQUEST_OFFERS).as_bytes()]);
    }

    /// Says that nothing is used any more.
    pub fn unload(&mut self) {
        self.outgoing.clear();
        self.say(&[Header::new(message::UNLOAD).as_bytes()]);
    }

    /// Opens a channel that was offered, with memory for its rings and, if it has one, for its buffer.
    pub fn open(&mut self, relid: u32, rings: Arc<Dma>, buffer: Option<Arc<Dma>>) {
        let memory = [Some(rings), buffer].into_iter().flatten();
        let gpadls: Vec<Gpadl> = memory.map(|memory| self.share(relid, memory)).collect();
        match self.channels.get_mut(&relid) {
            Some(channel) if channel.state == State::Unused => (channel.state, channel.gpadls) = (State::Sharing, gpadls),
            _ => {}
        }
    }

    /// Closes a channel. The host may not offer it anew.
    pub fn close(&mut self, relid: u32) {
        let Some(channel) = self.channels.get_mut(&relid) else { return };
        if matches!(channel.state, State::Unused | State::Closing) {
            return;
        }
        let was_sharing = core::mem::replace(&mut channel.state, State::Closing) == State::Sharing;
        let gpadls: Vec<u32> = channel.gpadls.iter().map(|gpadl| gpadl.number).collect();
        if !was_sharing {
            self.say_relid(message::CLOSE, relid);
        }
        for gpadl in gpadls {
            let header = Header::new(message::GPADL_TEARDOWN);
            self.say(&[GpadlTeardown { header, relid: relid.into(), gpadl: gpadl.into() }.as_bytes()]);
        }
        self.release(relid);
    }

    /// The next message to be posted; it stays the next until [`VmBus::posted`].
    pub fn outgoing(&self) -> Option<&[u8]> {
        self.outgoing.front().map(Vec::as_slice)
    }

    /// The next message was posted.
    pub fn posted(&mut self) {
        self.outgoing.pop_front();
    }

    /// Takes a message of the host's.
    pub fn on(&mut self, bytes: &[u8]) -> Option<Notice> {
        let (header, _) = Header::read_from_prefix(bytes).ok()?;
        match header.kind.get() {
            message::OFFER => self.offered(read(bytes)?),
            message::ALL_OFFERS_DELIVERED => Some(Notice::AllOffered),
            message::RESCIND => self.rescinded(read::<Relid>(bytes)?.relid.get()),
            message::GPADL_CREATED => self.created(read(bytes)?),
            message::OPEN_RESULT => self.opened(read(bytes)?),
            message::GPADL_TORNDOWN => self.torn_down(read::<GpadlTorndown>(bytes)?.gpadl.get()),
            message::UNLOAD_RESPONSE => Some(Notice::Unloaded),
            _ => None,
        }
    }

    fn offered(&mut self, offer: Offer) -> Option<Notice> {
        let relid = offer.relid.get();
        if !(1..=MAX_CHANNELS).contains(&relid) || self.channels.contains_key(&relid) {
            return None;
        }
        self.channels.insert(relid, Channel { state: State::Unused, is_rescinded: false, gpadls: Vec::new() });
        Some(Notice::Offered(offer))
    }

    fn rescinded(&mut self, relid: u32) -> Option<Notice> {
        let channel = self.channels.get_mut(&relid).filter(|channel| !channel.is_rescinded)?;
        channel.is_rescinded = true;
        self.close(relid);
        self.release(relid);
        Some(Notice::Rescinded(relid))
    }

    fn created(&mut self, created: GpadlCreated) -> Option<Notice> {
        let relid = created.relid.get();
        let channel = self.channels.get_mut(&relid).filter(|channel| channel.state == State::Sharing)?;
        let gpadl = channel.gpadls.iter_mut().find(|gpadl| gpadl.number == created.gpadl.get() && !gpadl.is_created)?;
        if created.status.get() != STATUS_SUCCESS {
            // Nothing was made, and nothing is to be torn down.
            channel.gpadls.retain(|gpadl| gpadl.number != created.gpadl.get());
            self.close(relid);
            return Some(Notice::Refused(relid));
        }
        gpadl.is_created = true;
        if !channel.gpadls.iter().all(|gpadl| gpadl.is_created) {
            return None;
        }
        let rings = channel.gpadls.first()?;
        let open = Open {
            header: Header::new(message::OPEN),
            relid: relid.into(),
            open_id: relid.into(),
            ring_gpadl: rings.number.into(),
            target_vp: self.vp.into(),
            // Both rings are of the same size.
            downstream_page_offset: u32::try_from(page_numbers(&rings.memory).count() / 2).ok()?.into(),
            user_data: [0; USER_BYTES],
        };
        channel.state = State::Opening;
        self.say(&[open.as_bytes()]);
        None
    }

    fn opened(&mut self, result: OpenResult) -> Option<Notice> {
        let relid = result.relid.get();
        let channel = self.channels.get_mut(&relid).filter(|channel| channel.state == State::Opening)?;
        if result.open_id.get() != relid {
            return None;
        }
        if result.status.get() != STATUS_SUCCESS {
            // What is not open cannot be closed.
            channel.state = State::Sharing;
            self.close(relid);
            return Some(Notice::Refused(relid));
        }
        channel.state = State::Open;
        Some(Notice::Opened { relid, buffer: channel.gpadls.get(1).map(|gpadl| gpadl.number) })
    }

    fn torn_down(&mut self, number: u32) -> Option<Notice> {
        let closing = |channel: &&mut Channel| channel.state == State::Closing;
        let (relid, at) = self.channels.iter().find_map(|(relid, channel)| {
            let at = channel.gpadls.iter().position(|gpadl| gpadl.number == number)?;
            Some((*relid, at))
        })?;
        let channel = self.channels.get_mut(&relid).filter(closing)?;
        let memory = channel.gpadls.swap_remove(at).memory;
        self.release(relid);
        Some(Notice::Freed(memory))
    }

    /// Gives a rescinded channel's number back when nothing is left of it.
    fn release(&mut self, relid: u32) {
        let Some(channel) = self.channels.get_mut(&relid).filter(|channel| channel.gpadls.is_empty()) else { return };
        if channel.state == State::Closing {
            channel.state = State::Unused;
        }
        if channel.is_rescinded && channel.state == State::Unused {
            self.channels.remove(&relid);
            self.say_relid(message::RELID_RELEASED, relid);
        }
    }

    /// Gives memory to the host.
    fn share(&mut self, relid: u32, memory: Arc<Dma>) -> Gpadl {
        let number = self.next_gpadl;
        self.next_gpadl = number.wrapping_add(1).max(1);
        let pages: Vec<u64> = page_numbers(&memory).collect();
        let (first, rest) = pages.split_at(pages.len().min(GPADL_HEADER_PFNS));
        let bytes_of = |pages: &[u64]| pages.iter().flat_map(|page| page.to_le_bytes()).collect::<Vec<u8>>();
        let header = GpadlHeader {
            header: Header::new(message::GPADL_HEADER),
            relid: relid.into(),
            gpadl: number.into(),
            range_buflen: u16::try_from(GPA_RANGE + pages.len() * 8).unwrap_or(u16::MAX).into(),
            range_count: 1.into(),
            byte_count: u32::try_from(pages.len() as u64 * CONTROL_BYTES).unwrap_or(u32::MAX).into(),
            byte_offset: 0.into(),
        };
        self.say(&[header.as_bytes(), &bytes_of(first)]);
        for pages in rest.chunks(GPADL_BODY_PFNS) {
            let body = GpadlBody { header: Header::new(message::GPADL_BODY), message_number: 0.into(), gpadl: number.into() };
            self.say(&[body.as_bytes(), &bytes_of(pages)]);
        }
        Gpadl { number, memory, is_created: false }
    }

    fn say_relid(&mut self, kind: u32, relid: u32) {
        self.say(&[Relid { header: Header::new(kind), relid: relid.into() }.as_bytes()]);
    }

    fn say(&mut self, parts: &[&[u8]]) {
        self.outgoing.push_back(parts.concat());
    }
}

/// A message whose end may be missing is none.
fn read<T: FromBytes>(bytes: &[u8]) -> Option<T> {
    T::read_from_prefix(bytes).ok().map(|(message, _)| message)
}
