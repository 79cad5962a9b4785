//! Reads the instruction that caused an exit, as vmm(4) hands it to userland with an EPT violation.
//!
//! A walk of the guest's page tables without access checks ([`Paging`](crate::paging::Paging)): the processor fetched from there a moment ago.

use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestMemory;
use crate::registers::Registers;

const EFER_LMA: u64 = 1 << 10;
/// Code segment access rights: 64-bit code.
const ACCESS_L: u32 = 1 << 13;
/// The longest instruction there is.
pub(crate) const LONGEST_INSTRUCTION: usize = 15;

/// The bytes at RIP: as many as are mapped, 15 at most.
pub(crate) fn instruction(registers: &Registers, memory: &GuestMemory) -> ([u8; LONGEST_INSTRUCTION], u8) {
    let long = registers.efer & EFER_LMA != 0 && registers.cs.access & ACCESS_L != 0;
    let linear = if long { registers.rip } else { registers.cs.base.wrapping_add(registers.rip) & 0xffff_ffff };
    let paging = registers.paging();
    let mut bytes = [0; LONGEST_INSTRUCTION];
    for (count, byte) in (0u8..).zip(&mut bytes) {
        let read = paging.translate(memory, linear.wrapping_add(u64::from(count))).and_then(|gpa| memory.read_obj(GuestAddress(gpa)).ok());
        match read {
            Some(value) => *byte = value,
            None => return (bytes, count),
        }
    }
    (bytes, LONGEST_INSTRUCTION as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

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
