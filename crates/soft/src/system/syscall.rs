//! SYSCALL, SYSRET, SYSENTER and SYSEXIT.
//!
//! Intel SDM vol. 2; SYSCALL exists in 64-bit code only, as on Intel's processors.

use iced_x86::{Code, Instruction, Mnemonic};
use vmm::Segment;

use super::descriptor::{FLAT_CODE, FLAT_DATA, is_null};
use super::{RCX, RDX, RSP, is_canonical};
use crate::cpu::{CS, Cpu, SS, access, efer, rflags};
use crate::op::{Flow, Op, Slow, Trap, slow};

/// R11, which holds RFLAGS.
const R11: usize = 11;
/// What SYSRET takes from R11: all but RF, VM and reserved bits.
const SYSRET_FLAGS: u64 = 0x003c_7fd7;

/// Makes the op for an instruction of this file.
pub(super) fn lower(insn: &Instruction, op: &mut Op) -> bool {
    op.run = match insn.mnemonic() {
        Mnemonic::Syscall => slow::<Syscall>,
        Mnemonic::Sysret | Mnemonic::Sysretq => slow::<Sysret>,
        Mnemonic::Sysenter => slow::<Sysenter>,
        Mnemonic::Sysexit | Mnemonic::Sysexitq => slow::<Sysexit>,
        _ => return false,
    };
    op.size = if matches!(insn.code(), Code::Sysretq | Code::Sysexitq) { 8 } else { 4 };
    true
}

fn flat_code(selector: u16, dpl: u8, long: bool) -> Segment {
    let size = if long { access::L } else { access::DB };
    Segment { selector, limit: u32::MAX, access: FLAT_CODE | size | u32::from(dpl) << access::DPL_SHIFT, base: 0 }
}

fn flat_stack(selector: u16, dpl: u8) -> Segment {
    Segment { selector, limit: u32::MAX, access: FLAT_DATA | u32::from(dpl) << access::DPL_SHIFT, base: 0 }
}

struct Syscall;
impl Slow for Syscall {
    fn execute(cpu: &mut Cpu, _op: &Op) -> Result<Flow, Trap> {
        if !cpu.is_64bit() || cpu.efer & efer::SCE == 0 {
            return Err(cpu.ud());
        }
        let flags = cpu.flags();
        cpu.regs[RCX] = cpu.next_rip;
        cpu.regs[R11] = flags & !rflags::RF;
        let selector = (cpu.msr.star >> 32) as u16 & 0xfffc;
        cpu.seg[CS] = flat_code(selector, 0, true);
        cpu.seg[SS] = flat_stack(selector.wrapping_add(8), 0);
        cpu.load_flags(flags & !cpu.msr.sfmask & !rflags::RF);
        // A handler entered with TF cleared is not stepped into.
        cpu.step_over = true;
        cpu.rip = cpu.msr.lstar;
        cpu.update_mode();
        Ok(Flow::Jumped)
    }
}

struct Sysret;
impl Slow for Sysret {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        if !cpu.is_64bit() || cpu.efer & efer::SCE == 0 {
            return Err(cpu.ud());
        }
        cpu.require_cpl0()?;
        let rip = cpu.regs[RCX];
        let long = op.size == 8;
        if long && !is_canonical(rip) {
            return Err(cpu.gp());
        }
        let base = (cpu.msr.star >> 48) as u16;
        let code = if long { base.wrapping_add(16) } else { base };
        cpu.seg[CS] = flat_code(code | 3, 3, long);
        cpu.seg[SS] = flat_stack(base.wrapping_add(8) | 3, 3);
        cpu.load_flags(cpu.regs[R11] & SYSRET_FLAGS);
        cpu.rip = if long { rip } else { rip & 0xffff_ffff };
        cpu.update_mode();
        Ok(Flow::Jumped)
    }
}

struct Sysenter;
impl Slow for Sysenter {
    fn execute(cpu: &mut Cpu, _op: &Op) -> Result<Flow, Trap> {
        let selector = cpu.msr.sysenter_cs as u16 & 0xfffc;
        if cpu.cr0 & crate::cpu::cr0::PE == 0 || is_null(selector) {
            return Err(cpu.gp());
        }
        let long = cpu.long_mode();
        let mask = if long { u64::MAX } else { 0xffff_ffff };
        cpu.load_flags(cpu.flags() & !(rflags::VM | rflags::IF | rflags::RF));
        cpu.seg[CS] = flat_code(selector, 0, long);
        cpu.seg[SS] = flat_stack(selector.wrapping_add(8), 0);
        cpu.regs[RSP] = cpu.msr.sysenter_esp & mask;
        cpu.rip = cpu.msr.sysenter_eip & mask;
        cpu.update_mode();
        Ok(Flow::Jumped)
    }
}

struct Sysexit;
impl Slow for Sysexit {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let base = cpu.msr.sysenter_cs as u16 & 0xfffc;
        if cpu.cr0 & crate::cpu::cr0::PE == 0 || is_null(base) || cpu.cpl != 0 {
            return Err(cpu.gp());
        }
        let (rip, rsp) = (cpu.regs[RDX], cpu.regs[RCX]);
        let long = op.size == 8;
        if long && !(is_canonical(rip) && is_canonical(rsp)) {
            return Err(cpu.gp());
        }
        let (code, stack) = if long { (32, 40) } else { (16, 24) };
        cpu.seg[CS] = flat_code(base.wrapping_add(code) | 3, 3, long);
        cpu.seg[SS] = flat_stack(base.wrapping_add(stack) | 3, 3);
        cpu.regs[RSP] = if long { rsp } else { rsp & 0xffff_ffff };
        cpu.rip = if long { rip } else { rip & 0xffff_ffff };
        cpu.update_mode();
        Ok(Flow::Jumped)
    }
}
