//! Whether SSE arithmetic was inexact, where the flags of the masked operation cannot tell.
//!
//! A masked overflow is always inexact, and a masked underflow that was flushed or lost bits is, too. An unmasked one is inexact
//! only if rounding lost something when the exponent has no bounds (IEEE 754-2008 section 7.6 leaves that to the handler; the
//! processor's PE shows it). The x87 unit has 15 bits of exponent and can round to 24 or 53 bits, so it knows.
#![allow(unsafe_code)] // x87 instructions.

use std::arch::asm;

use iced_x86::Mnemonic;

use super::area::{mxcsr, x87};
use super::xmm::{__m128i, halves};

/// Operations that may overflow or underflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Add,
    Subtract,
    Multiply,
    Divide,
    /// Double to single.
    Narrow,
}

/// Which lanes of the operands meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lanes {
    First,
    Vertical,
    /// Neighbours of the same operand.
    Horizontal,
    /// Vertical; the even ones subtract.
    Alternating,
}

/// What an instruction computes, if it may overflow or underflow; dot products are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Arithmetic {
    operation: Operation,
    lanes: Lanes,
    /// Operands (except of `Narrow`) and results are doubles.
    double: bool,
}

/// The instructions, in the order of their codes: an op has room for a small number only.
const INSTRUCTIONS: [(Mnemonic, Operation, Lanes, bool); 24] = {
    use Lanes::*;
    use Operation::*;
    [
        (Mnemonic::Addps, Add, Vertical, false),
        (Mnemonic::Addpd, Add, Vertical, true),
        (Mnemonic::Addss, Add, First, false),
        (Mnemonic::Addsd, Add, First, true),
        (Mnemonic::Subps, Subtract, Vertical, false),
        (Mnemonic::Subpd, Subtract, Vertical, true),
        (Mnemonic::Subss, Subtract, First, false),
        (Mnemonic::Subsd, Subtract, First, true),
        (Mnemonic::Mulps, Multiply, Vertical, false),
        (Mnemonic::Mulpd, Multiply, Vertical, true),
        (Mnemonic::Mulss, Multiply, First, false),
        (Mnemonic::Mulsd, Multiply, First, true),
        (Mnemonic::Divps, Divide, Vertical, false),
        (Mnemonic::Divpd, Divide, Vertical, true),
        (Mnemonic::Divss, Divide, First, false),
        (Mnemonic::Divsd, Divide, First, true),
        (Mnemonic::Haddps, Add, Horizontal, false),
        (Mnemonic::Haddpd, Add, Horizontal, true),
        (Mnemonic::Hsubps, Subtract, Horizontal, false),
        (Mnemonic::Hsubpd, Subtract, Horizontal, true),
        (Mnemonic::Addsubps, Add, Alternating, false),
        (Mnemonic::Addsubpd, Add, Alternating, true),
        (Mnemonic::Cvtsd2ss, Narrow, First, false),
        (Mnemonic::Cvtpd2ps, Narrow, Vertical, false),
    ]
};

/// Number by which [`is_inexact`] knows an instruction; what it does not know has one, too.
pub(super) fn number(mnemonic: Mnemonic) -> u16 {
    INSTRUCTIONS.iter().position(|&(known, ..)| known == mnemonic).unwrap_or(INSTRUCTIONS.len()) as u16
}

/// Number of instructions that neither overflow nor underflow.
pub(super) const OTHER: u16 = INSTRUCTIONS.len() as u16;

/// Whether an instruction on these operands under `control`, whose exception masks count, is inexact in any lane. `None` for
/// instructions without a number.
pub(super) fn is_inexact(number: u16, first: __m128i, second: __m128i, control: u32) -> Option<bool> {
    let &(_, operation, lanes, double) = INSTRUCTIONS.get(usize::from(number))?;
    let arithmetic = Arithmetic { operation, lanes, double };
    Some(arithmetic.pairs(first, second, control).into_iter().any(|(operation, a, b)| lane_is_inexact(operation, double, a, b, control)))
}

impl Arithmetic {
    /// The scalar operations that an instruction consists of.
    fn pairs(self, first: __m128i, second: __m128i, control: u32) -> Vec<(Operation, f64, f64)> {
        let wide = self.double || self.operation == Operation::Narrow;
        let b = elements(second, wide, control);
        let a = if self.operation == Operation::Narrow { b.clone() } else { elements(first, wide, control) };
        let operation = self.operation;
        match self.lanes {
            Lanes::First => vec![(operation, a[0], b[0])],
            Lanes::Vertical => a.iter().zip(&b).map(|(&a, &b)| (operation, a, b)).collect(),
            Lanes::Horizontal => a.chunks_exact(2).chain(b.chunks_exact(2)).map(|pair| (operation, pair[0], pair[1])).collect(),
            Lanes::Alternating => {
                (0..a.len()).map(|n| (if n % 2 == 0 { Operation::Subtract } else { Operation::Add }, a[n], b[n])).collect()
            }
        }
    }
}

/// The numbers in a register, as doubles (which is exact); denormal ones are zero if `control` says so.
fn elements(x: __m128i, double: bool, control: u32) -> Vec<f64> {
    let zeroes = control & mxcsr::DENORMALS_ARE_ZERO != 0;
    let halves = halves(x);
    if double {
        return halves.map(f64::from_bits).map(|v| if zeroes && v.is_subnormal() { 0.0 } else { v }).to_vec();
    }
    let single = |bits: u64| f32::from_bits(bits as u32);
    [single(halves[0]), single(halves[0] >> 32), single(halves[1]), single(halves[1] >> 32)]
        .map(|v| if zeroes && v.is_subnormal() { 0.0 } else { f64::from(v) })
        .to_vec()
}

/// Whether the processor sets PE for one operation with a result of this format.
fn lane_is_inexact(operation: Operation, double: bool, a: f64, b: f64, control: u32) -> bool {
    let (precision, largest, smallest) = if double { (53, 1023, -1022) } else { (24, 127, -126) };
    let (significand, exponent, inexact) = unbounded(operation, double, a, b, control);
    let unmasked = |flag: u32| control & flag << mxcsr::MASK_SHIFT == 0;
    if significand == 0 || exponent == INFINITE {
        inexact
    } else if exponent > largest {
        inexact || !unmasked(mxcsr::OVERFLOW)
    } else if exponent < smallest && !unmasked(mxcsr::UNDERFLOW) {
        // Bits of the significand that have no place in a denormal number.
        let lost = (64 - precision) + (smallest - exponent);
        inexact || control & mxcsr::FLUSH_TO_ZERO != 0 || lost >= 64 || significand << (64 - lost) != 0
    } else {
        inexact
    }
}

/// Exponent of infinities and of what is no number.
const INFINITE: i32 = 0x4000;

/// Significand (its highest bit stands for one), exponent and inexactness of a result rounded to the format's precision only.
fn unbounded(operation: Operation, double: bool, a: f64, b: f64, control: u32) -> (u64, i32, bool) {
    /// Precision control: 24 or 53 bits (Intel SDM vol. 1 section 8.1.5.2).
    const SINGLE: u16 = 0;
    const DOUBLE: u16 = 0x200;
    /// Distance of the rounding control in MXCSR and the x87 control word from bit 0.
    const ROUNDING: (u32, u32) = (13, 10);
    /// PE of the status word.
    const PRECISION: u16 = 0x20;
    let rounding = ((control >> ROUNDING.0 & 3) << ROUNDING.1) as u16;
    let word = x87::FLAGS | rounding | if double { DOUBLE } else { SINGLE };
    let b = match operation {
        Operation::Subtract => -b,
        // Adding zero rounds.
        Operation::Narrow => 0.0,
        _ => b,
    };
    let mut result = [0u64; 2];
    let status: u16;
    macro_rules! execute {
        ($instruction:literal) => {
            // SAFETY: reads and writes the locals it is given. All exceptions are masked, the stack is empty before and after it, and
            // the control word is put back.
            unsafe {
                asm!("fnclex", "fldcw word ptr [{word}]", "fld qword ptr [{a}]", concat!($instruction, " qword ptr [{b}]"), "fnstsw ax",
                    "fstp tbyte ptr [{result}]", "fnclex", "fldcw word ptr [{default}]",
                    word = in(reg) &word, a = in(reg) &a, b = in(reg) &b, result = in(reg) &mut result, default = in(reg) &x87::CONTROL_INIT,
                    out("ax") status, out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _,
                    out("st(6)") _, out("st(7)") _, options(nostack))
            }
        };
    }
    match operation {
        Operation::Multiply => execute!("fmul"),
        Operation::Divide => execute!("fdiv"),
        _ => execute!("fadd"),
    }
    let biased = (result[1] & 0x7fff) as i32;
    (result[0], if biased == 0x7fff { INFINITE } else { biased - 0x3fff }, status & PRECISION != 0)
}
