//! Bits: BT BTS BTR BTC, BSF BSR TZCNT LZCNT POPCNT, and the BMI1, BMI2 and ADX groups.
//!
//! BT and its relatives with a register as bit index reach memory beyond the operand: the index is signed and whole, and selects
//! the word as well (Intel SDM vol. 2, BT; vol. 1 section 3.7.5.1).

use iced_x86::{Instruction, Mnemonic, Register};

use super::host::{Host, HostWide};
use super::operand::{Int, Kind, by_wide_size, field, kind, reg, size};
use crate::block::Lowering;
use crate::cpu::{Cpu, ZERO, rflags};
use crate::flags::StatusFlags;
use crate::mmu::GENERAL;
use crate::op::{Cursor, Handler, Op, Outcome, Trap, attempt};

/// What happens to the selected bit.
trait BitOperation {
    const STORES: bool;
    /// The word after the operation on the bits in `mask`.
    fn apply(word: u64, mask: u64) -> u64;
}

macro_rules! bit_operations {
    ($($name:ident, $stores:literal, |$word:ident, $mask:ident| $e:expr;)*) => {
        $(
            struct $name;

            impl BitOperation for $name {
                const STORES: bool = $stores;

                #[inline(always)]
                fn apply($word: u64, $mask: u64) -> u64 {
                    $e
                }
            }
        )*
    };
}

bit_operations! {
    Bt, false, |word, _mask| word;
    Bts, true, |word, mask| word | mask;
    Btr, true, |word, mask| word & !mask;
    Btc, true, |word, mask| word ^ mask;
}

/// The bit index: a register or the immediate.
#[inline(always)]
fn bit_index<T: Int, const REG: bool>(cpu: &Cpu, op: &Op) -> u64 {
    if REG { T::read_reg(cpu, op.b).sign_extended() } else { op.imm }
}

extern "sysv64-unwind" fn bit_reg<B: BitOperation, T: Int, const REG: bool>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let mask = 1 << (bit_index::<T, REG>(cpu, &op) & (u64::from(T::BITS) - 1));
    let word = T::read_reg(cpu, op.a).into_u64();
    if B::STORES {
        T::write_reg(cpu, op.a, T::from_u64(B::apply(word, mask)));
    }
    cpu.status_flags = cpu.status_flags.with_carry(word & mask != 0);
    op.next(cpu)
}

extern "sysv64-unwind" fn bit_mem<B: BitOperation, T: Int, const REG: bool, const LOCK: bool>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let index = bit_index::<T, REG>(cpu, &op);
    let va = if REG { bit_string::<T>(cpu, &op, index, B::STORES) } else { cpu.ea::<GENERAL>(&op, T::SIZE, B::STORES) };
    let va = attempt!(cpu, op, va);
    let mask = 1 << (index & (u64::from(T::BITS) - 1));
    let word = if LOCK {
        attempt!(cpu, op, cpu.atomic_update::<T>(va, move |word| T::from_u64(B::apply(word.into_u64(), mask)))).into_u64()
    } else if B::STORES {
        let word = attempt!(cpu, op, cpu.load_for_write::<T>(va)).into_u64();
        attempt!(cpu, op, cpu.store(va, T::from_u64(B::apply(word, mask))));
        word
    } else {
        attempt!(cpu, op, cpu.load::<T>(va)).into_u64()
    };
    cpu.status_flags = cpu.status_flags.with_carry(word & mask != 0);
    op.next(cpu)
}

/// Linear address of the word of a bit string that holds bit `index`.
#[inline(always)]
fn bit_string<T: Int>(cpu: &mut Cpu, op: &Op, index: u64, write: bool) -> Result<u64, Trap> {
    let words = index as i64 >> T::BITS.trailing_zeros();
    let offset = cpu.displaced_address(op, op.disp.wrapping_add(words.wrapping_mul(T::SIZE as i64)));
    cpu.linear(usize::from(op.seg), offset, T::SIZE, write)
}

/// Result and flags of an operation with one source.
trait Scan {
    /// For a source of zero the whole destination stays, also its upper half with 32-bit operands.
    const KEEPS: bool;
    fn apply<T: HostWide>(source: T) -> (T, StatusFlags);
}

struct Bsf;

impl Scan for Bsf {
    const KEEPS: bool = true;

    #[inline(always)]
    fn apply<T: HostWide>(source: T) -> (T, StatusFlags) {
        T::bsf(source)
    }
}

struct Bsr;

impl Scan for Bsr {
    const KEEPS: bool = true;

    #[inline(always)]
    fn apply<T: HostWide>(source: T) -> (T, StatusFlags) {
        T::bsr(source)
    }
}

struct Tzcnt;

impl Scan for Tzcnt {
    const KEEPS: bool = false;

    #[inline(always)]
    fn apply<T: HostWide>(source: T) -> (T, StatusFlags) {
        counted::<T>(source.into_u64().trailing_zeros().min(T::BITS), source)
    }
}

struct Lzcnt;

impl Scan for Lzcnt {
    const KEEPS: bool = false;

    #[inline(always)]
    fn apply<T: HostWide>(source: T) -> (T, StatusFlags) {
        counted::<T>(source.into_u64().leading_zeros() - (64 - T::BITS), source)
    }
}

/// TZCNT and LZCNT: CF for a zero source, ZF for a zero result.
fn counted<T: Int>(count: u32, source: T) -> (T, StatusFlags) {
    let flags = StatusFlags::default().with_carry(source == T::default()).with_zero(count == 0);
    (T::from_u64(u64::from(count)), flags)
}

struct Popcnt;

impl Scan for Popcnt {
    const KEEPS: bool = false;

    #[inline(always)]
    fn apply<T: HostWide>(source: T) -> (T, StatusFlags) {
        let count = source.into_u64().count_ones();
        (T::from_u64(u64::from(count)), StatusFlags::default().with_zero(count == 0))
    }
}

#[inline(always)]
fn finish_scan<S: Scan, T: HostWide>(cpu: &mut Cpu, op: Cursor, source: T) -> Outcome {
    let (result, flags) = S::apply(source);
    if !S::KEEPS || source != T::default() {
        T::write_reg(cpu, op.a, result);
    }
    cpu.status_flags = flags;
    op.next(cpu)
}

extern "sysv64-unwind" fn scan_reg<S: Scan, T: HostWide>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let source = T::read_reg(cpu, op.b);
    finish_scan::<S, T>(cpu, op, source)
}

extern "sysv64-unwind" fn scan_mem<S: Scan, T: HostWide>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, T::SIZE, false));
    let source = attempt!(cpu, op, cpu.load::<T>(va));
    finish_scan::<S, T>(cpu, op, source)
}

/// Operations of 32 or 64 bits with one source in a register or memory (`x`) and perhaps one in a register (`y`). `y` is CL's
/// whole register where it is a count or control.
trait Extended {
    fn apply<T: Host>(cpu: &mut Cpu, op: &Op, x: T, y: T) -> T;
}

macro_rules! extended {
    ($($name:ident, |$cpu:ident, $op:ident, $x:ident, $y:ident| $e:expr;)*) => {
        $(
            struct $name;

            impl Extended for $name {
                #[inline(always)]
                fn apply<T: Host>($cpu: &mut Cpu, $op: &Op, $x: T, $y: T) -> T {
                    $e
                }
            }
        )*
    };
}

extended! {
    Andn, |cpu, _op, x, y| logic(cpu, x.into_u64() & !y.into_u64(), false);
    Blsi, |cpu, _op, x, _y| logic(cpu, x.into_u64() & x.into_u64().wrapping_neg(), x != T::default());
    Blsmsk, |cpu, _op, x, _y| logic(cpu, x.into_u64() ^ x.into_u64().wrapping_sub(1), x == T::default());
    Blsr, |cpu, _op, x, _y| logic(cpu, x.into_u64() & x.into_u64().wrapping_sub(1), x == T::default());
    Bextr, |cpu, _op, x, y| {
        let (start, length) = (y.into_u64() as u8, (y.into_u64() >> 8) as u8);
        let shifted = x.into_u64().checked_shr(u32::from(start)).unwrap_or(0);
        logic(cpu, shifted & low_bits(u32::from(length)), false)
    };
    Bzhi, |cpu, _op, x, y| {
        let index = u32::from(y.into_u64() as u8);
        logic(cpu, x.into_u64() & low_bits(index), index > T::BITS - 1)
    };
    Pdep, |_cpu, _op, x, y| T::from_u64(deposit(y.into_u64(), x.into_u64()));
    Pext, |_cpu, _op, x, y| T::from_u64(extract(y.into_u64(), x.into_u64()));
    Rorx, |_cpu, op, x, _y| {
        let count = op.imm as u32 & (T::BITS - 1);
        T::from_u64(x.into_u64() >> count | if count == 0 { 0 } else { x.into_u64() << (T::BITS - count) })
    };
    Sarx, |_cpu, _op, x, y| T::from_u64((x.sign_extended() as i64 >> (y.into_u64() as u32 & (T::BITS - 1))) as u64);
    Shlx, |_cpu, _op, x, y| T::from_u64(x.into_u64() << (y.into_u64() as u32 & (T::BITS - 1)));
    Shrx, |_cpu, _op, x, y| T::from_u64(x.into_u64() >> (y.into_u64() as u32 & (T::BITS - 1)));
    Mulx, |cpu, op, x, _y| {
        let (low, high, _) = T::mul(T::get(cpu, reg::RDX), x);
        T::write_reg(cpu, op.b, low);
        high
    };
    Adcx, |cpu, _op, x, y| add_with(cpu, x, y, rflags::CF);
    Adox, |cpu, _op, x, y| add_with(cpu, x, y, rflags::OF);
}

/// The result of a BMI operation on bits; SF and ZF follow it, OF is clear.
#[inline(always)]
fn logic<T: Host>(cpu: &mut Cpu, result: u64, carry: bool) -> T {
    let result = T::from_u64(result);
    cpu.status_flags = T::and(result, result).1.with_carry(carry);
    result
}

/// A mask of the lowest `count` bits.
fn low_bits(count: u32) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

/// PDEP: the low bits of `source` go to the places that `mask` marks.
fn deposit(source: u64, mask: u64) -> u64 {
    let (mut source, mut mask, mut result) = (source, mask, 0);
    while mask != 0 {
        let place = mask & mask.wrapping_neg();
        if source & 1 != 0 {
            result |= place;
        }
        source >>= 1;
        mask ^= place;
    }
    result
}

/// PEXT: the bits of `source` that `mask` marks become the low bits.
fn extract(source: u64, mask: u64) -> u64 {
    let (mut mask, mut result, mut at) = (mask, 0, 0);
    while mask != 0 {
        let place = mask & mask.wrapping_neg();
        if source & place != 0 {
            result |= 1 << at;
        }
        at += 1;
        mask ^= place;
    }
    result
}

/// ADCX and ADOX: the sum with one flag as carry in and out; the others stay.
fn add_with<T: Host>(cpu: &mut Cpu, x: T, y: T, flag: u64) -> T {
    let status = cpu.status();
    let (sum, flags) = T::adc(y, x, StatusFlags::default().with_carry(status & flag != 0));
    cpu.set_status(status & !flag | if flags.carry() { flag } else { 0 });
    sum
}

/// `a` is the destination, `aux` the register of `y` (32 for none), `b` the second destination of MULX.
extern "sysv64-unwind" fn extended_reg<E: Extended, T: Host>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let (x, y) = (T::read_reg(cpu, op.size), T::read_reg(cpu, op.aux as u8));
    let result = E::apply(cpu, &op, x, y);
    T::write_reg(cpu, op.a, result);
    op.next(cpu)
}

extern "sysv64-unwind" fn extended_mem<E: Extended, T: Host>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, T::SIZE, false));
    let x = attempt!(cpu, op, cpu.load::<T>(va));
    let y = T::read_reg(cpu, op.aux as u8);
    let result = E::apply(cpu, &op, x, y);
    T::write_reg(cpu, op.a, result);
    op.next(cpu)
}

/// Lowers the instructions of this module.
pub(super) fn lower(_low: &Lowering, insn: &Instruction, op: &mut Op) -> usize {
    op.run = match insn.mnemonic() {
        Mnemonic::Bt => bit::<Bt>(insn, op),
        Mnemonic::Bts => bit::<Bts>(insn, op),
        Mnemonic::Btr => bit::<Btr>(insn, op),
        Mnemonic::Btc => bit::<Btc>(insn, op),
        Mnemonic::Bsf => scan::<Bsf>(insn, op),
        Mnemonic::Bsr => scan::<Bsr>(insn, op),
        Mnemonic::Tzcnt => scan::<Tzcnt>(insn, op),
        Mnemonic::Lzcnt => scan::<Lzcnt>(insn, op),
        Mnemonic::Popcnt => scan::<Popcnt>(insn, op),
        // Which operand is x, and which y.
        Mnemonic::Andn => extended::<Andn>(insn, op, 2, Some(1)),
        Mnemonic::Blsi => extended::<Blsi>(insn, op, 1, None),
        Mnemonic::Blsmsk => extended::<Blsmsk>(insn, op, 1, None),
        Mnemonic::Blsr => extended::<Blsr>(insn, op, 1, None),
        Mnemonic::Bextr => extended::<Bextr>(insn, op, 1, Some(2)),
        Mnemonic::Bzhi => extended::<Bzhi>(insn, op, 1, Some(2)),
        Mnemonic::Pdep => extended::<Pdep>(insn, op, 2, Some(1)),
        Mnemonic::Pext => extended::<Pext>(insn, op, 2, Some(1)),
        Mnemonic::Rorx => {
            op.imm = insn.immediate(2);
            extended::<Rorx>(insn, op, 1, None)
        }
        Mnemonic::Sarx => extended::<Sarx>(insn, op, 1, Some(2)),
        Mnemonic::Shlx => extended::<Shlx>(insn, op, 1, Some(2)),
        Mnemonic::Shrx => extended::<Shrx>(insn, op, 1, Some(2)),
        Mnemonic::Mulx => {
            op.b = field(insn.op1_register());
            extended::<Mulx>(insn, op, 2, None)
        }
        Mnemonic::Adcx => extended::<Adcx>(insn, op, 1, Some(0)),
        Mnemonic::Adox => extended::<Adox>(insn, op, 1, Some(0)),
        _ => return 0,
    };
    1
}

fn bit<B: BitOperation>(insn: &Instruction, op: &mut Op) -> Handler {
    let size = size(insn, 0);
    let by_reg = kind(insn, 1) == Kind::Reg;
    if by_reg {
        op.b = field(insn.op1_register());
    } else {
        op.imm = insn.immediate(1);
    }
    if kind(insn, 0) == Kind::Reg {
        op.a = field(insn.op0_register());
        return by_wide_size!(size, T => if by_reg { bit_reg::<B, T, true> as Handler } else { bit_reg::<B, T, false> });
    }
    let locked = insn.has_lock_prefix();
    by_wide_size!(size, T => match (by_reg, locked) {
        (true, true) => bit_mem::<B, T, true, true> as Handler,
        (true, false) => bit_mem::<B, T, true, false>,
        (false, true) => bit_mem::<B, T, false, true>,
        (false, false) => bit_mem::<B, T, false, false>,
    })
}

fn scan<S: Scan>(insn: &Instruction, op: &mut Op) -> Handler {
    let size = size(insn, 0);
    op.a = field(insn.op0_register());
    if kind(insn, 1) == Kind::Reg {
        op.b = field(insn.op1_register());
        by_wide_size!(size, T => scan_reg::<S, T>)
    } else {
        by_wide_size!(size, T => scan_mem::<S, T>)
    }
}

fn extended<E: Extended>(insn: &Instruction, op: &mut Op, x: u32, y: Option<u32>) -> Handler {
    let wide = size(insn, 0) == 8;
    op.a = field(insn.op0_register());
    let control = y.map_or(Register::None, |y| insn.op_register(y));
    op.aux = if control == Register::None { ZERO as u16 } else { u16::from(field(control)) };
    if kind(insn, x) == Kind::Reg {
        op.size = field(insn.op_register(x));
        if wide { extended_reg::<E, u64> } else { extended_reg::<E, u32> }
    } else if wide {
        extended_mem::<E, u64>
    } else {
        extended_mem::<E, u32>
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deposit_and_extract_are_inverse_under_the_mask() {
        let mask = 0xff00_f0f0_1234_8001;
        assert_eq!(deposit(0b1011, 0b1101_0010), 0b1000_0010 | 0b1_0000);
        assert_eq!(extract(0b1001_0010, 0b1101_0010), 0b1011);
        for source in [0, 1, 0x5555_5555_5555_5555, u64::MAX] {
            assert_eq!(deposit(extract(source, mask), mask), source & mask);
        }
    }
}
