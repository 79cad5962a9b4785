//! Single words of guest memory that both sides change at the same time.

use vm_memory::{AtomicInteger, GuestAddress, GuestMemoryBackend, VolatileMemory};
use vmm::GuestMemory;

/// Does something to the word at `gpa`; `None` when it is not in memory or not aligned.
pub(crate) fn with<A: AtomicInteger, R>(memory: &GuestMemory, gpa: u64, change: impl FnOnce(&A) -> R) -> Option<R> {
    let slice = memory.get_slice(GuestAddress(gpa), size_of::<A>()).ok()?;
    slice.get_atomic_ref::<A>(0).ok().map(change)
}
