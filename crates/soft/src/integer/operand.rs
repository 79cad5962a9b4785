//! Operands: register fields of ops, and the sizes of integers.
#![allow(unsafe_code)] // Byte registers are read by their offset in the register file.

use iced_x86::{Instruction, OpKind, Register};

use crate::cpu::{Cpu, REG_MASK};
use crate::mmu::Word;

/// Numbers of general registers.
pub(super) mod reg {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// An operand size, and how registers of that size are read and written.
///
/// Register fields of ops are register numbers, but for 8-bit operands they are byte offsets into `Cpu::regs`.
pub(super) trait Int: Word + Default {
    /// Size in bits.
    const BITS: u32;

    /// Sign-extended.
    fn sign_extended(self) -> u64;
    /// Reads a register by its field.
    fn read_reg(cpu: &Cpu, field: u8) -> Self;
    /// Writes a register by its field; 32-bit writes clear the upper half, smaller ones keep the rest.
    fn write_reg(cpu: &mut Cpu, field: u8, value: Self);

    /// Reads the register with this number; AL to DIL for 8 bits.
    #[inline(always)]
    fn get(cpu: &Cpu, number: usize) -> Self {
        Self::read_reg(cpu, field_of::<Self>(number))
    }

    /// Writes the register with this number; AL to DIL for 8 bits.
    #[inline(always)]
    fn set(cpu: &mut Cpu, number: usize, value: Self) {
        Self::write_reg(cpu, field_of::<Self>(number), value);
    }
}

#[inline(always)]
fn field_of<T: Int>(number: usize) -> u8 {
    (if T::SIZE == 1 { number * 8 } else { number }) as u8
}

macro_rules! extensions {
    ($t:ty, $signed:ty) => {
        const BITS: u32 = <$t>::BITS;

        #[inline(always)]
        fn sign_extended(self) -> u64 {
            self as $signed as i64 as u64
        }
    };
}

impl Int for u8 {
    extensions!(u8, i8);

    #[inline(always)]
    fn read_reg(cpu: &Cpu, field: u8) -> u8 {
        const { assert!(size_of::<[u64; 32]>() > u8::MAX as usize) };
        // SAFETY: the register file has 256 bytes, so every u8 is an offset inside it.
        unsafe { cpu.regs.as_ptr().cast::<u8>().add(usize::from(field)).read() }
    }

    #[inline(always)]
    fn write_reg(cpu: &mut Cpu, field: u8, value: u8) {
        // The whole register is written, so that a read of it does not have to wait for a narrower store.
        let register = &mut cpu.regs[usize::from(field >> 3)];
        let shift = (field & 7) * 8;
        *register = *register & !(0xff << shift) | u64::from(value) << shift;
    }
}

impl Int for u16 {
    extensions!(u16, i16);

    #[inline(always)]
    fn read_reg(cpu: &Cpu, field: u8) -> u16 {
        cpu.regs[usize::from(field) & REG_MASK] as u16
    }

    #[inline(always)]
    fn write_reg(cpu: &mut Cpu, field: u8, value: u16) {
        let register = &mut cpu.regs[usize::from(field) & REG_MASK];
        *register = *register & !0xffff | u64::from(value);
    }
}

impl Int for u32 {
    extensions!(u32, i32);

    #[inline(always)]
    fn read_reg(cpu: &Cpu, field: u8) -> u32 {
        cpu.regs[usize::from(field) & REG_MASK] as u32
    }

    #[inline(always)]
    fn write_reg(cpu: &mut Cpu, field: u8, value: u32) {
        cpu.regs[usize::from(field) & REG_MASK] = u64::from(value);
    }
}

impl Int for u64 {
    extensions!(u64, i64);

    #[inline(always)]
    fn read_reg(cpu: &Cpu, field: u8) -> u64 {
        cpu.regs[usize::from(field) & REG_MASK]
    }

    #[inline(always)]
    fn write_reg(cpu: &mut Cpu, field: u8, value: u64) {
        cpu.regs[usize::from(field) & REG_MASK] = value;
    }
}

/// The field for a general register.
pub(super) fn field(register: Register) -> u8 {
    let number = register.full_register().number() as u8;
    match register {
        Register::AH | Register::CH | Register::DH | Register::BH => number * 8 + 1,
        _ if register.is_gpr8() => number * 8,
        _ => number,
    }
}

/// What an operand is, as far as the lowering cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A general register.
    Reg,
    /// Memory with a ModRM byte or a plain offset.
    Mem,
    /// An immediate.
    Imm,
    /// Anything else, or no operand.
    Other,
}

/// What operand `n` is.
pub(super) fn kind(insn: &Instruction, n: u32) -> Kind {
    if n >= insn.op_count() {
        return Kind::Other;
    }
    match insn.op_kind(n) {
        OpKind::Register if insn.op_register(n).is_gpr() => Kind::Reg,
        OpKind::Memory => Kind::Mem,
        OpKind::Immediate8
        | OpKind::Immediate8_2nd
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => Kind::Imm,
        _ => Kind::Other,
    }
}

/// Size in bytes of operand `n`, a register or memory.
pub(super) fn size(insn: &Instruction, n: u32) -> usize {
    match insn.op_kind(n) {
        OpKind::Register => insn.op_register(n).size(),
        _ => insn.memory_size().size(),
    }
}

/// Chooses an expression with type `$t` being the integer of that many bytes.
macro_rules! by_size {
    ($size:expr, $t:ident => $e:expr) => {
        match $size {
            1 => {
                type $t = u8;
                $e
            }
            2 => {
                type $t = u16;
                $e
            }
            4 => {
                type $t = u32;
                $e
            }
            _ => {
                type $t = u64;
                $e
            }
        }
    };
}
pub(super) use by_size;

/// The same for what has no 8-bit form.
macro_rules! by_wide_size {
    ($size:expr, $t:ident => $e:expr) => {
        match $size {
            2 => {
                type $t = u16;
                $e
            }
            4 => {
                type $t = u32;
                $e
            }
            _ => {
                type $t = u64;
                $e
            }
        }
    };
}
pub(super) use by_wide_size;

/// Chooses an expression with constant `$k` being the addressing kind.
macro_rules! by_ea {
    ($ea:expr, $k:ident => $e:expr) => {
        match $ea {
            $crate::mmu::FLAT_BASE => {
                const $k: u8 = $crate::mmu::FLAT_BASE;
                $e
            }
            $crate::mmu::FLAT_SIB => {
                const $k: u8 = $crate::mmu::FLAT_SIB;
                $e
            }
            _ => {
                const $k: u8 = $crate::mmu::GENERAL;
                $e
            }
        }
    };
}
pub(super) use by_ea;
