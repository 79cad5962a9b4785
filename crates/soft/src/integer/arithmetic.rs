//! Arithmetic and logic with one or two operands: ADD OR ADC SBB AND SUB XOR CMP TEST, INC DEC NEG NOT.
//!
//! One handler per operation, operand size, operand form and addressing kind. In 64-bit code a conditional jump that follows
//! such an instruction directly is executed by the same handler (`FUSED` is not `fusion::NONE`): then `imm` holds the 32-bit
//! immediate in its lower half and the jump's target, relative to the block's start, in the upper one.

use iced_x86::{Instruction, Mnemonic};

use super::branch::{self, fusion};
use super::host::Host;
use super::memory::{self, operand};
use super::operand::{Kind, by_ea, by_size, field, kind, size};
use crate::block::Lowering;
use crate::cpu::{Cpu, Width};
use crate::flags::StatusFlags;
use crate::mmu::GENERAL;
use crate::op::{Cursor, Handler, Op, Outcome, attempt};

/// An operation with two operands.
trait Binary {
    /// Whether the result goes to the first operand (CMP and TEST only set flags).
    const STORES: bool;
    /// Whether compilers put conditional jumps behind it.
    const FUSES: bool;
    /// Result and flags.
    fn apply<T: Host>(a: T, b: T, flags: StatusFlags) -> (T, StatusFlags);
}

/// An operation with one operand.
trait Unary {
    /// Whether compilers put conditional jumps behind it.
    const FUSES: bool;
    /// Result and flags.
    fn apply<T: Host>(a: T, flags: StatusFlags) -> (T, StatusFlags);
}

macro_rules! binary {
    ($($name:ident, $function:ident ($($flags:ident)?), $stores:literal, $fuses:literal;)*) => {
        $(
            struct $name;

            impl Binary for $name {
                const STORES: bool = $stores;
                const FUSES: bool = $fuses;

                #[inline(always)]
                fn apply<T: Host>(a: T, b: T, _flags: StatusFlags) -> (T, StatusFlags) {
                    $(let $flags = _flags;)?
                    T::$function(a, b $(, $flags)?)
                }
            }
        )*
    };
}

binary! {
    // Name, host instruction (and whether it uses flags), stores, fuses.
    Add, add(), true, true;
    Or, or(), true, false;
    Adc, adc(flags), true, false;
    Sbb, sbb(flags), true, false;
    And, and(), true, true;
    Sub, sub(), true, true;
    Xor, xor(), true, false;
    Cmp, sub(), false, true;
    Test, and(), false, true;
}

macro_rules! unary {
    ($($name:ident, $fuses:literal, |$a:ident, $flags:ident| $e:expr;)*) => {
        $(
            struct $name;

            impl Unary for $name {
                const FUSES: bool = $fuses;

                #[inline(always)]
                fn apply<T: Host>($a: T, $flags: StatusFlags) -> (T, StatusFlags) {
                    $e
                }
            }
        )*
    };
}

unary! {
    Inc, false, |a, flags| T::inc(a, flags);
    Dec, true, |a, flags| T::dec(a, flags);
    Neg, false, |a, _flags| T::neg(a);
    Not, false, |a, flags| (T::from_u64(!a.into_u64()), flags);
}

/// Goes on: with the next op, or by the jump that was fused.
#[inline(always)]
extern "sysv64-unwind" fn finish<const FUSED: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    if FUSED == fusion::NONE { op.next(cpu) } else { branch::fused::<FUSED>(cpu, op) }
}

#[inline(always)]
fn immediate<T: Host, const FUSED: u8>(op: &Op) -> T {
    T::from_u64(if FUSED == fusion::NONE { op.imm } else { op.imm as i32 as u64 })
}

extern "sysv64-unwind" fn reg_reg<B: Binary, T: Host, const FUSED: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let (result, flags) = B::apply(T::read_reg(cpu, op.a), T::read_reg(cpu, op.b), cpu.status_flags);
    if B::STORES {
        T::write_reg(cpu, op.a, result);
    }
    cpu.status_flags = flags;
    finish::<FUSED>(cpu, op)
}

extern "sysv64-unwind" fn reg_imm<B: Binary, T: Host, const FUSED: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let (result, flags) = B::apply(T::read_reg(cpu, op.a), immediate::<T, FUSED>(&op), cpu.status_flags);
    if B::STORES {
        T::write_reg(cpu, op.a, result);
    }
    cpu.status_flags = flags;
    finish::<FUSED>(cpu, op)
}

extern "sysv64-unwind" fn reg_mem<B: Binary, T: Host, const K: u8, const FUSED: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let b = operand!(cpu, op, T, K, reg_mem::<B, T, GENERAL, FUSED>);
    let (result, flags) = B::apply(T::read_reg(cpu, op.a), b, cpu.status_flags);
    if B::STORES {
        T::write_reg(cpu, op.a, result);
    }
    cpu.status_flags = flags;
    finish::<FUSED>(cpu, op)
}

/// The second operand of a form with memory first: a register, or the immediate.
#[inline(always)]
fn second<T: Host, const IMM: bool, const FUSED: u8>(cpu: &Cpu, op: &Op) -> T {
    if IMM { immediate::<T, FUSED>(op) } else { T::read_reg(cpu, op.b) }
}

extern "sysv64-unwind" fn mem_second<B: Binary, T: Host, const K: u8, const IMM: bool, const FUSED: u8>(
    cpu: &mut Cpu,
    op: Cursor,
) -> Outcome {
    let b = second::<T, IMM, FUSED>(cpu, &op);
    let before = cpu.status_flags;
    if !B::STORES {
        let a = operand!(cpu, op, T, K, mem_second::<B, T, GENERAL, IMM, FUSED>);
        cpu.status_flags = B::apply(a, b, before).1;
    } else if K == GENERAL {
        let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, T::SIZE, true));
        let a = attempt!(cpu, op, cpu.load_for_write::<T>(va));
        let (result, flags) = B::apply(a, b, before);
        attempt!(cpu, op, cpu.store(va, result));
        cpu.status_flags = flags;
    } else {
        match memory::update::<T, _, K>(cpu, &op, |a| B::apply(a, b, before)) {
            Some(flags) => cpu.status_flags = flags,
            None => return mem_second::<B, T, GENERAL, IMM, FUSED>(cpu, op),
        }
    }
    finish::<FUSED>(cpu, op)
}

#[inline(always)]
fn locked_value<B: Binary, T: Host>(cpu: &mut Cpu, op: Cursor, b: T) -> Outcome {
    let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, T::SIZE, true));
    let before = cpu.status_flags;
    let a = attempt!(cpu, op, cpu.atomic_update::<T>(va, move |a| B::apply(a, b, before).0));
    cpu.status_flags = B::apply(a, b, before).1;
    op.next(cpu)
}

extern "sysv64-unwind" fn locked_reg<B: Binary, T: Host>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let b = T::read_reg(cpu, op.b);
    locked_value::<B, T>(cpu, op, b)
}

extern "sysv64-unwind" fn locked_imm<B: Binary, T: Host>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    locked_value::<B, T>(cpu, op, T::from_u64(op.imm))
}

/// XOR or SUB of a register with itself, which compilers use to clear it: the result and the flags are known.
extern "sysv64-unwind" fn clear<T: Host>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    T::write_reg(cpu, op.a, T::default());
    cpu.status_flags = StatusFlags::ZERO_RESULT;
    op.next(cpu)
}

extern "sysv64-unwind" fn unary_reg<U: Unary, T: Host, const FUSED: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let (result, flags) = U::apply(T::read_reg(cpu, op.a), cpu.status_flags);
    T::write_reg(cpu, op.a, result);
    cpu.status_flags = flags;
    finish::<FUSED>(cpu, op)
}

extern "sysv64-unwind" fn unary_mem<U: Unary, T: Host, const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let before = cpu.status_flags;
    if K == GENERAL {
        let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, T::SIZE, true));
        let a = attempt!(cpu, op, cpu.load_for_write::<T>(va));
        let (result, flags) = U::apply(a, before);
        attempt!(cpu, op, cpu.store(va, result));
        cpu.status_flags = flags;
    } else {
        match memory::update::<T, _, K>(cpu, &op, |a| U::apply(a, before)) {
            Some(flags) => cpu.status_flags = flags,
            None => return unary_mem::<U, T, GENERAL>(cpu, op),
        }
    }
    op.next(cpu)
}

extern "sysv64-unwind" fn unary_locked<U: Unary, T: Host>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, T::SIZE, true));
    let before = cpu.status_flags;
    let a = attempt!(cpu, op, cpu.atomic_update::<T>(va, move |a| U::apply(a, before).0));
    cpu.status_flags = U::apply(a, before).1;
    op.next(cpu)
}

/// Lowers the instructions of this module.
pub(super) fn lower(low: &Lowering, insns: &[Instruction], op: &mut Op) -> usize {
    let insn = &insns[0];
    match insn.mnemonic() {
        Mnemonic::Add => binary::<Add>(low, insns, op),
        Mnemonic::Or => binary::<Or>(low, insns, op),
        Mnemonic::Adc => binary::<Adc>(low, insns, op),
        Mnemonic::Sbb => binary::<Sbb>(low, insns, op),
        Mnemonic::And => binary::<And>(low, insns, op),
        Mnemonic::Sub => binary::<Sub>(low, insns, op),
        Mnemonic::Xor => binary::<Xor>(low, insns, op),
        Mnemonic::Cmp => binary::<Cmp>(low, insns, op),
        Mnemonic::Test => binary::<Test>(low, insns, op),
        Mnemonic::Inc => unary::<Inc>(low, insns, op),
        Mnemonic::Dec => unary::<Dec>(low, insns, op),
        Mnemonic::Neg => unary::<Neg>(low, insns, op),
        Mnemonic::Not => unary::<Not>(low, insns, op),
        _ => 0,
    }
}

fn binary<B: Binary>(low: &Lowering, insns: &[Instruction], op: &mut Op) -> usize {
    let insn = &insns[0];
    let (first, second) = (kind(insn, 0), kind(insn, 1));
    let size = size(insn, 0);
    if first == Kind::Reg {
        op.a = field(insn.op0_register());
    }
    match second {
        Kind::Reg => op.b = field(insn.op1_register()),
        Kind::Imm => op.imm = insn.immediate(1),
        _ => {}
    }
    if insn.has_lock_prefix() {
        op.run = by_size!(size, T => match second {
            Kind::Reg => locked_reg::<B, T> as Handler,
            _ => locked_imm::<B, T>,
        });
        return 1;
    }
    let zeroing = matches!(insn.mnemonic(), Mnemonic::Xor | Mnemonic::Sub);
    if zeroing && first == Kind::Reg && second == Kind::Reg && op.a == op.b {
        op.run = by_size!(size, T => clear::<T> as Handler);
        return 1;
    }
    let in_registers = first == Kind::Reg && second != Kind::Mem;
    let fused = if low.width == Width::Bits64 && B::FUSES && (in_registers || !B::STORES) { branch::fuse(insns, op) } else { fusion::NONE };
    op.run = match fused {
        fusion::NONE if in_registers => register_handler::<B, { fusion::NONE }>(second, size),
        fusion::NONE => memory_handler::<B, { fusion::NONE }>(low, first, second, size),
        _ => fused_handler::<B>(fused, low, first, second, size),
    };
    1 + usize::from(fused != fusion::NONE)
}

fn register_handler<B: Binary, const FUSED: u8>(second: Kind, size: usize) -> Handler {
    if second == Kind::Reg { by_size!(size, T => reg_reg::<B, T, FUSED>) } else { by_size!(size, T => reg_imm::<B, T, FUSED>) }
}

fn memory_handler<B: Binary, const FUSED: u8>(low: &Lowering, first: Kind, second: Kind, size: usize) -> Handler {
    by_ea!(low.ea, K => by_size!(size, T => match (first, second) {
        (Kind::Reg, _) => reg_mem::<B, T, K, FUSED> as Handler,
        (_, Kind::Reg) => mem_second::<B, T, K, false, FUSED>,
        _ => mem_second::<B, T, K, true, FUSED>,
    }))
}

/// CMP and TEST have handlers of their own for the two most frequent conditions, and fuse in memory forms too.
fn fused_handler<B: Binary>(fused: u8, low: &Lowering, first: Kind, second: Kind, size: usize) -> Handler {
    if B::STORES {
        return register_handler::<B, { fusion::ANY }>(second, size);
    }
    let in_registers = first == Kind::Reg && second != Kind::Mem;
    match (fused, in_registers) {
        (fusion::EQUAL, true) => register_handler::<B, { fusion::EQUAL }>(second, size),
        (fusion::EQUAL, false) => memory_handler::<B, { fusion::EQUAL }>(low, first, second, size),
        (fusion::NOT_EQUAL, true) => register_handler::<B, { fusion::NOT_EQUAL }>(second, size),
        (fusion::NOT_EQUAL, false) => memory_handler::<B, { fusion::NOT_EQUAL }>(low, first, second, size),
        (_, true) => register_handler::<B, { fusion::ANY }>(second, size),
        (_, false) => memory_handler::<B, { fusion::ANY }>(low, first, second, size),
    }
}

fn unary<U: Unary>(low: &Lowering, insns: &[Instruction], op: &mut Op) -> usize {
    let insn = &insns[0];
    let size = size(insn, 0);
    if kind(insn, 0) == Kind::Reg {
        op.a = field(insn.op0_register());
        if U::FUSES && low.width == Width::Bits64 && branch::fuse(insns, op) != fusion::NONE {
            op.run = by_size!(size, T => unary_reg::<U, T, { fusion::ANY }> as Handler);
            return 2;
        }
        op.run = by_size!(size, T => unary_reg::<U, T, { fusion::NONE }> as Handler);
    } else if insn.has_lock_prefix() {
        op.run = by_size!(size, T => unary_locked::<U, T> as Handler);
    } else {
        op.run = by_ea!(low.ea, K => by_size!(size, T => unary_mem::<U, T, K> as Handler));
    }
    1
}
