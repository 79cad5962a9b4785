//! The guest that `vmctl run` boots when it is given none: the kernel of `guest/`, built by this crate's build script.
//!
//! That kernel is a workspace of its own, because it is linked in a way that suits nothing else. `docs/guest.md` tells about it.
#![no_std]

/// Its name in messages.
pub const NAME: &str = "the embedded guest";

/// An ELF file with a PVH note.
pub static GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));

#[cfg(test)]
mod tests {
    #[test]
    fn guest_is_an_elf_file_for_this_processor() {
        assert!(super::GUEST.starts_with(b"\x7fELF\x02\x01\x01"));
        assert_eq!(super::GUEST[18], 62, "EM_X86_64");
    }
}
