//! Links: what a direct branch to a place in its own page remembers of the block there.
//!
//! Code of one page is decoded from one physical page, whatever its linear address, so such a branch needs neither the jump cache nor the
//! address space. A link is filled when its branch is taken for the first time, and again after the page has changed.
#![allow(unsafe_code)] // Generated code and the block cache share links by pointer.

use std::mem::offset_of;
use std::ptr::NonNull;

use crate::op::Op;

/// Links that are allocated together.
const CHUNK: usize = 128;
/// What no state word is (`vmm::memory::CodeMap`): the link is not filled.
const EMPTY: u64 = 1 << 32;

/// See the module.
#[repr(C)]
pub(crate) struct Link {
    /// State word of the page that the block was decoded under.
    value: u64,
    ops: *const Op,
    /// Guest physical address of the block, and of what is behind it.
    gpa: u64,
    end: u64,
}

/// Where things are, for generated code.
impl Link {
    pub const VALUE: i32 = offset_of!(Link, value) as i32;
    pub const OPS: i32 = offset_of!(Link, ops) as i32;
    pub const END: i32 = offset_of!(Link, end) as i32;
}

/// The links of one processor. They stay where they are until all are dropped.
#[derive(Default)]
pub(crate) struct Links {
    chunks: Vec<NonNull<[Link; CHUNK]>>,
    used: usize,
}

impl Links {
    /// A new link to what stands at `gpa`.
    pub fn add(&mut self, gpa: u64) -> NonNull<Link> {
        if self.used == self.chunks.len() * CHUNK {
            let chunk = Box::new([const { Link { value: EMPTY, ops: std::ptr::null(), gpa: 0, end: 0 } }; CHUNK]);
            self.chunks.push(NonNull::from(Box::leak(chunk)));
        }
        let chunk = self.chunks[self.used / CHUNK];
        // SAFETY: the number is below CHUNK, so this is one of the chunk's links.
        let link = unsafe { chunk.cast::<Link>().add(self.used % CHUNK) };
        self.used += 1;
        // SAFETY: nobody else has this link yet.
        unsafe { (*link.as_ptr()).gpa = gpa };
        link
    }

    /// Fills a link with a block, if that is the one it leads to.
    pub fn fill(&mut self, link: NonNull<Link>, gpa: u64, end: u64, ops: *const Op, value: u32) {
        // SAFETY: links come from `add` and live until `clear`, after which the block cache knows none; generated code reads them only
        // on the thread that is here now.
        let link = unsafe { &mut *link.as_ptr() };
        if link.gpa == gpa {
            (link.end, link.ops, link.value) = (end, ops, value.into());
        }
    }

    /// Drops all links; no code that knows them may run again.
    pub fn clear(&mut self) {
        for chunk in self.chunks.drain(..) {
            // SAFETY: chunks come from `Box::leak`, and each is freed once.
            drop(unsafe { Box::from_raw(chunk.as_ptr()) });
        }
        self.used = 0;
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(links: &[NonNull<Link>]) -> Vec<u64> {
        // SAFETY: the tests' links live.
        links.iter().map(|link| unsafe { link.as_ref() }.value).collect()
    }

    #[test]
    fn link_is_filled_only_with_the_block_it_leads_to() {
        let mut links = Links::default();
        let all: Vec<_> = (0..2 * CHUNK as u64 + 1).map(|n| links.add(0x1000 + n)).collect();
        assert!(values(&all).iter().all(|&value| value == EMPTY));
        links.fill(all[CHUNK], 0x5000, 0x5010, std::ptr::null(), 3);
        assert_eq!(values(&all)[CHUNK], EMPTY, "an interrupt came in between");
        links.fill(all[CHUNK], 0x1000 + CHUNK as u64, 0x5010, std::ptr::null(), 3);
        assert_eq!(values(&all).iter().position(|&value| value == 3), Some(CHUNK));
        links.clear();
        assert_eq!(values(&[links.add(7)]), [EMPTY]);
    }
}
