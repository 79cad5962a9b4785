//! Exchanges: XCHG XADD CMPXCHG CMPXCHG8B CMPXCHG16B.
//!
//! XCHG with memory is always locked. The others are atomic only with LOCK; without it they still go the locked way, which is
//! stronger than needed and right. All of them write their memory operand in any case, so a page that cannot be written faults.

use iced_x86::{Instruction, Mnemonic};

use super::host::Host;
use super::operand::{Int, Kind, by_size, field, kind, reg, size};
use crate::block::Lowering;
use crate::cpu::Cpu;
use crate::mmu::GENERAL;
use crate::op::{Cursor, Flow, Handler, Op, Outcome, Slow, Trap, attempt, slow};

extern "sysv64-unwind" fn xchg_reg<T: Int>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let (a, b) = (T::read_reg(cpu, op.a), T::read_reg(cpu, op.b));
    T::write_reg(cpu, op.a, b);
    T::write_reg(cpu, op.b, a);
    op.next(cpu)
}

/// XCHG with memory; the register is `b`.
extern "sysv64-unwind" fn xchg_mem<T: Int>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, T::SIZE, true));
    let new = T::read_reg(cpu, op.b);
    let old = attempt!(cpu, op, cpu.atomic_update::<T>(va, move |_| new));
    T::write_reg(cpu, op.b, old);
    op.next(cpu)
}

extern "sysv64-unwind" fn xadd_reg<T: Host>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let (a, b) = (T::read_reg(cpu, op.a), T::read_reg(cpu, op.b));
    let (sum, flags) = T::add(a, b);
    // The sum is written last: it wins when both operands are the same register.
    T::write_reg(cpu, op.b, a);
    T::write_reg(cpu, op.a, sum);
    cpu.status_flags = flags;
    op.next(cpu)
}

extern "sysv64-unwind" fn xadd_mem<T: Host>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, T::SIZE, true));
    let addend = T::read_reg(cpu, op.b);
    let old = attempt!(cpu, op, cpu.atomic_update::<T>(va, move |old| T::add(old, addend).0));
    T::write_reg(cpu, op.b, old);
    cpu.status_flags = T::add(old, addend).1;
    op.next(cpu)
}

extern "sysv64-unwind" fn cmpxchg_reg<T: Host>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let (old, accumulator) = (T::read_reg(cpu, op.a), T::get(cpu, reg::RAX));
    let (_, flags) = T::sub(accumulator, old);
    if old == accumulator {
        let new = T::read_reg(cpu, op.b);
        T::write_reg(cpu, op.a, new);
    } else {
        T::set(cpu, reg::RAX, old);
    }
    cpu.status_flags = flags;
    op.next(cpu)
}

extern "sysv64-unwind" fn cmpxchg_mem<T: Host>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, T::SIZE, true));
    let (accumulator, new) = (T::get(cpu, reg::RAX), T::read_reg(cpu, op.b));
    let old = attempt!(cpu, op, cpu.atomic_compare_exchange(va, accumulator, new));
    if old != accumulator {
        T::set(cpu, reg::RAX, old);
    }
    cpu.status_flags = T::sub(accumulator, old).1;
    op.next(cpu)
}

/// CMPXCHG8B.
struct Cmpxchg8b;

impl Slow for Cmpxchg8b {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let va = cpu.ea::<GENERAL>(op, 8, true)?;
        let expected = u64::from(u32::get(cpu, reg::RDX)) << 32 | u64::from(u32::get(cpu, reg::RAX));
        let new = u64::from(u32::get(cpu, reg::RCX)) << 32 | u64::from(u32::get(cpu, reg::RBX));
        let old = cpu.atomic_compare_exchange(va, expected, new)?;
        if old != expected {
            cpu.regs[reg::RAX] = old & 0xffff_ffff;
            cpu.regs[reg::RDX] = old >> 32;
        }
        cpu.status_flags = cpu.status_flags.with_zero(old == expected);
        Ok(Flow::Next)
    }
}

/// CMPXCHG16B; the operand must be aligned.
struct Cmpxchg16b;

impl Slow for Cmpxchg16b {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let va = cpu.ea::<GENERAL>(op, 16, true)?;
        let expected = u128::from(cpu.regs[reg::RDX]) << 64 | u128::from(cpu.regs[reg::RAX]);
        let new = u128::from(cpu.regs[reg::RCX]) << 64 | u128::from(cpu.regs[reg::RBX]);
        let old = cpu.atomic_compare_exchange_16(va, expected, new)?;
        if old != expected {
            cpu.regs[reg::RAX] = old as u64;
            cpu.regs[reg::RDX] = (old >> 64) as u64;
        }
        cpu.status_flags = cpu.status_flags.with_zero(old == expected);
        Ok(Flow::Next)
    }
}

/// Lowers the instructions of this module.
pub(super) fn lower(_low: &Lowering, insn: &Instruction, op: &mut Op) -> usize {
    let register = kind(insn, 0) == Kind::Reg;
    if register {
        op.a = field(insn.op0_register());
    }
    if kind(insn, 1) == Kind::Reg {
        op.b = field(insn.op1_register());
    }
    macro_rules! choose {
        ($reg:ident, $mem:ident) => {
            if register {
                by_size!(size(insn, 0), T => $reg::<T> as Handler)
            } else {
                by_size!(size(insn, 0), T => $mem::<T> as Handler)
            }
        };
    }
    op.run = match insn.mnemonic() {
        // iced puts the memory operand first whichever way it is written.
        Mnemonic::Xchg => choose!(xchg_reg, xchg_mem),
        Mnemonic::Xadd => choose!(xadd_reg, xadd_mem),
        Mnemonic::Cmpxchg => choose!(cmpxchg_reg, cmpxchg_mem),
        Mnemonic::Cmpxchg8b => slow::<Cmpxchg8b>,
        Mnemonic::Cmpxchg16b => slow::<Cmpxchg16b>,
        _ => return 0,
    };
    1
}
