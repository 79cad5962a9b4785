//! The host's own ALU instructions, with the flags they leave.
//!
//! Each function executes one instruction on values in host registers and returns the result and the arithmetic flags in
//! [`StatusFlags`]' layout. Where an instruction leaves flags alone (INC, rotates) or uses them (ADC, RCL), the old ones are
//! loaded first: SAHF for AH's five, and an addition to AL that overflows when it is 1 for OF.
#![allow(unsafe_code)] // Inline assembly without memory operands.

use std::arch::asm;

use super::operand::Int;
use crate::flags::StatusFlags;
use crate::mmu::Word;

/// An operand size for which the host has ALU instructions.
pub(super) trait Host: Int {
    /// Signed or unsigned sum.
    fn add(a: Self, b: Self) -> (Self, StatusFlags);
    /// Bitwise or.
    fn or(a: Self, b: Self) -> (Self, StatusFlags);
    /// Bitwise and.
    fn and(a: Self, b: Self) -> (Self, StatusFlags);
    /// Difference.
    fn sub(a: Self, b: Self) -> (Self, StatusFlags);
    /// Bitwise exclusive or.
    fn xor(a: Self, b: Self) -> (Self, StatusFlags);
    /// Sum with CF.
    fn adc(a: Self, b: Self, flags: StatusFlags) -> (Self, StatusFlags);
    /// Difference with borrow.
    fn sbb(a: Self, b: Self, flags: StatusFlags) -> (Self, StatusFlags);
    /// Increment; CF stays.
    fn inc(a: Self, flags: StatusFlags) -> (Self, StatusFlags);
    /// Decrement; CF stays.
    fn dec(a: Self, flags: StatusFlags) -> (Self, StatusFlags);
    /// Two's complement.
    fn neg(a: Self) -> (Self, StatusFlags);
    /// Left shift; the count is masked and not zero, as for the others below.
    fn shl(a: Self, count: u8, flags: StatusFlags) -> (Self, StatusFlags);
    /// Logical right shift.
    fn shr(a: Self, count: u8, flags: StatusFlags) -> (Self, StatusFlags);
    /// Arithmetic right shift.
    fn sar(a: Self, count: u8, flags: StatusFlags) -> (Self, StatusFlags);
    /// Left rotation.
    fn rol(a: Self, count: u8, flags: StatusFlags) -> (Self, StatusFlags);
    /// Right rotation.
    fn ror(a: Self, count: u8, flags: StatusFlags) -> (Self, StatusFlags);
    /// Left rotation through CF.
    fn rcl(a: Self, count: u8, flags: StatusFlags) -> (Self, StatusFlags);
    /// Right rotation through CF.
    fn rcr(a: Self, count: u8, flags: StatusFlags) -> (Self, StatusFlags);
    /// Low half, high half and flags of the unsigned product.
    fn mul(a: Self, b: Self) -> (Self, Self, StatusFlags);
    /// Low half, high half and flags of the signed product.
    fn imul(a: Self, b: Self) -> (Self, Self, StatusFlags);
}

/// Operand sizes of instructions without an 8-bit form.
pub(super) trait HostWide: Host {
    /// Left shift of `a`, filled from the top of `b`; the count is masked and not zero.
    fn shld(a: Self, b: Self, count: u8, flags: StatusFlags) -> (Self, StatusFlags);
    /// Right shift of `a`, filled from the bottom of `b`; the count is masked and not zero.
    fn shrd(a: Self, b: Self, count: u8, flags: StatusFlags) -> (Self, StatusFlags);
    /// Index of the lowest set bit of `source`.
    fn bsf(source: Self) -> (Self, StatusFlags);
    /// Index of the highest set bit of `source`.
    fn bsr(source: Self) -> (Self, StatusFlags);
}

macro_rules! binary {
    ($name:ident, $t:ty, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(a: $t, b: $t) -> ($t, StatusFlags) {
            let mut r = a;
            let flags: u16;
            // SAFETY: registers only.
            unsafe {
                asm!(
                    concat!(stringify!($name), " {r", $m, "}, {b", $m, "}"), "lahf", "seto al",
                    r = inout($class) r, b = in($class) b, lateout("ax") flags,
                    options(pure, nomem, nostack),
                );
            }
            (r, StatusFlags(flags))
        }
    };
}

macro_rules! binary_with_carry {
    ($name:ident, $t:ty, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(a: $t, b: $t, flags: StatusFlags) -> ($t, StatusFlags) {
            let (mut r, mut flags) = (a, flags.0);
            // SAFETY: registers only. SAHF takes CF from AH.
            unsafe {
                asm!(
                    "sahf", concat!(stringify!($name), " {r", $m, "}, {b", $m, "}"), "lahf", "seto al",
                    r = inout($class) r, b = in($class) b, inout("ax") flags,
                    options(pure, nomem, nostack),
                );
            }
            (r, StatusFlags(flags))
        }
    };
}

macro_rules! unary_with_carry {
    ($name:ident, $t:ty, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(a: $t, flags: StatusFlags) -> ($t, StatusFlags) {
            let (mut r, mut flags) = (a, flags.0);
            // SAFETY: registers only. SAHF sets CF, which the instruction leaves alone.
            unsafe {
                asm!(
                    "sahf", concat!(stringify!($name), " {r", $m, "}"), "lahf", "seto al",
                    r = inout($class) r, inout("ax") flags,
                    options(pure, nomem, nostack),
                );
            }
            (r, StatusFlags(flags))
        }
    };
}

macro_rules! shift {
    ($name:ident, $t:ty, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(a: $t, count: u8, flags: StatusFlags) -> ($t, StatusFlags) {
            let (mut r, mut flags) = (a, flags.0);
            // SAFETY: registers only. ADD sets OF and SAHF the others: rotates leave some alone and those through CF use it.
            unsafe {
                asm!(
                    "add al, 127", "sahf", concat!(stringify!($name), " {r", $m, "}, cl"), "lahf", "seto al",
                    r = inout($class) r, in("cl") count, inout("ax") flags,
                    options(pure, nomem, nostack),
                );
            }
            (r, StatusFlags(flags))
        }
    };
}

macro_rules! double_shift {
    ($name:ident, $t:ty, $m:literal) => {
        #[inline(always)]
        fn $name(a: $t, b: $t, count: u8, flags: StatusFlags) -> ($t, StatusFlags) {
            let (mut r, mut flags) = (a, flags.0);
            // SAFETY: registers only.
            unsafe {
                asm!(
                    "add al, 127", "sahf", concat!(stringify!($name), " {r", $m, "}, {b", $m, "}, cl"), "lahf", "seto al",
                    r = inout(reg) r, b = in(reg) b, in("cl") count, inout("ax") flags,
                    options(pure, nomem, nostack),
                );
            }
            (r, StatusFlags(flags))
        }
    };
}

macro_rules! scan {
    ($name:ident, $t:ty, $m:literal) => {
        #[inline(always)]
        fn $name(source: $t) -> ($t, StatusFlags) {
            let mut r: $t = 0;
            let flags: u16;
            // SAFETY: registers only. A zero source leaves the destination as it was or undefined; the caller ignores it then.
            unsafe {
                asm!(
                    concat!(stringify!($name), " {r", $m, "}, {s", $m, "}"), "lahf", "seto al",
                    r = inout(reg) r, s = in(reg) source, lateout("ax") flags,
                    options(pure, nomem, nostack),
                );
            }
            (r, StatusFlags(flags))
        }
    };
}

macro_rules! product {
    ($name:ident, $t:ty, $m:literal, $rax:literal) => {
        #[inline(always)]
        fn $name(a: $t, b: $t) -> ($t, $t, StatusFlags) {
            let (mut low, mut rax, high): ($t, u64, u64);
            (low, rax) = (b, a.into_u64());
            // SAFETY: registers only; MOV keeps the flags.
            unsafe {
                asm!(
                    concat!(stringify!($name), " {b", $m, "}"), concat!("mov {b", $m, "}, ", $rax), "lahf", "seto al",
                    b = inout(reg) low, inout("rax") rax, lateout("rdx") high,
                    options(pure, nomem, nostack),
                );
            }
            (low, high as $t, StatusFlags(rax as u16))
        }
    };
}

/// The product of bytes is in AX and not in two registers.
macro_rules! byte_product {
    ($name:ident) => {
        #[inline(always)]
        fn $name(a: u8, b: u8) -> (u8, u8, StatusFlags) {
            let mut flags = u16::from(a);
            let low: u16;
            // SAFETY: registers only; MOV keeps the flags.
            unsafe {
                asm!(
                    concat!(stringify!($name), " {b}"), "mov {r:x}, ax", "lahf", "seto al",
                    b = in(reg_byte) b, r = out(reg) low, inout("ax") flags,
                    options(pure, nomem, nostack),
                );
            }
            (low as u8, (low >> 8) as u8, StatusFlags(flags))
        }
    };
}

macro_rules! host {
    ($t:ty, $class:ident, $m:literal) => {
        binary!(add, $t, $class, $m);
        binary!(or, $t, $class, $m);
        binary!(and, $t, $class, $m);
        binary!(sub, $t, $class, $m);
        binary!(xor, $t, $class, $m);
        binary_with_carry!(adc, $t, $class, $m);
        binary_with_carry!(sbb, $t, $class, $m);
        unary_with_carry!(inc, $t, $class, $m);
        unary_with_carry!(dec, $t, $class, $m);
        shift!(shl, $t, $class, $m);
        shift!(shr, $t, $class, $m);
        shift!(sar, $t, $class, $m);
        shift!(rol, $t, $class, $m);
        shift!(ror, $t, $class, $m);
        shift!(rcl, $t, $class, $m);
        shift!(rcr, $t, $class, $m);

        #[inline(always)]
        fn neg(a: $t) -> ($t, StatusFlags) {
            Self::sub(0, a)
        }
    };
}

impl Host for u8 {
    host!(u8, reg_byte, "");
    byte_product!(mul);
    byte_product!(imul);
}

macro_rules! host_wide {
    ($t:ty, $m:literal, $rax:literal) => {
        impl Host for $t {
            host!($t, reg, $m);
            product!(mul, $t, $m, $rax);
            product!(imul, $t, $m, $rax);
        }

        impl HostWide for $t {
            double_shift!(shld, $t, $m);
            double_shift!(shrd, $t, $m);
            scan!(bsf, $t, $m);
            scan!(bsr, $t, $m);
        }
    };
}

host_wide!(u16, ":x", "ax");
host_wide!(u32, ":e", "eax");
host_wide!(u64, ":r", "rax");
