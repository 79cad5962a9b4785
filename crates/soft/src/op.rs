//! Decoded instructions and how they are executed.
//!
//! A block is an array of [`Op`]s that ends with one that leaves the block. A [`Handler`] does one operation and then calls
//! [`Cursor::next`], which calls the following handler in tail position. With optimisation that is a jump; without, it is a call
//! whose depth the block's length bounds (and `Cpu::stack_floor`, where translated blocks go on by themselves). A handler that
//! cannot go on returns an [`Outcome`] by one of the other methods of [`Cursor`], which also make `rip` and the instruction count
//! exact.
#![allow(unsafe_code)] // A cursor walks over the ops of a block by pointer.

use crate::cpu::{Cpu, RIP_BASE, ZERO};

/// Executes one op and what follows it in the block. The calling convention is one that the translator can make code for.
pub(crate) type Handler = extern "sysv64-unwind" fn(&mut Cpu, Cursor) -> Outcome;

/// How execution of a block ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Outcome {
    /// `rip` points at the next instruction.
    Done = 0,
    /// `rip` points at an instruction that could not be completed; `Cpu::trap` says why.
    Trapped,
}

/// An instruction could not be completed; [`Cpu::trap`] says why. A token: it says that the reason has been recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(crate) struct Trap(pub(crate) ());

/// What a system instruction wants next, see [`slow`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    /// Go on with the next op of the block.
    Next,
    /// Leave the block; the instruction is complete. For everything that changes modes, translation, or interrupt state.
    Leave,
    /// Leave the block; `rip` has been set.
    Jumped,
}

/// One decoded operation. Which fields mean something depends on the handler.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Op {
    /// Executes it.
    pub run: Handler,
    /// Immediate operand, branch displacement, or pointer.
    pub imm: u64,
    /// Displacement of the memory operand, sign extended; for RIP-relative ones relative to the block's start.
    pub disp: i64,
    /// First (destination) operand register.
    pub a: u8,
    /// Second operand register.
    pub b: u8,
    /// Base register of the memory operand, as an index into `Cpu::regs`.
    pub base: u8,
    /// Index register of the memory operand, as an index into `Cpu::regs`.
    pub index: u8,
    /// Left shift of the index register, 0 to 3.
    pub scale: u8,
    /// Where `Cpu::regs` holds the segment base (`ZERO`, `FS_BASE` or `GS_BASE`); flat addressing only.
    pub seg_base: u8,
    /// Segment register of the memory operand (or SS for pushes and pops), encoding order ES CS SS DS FS GS.
    pub seg: u8,
    /// Address size in bytes: 2, 4 or 8.
    pub addr_size: u8,
    /// Offset of the first instruction byte from the block's start.
    pub start: u16,
    /// Length in bytes, of both instructions when two were fused.
    pub len: u8,
    /// Guest instructions of the block up to and with this op.
    pub seq: u8,
    /// Guest instructions this op stands for: 1, or 2 when fused.
    pub count: u8,
    /// Operand size in bytes, or whatever the handler wants.
    pub size: u8,
    /// Whatever the handler wants.
    pub aux: u16,
}

/// A position in a block: an [`Op`] that is followed by others up to one that leaves the block.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Cursor(*const Op);

impl std::ops::Deref for Cursor {
    type Target = Op;

    #[inline(always)]
    fn deref(&self) -> &Op {
        // SAFETY: the pointer comes from `Cursor::first` and `next`, so it points into the ops of a block, which live until the
        // processor's cache is emptied, and that happens only between blocks.
        unsafe { &*self.0 }
    }
}

impl Cursor {
    /// The start of a block's ops. The last op must be one that does not call [`Cursor::next`].
    #[inline(always)]
    pub fn first(ops: *const Op) -> Cursor {
        Cursor(ops)
    }

    /// The instruction is complete: goes on with the next op.
    #[inline(always)]
    pub fn next(self, cpu: &mut Cpu) -> Outcome {
        // SAFETY: the last op of a block never calls this (see `first`), so there is a next one.
        let next = Cursor(unsafe { self.0.add(1) });
        (next.run)(cpu, next)
    }

    /// The instruction is complete and execution goes on at `rip`.
    #[inline(always)]
    pub fn jump(self, cpu: &mut Cpu, rip: u64) -> Outcome {
        cpu.rip = rip;
        cpu.instructions += u64::from(self.seq);
        Outcome::Done
    }

    /// The instruction is complete; leaves the block, so that whatever it changed takes effect.
    #[inline(always)]
    pub fn leave(self, cpu: &mut Cpu) -> Outcome {
        let rip = self.next_rip(cpu);
        self.jump(cpu, rip)
    }

    /// The instruction has to be entered again (an interrupted `REP`): leaves the block with `rip` at it.
    #[inline(always)]
    pub fn again(self, cpu: &mut Cpu) -> Outcome {
        cpu.rip = self.rip(cpu);
        cpu.instructions += u64::from(self.seq - self.count);
        Outcome::Done
    }

    /// The instruction could not be completed.
    #[cold]
    #[inline(never)]
    pub fn trap(self, cpu: &mut Cpu, trap: Trap) -> Outcome {
        let Trap(()) = trap;
        cpu.rip = self.rip(cpu);
        cpu.instructions += u64::from(self.seq - self.count);
        cpu.note_trap(&self);
        Outcome::Trapped
    }

    /// Address of this instruction.
    #[inline(always)]
    pub fn rip(self, cpu: &Cpu) -> u64 {
        cpu.mask_rip(cpu.regs[RIP_BASE].wrapping_add(u64::from(self.start)))
    }

    /// Address of the next instruction.
    #[inline(always)]
    pub fn next_rip(self, cpu: &Cpu) -> u64 {
        cpu.mask_rip(cpu.regs[RIP_BASE].wrapping_add(u64::from(self.start) + u64::from(self.len)))
    }
}

impl Op {
    /// An op without operands at this place of a block.
    pub const fn new(run: Handler, start: u16, len: u8, seq: u8) -> Op {
        Op {
            run,
            imm: 0,
            disp: 0,
            a: 0,
            b: 0,
            base: ZERO as u8,
            index: ZERO as u8,
            scale: 0,
            seg_base: ZERO as u8,
            seg: 3,
            addr_size: 8,
            start,
            len,
            seq,
            count: 1,
            size: 0,
            aux: 0,
        }
    }
}

/// An instruction that need not be fast: `execute` runs with `Cpu::rip` at the instruction, sees the iced instruction's operands
/// only as far as the lowering put them into the op, and finds the next address in `Cpu::next_rip`.
pub(crate) trait Slow {
    /// Does it.
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap>;
}

/// The handler of a [`Slow`] instruction.
pub(crate) extern "sysv64-unwind" fn slow<S: Slow>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    cpu.rip = op.rip(cpu);
    cpu.next_rip = op.next_rip(cpu);
    match S::execute(cpu, &op) {
        Ok(Flow::Next) => op.next(cpu),
        Ok(Flow::Leave) => op.leave(cpu),
        Ok(Flow::Jumped) => {
            let rip = cpu.rip;
            op.jump(cpu, rip)
        }
        Err(trap) => op.trap(cpu, trap),
    }
}

/// Leaves the block at this op, which is no instruction: the block ended by length or at the end of a page.
pub(crate) extern "sysv64-unwind" fn end_of_block(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let rip = op.rip(cpu);
    op.jump(cpu, rip)
}

/// Takes the value of a `Result<_, Trap>` or leaves the handler.
macro_rules! attempt {
    ($cpu:expr, $op:expr, $e:expr) => {
        match $e {
            Ok(value) => value,
            Err(trap) => return $op.trap($cpu, trap),
        }
    };
}
pub(crate) use attempt;
