//! The two rings of a channel from the host's side, in pages of a GPADL. See [`abi::hyperv::ring`] for their layout and the signals.
//!
//! Everything in them is the guest's and may change at any time: indices are read once and judged, packets are copied out before anybody looks at
//! them, and where the host goes on is known from its own index.

use std::sync::atomic::{AtomicU32, Ordering, fence};

use abi::hyperv::ring::{ALIGN, CONTROL_BYTES, Descriptor, TRAILER_BYTES, control};
use vmm::GuestMemory;
use zerocopy::FromBytes;

use super::gpadl::Buffer;
use super::range::NotMemory;
use crate::atomic;

/// Most pages of data of a ring, 1 GiB: sums of two indices fit into their type.
const MAX_PAGES: u32 = 1 << 18;

/// The guest's indices or packets are impossible; the channel is not to be used any more until the guest opens it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BrokenRing {
    /// An index outside of the ring, or not a multiple of 8.
    #[error("index {0:#x} in a ring of {1:#x} bytes")]
    Index(u32, u32),
    /// Lengths that do not fit into each other, or an unknown kind.
    #[error("a packet whose lengths or kind are impossible")]
    Packet,
    /// A packet of ours for which the ring can never have room.
    #[error("a packet of {0} bytes for a ring of {1}")]
    TooSmall(usize, u32),
    /// Pages that are no memory.
    #[error("a ring that is not in the guest's memory")]
    NotMemory,
}

impl From<NotMemory> for BrokenRing {
    fn from(_: NotMemory) -> BrokenRing {
        BrokenRing::NotMemory
    }
}

/// One ring.
struct Ring {
    memory: GuestMemory,
    buffer: Buffer,
    /// Address of the control page.
    control: u64,
    /// Where in the buffer the data begins, and how many bytes it has.
    data: u32,
    size: u32,
}

impl Ring {
    /// The ring in `pages` pages of `buffer` from `first`.
    fn new(memory: GuestMemory, buffer: Buffer, first: u32, pages: u32) -> Option<Ring> {
        let bytes = CONTROL_BYTES as u32;
        let size = pages.checked_sub(1).filter(|data| (1..=MAX_PAGES).contains(data))?.checked_mul(bytes)?;
        let data = first.checked_add(1)?.checked_mul(bytes)?;
        buffer.range().part(data, size)?;
        let control = buffer.page(first)?;
        Some(Ring { memory, buffer, control, data, size })
    }

    fn word<R>(&self, offset: u64, act: impl FnOnce(&AtomicU32) -> R) -> Result<R, BrokenRing> {
        atomic::with(&self.memory, self.control + offset, act).ok_or(BrokenRing::NotMemory)
    }

    fn load(&self, offset: u64) -> Result<u32, BrokenRing> {
        self.word(offset, |word| word.load(Ordering::Acquire))
    }

    fn store(&self, offset: u64, value: u32) -> Result<(), BrokenRing> {
        self.word(offset, |word| word.store(value, Ordering::Release))
    }

    /// An index that the guest wrote.
    fn index(&self, offset: u64) -> Result<u32, BrokenRing> {
        let index = self.load(offset)?;
        let is_possible = index < self.size && index.is_multiple_of(ALIGN as u32);
        if is_possible { Ok(index) } else { Err(BrokenRing::Index(index, self.size)) }
    }

    /// The index `count` bytes behind `from`; `count` is not more than the ring has.
    fn behind(&self, from: u32, count: u32) -> u32 {
        let sum = from + count;
        if sum < self.size { sum } else { sum - self.size }
    }

    /// Bytes from index `from` to index `to`.
    fn distance(&self, from: u32, to: u32) -> u32 {
        if to >= from { to - from } else { to + self.size - from }
    }

    fn read(&self, from: u32, bytes: &mut [u8]) -> Result<(), BrokenRing> {
        let (here, wrapped) = bytes.split_at_mut(bytes.len().min((self.size - from) as usize));
        for (at, piece) in [(from, here), (0, wrapped)] {
            let part = self.buffer.range().part(self.data + at, piece.len() as u32).ok_or(BrokenRing::Packet)?;
            part.read(&self.memory, piece)?;
        }
        Ok(())
    }

    fn write(&self, from: u32, bytes: &[u8]) -> Result<(), BrokenRing> {
        let (here, wrapped) = bytes.split_at(bytes.len().min((self.size - from) as usize));
        for (at, piece) in [(from, here), (0, wrapped)] {
            let part = self.buffer.range().part(self.data + at, piece.len() as u32).ok_or(BrokenRing::Packet)?;
            part.write(&self.memory, piece)?;
        }
        Ok(())
    }
}

/// The ring to the host.
pub(super) struct Incoming {
    ring: Ring,
    read: u32,
    /// Whether the guest was told not to signal.
    masked: bool,
}

impl Incoming {
    /// The ring in `pages` pages of `buffer` from `first`, as its indices are.
    pub(super) fn new(memory: GuestMemory, buffer: Buffer, first: u32, pages: u32) -> Option<Incoming> {
        let ring = Ring::new(memory, buffer, first, pages)?;
        let read = ring.index(control::READ_INDEX).ok()?;
        Some(Incoming { ring, read, masked: false })
    }

    /// Moves the next packet into `bytes`: descriptor to payload. `None` when there is none; the guest then signals when there is one. Else whether
    /// the guest is to be signalled that there is room.
    pub(super) fn next(&mut self, bytes: &mut Vec<u8>) -> Result<Option<bool>, BrokenRing> {
        let mut waiting = self.waiting()?;
        if waiting == 0 {
            self.set_masked(false)?;
            // The guest looks at the mask after it has written: one of us sees the other's.
            fence(Ordering::SeqCst);
            waiting = self.waiting()?;
            if waiting == 0 {
                return Ok(None);
            }
        }
        self.set_masked(true)?;
        let mut descriptor = [0; size_of::<Descriptor>()];
        if (waiting as usize) < descriptor.len() + TRAILER_BYTES {
            return Err(BrokenRing::Packet);
        }
        self.ring.read(self.read, &mut descriptor)?;
        let total = Descriptor::ref_from_bytes(&descriptor).map_err(|_| BrokenRing::Packet)?.total_length8.get();
        let total = usize::from(total) * ALIGN;
        if total < descriptor.len() || total + TRAILER_BYTES > waiting as usize {
            return Err(BrokenRing::Packet);
        }
        bytes.clear();
        bytes.resize(total, 0);
        self.ring.read(self.read, bytes)?;
        // The guest may have changed it since it was judged.
        bytes.get_mut(..descriptor.len()).ok_or(BrokenRing::Packet)?.copy_from_slice(&descriptor);
        self.advance((total + TRAILER_BYTES) as u32).map(Some)
    }

    fn waiting(&self) -> Result<u32, BrokenRing> {
        Ok(self.ring.distance(self.read, self.ring.index(control::WRITE_INDEX)?))
    }

    fn set_masked(&mut self, masked: bool) -> Result<(), BrokenRing> {
        if self.masked != masked {
            self.ring.store(control::INTERRUPT_MASK, masked.into())?;
            self.masked = masked;
        }
        Ok(())
    }

    /// `count` bytes are read. Whether the guest waits for the room that this made (`hv_pkt_iter_close` of Linux).
    fn advance(&mut self, count: u32) -> Result<bool, BrokenRing> {
        self.read = self.ring.behind(self.read, count);
        self.ring.store(control::READ_INDEX, self.read)?;
        fence(Ordering::SeqCst);
        let pending = self.ring.load(control::PENDING_SEND_SIZE)?;
        if pending == 0 {
            return Ok(false);
        }
        let free = self.ring.size - self.waiting()?;
        Ok(free > pending && free.saturating_sub(count) <= pending)
    }
}

/// The ring to the guest.
pub(super) struct Outbound {
    ring: Ring,
    write: u32,
    /// Whether the guest was told that we wait for room.
    pending: bool,
}

impl Outbound {
    /// The ring in `pages` pages of `buffer` from `first`, as its indices are.
    pub(super) fn new(memory: GuestMemory, buffer: Buffer, first: u32, pages: u32) -> Option<Outbound> {
        let ring = Ring::new(memory, buffer, first, pages)?;
        let write = ring.index(control::WRITE_INDEX).ok()?;
        Some(Outbound { ring, write, pending: false })
    }

    /// Puts a packet (descriptor to payload) into the ring. `None` when there is no room: the guest signals when there is. Else whether the guest
    /// is to be signalled.
    pub(super) fn put(&mut self, packet: &[u8]) -> Result<Option<bool>, BrokenRing> {
        let Some(need) = u32::try_from(packet.len() + TRAILER_BYTES).ok().filter(|need| *need < self.ring.size) else {
            return Err(BrokenRing::TooSmall(packet.len(), self.ring.size));
        };
        if self.free()? <= need {
            self.set_pending(need)?;
            fence(Ordering::SeqCst);
            if self.free()? <= need {
                return Ok(None);
            }
        }
        if self.pending {
            self.set_pending(0)?;
        }
        let begin = self.write;
        self.ring.write(begin, packet)?;
        let trailer = (u64::from(begin) << 32).to_le_bytes();
        self.ring.write(self.ring.behind(begin, packet.len() as u32), &trailer)?;
        self.write = self.ring.behind(begin, need);
        self.ring.store(control::WRITE_INDEX, self.write)?;
        fence(Ordering::SeqCst);
        if self.ring.load(control::INTERRUPT_MASK)? != 0 {
            return Ok(Some(false));
        }
        // A guest that has not read all before this is still at it (`hv_signal_on_write` of Linux).
        Ok(Some(self.ring.index(control::READ_INDEX)? == begin))
    }

    /// Bytes from our index to the guest's, all of them when it has read everything.
    fn free(&self) -> Result<u32, BrokenRing> {
        Ok(self.ring.size - self.ring.distance(self.ring.index(control::READ_INDEX)?, self.write))
    }

    fn set_pending(&mut self, size: u32) -> Result<(), BrokenRing> {
        self.pending = size != 0;
        self.ring.store(control::PENDING_SEND_SIZE, size)
    }
}
