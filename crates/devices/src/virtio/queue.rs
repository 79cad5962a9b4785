//! One virtqueue as its device works on it (virtio 1.2 section 2.7, split rings).
//!
//! [`Ring`] puts `virtio-queue` together with guest memory and the interrupt, and adds what that crate leaves to its user: chains
//! that loop, run out of the table or mix directions are found and refused, and VIRTQ_AVAIL_F_NO_INTERRUPT is honoured.
//! [`Chain`] is one request: two lists of [`Segments`], read and written from front to back, never beyond what the guest gave.
//!
//! Every error here is the guest's: a device answers [`RingError`] by asking for a reset, and leaves the ring alone.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use abi::virtio::AVAIL_NO_INTERRUPT;
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};
use vmm::memory::{CodeMap, GuestMemory};

use super::interrupt::Interrupt;

/// A piece of guest memory that data is moved to or from directly.
pub type GuestSlice<'a> = VolatileSlice<'a, CodeMap>;

/// Most descriptors in one chain; more than any device here offers.
pub const MAX_CHAIN: usize = 1024;

/// What a guest did to a ring that cannot be answered on it.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The available index ran ahead, the ring is not in memory, or an index is out of the table.
    #[error("virtqueue {queue}: {error}")]
    Queue {
        /// Queue number.
        queue: u16,
        /// virtio-queue's word.
        error: virtio_queue::Error,
    },
    /// A chain that loops, leaves its table, is longer than [`MAX_CHAIN`], or is readable again after a writable part.
    #[error("virtqueue {queue}: descriptor chain at {head} is malformed")]
    Chain {
        /// Queue number.
        queue: u16,
        /// First descriptor.
        head: u16,
    },
}

/// Access to guest memory that the guest does not have, or more bytes than it gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("buffer is too short or not in guest memory")]
pub struct SegmentError;

/// A virtqueue in use.
pub struct Ring {
    queue: Queue,
    index: u16,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    /// Completed since the driver was last told.
    unsignalled: bool,
}

/// Where the rings of a queue are and how far they were worked off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingPosition {
    /// Next available entry.
    pub next_avail: u16,
    /// Next used entry.
    pub next_used: u16,
}

impl Ring {
    /// Queue number `index` as `state` says.
    ///
    /// # Errors
    /// [`RingError::Queue`] when sizes or addresses cannot be, or are not in memory.
    pub fn new(index: u16, state: QueueState, memory: GuestMemory, interrupt: Arc<dyn Interrupt>) -> Result<Ring, RingError> {
        let error = |error| RingError::Queue { queue: index, error };
        let queue = Queue::try_from(state).map_err(error)?;
        // virtio-queue would take address 0 for "not set".
        if !queue.is_valid(memory.as_ref()) || queue.avail_ring() == 0 {
            return Err(error(virtio_queue::Error::QueueNotReady));
        }
        Ok(Ring { queue, index, memory, interrupt, unsignalled: false })
    }

    /// Takes the next request into `chain`, whose lists are used again. `false`: there is none now.
    ///
    /// # Errors
    /// [`RingError`], after which nothing on this ring can be trusted.
    pub fn next(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        let queue = self.index;
        let mut available = self.queue.iter(self.memory.as_ref()).map_err(|error| RingError::Queue { queue, error })?;
        let Some(descriptors) = available.next() else { return Ok(false) };
        chain.fill(descriptors).map_err(|head| RingError::Chain { queue, head })?;
        Ok(true)
    }

    /// Gives the last request back to the ring; [`Ring::next`] returns it again.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Requests that are available now.
    ///
    /// # Errors
    /// [`RingError::Queue`] when the ring is not in memory.
    pub fn available(&self) -> Result<u16, RingError> {
        let index = self.queue.avail_idx(self.memory.as_ref(), Ordering::Acquire).map_err(|error| self.error(error))?;
        Ok(index.0.wrapping_sub(self.queue.next_avail()))
    }

    /// Answers the request that began at `head`: `len` bytes were written to it.
    ///
    /// # Errors
    /// [`RingError::Queue`] when the used ring is not in memory.
    pub fn complete(&mut self, head: u16, len: u32) -> Result<(), RingError> {
        self.queue.add_used(self.memory.as_ref(), head, len).map_err(|error| self.error(error))?;
        self.unsignalled = true;
        Ok(())
    }

    /// Interrupts the driver if anything was completed that it wants to hear of.
    ///
    /// # Errors
    /// [`RingError::Queue`] when the available ring is not in memory.
    pub fn signal(&mut self) -> Result<(), RingError> {
        if std::mem::take(&mut self.unsignalled) && self.wants_interrupt()? {
            self.interrupt.queue_used(self.index);
        }
        Ok(())
    }

    /// Asks the driver not to notify: somebody looks at the ring anyway.
    ///
    /// # Errors
    /// [`RingError::Queue`] when the used ring is not in memory.
    pub fn disable_notification(&mut self) -> Result<(), RingError> {
        self.queue.disable_notification(self.memory.as_ref()).map_err(|error| self.error(error))
    }

    /// Asks the driver to notify again. `true`: there is something already, for which no notification will come.
    ///
    /// # Errors
    /// [`RingError::Queue`] when the rings are not in memory.
    pub fn enable_notification(&mut self) -> Result<bool, RingError> {
        self.queue.enable_notification(self.memory.as_ref()).map_err(|error| self.error(error))
    }

    /// Queue number.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// How far it was worked off.
    pub fn position(&self) -> RingPosition {
        RingPosition { next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    fn wants_interrupt(&mut self) -> Result<bool, RingError> {
        if self.queue.event_idx_enabled() {
            return self.queue.needs_notification(self.memory.as_ref()).map_err(|error| self.error(error));
        }
        // The used index has to be out before the flags are read.
        std::sync::atomic::fence(Ordering::SeqCst);
        let flags: u16 = self
            .memory
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(|error| self.error(virtio_queue::Error::GuestMemory(error)))?;
        Ok(u16::from_le(flags) & AVAIL_NO_INTERRUPT == 0)
    }

    fn error(&self, error: virtio_queue::Error) -> RingError {
        RingError::Queue { queue: self.index, error }
    }
}

/// One request.
#[derive(Default)]
pub struct Chain {
    /// First descriptor: what [`Ring::complete`] wants.
    pub head: u16,
    /// What the device may read.
    pub readable: Segments,
    /// What the device may write.
    pub writable: Segments,
}

impl Chain {
    fn fill(&mut self, mut descriptors: virtio_queue::DescriptorChain<&GuestMemoryMmap<CodeMap>>) -> Result<(), u16> {
        let head = descriptors.head_index();
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        // virtio-queue ends a chain silently where it loops or leaves its table: the last descriptor has NEXT set then.
        let mut complete = false;
        for count in 0.. {
            let Some(descriptor) = descriptors.next() else { break };
            if count == MAX_CHAIN || (!descriptor.is_write_only() && !self.writable.segments.is_empty()) {
                return Err(head);
            }
            let list = if descriptor.is_write_only() { &mut self.writable } else { &mut self.readable };
            list.push(descriptor.addr(), descriptor.len());
            complete = !descriptor.has_next();
        }
        if complete { Ok(()) } else { Err(head) }
    }
}

/// Guest memory of one direction of a [`Chain`], used up from the front.
#[derive(Debug, Default)]
pub struct Segments {
    segments: Vec<(GuestAddress, u32)>,
    first: usize,
    len: u64,
}

impl Segments {
    /// Bytes left.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies the next bytes into `data`.
    ///
    /// # Errors
    /// [`SegmentError`] when there are fewer, or they are not in memory.
    pub fn read(&mut self, memory: &GuestMemory, data: &mut [u8]) -> Result<(), SegmentError> {
        let mut at = 0;
        self.advance(data.len() as u64, |address, len| {
            let piece = &mut data[at..at + len];
            at += len;
            memory.read_slice(piece, address).map_err(|_| SegmentError)
        })
    }

    /// Copies `data` to the next bytes.
    ///
    /// # Errors
    /// [`SegmentError`] when there are fewer, or they are not in memory.
    pub fn write(&mut self, memory: &GuestMemory, data: &[u8]) -> Result<(), SegmentError> {
        let mut at = 0;
        self.advance(data.len() as u64, |address, len| {
            let piece = &data[at..at + len];
            at += len;
            memory.write_slice(piece, address).map_err(|_| SegmentError)
        })
    }

    /// The next `len` bytes as host memory, appended to `slices`.
    ///
    /// # Errors
    /// [`SegmentError`] when there are fewer, or they are not in memory.
    pub fn slices<'a>(&mut self, memory: &'a GuestMemory, len: u64, slices: &mut Vec<GuestSlice<'a>>) -> Result<(), SegmentError> {
        self.advance(len, |address, len| {
            for slice in GuestMemoryBackend::get_slices(memory.as_ref(), address, len) {
                slices.push(slice.map_err(|_| SegmentError)?);
            }
            Ok(())
        })
    }

    /// Takes the last byte away and says where it is; `None` when there is none.
    pub fn take_last_byte(&mut self) -> Option<GuestAddress> {
        let (address, len) = self.segments[self.first..].iter_mut().rfind(|(_, len)| *len > 0)?;
        *len -= 1;
        self.len -= 1;
        address.checked_add(u64::from(*len))
    }

    fn clear(&mut self) {
        self.segments.clear();
        self.first = 0;
        self.len = 0;
    }

    fn push(&mut self, address: GuestAddress, len: u32) {
        self.segments.push((address, len));
        self.len += u64::from(len);
    }

    /// Uses up `len` bytes, piece by piece.
    fn advance(
        &mut self,
        mut len: u64,
        mut piece: impl FnMut(GuestAddress, usize) -> Result<(), SegmentError>,
    ) -> Result<(), SegmentError> {
        if len > self.len {
            return Err(SegmentError);
        }
        self.len -= len;
        while len > 0 {
            let Some((address, rest)) = self.segments.get_mut(self.first) else { return Err(SegmentError) };
            let step = u64::from(*rest).min(len);
            if step > 0 {
                piece(*address, step as usize)?;
                *address = address.checked_add(step).ok_or(SegmentError)?;
                *rest -= step as u32;
                len -= step;
            }
            if *rest == 0 {
                self.first += 1;
            }
        }
        Ok(())
    }
}
