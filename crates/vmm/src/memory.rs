//! Guest physical memory: one checked accessor for everybody.
//!
//! vm-memory's traits are the accessor. RAM is anonymous memory of the monitor, mapped once when the machine is made and never
//! moved, so that a backend may keep host addresses of its pages for the life of the [`GuestMemory`].
//!
//! Each region carries a [`CodeMap`], vm-memory's "dirty bitmap" hook: it tells the software CPU that a device wrote to
//! instructions which it has decoded. A device that fills guest memory behind vm-memory's back (`preadv` into a host pointer)
//! has to call `mark_dirty` itself, as vm-memory asks.
#![allow(unsafe_code)] // madvise(2).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::mm::Advice;
use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use zerocopy::FromZeros;

/// Size of a page, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// All memory of a guest, shared between processors and devices.
pub type GuestMemory = Arc<GuestMemoryMmap<CodeMap>>;

/// One contiguous part of [`GuestMemory`].
pub type GuestRegion = GuestRegionMmap<CodeMap>;

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
    let memory = GuestMemory::new(GuestMemoryMmap::from_ranges(&ranges).map_err(std::io::Error::other)?);
    memory.iter().try_for_each(keep_out_of_core_dumps)?;
    memory.iter().for_each(prefer_huge_pages);
    Ok(memory)
}

/// Asks for huge pages, as guests use most of their memory and the host's processor then looks up less of it. Hosts that have none give
/// none. (madvise(2), `MADV_HUGEPAGE`.)
fn prefer_huge_pages(region: &GuestRegion) {
    if let Ok(size) = usize::try_from(region.len()) {
        // SAFETY: the region's own mapping, whose contents this advice leaves alone.
        let _ = unsafe { rustix::mm::madvise(region.as_ptr().cast(), size, Advice::LinuxHugepage) };
    }
}

/// A core dump of the monitor is for finding the monitor's bugs: without what the guest keeps secret, and without its gigabytes. (madvise(2), `MADV_DONTDUMP`.)
/// So its mappings also stay apart from the monitor's own, and /proc/PID/smaps says which they are: `dd`.
fn keep_out_of_core_dumps(region: &GuestRegion) -> std::io::Result<()> {
    let Ok(size) = usize::try_from(region.len()) else { return Ok(()) };
    // SAFETY: the region's own mapping, whose contents this advice leaves alone.
    unsafe { rustix::mm::madvise(region.as_ptr().cast(), size, Advice::LinuxDontDump) }.map_err(std::io::Error::from)
}

/// Which pages of a region hold instructions that a processor has decoded, and how often that was invalidated.
///
/// Clones share the same state.
#[derive(Debug, Clone)]
pub struct CodeMap {
    pages: Arc<Box<[CodePage]>>,
    /// Where this slice starts in the region, in bytes.
    base: usize,
}

/// What is known of a page. Of a large region they are one large block, which the allocator maps for itself: of its pages only those cost
/// memory whose part of the region is executed.
#[derive(Debug, FromZeros)]
struct CodePage {
    /// Which 64-byte granules instructions were decoded from, by bit.
    granules: AtomicU64,
    /// Bit 0: there are any. The other bits: a generation that changes whenever they became invalid.
    state: AtomicU32,
}

/// Bit 0 of a page's state word.
const HAS_CODE: u32 = 1;

impl CodeMap {
    /// The state word of page `page` of the region; decoded instructions are valid as long as it stays the same.
    pub fn state(&self, page: usize) -> &AtomicU32 {
        &self.pages[page].state
    }

    /// Whether page `page` of the region holds decoded instructions, so that writes have to be told by [`CodeMap::written`].
    pub fn has_code(&self, page: usize) -> bool {
        self.pages[page].state.load(Ordering::SeqCst) & HAS_CODE != 0
    }

    /// Notes that instructions are about to be decoded from bytes `[start, end)` of page `page` and returns the state word they
    /// are valid for, and whether the page had none before.
    pub fn add_code(&self, page: usize, start: usize, end: usize) -> (u32, bool) {
        let first = start / 64;
        let last = (end.max(start + 1) - 1) / 64;
        let mask = (u64::MAX >> (63 - (last - first).min(63))) << first.min(63);
        self.pages[page].granules.fetch_or(mask, Ordering::SeqCst);
        let old = self.pages[page].state.fetch_or(HAS_CODE, Ordering::SeqCst);
        (old | HAS_CODE, old & HAS_CODE == 0)
    }

    /// Notes a write of `len` bytes at `offset` of page `page`; returns whether decoded instructions became invalid.
    pub fn written(&self, page: usize, offset: usize, len: usize) -> bool {
        let state = &self.pages[page].state;
        if state.load(Ordering::SeqCst) & HAS_CODE == 0 {
            return false;
        }
        let first = offset / 64;
        let last = ((offset + len.max(1) - 1) / 64).min(63);
        let mask = (u64::MAX >> (63 - (last - first))) << first;
        if self.pages[page].granules.load(Ordering::SeqCst) & mask == 0 {
            return false;
        }
        self.pages[page].granules.store(0, Ordering::SeqCst);
        // A new generation with bit 0 clear.
        let _ = state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |old| Some(old.wrapping_add(2) & !HAS_CODE));
        true
    }
}

impl Default for CodeMap {
    /// A map of no pages.
    fn default() -> CodeMap {
        CodeMap::with_len(0)
    }
}

impl NewBitmap for CodeMap {
    fn with_len(len: usize) -> Self {
        let pages = len.div_ceil(PAGE_SIZE as usize);
        // Zeroed by the allocator, so that they stay untouched.
        let pages = <[CodePage]>::new_box_zeroed_with_elems(pages).unwrap_or_default();
        CodeMap { pages: Arc::new(pages), base: 0 }
    }
}

impl WithBitmapSlice<'_> for CodeMap {
    type S = CodeMap;
}

impl BitmapSlice for CodeMap {}

impl Bitmap for CodeMap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let mut at = self.base + offset;
        let end = at + len;
        while at < end {
            let page = at / PAGE_SIZE as usize;
            let page_end = (page + 1) * PAGE_SIZE as usize;
            if page >= self.pages.len() {
                return;
            }
            self.written(page, at % PAGE_SIZE as usize, end.min(page_end) - at);
            at = page_end;
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let _ = offset;
        false
    }

    fn slice_at(&self, offset: usize) -> CodeMap {
        CodeMap { pages: Arc::clone(&self.pages), base: self.base + offset }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn device_write_to_decoded_instructions_changes_the_generation() {
        let memory = map(&[(0, 0x10000)]).unwrap();
        let map = memory.iter().next().unwrap().bitmap();
        let (state, first) = map.add_code(2, 0x100, 0x140);
        assert!(first);
        memory.write_slice(&[1; 16], GuestAddress(0x2200)).unwrap();
        assert_eq!(map.state(2).load(Ordering::SeqCst), state, "another granule");
        memory.write_slice(&[1; 16], GuestAddress(0x20f8)).unwrap();
        assert_ne!(map.state(2).load(Ordering::SeqCst), state);
        assert!(!map.has_code(2));
    }
}
