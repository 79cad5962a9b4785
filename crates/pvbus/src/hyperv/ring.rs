//! The two rings of a channel from the guest's side ([`abi::hyperv::ring`]).
//!
//! Each side keeps its own index to itself and only shows it. The host's is read once and judged: outside of the ring, or not where a packet can
//! begin, it is the end of the channel, as is a packet that is longer than what the host shows. Packets are copied out before anybody looks at them.
//!
//! ```text
//!   control page | data      Writer: to the host
//!   control page | data      Reader: from the host
//! ```

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering, fence};

use abi::hyperv::ring::{ALIGN, CONTROL_BYTES, Descriptor, TRAILER_BYTES, control};
use zerocopy::{FromZeros, IntoBytes};

use crate::hal::{Dma, HalError};

/// Bytes of a packet's descriptor.
pub(super) const DESCRIPTOR: usize = size_of::<Descriptor>();

/// The host's half of a ring makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BrokenRing;

impl From<HalError> for BrokenRing {
    fn from(_: HalError) -> BrokenRing {
        BrokenRing
    }
}

/// An offset in a control page.
#[allow(clippy::cast_possible_truncation, reason = "less than a page")]
const fn offset(at: u64) -> usize {
    at as usize
}

/// A ring in memory that the host has, too.
struct Ring {
    memory: Arc<Dma>,
    /// Where its control page is.
    at: usize,
    /// Bytes of data.
    size: usize,
}

impl Ring {
    fn new(memory: &Arc<Dma>, at: usize, size: usize) -> Result<Ring, HalError> {
        let ring = Ring { memory: Arc::clone(memory), at, size };
        ring.word(control::FEATURE_BITS)?.store(control::FEATURE_PENDING_SEND_SIZE, Ordering::Relaxed);
        Ok(ring)
    }

    fn word(&self, which: u64) -> Result<&AtomicU32, HalError> {
        self.memory.word(self.at + offset(which))
    }

    /// An index of the host's.
    fn index(&self, which: u64) -> Result<usize, BrokenRing> {
        let index = usize::try_from(self.word(which)?.load(Ordering::Acquire)).map_err(|_| BrokenRing)?;
        if index < self.size && index.is_multiple_of(ALIGN) { Ok(index) } else { Err(BrokenRing) }
    }

    /// Shows an index of the guest's.
    fn show(&self, which: u64, index: usize) -> Result<(), BrokenRing> {
        self.word(which)?.store(u32::try_from(index).map_err(|_| BrokenRing)?, Ordering::Release);
        Ok(())
    }

    /// Bytes from `from` to `to`, around the end.
    const fn distance(&self, from: usize, to: usize) -> usize {
        if to >= from { to - from } else { self.size - from + to }
    }

    /// The index `length` bytes behind `index`; neither is more than the ring has.
    const fn advance(&self, index: usize, length: usize) -> usize {
        let next = index + length;
        if next >= self.size { next - self.size } else { next }
    }

    /// Where the data at `index` is, and how many bytes of `length` are before the end.
    fn place(&self, index: usize, length: usize) -> (usize, usize) {
        (self.at + offset(CONTROL_BYTES) + index, length.min(self.size - index))
    }

    fn read(&self, index: usize, bytes: &mut [u8]) -> Result<(), HalError> {
        let (at, first) = self.place(index, bytes.len());
        let (first, rest) = bytes.split_at_mut(first);
        self.memory.read(at, first)?;
        self.memory.read(self.at + offset(CONTROL_BYTES), rest)
    }

    fn write(&self, index: usize, bytes: &[u8]) -> Result<(), HalError> {
        let (at, first) = self.place(index, bytes.len());
        let (first, rest) = bytes.split_at(first);
        self.memory.write(at, first)?;
        self.memory.write(self.at + offset(CONTROL_BYTES), rest)
    }
}

/// What became of a packet that was to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    /// It is in the ring.
    Quietly,
    /// It is in the ring, and the host wants to be told.
    Signal,
    /// There is no room; an event comes when there is.
    Full,
}

/// The ring to the host.
pub(super) struct Writer {
    ring: Ring,
    index: usize,
}

impl Writer {
    /// An empty ring of `size` bytes whose control page is at `at`.
    pub fn new(memory: &Arc<Dma>, at: usize, size: usize) -> Result<Writer, HalError> {
        Ok(Writer { ring: Ring::new(memory, at, size)?, index: 0 })
    }

    /// Puts a packet into the ring: descriptor and what follows, a multiple of 8 bytes.
    pub fn push(&mut self, packet: &[u8]) -> Result<Sent, BrokenRing> {
        let needed = packet.len() + TRAILER_BYTES;
        if needed >= self.ring.size {
            return Err(BrokenRing);
        }
        if self.free()? <= needed {
            self.ring.show(control::PENDING_SEND_SIZE, needed)?;
            // The host may have made room before it saw this.
            fence(Ordering::SeqCst);
            if self.free()? <= needed {
                return Ok(Sent::Full);
            }
        }
        self.ring.show(control::PENDING_SEND_SIZE, 0)?;
        let start = u32::try_from(self.index).map_err(|_| BrokenRing)?;
        let trailer = (u64::from(start) << 32).to_le_bytes();
        self.ring.write(self.index, packet)?;
        self.ring.write(self.ring.advance(self.index, packet.len()), &trailer)?;
        let before = self.index;
        self.index = self.ring.advance(before, needed);
        self.ring.show(control::WRITE_INDEX, self.index)?;
        fence(Ordering::SeqCst);
        // Who reads already, or does not want to know, sees it anyway.
        let wants_signal = self.ring.word(control::INTERRUPT_MASK)?.load(Ordering::Relaxed) == 0;
        let was_empty = self.ring.index(control::READ_INDEX)? == before;
        Ok(if wants_signal && was_empty { Sent::Signal } else { Sent::Quietly })
    }

    /// Bytes that can be written, of which the last one never is.
    fn free(&self) -> Result<usize, BrokenRing> {
        Ok(self.ring.size - self.ring.distance(self.ring.index(control::READ_INDEX)?, self.index))
    }
}

/// The ring from the host.
pub(super) struct Reader {
    ring: Ring,
    index: usize,
    is_masked: bool,
}

/// A packet as it was in the ring.
pub(super) struct Taken {
    /// What it begins with.
    pub descriptor: Descriptor,
    /// All of it, the descriptor included.
    pub bytes: Vec<u8>,
    /// Where its payload begins.
    pub payload_at: usize,
    /// The host waits for room, and there is enough now.
    pub signal: bool,
}

impl Reader {
    /// An empty ring of `size` bytes whose control page is at `at`.
    pub fn new(memory: &Arc<Dma>, at: usize, size: usize) -> Result<Reader, HalError> {
        Ok(Reader { ring: Ring::new(memory, at, size)?, index: 0, is_masked: false })
    }

    /// Takes the next packet. While there are some, the host need not signal; when there is none, it signals the next.
    pub fn next(&mut self) -> Result<Option<Taken>, BrokenRing> {
        if self.waiting()? == 0 {
            self.mask(false)?;
            fence(Ordering::SeqCst);
            if self.waiting()? == 0 {
                return Ok(None);
            }
        }
        self.mask(true)?;
        let waiting = self.waiting()?;
        let mut descriptor = Descriptor::new_zeroed();
        if waiting < DESCRIPTOR + TRAILER_BYTES {
            return Err(BrokenRing);
        }
        self.ring.read(self.index, descriptor.as_mut_bytes())?;
        let length = usize::from(descriptor.total_length8.get()) * ALIGN;
        let payload_at = usize::from(descriptor.data_offset8.get()) * ALIGN;
        if length + TRAILER_BYTES > waiting || !(DESCRIPTOR..=length).contains(&payload_at) {
            return Err(BrokenRing);
        }
        let mut bytes = vec![0; length];
        self.ring.read(self.index, &mut bytes)?;
        // The host may have written the descriptor anew meanwhile: there is only the one that was judged.
        if let Some(begin) = bytes.first_chunk_mut::<DESCRIPTOR>() {
            begin.copy_from_slice(descriptor.as_bytes());
        }
        let signal = self.release(length + TRAILER_BYTES)?;
        Ok(Some(Taken { descriptor, bytes, payload_at, signal }))
    }

    /// Gives the packet's room back; whether the host waits for it.
    fn release(&mut self, length: usize) -> Result<bool, BrokenRing> {
        self.index = self.ring.advance(self.index, length);
        self.ring.show(control::READ_INDEX, self.index)?;
        fence(Ordering::SeqCst);
        let pending = usize::try_from(self.ring.word(control::PENDING_SEND_SIZE)?.load(Ordering::Relaxed)).unwrap_or(usize::MAX);
        let free = self.ring.size - self.waiting()?;
        Ok(pending != 0 && free > pending && free.saturating_sub(length) <= pending)
    }

    /// Bytes that the host has written.
    fn waiting(&self) -> Result<usize, BrokenRing> {
        Ok(self.ring.distance(self.index, self.ring.index(control::WRITE_INDEX)?))
    }

    fn mask(&mut self, mask: bool) -> Result<(), HalError> {
        if self.is_masked != mask {
            self.ring.word(control::INTERRUPT_MASK)?.store(mask.into(), Ordering::Relaxed);
            self.is_masked = mask;
        }
        Ok(())
    }
}
