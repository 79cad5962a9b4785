//! How the host writes a record that a guest reads at the same time: the version is odd meanwhile, and a reader that sees it odd, or
//! changed after its reading, reads again (Linux `Documentation/virt/kvm/x86/msr.rst`).

use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm::memory::PAGE_SIZE;
use vmm::{GuestMemory, MsrFault};

/// Whether `size` bytes at `gpa` are four-byte aligned RAM inside one page.
pub(super) fn holds(memory: &GuestMemory, gpa: u64, size: usize) -> bool {
    gpa.is_multiple_of(4) && gpa % PAGE_SIZE + size as u64 <= PAGE_SIZE && memory.check_range(GuestAddress(gpa), size)
}

/// Writes `record` to `gpa`. Its 32-bit version, `version_at` bytes from its start, was `version` before; the one that it has then is
/// returned.
pub(super) fn publish(memory: &GuestMemory, gpa: u64, record: &[u8], version_at: usize, version: u32) -> Result<u32, MsrFault> {
    let (before, after) = (version | 1, (version | 1).wrapping_add(1));
    let place = GuestAddress(gpa.wrapping_add(version_at as u64));
    let store = |version: u32| memory.store(version.to_le(), place, Ordering::Release).map_err(|_| MsrFault);
    store(before)?;
    // The body is not seen before the odd version, and the even version not before the body.
    fence(Ordering::Release);
    let rest = record.get(version_at + size_of::<u32>()..).unwrap_or_default();
    let parts = [(0, record.get(..version_at).unwrap_or_default()), (version_at + size_of::<u32>(), rest)];
    for (at, part) in parts {
        memory.write_slice(part, GuestAddress(gpa.wrapping_add(at as u64))).map_err(|_| MsrFault)?;
    }
    store(after)?;
    Ok(after)
}
