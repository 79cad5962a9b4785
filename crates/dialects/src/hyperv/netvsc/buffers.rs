//! The two buffers that a guest lends to its card.
//!
//! The receive buffer is cut into parts of a size for one message each; a part is the host's until it has put a message there, and the guest's until
//! it completes the transaction that tells of it. The send buffer is cut into sections, of which the guest says which has a message.

use abi::hyperv::ring::TransferRange;
use vmm::GuestMemory;

use super::packet::MAX_WRAPPING;
use crate::hyperv::vmbus::{Buffer, NotMemory};

/// Bytes of a section of the send buffer; as Hyper-V's.
pub(super) const SECTION_SIZE: u32 = 6144;
/// Parts begin at multiples of this, and hold no less than any answer to a query.
const PART_ALIGN: u32 = 64;
const MIN_PART: u32 = 512;
/// A part in a large buffer, and how many of them make one large. A long packet takes as many parts as it needs, and each costs the guest about as much
/// as a packet; a guest has a buffer of this size for each channel that there could be (Linux: 64).
const LARGE_PART: u32 = 8192;
const MANY_PARTS: u32 = 256;
/// Room for a VLAN's tag that a frame has beyond the MTU.
const TAG: u32 = 4;

/// The buffer that the guest receives into.
pub(super) struct ReceiveBuffer {
    buffer: Buffer,
    /// The guest's name for it.
    pub id: u16,
    pub part_size: u32,
    pub parts: u32,
    free: Vec<u32>,
    /// Which parts the guest has, at the first of each transaction.
    lent: Vec<Vec<u32>>,
}

impl ReceiveBuffer {
    /// Cuts `buffer` for frames of `mtu` bytes; `None` when it is too small for one.
    pub fn new(buffer: Buffer, id: u16, mtu: u32) -> Option<ReceiveBuffer> {
        let least = if buffer.range().len() / LARGE_PART < MANY_PARTS { MIN_PART } else { LARGE_PART };
        let part_size = (mtu + TAG + MAX_WRAPPING as u32).max(least).next_multiple_of(PART_ALIGN);
        let parts = buffer.range().len() / part_size;
        let (free, lent) = ((0..parts).rev().collect(), vec![Vec::new(); parts as usize]);
        (parts > 0).then_some(ReceiveBuffer { buffer, id, part_size, parts, free, lent })
    }

    /// Where the parts end.
    pub fn end(&self) -> u32 {
        self.parts * self.part_size
    }

    /// Whether so many parts are free.
    pub fn has_room(&self, count: usize) -> bool {
        self.free.len() >= count
    }

    /// Puts messages, each in pieces, into free parts. The transaction to be used for them, and where they are; `None` when there are none, too many or
    /// too long ones.
    ///
    /// # Errors
    /// [`NotMemory`]: the guest's buffer is none.
    pub fn put<'p>(
        &mut self,
        memory: &GuestMemory,
        messages: impl ExactSizeIterator<Item = [&'p [u8]; 3]>,
    ) -> Result<Option<(u64, Vec<TransferRange>)>, NotMemory> {
        let Some(rest) = self.free.len().checked_sub(messages.len()) else { return Ok(None) };
        let mut ranges = Vec::with_capacity(messages.len());
        for (message, part) in messages.zip(self.free.get(rest..).unwrap_or_default()) {
            let first = part * self.part_size;
            let end = first + self.part_size;
            let mut at = first;
            for piece in message {
                let Some(length) = u32::try_from(piece.len()).ok().filter(|length| *length <= end - at) else { return Ok(None) };
                self.buffer.range().part(at, length).ok_or(NotMemory)?.write(memory, piece)?;
                at += length;
            }
            ranges.push(TransferRange { byte_count: (at - first).into(), byte_offset: first.into() });
        }
        let parts = self.free.split_off(rest);
        let Some(first) = parts.first().copied() else { return Ok(None) };
        if let Some(lent) = self.lent.get_mut(first as usize) {
            *lent = parts;
        }
        // Zero is for messages that nobody answers.
        Ok(Some((u64::from(first) + 1, ranges)))
    }

    /// The guest has completed a transaction. One that it has not is of no meaning.
    pub fn complete(&mut self, transaction: u64) {
        let Some(part) = transaction.checked_sub(1).and_then(|part| usize::try_from(part).ok()) else { return };
        if let Some(lent) = self.lent.get_mut(part) {
            self.free.append(lent);
        }
    }
}

/// The buffer that the guest sends from.
pub(super) struct SendBuffer(pub Buffer);

impl SendBuffer {
    /// Copies the first bytes of a section.
    pub fn read(&self, memory: &GuestMemory, section: u32, bytes: &mut [u8]) -> Result<(), NotMemory> {
        let length = u32::try_from(bytes.len()).map_err(|_| NotMemory)?;
        let at = section.checked_mul(SECTION_SIZE).ok_or(NotMemory)?;
        let section = self.0.range().part(at, SECTION_SIZE).ok_or(NotMemory)?;
        section.part(0, length).ok_or(NotMemory)?.read(memory, bytes)
    }
}
