//! Hardware task switches, by JMP, CALL, IRET, interrupts and exceptions; 32- and 16-bit TSS.
//!
//! Intel SDM vol. 3 chapter 8 (8.2.1 and 8.6: layouts, 8.3: the switch, table 8-1: checks). Faults before the new task is loaded
//! belong to the old one; faults from its segment registers are raised in the new task, before its first instruction.

use vmm::Segment;

use super::RSP;
use super::descriptor::{BUSY, Descriptor, is_null, kind, null_segment, rpl, selector_error};
use super::stack::Stack;
use crate::cpu::{CS, Cpu, DS, ES, FS, GS, SS, TrapKind, access, cr0, cr4, rflags, vector};
use crate::op::Trap;

/// What switches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    Jump,
    Call,
    /// Interrupt or exception through a task gate.
    Event,
    Return,
}

/// What a TSS says about a task.
#[derive(Debug, Clone, Copy, Default)]
struct Task {
    cr3: u64,
    rip: u64,
    flags: u64,
    gpr: [u64; 8],
    /// ES CS SS DS FS GS.
    selectors: [u16; 6],
    ldt: u16,
    /// The T bit: debug trap after the switch.
    trap: bool,
}

/// Size that a TSS has at least, less one.
fn minimum_limit(big: bool) -> u32 {
    if big { 0x67 } else { 0x2b }
}

impl Cpu {
    /// The TSS that a task gate names or a far transfer selects; must be available.
    pub(super) fn task_descriptor(&mut self, selector: u16, ext: u32) -> Result<Descriptor, Trap> {
        if is_null(selector) || selector & 4 != 0 {
            return Err(self.raise_code(vector::GP, selector_error(selector) | ext));
        }
        let tss = self.descriptor(selector, vector::GP, ext)?;
        if !matches!(tss.system(), Some(kind::TSS_AVAILABLE | kind::TSS16_AVAILABLE)) {
            return Err(self.raise_code(vector::GP, selector_error(selector) | ext));
        }
        if !tss.is_present() {
            return Err(self.raise_code(vector::NP, selector_error(selector) | ext));
        }
        Ok(tss)
    }

    /// Switches to the task of `tss`. `rip` and `flags` are what the old task goes on with.
    #[allow(clippy::too_many_arguments)] // The whole event comes along.
    pub(super) fn switch_task(
        &mut self,
        selector: u16,
        tss: Descriptor,
        reason: Reason,
        rip: u64,
        flags: u64,
        ext: u32,
        error: Option<u32>,
    ) -> Result<(), Trap> {
        let mut tss = tss;
        let big = tss.access & 8 != 0;
        if tss.limit() < minimum_limit(big) {
            return Err(self.raise_code(vector::TS, selector_error(selector) | ext));
        }
        let old_big = self.tr.access & 8 != 0;
        if self.tr.limit < minimum_limit(old_big) {
            return Err(self.raise_code(vector::TS, selector_error(self.tr.selector) | ext));
        }
        let task = self.read_task(tss.base(), big)?;
        let nested = matches!(reason, Reason::Call | Reason::Event);
        let saved_flags = if reason == Reason::Return { flags & !rflags::NT } else { flags };
        self.save_task(old_big, rip, saved_flags)?;
        if nested {
            self.store_system::<u16>(tss.base(), self.tr.selector)?;
        } else {
            let busy = self.gdtr.base.wrapping_add(u64::from(self.tr.selector & !7) + 5);
            let byte = self.load_system::<u8>(busy)?;
            self.store_system::<u8>(busy, byte & !(BUSY as u8))?;
        }
        if reason != Reason::Return {
            let busy = tss.access | BUSY;
            self.write_type(&mut tss, busy)?;
        }
        // From here on the new task runs.
        self.tr = Segment { access: tss.access | BUSY, ..tss.segment(selector) };
        self.cr0 |= cr0::TS;
        self.enter_task_state(&task, nested, big);
        if let Err(Trap(())) = self.load_task_segments(&task, big) {
            self.fault_in_new_task(ext);
            return Ok(());
        }
        if let Some(error) = error {
            let mut stack = Stack::current(self, ext);
            if let Err(Trap(())) = stack.push(self, if big { 4 } else { 2 }, error.into()) {
                self.fault_in_new_task(ext);
                return Ok(());
            }
            self.regs[RSP] = stack.rsp();
        }
        if task.trap {
            /// DR6.BT: a task switch to a task with the T bit.
            const DR6_BT: u64 = 1 << 15;
            self.dr6 |= DR6_BT;
            self.deliver_later(vector::DB, None, 0);
        }
        Ok(())
    }

    fn read_task(&mut self, base: u64, big: bool) -> Result<Task, Trap> {
        let mut task = Task::default();
        if big {
            task.cr3 = self.load_system::<u32>(base + 0x1c)?.into();
            task.rip = self.load_system::<u32>(base + 0x20)?.into();
            task.flags = self.load_system::<u32>(base + 0x24)?.into();
            for n in 0..8 {
                task.gpr[n] = self.load_system::<u32>(base + 0x28 + 4 * n as u64)?.into();
            }
            for n in 0..6 {
                task.selectors[n] = self.load_system::<u16>(base + 0x48 + 4 * n as u64)?;
            }
            task.ldt = self.load_system::<u16>(base + 0x60)?;
            task.trap = self.load_system::<u16>(base + 0x64)? & 1 != 0;
        } else {
            task.rip = self.load_system::<u16>(base + 0x0e)?.into();
            task.flags = self.load_system::<u16>(base + 0x10)?.into();
            for n in 0..8 {
                // The upper halves are not defined; all ones is what processors show.
                task.gpr[n] = u64::from(self.load_system::<u16>(base + 0x12 + 2 * n as u64)?) | 0xffff_0000;
            }
            for n in 0..4 {
                task.selectors[n] = self.load_system::<u16>(base + 0x22 + 2 * n as u64)?;
            }
            task.ldt = self.load_system::<u16>(base + 0x2a)?;
        }
        Ok(task)
    }

    fn save_task(&mut self, big: bool, rip: u64, flags: u64) -> Result<(), Trap> {
        let base = self.tr.base;
        if big {
            self.store_system::<u32>(base + 0x20, rip as u32)?;
            self.store_system::<u32>(base + 0x24, flags as u32)?;
            for n in 0..8 {
                self.store_system::<u32>(base + 0x28 + 4 * n as u64, self.regs[n] as u32)?;
            }
            for n in 0..6 {
                self.store_system::<u16>(base + 0x48 + 4 * n as u64, self.seg[n].selector)?;
            }
        } else {
            self.store_system::<u16>(base + 0x0e, rip as u16)?;
            self.store_system::<u16>(base + 0x10, flags as u16)?;
            for n in 0..8 {
                self.store_system::<u16>(base + 0x12 + 2 * n as u64, self.regs[n] as u16)?;
            }
            for n in 0..4 {
                self.store_system::<u16>(base + 0x22 + 2 * n as u64, self.seg[n].selector)?;
            }
        }
        Ok(())
    }

    /// General registers, flags, CR3, and segment registers with their selectors only.
    fn enter_task_state(&mut self, task: &Task, nested: bool, big: bool) {
        let mut flags = task.flags & 0x003f_7fd5;
        if nested {
            flags |= rflags::NT;
        }
        if !big {
            flags &= 0xffff;
        }
        self.load_flags(flags);
        self.regs[..8].copy_from_slice(&task.gpr);
        self.rip = task.rip;
        for (segment, &selector) in self.seg.iter_mut().zip(&task.selectors) {
            *segment = null_segment(selector, rpl(task.selectors[CS]));
        }
        self.ldtr = null_segment(task.ldt, 0);
        // Local breakpoints do not outlive their task: L0 to L3 and LE.
        self.dr7 &= !0x155;
        if big && self.cr0 & cr0::PG != 0 && (task.cr3 != self.cr3 || self.cr4 & cr4::PAE != 0) {
            // Bad PDPTEs fault in the new task; the register holds the value all the same.
            if self.load_cr3(task.cr3).is_err() {
                self.cr3 = task.cr3;
                self.flush_tlb();
            }
        }
        self.update_mode();
    }

    /// LDTR and the segment registers of the new task.
    fn load_task_segments(&mut self, task: &Task, big: bool) -> Result<(), Trap> {
        self.ldtr = self.checked_ldt(task.ldt, vector::TS)?;
        let selectors = &task.selectors;
        let count = if big { 6 } else { 4 };
        if self.v86() {
            for segment in [CS, SS, ES, DS, FS, GS] {
                self.load_segment_real(segment, selectors[segment]);
            }
            self.update_mode();
            return self.check_real_target(self.rip);
        }
        let code = self.task_code(selectors[CS])?;
        let cpl = rpl(selectors[CS]);
        let stack = self.task_stack(selectors[SS], cpl)?;
        self.seg[SS] = stack;
        self.seg[CS] = code.segment(selectors[CS]);
        self.update_mode();
        for segment in [ES, DS, FS, GS] {
            if segment >= count {
                continue;
            }
            if let Err(trap) = self.load_segment(segment, selectors[segment]) {
                if let TrapKind::Exception { vector: vector::GP, error, .. } = self.trap {
                    return Err(self.raise_code(vector::TS, error.unwrap_or(0)));
                }
                return Err(trap);
            }
        }
        self.check_target(&code, self.rip, 0)
    }

    fn task_code(&mut self, selector: u16) -> Result<Descriptor, Trap> {
        if is_null(selector) {
            return Err(self.raise_code(vector::TS, 0));
        }
        let mut code = self.descriptor(selector, vector::TS, 0)?;
        let level = rpl(selector);
        let allowed = if code.is_conforming_code() { code.dpl() <= level } else { code.dpl() == level };
        if !code.is_code() || !allowed {
            return Err(self.raise_code(vector::TS, selector_error(selector)));
        }
        if !code.is_present() {
            return Err(self.raise_code(vector::NP, selector_error(selector)));
        }
        self.mark_accessed(&mut code)?;
        Ok(code)
    }

    fn task_stack(&mut self, selector: u16, cpl: u8) -> Result<Segment, Trap> {
        if is_null(selector) {
            return Err(self.raise_code(vector::TS, 0));
        }
        let mut stack = self.descriptor(selector, vector::TS, 0)?;
        if rpl(selector) != cpl || stack.dpl() != cpl || !stack.is_writable_data() {
            return Err(self.raise_code(vector::TS, selector_error(selector)));
        }
        if !stack.is_present() {
            return Err(self.raise_code(vector::SS, selector_error(selector)));
        }
        self.mark_accessed(&mut stack)?;
        debug_assert_eq!(stack.access & access::UNUSABLE, 0);
        Ok(stack.segment(selector))
    }

    /// The last trap is raised before the new task's first instruction.
    fn fault_in_new_task(&mut self, ext: u32) {
        self.update_mode();
        match self.trap {
            TrapKind::Exception { vector, error, address } => {
                let error = if vector == vector::PF { error } else { error.map(|code| code | ext) };
                self.deliver_later(vector, error, address);
            }
            _ => self.deliver_later(vector::GP, Some(ext), 0),
        }
    }
}
