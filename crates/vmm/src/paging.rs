//! A processor's paging, and the walk of its page tables on its behalf.
//!
//! For what a guest names by its own linear addresses: instructions that caused an exit, and the buffers of hypercalls. No access checks: the
//! caller knows that the processor was allowed to. (Intel SDM vol. 3 chapter 5: figures 5-2, 5-7 and 5-8.)

use vm_memory::{Bytes, GuestAddress};

use crate::memory::{GuestMemory, PAGE_SIZE};

const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
/// Page table entries: present, and large page.
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// Physical address bits of an 8-byte entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The registers that decide how linear addresses become physical ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Paging {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
}

impl Paging {
    /// Guest physical address of a linear one; `None` where nothing is mapped.
    pub fn translate(&self, memory: &GuestMemory, linear: u64) -> Option<u64> {
        if self.cr0 & CR0_PG == 0 {
            return Some(linear);
        }
        if self.cr4 & CR4_PAE == 0 {
            return self.translate_32(memory, linear);
        }
        let long = self.efer & EFER_LMA != 0;
        let levels: u32 = match (long, self.cr4 & CR4_LA57 != 0) {
            (true, true) => 5,
            (true, false) => 4,
            (false, _) => 3,
        };
        let mut table = if long { self.cr3 & ADDRESS } else { self.cr3 & 0xffff_ffe0 };
        for level in (0..levels).rev() {
            let shift = 12 + 9 * level;
            let index = linear >> shift & 0x1ff;
            let entry: u64 = memory.read_obj(GuestAddress(table + index * 8)).map(u64::from_le).ok()?;
            if entry & PRESENT == 0 {
                return None;
            }
            if level == 0 || (entry & LARGE != 0 && level <= 2) {
                let within = (1u64 << shift) - 1;
                return Some(entry & ADDRESS & !within | linear & within);
            }
            table = entry & ADDRESS;
        }
        None
    }

    fn translate_32(&self, memory: &GuestMemory, linear: u64) -> Option<u64> {
        let read = |at: u64| memory.read_obj::<u32>(GuestAddress(at)).map(u32::from_le).ok().map(u64::from).filter(|e| e & PRESENT != 0);
        let directory = read((self.cr3 & 0xffff_f000) + (linear >> 22 & 0x3ff) * 4)?;
        if directory & LARGE != 0 && self.cr4 & CR4_PSE != 0 {
            // PSE-36: bits 20:13 are address bits 39:32.
            return Some((directory >> 13 & 0xff) << 32 | directory & 0xffc0_0000 | linear & 0x3f_ffff);
        }
        let table = read((directory & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4)?;
        Some(table & 0xffff_f000 | linear & 0xfff)
    }

    /// Reads from a linear address; `None` when part of it is not mapped or not in memory.
    pub fn read(&self, memory: &GuestMemory, linear: u64, data: &mut [u8]) -> Option<()> {
        let mut at = linear;
        let mut rest = data;
        while !rest.is_empty() {
            let (piece, more) = rest.split_at_mut(piece(at, rest.len()));
            memory.read_slice(piece, GuestAddress(self.translate(memory, at)?)).ok()?;
            at = at.wrapping_add(piece.len() as u64);
            rest = more;
        }
        Some(())
    }

    /// Writes to a linear address; `None` when part of it is not mapped or not in memory, and what precedes that is written.
    pub fn write(&self, memory: &GuestMemory, linear: u64, data: &[u8]) -> Option<()> {
        let mut at = linear;
        let mut rest = data;
        while !rest.is_empty() {
            let (piece, more) = rest.split_at(piece(at, rest.len()));
            memory.write_slice(piece, GuestAddress(self.translate(memory, at)?)).ok()?;
            at = at.wrapping_add(piece.len() as u64);
            rest = more;
        }
        Some(())
    }
}

/// Bytes up to the end of the page at `at`, `most` at most.
fn piece(at: u64, most: usize) -> usize {
    most.min((PAGE_SIZE - at % PAGE_SIZE) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn four_level_walk_finds_small_and_large_pages() {
        let memory = memory::map(&[(0, 0x10000)]).unwrap();
        let put = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).unwrap();
        put(0x1000, 0x2003);
        put(0x2000, 0x3003);
        put(0x3000, 0x4003);
        put(0x3008, 0x0060_0083);
        put(0x4000 + 5 * 8, 0x9003);
        let paging = Paging { cr0: CR0_PG | 1, cr3: 0x1000, cr4: CR4_PAE, efer: EFER_LMA };
        assert_eq!(paging.translate(&memory, 0x5123), Some(0x9123));
        assert_eq!(paging.translate(&memory, 0x20_0456), Some(0x60_0456));
        assert_eq!(paging.translate(&memory, 0x6000), None);
    }

    #[test]
    fn two_level_walk_finds_small_and_large_pages() {
        let memory = memory::map(&[(0, 0x10000)]).unwrap();
        let put = |at: u64, value: u32| memory.write_obj(value, GuestAddress(at)).unwrap();
        put(0x1000, 0x2003);
        put(0x1004, 0x0080_0083);
        put(0x2000 + 3 * 4, 0x7003);
        let paging = Paging { cr0: CR0_PG | 1, cr3: 0x1000, cr4: CR4_PSE, efer: 0 };
        assert_eq!(paging.translate(&memory, 0x3010), Some(0x7010));
        assert_eq!(paging.translate(&memory, 0x40_0010), Some(0x80_0010));
    }

    #[test]
    fn buffers_cross_pages_and_end_where_nothing_is_mapped() {
        let memory = memory::map(&[(0, 0x10000)]).unwrap();
        let put = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).unwrap();
        for (at, entry) in [(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x4003), (0x4000, 0x9003), (0x4008, 0x7003)] {
            put(at, entry);
        }
        let paging = Paging { cr0: CR0_PG | 1, cr3: 0x1000, cr4: CR4_PAE, efer: EFER_LMA };
        assert_eq!(paging.write(&memory, 0xffe, &[1, 2, 3, 4]), Some(()));
        assert_eq!(memory.read_obj::<u16>(GuestAddress(0x9ffe)).unwrap(), 0x201);
        assert_eq!(memory.read_obj::<u16>(GuestAddress(0x7000)).unwrap(), 0x403);
        let mut back = [0; 4];
        assert_eq!(paging.read(&memory, 0xffe, &mut back), Some(()));
        assert_eq!(back, [1, 2, 3, 4]);
        assert_eq!(paging.read(&memory, 0x1ffe, &mut back), None);
    }
}
