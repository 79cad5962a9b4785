//! Shifts and rotates: SHL SHR SAR ROL ROR RCL RCR SHLD SHRD.
//!
//! The count is masked to five bits (six for 64-bit operands); a masked count of zero changes nothing, not even flags, but the
//! operand is read and written all the same (Intel SDM vol. 2, SAL/SAR/SHL/SHR).

use iced_x86::{Instruction, Mnemonic};

use super::host::{Host, HostWide};
use super::operand::{Int, Kind, by_size, by_wide_size, field, kind, reg, size};
use crate::block::Lowering;
use crate::cpu::Cpu;
use crate::flags::StatusFlags;
use crate::mmu::GENERAL;
use crate::op::{Cursor, Handler, Op, Outcome, attempt};

trait Shift {
    /// Result and flags for a masked count that is not zero.
    fn apply<T: Host>(a: T, count: u8, flags: StatusFlags) -> (T, StatusFlags);
}

trait DoubleShift {
    /// Result and flags for a masked count that is not zero.
    fn apply<T: HostWide>(a: T, b: T, count: u8, flags: StatusFlags) -> (T, StatusFlags);
}

macro_rules! shifts {
    ($($name:ident $function:ident)*) => {
        $(
            struct $name;

            impl Shift for $name {
                #[inline(always)]
                fn apply<T: Host>(a: T, count: u8, flags: StatusFlags) -> (T, StatusFlags) {
                    T::$function(a, count, flags)
                }
            }
        )*
    };
}

shifts! { Shl shl  Shr shr  Sar sar  Rol rol  Ror ror  Rcl rcl  Rcr rcr }

struct Shld;

impl DoubleShift for Shld {
    #[inline(always)]
    fn apply<T: HostWide>(a: T, b: T, count: u8, flags: StatusFlags) -> (T, StatusFlags) {
        T::shld(a, b, count, flags)
    }
}

struct Shrd;

impl DoubleShift for Shrd {
    #[inline(always)]
    fn apply<T: HostWide>(a: T, b: T, count: u8, flags: StatusFlags) -> (T, StatusFlags) {
        T::shrd(a, b, count, flags)
    }
}

/// The shift count: CL or the immediate, masked.
#[inline(always)]
fn count<T: Int, const CL: bool>(cpu: &Cpu, op: &Op) -> u8 {
    let count = if CL { cpu.regs[reg::RCX] as u8 } else { op.imm as u8 };
    count & if T::SIZE == 8 { 63 } else { 31 }
}

extern "sysv64-unwind" fn shift_reg<S: Shift, T: Host, const CL: bool>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let count = count::<T, CL>(cpu, &op);
    let mut value = T::read_reg(cpu, op.a);
    if count != 0 {
        (value, cpu.status_flags) = S::apply(value, count, cpu.status_flags);
    }
    T::write_reg(cpu, op.a, value);
    op.next(cpu)
}

extern "sysv64-unwind" fn shift_mem<S: Shift, T: Host, const CL: bool>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, T::SIZE, true));
    let mut value = attempt!(cpu, op, cpu.load_for_write::<T>(va));
    let mut flags = cpu.status_flags;
    let count = count::<T, CL>(cpu, &op);
    if count != 0 {
        (value, flags) = S::apply(value, count, flags);
    }
    attempt!(cpu, op, cpu.store(va, value));
    cpu.status_flags = flags;
    op.next(cpu)
}

extern "sysv64-unwind" fn double_reg<S: DoubleShift, T: HostWide, const CL: bool>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let count = count::<T, CL>(cpu, &op);
    let mut value = T::read_reg(cpu, op.a);
    if count != 0 {
        (value, cpu.status_flags) = S::apply(value, T::read_reg(cpu, op.b), count, cpu.status_flags);
    }
    T::write_reg(cpu, op.a, value);
    op.next(cpu)
}

extern "sysv64-unwind" fn double_mem<S: DoubleShift, T: HostWide, const CL: bool>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, T::SIZE, true));
    let mut value = attempt!(cpu, op, cpu.load_for_write::<T>(va));
    let mut flags = cpu.status_flags;
    let count = count::<T, CL>(cpu, &op);
    if count != 0 {
        (value, flags) = S::apply(value, T::read_reg(cpu, op.b), count, flags);
    }
    attempt!(cpu, op, cpu.store(va, value));
    cpu.status_flags = flags;
    op.next(cpu)
}

/// Lowers the instructions of this module.
pub(super) fn lower(_low: &Lowering, insn: &Instruction, op: &mut Op) -> usize {
    op.run = match insn.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => shift::<Shl>(insn, op),
        Mnemonic::Shr => shift::<Shr>(insn, op),
        Mnemonic::Sar => shift::<Sar>(insn, op),
        Mnemonic::Rol => shift::<Rol>(insn, op),
        Mnemonic::Ror => shift::<Ror>(insn, op),
        Mnemonic::Rcl => shift::<Rcl>(insn, op),
        Mnemonic::Rcr => shift::<Rcr>(insn, op),
        Mnemonic::Shld => double::<Shld>(insn, op),
        Mnemonic::Shrd => double::<Shrd>(insn, op),
        _ => return 0,
    };
    1
}

fn shift<S: Shift>(insn: &Instruction, op: &mut Op) -> Handler {
    let size = size(insn, 0);
    let by_cl = kind(insn, 1) == Kind::Reg;
    if !by_cl {
        op.imm = insn.immediate(1);
    }
    if kind(insn, 0) == Kind::Reg {
        op.a = field(insn.op0_register());
        by_size!(size, T => if by_cl { shift_reg::<S, T, true> as Handler } else { shift_reg::<S, T, false> })
    } else {
        by_size!(size, T => if by_cl { shift_mem::<S, T, true> as Handler } else { shift_mem::<S, T, false> })
    }
}

fn double<S: DoubleShift>(insn: &Instruction, op: &mut Op) -> Handler {
    let size = size(insn, 0);
    op.b = field(insn.op1_register());
    let by_cl = kind(insn, 2) == Kind::Reg;
    if !by_cl {
        op.imm = insn.immediate(2);
    }
    if kind(insn, 0) == Kind::Reg {
        op.a = field(insn.op0_register());
        by_wide_size!(size, T => if by_cl { double_reg::<S, T, true> as Handler } else { double_reg::<S, T, false> })
    } else {
        by_wide_size!(size, T => if by_cl { double_mem::<S, T, true> as Handler } else { double_mem::<S, T, false> })
    }
}
