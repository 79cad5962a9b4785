//! Debug registers, breakpoints and single stepping.
//!
//! Intel SDM vol. 3 chapter 18 (18.2 registers, 18.3 exceptions). The run loop asks before and after each instruction, but only
//! while RFLAGS.TF or an enabled breakpoint wants it (`attention::STEP`).

use iced_x86::{Instruction, Mnemonic};

use crate::attention;
use crate::cpu::{CS, Cpu, REG_MASK, Width, cr4, rflags, vector};
use crate::op::{Flow, Op, Slow, Trap, slow};

/// DR6 bits that always read as one, and those that can be written.
const DR6_ONES: u64 = 0xffff_0ff0;
const DR6_WRITABLE: u64 = 0xe00f;
/// DR6: access to a debug register.
const DR6_BD: u64 = 1 << 13;
/// DR6: single step.
const DR6_BS: u64 = 1 << 14;
/// DR7 bit that always reads as one, and those that can be written.
const DR7_ONES: u64 = 1 << 10;
const DR7_WRITABLE: u64 = 0xffff_23ff;
/// DR7: accesses to debug registers fault.
const DR7_GD: u64 = 1 << 13;

/// Makes the op for an instruction of this file.
pub(super) fn lower(insn: &Instruction, op: &mut Op) -> bool {
    if insn.mnemonic() != Mnemonic::Mov {
        return false;
    }
    let (register, debug) = (insn.op0_register(), insn.op1_register());
    op.run = if debug.is_dr() {
        op.a = register.number() as u8;
        op.b = debug.number() as u8;
        slow::<ReadDebug>
    } else if register.is_dr() {
        op.a = debug.number() as u8;
        op.b = register.number() as u8;
        slow::<WriteDebug>
    } else {
        return false;
    };
    true
}

impl Cpu {
    /// Checks common to both directions; returns the register's number with the aliases resolved.
    fn debug_register(&mut self, number: u8) -> Result<usize, Trap> {
        let aliased = matches!(number, 4 | 5);
        if number > 7 || aliased && self.cr4 & cr4::DE != 0 {
            return Err(self.ud());
        }
        self.require_cpl0()?;
        if self.dr7 & DR7_GD != 0 {
            self.dr6 |= DR6_BD;
            return Err(self.raise(vector::DB));
        }
        Ok(usize::from(if aliased { number + 2 } else { number }))
    }

    /// Whether breakpoint `n` is enabled, locally or globally.
    fn breakpoint_enabled(&self, n: usize) -> bool {
        self.dr7 >> (2 * n) & 3 != 0
    }

    /// Kind of breakpoint `n`: 0 instruction, 1 write, 2 I/O, 3 read or write.
    fn breakpoint_kind(&self, n: usize) -> u64 {
        self.dr7 >> (16 + 4 * n) & 3
    }

    /// Before an instruction: a code breakpoint is #DB, unless RF holds it off. RF is over with the instruction that follows.
    pub fn debug_check_before(&mut self) -> Result<(), Trap> {
        self.step_over = false;
        let resumed = self.rflags & rflags::RF != 0;
        self.rflags &= !rflags::RF;
        if resumed || self.dr7 & 0xff == 0 {
            return Ok(());
        }
        let at = if self.width == Width::Bits64 { self.rip } else { self.seg[CS].base.wrapping_add(self.rip) & 0xffff_ffff };
        let hits = (0..4).filter(|&n| self.breakpoint_enabled(n) && self.breakpoint_kind(n) == 0 && self.dr[n] == at);
        let hits = hits.fold(0, |bits, n| bits | 1 << n);
        if hits == 0 {
            return Ok(());
        }
        self.dr6 = self.dr6 & !0xf | hits;
        Err(self.raise(vector::DB))
    }

    /// After an instruction was completed: data breakpoints that it hit (`watch_hits`), and the single step that TF asked for
    /// before it.
    pub fn debug_check_after(&mut self, trap_flag: bool) -> Result<(), Trap> {
        if std::mem::take(&mut self.step_over) {
            return Ok(());
        }
        let hits = u64::from(std::mem::take(&mut self.watch_hits));
        if hits == 0 && !trap_flag {
            return Ok(());
        }
        self.dr6 = self.dr6 & !0xf | hits;
        if trap_flag {
            self.dr6 |= DR6_BS;
        }
        Err(self.raise(vector::DB))
    }

    /// Notes which I/O breakpoints an access to a port hits (CR4.DE).
    pub(super) fn watch_port(&mut self, port: u16, size: u64) {
        if self.dr7 & 0xff == 0 || self.cr4 & cr4::DE == 0 {
            return;
        }
        for n in 0..4 {
            let len = (self.dr7 >> (18 + 4 * n) & 3) + 1;
            let start = self.dr[n] & !(len - 1);
            let hit = u64::from(port) < start.saturating_add(len) && start < u64::from(port) + size;
            if self.breakpoint_enabled(n) && self.breakpoint_kind(n) == 2 && hit {
                self.watch_hits |= 1 << n;
            }
        }
    }
}

struct ReadDebug;
impl Slow for ReadDebug {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let value = match cpu.debug_register(op.b)? {
            6 => cpu.dr6,
            7 => cpu.dr7,
            n => cpu.dr[n & 3],
        };
        let size = if cpu.is_64bit() { 8 } else { 4 };
        cpu.set_register(op.a, size, value);
        Ok(Flow::Next)
    }
}

struct WriteDebug;
impl Slow for WriteDebug {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let register = cpu.debug_register(op.b)?;
        let value = cpu.regs[usize::from(op.a) & REG_MASK];
        let value = if cpu.is_64bit() { value } else { value & 0xffff_ffff };
        if register >= 6 && value >> 32 != 0 {
            return Err(cpu.gp());
        }
        match register {
            6 => cpu.dr6 = value & DR6_WRITABLE | DR6_ONES,
            7 => cpu.dr7 = value & DR7_WRITABLE | DR7_ONES,
            n => cpu.dr[n & 3] = value,
        }
        // Pages with data breakpoints are kept out of the TLB.
        cpu.flush_tlb();
        if cpu.dr7 & 0xff != 0 {
            cpu.attention.set_own(attention::STEP);
        }
        Ok(Flow::Leave)
    }
}
