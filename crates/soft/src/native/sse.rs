//! SSE to SSE4.2, AES, PCLMULQDQ, SHA and MMX instructions that thunks execute, and their SIMD floating-point exceptions.
//!
//! The usual shape, XMM register and XMM register or memory, has handlers of its own; everything else (results in general
//! registers or flags, lengths in RAX and RDX, MMX operands) goes through one that is told what to do by a [`Plan`].
//!
//! Thunks run with all exceptions masked. What would have been an unmasked exception is found from the flags afterwards, while
//! the destination still has its old value (Intel SDM vol. 1 section 11.5).

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::access::{address16, by_ea, check_mmx, check_sse, load_word, load16, store_word};
use super::area::mxcsr;
use super::inexact;
use super::moves::register_number;
use super::thunk::{Class, Io, Shape, Thunk};
use super::xmm::{__m128i, low, vector};
use super::{Lowering, Natives};
use crate::cpu::{Cpu, REG_MASK, cr4, vector as exception};
use crate::op::{Cursor, Op, Outcome, Trap, attempt};

/// RAX, RCX, RDX as indices of `Cpu::regs`.
const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;

/// Executes a thunk that may raise SIMD exceptions. The guest's MXCSR gets its flags; an error means #XM or #UD.
#[inline(always)]
fn call_floating(cpu: &mut Cpu, thunk: Thunk, first: __m128i, second: __m128i, io: &mut Io) -> Result<__m128i, Trap> {
    let before = cpu.fx.mxcsr;
    if before & mxcsr::MASKS != mxcsr::MASKS {
        return call_unmasked(cpu, thunk, first, second, io, inexact::OTHER);
    }
    io.mxcsr = before;
    let result = thunk.call(first, second, io);
    cpu.fx.mxcsr = io.mxcsr;
    Ok(result)
}

/// The same when the guest has unmasked some exceptions. `arithmetic` is the instruction's [`inexact::number`].
#[cold]
#[inline(never)]
fn call_unmasked(cpu: &mut Cpu, thunk: Thunk, first: __m128i, second: __m128i, io: &mut Io, arithmetic: u16) -> Result<__m128i, Trap> {
    let before = cpu.fx.mxcsr;
    let unmasked = !(before >> mxcsr::MASK_SHIFT) & mxcsr::FLAGS;
    let quiet = before & !mxcsr::FLAGS | mxcsr::MASKS;
    let mut raised = 0;
    let mut control = quiet;
    if unmasked & mxcsr::UNDERFLOW != 0 {
        // Unmasked underflow is any tiny result, masked underflow only an inexact one; flushing to zero shows the tiny ones.
        let mut probe = *io;
        probe.mxcsr = quiet | mxcsr::FLUSH_TO_ZERO;
        thunk.call(first, second, &mut probe);
        raised = probe.mxcsr & mxcsr::UNDERFLOW;
        control &= !mxcsr::FLUSH_TO_ZERO;
    }
    io.mxcsr = control;
    let result = thunk.call(first, second, io);
    raised |= io.mxcsr & mxcsr::FLAGS;
    if raised & unmasked & mxcsr::BEFORE != 0 {
        // The operation was not begun, so it cannot have overflowed or been inexact.
        raised &= mxcsr::BEFORE;
    } else if raised & unmasked & (mxcsr::OVERFLOW | mxcsr::UNDERFLOW) != 0
        && let Some(inexact) = inexact::is_inexact(arithmetic, first, second, before)
    {
        raised = raised & !mxcsr::PRECISION | if inexact { mxcsr::PRECISION } else { 0 };
    }
    cpu.fx.mxcsr = before | raised;
    if raised & unmasked == 0 {
        return Ok(result);
    }
    Err(if cpu.cr4 & cr4::OSXMMEXCPT != 0 { cpu.raise(exception::XM) } else { cpu.ud() })
}

/// The op's thunk on two operands.
#[inline(always)]
fn computed<const FLOATING: bool>(cpu: &mut Cpu, op: &Op, first: __m128i, second: __m128i) -> Result<__m128i, Trap> {
    let thunk = Thunk::of(op);
    if !FLOATING {
        return Ok(thunk.call_plain(first, second));
    }
    let before = cpu.fx.mxcsr;
    if before & mxcsr::MASKS != mxcsr::MASKS {
        return call_unmasked(cpu, thunk, first, second, &mut Io::new(), op.aux);
    }
    let (result, after) = thunk.call_floating(first, second, before);
    cpu.fx.mxcsr = after;
    Ok(result)
}

#[inline(always)]
fn vector_instruction<const FLOATING: bool>(cpu: &mut Cpu, op: &Op, second: __m128i) -> Result<(), Trap> {
    let result = computed::<FLOATING>(cpu, op, cpu.fx.x(op.a), second)?;
    cpu.fx.set_x(op.a, result);
    Ok(())
}

/// xmm, xmm
extern "sysv64-unwind" fn registers<const FLOATING: bool>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_sse(cpu));
    attempt!(cpu, op, vector_instruction::<FLOATING>(cpu, &op, cpu.fx.x(op.b)));
    op.next(cpu)
}

/// xmm, m128
extern "sysv64-unwind" fn memory16<const FLOATING: bool, const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_sse(cpu));
    let va = attempt!(cpu, op, address16::<true, K>(cpu, &op, false));
    let second = attempt!(cpu, op, load16(cpu, va));
    attempt!(cpu, op, vector_instruction::<FLOATING>(cpu, &op, second));
    op.next(cpu)
}

/// xmm, m16, m32 or m64
extern "sysv64-unwind" fn memory_word<const FLOATING: bool, const SIZE: u64, const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_sse(cpu));
    let va = attempt!(cpu, op, cpu.ea::<K>(&op, SIZE, false));
    let second = attempt!(cpu, op, load_word(cpu, va, SIZE));
    attempt!(cpu, op, vector_instruction::<FLOATING>(cpu, &op, vector(second, 0)));
    op.next(cpu)
}

/// (U)COMISS and (U)COMISD: xmm, second operand, and the flags say how they compare.
#[inline(always)]
fn compare(cpu: &mut Cpu, op: &Op, second: __m128i) -> Result<(), Trap> {
    let mut io = Io::new();
    call_floating(cpu, Thunk::of(op), cpu.fx.x(op.a), second, &mut io)?;
    cpu.status_flags = io.status();
    Ok(())
}

/// compare xmm, xmm
extern "sysv64-unwind" fn compare_registers(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_sse(cpu));
    attempt!(cpu, op, compare(cpu, &op, cpu.fx.x(op.b)));
    op.next(cpu)
}

/// compare xmm, m32 or m64
extern "sysv64-unwind" fn compare_memory<const SIZE: u64, const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_sse(cpu));
    let va = attempt!(cpu, op, cpu.ea::<K>(&op, SIZE, false));
    let second = attempt!(cpu, op, load_word(cpu, va, SIZE));
    attempt!(cpu, op, compare(cpu, &op, vector(second, 0)));
    op.next(cpu)
}

/// r32 or r64, xmm
extern "sysv64-unwind" fn to_general<const FLOATING: bool>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_sse(cpu));
    let mut io = Io::new();
    let (thunk, second) = (Thunk::of(&op), cpu.fx.x(op.b));
    if FLOATING {
        attempt!(cpu, op, call_floating(cpu, thunk, second, second, &mut io));
    } else {
        thunk.call(second, second, &mut io);
    }
    cpu.regs[usize::from(op.a) & REG_MASK] = io.gpr;
    op.next(cpu)
}

/// xmm, r32 or r64
extern "sysv64-unwind" fn from_general<const FLOATING: bool>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_sse(cpu));
    let mut io = Io::new();
    io.gpr = cpu.regs[usize::from(op.b) & REG_MASK];
    let (thunk, first) = (Thunk::of(&op), cpu.fx.x(op.a));
    let result =
        if FLOATING { attempt!(cpu, op, call_floating(cpu, thunk, first, first, &mut io)) } else { thunk.call(first, first, &mut io) };
    cpu.fx.set_x(op.a, result);
    op.next(cpu)
}

/// What [`any`] has to do, in `Op::aux`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan(u16);

impl Plan {
    const FIRST_XMM: u16 = 1;
    const FIRST_MM: u16 = 1 << 1;
    const FIRST_GPR: u16 = 1 << 2;
    const SECOND_XMM: u16 = 1 << 3;
    const SECOND_MM: u16 = 1 << 4;
    const SECOND_GPR: u16 = 1 << 5;
    /// The second operand is in memory, `Op::size` bytes.
    const LOAD: u16 = 1 << 6;
    /// The first operand is in memory, `Op::size` bytes.
    const STORE: u16 = 1 << 7;
    const FLOATING: u16 = 1 << 8;
    const FLAGS: u16 = 1 << 9;
    const MASK: u16 = 1 << 10;
    const LENGTHS: u16 = 1 << 11;
    const INDEX: u16 = 1 << 12;
    /// The first operand is not written.
    const COMPARE: u16 = 1 << 13;
    /// 16 bytes in memory need not be aligned.
    const UNALIGNED: u16 = 1 << 14;

    fn new(insn: &Instruction, shape: Shape) -> Plan {
        let place = |class: Class, shift: u16| match class {
            Class::None => 0,
            Class::Xmm => 1 << shift,
            // CVTPI2PS and CVTPI2PD from memory leave the x87 registers alone.
            Class::Mm if insn.op1_kind() == OpKind::Memory && shape.first == Class::Xmm => 0,
            Class::Mm => 2 << shift,
            Class::Gpr32 | Class::Gpr64 => 4 << shift,
        };
        let string = shape.flags && shape.immediate;
        let mut bits = place(shape.first, 0) | place(shape.second, 3);
        for (is, bit) in [
            (insn.op1_kind() == OpKind::Memory, Plan::LOAD),
            (insn.op0_kind() == OpKind::Memory, Plan::STORE),
            (shape.floating, Plan::FLOATING),
            (shape.flags, Plan::FLAGS),
            (shape.mask, Plan::MASK),
            (shape.lengths, Plan::LENGTHS),
            (shape.index, Plan::INDEX),
            (shape.flags && !string, Plan::COMPARE),
            (string, Plan::UNALIGNED),
        ] {
            if is {
                bits |= bit;
            }
        }
        Plan(bits)
    }

    fn has(self, bits: u16) -> bool {
        self.0 & bits != 0
    }
}

/// Any other shape.
extern "sysv64-unwind" fn any<const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, execute::<K>(cpu, &op));
    op.next(cpu)
}

fn execute<const K: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let plan = Plan(op.aux);
    if plan.has(Plan::FIRST_XMM | Plan::SECOND_XMM) {
        check_sse(cpu)?;
    }
    let mmx = plan.has(Plan::FIRST_MM | Plan::SECOND_MM);
    if mmx {
        check_mmx(cpu)?;
    }
    let size = u64::from(op.size);
    let store = if plan.has(Plan::STORE) { Some(cpu.ea::<K>(op, size, true)?) } else { None };
    let mut io = Io::new();
    let mut second = vector(0, 0);
    if plan.has(Plan::LOAD) {
        second = match (size, plan.has(Plan::UNALIGNED)) {
            (16, true) => {
                let va = address16::<false, K>(cpu, op, false)?;
                load16(cpu, va)?
            }
            (16, false) => {
                let va = address16::<true, K>(cpu, op, false)?;
                load16(cpu, va)?
            }
            _ => {
                let va = cpu.ea::<K>(op, size, false)?;
                vector(load_word(cpu, va, size)?, 0)
            }
        };
        io.gpr = low(second);
        io.mm[1] = low(second);
    }
    if mmx {
        cpu.fx.enter_mmx();
        io.mm[0] = cpu.fx.mm(op.a);
    }
    if !plan.has(Plan::LOAD) {
        if plan.has(Plan::SECOND_XMM) {
            second = cpu.fx.x(op.b);
        } else if plan.has(Plan::SECOND_MM) {
            io.mm[1] = cpu.fx.mm(op.b);
        } else if plan.has(Plan::SECOND_GPR) {
            io.gpr = cpu.regs[usize::from(op.b) & REG_MASK];
        }
    }
    if plan.has(Plan::LENGTHS) {
        io.gpr = cpu.regs[RAX];
        io.rdx = cpu.regs[RDX];
    }

    let first = cpu.fx.x(op.a);
    let thunk = Thunk::of(op);
    let result = if plan.has(Plan::MASK) {
        thunk.call_masked(cpu.fx.x(0), first, second, &mut io)
    } else if plan.has(Plan::FLOATING) {
        call_floating(cpu, thunk, first, second, &mut io)?
    } else {
        thunk.call(first, second, &mut io)
    };

    if let Some(va) = store {
        return store_word(cpu, va, size, io.gpr);
    }
    if plan.has(Plan::FLAGS) {
        cpu.status_flags = io.status();
    }
    if plan.has(Plan::INDEX) {
        cpu.regs[RCX] = io.rcx;
    } else if plan.has(Plan::FLAGS) && !plan.has(Plan::COMPARE) {
        // PCMPxSTRM.
        cpu.fx.set_x(0, result);
    } else if plan.has(Plan::COMPARE) {
        // Only flags.
    } else if plan.has(Plan::FIRST_XMM) {
        cpu.fx.set_x(op.a, result);
    } else if plan.has(Plan::FIRST_MM) {
        cpu.fx.set_mm(op.a, io.mm[0]);
    } else if plan.has(Plan::FIRST_GPR) {
        cpu.regs[usize::from(op.a) & REG_MASK] = io.gpr;
    }
    Ok(())
}

/// Takes the instruction if a vector thunk can execute it.
pub(super) fn lower(natives: &mut Natives, l: &Lowering, insn: &Instruction, op: &mut Op) -> bool {
    let Some(shape) = Shape::of(insn) else { return false };
    let loads = insn.op1_kind() == OpKind::Memory;
    let mut immediate = if shape.immediate { insn.immediate8() } else { 0 };
    if insn.mnemonic() == Mnemonic::Insertps && loads {
        // Which element of the source is inserted (bits 7:6) counts for registers only.
        immediate &= 0x3f;
    }
    let Some(thunk) = natives.vector_thunk(insn.code(), immediate, shape) else { return false };
    let size = if loads || insn.op0_kind() == OpKind::Memory { insn.memory_size().size() } else { 0 };
    let plain = shape.first == Class::Xmm && matches!(shape.second, Class::Xmm | Class::None) && !shape.flags && !shape.mask;
    let ea = l.ea;
    op.run = match (plain, loads, shape.floating, size) {
        (true, false, true, _) => registers::<true>,
        (true, false, false, _) => registers::<false>,
        (true, true, true, 16) => by_ea!(ea, memory16, true),
        (true, true, true, 8) => by_ea!(ea, memory_word, true, 8),
        (true, true, true, 4) => by_ea!(ea, memory_word, true, 4),
        (true, true, false, 16) => by_ea!(ea, memory16, false),
        (true, true, false, 8) => by_ea!(ea, memory_word, false, 8),
        (true, true, false, 4) => by_ea!(ea, memory_word, false, 4),
        (true, true, false, 2) => by_ea!(ea, memory_word, false, 2),
        (false, false, true, _) if shape.flags => compare_registers,
        (false, true, true, 8) if shape.flags => by_ea!(ea, compare_memory, 8),
        (false, true, true, 4) if shape.flags => by_ea!(ea, compare_memory, 4),
        (false, false, true, 0) if shape.first.is_gpr() && shape.second == Class::Xmm => to_general::<true>,
        (false, false, false, 0) if shape.first.is_gpr() && shape.second == Class::Xmm => to_general::<false>,
        (false, false, true, _) if shape.second.is_gpr() && shape.first == Class::Xmm => from_general::<true>,
        (false, false, false, _) if shape.second.is_gpr() && shape.first == Class::Xmm => from_general::<false>,
        (false, ..) => by_ea!(ea, any),
        _ => return false,
    };
    op.imm = thunk.address();
    op.size = size as u8;
    op.aux = if plain { inexact::number(insn.mnemonic()) } else { Plan::new(insn, shape).0 };
    op.a = register_number(insn.op0_register());
    op.b = register_number(insn.op1_register());
    true
}
