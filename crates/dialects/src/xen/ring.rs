//! A shared ring from the backend's side (`io/ring.h`), in pages that the guest has granted.
//!
//! Everything in it is the guest's and may change at any time: indices are read once and judged, requests are copied out before anybody looks
//! at them, and what the backend has done is known from its own counters. A guest whose indices cannot be right loses the ring.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use abi::xen::io::ring::{REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD, SLOTS};
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::PAGE_SIZE;

use super::{Access, GrantError, Xen};
use crate::atomic;

/// Most pages of a ring.
pub const MAX_PAGES: usize = 16;

/// The guest's indices are impossible; the ring is not to be used any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the frontend has {0} requests in a ring of {1}")]
pub struct BrokenRing(u32, u32);

/// A ring, with its pages in use until it is dropped.
pub struct BackRing {
    xen: Arc<Xen>,
    /// Grants and addresses of the pages.
    pages: Vec<(u32, u64)>,
    slot: u32,
    slots: u32,
    req_cons: u32,
    rsp_prod: u32,
    /// What the frontend was last told of the responses.
    published: u32,
}

impl BackRing {
    /// The ring in the pages that `grants` name, with slots of `slot` bytes.
    ///
    /// # Errors
    /// [`GrantError`] of the first page that is not to be had.
    pub fn new(xen: &Arc<Xen>, grants: &[u32], slot: usize) -> Result<BackRing, GrantError> {
        let slot = slot as u32;
        let bytes = grants.len().min(MAX_PAGES) as u32 * PAGE_SIZE as u32;
        let fitting = bytes.saturating_sub(SLOTS as u32) / slot;
        // The largest power of two that is not larger.
        let slots = if fitting == 0 { 0 } else { 1 << fitting.ilog2() };
        let mut ring = BackRing { xen: Arc::clone(xen), pages: Vec::new(), slot, slots, req_cons: 0, rsp_prod: 0, published: 0 };
        for &grant in grants.iter().take(MAX_PAGES) {
            ring.pages.push((grant, xen.map(grant, Access::Write)?));
        }
        // A frontend that was there before, or comes from a saved machine, does not begin at zero.
        let begin = ring.index(RSP_PROD);
        (ring.req_cons, ring.rsp_prod, ring.published) = (begin, begin, begin);
        Ok(ring)
    }

    /// Slots there are.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Requests that wait.
    ///
    /// # Errors
    /// [`BrokenRing`].
    pub fn waiting(&self) -> Result<u32, BrokenRing> {
        let prod = self.index(REQ_PROD);
        // Requests that have no response yet cannot be more than there are slots.
        let open = prod.wrapping_sub(self.rsp_prod);
        if open > self.slots { Err(BrokenRing(open, self.slots)) } else { Ok(prod.wrapping_sub(self.req_cons)) }
    }

    /// Copies the next request into `request`; `false` when none waits.
    ///
    /// # Errors
    /// [`BrokenRing`].
    pub fn next(&mut self, request: &mut [u8]) -> Result<bool, BrokenRing> {
        if self.waiting()? == 0 {
            return Ok(false);
        }
        let at = self.offset(self.req_cons);
        self.transfer(at, request, |gpa, piece| self.xen.memory().read_slice(piece, GuestAddress(gpa)).is_ok());
        self.req_cons = self.req_cons.wrapping_add(1);
        Ok(true)
    }

    /// Puts a response into the next slot. The frontend sees it after [`BackRing::publish`].
    pub fn respond(&mut self, response: &[u8]) {
        let mut bytes = response.to_vec();
        let at = self.offset(self.rsp_prod);
        self.transfer(at, &mut bytes, |gpa, piece| self.xen.memory().write_slice(piece, GuestAddress(gpa)).is_ok());
        self.rsp_prod = self.rsp_prod.wrapping_add(1);
    }

    /// Shows the frontend the responses so far; `true` when it wants an event for them.
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.rsp_prod);
        if old == new {
            return false;
        }
        self.set_index(RSP_PROD, new);
        self.published = new;
        let event = self.index(RSP_EVENT);
        new.wrapping_sub(event) < new.wrapping_sub(old)
    }

    /// Asks for an event with the next request; `true` when one is there already.
    ///
    /// # Errors
    /// [`BrokenRing`].
    pub fn ask_for_event(&mut self) -> Result<bool, BrokenRing> {
        self.ask_for_event_at(1)
    }

    /// Asks for an event when `count` requests wait; `true` when they do already.
    ///
    /// # Errors
    /// [`BrokenRing`].
    pub fn ask_for_event_at(&mut self, count: u32) -> Result<bool, BrokenRing> {
        self.set_index(REQ_EVENT, self.req_cons.wrapping_add(count));
        Ok(self.waiting()? >= count)
    }

    fn offset(&self, index: u32) -> u64 {
        SLOTS + u64::from(index & self.slots.wrapping_sub(1)) * u64::from(self.slot)
    }

    /// Moves bytes from or to the ring, page by page: slots may lie across the end of one.
    fn transfer(&self, mut at: u64, mut bytes: &mut [u8], mut piece: impl FnMut(u64, &mut [u8]) -> bool) {
        while !bytes.is_empty() {
            let Some(&(_, page)) = self.pages.get((at / PAGE_SIZE) as usize) else { return };
            let length = bytes.len().min((PAGE_SIZE - at % PAGE_SIZE) as usize);
            let (now, rest) = bytes.split_at_mut(length);
            // A granted page is memory for as long as it is in use.
            piece(page + at % PAGE_SIZE, now);
            at += length as u64;
            bytes = rest;
        }
    }

    fn index(&self, at: u64) -> u32 {
        let page = self.pages.first().map_or(0, |&(_, page)| page);
        atomic::with(self.xen.memory(), page + at, |index: &AtomicU32| u32::from_le(index.load(Ordering::SeqCst))).unwrap_or(0)
    }

    fn set_index(&self, at: u64, value: u32) {
        let page = self.pages.first().map_or(0, |&(_, page)| page);
        atomic::with(self.xen.memory(), page + at, |index: &AtomicU32| index.store(value.to_le(), Ordering::SeqCst));
    }
}

impl Drop for BackRing {
    fn drop(&mut self) {
        for &(grant, _) in &self.pages {
            self.xen.unmap(grant, Access::Write);
        }
    }
}
