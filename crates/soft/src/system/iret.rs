//! IRET: the end of a handler, in every mode.
//!
//! Intel SDM vol. 2, IRET/IRETD/IRETQ. Only as many flags change as the privilege of the returning code allows.

use super::RSP;
use super::descriptor::{kind, rpl, selector_error};
use super::stack::Stack;
use super::task::Reason;
use crate::attention;
use crate::cpu::{CS, Cpu, DS, ES, FS, GS, SS, rflags, vector};
use crate::op::{Flow, Op, Slow, Trap};

/// Flags that IRET takes from the stack at any privilege: CF PF AF ZF SF TF DF OF NT, and with 32-bit operands RF AC ID.
const ALWAYS: u64 = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
const ALWAYS_WIDE: u64 = rflags::RF | rflags::AC | rflags::ID;

/// IRET, IRETD and IRETQ.
pub(super) struct Iret;

impl Slow for Iret {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let size = u64::from(op.size);
        if cpu.nmi_blocked {
            // Even an IRET that faults ends the blocking (Intel SDM vol. 3 section 6.7.1).
            cpu.nmi_blocked = false;
            cpu.attention.set_own(attention::APIC);
        }
        if !cpu.protected() {
            cpu.iret_real(size)?;
        } else if cpu.rflags & rflags::NT != 0 {
            cpu.iret_task()?;
        } else {
            cpu.iret_protected(size)?;
        }
        Ok(Flow::Jumped)
    }
}

impl Cpu {
    /// Real and virtual-8086 mode.
    fn iret_real(&mut self, size: u64) -> Result<(), Trap> {
        if self.v86() && self.rflags & rflags::IOPL != rflags::IOPL {
            return Err(self.gp());
        }
        let mut stack = Stack::current(self, 0);
        let rip = stack.pop(self, size)?;
        let selector = stack.pop(self, size)? as u16;
        let flags = stack.pop(self, size)?;
        self.check_real_target(rip)?;
        let mut taken = ALWAYS | rflags::IF;
        if !self.v86() {
            taken |= rflags::IOPL;
        }
        if size != 2 {
            taken |= ALWAYS_WIDE;
        }
        self.load_segment_real(CS, selector);
        self.regs[RSP] = stack.rsp();
        self.load_flags(self.flags() & !taken | self.returned(flags) & taken);
        self.rip = rip;
        self.update_mode();
        Ok(())
    }

    /// NT: back to the task that the back link names.
    fn iret_task(&mut self) -> Result<(), Trap> {
        if self.long_mode() {
            return Err(self.gp());
        }
        let selector = self.load_system::<u16>(self.tr.base)?;
        if selector & 4 != 0 || selector & 0xfffc == 0 {
            return Err(self.raise_code(vector::TS, selector_error(selector)));
        }
        let tss = self.descriptor(selector, vector::TS, 0)?;
        if !matches!(tss.system(), Some(kind::TSS_BUSY | kind::TSS16_BUSY)) {
            return Err(self.raise_code(vector::TS, selector_error(selector)));
        }
        if !tss.is_present() {
            return Err(self.raise_code(vector::NP, selector_error(selector)));
        }
        let (rip, flags) = (self.next_rip, self.flags());
        self.switch_task(selector, tss, Reason::Return, rip, flags, 0, None)
    }

    fn iret_protected(&mut self, size: u64) -> Result<(), Trap> {
        let mut stack = Stack::current(self, 0);
        let rip = stack.pop(self, size)?;
        let selector = stack.pop(self, size)? as u16;
        let flags = stack.pop(self, size)?;
        if size == 4 && flags & rflags::VM != 0 && self.cpl == 0 && !self.long_mode() {
            return self.iret_to_v86(stack, rip, selector, flags);
        }
        // IRETQ pops the stack pointer even if the privilege stays; then null SS is checked with the rest.
        let with_stack = self.is_64bit() || rpl(selector) != self.cpl;
        let mut code = self.return_descriptor(selector)?;
        let mut taken = ALWAYS;
        if size != 2 {
            taken |= ALWAYS_WIDE;
        }
        if u64::from(self.cpl) <= (self.rflags & rflags::IOPL) >> 12 {
            taken |= rflags::IF;
        }
        if self.cpl == 0 {
            taken |= rflags::IOPL;
            if size != 2 {
                taken |= rflags::VIF | rflags::VIP;
            }
        }
        let flags = self.flags() & !taken | self.returned(flags) & taken;
        if with_stack {
            let rsp = stack.pop(self, size)?;
            let ss = stack.pop(self, size)? as u16;
            return self.return_outer(selector, code, rip, ss, rsp, flags, 0);
        }
        self.check_target(&code, rip, 0)?;
        self.mark_accessed(&mut code)?;
        self.load_flags(flags);
        self.seg[CS] = code.segment(selector);
        self.regs[RSP] = stack.rsp();
        self.rip = rip;
        self.update_mode();
        Ok(())
    }

    fn iret_to_v86(&mut self, mut stack: Stack, rip: u64, selector: u16, flags: u64) -> Result<(), Trap> {
        let esp = stack.pop(self, 4)?;
        let mut selectors = [0; 5];
        for selector in &mut selectors {
            *selector = stack.pop(self, 4)? as u16;
        }
        if rip > 0xffff {
            return Err(self.gp());
        }
        let taken = ALWAYS | ALWAYS_WIDE | rflags::IF | rflags::IOPL | rflags::VIF | rflags::VIP | rflags::VM;
        self.load_flags(self.flags() & !taken | self.returned(flags) & taken);
        self.load_segment_real(CS, selector);
        for (segment, selector) in [SS, ES, DS, FS, GS].into_iter().zip(selectors) {
            self.load_segment_real(segment, selector);
        }
        self.regs[RSP] = esp;
        self.rip = rip & 0xffff;
        self.update_mode();
        Ok(())
    }

    /// Flags from the stack. RF only matters to code breakpoints; without any it is dropped, so that handlers' returns need
    /// no look at the next instruction.
    fn returned(&self, flags: u64) -> u64 {
        if self.dr7 & 0xff == 0 { flags & !rflags::RF } else { flags }
    }
}
