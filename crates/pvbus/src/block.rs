//! Disks, whichever driver they have.
//!
//! [`BlockDevice`] is what a driver offers: requests that are begun and ended, so that several are under way, with data in memory of the driver's own.
//! Transfers of any length are built on it here, once for all drivers:
//!
//! ```text
//!   read, write, flush, discard ---pieces---> begin ... begin   end ... end   (pause in between)
//! ```
//!
//! Positions are counted in sectors of 512 bytes, whatever the disk's own unit is. A disk may vanish at any time; everything is [`DiskError::Gone`] then.

use alloc::collections::VecDeque;
use core::fmt;

/// Unit of positions, in bytes.
pub const SECTOR: u64 = 512;

/// What a disk is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// How many 512 bytes it has. It may change while the disk is in use.
    pub sectors: u64,
    /// The unit of requests in bytes.
    pub sector_size: u64,
    /// Whether writes are refused.
    pub is_read_only: bool,
    /// Whether the host keeps writes back until a flush.
    pub has_flush: bool,
    /// Whether the host takes sectors back that are not needed any more.
    pub has_discard: bool,
    /// Most bytes of one request.
    pub request_bytes: usize,
}

impl Geometry {
    /// Whether `length` bytes from `sector` on are on the disk, in units of it.
    ///
    /// # Errors
    /// [`DiskError::Range`].
    pub fn check(&self, sector: u64, length: u64) -> Result<(), DiskError> {
        let is_whole = |bytes: u64| bytes.checked_rem(self.sector_size) == Some(0);
        let end = sector.checked_add(length / SECTOR).filter(|end| *end <= self.sectors);
        if end.is_some() && is_whole(length) && is_whole(sector.saturating_mul(SECTOR)) { Ok(()) } else { Err(DiskError::Range) }
    }
}

/// A request to a disk.
#[derive(Debug, Clone, Copy)]
pub enum Request<'a> {
    /// `length` bytes from `sector` on.
    Read {
        /// Where.
        sector: u64,
        /// How many bytes.
        length: usize,
    },
    /// Bytes to `sector` and behind it.
    Write {
        /// Where.
        sector: u64,
        /// What.
        bytes: &'a [u8],
    },
    /// What was written before it becomes durable.
    Flush,
    /// These sectors are not needed any more.
    Discard {
        /// From here on.
        sector: u64,
        /// How many.
        sectors: u64,
    },
}

/// A request that was begun, to be ended by who began it.
#[derive(Debug)]
#[must_use = "a request that is not ended keeps its place and its memory"]
pub struct Ticket(pub(crate) u64);

/// A disk's driver.
pub trait BlockDevice: Send + Sync {
    /// Its name: `xbf0`, `xbf1` and so on.
    fn name(&self) -> &str;

    /// What it is like; `None` when it is gone.
    fn geometry(&self) -> Option<Geometry>;

    /// Begins a request of at most [`Geometry::request_bytes`]; `None` when as many are under way as can be.
    ///
    /// # Errors
    /// [`DiskError`]; here and below.
    fn begin(&self, request: Request<'_>) -> Result<Option<Ticket>, DiskError>;

    /// Ends a request if the host has answered it, otherwise gives the ticket back. The data of a read is copied to `bytes`, as far as they fit.
    ///
    /// # Errors
    /// As above. The ticket is gone then.
    fn end(&self, ticket: Ticket, bytes: &mut [u8]) -> Result<Option<Ticket>, DiskError>;

    /// Lets the host, and others, do something.
    fn pause(&self);

    /// Fills `bytes` from `sector` on.
    ///
    /// # Errors
    /// As above.
    fn read(&self, sector: u64, bytes: &mut [u8]) -> Result<(), DiskError> {
        let length = checked(self, sector, bytes.len() as u64)?.request_bytes.max(1);
        let pieces = positions(sector, length).zip(bytes.chunks_mut(length));
        transfer(self, pieces, |sector, piece| Request::Read { sector, length: piece.len() }, |piece| piece)
    }

    /// Writes `bytes` to `sector` and behind it.
    ///
    /// # Errors
    /// As above.
    fn write(&self, sector: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let geometry = checked(self, sector, bytes.len() as u64)?;
        if geometry.is_read_only {
            return Err(DiskError::ReadOnly);
        }
        let length = geometry.request_bytes.max(1);
        let pieces = positions(sector, length).zip(bytes.chunks(length));
        transfer(self, pieces, |sector, bytes| Request::Write { sector, bytes }, |_| &mut [])
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// As above.
    fn flush(&self) -> Result<(), DiskError> {
        // A host that does not offer it keeps nothing back.
        if self.geometry().ok_or(DiskError::Gone)?.has_flush {
            transfer(self, [(0, ())].into_iter(), |_, ()| Request::Flush, |()| &mut [])
        } else {
            Ok(())
        }
    }

    /// Tells the host that `sectors` from `sector` on are not needed any more. What they hold afterwards nobody knows.
    ///
    /// # Errors
    /// As above; [`DiskError::Unsupported`] where the host does not want to know.
    fn discard(&self, sector: u64, sectors: u64) -> Result<(), DiskError> {
        let geometry = checked(self, sector, sectors.checked_mul(SECTOR).ok_or(DiskError::Range)?)?;
        match geometry {
            Geometry { is_read_only: true, .. } => return Err(DiskError::ReadOnly),
            Geometry { has_discard: false, .. } => return Err(DiskError::Unsupported),
            _ => {}
        }
        let pieces = (0..sectors).step_by(DISCARD_SECTORS).map(|at| (sector + at, (sectors - at).min(DISCARD_SECTORS as u64)));
        transfer(self, pieces, |sector, &sectors| Request::Discard { sector, sectors }, |_| &mut [])
    }
}

/// Most sectors of one discard: 1 GiB, so that no host is long busy with one.
const DISCARD_SECTORS: usize = 1 << 21;

fn checked<D: BlockDevice + ?Sized>(device: &D, sector: u64, length: u64) -> Result<Geometry, DiskError> {
    let geometry = device.geometry().ok_or(DiskError::Gone)?;
    geometry.check(sector, length).map(|()| geometry)
}

/// Where each request of a long transfer begins.
fn positions(sector: u64, length: usize) -> impl Iterator<Item = u64> {
    (0..).map(move |piece: u64| sector.saturating_add(piece.saturating_mul(length as u64 / SECTOR)))
}

/// Carries out a request for each piece, as many at once as the disk takes. All are ended, even after one has failed; the first error counts.
fn transfer<D: BlockDevice + ?Sized, P>(
    device: &D,
    pieces: impl Iterator<Item = (u64, P)>,
    request: impl for<'p> Fn(u64, &'p P) -> Request<'p>,
    bytes: impl for<'p> Fn(&'p mut P) -> &'p mut [u8],
) -> Result<(), DiskError> {
    let finish = |mut ticket, mut piece| {
        while let Some(open) = device.end(ticket, bytes(&mut piece))? {
            ticket = open;
            device.pause();
        }
        Ok(())
    };
    let mut open = VecDeque::new();
    let mut result = Ok(());
    'pieces: for (sector, piece) in pieces {
        let ticket = loop {
            match device.begin(request(sector, &piece)) {
                Ok(Some(ticket)) => break ticket,
                Ok(None) => match open.pop_front() {
                    Some((ticket, piece)) => result = finish(ticket, piece),
                    // All are others'.
                    None => device.pause(),
                },
                Err(error) => result = Err(error),
            }
            if result.is_err() {
                break 'pieces;
            }
        };
        open.push_back((ticket, piece));
    }
    open.into_iter().fold(result, |result, (ticket, piece)| result.and(finish(ticket, piece)))
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
    /// The hypervisor refused, or there is no memory.
    Refused,
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DiskError::Gone => "the disk is gone",
            DiskError::Range => "not inside of the disk, or not in whole sectors",
            DiskError::ReadOnly => "the disk is read-only",
            DiskError::Failed => "the host could not do it",
            DiskError::Unsupported => "the host has no such operation",
            DiskError::Timeout => "the host did not answer in time; the disk is not used any more",
            DiskError::Broken => "the host answers what was not asked; the disk is not used any more",
            DiskError::Refused => "the hypervisor refused, or there is no memory",
        })
    }
}

impl core::error::Error for DiskError {}
