//! Blkback: a disk for the guest's blkfront (`io/blkif.h`).
//!
//! Several queues, rings of several pages, indirect segments, flush and discard. A request is copied out of the ring, its pages are mapped for as
//! long as it takes, and data moves between them and the disk directly. Persistent grants (`grants.rs`) are offered where they are asked for: they
//! save a hypervisor's work on page tables, of which there is none here, and cost the guest a copy of every byte.

mod burst;
mod grants;

use std::io;
use std::sync::Arc;
use std::time::Instant;

use abi::xen::io::blkif::{
    Discard, INDIRECT_PAGES, Indirect, Request, Response, SECTOR, SEGMENTS, SEGMENTS_PER_INDIRECT_PAGE, SLOT, Segment, info, op, status,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm::memory::PAGE_SIZE;
use zerocopy::{FromBytes, IntoBytes};

use super::ring::{BackRing, BrokenRing, MAX_PAGES};
use super::xenbus::{ConnectError, Driver, Frontend};
use super::{Access, GrantError, Peer, Xen};
use crate::disk::Disk;
use burst::Burst;
use grants::Grants;
#[cfg(test)]
pub(super) use grants::MOST_KEPT;

/// Most segments of an indirect request; as Linux' backend.
const MAX_INDIRECT_SEGMENTS: u16 = 256;
/// Most queues.
const MAX_QUEUES: u32 = 4;
/// Rings may have up to this power of two of pages.
const MAX_RING_PAGE_ORDER: u32 = MAX_PAGES.ilog2();
/// Unit in which space is given back.
const DISCARD_GRANULARITY: u64 = 4096;
/// Sectors in a page.
const SECTORS_PER_PAGE: u8 = (PAGE_SIZE / SECTOR) as u8;
/// Most sectors of one discard: 1 GiB, so that one request cannot keep the disk for long.
const MAX_DISCARD_SECTORS: u64 = 1 << 21;

/// One disk's backend.
pub struct Blkback {
    xen: Arc<Xen>,
    disk: Arc<dyn Disk>,
    /// Called when the guest has sent something.
    bell: Peer,
    /// Persistent grants are offered.
    keeps_grants: bool,
    queues: Vec<Queue>,
    burst: Burst,
}

struct Queue {
    ring: BackRing,
    grants: Grants,
    port: u32,
}

impl Queue {
    /// Shows the frontend the responses so far.
    fn publish(&mut self, xen: &Xen) {
        if self.ring.publish() {
            xen.notify(self.port);
        }
    }
}

/// Why a request is answered with something else than "done".
enum Refusal {
    Unsupported,
    Failed,
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Refusal {
        tracing::warn!(%error, "xen: disk request failed");
        Refusal::Failed
    }
}

impl From<GrantError> for Refusal {
    fn from(error: GrantError) -> Refusal {
        tracing::debug!(%error, "xen: disk request without memory");
        Refusal::Failed
    }
}

impl Blkback {
    /// A backend for `disk`; `bell` is rung when the guest has sent something, and [`Blkback::work`] is to be called.
    pub fn new(xen: Arc<Xen>, disk: Arc<dyn Disk>, bell: Peer) -> Blkback {
        Blkback { xen, disk, bell, keeps_grants: false, queues: Vec::new(), burst: Burst::new() }
    }

    /// The same, which offers persistent grants if `keeps_grants`.
    #[must_use]
    pub fn keeping_grants(self, keeps_grants: bool) -> Blkback {
        Blkback { keeps_grants, ..self }
    }

    /// Does the requests that wait, and those of the same burst that follow; `true` when there may be more.
    ///
    /// # Errors
    /// [`BrokenRing`]: the device is to be ended.
    pub fn work(&mut self) -> Result<bool, BrokenRing> {
        self.burst.begin(Instant::now());
        loop {
            // Before the look at the rings, so that what an idle guest has asked is all in them.
            let is_idle = self.xen.is_idle();
            let done = self.serve()?;
            if !self.burst.goes_on(done, is_idle, Instant::now()) {
                break;
            }
        }
        self.queues.iter_mut().for_each(|queue| queue.publish(&self.xen));
        self.burst.end(Instant::now());
        while self.burst.stays(Instant::now()) {
            for queue in &self.queues {
                if queue.ring.waiting()? > 0 {
                    return Ok(true);
                }
            }
            std::thread::yield_now();
        }
        let mut more = false;
        for queue in &mut self.queues {
            more |= queue.ring.ask_for_event()?;
        }
        Ok(more)
    }

    /// Does the requests that wait; how many. The frontend is shown that they are done while others are under way only if the guest has nothing
    /// else to do.
    fn serve(&mut self) -> Result<u32, BrokenRing> {
        let mut done = 0;
        let mut slot = [0; SLOT];
        for queue in &mut self.queues {
            // A ring's worth, then it is another's turn.
            for _ in 0..queue.ring.slots() {
                if !queue.ring.next(&mut slot)? {
                    break;
                }
                if self.xen.is_idle() {
                    queue.publish(&self.xen);
                }
                let response = Work { xen: &self.xen, disk: self.disk.as_ref(), grants: &mut queue.grants }.answer(&slot);
                queue.grants.release();
                queue.ring.respond(response.as_bytes());
                done += 1;
            }
        }
        Ok(done)
    }

    /// The queue whose keys are at `prefix`.
    fn open_queue(&self, frontend: &Frontend<'_>, prefix: &str, pages: usize) -> Result<Queue, ConnectError> {
        let mut grants = Vec::new();
        match frontend.optional(&format!("{prefix}ring-ref"))? {
            Some(grant) if pages == 1 => grants.push(grant),
            _ => {
                for page in 0..pages {
                    grants.push(frontend.number(&format!("{prefix}ring-ref{page}"))?);
                }
            }
        }
        let port = frontend.number(&format!("{prefix}event-channel"))?;
        let ring = BackRing::new(&self.xen, &grants, SLOT)?;
        self.xen.bind(port, Arc::clone(&self.bell))?;
        // Linux says so whether or not it was offered, and counts on it only if it was.
        let is_persistent = self.keeps_grants && frontend.optional("feature-persistent")?.is_some_and(|value| value != 0);
        Ok(Queue { ring, grants: Grants::new(Arc::clone(&self.xen), is_persistent), port })
    }
}

impl Driver for Blkback {
    fn offers(&self) -> Vec<(&'static str, String)> {
        let mut offers = vec![
            ("feature-max-indirect-segments", MAX_INDIRECT_SEGMENTS.to_string()),
            ("multi-queue-max-queues", MAX_QUEUES.to_string()),
            ("max-ring-page-order", MAX_RING_PAGE_ORDER.to_string()),
        ];
        if self.keeps_grants {
            offers.push(("feature-persistent", "1".into()));
        }
        offers
    }

    fn connect(&mut self, frontend: &Frontend<'_>) -> Result<Vec<(&'static str, String)>, ConnectError> {
        if frontend.text("protocol").is_some_and(|protocol| protocol != "x86_64-abi") {
            return Err(ConnectError::Key("protocol".into()));
        }
        let order = frontend.optional("ring-page-order")?.unwrap_or(0);
        if order > MAX_RING_PAGE_ORDER {
            return Err(ConnectError::Key("ring-page-order".into()));
        }
        let pages = 1 << order;
        let count = frontend.optional("multi-queue-num-queues")?.unwrap_or(1);
        if count == 0 || count > MAX_QUEUES {
            return Err(ConnectError::Key("multi-queue-num-queues".into()));
        }
        for number in 0..count {
            let prefix = if count == 1 { String::new() } else { format!("queue-{number}/") };
            match self.open_queue(frontend, &prefix, pages) {
                Ok(queue) => self.queues.push(queue),
                Err(error) => {
                    self.disconnect();
                    return Err(error);
                }
            }
        }
        let mode = if self.disk.read_only() { info::READ_ONLY } else { 0 };
        let discard = u32::from(!self.disk.read_only());
        Ok(vec![
            ("feature-flush-cache", "1".into()),
            ("feature-discard", discard.to_string()),
            ("discard-granularity", DISCARD_GRANULARITY.to_string()),
            ("discard-alignment", "0".into()),
            ("discard-secure", "0".into()),
            ("sectors", (self.disk.size() / SECTOR).to_string()),
            ("info", mode.to_string()),
            ("sector-size", SECTOR.to_string()),
            ("physical-sector-size", SECTOR.to_string()),
        ])
    }

    fn disconnect(&mut self) {
        for queue in self.queues.drain(..) {
            self.xen.unbind(queue.port);
        }
    }
}

/// What a request is done with.
struct Work<'a> {
    xen: &'a Xen,
    disk: &'a dyn Disk,
    grants: &'a mut Grants,
}

impl Work<'_> {
    /// Does the request in `slot`.
    fn answer(&mut self, slot: &[u8; SLOT]) -> Response {
        let (operation, id, done) = match slot.first().copied() {
            Some(op::DISCARD) => match Discard::read_from_prefix(slot) {
                Ok((request, _)) => (op::DISCARD, request.id, self.discard(&request)),
                Err(_) => (op::DISCARD, 0.into(), Err(Refusal::Failed)),
            },
            Some(op::INDIRECT) => match Indirect::read_from_prefix(slot) {
                // The answer names what was really done, and Linux checks it.
                Ok((request, _)) => (request.indirect_op, request.id, self.indirect(&request)),
                Err(_) => (op::INDIRECT, 0.into(), Err(Refusal::Failed)),
            },
            _ => {
                let request = zerocopy::transmute_ref!(slot);
                let Request { operation, id, .. } = request;
                (*operation, *id, self.direct(request))
            }
        };
        let status = match done {
            Ok(()) => status::OKAY,
            Err(Refusal::Unsupported) => status::UNSUPPORTED,
            Err(Refusal::Failed) => status::ERROR,
        };
        Response { id, operation, pad: 0, status: status.cast_unsigned().into(), pad2: 0.into() }
    }

    fn direct(&mut self, request: &Request) -> Result<(), Refusal> {
        match request.operation {
            op::READ | op::WRITE => {
                let segments = request.segments.get(..usize::from(request.nr_segments)).ok_or(Refusal::Failed)?;
                self.transfer(request.operation, request.sector_number.get(), segments)
            }
            op::FLUSH => {
                // It may carry data to be written first.
                if request.nr_segments != 0 {
                    let segments = request.segments.get(..usize::from(request.nr_segments).min(SEGMENTS)).ok_or(Refusal::Failed)?;
                    self.transfer(op::WRITE, request.sector_number.get(), segments)?;
                }
                Ok(self.disk.flush()?)
            }
            _ => Err(Refusal::Unsupported),
        }
    }

    fn indirect(&mut self, request: &Indirect) -> Result<(), Refusal> {
        let count = request.nr_segments.get();
        if !matches!(request.indirect_op, op::READ | op::WRITE) || count > MAX_INDIRECT_SEGMENTS {
            return Err(Refusal::Failed);
        }
        let mut left = usize::from(count);
        let mut segments = Vec::with_capacity(left);
        for grant in request.indirect_grefs.iter().take(usize::from(count).div_ceil(SEGMENTS_PER_INDIRECT_PAGE).min(INDIRECT_PAGES)) {
            let here = left.min(SEGMENTS_PER_INDIRECT_PAGE);
            let mut page = vec![Segment::default(); here];
            let gpa = self.grants.map(grant.get(), Access::Read)?;
            self.xen.memory().read_slice(page.as_mut_slice().as_mut_bytes(), GuestAddress(gpa)).map_err(|_| Refusal::Failed)?;
            segments.extend(page);
            left -= here;
        }
        self.transfer(request.indirect_op, request.sector_number.get(), &segments)
    }

    fn discard(&self, request: &Discard) -> Result<(), Refusal> {
        let sectors = request.nr_sectors.get();
        if self.disk.read_only() || request.flag != 0 || sectors > MAX_DISCARD_SECTORS {
            return Err(Refusal::Failed);
        }
        let offset = self.range(request.sector_number.get(), sectors)?;
        Ok(self.disk.discard(offset, sectors * SECTOR)?)
    }

    /// Where on the disk the range begins, if it is on the disk.
    fn range(&self, sector: u64, sectors: u64) -> Result<u64, Refusal> {
        let end = sector.checked_add(sectors).filter(|end| *end <= self.disk.size() / SECTOR);
        end.map(|_| sector * SECTOR).ok_or(Refusal::Failed)
    }

    fn transfer(&mut self, operation: u8, sector: u64, segments: &[Segment]) -> Result<(), Refusal> {
        let reads = operation == op::READ;
        if segments.is_empty() || !reads && self.disk.read_only() {
            return Err(Refusal::Failed);
        }
        let access = if reads { Access::Write } else { Access::Read };
        // Where the data is, as addresses and bytes; what lies together is one.
        let mut ranges: Vec<(u64, u64)> = Vec::with_capacity(segments.len());
        let mut sectors = 0;
        for segment in segments {
            let (first, last) = (segment.first_sect, segment.last_sect);
            if first > last || last >= SECTORS_PER_PAGE {
                return Err(Refusal::Failed);
            }
            let gpa = self.grants.map(segment.gref.get(), access)?;
            let count = u64::from(last - first) + 1;
            sectors += count;
            let (begin, bytes) = (gpa + u64::from(first) * SECTOR, count * SECTOR);
            match ranges.last_mut() {
                Some(last) if last.0 + last.1 == begin => last.1 += bytes,
                _ => ranges.push((begin, bytes)),
            }
        }
        let offset = self.range(sector, sectors)?;
        let slice = |&(begin, bytes): &(u64, u64)| self.xen.memory().get_slice(GuestAddress(begin), bytes as usize);
        let slices: Vec<_> = ranges.iter().map(slice).collect::<Result<_, _>>().map_err(|_| Refusal::Failed)?;
        if reads {
            self.disk.read(offset, &slices)?
        } else {
            self.disk.write(offset, &slices)?
        }
        Ok(())
    }
}
