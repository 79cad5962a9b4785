//! A shared ring from the frontend's side (`io/ring.h`), in pages that are granted to the backend.
//!
//! What the frontend has asked for it knows from its own counters. The backend's index is read once and judged: more responses than there are
//! open requests are the end of the ring. Responses are copied out before anybody looks at them.

use core::sync::atomic::{AtomicU32, Ordering, fence};

use abi::xen::io::ring::{REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, SLOTS};

use super::grant_table::Granted;
use super::hypercall::offset;
use crate::hal::HalError;

const HEADER: usize = offset(SLOTS);

/// The backend shows more responses than there are requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BrokenRing;

impl From<HalError> for BrokenRing {
    fn from(_: HalError) -> BrokenRing {
        BrokenRing
    }
}

/// A ring.
pub(super) struct FrontRing {
    memory: Granted,
    slot: usize,
    slots: u32,
    req_prod: u32,
    /// What the backend was last told of the requests.
    shown: u32,
    rsp_cons: u32,
}

impl FrontRing {
    /// An empty ring in `memory`, with slots of `slot` bytes.
    pub fn new(memory: Granted, slot: usize) -> Result<FrontRing, HalError> {
        // The largest power of two that fits.
        let room = (memory.dma.words().len() * 4).checked_sub(HEADER).and_then(|bytes| bytes.checked_div(slot));
        let slots = room.and_then(usize::checked_ilog2).map(|log| 1 << log).ok_or(HalError::Fault)?;
        let ring = FrontRing { memory, slot, slots, req_prod: 0, shown: 0, rsp_cons: 0 };
        ring.word(REQ_EVENT)?.store(1, Ordering::Relaxed);
        ring.word(RSP_EVENT)?.store(1, Ordering::Relaxed);
        Ok(ring)
    }

    /// The memory again.
    pub fn into_memory(self) -> Granted {
        self.memory
    }

    /// Grants of its pages.
    pub fn grants(&self) -> &[u32] {
        &self.memory.grants
    }

    /// Slots that are free.
    pub fn room(&self) -> u32 {
        self.slots.wrapping_sub(self.req_prod.wrapping_sub(self.rsp_cons))
    }

    /// Index of the next response.
    pub fn next_response(&self) -> u32 {
        self.rsp_cons
    }

    /// Index of the next request.
    pub fn next_request(&self) -> u32 {
        self.req_prod
    }

    /// Puts a request into the ring, which must have room. The backend sees it after [`FrontRing::show`].
    pub fn push(&mut self, request: &[u8]) -> Result<(), HalError> {
        if self.room() == 0 {
            return Err(HalError::Unavailable);
        }
        self.memory.dma.write(self.slot_at(self.req_prod), request)?;
        self.req_prod = self.req_prod.wrapping_add(1);
        Ok(())
    }

    /// Shows the backend the requests so far; whether it wants to be told.
    pub fn show(&mut self) -> Result<bool, HalError> {
        let (old, new) = (self.shown, self.req_prod);
        self.word(REQ_PROD)?.store(new, Ordering::Release);
        self.shown = new;
        fence(Ordering::SeqCst);
        let event = self.word(REQ_EVENT)?.load(Ordering::Relaxed);
        Ok(new.wrapping_sub(event) < new.wrapping_sub(old))
    }

    /// Copies the next response into `response`; `false` when there is none.
    pub fn pop(&mut self, response: &mut [u8]) -> Result<bool, BrokenRing> {
        if self.waiting()? == 0 {
            return Ok(false);
        }
        self.memory.dma.read(self.slot_at(self.rsp_cons), response)?;
        self.rsp_cons = self.rsp_cons.wrapping_add(1);
        Ok(true)
    }

    /// Asks for an event when `count` responses are there; `true` when they are already.
    pub fn ask_for_event(&mut self, count: u32) -> Result<bool, BrokenRing> {
        self.word(RSP_EVENT)?.store(self.rsp_cons.wrapping_add(count), Ordering::Relaxed);
        fence(Ordering::SeqCst);
        Ok(self.waiting()? >= count)
    }

    fn waiting(&self) -> Result<u32, BrokenRing> {
        let waiting = self.word(RSP_PROD)?.load(Ordering::Acquire).wrapping_sub(self.rsp_cons);
        if waiting > self.shown.wrapping_sub(self.rsp_cons) { Err(BrokenRing) } else { Ok(waiting) }
    }

    fn word(&self, at: u64) -> Result<&AtomicU32, HalError> {
        self.memory.dma.word(offset(at))
    }

    fn slot_at(&self, index: u32) -> usize {
        HEADER + (index & self.slots.wrapping_sub(1)) as usize * self.slot
    }
}
