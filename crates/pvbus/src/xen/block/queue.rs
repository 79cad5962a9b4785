//! Requests under way, the ring that carries them, and the pages that their data goes through.
//!
//! A request has a number that is never used twice, so that an answer that nobody waits for is known as such, and is the end of the disk. Pages are made as they are
//! needed and stay; a request's are its own until it is ended, even when it was answered long before.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use abi::xen::io::blkif::{Discard, Indirect, Request as Direct, Response, SEGMENTS, SLOT, Segment, op, status};
use zerocopy::{FromZeros, IntoBytes};

use super::super::Domain;
use super::super::grant_table::Granted;
use super::super::hypercall::{PAGE, XenError, offset};
use super::super::ring::FrontRing;
use crate::block::{DiskError, Request, SECTOR};
use crate::hal::{Nanos, SECOND};

/// Largest ring, as a power of two of pages: 256 requests, for as many pages of data.
pub(super) const MAX_RING_PAGE_ORDER: u32 = 3;
/// Keys of the pages of a ring that has several.
pub(super) const RING_REFS: [&str; 1 << MAX_RING_PAGE_ORDER] =
    ["ring-ref0", "ring-ref1", "ring-ref2", "ring-ref3", "ring-ref4", "ring-ref5", "ring-ref6", "ring-ref7"];
/// Most pages of one request, as Linux' blkfront has it: 128 KiB.
const REQUEST_PAGES: usize = 32;
/// Most pages of the driver's own: for 1 MiB of data under way, and the segments of its requests.
const PAGES: usize = 256 + 256 / REQUEST_PAGES;
/// How long an answer is waited for. A disk that does not answer is not used any more.
const PATIENCE: Nanos = 30 * SECOND;

const PAGE_BYTES: usize = offset(PAGE);
const SECTOR_BYTES: usize = offset(SECTOR);
/// Sectors of a page.
const PAGE_SECTORS: u8 = 8;
const _: () = assert!(PAGE_SECTORS as usize * SECTOR_BYTES == PAGE_BYTES);

pub(super) struct Queue<'h> {
    domain: Arc<Domain<'h>>,
    backend_domain: u16,
    port: u32,
    /// Until it is dropped.
    ring: Option<FrontRing>,
    /// Pages that no request has, and how many there are at all.
    free: Vec<Granted>,
    pages: usize,
    /// Requests without an answer, and those with one, by their numbers, which grow with time.
    open: BTreeMap<u64, Open>,
    answered: BTreeMap<u64, (Open, Result<(), DiskError>)>,
    next_id: u64,
    /// Most pages of one request.
    request_pages: usize,
}

/// A request that was begun.
struct Open {
    /// What its answer has to name.
    operation: u8,
    is_read: bool,
    data: Vec<Granted>,
    /// The page with its segments, if they are indirect.
    table: Option<Granted>,
    since: Nanos,
}

impl<'h> Queue<'h> {
    pub fn new(domain: &Arc<Domain<'h>>, backend_domain: u16, port: u32, ring_pages: usize) -> Result<Queue<'h>, XenError> {
        let ring = FrontRing::new(domain.share(backend_domain, ring_pages)?, SLOT)?;
        Ok(Queue {
            domain: Arc::clone(domain),
            backend_domain,
            port,
            ring: Some(ring),
            free: Vec::new(),
            pages: 0,
            open: BTreeMap::new(),
            answered: BTreeMap::new(),
            next_id: 1,
            request_pages: SEGMENTS,
        })
    }

    /// Grants of the ring's pages.
    pub fn ring_refs(&self) -> &[u32] {
        self.ring.as_ref().map_or(&[], FrontRing::grants)
    }

    /// Takes note of how many indirect segments the backend takes; the most bytes of a request.
    pub fn set_segments(&mut self, indirect: usize) -> usize {
        self.request_pages = indirect.clamp(SEGMENTS, REQUEST_PAGES);
        self.request_pages * PAGE_BYTES
    }

    /// Begins a request that the disk can do; its number, or `None` when there is no room.
    pub fn begin(&mut self, request: Request<'_>) -> Result<Option<u64>, DiskError> {
        self.reap()?;
        self.judge_patience()?;
        let length = match request {
            Request::Read { length, .. } => length,
            Request::Write { bytes, .. } => bytes.len(),
            Request::Flush | Request::Discard { .. } => 0,
        };
        let count = length.div_ceil(PAGE_BYTES);
        let is_indirect = count > SEGMENTS;
        let pages = count + usize::from(is_indirect);
        if self.ring()?.room() == 0 || !self.make(pages)? {
            return Ok(None);
        }
        let mut taken = self.free.split_off(self.free.len().saturating_sub(pages));
        let table = if is_indirect { taken.pop() } else { None };
        let mut open = Open {
            operation: op::READ,
            is_read: matches!(request, Request::Read { .. }),
            data: taken,
            table,
            since: self.domain.platform.hal.now(),
        };
        let id = self.next_id;
        let slot = fill(&mut open, id, request, length)?;
        self.next_id += 1;
        self.open.insert(id, open);
        self.ring()?.push(&slot)?;
        if self.ring()?.show()? {
            self.domain.platform.notify(self.port)?;
        }
        Ok(Some(id))
    }

    /// Ends a request if it was answered; whether it was.
    pub fn end(&mut self, id: u64, bytes: &mut [u8]) -> Result<bool, DiskError> {
        self.domain.platform.acknowledge()?;
        self.reap()?;
        let Some((Open { is_read, data, table, .. }, answer)) = self.answered.remove(&id) else {
            self.judge_patience()?;
            return if self.open.contains_key(&id) { Ok(false) } else { Err(DiskError::Gone) };
        };
        if is_read && answer.is_ok() {
            for (page, piece) in data.iter().zip(bytes.chunks_mut(PAGE_BYTES)) {
                page.dma.read(0, piece)?;
            }
        }
        self.free.extend(data);
        self.free.extend(table);
        answer.map(|()| true)
    }

    /// Asks for an event with the next answers; `true` when there are some already.
    pub fn ask_for_event(&mut self) -> Result<bool, DiskError> {
        // First the note, then the ring: what comes between the two is noted again.
        self.domain.platform.acknowledge()?;
        // With many under way, half of them at once.
        let count = u32::try_from(self.open.len() / 2).unwrap_or(1).max(1);
        Ok(self.ring()?.ask_for_event(count)?)
    }

    fn ring(&mut self) -> Result<&mut FrontRing, DiskError> {
        self.ring.as_mut().ok_or(DiskError::Gone)
    }

    /// Makes so many pages free, if there may be so many.
    fn make(&mut self, count: usize) -> Result<bool, XenError> {
        while self.free.len() < count && self.pages < PAGES {
            let page = match self.domain.share(self.backend_domain, 1) {
                Ok(page) => page,
                // Those there are will do.
                Err(_) if self.pages > self.request_pages => return Ok(false),
                Err(error) => return Err(error),
            };
            self.free.push(page);
            self.pages += 1;
        }
        Ok(self.free.len() >= count)
    }

    /// Takes note of the answers that have come.
    fn reap(&mut self) -> Result<(), DiskError> {
        let mut response = Response::new_zeroed();
        while self.ring()?.pop(response.as_mut_bytes())? {
            let id = response.id.get();
            let open = self.open.remove(&id).ok_or(DiskError::Broken)?;
            let is_its_own = open.operation == response.operation;
            let answer = match response.status.get().cast_signed() {
                status::OKAY => Ok(()),
                status::UNSUPPORTED => Err(DiskError::Unsupported),
                _ => Err(DiskError::Failed),
            };
            self.answered.insert(id, (open, answer));
            if !is_its_own {
                return Err(DiskError::Broken);
            }
        }
        Ok(())
    }

    /// Whether the oldest request without an answer is too old.
    fn judge_patience(&self) -> Result<(), DiskError> {
        let is_over =
            self.open.first_key_value().is_some_and(|(_, open)| open.since.saturating_add(PATIENCE) <= self.domain.platform.hal.now());
        if is_over { Err(DiskError::Timeout) } else { Ok(()) }
    }
}

/// Puts a request's data into its pages and makes its slot.
fn fill(open: &mut Open, id: u64, request: Request<'_>, length: usize) -> Result<[u8; SLOT], DiskError> {
    let mut slot = [0; SLOT];
    let (operation, sector) = match request {
        Request::Read { sector, .. } => (op::READ, sector),
        Request::Write { sector, bytes } => {
            for (page, piece) in open.data.iter().zip(bytes.chunks(PAGE_BYTES)) {
                page.dma.write(0, piece)?;
            }
            (op::WRITE, sector)
        }
        Request::Flush => (op::FLUSH, 0),
        Request::Discard { sector, sectors } => {
            let mut discard = Discard::new_zeroed();
            (discard.operation, discard.id) = (op::DISCARD, id.into());
            (discard.sector_number, discard.nr_sectors) = (sector.into(), sectors.into());
            discard.write_to_prefix(&mut slot).map_err(|_| DiskError::Broken)?;
            open.operation = op::DISCARD;
            return Ok(slot);
        }
    };
    open.operation = operation;
    let segments = open.data.iter().enumerate().map(|(at, page)| {
        let sectors = (length - at * PAGE_BYTES).min(PAGE_BYTES) / SECTOR_BYTES;
        let last_sect = u8::try_from(sectors).unwrap_or(PAGE_SECTORS).saturating_sub(1);
        Segment { gref: page.grant().into(), last_sect, ..Segment::default() }
    });
    if let Some(table) = &open.table {
        for (at, segment) in segments.enumerate() {
            table.dma.write(at * size_of::<Segment>(), segment.as_bytes())?;
        }
        let mut indirect = Indirect::new_zeroed();
        (indirect.operation, indirect.indirect_op, indirect.id) = (op::INDIRECT, operation, id.into());
        indirect.nr_segments = u16::try_from(open.data.len()).map_err(|_| DiskError::Range)?.into();
        indirect.sector_number = sector.into();
        let [first, ..] = &mut indirect.indirect_grefs;
        *first = table.grant().into();
        indirect.write_to_prefix(&mut slot).map_err(|_| DiskError::Broken)?;
    } else {
        let mut direct = Direct::new_zeroed();
        (direct.operation, direct.id, direct.sector_number) = (operation, id.into(), sector.into());
        direct.nr_segments = u8::try_from(open.data.len()).map_err(|_| DiskError::Range)?;
        for (to, segment) in direct.segments.iter_mut().zip(segments) {
            *to = segment;
        }
        direct.write_to_prefix(&mut slot).map_err(|_| DiskError::Broken)?;
    }
    Ok(slot)
}

impl Drop for Queue<'_> {
    fn drop(&mut self) {
        let ring = self.ring.take().map(FrontRing::into_memory);
        let open = core::mem::take(&mut self.open).into_values();
        let open = open.chain(core::mem::take(&mut self.answered).into_values().map(|(open, _)| open));
        let open = open.flat_map(|open| open.data.into_iter().chain(open.table));
        self.domain.take_back(ring.into_iter().chain(open).chain(self.free.drain(..)));
    }
}
