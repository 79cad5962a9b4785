//! Guest physical memory: one checked accessor for everybody.
//!
//! vm-memory's traits are the accessor. RAM is anonymous memory of the monitor, mapped once when the machine is made and never
//! moved, so that a backend may keep host addresses of its pages for the life of the [`GuestMemory`].

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Size of a page, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// All memory of a guest, shared between processors and devices.
pub type GuestMemory = Arc<GuestMemoryMmap<()>>;

/// Maps zeroed memory at the given guest physical ranges (address and size in bytes, page aligned, ascending).
///
/// # Errors
/// What the host says when it has no room, or vm-memory's word about overlapping ranges.
pub fn map(ranges: &[(u64, u64)]) -> Result<GuestMemory, std::io::Error> {
    let ranges: Vec<(GuestAddress, usize)> = ranges
        .iter()
        .map(|&(gpa, size)| {
            let size = usize::try_from(size).map_err(|_| std::io::Error::from(std::io::ErrorKind::OutOfMemory))?;
            Ok((GuestAddress(gpa), size))
        })
        .collect::<Result<_, std::io::Error>>()?;
    GuestMemoryMmap::from_ranges(&ranges).map(Arc::new).map_err(std::io::Error::other)
}

bitflags::bitflags! {
    /// What a guest may do with a page (as the protection argument of `MPROTECT_EPT`: PROT_READ 1, PROT_WRITE 2, PROT_EXEC 4).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Protection: u8 {
        /// Data reads.
        const READ = 1;
        /// Data writes.
        const WRITE = 2;
        /// Instruction fetches.
        const EXECUTE = 4;
    }
}
