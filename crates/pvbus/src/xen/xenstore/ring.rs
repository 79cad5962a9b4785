//! The guest's ring: two rings of bytes in a page that the host set aside (`docs/misc/xenstore-ring.txt`).
//!
//! The host is told of every step, as NetBSD does; which kicks it could do without is its own affair. Indices are the host's to get wrong: more bytes
//! than the ring has is the end of the conversation.

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use core::mem::offset_of;
use core::sync::atomic::Ordering;

use abi::xen::xenstore::{Interface, RING_SIZE};

use super::super::event_channel::Platform;
use super::super::hypercall::XenError;
use super::Peer;
use crate::hal::{Dma, HalError, MILLISECOND, Nanos, SECOND};
use crate::store::StoreError;

/// How long an answer is waited for.
const PATIENCE: Nanos = 5 * SECOND;
/// How long at once; an upcall ends it sooner.
const PAUSE: Nanos = MILLISECOND;
/// Most bytes that are kept while something is being sent. A host that says more meanwhile is waited for in vain.
const RECEIVED_MAX: usize = 64 << 10;

/// The ring, as the other end of a conversation.
pub struct RingPeer<'h> {
    platform: Arc<Platform<'h>>,
    page: Dma,
    port: u32,
    /// What found no room yet.
    unsent: VecDeque<u8>,
    /// What came while something was being sent: a host whose answers are not taken stops taking requests.
    received: VecDeque<u8>,
    /// The host has not answered for so long that it is not waited for again until it says something.
    silent: bool,
}

impl<'h> RingPeer<'h> {
    /// The ring in `page`, whose host is behind `port`.
    pub(in crate::xen) fn new(platform: Arc<Platform<'h>>, page: Dma, port: u32) -> RingPeer<'h> {
        RingPeer { platform, page, port, unsent: VecDeque::new(), received: VecDeque::new(), silent: false }
    }

    /// Moves what there is room for into the ring.
    fn flush(&mut self) -> Result<(), StoreError> {
        if self.unsent.is_empty() {
            return Ok(());
        }
        let (prod, used) = self.filled(offset_of!(Interface, req_cons), offset_of!(Interface, req_prod)).map_err(hal)?;
        let room = RING_SIZE.checked_sub(used).ok_or(BROKEN)?;
        let count = room.min(self.unsent.len());
        if count == 0 {
            return Ok(());
        }
        for (byte, at) in self.unsent.drain(..count).zip(0..) {
            self.page.write(offset_of!(Interface, req) + slot(prod.wrapping_add(at)), &[byte]).map_err(hal)?;
        }
        self.advance(offset_of!(Interface, req_prod), count)
    }

    /// Takes what there is out of the ring.
    fn take(&mut self, buffer: &mut [u8]) -> Result<usize, StoreError> {
        let (prod, filled) = self.filled(offset_of!(Interface, rsp_cons), offset_of!(Interface, rsp_prod)).map_err(hal)?;
        let filled_u32 = u32::try_from(filled).ok().filter(|_| filled <= RING_SIZE).ok_or(BROKEN)?;
        let count = filled.min(buffer.len());
        if count == 0 {
            return Ok(0);
        }
        let cons = prod.wrapping_sub(filled_u32);
        for (byte, at) in buffer.iter_mut().take(count).zip(0..) {
            self.page.read(offset_of!(Interface, rsp) + slot(cons.wrapping_add(at)), core::slice::from_mut(byte)).map_err(hal)?;
        }
        self.advance(offset_of!(Interface, rsp_cons), count)?;
        Ok(count)
    }

    /// The producer's index, and how far it is before the consumer's. Each is read once.
    fn filled(&self, cons: usize, prod: usize) -> Result<(u32, usize), HalError> {
        let prod = self.page.word(prod)?.load(Ordering::SeqCst);
        let cons = self.page.word(cons)?.load(Ordering::SeqCst);
        Ok((prod, prod.wrapping_sub(cons) as usize))
    }

    /// Moves an index of ours, and tells the host.
    fn advance(&self, index: usize, count: usize) -> Result<(), StoreError> {
        let count = u32::try_from(count).map_err(|_| BROKEN)?;
        self.page.word(index).map_err(hal)?.fetch_add(count, Ordering::SeqCst);
        self.platform.notify(self.port).map_err(|_: XenError| StoreError::Transport("XenStore's event channel is gone"))
    }

    /// Waits until something may have changed; an error at `deadline`.
    fn pause(&self, deadline: Option<Nanos>) -> Result<(), StoreError> {
        let now = self.platform.hal.now();
        if deadline.is_some_and(|deadline| deadline <= now) {
            return Err(StoreError::Timeout);
        }
        let soon = now.saturating_add(PAUSE);
        self.platform.hal.wait_until(deadline.map_or(soon, |deadline| deadline.min(soon)));
        Ok(())
    }
}

impl Peer for RingPeer<'_> {
    fn deadline(&self) -> Nanos {
        let speaks = || self.filled(offset_of!(Interface, rsp_cons), offset_of!(Interface, rsp_prod)).is_ok_and(|(_, bytes)| bytes > 0);
        self.platform.hal.now().saturating_add(if self.silent && !speaks() { 0 } else { PATIENCE })
    }

    fn is_numbered(&self) -> bool {
        true
    }

    fn send(&mut self, bytes: &[u8], deadline: Nanos) -> Result<(), StoreError> {
        self.flush()?;
        if self.silent && !self.unsent.is_empty() {
            return Err(StoreError::Timeout);
        }
        // What was begun is sent to its end sooner or later, or the host would take the next message for the rest of this one.
        self.unsent.extend(bytes);
        loop {
            self.platform.acknowledge().map_err(hal)?;
            self.flush()?;
            if self.unsent.is_empty() {
                return Ok(());
            }
            let mut piece = [0; RING_SIZE];
            if self.received.len() < RECEIVED_MAX {
                let count = self.take(&mut piece)?;
                self.received.extend(piece.iter().take(count));
            }
            self.pause(Some(deadline)).inspect_err(|_| self.silent = true)?;
        }
    }

    fn receive(&mut self, buffer: &mut [u8], deadline: Option<Nanos>) -> Result<usize, StoreError> {
        let is_patient = deadline.is_none_or(|deadline| deadline > self.platform.hal.now());
        loop {
            // First the note, then the ring: what comes between the two is noted again.
            self.platform.acknowledge().map_err(hal)?;
            self.flush()?;
            let count = if self.received.is_empty() { self.take(buffer)? } else { move_bytes(&mut self.received, buffer) };
            if count > 0 {
                self.silent = false;
                return Ok(count);
            }
            self.pause(deadline).inspect_err(|_| self.silent |= is_patient)?;
        }
    }
}

fn move_bytes(from: &mut VecDeque<u8>, to: &mut [u8]) -> usize {
    let count = from.len().min(to.len());
    to.iter_mut().zip(from.drain(..count)).for_each(|(to, from)| *to = from);
    count
}

/// The indices cannot be right.
const BROKEN: StoreError = StoreError::Transport("XenStore's ring is broken");

fn hal(_: HalError) -> StoreError {
    StoreError::Transport("XenStore's page is smaller than its ring")
}

const fn slot(index: u32) -> usize {
    index as usize % RING_SIZE
}
