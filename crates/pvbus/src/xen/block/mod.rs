//! xbf: a disk, by the backend's blkif (`io/blkif.h`).
//!
//! One queue with a ring of several pages, requests with indirect segments, flush and discard, where the backend has them. Data goes through pages of the
//! driver's own that are granted once and used again and again, so that a caller's memory is never the host's, no grant is made or ended while requests
//! run, and a backend may keep the pages mapped (`feature-persistent`). Rings, pages and requests are in `queue.rs`.
//!
//! OpenBSD `sys/dev/pv/xbf.c` is the model. Its line in the message buffer is OpenBSD's of the disk: size, bytes of a sector, sectors.

mod queue;

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;

use abi::xen::io::blkif::info;
use abi::xen::io::xenbus::state;
use spin::Mutex;

use super::Domain;
use super::hypercall::{PAGE, XenError};
use super::ring::BrokenRing;
use super::xenbus::{Frontend, Keys, Published, XenbusError};
use crate::block::{BlockDevice, DiskError, Geometry, Request, SECTOR, Ticket};
use crate::hal::{HalError, MILLISECOND, Nanos};
use queue::Queue;

/// How long is waited at once; an upcall ends it sooner.
const PAUSE: Nanos = MILLISECOND;

/// A disk. All clones are the same disk.
#[derive(Clone)]
pub(super) struct Disk<'h> {
    name: Arc<str>,
    xbf: Arc<Mutex<Xbf<'h>>>,
}

impl<'h> Disk<'h> {
    pub fn new(name: &str, domain: &Arc<Domain<'h>>, backend_domain: u16) -> Disk<'h> {
        let xbf = Xbf { domain: Arc::clone(domain), backend_domain, link: None, geometry: None };
        Disk { name: name.into(), xbf: Arc::new(Mutex::new(xbf)) }
    }
}

/// The driver.
struct Xbf<'h> {
    domain: Arc<Domain<'h>>,
    backend_domain: u16,
    link: Option<Link<'h>>,
    /// While it is connected, and the backend has not lied.
    geometry: Option<Geometry>,
}

/// What the backend is connected by.
struct Link<'h> {
    queue: Queue<'h>,
    port: u32,
}

impl<'h> Xbf<'h> {
    /// Does something with a disk that works. A backend that lies, or says nothing, has no disk any more: it may still write to the pages, and its next
    /// answers would be taken for others'.
    fn with<T>(&mut self, work: impl FnOnce(&mut Queue<'h>) -> Result<T, DiskError>) -> Result<T, DiskError> {
        let link = self.link.as_mut().filter(|_| self.geometry.is_some()).ok_or(DiskError::Gone)?;
        let done = work(&mut link.queue);
        if matches!(done, Err(DiskError::Broken | DiskError::Timeout)) {
            self.geometry = None;
        }
        done
    }
}

impl BlockDevice for Disk<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> Option<Geometry> {
        self.xbf.lock().geometry
    }

    fn begin(&self, request: Request<'_>) -> Result<Option<Ticket>, DiskError> {
        let mut xbf = self.xbf.lock();
        let geometry = xbf.geometry.ok_or(DiskError::Gone)?;
        let data = |sector, length| {
            geometry.check(sector, length as u64)?;
            if length == 0 || length > geometry.request_bytes { Err(DiskError::Range) } else { Ok(()) }
        };
        match request {
            Request::Read { sector, length } => data(sector, length)?,
            Request::Write { .. } | Request::Discard { .. } if geometry.is_read_only => return Err(DiskError::ReadOnly),
            Request::Write { sector, bytes } => data(sector, bytes.len())?,
            Request::Discard { .. } if !geometry.has_discard => return Err(DiskError::Unsupported),
            Request::Discard { sector, sectors } => geometry.check(sector, sectors.checked_mul(SECTOR).ok_or(DiskError::Range)?)?,
            Request::Flush if !geometry.has_flush => return Err(DiskError::Unsupported),
            Request::Flush => {}
        }
        Ok(xbf.with(|queue| queue.begin(request))?.map(Ticket))
    }

    fn end(&self, ticket: Ticket, bytes: &mut [u8]) -> Result<Option<Ticket>, DiskError> {
        let is_done = self.xbf.lock().with(|queue| queue.end(ticket.0, bytes))?;
        Ok((!is_done).then_some(ticket))
    }

    fn pause(&self) {
        let mut xbf = self.xbf.lock();
        let hal = xbf.domain.platform.hal;
        let has_answers = xbf.with(Queue::ask_for_event).unwrap_or(true);
        // Others may have the disk meanwhile.
        drop(xbf);
        if !has_answers {
            hal.wait_until(hal.now().saturating_add(PAUSE));
        }
    }
}

impl Frontend for Disk<'_> {
    fn publish(&mut self, keys: &mut Keys<'_, '_>) -> Result<Published, XenbusError> {
        let mut xbf = self.xbf.lock();
        // One key each of two traditions.
        let pages = keys.optional("max-ring-pages")?.map(|pages| pages.checked_ilog2().map_or(0, u64::from));
        let order = keys.optional("max-ring-page-order")?.or(pages).unwrap_or(0);
        let order = u32::try_from(order).unwrap_or(u32::MAX).min(queue::MAX_RING_PAGE_ORDER);
        let port = xbf.domain.platform.open(xbf.backend_domain)?;
        let queue = match Queue::new(&xbf.domain, xbf.backend_domain, port, 1 << order) {
            Ok(queue) => queue,
            Err(error) => {
                xbf.domain.platform.close(port);
                return Err(error.into());
            }
        };
        let mut published = Vec::from([
            ("event-channel", port.to_string()),
            ("protocol", "x86_64-abi".to_string()),
            ("feature-persistent", "1".to_string()),
        ]);
        if order == 0 {
            published.extend(queue.ring_refs().iter().map(|grant| ("ring-ref", grant.to_string())));
        } else {
            published.extend([("ring-page-order", order.to_string()), ("num-ring-pages", (1 << order).to_string())]);
            published.extend(queue::RING_REFS.into_iter().zip(queue.ring_refs().iter().map(u32::to_string)));
        }
        xbf.link = Some(Link { queue, port });
        Ok(Published { keys: published, state: state::INITIALISED })
    }

    fn connect(&mut self, keys: &mut Keys<'_, '_>) -> Result<String, XenbusError> {
        let (sectors, sector_size) = (read_sectors(keys)?, keys.number("sector-size")?);
        if !sector_size.is_power_of_two() || !(SECTOR..=PAGE).contains(&sector_size) {
            return Err(XenbusError::Key("sector-size"));
        }
        let is_read_only = keys.number("info")? & u64::from(info::READ_ONLY) != 0;
        let has_flush = keys.has("feature-flush-cache")?;
        let has_discard = keys.has("feature-discard")?;
        let segments = keys.optional("feature-max-indirect-segments")?.unwrap_or(0);
        let mut xbf = self.xbf.lock();
        let Some(link) = &mut xbf.link else { return Ok(String::new()) };
        let request_bytes = link.queue.set_segments(usize::try_from(segments).unwrap_or(usize::MAX));
        xbf.geometry = Some(Geometry { sectors, sector_size, is_read_only, has_flush, has_discard, request_bytes });
        xbf.domain.disks.lock().push(Arc::new(self.clone()));
        let (mebibytes, count) = (sectors / 2048, sectors * SECTOR / sector_size);
        let access = if is_read_only { ", read-only" } else { "" };
        Ok(format!("disk, {mebibytes}MB, {sector_size} bytes/sector, {count} sectors{access}"))
    }

    fn review(&mut self, keys: &mut Keys<'_, '_>) -> Result<Option<String>, XenbusError> {
        let sectors = read_sectors(keys)?;
        let mut xbf = self.xbf.lock();
        let Some(geometry) = xbf.geometry.as_mut().filter(|geometry| geometry.sectors != sectors) else { return Ok(None) };
        geometry.sectors = sectors;
        Ok(Some(format!("disk, {}MB, {} sectors now", sectors / 2048, sectors * SECTOR / geometry.sector_size)))
    }

    fn disconnect(&mut self) {
        let mut xbf = self.xbf.lock();
        xbf.geometry = None;
        xbf.domain.disks.lock().retain(|disk| disk.name() != &*self.name);
        if let Some(Link { port, .. }) = xbf.link.take() {
            xbf.domain.platform.close(port);
        }
    }
}

/// The backend's size of the disk, which is in 512 bytes whatever its sectors are.
fn read_sectors(keys: &mut Keys<'_, '_>) -> Result<u64, XenbusError> {
    let sectors = keys.number("sectors")?;
    if sectors > u64::MAX / SECTOR { Err(XenbusError::Key("sectors")) } else { Ok(sectors) }
}

impl From<BrokenRing> for DiskError {
    fn from(_: BrokenRing) -> DiskError {
        DiskError::Broken
    }
}

impl From<XenError> for DiskError {
    fn from(_: XenError) -> DiskError {
        DiskError::Refused
    }
}

impl From<HalError> for DiskError {
    fn from(_: HalError) -> DiskError {
        DiskError::Refused
    }
}
