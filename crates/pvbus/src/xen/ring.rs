//! A shared ring from the frontend's side (`io/ring.h`), in a page that is granted to the backend.
//!
//! What the frontend has asked for it knows from its own counters. The backend's index is read once and judged: more responses than there are
//! open requests are the end of the ring. Responses are copied out before anybody looks at them.

use core::sync::atomic::{AtomicU32, Ordering, fence};

use abi::xen::io::ring::{REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, SLOTS};

use super::hypercall::{PAGE, offset};
use crate::hal::{Dma, HalError};

const HEADER: usize = offset(SLOTS);

/// The backend shows more responses than there are requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BrokenRing;

impl From<HalError> for BrokenRing {
    fn from(_: HalError) -> BrokenRing {
        BrokenRing
    }
}

/// A ring of one page.
pub(super) struct FrontRing {
    page: Dma,
    slot: usize,
    slots: u32,
    req_prod: u32,
    rsp_cons: u32,
}

impl FrontRing {
    /// An empty ring in `page`, with slots of `slot` bytes.
    pub fn new(page: Dma, slot: usize) -> Result<FrontRing, HalError> {
        // The largest power of two that fits.
        let slots = (offset(PAGE) - HEADER).checked_div(slot).and_then(usize::checked_ilog2).map(|log| 1 << log).ok_or(HalError::Fault)?;
        let ring = FrontRing { page, slot, slots, req_prod: 0, rsp_cons: 0 };
        ring.word(REQ_EVENT)?.store(1, Ordering::Relaxed);
        ring.word(RSP_EVENT)?.store(1, Ordering::Relaxed);
        Ok(ring)
    }

    /// The page again.
    pub fn into_page(self) -> Dma {
        self.page
    }

    /// Puts a request into the ring and shows it; whether the backend wants to be told. There is room: whoever asks has at most as many
    /// requests open as there are slots.
    pub fn push(&mut self, request: &[u8]) -> Result<bool, HalError> {
        if self.req_prod.wrapping_sub(self.rsp_cons) >= self.slots {
            return Err(HalError::Unavailable);
        }
        self.page.write(self.slot_at(self.req_prod), request)?;
        self.req_prod = self.req_prod.wrapping_add(1);
        self.word(REQ_PROD)?.store(self.req_prod, Ordering::Release);
        fence(Ordering::SeqCst);
        Ok(self.req_prod == self.word(REQ_EVENT)?.load(Ordering::Relaxed))
    }

    /// Copies the next response into `response`; `false` when there is none, and an event comes with the next.
    pub fn pop(&mut self, response: &mut [u8]) -> Result<bool, BrokenRing> {
        if self.waiting()? == 0 {
            self.word(RSP_EVENT)?.store(self.rsp_cons.wrapping_add(1), Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if self.waiting()? == 0 {
                return Ok(false);
            }
        }
        self.page.read(self.slot_at(self.rsp_cons), response)?;
        self.rsp_cons = self.rsp_cons.wrapping_add(1);
        Ok(true)
    }

    fn waiting(&self) -> Result<u32, BrokenRing> {
        let waiting = self.word(RSP_PROD)?.load(Ordering::Acquire).wrapping_sub(self.rsp_cons);
        if waiting > self.req_prod.wrapping_sub(self.rsp_cons) { Err(BrokenRing) } else { Ok(waiting) }
    }

    fn word(&self, at: u64) -> Result<&AtomicU32, HalError> {
        self.page.word(offset(at))
    }

    fn slot_at(&self, index: u32) -> usize {
        HEADER + (index & self.slots.wrapping_sub(1)) as usize * self.slot
    }
}
