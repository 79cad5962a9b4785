//! The stack: PUSH POP PUSHA POPA PUSHF POPF ENTER LEAVE, and what calls and returns need of it.
//!
//! In 64-bit code the stack is flat and RSP whole; elsewhere SS.B says whether SP or ESP is used, and SS has base and limit.
//! Nothing changes before the last access that can fault.

use iced_x86::{Code, Instruction, Mnemonic};

use super::memory;
use super::operand::{Int, Kind, by_wide_size, field, kind, reg, size};
use crate::block::Lowering;
use crate::cpu::{Cpu, SS, Width, access, rflags};
use crate::mmu::GENERAL;
use crate::op::{Cursor, Flow, Handler, Op, Outcome, Slow, Trap, attempt, slow};

/// Pushes in 64-bit code, if the TLB knows the stack.
#[inline(always)]
pub(super) fn push_hit<T: Int>(cpu: &mut Cpu, value: T) -> Option<()> {
    let top = cpu.regs[reg::RSP].wrapping_sub(T::SIZE);
    memory::store_at(cpu, top, value)?;
    cpu.regs[reg::RSP] = top;
    Some(())
}

/// Bits of RSP that address the stack outside 64-bit code.
fn stack_mask(cpu: &Cpu) -> u64 {
    if cpu.width == Width::Bits64 {
        u64::MAX
    } else if cpu.seg[SS].access & access::DB != 0 {
        0xffff_ffff
    } else {
        0xffff
    }
}

/// Sets the part of RSP that addresses the stack.
fn set_pointer(cpu: &mut Cpu, value: u64) {
    let mask = stack_mask(cpu);
    cpu.regs[reg::RSP] = cpu.regs[reg::RSP] & !mask | value & mask;
}

/// Pushes in code of any width.
pub(super) fn push<T: Int>(cpu: &mut Cpu, value: T) -> Result<(), Trap> {
    let top = cpu.regs[reg::RSP].wrapping_sub(T::SIZE);
    store_at(cpu, top, value)?;
    set_pointer(cpu, top);
    Ok(())
}

/// Loads the value on top of the stack in code of any width.
pub(super) fn peek<T: Int>(cpu: &mut Cpu) -> Result<T, Trap> {
    load_at(cpu, cpu.regs[reg::RSP])
}

/// Removes bytes from the stack in code of any width.
pub(super) fn discard(cpu: &mut Cpu, bytes: u64) {
    let top = cpu.regs[reg::RSP].wrapping_add(bytes);
    set_pointer(cpu, top);
}

fn load_at<T: Int>(cpu: &mut Cpu, pointer: u64) -> Result<T, Trap> {
    let va = cpu.linear(SS, pointer & stack_mask(cpu), T::SIZE, false)?;
    cpu.load(va)
}

fn store_at<T: Int>(cpu: &mut Cpu, pointer: u64, value: T) -> Result<(), Trap> {
    let va = cpu.linear(SS, pointer & stack_mask(cpu), T::SIZE, true)?;
    cpu.store(va, value)
}

extern "sysv64-unwind" fn push_reg<T: Int, const LONG: bool>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let value = T::read_reg(cpu, op.a);
    if !LONG {
        attempt!(cpu, op, push(cpu, value));
    } else if push_hit(cpu, value).is_none() {
        return push_reg::<T, false>(cpu, op);
    }
    op.next(cpu)
}

extern "sysv64-unwind" fn push_imm<T: Int, const LONG: bool>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let value = T::from_u64(op.imm);
    if !LONG {
        attempt!(cpu, op, push(cpu, value));
    } else if push_hit(cpu, value).is_none() {
        return push_imm::<T, false>(cpu, op);
    }
    op.next(cpu)
}

extern "sysv64-unwind" fn push_mem<T: Int>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, T::SIZE, false));
    let value = attempt!(cpu, op, cpu.load::<T>(va));
    attempt!(cpu, op, push(cpu, value));
    op.next(cpu)
}

extern "sysv64-unwind" fn pop_reg<T: Int, const LONG: bool>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    // POP RSP: the loaded value wins, so the pointer moves first.
    let value = if LONG {
        let top = cpu.regs[reg::RSP];
        let Some(value) = memory::load_at::<T>(cpu, top) else { return pop_reg::<T, false>(cpu, op) };
        cpu.regs[reg::RSP] = top.wrapping_add(T::SIZE);
        value
    } else {
        let value = attempt!(cpu, op, peek::<T>(cpu));
        discard(cpu, T::SIZE);
        value
    };
    T::write_reg(cpu, op.a, value);
    op.next(cpu)
}

/// POP to memory: an address with RSP as its base is computed after RSP has moved.
extern "sysv64-unwind" fn pop_mem<T: Int>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let before = cpu.regs[reg::RSP];
    let value = attempt!(cpu, op, peek::<T>(cpu));
    discard(cpu, T::SIZE);
    let stored = match cpu.ea::<GENERAL>(&op, T::SIZE, true) {
        Ok(va) => cpu.store(va, value),
        Err(trap) => Err(trap),
    };
    if let Err(trap) = stored {
        cpu.regs[reg::RSP] = before;
        return op.trap(cpu, trap);
    }
    op.next(cpu)
}

/// PUSHA and PUSHAD; `size` is the operand size.
struct PushAll;

impl Slow for PushAll {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let size = u64::from(op.size);
        let top = cpu.regs[reg::RSP];
        // From the last one down: a fault at the far end changes nothing in registers, and memory may be partly written.
        for register in 0..8u64 {
            let pointer = top.wrapping_sub(size * (register + 1));
            let value = cpu.regs[register as usize];
            if size == 2 { store_at(cpu, pointer, value as u16)? } else { store_at(cpu, pointer, value as u32)? }
        }
        set_pointer(cpu, top.wrapping_sub(8 * size));
        Ok(Flow::Next)
    }
}

/// POPA and POPAD; `size` is the operand size. The slot of (E)SP is skipped.
struct PopAll;

impl Slow for PopAll {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let size = u64::from(op.size);
        let top = cpu.regs[reg::RSP];
        let mut values = [0; 8];
        for (slot, value) in values.iter_mut().rev().enumerate() {
            let pointer = top.wrapping_add(size * slot as u64);
            *value = if size == 2 { u64::from(load_at::<u16>(cpu, pointer)?) } else { u64::from(load_at::<u32>(cpu, pointer)?) };
        }
        for (register, value) in values.into_iter().enumerate() {
            if register == reg::RSP {
                continue;
            }
            if size == 2 { u16::set(cpu, register, value as u16) } else { u32::set(cpu, register, value as u32) }
        }
        set_pointer(cpu, top.wrapping_add(8 * size));
        Ok(Flow::Next)
    }
}

/// In virtual-8086 mode PUSHF and POPF need IOPL 3 (there are no virtual-mode extensions here).
fn check_v86(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.v86() && cpu.rflags & rflags::IOPL != rflags::IOPL { Err(cpu.gp()) } else { Ok(()) }
}

/// PUSHF, PUSHFD, PUSHFQ; `size` is the operand size.
struct PushFlags;

impl Slow for PushFlags {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        check_v86(cpu)?;
        let image = cpu.flags() & !(rflags::VM | rflags::RF);
        match op.size {
            2 => push(cpu, image as u16)?,
            4 => push(cpu, image as u32)?,
            _ => push(cpu, image)?,
        }
        Ok(Flow::Next)
    }
}

/// POPF, POPFD, POPFQ; `size` is the operand size. Intel SDM vol. 2, POPF, table 4-15.
struct PopFlags;

impl Slow for PopFlags {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        check_v86(cpu)?;
        let image = match op.size {
            2 => u64::from(peek::<u16>(cpu)?),
            4 => u64::from(peek::<u32>(cpu)?),
            _ => peek::<u64>(cpu)?,
        };
        let old = cpu.flags();
        let iopl = (old & rflags::IOPL) >> 12;
        let mut writable = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
        if u64::from(cpu.cpl) <= iopl {
            writable |= rflags::IF;
        }
        if cpu.cpl == 0 {
            writable |= rflags::IOPL;
        }
        if op.size > 2 {
            writable |= rflags::AC | rflags::ID;
        }
        let cleared = if op.size > 2 { rflags::RF } else { 0 };
        discard(cpu, u64::from(op.size));
        cpu.set_flags(old & !writable & !cleared | image & writable);
        cpu.update_step();
        // TF and IF take effect at the next block.
        Ok(if (old ^ cpu.rflags) & (rflags::TF | rflags::IF) != 0 { Flow::Leave } else { Flow::Next })
    }
}

/// ENTER; `imm` is the size of the frame, `aux` the nesting level, `size` the operand size. Intel SDM vol. 2, ENTER.
struct Enter;

impl Slow for Enter {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        match op.size {
            2 => enter::<u16>(cpu, op)?,
            4 => enter::<u32>(cpu, op)?,
            _ => enter::<u64>(cpu, op)?,
        }
        Ok(Flow::Next)
    }
}

fn enter<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let level = u64::from(op.aux & 31);
    let frame_base = cpu.regs[reg::RBP];
    let mut top = cpu.regs[reg::RSP].wrapping_sub(T::SIZE);
    store_at(cpu, top, T::from_u64(frame_base))?;
    let frame = top;
    for nested in 1..level {
        let link = load_at::<T>(cpu, frame_base.wrapping_sub(nested * T::SIZE))?;
        top = top.wrapping_sub(T::SIZE);
        store_at(cpu, top, link)?;
    }
    if level > 0 {
        top = top.wrapping_sub(T::SIZE);
        store_at(cpu, top, T::from_u64(frame))?;
    }
    top = top.wrapping_sub(op.imm);
    // The new top must be writable, or the fault is ENTER's.
    let va = cpu.linear(SS, top & stack_mask(cpu), T::SIZE, true)?;
    cpu.load_for_write::<T>(va)?;
    let frame = cpu.regs[reg::RBP] & !stack_mask(cpu) | frame & stack_mask(cpu);
    T::set(cpu, reg::RBP, T::from_u64(frame));
    set_pointer(cpu, top);
    Ok(())
}

extern "sysv64-unwind" fn leave<T: Int, const LONG: bool>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let frame = cpu.regs[reg::RBP];
    let top = frame.wrapping_add(T::SIZE);
    let value = if LONG {
        let Some(value) = memory::load_at::<T>(cpu, frame) else { return leave::<T, false>(cpu, op) };
        cpu.regs[reg::RSP] = top;
        value
    } else {
        let value = attempt!(cpu, op, load_at::<T>(cpu, frame));
        set_pointer(cpu, top);
        value
    };
    T::set(cpu, reg::RBP, value);
    op.next(cpu)
}

/// Lowers the instructions of this module; pushes and pops of segment registers are not among them.
pub(super) fn lower(low: &Lowering, insn: &Instruction, op: &mut Op) -> usize {
    let long = low.width == Width::Bits64;
    macro_rules! by_stack {
        ($size:expr, $handler:ident) => {
            by_wide_size!($size, T => if long { $handler::<T, true> as Handler } else { $handler::<T, false> as Handler })
        };
    }
    let memory = kind(insn, 0) == Kind::Mem;
    if !memory {
        op.seg = SS as u8;
    }
    match insn.mnemonic() {
        Mnemonic::Push => {
            op.run = match kind(insn, 0) {
                Kind::Reg => {
                    op.a = field(insn.op0_register());
                    by_stack!(size(insn, 0), push_reg)
                }
                Kind::Mem => by_wide_size!(size(insn, 0), T => push_mem::<T> as Handler),
                Kind::Imm => {
                    op.imm = insn.immediate(0);
                    by_stack!(pushed_size(insn), push_imm)
                }
                Kind::Other => return 0,
            }
        }
        Mnemonic::Pop => {
            op.run = match kind(insn, 0) {
                Kind::Reg => {
                    op.a = field(insn.op0_register());
                    by_stack!(size(insn, 0), pop_reg)
                }
                Kind::Mem => by_wide_size!(size(insn, 0), T => pop_mem::<T> as Handler),
                _ => return 0,
            }
        }
        Mnemonic::Leave => op.run = by_stack!(pushed_size(insn), leave),
        Mnemonic::Enter => {
            op.imm = insn.immediate(0);
            op.aux = insn.immediate(1) as u16;
            op.size = pushed_size(insn) as u8;
            op.run = slow::<Enter>;
        }
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => {
            op.size = pushed_size(insn) as u8;
            op.run = slow::<PushFlags>;
        }
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => {
            op.size = pushed_size(insn) as u8;
            op.run = slow::<PopFlags>;
        }
        Mnemonic::Pusha | Mnemonic::Pushad => {
            op.size = if insn.code() == Code::Pushaw { 2 } else { 4 };
            op.run = slow::<PushAll>;
        }
        Mnemonic::Popa | Mnemonic::Popad => {
            op.size = if insn.code() == Code::Popaw { 2 } else { 4 };
            op.run = slow::<PopAll>;
        }
        _ => return 0,
    }
    1
}

/// Size of the stack slot of an instruction without register or memory operand.
fn pushed_size(insn: &Instruction) -> usize {
    match insn.code() {
        Code::Push_imm16 | Code::Pushw_imm8 | Code::Pushfw | Code::Popfw | Code::Leavew | Code::Enterw_imm16_imm8 => 2,
        Code::Pushd_imm32 | Code::Pushd_imm8 | Code::Pushfd | Code::Popfd | Code::Leaved | Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    }
}
