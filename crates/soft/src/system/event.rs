//! Delivery of exceptions and interrupts: interrupt vector table, gates, double faults.
//!
//! Intel SDM vol. 3 chapter 6 (6.12 protected mode, 6.14 64-bit mode, 6.15 double fault classes), section 21.1.4 (real mode) and
//! 21.3 (virtual-8086 mode); vol. 2, INT n. A delivery that faults changes no register, so that the fault can be combined with the
//! event into what the processor does next.

use super::descriptor::{Descriptor, is_null, kind, null_segment, rpl, selector_error};
use super::stack::Stack;
use super::task::Reason;
use super::{Shutdown, is_canonical};
use crate::attention;
use crate::cpu::{CS, Cpu, DS, ES, FS, GS, SS, TrapKind, cr0, rflags, vector};
use crate::op::Trap;

/// DR7: accesses to debug registers fault.
const DR7_GD: u64 = 1 << 13;
/// Bit of an error code that names a gate of the IDT.
const IDT: u32 = 2;

/// What sort of interrupt it is, for [`Cpu::deliver_interrupt`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interrupt {
    /// From an interrupt controller.
    External,
    /// Non-maskable.
    Nmi,
    /// INT n.
    Software,
    /// INT3 or INTO.
    Trap,
    /// INT1: a software event without privilege check.
    Icebp,
}

/// Something that is to be delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Event {
    vector: u8,
    source: Source,
    error: Option<u32>,
    /// Linear address of a page fault.
    address: u64,
    /// Return address.
    rip: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Exception,
    Interrupt(Interrupt),
}

/// Classes of the double-fault table (Intel SDM vol. 3 table 6-4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

impl Event {
    fn class(&self) -> Class {
        match (self.source, self.vector) {
            (Source::Interrupt(_), _) => Class::Benign,
            (_, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP) => Class::Contributory,
            (_, vector::PF) => Class::PageFault,
            (_, vector::DF) => Class::DoubleFault,
            _ => Class::Benign,
        }
    }

    /// What comes of a fault while this is delivered.
    fn followed_by(&self, second: Event) -> Result<Event, Shutdown> {
        match (self.class(), second.class()) {
            (Class::DoubleFault, Class::Contributory | Class::PageFault) => Err(Shutdown),
            (Class::Contributory, Class::Contributory) | (Class::PageFault, Class::Contributory | Class::PageFault) => {
                Ok(Event { vector: vector::DF, source: Source::Exception, error: Some(0), address: 0, rip: self.rip })
            }
            _ => Ok(second),
        }
    }

    /// Whether the gate's DPL is checked against CPL.
    fn is_software(&self) -> bool {
        matches!(self.source, Source::Interrupt(Interrupt::Software | Interrupt::Trap))
    }

    /// The EXT bit of error codes: the event came from outside the program.
    fn ext(&self) -> u32 {
        u32::from(!self.is_software())
    }

    /// RFLAGS as it is pushed (Intel SDM vol. 3 section 18.3.1.1: faults push RF set).
    fn pushed_flags(&self, flags: u64) -> u64 {
        let is_fault =
            self.source == Source::Exception && !matches!(self.vector, vector::DB | vector::BP | vector::OF | vector::DF | vector::MC);
        if is_fault { flags | rflags::RF } else { flags }
    }

    fn gate_error(&self) -> u32 {
        u32::from(self.vector) * 8 + IDT + self.ext()
    }
}

impl Cpu {
    /// Delivers an exception; `rip` is at the instruction, or after it for traps.
    pub fn deliver_exception(&mut self, vector: u8, error: Option<u32>, address: u64) -> Result<(), Shutdown> {
        self.deliver_event(Event { vector, source: Source::Exception, error, address, rip: self.rip })
    }

    /// Delivers an interrupt between two instructions.
    pub fn deliver_interrupt(&mut self, vector: u8, kind: Interrupt) -> Result<(), Shutdown> {
        self.deliver_event(Event { vector, source: Source::Interrupt(kind), error: None, address: 0, rip: self.rip })
    }

    /// Goes on with an event whose delivery had to wait (see `Cpu::undelivered`).
    pub fn redeliver(&mut self) -> Result<(), Shutdown> {
        match self.undelivered.take() {
            Some(event) => self.deliver_event(event),
            None => Ok(()),
        }
    }

    fn deliver_event(&mut self, event: Event) -> Result<(), Shutdown> {
        self.blocks.stop_running();
        let mut event = event;
        loop {
            if event.source == Source::Exception && event.vector == vector::PF {
                self.cr2 = event.address;
            }
            let Err(trap) = self.enter_event(&event) else { return Ok(()) };
            let Trap(()) = trap;
            event = match self.trap {
                TrapKind::Exception { vector, error, address } => event.followed_by(self.exception(vector, error, address))?,
                TrapKind::NotCanonical | TrapKind::Alone => event.followed_by(self.exception(vector::GP, Some(event.ext()), 0))?,
                TrapKind::Exit(exit) => {
                    // A push to memory that somebody outside has to look at: the event waits for the next run.
                    self.pending_exit = Some(exit);
                    self.undelivered = Some(event);
                    self.attention.set_own(attention::IDLE);
                    return Ok(());
                }
            };
        }
    }

    fn exception(&self, vector: u8, error: Option<u32>, address: u64) -> Event {
        Event { vector, source: Source::Exception, error, address, rip: self.rip }
    }

    /// Leaves an exception for the run loop to deliver before the next instruction, because the present one is complete.
    pub(super) fn deliver_later(&mut self, vector: u8, error: Option<u32>, address: u64) {
        self.undelivered = Some(self.exception(vector, error, address));
        self.attention.set_own(attention::IDLE);
    }

    /// INT n, INT3, INTO and INT1 from inside an instruction: faults are the instruction's own.
    pub(super) fn software_interrupt(&mut self, vector: u8, kind: Interrupt) -> Result<(), Trap> {
        if self.v86() && kind == Interrupt::Software && self.rflags & rflags::IOPL != rflags::IOPL {
            return Err(self.gp());
        }
        self.enter_event(&Event { vector, source: Source::Interrupt(kind), error: None, address: 0, rip: self.next_rip })
    }

    fn enter_event(&mut self, event: &Event) -> Result<(), Trap> {
        if self.cr0 & cr0::PE == 0 {
            self.enter_real(event)?;
        } else if self.long_mode() {
            self.enter_long(event)?;
        } else {
            self.enter_protected(event)?;
        }
        if event.source == Source::Interrupt(Interrupt::Nmi) {
            self.nmi_blocked = true;
        }
        if event.source == Source::Exception && event.vector == vector::DB {
            self.dr7 &= !DR7_GD;
        }
        self.halted = false;
        self.step_over = true;
        Ok(())
    }

    fn enter_real(&mut self, event: &Event) -> Result<(), Trap> {
        let at = u64::from(event.vector) * 4;
        if at + 3 > u64::from(self.idtr.limit) {
            return Err(self.raise_code(vector::GP, event.gate_error()));
        }
        let target = self.load_system::<u32>(self.idtr.base.wrapping_add(at))?;
        let mut stack = Stack::current(self, event.ext());
        let flags = event.pushed_flags(self.flags());
        stack.push(self, 2, flags)?;
        stack.push(self, 2, u64::from(self.seg[CS].selector))?;
        stack.push(self, 2, event.rip)?;
        self.regs[super::RSP] = stack.rsp();
        self.load_segment_real(CS, (target >> 16) as u16);
        self.load_flags(self.flags() & !(rflags::IF | rflags::TF | rflags::AC | rflags::RF));
        self.rip = u64::from(target & 0xffff);
        self.update_mode();
        Ok(())
    }

    /// Reads a gate and checks what is common to all modes.
    fn event_gate(&mut self, event: &Event, size: u64) -> Result<Descriptor, Trap> {
        let offset = u64::from(event.vector) * size;
        if offset + size - 1 > u64::from(self.idtr.limit) {
            return Err(self.raise_code(vector::GP, event.gate_error()));
        }
        let at = self.idtr.base.wrapping_add(offset);
        let raw = self.load_system::<u64>(at)?;
        let gate = Descriptor { raw, at, access: (raw >> 40) as u32 & 0xff };
        let good = match gate.system() {
            Some(kind::INTERRUPT_GATE | kind::TRAP_GATE) => true,
            Some(kind::TASK_GATE | kind::INTERRUPT_GATE16 | kind::TRAP_GATE16) => !self.long_mode(),
            _ => false,
        };
        if !good || event.is_software() && gate.dpl() < self.cpl {
            return Err(self.raise_code(vector::GP, event.gate_error()));
        }
        if !gate.is_present() {
            return Err(self.raise_code(vector::NP, event.gate_error()));
        }
        Ok(gate)
    }

    /// The gate's code segment, checked but for its size.
    fn event_code(&mut self, selector: u16, ext: u32) -> Result<Descriptor, Trap> {
        if is_null(selector) {
            return Err(self.raise_code(vector::GP, ext));
        }
        let code = self.descriptor(selector, vector::GP, ext)?;
        if !code.is_code() || code.dpl() > self.cpl {
            return Err(self.raise_code(vector::GP, selector_error(selector) | ext));
        }
        Ok(code)
    }

    fn enter_long(&mut self, event: &Event) -> Result<(), Trap> {
        let ext = event.ext();
        let gate = self.event_gate(event, 16)?;
        let high = self.load_system::<u64>(gate.at.wrapping_add(8))?;
        let rip = gate.gate_offset() | high << 32;
        let selector = gate.gate_selector();
        let mut code = self.event_code(selector, ext)?;
        if !code.is_long() || code.is_default_big() {
            return Err(self.raise_code(vector::GP, selector_error(selector) | ext));
        }
        if !code.is_present() {
            return Err(self.raise_code(vector::NP, selector_error(selector) | ext));
        }
        let inner = !code.is_conforming_code() && code.dpl() < self.cpl;
        let cpl = if inner { code.dpl() } else { self.cpl };
        let ist = gate.raw >> 32 & 7;
        let rsp = if ist != 0 {
            self.tss_stack_64(ist + 6, ext)?
        } else if inner {
            self.tss_stack_64(u64::from(cpl), ext)?
        } else {
            self.regs[super::RSP]
        };
        let mut stack = Stack::long(rsp & !0xf, cpl, ext);
        stack.push(self, 8, u64::from(self.seg[SS].selector))?;
        stack.push(self, 8, self.regs[super::RSP])?;
        let flags = event.pushed_flags(self.flags());
        stack.push(self, 8, flags)?;
        stack.push(self, 8, u64::from(self.seg[CS].selector))?;
        stack.push(self, 8, event.rip)?;
        if let Some(error) = event.error {
            stack.push(self, 8, u64::from(error))?;
        }
        if !is_canonical(rip) {
            return Err(self.raise_code(vector::GP, ext));
        }
        self.mark_accessed(&mut code)?;
        if inner {
            self.seg[SS] = null_segment(u16::from(cpl), cpl);
        }
        self.finish_event(&gate, &code, cpl, rip, stack.rsp());
        Ok(())
    }

    /// RSPn (`slot` 0 to 2) or ISTn (`slot` n + 6, n from 1) of the 64-bit TSS.
    pub(super) fn tss_stack_64(&mut self, slot: u64, ext: u32) -> Result<u64, Trap> {
        // RSP0 is at 4, IST1 at 36 (Intel SDM vol. 3 figure 8-11); slot 7 is IST1.
        let offset = if slot >= 7 { 36 + (slot - 7) * 8 } else { 4 + slot * 8 };
        if offset + 7 > u64::from(self.tr.limit) {
            return Err(self.raise_code(vector::TS, selector_error(self.tr.selector) | ext));
        }
        let rsp = self.load_system::<u64>(self.tr.base.wrapping_add(offset))?;
        if !is_canonical(rsp) {
            return Err(self.raise_code(vector::SS, ext));
        }
        Ok(rsp)
    }

    fn enter_protected(&mut self, event: &Event) -> Result<(), Trap> {
        let ext = event.ext();
        let gate = self.event_gate(event, 8)?;
        if gate.system() == Some(kind::TASK_GATE) {
            return self.enter_task(event, gate.gate_selector());
        }
        let size = if gate.access & 8 != 0 { 4 } else { 2 };
        let rip = if size == 4 { gate.gate_offset() } else { gate.gate_offset() & 0xffff };
        let selector = gate.gate_selector();
        let mut code = self.event_code(selector, ext)?;
        let inner = !code.is_conforming_code() && code.dpl() < self.cpl;
        if self.v86() && (!inner || code.dpl() != 0) {
            return Err(self.raise_code(vector::GP, selector_error(selector) | ext));
        }
        if !code.is_present() {
            return Err(self.raise_code(vector::NP, selector_error(selector) | ext));
        }
        let cpl = if inner { code.dpl() } else { self.cpl };
        let flags = event.pushed_flags(self.flags());
        let mut new_ss = None;
        let mut stack = if inner {
            let (ss, mut descriptor, esp) = self.inner_stack(cpl, ext)?;
            self.mark_accessed(&mut descriptor)?;
            let segment = descriptor.segment(ss);
            new_ss = Some(segment);
            let mut stack = Stack::legacy(segment, esp, cpl, selector_error(ss) | ext);
            if self.v86() {
                for segment in [GS, FS, DS, ES] {
                    stack.push(self, size, u64::from(self.seg[segment].selector))?;
                }
            }
            stack.push(self, size, u64::from(self.seg[SS].selector))?;
            stack.push(self, size, self.regs[super::RSP])?;
            stack
        } else {
            Stack::current(self, ext)
        };
        stack.push(self, size, flags)?;
        stack.push(self, size, u64::from(self.seg[CS].selector))?;
        stack.push(self, size, event.rip)?;
        if let Some(error) = event.error {
            stack.push(self, size, u64::from(error))?;
        }
        self.check_target(&code, rip, ext)?;
        self.mark_accessed(&mut code)?;
        if self.v86() {
            for segment in [GS, FS, DS, ES] {
                self.seg[segment] = null_segment(0, 0);
            }
        }
        if let Some(segment) = new_ss {
            self.seg[SS] = segment;
        }
        self.finish_event(&gate, &code, cpl, rip, stack.rsp());
        Ok(())
    }

    /// Commits CS, RIP, RSP and flags after the last check.
    fn finish_event(&mut self, gate: &Descriptor, code: &Descriptor, cpl: u8, rip: u64, rsp: u64) {
        let mut cleared = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
        // The lowest type bit tells trap gates from interrupt gates.
        if gate.access & 1 == 0 {
            cleared |= rflags::IF;
        }
        self.load_flags(self.flags() & !cleared);
        self.seg[CS] = code.segment(gate.gate_selector() & !3 | u16::from(cpl));
        self.regs[super::RSP] = rsp;
        self.rip = rip;
        self.update_mode();
    }

    /// SS and ESP for privilege level `cpl` from a 16- or 32-bit TSS, checked (Intel SDM vol. 2, CALL and INT n).
    pub(super) fn inner_stack(&mut self, cpl: u8, ext: u32) -> Result<(u16, Descriptor, u64), Trap> {
        let big = self.tr.access & 8 != 0;
        let offset = if big { 4 + u64::from(cpl) * 8 } else { 2 + u64::from(cpl) * 4 };
        let last = offset + if big { 5 } else { 3 };
        if last > u64::from(self.tr.limit) {
            return Err(self.raise_code(vector::TS, selector_error(self.tr.selector) | ext));
        }
        let at = self.tr.base.wrapping_add(offset);
        let (esp, ss) = if big {
            (u64::from(self.load_system::<u32>(at)?), self.load_system::<u16>(at.wrapping_add(4))?)
        } else {
            (u64::from(self.load_system::<u16>(at)?), self.load_system::<u16>(at.wrapping_add(2))?)
        };
        if is_null(ss) {
            return Err(self.raise_code(vector::TS, ext));
        }
        let descriptor = self.descriptor(ss, vector::TS, ext)?;
        if rpl(ss) != cpl || descriptor.dpl() != cpl || !descriptor.is_writable_data() {
            return Err(self.raise_code(vector::TS, selector_error(ss) | ext));
        }
        if !descriptor.is_present() {
            return Err(self.raise_code(vector::SS, selector_error(ss) | ext));
        }
        Ok((ss, descriptor, esp))
    }

    /// A task gate in the IDT.
    fn enter_task(&mut self, event: &Event, selector: u16) -> Result<(), Trap> {
        let ext = event.ext();
        let tss = self.task_descriptor(selector, ext)?;
        let flags = event.pushed_flags(self.flags());
        self.switch_task(selector, tss, Reason::Event, event.rip, flags, ext, event.error)
    }

    /// Sets RFLAGS and everything that follows from it: stepping, and interrupts that were waiting.
    pub fn load_flags(&mut self, flags: u64) {
        let enabled = flags & !self.rflags & rflags::IF != 0;
        self.set_flags(flags);
        if flags & rflags::TF != 0 {
            self.attention.set_own(attention::STEP);
        }
        if enabled && self.lapic.as_ref().is_some_and(|lapic| lapic.has_work()) {
            self.attention.set_own(attention::APIC);
        }
    }
}
