//! xbf: a disk, by the backend's blkif (`io/blkif.h`).
//!
//! A ring of one page, direct requests of up to eleven pages, flush. Data goes through pages of the driver's own that are granted once, so that a
//! caller's memory is never the host's, and no grant is made or ended while requests run. One request is open at a time; who asks waits for it.
//!
//! OpenBSD `sys/dev/pv/xbf.c` is the model. Its line in the message buffer is OpenBSD's of the disk: size, bytes of a sector, sectors.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use abi::xen::io::blkif::{Request, Response, SECTOR, SEGMENTS, SLOT, Segment, info, op, status};
use spin::Mutex;
use zerocopy::{FromZeros, IntoBytes};

use super::Domain;
use super::hypercall::{PAGE, XenError, offset};
use super::ring::{BrokenRing, FrontRing};
use super::xenbus::{Frontend, Keys, XenbusError};
use crate::hal::{Dma, HalError, MILLISECOND, Nanos, SECOND};

/// Bytes of a sector in memory.
const SECTOR_BYTES: usize = offset(SECTOR);
const PAGE_BYTES: usize = offset(PAGE);
/// Sectors of a page.
const PAGE_SECTORS: u8 = 8;
const _: () = assert!(PAGE_SECTORS as usize * SECTOR_BYTES == PAGE_BYTES);
/// Most bytes of a request.
const REQUEST_BYTES: usize = SEGMENTS * PAGE_BYTES;
/// How long a request is waited for. A disk that does not answer is not used any more.
const PATIENCE: Nanos = 30 * SECOND;
/// How long at once; an upcall ends it sooner.
const PAUSE: Nanos = MILLISECOND;

/// A disk. Cheap to clone; all clones are the same disk.
#[derive(Clone)]
pub struct Disk<'h>(Arc<Mutex<Xbf<'h>>>);

/// What a disk is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// How many 512 bytes it has.
    pub sectors: u64,
    /// The unit of requests in bytes.
    pub sector_size: u64,
    /// Whether writes are refused.
    pub is_read_only: bool,
    /// Whether the host keeps writes back until a flush.
    pub has_flush: bool,
}

impl<'h> Disk<'h> {
    pub(super) fn new(name: String, domain: &Arc<Domain<'h>>, backend_domain: u16) -> Disk<'h> {
        let (domain, buffers) = (Arc::clone(domain), Vec::new());
        Disk(Arc::new(Mutex::new(Xbf { name, domain, backend_domain, link: None, buffers, geometry: None, next_id: 0 })))
    }

    /// Its name: `xbf0`, `xbf1` and so on.
    #[must_use]
    pub fn name(&self) -> String {
        self.0.lock().name.clone()
    }

    /// What it is like; `None` when it is gone.
    #[must_use]
    pub fn geometry(&self) -> Option<Geometry> {
        self.0.lock().geometry
    }

    /// Fills `bytes`, a multiple of the sector size, from `sector` on, counted in 512 bytes.
    ///
    /// # Errors
    /// [`DiskError`]; here and below.
    pub fn read(&self, sector: u64, bytes: &mut [u8]) -> Result<(), DiskError> {
        let mut xbf = self.0.lock();
        xbf.check(sector, bytes.len())?;
        for (sector, piece) in pieces(sector).zip(bytes.chunks_mut(REQUEST_BYTES)) {
            xbf.request(op::READ, sector, piece.len())?;
            for (buffer, page) in xbf.buffers.iter().zip(piece.chunks_mut(PAGE_BYTES)) {
                buffer.page.read(0, page)?;
            }
        }
        Ok(())
    }

    /// Writes `bytes` to `sector` and behind it.
    ///
    /// # Errors
    /// As [`Disk::read`].
    pub fn write(&self, sector: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let mut xbf = self.0.lock();
        if xbf.check(sector, bytes.len())?.is_read_only {
            return Err(DiskError::ReadOnly);
        }
        for (sector, piece) in pieces(sector).zip(bytes.chunks(REQUEST_BYTES)) {
            for (buffer, page) in xbf.buffers.iter().zip(piece.chunks(PAGE_BYTES)) {
                buffer.page.write(0, page)?;
            }
            xbf.request(op::WRITE, sector, piece.len())?;
        }
        Ok(())
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// As [`Disk::read`].
    pub fn flush(&self) -> Result<(), DiskError> {
        let mut xbf = self.0.lock();
        // A host that does not offer it keeps nothing back.
        if xbf.geometry.ok_or(DiskError::Gone)?.has_flush { xbf.request(op::FLUSH, 0, 0) } else { Ok(()) }
    }
}

/// Where each request of a long transfer begins.
fn pieces(sector: u64) -> impl Iterator<Item = u64> {
    (0..).map(move |piece: u64| sector + piece * (REQUEST_BYTES as u64 / SECTOR))
}

/// The driver.
struct Xbf<'h> {
    name: String,
    domain: Arc<Domain<'h>>,
    backend_domain: u16,
    link: Option<Link>,
    buffers: Vec<Granted>,
    /// While it is connected.
    geometry: Option<Geometry>,
    next_id: u64,
}

/// What the backend is connected by.
struct Link {
    ring: FrontRing,
    grant: u32,
    port: u32,
}

/// A page that the backend may use.
struct Granted {
    page: Dma,
    grant: u32,
}

impl<'h> Xbf<'h> {
    /// Whether a transfer is one that the disk can do.
    fn check(&self, sector: u64, length: usize) -> Result<Geometry, DiskError> {
        let geometry = self.geometry.ok_or(DiskError::Gone)?;
        let is_whole = |bytes: u64| bytes.checked_rem(geometry.sector_size) == Some(0);
        let length = length as u64;
        let end = sector.checked_add(length / SECTOR).filter(|end| *end <= geometry.sectors);
        if end.is_some() && is_whole(length) && is_whole(sector * SECTOR) { Ok(geometry) } else { Err(DiskError::Range) }
    }

    /// One request about `length` bytes in the driver's pages, from its beginning to its end.
    fn request(&mut self, operation: u8, sector: u64, length: usize) -> Result<(), DiskError> {
        let mut request = Request::new_zeroed();
        self.next_id += 1;
        (request.operation, request.id, request.sector_number) = (operation, self.next_id.into(), sector.into());
        let mut left = length / SECTOR_BYTES;
        for (segment, buffer) in request.segments.iter_mut().zip(&self.buffers) {
            let count = u8::try_from(left).unwrap_or(u8::MAX).min(PAGE_SECTORS);
            let Some(last_sect) = count.checked_sub(1) else { break };
            *segment = Segment { gref: buffer.grant.into(), last_sect, ..Segment::default() };
            request.nr_segments += 1;
            left -= usize::from(count);
        }
        let answer = self.exchange(&request).and_then(|response| answer(&response, &request));
        if !matches!(answer, Ok(()) | Err(DiskError::Failed | DiskError::Unsupported)) {
            // The backend may still write to the pages, and its next answers would be taken for others'.
            self.geometry = None;
        }
        answer
    }

    fn exchange(&mut self, request: &Request) -> Result<Response, DiskError> {
        let link = self.link.as_mut().ok_or(DiskError::Gone)?;
        let platform = &self.domain.platform;
        if link.ring.push(request.as_bytes())? {
            platform.notify(link.port)?;
        }
        let deadline = platform.hal.now().saturating_add(PATIENCE);
        let mut response = Response::new_zeroed();
        loop {
            // First the note, then the ring: what comes between the two is noted again.
            platform.acknowledge()?;
            if link.ring.pop(response.as_mut_bytes())? {
                return Ok(response);
            }
            let now = platform.hal.now();
            if now >= deadline {
                return Err(DiskError::Timeout);
            }
            platform.hal.wait_until(deadline.min(now.saturating_add(PAUSE)));
        }
    }

    /// A page that the backend may use.
    fn grant(&self) -> Result<Granted, XenError> {
        let page = self.domain.platform.hal.dma_alloc(1)?;
        let granted = self.domain.grants.lock().grant(self.backend_domain, page.gpa());
        match granted {
            Ok(grant) => Ok(Granted { page, grant }),
            Err(error) => {
                self.domain.platform.hal.dma_free(page);
                Err(error)
            }
        }
    }

    /// Takes a page back. One that the backend still uses is never used for anything else.
    fn revoke(&self, Granted { page, grant }: Granted) {
        if self.domain.grants.lock().revoke(grant) {
            self.domain.platform.hal.dma_free(page);
        }
    }
}

impl Frontend for Disk<'_> {
    fn publish(&mut self) -> Result<Vec<(&'static str, String)>, XenbusError> {
        let mut xbf = self.0.lock();
        let Granted { page, grant } = xbf.grant()?;
        let port = match xbf.domain.platform.open(xbf.backend_domain) {
            Ok(port) => port,
            Err(error) => {
                xbf.revoke(Granted { page, grant });
                return Err(error.into());
            }
        };
        xbf.link = Some(Link { ring: FrontRing::new(page, SLOT)?, grant, port });
        while xbf.buffers.len() < SEGMENTS {
            let buffer = xbf.grant()?;
            xbf.buffers.push(buffer);
        }
        Ok([("ring-ref", grant.to_string()), ("event-channel", port.to_string()), ("protocol", "x86_64-abi".to_string())].into())
    }

    fn connect(&mut self, backend: &mut Keys<'_, '_>) -> Result<String, XenbusError> {
        let (sectors, sector_size) = (backend.number("sectors")?, backend.number("sector-size")?);
        if !sector_size.is_power_of_two() || !(SECTOR..=PAGE).contains(&sector_size) {
            return Err(XenbusError::Key("sector-size"));
        }
        if sectors > u64::MAX / SECTOR {
            return Err(XenbusError::Key("sectors"));
        }
        let is_read_only = backend.number("info")? & u64::from(info::READ_ONLY) != 0;
        let has_flush = backend.has("feature-flush-cache")?;
        let mut xbf = self.0.lock();
        xbf.geometry = Some(Geometry { sectors, sector_size, is_read_only, has_flush });
        xbf.domain.disks.lock().push(self.clone());
        let (mebibytes, count) = (sectors / 2048, sectors * SECTOR / sector_size);
        let access = if is_read_only { ", read-only" } else { "" };
        Ok(format!("disk, {mebibytes}MB, {sector_size} bytes/sector, {count} sectors{access}"))
    }

    fn disconnect(&mut self) {
        let mut xbf = self.0.lock();
        xbf.geometry = None;
        xbf.domain.disks.lock().retain(|disk| !Arc::ptr_eq(&disk.0, &self.0));
        if let Some(Link { ring, grant, port }) = xbf.link.take() {
            xbf.domain.platform.close(port);
            xbf.revoke(Granted { page: ring.into_page(), grant });
        }
        for buffer in core::mem::take(&mut xbf.buffers) {
            xbf.revoke(buffer);
        }
    }
}

/// What a response says of its request.
fn answer(response: &Response, request: &Request) -> Result<(), DiskError> {
    match response.status.get().cast_signed() {
        _ if response.id != request.id || response.operation != request.operation => Err(DiskError::Broken),
        status::OKAY => Ok(()),
        status::UNSUPPORTED => Err(DiskError::Unsupported),
        _ => Err(DiskError::Failed),
    }
}

/// Why a disk did not do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskError {
    /// It is not connected, or not any more.
    Gone,
    /// Not inside of the disk, or not in whole sectors.
    Range,
    /// Writes are refused.
    ReadOnly,
    /// The host could not do it.
    Failed,
    /// The host has no such operation.
    Unsupported,
    /// The host did not answer in time.
    Timeout,
    /// The host answers what was not asked.
    Broken,
    /// The hypervisor refused.
    Xen(XenError),
}

impl From<BrokenRing> for DiskError {
    fn from(_: BrokenRing) -> DiskError {
        DiskError::Broken
    }
}

impl From<XenError> for DiskError {
    fn from(error: XenError) -> DiskError {
        DiskError::Xen(error)
    }
}

impl From<HalError> for DiskError {
    fn from(error: HalError) -> DiskError {
        DiskError::Xen(error.into())
    }
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DiskError::Gone => f.write_str("the disk is gone"),
            DiskError::Range => f.write_str("not inside of the disk, or not in whole sectors"),
            DiskError::ReadOnly => f.write_str("the disk is read-only"),
            DiskError::Failed => f.write_str("the host could not do it"),
            DiskError::Unsupported => f.write_str("the host has no such operation"),
            DiskError::Timeout => f.write_str("the host did not answer in time; the disk is not used any more"),
            DiskError::Broken => f.write_str("the host answers what was not asked; the disk is not used any more"),
            DiskError::Xen(error) => write!(f, "{error}"),
        }
    }
}

impl core::error::Error for DiskError {}
