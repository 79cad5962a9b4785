//! Segment registers, descriptor tables, and the instructions that look into descriptors.
//!
//! Intel SDM vol. 2: MOV, PUSH, POP, LDS/LES/LFS/LGS/LSS, LGDT/LIDT/SGDT/SIDT, LLDT/SLDT, LTR/STR, LAR, LSL, VERR, VERW, ARPL,
//! SWAPGS, RDFSBASE and its siblings.

use iced_x86::{Code, Instruction, Mnemonic, Register};

use super::descriptor::{BUSY, is_null, kind, null_segment, rpl, selector_error};
use super::stack::Stack;
use super::{MEMORY, RSP, is_canonical, register_or_memory};
use crate::attention;
use crate::block::Lowering;
use crate::cpu::{Cpu, FS, GS, REG_MASK, SS, Width, access, cr4, rflags, vector};
use crate::op::{Flow, Op, Slow, Trap, slow};

/// Makes the op for an instruction of this file.
pub(super) fn lower(lowering: &Lowering, insn: &Instruction, op: &mut Op) -> bool {
    let tables = if lowering.width == Width::Bits64 { 8 } else { 4 };
    match insn.mnemonic() {
        Mnemonic::Mov if insn.op1_register().is_segment_register() => {
            op.b = insn.op1_register().number() as u8;
            register_or_memory(insn, 0, op);
            op.size = if op.aux & MEMORY != 0 { 2 } else { insn.op0_register().size() as u8 };
            op.run = slow::<MovFromSegment>;
        }
        Mnemonic::Mov if insn.op0_register().is_segment_register() => {
            op.b = insn.op0_register().number() as u8;
            register_or_memory(insn, 1, op);
            op.run = slow::<MovToSegment>;
        }
        Mnemonic::Push | Mnemonic::Pop if insn.op0_register().is_segment_register() => {
            op.b = insn.op0_register().number() as u8;
            op.size = segment_push_size(insn.code());
            op.run = if insn.mnemonic() == Mnemonic::Push { slow::<PushSegment> } else { slow::<PopSegment> };
        }
        Mnemonic::Les | Mnemonic::Lds | Mnemonic::Lss | Mnemonic::Lfs | Mnemonic::Lgs => {
            op.a = insn.op0_register().number() as u8;
            op.size = insn.op0_register().size() as u8;
            op.b = match insn.mnemonic() {
                Mnemonic::Les => Register::ES,
                Mnemonic::Lds => Register::DS,
                Mnemonic::Lss => Register::SS,
                Mnemonic::Lfs => Register::FS,
                _ => Register::GS,
            }
            .number() as u8;
            op.run = slow::<LoadFarPointer>;
        }
        Mnemonic::Lgdt | Mnemonic::Lidt => {
            op.size = match insn.code() {
                Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 => 2,
                _ => tables,
            };
            op.run = if insn.mnemonic() == Mnemonic::Lgdt { slow::<LoadTable<true>> } else { slow::<LoadTable<false>> };
        }
        Mnemonic::Sgdt | Mnemonic::Sidt => {
            op.size = tables;
            op.run = if insn.mnemonic() == Mnemonic::Sgdt { slow::<StoreTable<true>> } else { slow::<StoreTable<false>> };
        }
        Mnemonic::Lldt | Mnemonic::Ltr => {
            register_or_memory(insn, 0, op);
            op.run = if insn.mnemonic() == Mnemonic::Lldt { slow::<Lldt> } else { slow::<Ltr> };
        }
        Mnemonic::Sldt | Mnemonic::Str => {
            register_or_memory(insn, 0, op);
            op.size = if op.aux & MEMORY != 0 { 2 } else { insn.op0_register().size() as u8 };
            op.run = if insn.mnemonic() == Mnemonic::Sldt { slow::<StoreSystemSegment<true>> } else { slow::<StoreSystemSegment<false>> };
        }
        Mnemonic::Lar | Mnemonic::Lsl => {
            op.b = insn.op0_register().number() as u8;
            op.size = insn.op0_register().size() as u8;
            register_or_memory(insn, 1, op);
            op.run = if insn.mnemonic() == Mnemonic::Lar { slow::<LoadAccess<true>> } else { slow::<LoadAccess<false>> };
        }
        Mnemonic::Verr | Mnemonic::Verw => {
            register_or_memory(insn, 0, op);
            op.run = if insn.mnemonic() == Mnemonic::Verw { slow::<Verify<true>> } else { slow::<Verify<false>> };
        }
        Mnemonic::Arpl => {
            register_or_memory(insn, 0, op);
            op.b = insn.op1_register().number() as u8;
            op.run = slow::<Arpl>;
        }
        Mnemonic::Swapgs => op.run = slow::<Swapgs>,
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            op.a = insn.op0_register().number() as u8;
            op.size = insn.op0_register().size() as u8;
            op.b = if matches!(insn.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Wrfsbase) { FS } else { GS } as u8;
            op.run = if matches!(insn.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) { slow::<ReadBase> } else { slow::<WriteBase> };
        }
        _ => return false,
    }
    true
}

/// Operand size of PUSH and POP of a segment register.
fn segment_push_size(code: Code) -> u8 {
    match code {
        Code::Pushw_ES | Code::Pushw_CS | Code::Pushw_SS | Code::Pushw_DS | Code::Pushw_FS | Code::Pushw_GS => 2,
        Code::Popw_ES | Code::Popw_SS | Code::Popw_DS | Code::Popw_FS | Code::Popw_GS => 2,
        Code::Pushq_FS | Code::Pushq_GS | Code::Popq_FS | Code::Popq_GS => 8,
        _ => 4,
    }
}

impl Cpu {
    /// Loads a segment register; after SS, one more instruction runs before interrupts and debug traps.
    fn load_segment_shadowed(&mut self, segment: usize, selector: u16) -> Result<Flow, Trap> {
        self.load_segment(segment, selector)?;
        if segment == SS {
            self.attention.set_own(attention::SHADOW);
            self.step_over = true;
            self.update_mode();
        }
        Ok(Flow::Leave)
    }
}

struct MovFromSegment;
impl Slow for MovFromSegment {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let selector = cpu.seg[usize::from(op.b) % 6].selector;
        cpu.set_operand_16(op, selector.into())?;
        Ok(Flow::Next)
    }
}

struct MovToSegment;
impl Slow for MovToSegment {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let selector = cpu.operand_16(op)?;
        cpu.load_segment_shadowed(usize::from(op.b) % 6, selector)
    }
}

struct PushSegment;
impl Slow for PushSegment {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let selector = cpu.seg[usize::from(op.b) % 6].selector;
        let mut stack = Stack::current(cpu, 0);
        stack.push(cpu, op.size.into(), selector.into())?;
        cpu.regs[RSP] = stack.rsp();
        Ok(Flow::Next)
    }
}

struct PopSegment;
impl Slow for PopSegment {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let mut stack = Stack::current(cpu, 0);
        let selector = stack.pop(cpu, op.size.into())? as u16;
        let flow = cpu.load_segment_shadowed(usize::from(op.b) % 6, selector)?;
        cpu.regs[RSP] = stack.rsp();
        Ok(flow)
    }
}

struct LoadFarPointer;
impl Slow for LoadFarPointer {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let size = u64::from(op.size);
        let at = cpu.operand_address(op, size + 2, false)?;
        let offset = cpu.load_sized(at, size)?;
        let selector = cpu.load::<u16>(at.wrapping_add(size))?;
        let segment = usize::from(op.b) % 6;
        cpu.load_segment(segment, selector)?;
        cpu.set_register(op.a, op.size, offset);
        if segment == SS {
            cpu.update_mode();
        }
        Ok(Flow::Leave)
    }
}

/// LGDT and LIDT.
struct LoadTable<const GDT: bool>;
impl<const GDT: bool> Slow for LoadTable<GDT> {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        cpu.require_cpl0()?;
        let at = cpu.operand_address(op, if op.size == 8 { 10 } else { 6 }, false)?;
        let limit = cpu.load::<u16>(at)?;
        let base = match op.size {
            8 => cpu.load::<u64>(at.wrapping_add(2))?,
            4 => cpu.load::<u32>(at.wrapping_add(2))?.into(),
            // With 16-bit operands the base has 24 bits.
            _ => (cpu.load::<u32>(at.wrapping_add(2))? & 0xff_ffff).into(),
        };
        if !is_canonical(base) {
            return Err(cpu.gp());
        }
        let table = vmm::DescriptorTable { base, limit };
        if GDT {
            cpu.gdtr = table;
        } else {
            cpu.idtr = table;
        }
        Ok(Flow::Next)
    }
}

/// SGDT and SIDT.
struct StoreTable<const GDT: bool>;
impl<const GDT: bool> Slow for StoreTable<GDT> {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let table = if GDT { cpu.gdtr } else { cpu.idtr };
        let mut bytes = [0; 10];
        bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
        bytes[2..].copy_from_slice(&table.base.to_le_bytes());
        let len = if op.size == 8 { 10 } else { 6 };
        let at = cpu.operand_address(op, len as u64, true)?;
        cpu.store_bytes(at, &bytes[..len])?;
        Ok(Flow::Next)
    }
}

struct Lldt;
impl Slow for Lldt {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        cpu.require_protected()?;
        cpu.require_cpl0()?;
        let selector = cpu.operand_16(op)?;
        cpu.ldtr = cpu.checked_ldt(selector, vector::GP)?;
        Ok(Flow::Next)
    }
}

impl Cpu {
    /// What LDTR holds after loading a selector; a wrong one is fault `wrong` (#GP for LLDT, #TS in a task switch).
    pub(super) fn checked_ldt(&mut self, selector: u16, wrong: u8) -> Result<vmm::Segment, Trap> {
        if is_null(selector) {
            return Ok(null_segment(selector, 0));
        }
        if selector & 4 != 0 {
            return Err(self.raise_code(wrong, selector_error(selector)));
        }
        let descriptor = self.descriptor(selector, wrong, 0)?;
        if descriptor.system() != Some(kind::LDT) {
            return Err(self.raise_code(wrong, selector_error(selector)));
        }
        if !descriptor.is_present() {
            let vector = if wrong == vector::GP { vector::NP } else { wrong };
            return Err(self.raise_code(vector, selector_error(selector)));
        }
        let mut segment = descriptor.segment(selector);
        if self.long_mode() {
            segment.base |= self.descriptor_high(selector, &descriptor)? << 32;
        }
        Ok(segment)
    }
}

struct Ltr;
impl Slow for Ltr {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        cpu.require_protected()?;
        cpu.require_cpl0()?;
        let selector = cpu.operand_16(op)?;
        if is_null(selector) {
            return Err(cpu.gp());
        }
        if selector & 4 != 0 {
            return Err(cpu.raise_code(vector::GP, selector_error(selector)));
        }
        let mut descriptor = cpu.descriptor(selector, vector::GP, 0)?;
        let good = match descriptor.system() {
            Some(kind::TSS_AVAILABLE) => true,
            Some(kind::TSS16_AVAILABLE) => !cpu.long_mode(),
            _ => false,
        };
        if !good {
            return Err(cpu.raise_code(vector::GP, selector_error(selector)));
        }
        if !descriptor.is_present() {
            return Err(cpu.raise_code(vector::NP, selector_error(selector)));
        }
        let high = if cpu.long_mode() { cpu.descriptor_high(selector, &descriptor)? } else { 0 };
        let busy = descriptor.access | BUSY;
        cpu.write_type(&mut descriptor, busy)?;
        let mut segment = descriptor.segment(selector);
        segment.base |= high << 32;
        cpu.tr = segment;
        Ok(Flow::Next)
    }
}

/// SLDT and STR.
struct StoreSystemSegment<const LDT: bool>;
impl<const LDT: bool> Slow for StoreSystemSegment<LDT> {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        cpu.require_protected()?;
        let selector = if LDT { cpu.ldtr.selector } else { cpu.tr.selector };
        cpu.set_operand_16(op, selector.into())?;
        Ok(Flow::Next)
    }
}

impl Cpu {
    fn set_zero_flag(&mut self, zero: bool) {
        let status = self.status() & !rflags::ZF;
        self.set_status(status | if zero { rflags::ZF } else { 0 });
    }

    /// The descriptor that LAR, LSL, VERR or VERW looks at; `None` when there is none.
    fn peek_descriptor(&mut self, selector: u16) -> Result<Option<super::descriptor::Descriptor>, Trap> {
        if is_null(selector) {
            return Ok(None);
        }
        let (limit, usable) =
            if selector & 4 != 0 { (self.ldtr.limit, self.ldtr.access & access::UNUSABLE == 0) } else { (self.gdtr.limit.into(), true) };
        if !usable || u32::from(selector | 7) > limit {
            return Ok(None);
        }
        self.descriptor(selector, vector::GP, 0).map(Some)
    }
}

/// LAR and LSL.
struct LoadAccess<const RIGHTS: bool>;
impl<const RIGHTS: bool> Slow for LoadAccess<RIGHTS> {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        cpu.require_protected()?;
        let selector = cpu.operand_16(op)?;
        let found = cpu.peek_descriptor(selector)?.filter(|descriptor| {
            let known = match descriptor.system() {
                None => true,
                Some(kind::LDT | kind::TSS_AVAILABLE | kind::TSS_BUSY) => true,
                Some(kind::TSS16_AVAILABLE | kind::TSS16_BUSY) => !cpu.long_mode(),
                Some(kind::CALL_GATE) => RIGHTS,
                Some(kind::CALL_GATE16 | kind::TASK_GATE) => RIGHTS && !cpu.long_mode(),
                _ => false,
            };
            known && (descriptor.is_conforming_code() || descriptor.dpl() >= cpu.cpl.max(rpl(selector)))
        });
        if let Some(descriptor) = found {
            // LAR gives the second doubleword of the descriptor without the base; processors leave the limit's bits in.
            let value = if RIGHTS { descriptor.raw >> 32 & 0xff_ff00 } else { descriptor.limit().into() };
            cpu.set_register(op.b, op.size, value);
        }
        cpu.set_zero_flag(found.is_some());
        Ok(Flow::Next)
    }
}

/// VERR and VERW.
struct Verify<const WRITE: bool>;
impl<const WRITE: bool> Slow for Verify<WRITE> {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        cpu.require_protected()?;
        let selector = cpu.operand_16(op)?;
        let allowed = cpu.peek_descriptor(selector)?.is_some_and(|descriptor| {
            let privileged = descriptor.is_conforming_code() || descriptor.dpl() >= cpu.cpl.max(rpl(selector));
            privileged && if WRITE { descriptor.is_writable_data() } else { descriptor.is_readable() }
        });
        cpu.set_zero_flag(allowed);
        Ok(Flow::Next)
    }
}

struct Arpl;
impl Slow for Arpl {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        cpu.require_protected()?;
        let source = cpu.regs[usize::from(op.b) & REG_MASK] as u16 & 3;
        let (at, old) = if op.aux & MEMORY != 0 {
            let at = cpu.operand_address(op, 2, true)?;
            (at, cpu.load_for_write::<u16>(at)?)
        } else {
            (0, cpu.regs[usize::from(op.a) & REG_MASK] as u16)
        };
        let raise = old & 3 < source;
        if raise {
            let new = old & !3 | source;
            if op.aux & MEMORY != 0 {
                cpu.store::<u16>(at, new)?;
            } else {
                cpu.set_register(op.a, 2, new.into());
            }
        }
        cpu.set_zero_flag(raise);
        Ok(Flow::Next)
    }
}

struct Swapgs;
impl Slow for Swapgs {
    fn execute(cpu: &mut Cpu, _op: &Op) -> Result<Flow, Trap> {
        if !cpu.is_64bit() {
            return Err(cpu.ud());
        }
        cpu.require_cpl0()?;
        let base = cpu.seg[GS].base;
        cpu.set_segment_base(GS, cpu.msr.kernel_gs_base);
        cpu.msr.kernel_gs_base = base;
        Ok(Flow::Next)
    }
}

impl Cpu {
    fn require_fsgsbase(&mut self) -> Result<(), Trap> {
        if self.is_64bit() && self.cr4 & cr4::FSGSBASE != 0 { Ok(()) } else { Err(self.ud()) }
    }
}

/// RDFSBASE and RDGSBASE.
struct ReadBase;
impl Slow for ReadBase {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        cpu.require_fsgsbase()?;
        let base = cpu.seg[usize::from(op.b) % 6].base;
        cpu.set_register(op.a, op.size, base);
        Ok(Flow::Next)
    }
}

/// WRFSBASE and WRGSBASE.
struct WriteBase;
impl Slow for WriteBase {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        cpu.require_fsgsbase()?;
        let value = cpu.regs[usize::from(op.a) & REG_MASK];
        let base = if op.size == 4 { value & 0xffff_ffff } else { value };
        if !is_canonical(base) {
            return Err(cpu.gp());
        }
        cpu.set_segment_base(usize::from(op.b) % 6, base);
        Ok(Flow::Next)
    }
}
