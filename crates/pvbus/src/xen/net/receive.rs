//! From the network to this machine.
//!
//! The backend has pages to write frames to, and answers them in the order in which it was given them; a frame takes as many as it needs. So a response
//! belongs to the page that waits longest. After it was copied out, the page waits again, behind the others.

use alloc::collections::VecDeque;
use alloc::sync::Arc;

use abi::xen::io::netif::{Extra, RX_SLOT, RxRequest, RxResponse, extra, rx_flag};
use zerocopy::{FromBytes, IntoBytes};

use super::super::Domain;
use super::super::grant_table::Granted;
use super::super::hypercall::XenError;
use super::super::ring::FrontRing;
use super::PAGE_BYTES;
use crate::hal::HalError;
use crate::net::{Checksum, ETHERNET_HEADER, NetError, Received};

/// Pages that wait for frames: a TCP window of 64 KiB in frames of the usual size, and as much for others.
const PAGES: usize = 64;

pub(super) struct Receiver<'h> {
    domain: Arc<Domain<'h>>,
    port: u32,
    /// Until it is dropped.
    ring: Option<FrontRing>,
    /// Pages that the backend has, in the order of their requests.
    pages: VecDeque<Granted>,
}

/// What is known of a frame whose slots come one after the other.
struct Frame {
    length: usize,
    checksum: Checksum,
    /// It has come whole, and fits.
    is_good: bool,
}

impl<'h> Receiver<'h> {
    /// A receiver whose pages the backend has already.
    pub fn new(domain: &Arc<Domain<'h>>, backend_domain: u16, port: u32) -> Result<Receiver<'h>, XenError> {
        let ring = FrontRing::new(domain.share(backend_domain, 1)?, RX_SLOT)?;
        let mut receiver = Receiver { domain: Arc::clone(domain), port, ring: Some(ring), pages: VecDeque::with_capacity(PAGES) };
        for _ in 0..PAGES {
            let page = domain.share(backend_domain, 1)?;
            receiver.give(page)?;
        }
        // The backend looks when it connects.
        if let Some(ring) = &mut receiver.ring {
            ring.show()?;
        }
        Ok(receiver)
    }

    /// The grant of the ring.
    pub fn ring_ref(&self) -> u32 {
        self.ring.as_ref().and_then(|ring| ring.grants().first().copied()).unwrap_or_default()
    }

    /// Copies the next frame to the beginning of `buffer`.
    pub fn receive(&mut self, buffer: &mut [u8]) -> Result<Option<Received>, NetError> {
        for _ in 0..PAGES {
            let Some(frame) = self.frame(buffer)? else {
                let ring = self.ring.as_mut().ok_or(NetError::Gone)?;
                if ring.ask_for_event(1)? {
                    continue;
                }
                return Ok(None);
            };
            let ring = self.ring.as_mut().ok_or(NetError::Gone)?;
            if ring.show()? {
                self.domain.platform.notify(self.port)?;
            }
            if frame.is_good && frame.length >= ETHERNET_HEADER {
                return Ok(Some(Received { length: frame.length, checksum: frame.checksum }));
            }
        }
        // A ring's worth of frames of which none is one.
        Err(NetError::Broken)
    }

    /// Takes the slots of the next frame.
    fn frame(&mut self, buffer: &mut [u8]) -> Result<Option<Frame>, NetError> {
        let Some(first) = self.next()? else { return Ok(None) };
        let flags = first.flags.get();
        let checksum = if flags & rx_flag::CSUM_BLANK != 0 {
            Checksum::Blank
        } else if flags & rx_flag::DATA_VALIDATED != 0 {
            Checksum::Verified
        } else {
            Checksum::Complete
        };
        // Extras tell how to cut a frame that is too large, which is not asked for: that frame is lost.
        let has_extras = flags & rx_flag::EXTRA_INFO != 0;
        let mut frame = Frame { length: 0, checksum, is_good: !has_extras };
        let mut more = flags & rx_flag::MORE_DATA != 0;
        self.take(&first, buffer, &mut frame)?;
        if has_extras {
            self.skip_extras()?;
        }
        while more {
            let Some(next) = self.next()? else {
                // The backend shows frames whole, or what it shows is none.
                frame.is_good = false;
                break;
            };
            more = next.flags.get() & rx_flag::MORE_DATA != 0;
            self.take(&next, buffer, &mut frame)?;
        }
        Ok(Some(frame))
    }

    /// The next response.
    fn next(&mut self) -> Result<Option<RxResponse>, NetError> {
        let ring = self.ring.as_mut().ok_or(NetError::Gone)?;
        let mut slot = [0; RX_SLOT];
        Ok(if ring.pop(&mut slot)? { Some(zerocopy::transmute!(slot)) } else { None })
    }

    /// Copies a slot's bytes behind those of the frame, and gives its page back.
    fn take(&mut self, response: &RxResponse, buffer: &mut [u8], frame: &mut Frame) -> Result<(), NetError> {
        let ring = self.ring.as_ref().ok_or(NetError::Gone)?;
        let page = self.pages.pop_front().ok_or(NetError::Broken)?;
        let is_its_own = response.id.get() == id(ring.next_response().wrapping_sub(1));
        let begin = usize::from(response.offset.get());
        // Negative is an error of the backend's, which costs the frame.
        let size = usize::try_from(response.status.get().cast_signed()).ok();
        let is_inside = size.is_none_or(|size| begin + size <= PAGE_BYTES);
        match size.and_then(|size| buffer.get_mut(frame.length..)?.get_mut(..size)) {
            Some(piece) if is_inside => {
                page.dma.read(begin, piece)?;
                frame.length += piece.len();
            }
            _ => frame.is_good = false,
        }
        self.give(page)?;
        if is_its_own && is_inside { Ok(()) } else { Err(NetError::Broken) }
    }

    /// Takes the extras that follow a first slot. Their pages were not used.
    fn skip_extras(&mut self) -> Result<(), NetError> {
        while let Some(response) = self.next()? {
            let page = self.pages.pop_front().ok_or(NetError::Broken)?;
            self.give(page)?;
            let (info, _) = Extra::read_from_prefix(response.as_bytes()).map_err(|_| NetError::Broken)?;
            if info.flags & extra::MORE == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Gives a page to the backend, which sees it when the ring is shown.
    fn give(&mut self, page: Granted) -> Result<(), HalError> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        let request = RxRequest { id: id(ring.next_request()).into(), gref: page.grant().into(), ..RxRequest::default() };
        self.pages.push_back(page);
        ring.push(request.as_bytes())
    }
}

/// The number of a request: its place in the ring, as Linux' netfront has it.
#[allow(clippy::cast_possible_truncation, reason = "what is left tells all requests apart that are open")]
const fn id(index: u32) -> u16 {
    index as u16
}

impl Drop for Receiver<'_> {
    fn drop(&mut self) {
        let ring = self.ring.take().map(FrontRing::into_memory);
        self.domain.take_back(ring.into_iter().chain(self.pages.drain(..)));
    }
}
