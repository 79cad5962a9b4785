//! Moves and logic on XMM registers, written out because they are most of what programs do with them.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::Lowering;
use super::access::{address16, by_ea, check_sse, load_word, load16, store_word, store16};
use super::xmm::{self, __m128i, halves, low, vector};
use crate::cpu::{Cpu, REG_MASK};
use crate::op::{Cursor, Handler, Op, Outcome, attempt};

/// Ways to combine the first operand with the second.
mod combine {
    pub const MOVE: u8 = 0;
    pub const AND: u8 = 1;
    pub const AND_NOT: u8 = 2;
    pub const OR: u8 = 3;
    pub const XOR: u8 = 4;
    /// Low half of the second operand, zero above.
    pub const LOW_ZEROED: u8 = 5;
    /// Low half replaced.
    pub const LOW: u8 = 6;
    /// Low 32 bits replaced.
    pub const LOW_32: u8 = 7;
    /// Low half of the second operand becomes the high half.
    pub const LOW_TO_HIGH: u8 = 8;
    /// High half of the second operand becomes the low half.
    pub const HIGH_TO_LOW: u8 = 9;
}

#[inline(always)]
fn combined<const C: u8>(a: __m128i, b: __m128i) -> __m128i {
    match C {
        combine::AND => xmm::and(a, b),
        combine::AND_NOT => xmm::and_not(a, b),
        combine::OR => xmm::or(a, b),
        combine::XOR => xmm::xor(a, b),
        combine::LOW_ZEROED => xmm::low_zeroed(b),
        combine::LOW => xmm::low_replaced(a, b),
        combine::LOW_32 => xmm::low_32_replaced(a, b),
        combine::LOW_TO_HIGH => xmm::low_low(a, b),
        combine::HIGH_TO_LOW => xmm::high_high(b, a),
        _ => b,
    }
}

/// xmm, xmm
extern "sysv64-unwind" fn registers<const C: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_sse(cpu));
    let value = combined::<C>(cpu.fx.x(op.a), cpu.fx.x(op.b));
    cpu.fx.set_x(op.a, value);
    op.next(cpu)
}

/// xmm, m128
extern "sysv64-unwind" fn memory16<const C: u8, const ALIGNED: bool, const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_sse(cpu));
    let va = attempt!(cpu, op, address16::<ALIGNED, K>(cpu, &op, false));
    let value = attempt!(cpu, op, load16(cpu, va));
    let value = combined::<C>(cpu.fx.x(op.a), value);
    cpu.fx.set_x(op.a, value);
    op.next(cpu)
}

/// xmm, m32 or m64: what it loads is the low part of an otherwise zero second operand.
extern "sysv64-unwind" fn memory_word<const C: u8, const SIZE: u64, const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_sse(cpu));
    let va = attempt!(cpu, op, cpu.ea::<K>(&op, SIZE, false));
    let value = attempt!(cpu, op, load_word(cpu, va, SIZE));
    let value = combined::<C>(cpu.fx.x(op.a), vector(value, 0));
    cpu.fx.set_x(op.a, value);
    op.next(cpu)
}

/// m128, xmm
extern "sysv64-unwind" fn store_all<const ALIGNED: bool, const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_sse(cpu));
    let va = attempt!(cpu, op, address16::<ALIGNED, K>(cpu, &op, true));
    attempt!(cpu, op, store16(cpu, va, halves(cpu.fx.x(op.b))));
    op.next(cpu)
}

/// m32 or m64, low or high part of xmm
extern "sysv64-unwind" fn store_part<const HIGH: bool, const SIZE: u64, const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_sse(cpu));
    let va = attempt!(cpu, op, cpu.ea::<K>(&op, SIZE, true));
    let value = halves(cpu.fx.x(op.b))[usize::from(HIGH)];
    attempt!(cpu, op, store_word(cpu, va, SIZE, value));
    op.next(cpu)
}

/// xmm, r32 or r64
extern "sysv64-unwind" fn from_general<const MASK: u64>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_sse(cpu));
    let value = cpu.regs[usize::from(op.b) & REG_MASK] & MASK;
    cpu.fx.set_x(op.a, vector(value, 0));
    op.next(cpu)
}

/// r32 or r64, xmm
extern "sysv64-unwind" fn to_general<const MASK: u64>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_sse(cpu));
    cpu.regs[usize::from(op.a) & REG_MASK] = low(cpu.fx.x(op.b)) & MASK;
    op.next(cpu)
}

/// PMOVMSKB r, xmm
extern "sysv64-unwind" fn byte_signs(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_sse(cpu));
    cpu.regs[usize::from(op.a) & REG_MASK] = u64::from(xmm::byte_signs(cpu.fx.x(op.b)));
    op.next(cpu)
}

/// MOVNTI m32 or m64, r. Needs no SSE state.
extern "sysv64-unwind" fn store_general<const SIZE: u64, const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let va = attempt!(cpu, op, cpu.ea::<K>(&op, SIZE, true));
    attempt!(cpu, op, store_word(cpu, va, SIZE, cpu.regs[usize::from(op.b) & REG_MASK]));
    op.next(cpu)
}

/// Takes the instruction if it is one of this file's.
pub(super) fn lower(l: &Lowering, insn: &Instruction, op: &mut Op) -> bool {
    use Code::*;
    let ea = l.ea;
    let loads = insn.op1_kind() == OpKind::Memory;
    let stores = insn.op0_kind() == OpKind::Memory;
    macro_rules! two {
        // xmm, xmm/m128
        ($c:ident, $aligned:literal) => {
            if loads { by_ea!(ea, memory16, combine::$c, $aligned) } else { registers::<{ combine::$c }> }
        };
    }
    let run: Handler = match insn.code() {
        Movaps_xmm_xmmm128 | Movapd_xmm_xmmm128 | Movdqa_xmm_xmmm128 | Movntdqa_xmm_m128 => two!(MOVE, true),
        Movups_xmm_xmmm128 | Movupd_xmm_xmmm128 | Movdqu_xmm_xmmm128 | Lddqu_xmm_m128 => two!(MOVE, false),
        Movaps_xmmm128_xmm | Movapd_xmmm128_xmm | Movdqa_xmmm128_xmm | Movntps_m128_xmm | Movntpd_m128_xmm | Movntdq_m128_xmm if stores => {
            by_ea!(ea, store_all, true)
        }
        Movups_xmmm128_xmm | Movupd_xmmm128_xmm | Movdqu_xmmm128_xmm if stores => by_ea!(ea, store_all, false),
        Movaps_xmmm128_xmm | Movapd_xmmm128_xmm | Movdqa_xmmm128_xmm | Movups_xmmm128_xmm | Movupd_xmmm128_xmm | Movdqu_xmmm128_xmm => {
            registers::<{ combine::MOVE }>
        }
        Andps_xmm_xmmm128 | Andpd_xmm_xmmm128 | Pand_xmm_xmmm128 => two!(AND, true),
        Andnps_xmm_xmmm128 | Andnpd_xmm_xmmm128 | Pandn_xmm_xmmm128 => two!(AND_NOT, true),
        Orps_xmm_xmmm128 | Orpd_xmm_xmmm128 | Por_xmm_xmmm128 => two!(OR, true),
        Xorps_xmm_xmmm128 | Xorpd_xmm_xmmm128 | Pxor_xmm_xmmm128 => two!(XOR, true),
        Punpcklqdq_xmm_xmmm128 | Unpcklpd_xmm_xmmm128 => two!(LOW_TO_HIGH, true),

        Movq_xmm_xmmm64 | Movsd_xmm_xmmm64 if loads => by_ea!(ea, memory_word, combine::MOVE, 8),
        Movss_xmm_xmmm32 if loads => by_ea!(ea, memory_word, combine::MOVE, 4),
        Movlps_xmm_m64 | Movlpd_xmm_m64 => by_ea!(ea, memory_word, combine::LOW, 8),
        Movhps_xmm_m64 | Movhpd_xmm_m64 => by_ea!(ea, memory_word, combine::LOW_TO_HIGH, 8),
        Movq_xmmm64_xmm | Movsd_xmmm64_xmm if stores => by_ea!(ea, store_part, false, 8),
        Movss_xmmm32_xmm if stores => by_ea!(ea, store_part, false, 4),
        Movlps_m64_xmm | Movlpd_m64_xmm => by_ea!(ea, store_part, false, 8),
        Movhps_m64_xmm | Movhpd_m64_xmm => by_ea!(ea, store_part, true, 8),
        Movq_xmm_xmmm64 | Movq_xmmm64_xmm => registers::<{ combine::LOW_ZEROED }>,
        Movsd_xmm_xmmm64 | Movsd_xmmm64_xmm => registers::<{ combine::LOW }>,
        Movss_xmm_xmmm32 | Movss_xmmm32_xmm => registers::<{ combine::LOW_32 }>,
        Movhlps_xmm_xmm => registers::<{ combine::HIGH_TO_LOW }>,
        Movlhps_xmm_xmm => registers::<{ combine::LOW_TO_HIGH }>,

        Movd_xmm_rm32 if loads => by_ea!(ea, memory_word, combine::MOVE, 4),
        Movq_xmm_rm64 if loads => by_ea!(ea, memory_word, combine::MOVE, 8),
        Movd_rm32_xmm if stores => by_ea!(ea, store_part, false, 4),
        Movq_rm64_xmm if stores => by_ea!(ea, store_part, false, 8),
        Movd_xmm_rm32 => from_general::<0xffff_ffff>,
        Movq_xmm_rm64 => from_general::<{ u64::MAX }>,
        Movd_rm32_xmm => to_general::<0xffff_ffff>,
        Movq_rm64_xmm => to_general::<{ u64::MAX }>,
        Pmovmskb_r32_xmm | Pmovmskb_r64_xmm => byte_signs,

        Movnti_m32_r32 => by_ea!(ea, store_general, 4),
        Movnti_m64_r64 => by_ea!(ea, store_general, 8),
        _ => return false,
    };
    op.run = run;
    op.a = register_number(insn.op0_register());
    op.b = register_number(insn.op1_register());
    true
}

/// Number of a register operand; 0 for what is not a register.
pub(super) fn register_number(register: Register) -> u8 {
    if register == Register::None { 0 } else { register.number() as u8 }
}
