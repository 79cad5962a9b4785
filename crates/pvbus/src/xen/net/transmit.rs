//! From this machine to the network.
//!
//! A frame is copied to pages of the driver's own, one for each 4096 bytes of it, and takes a slot for each. The backend answers slots in any order,
//! by the numbers of their pages. Nobody waits for answers: they are looked at when a frame is to be sent, and an event is asked for only when there is no room.

use alloc::sync::Arc;
use alloc::vec::Vec;

use abi::xen::io::netif::{TX_SLOT, TxRequest, TxResponse, tx_flag};
use zerocopy::{FromBytes, IntoBytes};

use super::super::Domain;
use super::super::grant_table::Granted;
use super::super::hypercall::XenError;
use super::super::ring::FrontRing;
use super::PAGE_BYTES;
use crate::net::{Checksum, NetError};

/// Pages that may be under way: a frame of 64 KiB and one more, or 64 of the usual size.
const PAGES: u16 = 64;

pub(super) struct Transmitter<'h> {
    domain: Arc<Domain<'h>>,
    backend_domain: u16,
    port: u32,
    /// Until it is dropped.
    ring: Option<FrontRing>,
    /// By their numbers; made as they are needed.
    pages: Vec<Page>,
    /// Numbers of those that the backend has not.
    free: Vec<u16>,
    /// Whether a frame may have several slots.
    has_scatter: bool,
}

struct Page {
    memory: Granted,
    /// The backend may read it.
    is_open: bool,
}

impl<'h> Transmitter<'h> {
    pub fn new(domain: &Arc<Domain<'h>>, backend_domain: u16, port: u32, has_scatter: bool) -> Result<Transmitter<'h>, XenError> {
        let ring = FrontRing::new(domain.share(backend_domain, 1)?, TX_SLOT)?;
        Ok(Transmitter {
            domain: Arc::clone(domain),
            backend_domain,
            port,
            ring: Some(ring),
            pages: Vec::new(),
            free: Vec::new(),
            has_scatter,
        })
    }

    /// The grant of the ring.
    pub fn ring_ref(&self) -> u32 {
        self.ring.as_ref().and_then(|ring| ring.grants().first().copied()).unwrap_or_default()
    }

    /// Sends a frame; `false` when there is no room.
    pub fn send(&mut self, frame: &[u8], checksum: Checksum) -> Result<bool, NetError> {
        let count = frame.len().div_ceil(PAGE_BYTES);
        if count > 1 && !self.has_scatter {
            return Err(NetError::Length);
        }
        self.reap()?;
        if !self.make(count)? {
            // Half of what is under way will do: an event for each page would be one for each frame.
            if !self.ring()?.ask_for_event(u32::from(PAGES / 2))? {
                return Ok(false);
            }
            self.reap()?;
            if !self.make(count)? {
                return Ok(false);
            }
        }
        let mut flags = match checksum {
            Checksum::Complete => 0,
            Checksum::Verified => tx_flag::DATA_VALIDATED,
            // As Linux' netfront: nobody but this machine has had it in hands.
            Checksum::Blank => tx_flag::CSUM_BLANK | tx_flag::DATA_VALIDATED,
        };
        // The first slot tells the length of all.
        let mut size = frame.len();
        let last = count - 1;
        for (at, piece) in frame.chunks(PAGE_BYTES).enumerate() {
            let id = self.free.pop().ok_or(NetError::Broken)?;
            let page = self.pages.get_mut(usize::from(id)).ok_or(NetError::Broken)?;
            page.memory.dma.write(0, piece)?;
            page.is_open = true;
            if at < last {
                flags |= tx_flag::MORE_DATA;
            }
            let size_of_slot = u16::try_from(size).map_err(|_| NetError::Length)?;
            let request = TxRequest {
                gref: page.memory.grant().into(),
                offset: 0.into(),
                flags: flags.into(),
                id: id.into(),
                size: size_of_slot.into(),
            };
            self.ring()?.push(request.as_bytes())?;
            flags = 0;
            size = frame.len().saturating_sub((at + 1) * PAGE_BYTES).min(PAGE_BYTES);
        }
        if self.ring()?.show()? {
            self.domain.platform.notify(self.port)?;
        }
        Ok(true)
    }

    fn ring(&mut self) -> Result<&mut FrontRing, NetError> {
        self.ring.as_mut().ok_or(NetError::Gone)
    }

    /// Makes so many pages free, if there may be so many.
    fn make(&mut self, count: usize) -> Result<bool, NetError> {
        while self.free.len() < count {
            let Some(id) = u16::try_from(self.pages.len()).ok().filter(|id| *id < PAGES) else { return Ok(false) };
            self.pages.push(Page { memory: self.domain.share(self.backend_domain, 1)?, is_open: false });
            self.free.push(id);
        }
        Ok(true)
    }

    /// Takes back the pages of slots that were answered. Whether a frame was sent or dropped is the same to its sender.
    fn reap(&mut self) -> Result<(), NetError> {
        let mut slot = [0; TX_SLOT];
        while self.ring()?.pop(&mut slot)? {
            let (response, _) = TxResponse::read_from_prefix(&slot).map_err(|_| NetError::Broken)?;
            let page = self.pages.get_mut(usize::from(response.id.get())).filter(|page| page.is_open).ok_or(NetError::Broken)?;
            page.is_open = false;
            self.free.push(response.id.get());
        }
        Ok(())
    }
}

impl Drop for Transmitter<'_> {
    fn drop(&mut self) {
        let ring = self.ring.take().map(FrontRing::into_memory);
        self.domain.take_back(ring.into_iter().chain(self.pages.drain(..).map(|page| page.memory)));
    }
}
