//! A disk of the host, as the disks of every dialect see it.
//!
//! Data is moved directly between the host's image and the pages that the guest named.

#[cfg(any(test, feature = "testing"))]
pub mod testing;

use std::io;

use vm_memory::VolatileSlice;
use vmm::memory::CodeMap;

/// Unit of positions and lengths.
pub const SECTOR: u64 = 512;

/// A piece of guest memory that data is moved to or from directly.
pub type GuestSlice<'a> = VolatileSlice<'a, CodeMap>;

/// A disk. Positions and lengths, of all slices together, are in bytes and multiples of [`SECTOR`], and inside the disk.
pub trait Disk: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;
    /// Whether writes are refused.
    fn read_only(&self) -> bool;
    /// Fills `slices` from `offset`.
    ///
    /// # Errors
    /// What the host says; here and below.
    fn read(&self, offset: u64, slices: &[GuestSlice<'_>]) -> io::Result<()>;
    /// Writes `slices` to `offset`.
    ///
    /// # Errors
    /// As above.
    fn write(&self, offset: u64, slices: &[GuestSlice<'_>]) -> io::Result<()>;
    /// Makes what was written durable.
    ///
    /// # Errors
    /// As above.
    fn flush(&self) -> io::Result<()>;
    /// The range is not needed any more.
    ///
    /// # Errors
    /// As above.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
}
