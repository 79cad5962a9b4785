//! From a memory operand to a linear address: effective addresses and segmentation (Intel SDM vol. 3 section 5.3).

use super::{FLAT_BASE, FLAT_SIB};
use crate::cpu::{Cpu, FS, FS_BASE, GS, GS_BASE, REG_MASK, SS, Width, access, vector};
use crate::op::{Op, Trap};

impl Cpu {
    /// Linear address of the op's memory operand, in the form chosen when it was decoded.
    #[inline(always)]
    pub fn ea<const K: u8>(&mut self, op: &Op, size: u64, write: bool) -> Result<u64, Trap> {
        match K {
            FLAT_BASE => Ok(self.regs[usize::from(op.base) & REG_MASK].wrapping_add(op.disp as u64)),
            FLAT_SIB => Ok(self.regs[usize::from(op.base) & REG_MASK]
                .wrapping_add(self.regs[usize::from(op.index) & REG_MASK] << (op.scale & 3))
                .wrapping_add(op.disp as u64)
                .wrapping_add(self.regs[usize::from(op.seg_base) & REG_MASK])),
            _ => {
                let offset = self.effective_address(op);
                self.linear(usize::from(op.seg), offset, size, write)
            }
        }
    }

    /// Offset of the op's memory operand within its segment, masked to the address size (what LEA gives).
    #[inline(always)]
    pub fn effective_address(&self, op: &Op) -> u64 {
        self.displaced_address(op, op.disp)
    }

    /// The same with another displacement.
    #[inline(always)]
    pub fn displaced_address(&self, op: &Op, disp: i64) -> u64 {
        let sum = self.regs[usize::from(op.base) & REG_MASK]
            .wrapping_add(self.regs[usize::from(op.index) & REG_MASK] << (op.scale & 3))
            .wrapping_add(disp as u64);
        match op.addr_size {
            8 => sum,
            4 => sum & 0xffff_ffff,
            _ => sum & 0xffff,
        }
    }

    /// Segmentation: the linear address of `size` bytes at `offset` of a segment. In 64-bit code only FS and GS have a base; in
    /// other code limit, type and presence are checked (Intel SDM vol. 3 section 5.3).
    #[inline]
    pub fn linear(&mut self, segment: usize, offset: u64, size: u64, write: bool) -> Result<u64, Trap> {
        if self.width == Width::Bits64 {
            return Ok(match segment {
                FS => offset.wrapping_add(self.regs[FS_BASE]),
                GS => offset.wrapping_add(self.regs[GS_BASE]),
                _ => offset,
            });
        }
        self.linear_legacy(segment, offset, size, write)
    }

    fn linear_legacy(&mut self, segment: usize, offset: u64, size: u64, write: bool) -> Result<u64, Trap> {
        let s = self.seg[segment];
        let code = s.access & 8 != 0;
        let allowed = if s.access & (access::UNUSABLE) != 0 || s.access & access::P == 0 {
            false
        } else if !self.protected() {
            true
        } else if write {
            !code && s.access & 2 != 0
        } else {
            !code || s.access & 2 != 0
        };
        let last = offset.wrapping_add(size.saturating_sub(1));
        let limit = u64::from(s.limit);
        let inside = if !code && s.access & 4 != 0 {
            // Expand-down: valid above the limit, up to the size that B gives.
            let top = if s.access & access::DB != 0 { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top && last >= offset
        } else {
            last <= limit && last >= offset
        };
        if !allowed || !inside {
            let vector = if segment == SS { vector::SS } else { vector::GP };
            return Err(self.raise_code(vector, 0));
        }
        Ok(s.base.wrapping_add(offset) & 0xffff_ffff)
    }
}
