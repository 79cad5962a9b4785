//! How much of a guest's memory is on the host, for INFO.

// mincore(2) has no safe wrapper.
#![allow(unsafe_code)]

use vm_memory::{GuestMemoryRegion, MemoryRegionAddress};

use crate::memory::{GuestRegion, PAGE_SIZE};

/// Pages asked for at a time.
const CHUNK: usize = 1 << 16;

/// Resident bytes of a region.
pub(crate) fn bytes(region: &GuestRegion) -> u64 {
    let Ok(start) = region.get_host_address(MemoryRegionAddress(0)) else { return 0 };
    let pages = (region.len() / PAGE_SIZE) as usize;
    let mut states = vec![0u8; CHUNK.min(pages)];
    let mut resident = 0;
    for first in (0..pages).step_by(CHUNK) {
        let count = CHUNK.min(pages - first);
        // SAFETY: the range is mapped, being part of the region, and `states` has room for `count` pages.
        let result =
            unsafe { libc::mincore(start.add(first * PAGE_SIZE as usize).cast(), count * PAGE_SIZE as usize, states.as_mut_ptr()) };
        if result == 0 {
            resident += states[..count].iter().filter(|state| *state & 1 != 0).count() as u64;
        }
    }
    resident * PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    #[test]
    fn only_touched_pages_are_resident() {
        let memory = crate::memory::map(&[(0, 64 * PAGE_SIZE)]).unwrap();
        let region = memory.find_region(GuestAddress(0)).unwrap();
        let before = bytes(region);
        memory.write_obj(1u8, GuestAddress(5 * PAGE_SIZE)).unwrap();
        assert!(before < 64 * PAGE_SIZE);
        assert!(bytes(region) > before);
    }
}
