//! Everything privileged, segmented or event-like: what an operating system sees of the processor.
//!
//! Specification: Intel SDM vol. 2 (instructions) and vol. 3 (system programming). Error codes, the order of checks and the rules
//! for canonical addresses are the manual's; where it leaves a choice, recent Intel Core processors decide.
//!
//! ```text
//!   run loop --> event (IVT, gates, double faults)  --> descriptor, stack, task
//!   blocks   --> lower --> segment | far | control | syscall | debug | io | msr | cpuid | random
//! ```
//!
//! Nothing of the processor's state changes before the last check has passed: an instruction or event that faults leaves
//! everything as it was, so that it can be tried again.

mod control;
mod cpuid;
mod debug;
mod descriptor;
mod event;
mod far;
mod io;
mod iret;
mod msr;
mod random;
mod segment;
mod stack;
mod syscall;
mod task;

use iced_x86::{Instruction, OpKind};

pub(crate) use self::cpuid::SIGNATURE;
pub(crate) use self::cpuid::supported as supported_cpuid;
pub(crate) use self::event::{Event, Interrupt};
pub(crate) use self::msr::Msrs;
pub(crate) use self::random::Random;

use crate::block::Lowering;
use crate::cpu::{Cpu, REG_MASK, Width};
use crate::op::{Op, Trap};

/// Triple fault: the processor stops until it is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shutdown;

/// Set in [`Op::aux`] when the operand of an instruction that takes either is memory.
const MEMORY: u16 = 1;

/// Register numbers.
const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSP: usize = 4;
const RSI: usize = 6;
const RDI: usize = 7;

/// Makes the op for an instruction of this module; `false` when it is none.
pub(crate) fn lower(lowering: &Lowering, insn: &Instruction, op: &mut Op) -> bool {
    segment::lower(lowering, insn, op)
        || far::lower(insn, op)
        || control::lower(lowering, insn, op)
        || syscall::lower(insn, op)
        || io::lower(lowering, insn, op)
        || debug::lower(insn, op)
        || msr::lower(insn, op)
        || cpuid::lower(insn, op)
        || random::lower(insn, op)
}

/// Fills `op.a` (register number) or the memory mark from operand `n`.
fn register_or_memory(insn: &Instruction, n: u32, op: &mut Op) {
    if insn.op_kind(n) == OpKind::Register {
        op.a = insn.op_register(n).number() as u8;
    } else {
        op.aux |= MEMORY;
    }
}

/// Whether an address has the form of 48-bit linear addresses (Intel SDM vol. 1 section 3.3.7.1).
fn is_canonical(address: u64) -> bool {
    (address as i64) << 16 >> 16 == address as i64
}

impl Cpu {
    /// #GP(0) outside privilege level 0.
    fn require_cpl0(&mut self) -> Result<(), Trap> {
        if self.cpl == 0 { Ok(()) } else { Err(self.gp()) }
    }

    /// #UD in real and virtual-8086 mode.
    fn require_protected(&mut self) -> Result<(), Trap> {
        if self.protected() { Ok(()) } else { Err(self.ud()) }
    }

    fn is_64bit(&self) -> bool {
        self.width == Width::Bits64
    }

    /// Linear address of the op's memory operand.
    fn operand_address(&mut self, op: &Op, size: u64, write: bool) -> Result<u64, Trap> {
        let offset = self.effective_address(op);
        self.linear(usize::from(op.seg), offset, size, write)
    }

    /// Reads a 16-bit operand that is a register or memory.
    fn operand_16(&mut self, op: &Op) -> Result<u16, Trap> {
        if op.aux & MEMORY != 0 {
            let at = self.operand_address(op, 2, false)?;
            self.load::<u16>(at)
        } else {
            Ok(self.regs[usize::from(op.a) & REG_MASK] as u16)
        }
    }

    /// Writes to a register of the op's operand size, or 16 bits to memory.
    fn set_operand_16(&mut self, op: &Op, value: u64) -> Result<(), Trap> {
        if op.aux & MEMORY != 0 {
            let at = self.operand_address(op, 2, true)?;
            self.store::<u16>(at, value as u16)
        } else {
            self.set_register(op.a, op.size, value);
            Ok(())
        }
    }

    /// Writes a register: 16 bits leave the rest, 32 clear the upper half.
    fn set_register(&mut self, register: u8, size: u8, value: u64) {
        let register = &mut self.regs[usize::from(register) & REG_MASK];
        *register = match size {
            2 => *register & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
    }

    /// Reads a word of 2, 4 or 8 bytes with the current privilege.
    fn load_sized(&mut self, va: u64, size: u64) -> Result<u64, Trap> {
        Ok(match size {
            1 => u64::from(self.load::<u8>(va)?),
            2 => u64::from(self.load::<u16>(va)?),
            4 => u64::from(self.load::<u32>(va)?),
            _ => self.load::<u64>(va)?,
        })
    }

    /// Writes a word of 1, 2, 4 or 8 bytes with the current privilege.
    fn store_sized(&mut self, va: u64, size: u64, value: u64) -> Result<(), Trap> {
        match size {
            1 => self.store::<u8>(va, value as u8),
            2 => self.store::<u16>(va, value as u16),
            4 => self.store::<u32>(va, value as u32),
            _ => self.store::<u64>(va, value),
        }
    }
}
