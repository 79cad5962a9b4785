//! The channel of a card: NVSP messages and their completions, the guest's RNDIS messages in slots of its own, the host's in the receive buffer
//! ([`abi::hyperv::netvsc`]).
//!
//! ```text
//!   slot --GPA direct--> host, which completes it        receive buffer <--transfer pages-- host, which gets it back when all are taken
//! ```

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;

use abi::hyperv::netvsc::{CHANNEL_CONTROL, CHANNEL_DATA, MESSAGE_SIZE, NO_SECTION, RndisPacket, kind as nvsp, status};
use abi::hyperv::ring::kind;
use zerocopy::{FromZeros, Immutable, IntoBytes};

use super::super::Platform;
use super::super::channel::{Channel, PAGE, Packet};
use super::super::hyperv0::{Buffer, Failure};
use super::RECEIVE_BUFFER_ID;
use crate::hal::Dma;
use crate::hal::HalError;

/// RNDIS messages of the guest's that may be under way.
const SLOTS: usize = 64;
/// Transaction of NVSP requests, of which there is one at a time; those of slots are their numbers.
const REQUEST: u64 = 1 << 32;
/// Most packets of the host's that wait to be taken.
const WAITING: usize = 1024;

pub(super) struct Wire<'h> {
    platform: Arc<Platform<'h>>,
    channel: Channel<'h>,
    /// Where the host's messages are.
    pub buffer: Buffer,
    /// Made as they are needed.
    slots: Vec<Slot>,
    /// A request waits for its completion, or has it.
    request: Request,
    waiting: VecDeque<Transfer>,
    /// Packets that were taken, but whose completions found no room.
    taken: VecDeque<u64>,
}

/// One page, for one message.
struct Slot {
    memory: Dma,
    /// The host may read it.
    is_open: bool,
}

enum Request {
    None,
    Open,
    Answered(Vec<u8>),
}

/// RNDIS messages that came in one packet.
struct Transfer {
    transaction: u64,
    /// Those that were not taken yet.
    places: VecDeque<Range<usize>>,
}

impl<'h> Wire<'h> {
    pub fn new(platform: &Arc<Platform<'h>>, channel: Channel<'h>, buffer: Buffer) -> Wire<'h> {
        let (waiting, taken) = (VecDeque::new(), VecDeque::new());
        Wire { platform: Arc::clone(platform), channel, buffer, slots: Vec::new(), request: Request::None, waiting, taken }
    }

    /// Sends an NVSP message that is completed by an answer.
    pub fn request(&mut self, kind: u32, body: &(impl IntoBytes + Immutable)) -> Result<(), Failure> {
        self.request = Request::Open;
        let is_sent = self.channel.request(REQUEST, &message(kind, body))?;
        // There is one at a time.
        if is_sent { Ok(()) } else { Err(Failure::Broken) }
    }

    /// Sends an NVSP message that has no answer.
    pub fn tell(&mut self, kind: u32, body: &(impl IntoBytes + Immutable)) -> Result<(), Failure> {
        if self.channel.tell(REQUEST, &message(kind, body))? { Ok(()) } else { Err(Failure::Broken) }
    }

    /// The answer to the request, if it has come.
    pub fn answer(&mut self) -> Option<Vec<u8>> {
        match core::mem::replace(&mut self.request, Request::None) {
            Request::Answered(answer) => Some(answer),
            other => {
                self.request = other;
                None
            }
        }
    }

    /// Sends an RNDIS message of a page at most; `false` when there is no room.
    pub fn send(&mut self, rndis: &[u8], is_control: bool) -> Result<bool, Failure> {
        let Some(at) = self.free_slot()? else { return Ok(false) };
        let Some(slot) = self.slots.get_mut(at) else { return Ok(false) };
        slot.memory.write(0, rndis)?;
        let channel = if is_control { CHANNEL_CONTROL } else { CHANNEL_DATA };
        let body = RndisPacket { channel: channel.into(), section_index: NO_SECTION.into(), section_size: 0.into() };
        let message = message(nvsp::SEND_RNDIS_PACKET, &body);
        slot.is_open = self.channel.request_about(at as u64, &slot.memory, rndis.len(), &message)?;
        Ok(slot.is_open)
    }

    /// Takes the host's next RNDIS message: `work` has the buffer, and where in it the message is.
    pub fn take<T>(&mut self, work: impl FnOnce(&Dma, Range<usize>) -> Result<T, HalError>) -> Result<Option<T>, Failure> {
        let Some(transfer) = self.waiting.front_mut() else { return Ok(None) };
        let place = transfer.places.pop_front().unwrap_or_default();
        let done = work(&self.buffer.memory, place)?;
        if transfer.places.is_empty() {
            self.taken.extend(self.waiting.pop_front().map(|transfer| transfer.transaction));
            self.complete()?;
        }
        Ok(Some(done))
    }

    /// Takes note of what the host has sent.
    pub fn pump(&mut self) -> Result<(), Failure> {
        self.platform.synic.acknowledge()?;
        self.complete()?;
        while let Some(packet) = self.channel.receive()? {
            match packet.kind {
                kind::COMPLETION => self.completed(&packet)?,
                kind::TRANSFER_PAGES => self.transferred(&packet)?,
                // Advice of the host's: which channels to use, of which there is one.
                _ => {}
            }
        }
        Ok(())
    }

    /// The channel is closed: memory that the host does not use is the system's again.
    pub fn close(self) {
        for slot in self.slots.into_iter().filter(|slot| !slot.is_open) {
            self.platform.hal.dma_free(slot.memory);
        }
    }

    fn completed(&mut self, packet: &Packet) -> Result<(), Failure> {
        if packet.transaction == REQUEST {
            return match self.request {
                Request::Open => {
                    self.request = Request::Answered(packet.payload().to_vec());
                    Ok(())
                }
                _ => Err(Failure::Broken),
            };
        }
        let at = usize::try_from(packet.transaction).unwrap_or(usize::MAX);
        let slot = self.slots.get_mut(at).filter(|slot| slot.is_open).ok_or(Failure::Broken)?;
        slot.is_open = false;
        Ok(())
    }

    fn transferred(&mut self, packet: &Packet) -> Result<(), Failure> {
        let (id, ranges) = packet.transfer().ok_or(Failure::Broken)?;
        let size = self.buffer.memory.words().len() * 4;
        let places = ranges.iter().map(|range| {
            let start = usize::try_from(range.byte_offset.get()).ok()?;
            let end = start.checked_add(usize::try_from(range.byte_count.get()).ok()?)?;
            (end <= size).then_some(start..end)
        });
        let places: Option<VecDeque<Range<usize>>> = places.collect();
        match places {
            Some(places) if id == RECEIVE_BUFFER_ID && !places.is_empty() && self.waiting.len() < WAITING => {
                self.waiting.push_back(Transfer { transaction: packet.transaction, places });
                Ok(())
            }
            _ => Err(Failure::Broken),
        }
    }

    /// Gives back what was taken.
    fn complete(&mut self) -> Result<(), Failure> {
        let answer = message(nvsp::SEND_RNDIS_PACKET_COMPLETE, &status::SUCCESS.to_le_bytes());
        while let Some(transaction) = self.taken.front() {
            if !self.channel.complete(*transaction, &answer)? {
                break;
            }
            self.taken.pop_front();
        }
        Ok(())
    }

    /// A slot that the host does not read, if there is one or one more can be made.
    fn free_slot(&mut self) -> Result<Option<usize>, HalError> {
        let free = self.slots.iter().position(|slot| !slot.is_open);
        if free.is_some() || self.slots.len() == SLOTS {
            return Ok(free);
        }
        let memory = self.platform.hal.dma_alloc(1)?;
        self.slots.push(Slot { memory, is_open: false });
        Ok(Some(self.slots.len() - 1))
    }
}

/// An NVSP message, as long as the longest.
fn message(kind: u32, body: &(impl IntoBytes + Immutable)) -> [u8; MESSAGE_SIZE] {
    let mut message = <[u8; MESSAGE_SIZE]>::new_zeroed();
    message.iter_mut().zip(kind.to_le_bytes().iter().chain(body.as_bytes())).for_each(|(to, from)| *to = *from);
    message
}

/// Most bytes of an RNDIS message of the guest's.
pub(super) const MAX_MESSAGE: usize = PAGE;
