//! MUL IMUL DIV IDIV.

use iced_x86::{Instruction, Mnemonic};

use super::host::Host;
use super::memory::operand;
use super::operand::{Int, Kind, by_ea, by_size, by_wide_size, field, kind, reg, size};
use crate::block::Lowering;
use crate::cpu::{Cpu, vector};
use crate::mmu::GENERAL;
use crate::op::{Cursor, Handler, Op, Outcome, Trap, attempt};

/// Something done to the accumulator pair (AX; DX:AX; EDX:EAX; RDX:RAX) with one operand.
trait Accumulate {
    fn apply<T: Host>(cpu: &mut Cpu, operand: T) -> Result<(), Trap>;
}

/// The accumulator pair's upper half: AH, DX, EDX or RDX.
#[inline(always)]
fn high<T: Int>(cpu: &Cpu) -> T {
    if T::SIZE == 1 { T::from_u64(cpu.regs[reg::RAX] >> 8) } else { T::get(cpu, reg::RDX) }
}

#[inline(always)]
fn set_pair<T: Int>(cpu: &mut Cpu, low: T, high: T) {
    if T::SIZE == 1 {
        u16::set(cpu, reg::RAX, (high.into_u64() << 8 | low.into_u64()) as u16);
    } else {
        T::set(cpu, reg::RAX, low);
        T::set(cpu, reg::RDX, high);
    }
}

struct Mul;

impl Accumulate for Mul {
    #[inline(always)]
    fn apply<T: Host>(cpu: &mut Cpu, operand: T) -> Result<(), Trap> {
        let (low, high, flags) = T::mul(T::get(cpu, reg::RAX), operand);
        set_pair(cpu, low, high);
        cpu.status_flags = flags;
        Ok(())
    }
}

struct Imul;

impl Accumulate for Imul {
    #[inline(always)]
    fn apply<T: Host>(cpu: &mut Cpu, operand: T) -> Result<(), Trap> {
        let (low, high, flags) = T::imul(T::get(cpu, reg::RAX), operand);
        set_pair(cpu, low, high);
        cpu.status_flags = flags;
        Ok(())
    }
}

/// Unsigned quotient and remainder, `None` for a divisor of zero or a quotient that does not fit.
fn divide<T: Int>(high: T, low: T, divisor: T) -> Option<(u64, u64)> {
    let (high, low, divisor) = (high.into_u64(), low.into_u64(), divisor.into_u64());
    if high >= divisor {
        return None;
    }
    if high == 0 {
        return Some((low / divisor, low % divisor));
    }
    let dividend = u128::from(high) << T::BITS | u128::from(low);
    Some(((dividend / u128::from(divisor)) as u64, (dividend % u128::from(divisor)) as u64))
}

/// Signed quotient and remainder, `None` for a divisor of zero or a quotient that does not fit.
fn divide_signed<T: Int>(high: T, low: T, divisor: T) -> Option<(u64, u64)> {
    let divisor = divisor.sign_extended() as i64;
    let dividend = i128::from(high.sign_extended() as i64) << T::BITS | i128::from(low.into_u64());
    let (quotient, remainder) = match i64::try_from(dividend) {
        Ok(dividend) => (i128::from(dividend.checked_div(divisor)?), dividend.wrapping_rem(divisor)),
        // The dividend of 64-bit operands; the remainder is smaller than the divisor.
        Err(_) => (dividend.checked_div(i128::from(divisor))?, dividend.wrapping_rem(i128::from(divisor)) as i64),
    };
    let result = T::from_u64(quotient as u64);
    if i128::from(result.sign_extended() as i64) == quotient { Some((quotient as u64, remainder as u64)) } else { None }
}

struct Div;

impl Accumulate for Div {
    #[inline(always)]
    fn apply<T: Host>(cpu: &mut Cpu, operand: T) -> Result<(), Trap> {
        let Some((quotient, remainder)) = divide(high::<T>(cpu), T::get(cpu, reg::RAX), operand) else {
            return Err(cpu.raise(vector::DE));
        };
        set_pair(cpu, T::from_u64(quotient), T::from_u64(remainder));
        Ok(())
    }
}

struct Idiv;

impl Accumulate for Idiv {
    #[inline(always)]
    fn apply<T: Host>(cpu: &mut Cpu, operand: T) -> Result<(), Trap> {
        let Some((quotient, remainder)) = divide_signed(high::<T>(cpu), T::get(cpu, reg::RAX), operand) else {
            return Err(cpu.raise(vector::DE));
        };
        set_pair(cpu, T::from_u64(quotient), T::from_u64(remainder));
        Ok(())
    }
}

extern "sysv64-unwind" fn accumulate_reg<A: Accumulate, T: Host>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let operand = T::read_reg(cpu, op.a);
    attempt!(cpu, op, A::apply(cpu, operand));
    op.next(cpu)
}

extern "sysv64-unwind" fn accumulate_mem<A: Accumulate, T: Host>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, T::SIZE, false));
    let operand = attempt!(cpu, op, cpu.load::<T>(va));
    attempt!(cpu, op, A::apply(cpu, operand));
    op.next(cpu)
}

#[inline(always)]
fn product<T: Host>(cpu: &mut Cpu, op: Cursor, a: T, b: T) -> Outcome {
    let (low, _, flags) = T::imul(a, b);
    T::write_reg(cpu, op.a, low);
    cpu.status_flags = flags;
    op.next(cpu)
}

/// IMUL with two register operands.
extern "sysv64-unwind" fn imul_reg<T: Host>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let (a, b) = (T::read_reg(cpu, op.a), T::read_reg(cpu, op.b));
    product(cpu, op, a, b)
}

extern "sysv64-unwind" fn imul_mem<T: Host, const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let b = operand!(cpu, op, T, K, imul_mem::<T, GENERAL>);
    let a = T::read_reg(cpu, op.a);
    product(cpu, op, a, b)
}

/// IMUL with an immediate.
extern "sysv64-unwind" fn imul_reg_imm<T: Host>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let a = T::read_reg(cpu, op.b);
    product(cpu, op, a, T::from_u64(op.imm))
}

extern "sysv64-unwind" fn imul_mem_imm<T: Host>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, T::SIZE, false));
    let a = attempt!(cpu, op, cpu.load::<T>(va));
    product(cpu, op, a, T::from_u64(op.imm))
}

/// Lowers the instructions of this module.
pub(super) fn lower(low: &Lowering, insn: &Instruction, op: &mut Op) -> usize {
    op.run = match insn.mnemonic() {
        Mnemonic::Mul => accumulate::<Mul>(insn, op),
        Mnemonic::Imul if insn.op_count() == 1 => accumulate::<Imul>(insn, op),
        Mnemonic::Imul => imul(low, insn, op),
        Mnemonic::Div => accumulate::<Div>(insn, op),
        Mnemonic::Idiv => accumulate::<Idiv>(insn, op),
        _ => return 0,
    };
    1
}

fn accumulate<A: Accumulate>(insn: &Instruction, op: &mut Op) -> Handler {
    let size = size(insn, 0);
    if kind(insn, 0) == Kind::Reg {
        op.a = field(insn.op0_register());
        by_size!(size, T => accumulate_reg::<A, T>)
    } else {
        by_size!(size, T => accumulate_mem::<A, T>)
    }
}

fn imul(low: &Lowering, insn: &Instruction, op: &mut Op) -> Handler {
    let size = size(insn, 0);
    op.a = field(insn.op0_register());
    let register = kind(insn, 1) == Kind::Reg;
    if register {
        op.b = field(insn.op1_register());
    }
    if insn.op_count() == 3 {
        op.imm = insn.immediate(2);
    }
    match (register, insn.op_count() == 3) {
        (true, false) => by_wide_size!(size, T => imul_reg::<T> as Handler),
        (false, false) => by_ea!(low.ea, K => by_wide_size!(size, T => imul_mem::<T, K> as Handler)),
        (true, true) => by_wide_size!(size, T => imul_reg_imm::<T> as Handler),
        (false, true) => by_wide_size!(size, T => imul_mem_imm::<T> as Handler),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotients_that_do_not_fit_are_refused() {
        assert_eq!(divide(0u8, 7, 2), Some((3, 1)));
        assert_eq!(divide(2u8, 0, 2), None);
        assert_eq!(divide(1u8, 0xff, 2), Some((0xff, 1)));
        assert_eq!(divide(0u64, 5, 0), None);
        assert_eq!(divide(1u64, 0, 2), Some((1 << 63, 0)));
        assert_eq!(divide(1u64, 0, 1), None);
    }

    #[test]
    fn signed_division_truncates_and_refuses_overflow() {
        // -7 / 2
        assert_eq!(divide_signed(0xffu8, 0xf9, 2), Some((-3i64 as u64, -1i64 as u64)));
        // 128 / 1 and -128 / 1 and -128 / -1
        assert_eq!(divide_signed(0u8, 0x80, 1), None);
        assert_eq!(divide_signed(0xffu8, 0x80, 1), Some((-128i64 as u64, 0)));
        assert_eq!(divide_signed(0xffu8, 0x80, 0xff), None);
        let minimum = i64::MIN as u64;
        assert_eq!(divide_signed(u64::MAX, minimum, u64::MAX), None);
        assert_eq!(divide_signed(u64::MAX, minimum, 1), Some((minimum, 0)));
        assert_eq!(divide_signed(1u64 << 63, 0, u64::MAX), None);
        // -2^64 / 2 = -2^63
        assert_eq!(divide_signed(u64::MAX, 0, 2), Some((minimum, 0)));
        assert_eq!(divide_signed(0u64, minimum, u64::MAX), Some((minimum, 0)));
        assert_eq!(divide_signed(0u64, 1, 0), None);
    }
}
