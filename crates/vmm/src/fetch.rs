//! Reads the instruction that caused an exit, as vmm(4) hands it to userland with an EPT violation.
//!
//! A walk of the guest's page tables without access checks: the processor fetched from there a moment ago (Intel SDM vol. 3 chapter 5:
//! figures 5-2, 5-7 and 5-8).

use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestMemory;
use crate::registers::Registers;

const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
/// Code segment access rights: 64-bit code.
const ACCESS_L: u32 = 1 << 13;
/// Page table entries: present, and large page.
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// Physical address bits of an 8-byte entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// The longest instruction there is.
pub(crate) const LONGEST_INSTRUCTION: usize = 15;

/// The bytes at RIP: as many as are mapped, 15 at most.
pub(crate) fn instruction(registers: &Registers, memory: &GuestMemory) -> ([u8; LONGEST_INSTRUCTION], u8) {
    let long = registers.efer & EFER_LMA != 0 && registers.cs.access & ACCESS_L != 0;
    let linear = if long { registers.rip } else { registers.cs.base.wrapping_add(registers.rip) & 0xffff_ffff };
    let mut bytes = [0; LONGEST_INSTRUCTION];
    for (count, byte) in (0u8..).zip(&mut bytes) {
        let read =
            translate(registers, memory, linear.wrapping_add(u64::from(count))).and_then(|gpa| memory.read_obj(GuestAddress(gpa)).ok());
        match read {
            Some(value) => *byte = value,
            None => return (bytes, count),
        }
    }
    (bytes, LONGEST_INSTRUCTION as u8)
}

/// Guest physical address of a linear one.
pub(crate) fn translate(registers: &Registers, memory: &GuestMemory, linear: u64) -> Option<u64> {
    if registers.cr0 & CR0_PG == 0 {
        return Some(linear);
    }
    if registers.cr4 & CR4_PAE == 0 {
        return translate_32(registers, memory, linear);
    }
    let long = registers.efer & EFER_LMA != 0;
    let levels: u32 = match (long, registers.cr4 & CR4_LA57 != 0) {
        (true, true) => 5,
        (true, false) => 4,
        (false, _) => 3,
    };
    let mut table = if long { registers.cr3 & ADDRESS } else { registers.cr3 & 0xffff_ffe0 };
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

fn translate_32(registers: &Registers, memory: &GuestMemory, linear: u64) -> Option<u64> {
    let read = |at: u64| memory.read_obj::<u32>(GuestAddress(at)).map(u32::from_le).ok().map(u64::from).filter(|e| e & PRESENT != 0);
    let directory = read((registers.cr3 & 0xffff_f000) + (linear >> 22 & 0x3ff) * 4)?;
    if directory & LARGE != 0 && registers.cr4 & CR4_PSE != 0 {
        // PSE-36: bits 20:13 are address bits 39:32.
        return Some((directory >> 13 & 0xff) << 32 | directory & 0xffc0_0000 | linear & 0x3f_ffff);
    }
    let table = read((directory & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4)?;
    Some(table & 0xffff_f000 | linear & 0xfff)
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
        let registers = Registers { cr0: CR0_PG | 1, cr3: 0x1000, cr4: CR4_PAE, efer: EFER_LMA, ..Registers::reset() };
        assert_eq!(translate(&registers, &memory, 0x5123), Some(0x9123));
        assert_eq!(translate(&registers, &memory, 0x20_0456), Some(0x60_0456));
        assert_eq!(translate(&registers, &memory, 0x6000), None);
    }

    #[test]
    fn two_level_walk_finds_small_and_large_pages() {
        let memory = memory::map(&[(0, 0x10000)]).unwrap();
        let put = |at: u64, value: u32| memory.write_obj(value, GuestAddress(at)).unwrap();
        put(0x1000, 0x2003);
        put(0x1004, 0x0080_0083);
        put(0x2000 + 3 * 4, 0x7003);
        let registers = Registers { cr0: CR0_PG | 1, cr3: 0x1000, cr4: CR4_PSE, ..Registers::reset() };
        assert_eq!(translate(&registers, &memory, 0x3010), Some(0x7010));
        assert_eq!(translate(&registers, &memory, 0x40_0010), Some(0x80_0010));
    }

    #[test]
    fn instruction_at_the_end_of_memory_is_cut_short() {
        let memory = memory::map(&[(0, 0x1000)]).unwrap();
        memory.write_slice(&[0x90, 0xf4], GuestAddress(0xffe)).unwrap();
        let mut registers = Registers { rip: 0xffe, ..Registers::reset() };
        registers.cs.base = 0;
        let (bytes, count) = instruction(&registers, &memory);
        assert_eq!((&bytes[..2], count), (&[0x90, 0xf4][..], 2));
    }
}
