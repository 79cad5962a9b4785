//! Far transfers of control: JMP and CALL to other segments, through call gates and to tasks, RETF, and software interrupts.
//!
//! Intel SDM vol. 2 (CALL, JMP, RET, INT n) and vol. 3 section 5.8 (privilege checks of transfers). IRET is in `iret`.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::descriptor::{Descriptor, is_null, kind, null_segment, rpl, selector_error};
use super::event::Interrupt;
use super::stack::Stack;
use super::task::Reason;
use super::{MEMORY, RSP};
use crate::cpu::{CS, Cpu, DS, ES, FS, GS, SS, access, rflags, vector};
use crate::op::{Flow, Op, Slow, Trap, slow};

/// Makes the op for an instruction of this file and of `iret`.
pub(super) fn lower(insn: &Instruction, op: &mut Op) -> bool {
    let code = insn.code();
    match code {
        Code::Jmp_ptr1616 | Code::Jmp_ptr1632 | Code::Call_ptr1616 | Code::Call_ptr1632 => {
            // Selector above the offset.
            op.imm = if insn.op0_kind() == OpKind::FarBranch16 {
                u64::from(insn.far_branch16()) | u64::from(insn.far_branch_selector()) << 32
            } else {
                u64::from(insn.far_branch32()) | u64::from(insn.far_branch_selector()) << 32
            };
            op.size = if matches!(code, Code::Jmp_ptr1616 | Code::Call_ptr1616) { 2 } else { 4 };
        }
        Code::Jmp_m1616 | Code::Call_m1616 | Code::Retfw | Code::Retfw_imm16 | Code::Iretw => op.size = 2,
        Code::Jmp_m1632 | Code::Call_m1632 | Code::Retfd | Code::Retfd_imm16 | Code::Iretd => op.size = 4,
        Code::Jmp_m1664 | Code::Call_m1664 | Code::Retfq | Code::Retfq_imm16 | Code::Iretq => op.size = 8,
        Code::Int_imm8 | Code::Int3 | Code::Into | Code::Int1 => {}
        _ => return false,
    }
    if insn.op_count() > 0 {
        match insn.op0_kind() {
            OpKind::Memory => op.aux |= MEMORY,
            OpKind::Immediate8 => op.imm = insn.immediate8().into(),
            OpKind::Immediate16 => op.imm = insn.immediate16().into(),
            _ => {}
        }
    }
    op.run = match insn.mnemonic() {
        Mnemonic::Jmp => slow::<JumpFar>,
        Mnemonic::Call => slow::<CallFar>,
        Mnemonic::Retf => slow::<ReturnFar>,
        Mnemonic::Int => slow::<Int>,
        Mnemonic::Int3 => slow::<Int3>,
        Mnemonic::Into => slow::<Into>,
        Mnemonic::Int1 => slow::<Int1>,
        _ => slow::<super::iret::Iret>,
    };
    true
}

struct Int;
impl Slow for Int {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        cpu.software_interrupt(op.imm as u8, Interrupt::Software)?;
        Ok(Flow::Jumped)
    }
}

struct Int3;
impl Slow for Int3 {
    fn execute(cpu: &mut Cpu, _op: &Op) -> Result<Flow, Trap> {
        cpu.software_interrupt(vector::BP, Interrupt::Trap)?;
        Ok(Flow::Jumped)
    }
}

struct Into;
impl Slow for Into {
    fn execute(cpu: &mut Cpu, _op: &Op) -> Result<Flow, Trap> {
        if cpu.status() & rflags::OF == 0 {
            return Ok(Flow::Leave);
        }
        cpu.software_interrupt(vector::OF, Interrupt::Trap)?;
        Ok(Flow::Jumped)
    }
}

struct Int1;
impl Slow for Int1 {
    fn execute(cpu: &mut Cpu, _op: &Op) -> Result<Flow, Trap> {
        cpu.software_interrupt(vector::DB, Interrupt::Icebp)?;
        Ok(Flow::Jumped)
    }
}

/// Target of a far JMP or CALL: selector and offset, from the instruction or from memory.
fn target(cpu: &mut Cpu, op: &Op) -> Result<(u16, u64), Trap> {
    if op.aux & MEMORY == 0 {
        return Ok(((op.imm >> 32) as u16, op.imm & 0xffff_ffff));
    }
    let size = u64::from(op.size);
    let at = cpu.operand_address(op, size + 2, false)?;
    let offset = cpu.load_sized(at, size)?;
    Ok((cpu.load::<u16>(at.wrapping_add(size))?, offset))
}

struct JumpFar;
impl Slow for JumpFar {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let (selector, offset) = target(cpu, op)?;
        if !cpu.protected() {
            cpu.check_real_target(offset)?;
            cpu.load_segment_real(CS, selector);
            cpu.rip = offset;
            cpu.update_mode();
            return Ok(Flow::Jumped);
        }
        let descriptor = cpu.transfer_descriptor(selector)?;
        match descriptor.system() {
            None => {
                cpu.check_direct_target(selector, &descriptor)?;
                cpu.enter_code(selector, descriptor, offset)?;
            }
            Some(kind::CALL_GATE | kind::CALL_GATE16) => {
                let gate = cpu.call_gate(selector, &descriptor)?;
                let conforming = gate.code.is_conforming_code();
                if !conforming && gate.code.dpl() != cpu.cpl || conforming && gate.code.dpl() > cpu.cpl {
                    return Err(cpu.raise_code(vector::GP, selector_error(gate.selector)));
                }
                cpu.enter_code(gate.selector, gate.code, gate.offset)?;
            }
            _ => cpu.transfer_to_task(selector, &descriptor, Reason::Jump)?,
        }
        Ok(Flow::Jumped)
    }
}

struct CallFar;
impl Slow for CallFar {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let (selector, offset) = target(cpu, op)?;
        let size = u64::from(op.size);
        if !cpu.protected() {
            let mut stack = Stack::current(cpu, 0);
            stack.push(cpu, size, cpu.seg[CS].selector.into())?;
            stack.push(cpu, size, cpu.next_rip)?;
            cpu.check_real_target(offset)?;
            cpu.load_segment_real(CS, selector);
            cpu.regs[RSP] = stack.rsp();
            cpu.rip = offset;
            cpu.update_mode();
            return Ok(Flow::Jumped);
        }
        let descriptor = cpu.transfer_descriptor(selector)?;
        match descriptor.system() {
            None => {
                cpu.check_direct_target(selector, &descriptor)?;
                cpu.call_code(selector, descriptor, offset, size)?;
            }
            Some(kind::CALL_GATE | kind::CALL_GATE16) => {
                let gate = cpu.call_gate(selector, &descriptor)?;
                if !gate.code.is_conforming_code() && gate.code.dpl() < cpu.cpl {
                    cpu.call_inner(&gate)?;
                } else {
                    cpu.call_code(gate.selector, gate.code, gate.offset, gate.size)?;
                }
            }
            _ => cpu.transfer_to_task(selector, &descriptor, Reason::Call)?,
        }
        Ok(Flow::Jumped)
    }
}

struct ReturnFar;
impl Slow for ReturnFar {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let size = u64::from(op.size);
        let mut stack = Stack::current(cpu, 0);
        let rip = stack.pop(cpu, size)?;
        let selector = stack.pop(cpu, size)? as u16;
        if !cpu.protected() {
            cpu.check_real_target(rip)?;
            stack.release(op.imm);
            cpu.load_segment_real(CS, selector);
            cpu.regs[RSP] = stack.rsp();
            cpu.rip = rip;
            cpu.update_mode();
            return Ok(Flow::Jumped);
        }
        let mut code = cpu.return_descriptor(selector)?;
        stack.release(op.imm);
        if rpl(selector) == cpu.cpl {
            cpu.check_target(&code, rip, 0)?;
            cpu.mark_accessed(&mut code)?;
            cpu.seg[CS] = code.segment(selector);
            cpu.regs[RSP] = stack.rsp();
            cpu.rip = rip;
            cpu.update_mode();
        } else {
            let rsp = stack.pop(cpu, size)?;
            let ss = stack.pop(cpu, size)? as u16;
            let flags = cpu.flags();
            cpu.return_outer(selector, code, rip, ss, rsp, flags, op.imm)?;
        }
        Ok(Flow::Jumped)
    }
}

/// A call gate that was checked, and the code it leads to.
struct CallGate {
    selector: u16,
    code: Descriptor,
    offset: u64,
    /// Size of what is pushed.
    size: u64,
    /// Words to copy to the inner stack.
    parameters: u64,
}

impl Cpu {
    /// EIP beyond the limit in real and virtual-8086 mode.
    pub(super) fn check_real_target(&mut self, rip: u64) -> Result<(), Trap> {
        if rip > u64::from(self.seg[CS].limit) { Err(self.gp()) } else { Ok(()) }
    }

    /// The descriptor of a far JMP or CALL.
    fn transfer_descriptor(&mut self, selector: u16) -> Result<Descriptor, Trap> {
        if is_null(selector) {
            return Err(self.gp());
        }
        let descriptor = self.descriptor(selector, vector::GP, 0)?;
        let good = match descriptor.system() {
            None => descriptor.is_code(),
            Some(kind::CALL_GATE) => true,
            Some(kind::CALL_GATE16 | kind::TASK_GATE | kind::TSS16_AVAILABLE | kind::TSS_AVAILABLE) => !self.long_mode(),
            _ => false,
        };
        if good { Ok(descriptor) } else { Err(self.raise_code(vector::GP, selector_error(selector))) }
    }

    /// Privilege checks of a direct JMP or CALL to a code segment.
    fn check_direct_target(&mut self, selector: u16, code: &Descriptor) -> Result<(), Trap> {
        let allowed = if code.is_conforming_code() { code.dpl() <= self.cpl } else { rpl(selector) <= self.cpl && code.dpl() == self.cpl };
        if !allowed {
            return Err(self.raise_code(vector::GP, selector_error(selector)));
        }
        self.check_code_size(selector, code)?;
        if !code.is_present() {
            return Err(self.raise_code(vector::NP, selector_error(selector)));
        }
        Ok(())
    }

    /// Goes on at `rip` of a code segment with the same privilege.
    fn enter_code(&mut self, selector: u16, mut code: Descriptor, rip: u64) -> Result<(), Trap> {
        self.check_target(&code, rip, 0)?;
        self.mark_accessed(&mut code)?;
        self.seg[CS] = code.segment(selector & !3 | u16::from(self.cpl));
        self.rip = rip;
        self.update_mode();
        Ok(())
    }

    /// Calls code with the same privilege, pushing words of `size` bytes.
    fn call_code(&mut self, selector: u16, code: Descriptor, rip: u64, size: u64) -> Result<(), Trap> {
        let mut stack = Stack::current(self, 0);
        stack.push(self, size, self.seg[CS].selector.into())?;
        stack.push(self, size, self.next_rip)?;
        self.enter_code(selector, code, rip)?;
        self.regs[RSP] = stack.rsp();
        Ok(())
    }

    fn call_gate(&mut self, selector: u16, gate: &Descriptor) -> Result<CallGate, Trap> {
        if gate.dpl() < self.cpl.max(rpl(selector)) {
            return Err(self.raise_code(vector::GP, selector_error(selector)));
        }
        if !gate.is_present() {
            return Err(self.raise_code(vector::NP, selector_error(selector)));
        }
        let mut offset = gate.gate_offset();
        let mut size = if gate.access & 8 != 0 { 4 } else { 2 };
        if size == 2 {
            offset &= 0xffff;
        }
        if self.long_mode() {
            offset |= self.descriptor_high(selector, gate)? << 32;
            size = 8;
        }
        let parameters = gate.raw >> 32 & 0x1f;
        let selector = gate.gate_selector();
        if is_null(selector) {
            return Err(self.gp());
        }
        let code = self.descriptor(selector, vector::GP, 0)?;
        let sized = !self.long_mode() || code.is_long() && !code.is_default_big();
        if !code.is_code() || code.dpl() > self.cpl || !sized {
            return Err(self.raise_code(vector::GP, selector_error(selector)));
        }
        if !code.is_present() {
            return Err(self.raise_code(vector::NP, selector_error(selector)));
        }
        Ok(CallGate { selector, code, offset, size, parameters })
    }

    /// CALL through a gate to more privilege.
    fn call_inner(&mut self, gate: &CallGate) -> Result<(), Trap> {
        let cpl = gate.code.dpl();
        let (old_ss, old_rsp) = (self.seg[SS].selector, self.regs[RSP]);
        let (segment, mut stack) = if self.long_mode() {
            let rsp = self.tss_stack_64(cpl.into(), 0)?;
            (null_segment(cpl.into(), cpl), Stack::long(rsp, cpl, 0))
        } else {
            let (ss, mut descriptor, esp) = self.inner_stack(cpl, 0)?;
            self.mark_accessed(&mut descriptor)?;
            let segment = descriptor.segment(ss);
            (segment, Stack::legacy(segment, esp, cpl, selector_error(ss)))
        };
        stack.push(self, gate.size, old_ss.into())?;
        stack.push(self, gate.size, old_rsp)?;
        if !self.long_mode() {
            let mut parameters = [0; 32];
            let mut from = Stack::current(self, 0);
            for parameter in &mut parameters[..gate.parameters as usize] {
                *parameter = from.pop(self, gate.size)?;
            }
            for &parameter in parameters[..gate.parameters as usize].iter().rev() {
                stack.push(self, gate.size, parameter)?;
            }
        }
        stack.push(self, gate.size, self.seg[CS].selector.into())?;
        stack.push(self, gate.size, self.next_rip)?;
        self.check_target(&gate.code, gate.offset, 0)?;
        let mut code = gate.code;
        self.mark_accessed(&mut code)?;
        self.seg[SS] = segment;
        self.seg[CS] = code.segment(gate.selector & !3 | u16::from(cpl));
        self.regs[RSP] = stack.rsp();
        self.rip = gate.offset;
        self.update_mode();
        Ok(())
    }

    /// Far JMP or CALL to a TSS or a task gate.
    fn transfer_to_task(&mut self, selector: u16, descriptor: &Descriptor, reason: Reason) -> Result<(), Trap> {
        if descriptor.dpl() < self.cpl.max(rpl(selector)) {
            return Err(self.raise_code(vector::GP, selector_error(selector)));
        }
        if !descriptor.is_present() {
            return Err(self.raise_code(vector::NP, selector_error(selector)));
        }
        let selector = if descriptor.system() == Some(kind::TASK_GATE) { descriptor.gate_selector() } else { selector };
        let tss = self.task_descriptor(selector, 0)?;
        let (rip, flags) = (self.next_rip, self.flags());
        self.switch_task(selector, tss, reason, rip, flags, 0, None)
    }

    /// The code segment that RETF or IRET returns to, checked but for the target address.
    pub(super) fn return_descriptor(&mut self, selector: u16) -> Result<Descriptor, Trap> {
        if is_null(selector) {
            return Err(self.gp());
        }
        let code = self.descriptor(selector, vector::GP, 0)?;
        let level = rpl(selector);
        let allowed = if code.is_conforming_code() { code.dpl() <= level } else { code.dpl() == level };
        if !code.is_code() || level < self.cpl || !allowed {
            return Err(self.raise_code(vector::GP, selector_error(selector)));
        }
        self.check_code_size(selector, &code)?;
        if !code.is_present() {
            return Err(self.raise_code(vector::NP, selector_error(selector)));
        }
        Ok(code)
    }

    /// Returns to code whose stack was on ours: less privilege, or any IRETQ. `flags` is what RFLAGS becomes, `release` what
    /// the outer stack gives back.
    #[allow(clippy::too_many_arguments)] // All of an interrupt frame.
    pub(super) fn return_outer(
        &mut self,
        selector: u16,
        mut code: Descriptor,
        rip: u64,
        ss: u16,
        rsp: u64,
        flags: u64,
        release: u64,
    ) -> Result<(), Trap> {
        let level = rpl(selector);
        let to_long = self.long_mode() && code.is_long();
        let segment = if is_null(ss) {
            if !to_long || level == 3 || rpl(ss) != level {
                return Err(self.gp());
            }
            null_segment(ss, level)
        } else {
            let mut descriptor = self.descriptor(ss, vector::GP, 0)?;
            if rpl(ss) != level || !descriptor.is_writable_data() || descriptor.dpl() != level {
                return Err(self.raise_code(vector::GP, selector_error(ss)));
            }
            if !descriptor.is_present() {
                return Err(self.raise_code(vector::SS, selector_error(ss)));
            }
            self.mark_accessed(&mut descriptor)?;
            descriptor.segment(ss)
        };
        self.check_target(&code, rip, 0)?;
        self.mark_accessed(&mut code)?;
        let outer = level > self.cpl;
        self.load_flags(flags);
        self.seg[SS] = segment;
        self.seg[CS] = code.segment(selector);
        self.regs[RSP] = if to_long {
            rsp.wrapping_add(release)
        } else if segment.access & access::DB != 0 {
            rsp.wrapping_add(release) & 0xffff_ffff
        } else {
            // The upper half of ESP is not loaded, a known property of IRET to 16-bit stacks.
            self.regs[RSP] & 0xffff_0000 | rsp.wrapping_add(release) & 0xffff
        };
        self.rip = rip;
        if outer {
            self.drop_inner_segments(level);
        }
        self.update_mode();
        Ok(())
    }

    /// After a return to privilege level `level`: data segments that it may not use become null.
    fn drop_inner_segments(&mut self, level: u8) {
        for segment in [ES, DS, FS, GS] {
            let s = &mut self.seg[segment];
            let conforming = s.access & 0xc == 0xc;
            let dpl = (s.access >> access::DPL_SHIFT) as u8 & 3;
            if s.access & access::UNUSABLE == 0 && !conforming && dpl < level {
                s.selector = 0;
                s.access |= access::UNUSABLE;
            }
        }
    }
}
