//! Links: where direct branches to places in their own page lead.
//!
//! Code of one page is decoded from one physical page, whatever its linear address, so such a branch needs neither the jump cache nor the
//! address space. Its code ends with a jump, at first to a detour by way of its link. That is filled when the branch is taken for the first
//! time, with a block that was decoded while the page was as it is for the branch: so where that is still what it was, the block is, too. Once the
//! block is translated, the jump is changed to lead there.
#![allow(unsafe_code)] // Generated code and the block cache share links by pointer.

use std::mem::offset_of;
use std::ptr::NonNull;

use crate::cpu::{Cpu, RIP_BASE};
use crate::op::{Cursor, Handler, Op, Outcome};

/// Links that are allocated together.
const CHUNK: usize = 128;

/// See the module.
#[repr(C)]
pub(crate) struct Link {
    /// [`HOLE`], or the block's.
    ops: *const Op,
    /// Guest physical address of the block.
    gpa: u64,
    /// State word of the page that branch and block were decoded under.
    value: u32,
    /// Where the distance of the branch's jump is in the arena.
    site: u32,
    /// The block has to look around before it begins.
    checked: bool,
    /// Another link that leads to the same block.
    next: Option<NonNull<Link>>,
}

/// Where things are, for generated code.
impl Link {
    pub const OPS: i32 = offset_of!(Link, ops) as i32;
}

/// [`unlinked`], which takes the link besides.
type Unlinked = extern "sysv64-unwind" fn(&mut Cpu, Cursor, NonNull<Link>) -> Outcome;

/// What a link leads to that is not filled.
// SAFETY: only generated code that has followed a link comes here, and it has the link where a third argument is.
static HOLE: Op = Op::new(unsafe { std::mem::transmute::<Unlinked, Handler>(unlinked) }, 0, 0, 0);

/// Has the block found that `link` leads to. The branch is done: the block's address is where entered blocks have theirs.
extern "sysv64-unwind" fn unlinked(cpu: &mut Cpu, _hole: Cursor, link: NonNull<Link>) -> Outcome {
    cpu.blocks.follow(link);
    cpu.rip = cpu.regs[RIP_BASE];
    Outcome::Done
}

/// The links of one processor. They stay where they are until all are dropped.
#[derive(Default)]
pub(crate) struct Links {
    chunks: Vec<NonNull<[Link; CHUNK]>>,
    used: usize,
}

impl Links {
    /// A new link to what stands at `gpa`, for a branch in code that was decoded under `value`; `checked` if the block has to look around
    /// before it begins.
    pub fn add(&mut self, gpa: u64, value: u32, checked: bool) -> NonNull<Link> {
        if self.used == self.chunks.len() * CHUNK {
            let chunk = Box::new([const { Link { ops: &raw const HOLE, gpa: 0, value: 0, site: 0, checked: false, next: None } }; CHUNK]);
            self.chunks.push(NonNull::from(Box::leak(chunk)));
        }
        let chunk = self.chunks[self.used / CHUNK];
        // SAFETY: the number is below CHUNK, so this is one of the chunk's links.
        let link = unsafe { chunk.cast::<Link>().add(self.used % CHUNK) };
        self.used += 1;
        // SAFETY: nobody else has this link yet.
        unsafe { ((*link.as_ptr()).gpa, (*link.as_ptr()).value, (*link.as_ptr()).checked) = (gpa, value, checked) };
        link
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.used
    }

    /// Drops all but the first `len`; no code may know them.
    pub fn truncate(&mut self, len: usize) {
        self.used = len;
    }

    /// Links come from `add` and live until `clear`, after which the block cache knows none.
    fn at(&mut self, link: NonNull<Link>) -> &mut Link {
        // SAFETY: see above; generated code reads links only on the thread that is here now.
        unsafe { &mut *link.as_ptr() }
    }

    /// Says where in the arena the distance is of the jump of a link's branch.
    pub fn place(&mut self, link: NonNull<Link>, site: u32) {
        self.at(link).site = site;
    }

    /// Fills a link with a block, if that is the one it leads to, from the same time, and adds it to the block's.
    pub fn fill(&mut self, link: NonNull<Link>, gpa: u64, ops: *const Op, value: u32, all: &mut Option<NonNull<Link>>) {
        let filled = self.at(link);
        if (filled.gpa, filled.value) == (gpa, value) {
            filled.ops = ops;
            filled.next = all.replace(link);
        }
    }

    /// Where the distances of the jumps are that lead to a block, by its links, and whether it has to look around.
    pub fn sites(&self, first: Option<NonNull<Link>>) -> impl Iterator<Item = (u32, bool)> {
        // SAFETY: as in `at`.
        let links = std::iter::successors(first, |link| unsafe { link.as_ref() }.next);
        // SAFETY: as in `at`.
        links.map(|link| unsafe { link.as_ref() }).map(|link| (link.site, link.checked))
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

    /// Which links are filled.
    fn filled(links: &[NonNull<Link>]) -> Vec<usize> {
        // SAFETY: the tests' links live.
        let is_filled = |link: &NonNull<Link>| !std::ptr::eq(unsafe { link.as_ref() }.ops, &raw const HOLE);
        (0..links.len()).filter(|&n| is_filled(&links[n])).collect()
    }

    #[test]
    fn link_is_filled_only_with_the_block_it_leads_to() {
        let mut links = Links::default();
        let all: Vec<_> = (0..2 * CHUNK as u64 + 1).map(|n| links.add(0x1000 + n, 3, false)).collect();
        let (ops, mut to_block) = (NonNull::dangling().as_ptr(), None);
        links.fill(all[CHUNK], 0x5000, ops, 3, &mut to_block);
        assert_eq!(filled(&all), [0; 0], "an interrupt came in between");
        links.fill(all[CHUNK], 0x1000 + CHUNK as u64, ops, 5, &mut to_block);
        assert_eq!(filled(&all), [0; 0], "the page was changed in between");
        links.fill(all[CHUNK], 0x1000 + CHUNK as u64, ops, 3, &mut to_block);
        assert_eq!(filled(&all), [CHUNK]);
        links.clear();
        assert_eq!(filled(&[links.add(7, 3, false)]), [0; 0]);
    }

    #[test]
    fn block_knows_the_jumps_that_lead_to_it() {
        let (mut links, mut to_block) = (Links::default(), None);
        let ops = NonNull::dangling().as_ptr();
        for site in [8, 16, 24] {
            let link = links.add(0x1000, 3, site == 24);
            links.place(link, site);
            links.fill(link, if site == 16 { 0x2000 } else { 0x1000 }, ops, 3, &mut to_block);
        }
        assert_eq!(links.sites(to_block).collect::<Vec<_>>(), [(24, true), (8, false)]);
    }
}
