//! The two buffers that a guest lends to its card.
//!
//! The receive buffer is cut into parts of a size for one message each; a part is the host's until it has put a message there, and the guest's until
//! it completes that. The send buffer is cut into sections, of which the guest says which has a message.

use abi::hyperv::ring::TransferRange;
use vmm::GuestMemory;

use super::packet::MAX_WRAPPING;
use crate::hyperv::vmbus::{Buffer, NotMemory};

/// Bytes of a section of the send buffer; as Hyper-V's.
pub(super) const SECTION_SIZE: u32 = 6144;
/// Parts begin at multiples of this, and hold no less than any answer to a query.
const PART_ALIGN: u32 = 64;
const MIN_PART: u32 = 512;
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
    /// Which parts the guest has.
    lent: Vec<bool>,
}

impl ReceiveBuffer {
    /// Cuts `buffer` for frames of `mtu` bytes; `None` when it is too small for one.
    pub fn new(buffer: Buffer, id: u16, mtu: u32) -> Option<ReceiveBuffer> {
        let part_size = (mtu + TAG + MAX_WRAPPING as u32).max(MIN_PART).next_multiple_of(PART_ALIGN);
        let parts = buffer.range().len() / part_size;
        let (free, lent) = ((0..parts).rev().collect(), vec![false; parts as usize]);
        (parts > 0).then_some(ReceiveBuffer { buffer, id, part_size, parts, free, lent })
    }

    /// Where the parts end.
    pub fn end(&self) -> u32 {
        self.parts * self.part_size
    }

    /// Whether a part is free.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Puts a message, in pieces, into a free part. The transaction to be used for it, and where it is; `None` when no part is free or large enough.
    ///
    /// # Errors
    /// [`NotMemory`]: the guest's buffer is none.
    pub fn put(&mut self, memory: &GuestMemory, pieces: &[&[u8]]) -> Result<Option<(u64, TransferRange)>, NotMemory> {
        let length = pieces.iter().map(|piece| piece.len()).sum::<usize>();
        let Some(length) = u32::try_from(length).ok().filter(|length| *length <= self.part_size) else { return Ok(None) };
        let Some(part) = self.free.pop() else { return Ok(None) };
        let first = part * self.part_size;
        let mut at = first;
        for piece in pieces {
            let room = self.buffer.range().part(at, piece.len() as u32).ok_or(NotMemory)?;
            room.write(memory, piece)?;
            at += piece.len() as u32;
        }
        if let Some(lent) = self.lent.get_mut(part as usize) {
            *lent = true;
        }
        // Zero is for messages that nobody answers.
        Ok(Some((u64::from(part) + 1, TransferRange { byte_count: length.into(), byte_offset: first.into() })))
    }

    /// The guest has completed a transaction. One that it has not is of no meaning.
    pub fn complete(&mut self, transaction: u64) {
        let Some(part) = transaction.checked_sub(1).and_then(|part| usize::try_from(part).ok()) else { return };
        if let Some(lent) = self.lent.get_mut(part).filter(|lent| **lent) {
            *lent = false;
            self.free.push(part as u32);
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
