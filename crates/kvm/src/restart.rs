//! Back to before a write that was not to be.
//!
//! An access that nobody carried out has to leave the processor *at* its instruction, so that it can be carried out or repeated. For
//! reads KVM keeps the registers back until it has the answer. For writes it tells us only after it has finished the instruction,
//! and does not say where that began. So the instruction is looked for: of the byte strings that end at RIP, the one that decodes to a
//! write of this size to this address, of this value as far as that can be told. Prefixes that change nothing of this may be left out;
//! then the repetition writes the same all the same.

use iced_x86::{Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register, UsedMemory};
use vmm::registers::{RCX, RDI, RSI, RSP};
use vmm::{Registers, Segment};

use crate::diagnose::{LONGEST_INSTRUCTION, bitness};

/// RFLAGS: string instructions go down.
const DIRECTION: u64 = 1 << 10;
const PAGE_OFFSET: u64 = 0xfff;

/// The write that KVM told about.
pub(crate) struct Write<'a> {
    pub gpa: u64,
    pub data: &'a [u8],
}

/// The guest's memory by linear address.
pub(crate) trait Linear {
    /// Guest physical address.
    fn translate(&self, linear: u64) -> Option<u64>;
    /// Up to `length` bytes; fewer where memory ends.
    fn read(&self, linear: u64, length: usize) -> Vec<u8>;
}

/// The registers before the instruction that did `write`, given those after it.
pub(crate) fn before(after: &Registers, write: &Write, memory: &dyn Linear) -> Option<Registers> {
    let bitness = bitness(after);
    let base = if bitness == 64 { 0 } else { after.cs.base };
    // A repeated string instruction that goes on is still at RIP; all others end there.
    std::iter::once((after.rip, LONGEST_INSTRUCTION))
        .chain((1..=LONGEST_INSTRUCTION).map(|length| (after.rip.wrapping_sub(length as u64), length)))
        .find_map(|(start, length)| {
            let bytes = memory.read(base.wrapping_add(start), length);
            let instruction = Decoder::with_ip(bitness, &bytes, start, DecoderOptions::NONE).decode();
            let fits = if start == after.rip { repeats(&instruction) } else { instruction.len() == length };
            if !fits || instruction.is_invalid() {
                return None;
            }
            let mut registers = undo(&instruction, after, write)?;
            registers.rip = start;
            writes(&instruction, &registers, write, memory).then_some(registers)
        })
}

/// Takes back what the instruction did to the general registers. `None` where that cannot be known.
fn undo(instruction: &Instruction, after: &Registers, write: &Write) -> Option<Registers> {
    let mut registers = *after;
    match instruction.mnemonic() {
        // They used the carry flag that they overwrote.
        Mnemonic::Adc | Mnemonic::Sbb | Mnemonic::Rcl | Mnemonic::Rcr => return None,
        Mnemonic::Xchg => {
            let register = if instruction.op0_kind() == OpKind::Register { instruction.op0_register() } else { instruction.op1_register() };
            set(&mut registers, register, value(write.data))?;
        }
        Mnemonic::Xadd => {
            let register = instruction.op1_register();
            let old = get(after, register)?;
            set(&mut registers, register, value(write.data).wrapping_sub(old))?;
        }
        _ if instruction.is_string_instruction() => {
            let size = instruction.memory_size().size() as u64;
            let step = if after.rflags & DIRECTION == 0 { size } else { size.wrapping_neg() };
            registers.gpr[RDI] = registers.gpr[RDI].wrapping_sub(step);
            if matches!(instruction.mnemonic(), Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq) {
                registers.gpr[RSI] = registers.gpr[RSI].wrapping_sub(step);
            }
            if repeats(instruction) {
                registers.gpr[RCX] = registers.gpr[RCX].wrapping_add(1);
            }
        }
        _ => registers.gpr[RSP] = registers.gpr[RSP].wrapping_sub(i64::from(instruction.stack_pointer_increment()).cast_unsigned()),
    }
    Some(registers)
}

/// Whether the instruction, begun with `registers`, does `write`.
fn writes(instruction: &Instruction, registers: &Registers, write: &Write, memory: &dyn Linear) -> bool {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    let is_write =
        |used: &&UsedMemory| matches!(used.access(), OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite);
    info.used_memory().iter().filter(is_write).any(|used| {
        let Some(linear) = used.virtual_address(0, |register, _, _| get(registers, register)) else { return false };
        // A repeated string instruction has no size of its own as a whole, its elements have.
        let size = if repeats(instruction) { instruction.memory_size().size() } else { used.memory_size().size() };
        // KVM tells writes in pieces of at most 8 bytes, split at page ends.
        let piece = size.min(8).min((PAGE_OFFSET + 1 - (linear & PAGE_OFFSET)) as usize);
        piece == write.data.len() && memory.translate(linear) == Some(write.gpa) && writes_value(instruction, registers, write)
    })
}

/// Compares the value where it is plain to see: MOV.
fn writes_value(instruction: &Instruction, registers: &Registers, write: &Write) -> bool {
    if instruction.mnemonic() != Mnemonic::Mov {
        return true;
    }
    let source = match instruction.op1_kind() {
        OpKind::Register => match get(registers, instruction.op1_register()) {
            Some(value) => value,
            None => return true,
        },
        _ => instruction.immediate(1),
    };
    source.to_le_bytes().starts_with(write.data)
}

fn repeats(instruction: &Instruction) -> bool {
    instruction.is_string_instruction() && (instruction.has_rep_prefix() || instruction.has_repne_prefix())
}

fn value(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    bytes[..data.len()].copy_from_slice(data);
    u64::from_le_bytes(bytes)
}

/// A register as iced asks for it: general ones by value, segments by base.
fn get(registers: &Registers, register: Register) -> Option<u64> {
    let long = bitness(registers) == 64;
    let base = |segment: Segment| Some(if long { 0 } else { segment.base });
    match register {
        Register::ES => base(registers.es),
        Register::CS => base(registers.cs),
        Register::SS => base(registers.ss),
        Register::DS => base(registers.ds),
        Register::FS => Some(registers.fs.base),
        Register::GS => Some(registers.gs.base),
        _ => {
            let full = registers.gpr.get(general(register)?)?;
            Some(match register {
                Register::AH | Register::CH | Register::DH | Register::BH => full >> 8 & 0xff,
                _ => match register.size() {
                    1 => full & 0xff,
                    2 => full & 0xffff,
                    4 => full & 0xffff_ffff,
                    _ => *full,
                },
            })
        }
    }
}

/// Writes a part of a general register, and nothing around it.
fn set(registers: &mut Registers, register: Register, value: u64) -> Option<()> {
    let full = registers.gpr.get_mut(general(register)?)?;
    let (shift, mask) = match register {
        Register::AH | Register::CH | Register::DH | Register::BH => (8, 0xff),
        _ => match register.size() {
            1 => (0, 0xff),
            2 => (0, 0xffff),
            4 => (0, 0xffff_ffff),
            _ => (0, u64::MAX),
        },
    };
    *full = *full & !(mask << shift) | (value & mask) << shift;
    Some(())
}

/// Encoding number of the general register that holds `register`.
fn general(register: Register) -> Option<usize> {
    let full = register.full_register();
    full.is_gpr64().then(|| full.number())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Code at 0x1000, everything mapped to itself.
    struct Flat(Vec<u8>);

    impl Linear for Flat {
        fn translate(&self, linear: u64) -> Option<u64> {
            Some(linear)
        }

        fn read(&self, linear: u64, length: usize) -> Vec<u8> {
            let at = |offset: usize| (linear + offset as u64).checked_sub(0x1000).and_then(|i| self.0.get(i as usize)).copied();
            (0..length).map_while(at).collect()
        }
    }

    fn long(rip: u64) -> Registers {
        let mut registers = Registers { rip, efer: 1 << 10, cr0: 1, ..Registers::default() };
        registers.cs.access = 0xa09b;
        registers.gpr = std::array::from_fn(|i| 0x10_0000 * (i as u64 + 1));
        registers
    }

    /// `code` begins with `skip` bytes of something else and ends at RIP.
    fn start_of(code: &[u8], after: Registers, gpa: u64, data: &[u8]) -> Option<Registers> {
        before(&after, &Write { gpa, data }, &Flat(code.to_vec()))
    }

    #[test]
    fn plain_store_is_found_behind_other_bytes() {
        // jmp .. ; mov [rbx+8], rax
        let after = long(0x1006);
        let data = after.gpr[0].to_le_bytes();
        let found = start_of(&[0xeb, 0x48, 0x48, 0x89, 0x43, 0x08], after, after.gpr[3] + 8, &data).unwrap();
        assert_eq!(found.rip, 0x1002);
        assert_eq!(found.gpr, after.gpr);
    }

    #[test]
    fn push_gets_its_stack_pointer_back() {
        let mut after = long(0x1001);
        after.gpr[RSP] -= 8;
        let data = after.gpr[0].to_le_bytes();
        let found = start_of(&[0x50], after, after.gpr[RSP], &data).unwrap();
        assert_eq!((found.rip, found.gpr[RSP]), (0x1000, after.gpr[RSP] + 8));
    }

    #[test]
    fn repeated_string_store_that_goes_on_gets_its_element_back() {
        let mut after = long(0x1000);
        after.gpr[RCX] = 5;
        let data = after.gpr[0].to_le_bytes();
        let found = start_of(&[0xf3, 0x48, 0xab], after, after.gpr[RDI] - 8, &data).unwrap();
        assert_eq!(found.rip, 0x1000);
        assert_eq!((found.gpr[RDI], found.gpr[RCX]), (after.gpr[RDI] - 8, 6));
    }

    #[test]
    fn last_element_of_a_repeated_string_store_is_repeated_alone() {
        let mut after = long(0x1003);
        after.gpr[RCX] = 0;
        let data = after.gpr[0].to_le_bytes();
        let found = start_of(&[0xf3, 0x48, 0xab], after, after.gpr[RDI] - 8, &data).unwrap();
        // Without its prefix: one element, and RCX is not counted.
        assert_eq!((found.rip, found.gpr[RDI], found.gpr[RCX]), (0x1001, after.gpr[RDI] - 8, 0));
    }

    #[test]
    fn exchange_gets_its_register_back() {
        let mut after = long(0x1002);
        after.gpr[0] = 0xdead_beef;
        // xchg [rbx], eax wrote 0x77.
        let found = start_of(&[0x87, 0x03], after, after.gpr[3], &0x77u32.to_le_bytes()).unwrap();
        assert_eq!((found.rip, found.gpr[0]), (0x1000, 0x77));
    }

    #[test]
    fn instructions_that_cannot_be_undone_are_left() {
        let after = long(0x1002);
        assert_eq!(start_of(&[0x11, 0x03], after, after.gpr[3], &[0; 4]), None);
    }

    #[test]
    fn other_addresses_sizes_and_values_do_not_match() {
        let after = long(0x1002);
        let data = &after.gpr[0].to_le_bytes()[..4];
        let code = [0x89, 0x03];
        assert!(start_of(&code, after, after.gpr[3], data).is_some());
        assert_eq!(start_of(&code, after, after.gpr[3] + 4, data), None);
        assert_eq!(start_of(&code, after, after.gpr[3], &data[..2]), None);
        assert_eq!(start_of(&code, after, after.gpr[3], &[1, 2, 3, 4]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_before_rip_are_survived(code in proptest::collection::vec(any::<u8>(), 0..40), gpa: u64, data in proptest::collection::vec(any::<u8>(), 1..=8), access: u32) {
            let mut after = long(0x1000 + code.len() as u64);
            after.cs.access = access;
            let _ = start_of(&code, after, gpa, &data);
        }
    }
}
