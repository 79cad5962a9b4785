//! A stack that is being pushed to or popped from before anything is committed.
//!
//! Far transfers and events move several words and may fault at each. They work on a [`Stack`], a copy of SS and RSP (or of
//! those they are about to load), and write it back when all checks have passed.

use vmm::Segment;

use super::{RSP, is_canonical};
use crate::cpu::{Cpu, SS, access, vector};
use crate::op::Trap;

/// See the module.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stack {
    segment: Segment,
    /// Which bits of RSP count.
    mask: u64,
    rsp: u64,
    /// Privilege with which it is accessed.
    cpl: u8,
    /// Error code of its #SS.
    error: u32,
}

impl Stack {
    /// The stack that SS and RSP are.
    pub fn current(cpu: &Cpu, error: u32) -> Stack {
        Stack { segment: cpu.seg[SS], mask: cpu.stack_mask(), rsp: cpu.regs[RSP], cpl: cpu.cpl, error }
    }

    /// A stack in 64-bit mode, where SS does not count.
    pub fn long(rsp: u64, cpl: u8, error: u32) -> Stack {
        Stack { segment: Segment::default(), mask: u64::MAX, rsp, cpl, error }
    }

    /// A stack in another segment.
    pub fn legacy(segment: Segment, rsp: u64, cpl: u8, error: u32) -> Stack {
        let mask = if segment.access & access::DB != 0 { 0xffff_ffff } else { 0xffff };
        Stack { segment, mask, rsp, cpl, error }
    }

    /// What RSP is to become.
    pub fn rsp(&self) -> u64 {
        if self.mask == 0xffff_ffff { self.rsp & self.mask } else { self.rsp }
    }

    /// Releases `bytes` more.
    pub fn release(&mut self, bytes: u64) {
        self.rsp = self.moved(bytes);
    }

    /// Pushes a word of 2, 4 or 8 bytes.
    pub fn push(&mut self, cpu: &mut Cpu, size: u64, value: u64) -> Result<(), Trap> {
        let rsp = self.moved(size.wrapping_neg());
        let at = self.address(cpu, rsp & self.mask, size)?;
        if self.cpl == 3 {
            cpu.store_sized(at, size, value)?;
        } else {
            match size {
                2 => cpu.store_system::<u16>(at, value as u16)?,
                4 => cpu.store_system::<u32>(at, value as u32)?,
                _ => cpu.store_system::<u64>(at, value)?,
            }
        }
        self.rsp = rsp;
        Ok(())
    }

    /// Pops a word of 2, 4 or 8 bytes.
    pub fn pop(&mut self, cpu: &mut Cpu, size: u64) -> Result<u64, Trap> {
        let at = self.address(cpu, self.rsp & self.mask, size)?;
        let value = cpu.load_sized(at, size)?;
        self.rsp = self.moved(size);
        Ok(value)
    }

    /// RSP moved by `bytes`; bits that do not count stay.
    fn moved(&self, bytes: u64) -> u64 {
        self.rsp & !self.mask | self.rsp.wrapping_add(bytes) & self.mask
    }

    fn address(&self, cpu: &mut Cpu, offset: u64, size: u64) -> Result<u64, Trap> {
        let last = offset.wrapping_add(size - 1);
        if self.mask == u64::MAX {
            return if is_canonical(offset) && is_canonical(last) { Ok(offset) } else { Err(cpu.raise_code(vector::SS, self.error)) };
        }
        let limit = u64::from(self.segment.limit);
        // Type bit 2 of a data segment: it expands down.
        let inside = if self.segment.access & 0xc == 4 { offset > limit && last <= self.mask } else { last <= limit && last <= self.mask };
        if !inside || self.segment.access & access::UNUSABLE != 0 {
            return Err(cpu.raise_code(vector::SS, self.error));
        }
        Ok(self.segment.base.wrapping_add(offset) & 0xffff_ffff)
    }
}

impl Cpu {
    /// Which bits of RSP count: all in 64-bit code, else as SS.B says.
    pub(super) fn stack_mask(&self) -> u64 {
        if self.is_64bit() {
            u64::MAX
        } else if self.seg[SS].access & access::DB != 0 {
            0xffff_ffff
        } else {
            0xffff
        }
    }
}
