//! Near branches: JMP CALL RET Jcc LOOP JCXZ, and the jumps that were fused with the instruction before them.
//!
//! A branch checks its target before it changes any register: canonical in 64-bit code, else within the limit of CS; failing that
//! is #GP(0) at the branch (Intel SDM vol. 2, JMP, CALL, RET). A 16-bit operand size truncates the target.

use iced_x86::{Code, ConditionCode, FlowControl, Instruction, Mnemonic, OpKind};

use super::memory;
use super::operand::{Int, Kind, field, kind, reg};
use super::stack;
use crate::block::Lowering;
use crate::cpu::{CS, Cpu, RIP_BASE, SS, Width};
use crate::mmu::{GENERAL, Word};
use crate::op::{Cursor, Flow, Handler, Op, Outcome, Slow, Trap, attempt, slow};

/// What a branch's operand size and the code's width mean for its target and stack slot.
trait Mode {
    /// Integer of the operand size.
    type Address: Int;
    /// 64-bit code: flat stack, canonical targets.
    const LONG: bool;
}

/// 64-bit code.
struct Long;
/// 32-bit operands in 16-bit or 32-bit code.
struct Legacy32;
/// 16-bit operands in 16-bit or 32-bit code.
struct Legacy16;

impl Mode for Long {
    type Address = u64;
    const LONG: bool = true;
}

impl Mode for Legacy32 {
    type Address = u32;
    const LONG: bool = false;
}

impl Mode for Legacy16 {
    type Address = u16;
    const LONG: bool = false;
}

/// Chooses an expression with type `$m` being the mode of a branch.
macro_rules! by_mode {
    ($low:expr, $size:expr, $m:ident => $e:expr) => {
        if $low.width == Width::Bits64 {
            type $m = Long;
            $e
        } else if $size == 4 {
            type $m = Legacy32;
            $e
        } else {
            type $m = Legacy16;
            $e
        }
    };
}

#[inline(always)]
fn is_canonical(address: u64) -> bool {
    (address as i64) << 16 >> 16 == address as i64
}

/// Truncates a branch target to the operand size and checks it.
#[inline(always)]
fn check<M: Mode>(cpu: &mut Cpu, target: u64) -> Result<u64, Trap> {
    let target = M::Address::from_u64(target).into_u64();
    let reachable = if M::LONG { is_canonical(target) } else { target <= u64::from(cpu.seg[CS].limit) };
    if reachable { Ok(target) } else { Err(cpu.gp()) }
}

/// The target of a direct branch: `imm` is relative to the block's start.
#[inline(always)]
fn direct<M: Mode>(cpu: &mut Cpu, op: &Op) -> Result<u64, Trap> {
    let target = cpu.regs[RIP_BASE].wrapping_add(op.imm);
    check::<M>(cpu, target)
}

/// How a conditional jump was fused with the instruction before it, a constant of that one's handler.
pub(super) mod fusion {
    /// It was not.
    pub const NONE: u8 = 0;
    /// On the condition in `Op::aux`.
    pub const ANY: u8 = 1;
    /// JE.
    pub const EQUAL: u8 = 2;
    /// JNE.
    pub const NOT_EQUAL: u8 = 3;
}

/// The conditional jump that was fused with the instruction just executed.
#[inline(always)]
pub(super) extern "sysv64-unwind" fn fused<const FUSED: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let taken = match FUSED {
        fusion::EQUAL => cpu.status_flags.holds::<4>(),
        fusion::NOT_EQUAL => cpu.status_flags.holds::<5>(),
        _ => cpu.condition(op.aux as u8),
    };
    if !taken {
        return op.leave(cpu);
    }
    let target = cpu.regs[RIP_BASE].wrapping_add(((op.imm as i64) >> 32) as u64);
    if is_canonical(target) { op.jump(cpu, target) } else { split(cpu, op) }
}

/// The fused jump's target is not canonical: leaves before the jump, which will raise the exception when executed alone.
#[cold]
#[inline(never)]
extern "sysv64-unwind" fn split(cpu: &mut Cpu, op: Cursor) -> Outcome {
    cpu.rip = op.rip(cpu).wrapping_add(u64::from(op.size));
    cpu.instructions += u64::from(op.seq) - 1;
    Outcome::Done
}

/// Makes `op`, which is the first instruction, stand for the conditional jump after it as well, if there is one.
pub(super) fn fuse(insns: &[Instruction], op: &mut Op) -> u8 {
    let [first, jump, ..] = insns else { return fusion::NONE };
    if !jump.is_jcc_short_or_near() {
        return fusion::NONE;
    }
    let target = i64::from(op.start) + (first.len() + jump.len()) as i64 + displacement(jump);
    let Ok(target) = i32::try_from(target) else { return fusion::NONE };
    op.imm = u64::from(op.imm as u32) | u64::from(target as u32) << 32;
    op.aux = u16::from(condition_code(jump));
    op.size = first.len() as u8;
    match jump.condition_code() {
        ConditionCode::e => fusion::EQUAL,
        ConditionCode::ne => fusion::NOT_EQUAL,
        _ => fusion::ANY,
    }
}

/// The low four bits of the opcode of Jcc, SETcc and CMOVcc.
pub(crate) fn condition_code(insn: &Instruction) -> u8 {
    match insn.condition_code() {
        ConditionCode::o => 0,
        ConditionCode::no => 1,
        ConditionCode::b => 2,
        ConditionCode::ae => 3,
        ConditionCode::e => 4,
        ConditionCode::ne => 5,
        ConditionCode::be => 6,
        ConditionCode::a => 7,
        ConditionCode::s => 8,
        ConditionCode::ns => 9,
        ConditionCode::p => 10,
        ConditionCode::np => 11,
        ConditionCode::l => 12,
        ConditionCode::ge => 13,
        ConditionCode::le => 14,
        _ => 15,
    }
}

/// How far a direct branch goes from the end of the instruction.
fn displacement(insn: &Instruction) -> i64 {
    let distance = insn.near_branch_target().wrapping_sub(insn.next_ip());
    match insn.op0_kind() {
        OpKind::NearBranch16 => i64::from(distance as i16),
        OpKind::NearBranch32 => i64::from(distance as i32),
        _ => distance as i64,
    }
}

/// Jcc; `CC` is the condition, or [`BY_OP`] when the op holds it.
extern "sysv64-unwind" fn jcc<M: Mode, const CC: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let taken = if CC == BY_OP { cpu.condition(op.aux as u8) } else { cpu.status_flags.holds::<CC>() };
    if !taken {
        return op.leave(cpu);
    }
    let target = attempt!(cpu, op, direct::<M>(cpu, &op));
    op.jump(cpu, target)
}

/// No condition code: see [`jcc`].
const BY_OP: u8 = 16;

/// Jcc in 64-bit code by condition code.
static LONG_JCC: [Handler; 16] = [
    jcc::<Long, 0>,
    jcc::<Long, 1>,
    jcc::<Long, 2>,
    jcc::<Long, 3>,
    jcc::<Long, 4>,
    jcc::<Long, 5>,
    jcc::<Long, 6>,
    jcc::<Long, 7>,
    jcc::<Long, 8>,
    jcc::<Long, 9>,
    jcc::<Long, 10>,
    jcc::<Long, 11>,
    jcc::<Long, 12>,
    jcc::<Long, 13>,
    jcc::<Long, 14>,
    jcc::<Long, 15>,
];

extern "sysv64-unwind" fn jmp<M: Mode>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let target = attempt!(cpu, op, direct::<M>(cpu, &op));
    op.jump(cpu, target)
}

extern "sysv64-unwind" fn jmp_reg<M: Mode>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let target = M::Address::read_reg(cpu, op.a).into_u64();
    let target = attempt!(cpu, op, check::<M>(cpu, target));
    op.jump(cpu, target)
}

extern "sysv64-unwind" fn jmp_mem<M: Mode>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let target = attempt!(cpu, op, from_memory::<M>(cpu, &op));
    let target = attempt!(cpu, op, check::<M>(cpu, target));
    op.jump(cpu, target)
}

/// Target of an indirect branch through memory, not checked.
#[inline(always)]
fn from_memory<M: Mode>(cpu: &mut Cpu, op: &Op) -> Result<u64, Trap> {
    let va = cpu.ea::<GENERAL>(op, M::Address::SIZE, false)?;
    Ok(cpu.load::<M::Address>(va)?.into_u64())
}

/// Pushes the return address and goes to the target. The return address is in memory before the target is checked, but RSP
/// moves after that, as on processors.
#[inline(always)]
fn call_to<M: Mode>(cpu: &mut Cpu, op: Cursor, target: u64) -> Outcome {
    if M::LONG && is_canonical(target) && stack::push_hit(cpu, op.next_rip(cpu)).is_some() {
        return op.jump(cpu, target);
    }
    call_slowly::<M>(cpu, op, target)
}

/// The same where the TLB does not know the stack, or the target is wrong, or the code is not 64-bit.
#[inline(never)]
fn call_slowly<M: Mode>(cpu: &mut Cpu, op: Cursor, target: u64) -> Outcome {
    let back = M::Address::from_u64(op.next_rip(cpu));
    let before = cpu.regs[reg::RSP];
    attempt!(cpu, op, stack::push(cpu, back));
    match check::<M>(cpu, target) {
        Ok(target) => op.jump(cpu, target),
        Err(trap) => {
            cpu.regs[reg::RSP] = before;
            op.trap(cpu, trap)
        }
    }
}

extern "sysv64-unwind" fn call<M: Mode>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let target = cpu.regs[RIP_BASE].wrapping_add(op.imm);
    call_to::<M>(cpu, op, target)
}

extern "sysv64-unwind" fn call_reg<M: Mode>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let target = M::Address::read_reg(cpu, op.a).into_u64();
    call_to::<M>(cpu, op, target)
}

extern "sysv64-unwind" fn call_mem<M: Mode>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let target = attempt!(cpu, op, from_memory::<M>(cpu, &op));
    call_to::<M>(cpu, op, target)
}

/// RET in 64-bit code; `imm` more bytes are removed from the stack.
extern "sysv64-unwind" fn ret_long(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let top = cpu.regs[reg::RSP];
    match memory::load_at::<u64>(cpu, top) {
        Some(target) if is_canonical(target) => {
            cpu.regs[reg::RSP] = top.wrapping_add(8).wrapping_add(op.imm);
            op.jump(cpu, target)
        }
        _ => ret::<Long>(cpu, op),
    }
}

/// RET in any code.
extern "sysv64-unwind" fn ret<M: Mode>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let target = attempt!(cpu, op, stack::peek::<M::Address>(cpu)).into_u64();
    let target = attempt!(cpu, op, check::<M>(cpu, target));
    stack::discard(cpu, M::Address::SIZE + op.imm);
    op.jump(cpu, target)
}

/// LOOP, LOOPE, LOOPNE, JCXZ: `aux` says which, `size` is the size of the counter, `b` the operand size.
struct CountedJump;

mod counted {
    pub const LOOP: u16 = 0;
    pub const LOOPE: u16 = 1;
    pub const LOOPNE: u16 = 2;
    pub const JCXZ: u16 = 3;
}

impl Slow for CountedJump {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let rcx = cpu.regs[reg::RCX];
        let mask = u64::MAX >> (64 - 8 * u32::from(op.size));
        let counter = if op.aux == counted::JCXZ { rcx & mask } else { rcx.wrapping_sub(1) & mask };
        let taken = match op.aux {
            counted::LOOP => counter != 0,
            counted::LOOPE => counter != 0 && cpu.condition(4),
            counted::LOOPNE => counter != 0 && cpu.condition(5),
            _ => counter == 0,
        };
        let target = if !taken {
            cpu.next_rip
        } else if cpu.width == Width::Bits64 {
            direct::<Long>(cpu, op)?
        } else if op.b == 4 {
            direct::<Legacy32>(cpu, op)?
        } else {
            direct::<Legacy16>(cpu, op)?
        };
        if op.aux != counted::JCXZ {
            match op.size {
                2 => u16::set(cpu, reg::RCX, counter as u16),
                4 => u32::set(cpu, reg::RCX, counter as u32),
                _ => cpu.regs[reg::RCX] = counter,
            }
        }
        cpu.rip = target;
        Ok(Flow::Jumped)
    }
}

/// Lowers the instructions of this module.
pub(super) fn lower(low: &Lowering, insn: &Instruction, op: &mut Op) -> usize {
    match insn.flow_control() {
        FlowControl::ConditionalBranch if insn.is_jcc_short_or_near() => {
            relative(insn, op);
            op.aux = u16::from(condition_code(insn));
            op.run = match low.width {
                Width::Bits64 => LONG_JCC[usize::from(op.aux & 15)],
                _ => by_mode!(low, operand_size(insn), M => jcc::<M, BY_OP>),
            };
        }
        FlowControl::ConditionalBranch => return counted_jump(insn, op),
        FlowControl::UnconditionalBranch if insn.is_jmp_short_or_near() => {
            relative(insn, op);
            op.run = by_mode!(low, operand_size(insn), M => jmp::<M>);
        }
        FlowControl::Call if insn.is_call_near() => {
            relative(insn, op);
            op.run = by_mode!(low, operand_size(insn), M => call::<M>);
        }
        FlowControl::IndirectBranch if insn.is_jmp_near_indirect() => {
            op.run = if kind(insn, 0) == Kind::Reg {
                op.a = field(insn.op0_register());
                by_mode!(low, operand_size(insn), M => jmp_reg::<M> as Handler)
            } else {
                by_mode!(low, operand_size(insn), M => jmp_mem::<M> as Handler)
            };
        }
        FlowControl::IndirectCall if insn.is_call_near_indirect() => {
            op.run = if kind(insn, 0) == Kind::Reg {
                op.a = field(insn.op0_register());
                by_mode!(low, operand_size(insn), M => call_reg::<M> as Handler)
            } else {
                by_mode!(low, operand_size(insn), M => call_mem::<M> as Handler)
            };
        }
        FlowControl::Return if insn.mnemonic() == Mnemonic::Ret => {
            op.imm = if insn.op_count() == 0 { 0 } else { insn.immediate(0) };
            op.seg = SS as u8;
            let size = if matches!(insn.code(), Code::Retnw | Code::Retnw_imm16) { 2 } else { 4 };
            op.run = if low.width == Width::Bits64 { ret_long } else { by_mode!(low, size, M => ret::<M>) };
        }
        _ => return 0,
    }
    1
}

/// Operand size of a near branch outside 64-bit code.
fn operand_size(insn: &Instruction) -> usize {
    match insn.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::Register => insn.op0_register().size(),
        _ => insn.memory_size().size(),
    }
}

/// Puts the branch's target, relative to the block's start, into `imm`.
fn relative(insn: &Instruction, op: &mut Op) {
    op.imm = (i64::from(op.start) + insn.len() as i64 + displacement(insn)) as u64;
}

fn counted_jump(insn: &Instruction, op: &mut Op) -> usize {
    op.aux = match insn.mnemonic() {
        Mnemonic::Loop => counted::LOOP,
        Mnemonic::Loope => counted::LOOPE,
        Mnemonic::Loopne => counted::LOOPNE,
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => counted::JCXZ,
        _ => return 0,
    };
    relative(insn, op);
    op.b = operand_size(insn) as u8;
    op.size = counter_size(insn.code());
    op.run = slow::<CountedJump>;
    1
}

/// Bytes of the counter, which are the address size. (`Instruction::op_code` knows them too, but see `native::thunk::Class`.)
fn counter_size(code: Code) -> u8 {
    use Code::*;
    match code {
        Loop_rel8_16_CX | Loope_rel8_16_CX | Loopne_rel8_16_CX | Jcxz_rel8_16 => 2,
        Loop_rel8_32_CX | Loope_rel8_32_CX | Loopne_rel8_32_CX | Jcxz_rel8_32 => 2,
        Loop_rel8_16_RCX | Loope_rel8_16_RCX | Loopne_rel8_16_RCX | Jrcxz_rel8_16 => 8,
        Loop_rel8_64_RCX | Loope_rel8_64_RCX | Loopne_rel8_64_RCX | Jrcxz_rel8_64 => 8,
        _ => 4,
    }
}
