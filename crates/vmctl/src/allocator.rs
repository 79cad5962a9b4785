//! How the C library's allocator treats large blocks.
#![allow(unsafe_code)] // mallopt(3) has no safe form.

/// Blocks from this size on are mappings of their own.
#[cfg(target_env = "gnu")]
const MAPPED: i32 = 256 << 10;

/// Makes blocks as large as a kernel's file go back to the host when they are freed. By default the first such block that is
/// freed raises the limit, and later ones stay in the heap for ever. (mallopt(3), `M_MMAP_THRESHOLD`.)
pub fn give_back_large_blocks() {
    #[cfg(target_env = "gnu")]
    // SAFETY: plain numbers; no other thread is there yet that could allocate meanwhile.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED);
    }
}
