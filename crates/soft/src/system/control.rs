//! Control registers, caches and TLB, HLT, interrupt flag, hypercalls.
//!
//! Intel SDM vol. 2 (MOV to and from control registers and the others by name), vol. 3 section 2.5 (control registers), 4.1 (which
//! changes of them are legal) and 4.10.4 (which empty the TLB).

use iced_x86::{Instruction, Mnemonic};

use super::{MEMORY, RAX, is_canonical, register_or_memory};
use crate::attention;
use crate::block::Lowering;
use crate::cpu::{CS, Cpu, REG_MASK, Width, access, cr0, cr4, efer, rflags};
use crate::mmu::PHYSICAL_BITS;
use crate::op::{Flow, Op, Slow, Trap, slow};

/// CR0 bits that exist; the others read as zero and writes to them are ignored.
const CR0_BITS: u64 = cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;
/// CR4 bits that this processor has; setting others is #GP.
const CR4_BITS: u64 = cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT
    | cr4::FSGSBASE
    | cr4::PCIDE
    | cr4::SMEP;

/// Makes the op for an instruction of this file.
pub(super) fn lower(lowering: &Lowering, insn: &Instruction, op: &mut Op) -> bool {
    let native = if lowering.width == Width::Bits64 { 8 } else { 4 };
    op.run = match insn.mnemonic() {
        Mnemonic::Mov if insn.op1_register().is_cr() => {
            op.a = insn.op0_register().number() as u8;
            op.b = insn.op1_register().number() as u8;
            op.size = native;
            slow::<ReadControl>
        }
        Mnemonic::Mov if insn.op0_register().is_cr() => {
            op.a = insn.op1_register().number() as u8;
            op.b = insn.op0_register().number() as u8;
            op.size = native;
            slow::<WriteControl>
        }
        Mnemonic::Clts => slow::<Clts>,
        Mnemonic::Lmsw => {
            register_or_memory(insn, 0, op);
            slow::<Lmsw>
        }
        Mnemonic::Smsw => {
            register_or_memory(insn, 0, op);
            op.size = if op.aux & MEMORY != 0 { 2 } else { insn.op0_register().size() as u8 };
            slow::<Smsw>
        }
        Mnemonic::Invlpg => slow::<Invlpg>,
        Mnemonic::Invpcid => {
            op.a = insn.op0_register().number() as u8;
            slow::<Invpcid>
        }
        Mnemonic::Invd | Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => slow::<CacheFlush>,
        Mnemonic::Hlt => slow::<Hlt>,
        Mnemonic::Cli => slow::<Cli>,
        Mnemonic::Sti => slow::<Sti>,
        Mnemonic::Vmcall => slow::<Hypercall<false>>,
        Mnemonic::Vmmcall => slow::<Hypercall<true>>,
        _ => return false,
    };
    true
}

/// MOV from a control register.
struct ReadControl;
impl Slow for ReadControl {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let value = match op.b {
            0 => cpu.cr0,
            2 => cpu.cr2,
            3 => cpu.cr3,
            4 => cpu.cr4,
            8 => cpu.lapic.as_ref().map_or(cpu.cr8, |lapic| lapic.cr8().into()),
            _ => return Err(cpu.ud()),
        };
        cpu.require_cpl0()?;
        cpu.set_register(op.a, op.size, value);
        Ok(Flow::Next)
    }
}

/// MOV to a control register.
struct WriteControl;
impl Slow for WriteControl {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let value = cpu.regs[usize::from(op.a) & REG_MASK];
        let value = if op.size == 8 { value } else { value & 0xffff_ffff };
        if !matches!(op.b, 0 | 2 | 3 | 4 | 8) {
            return Err(cpu.ud());
        }
        cpu.require_cpl0()?;
        match op.b {
            0 => cpu.write_cr0(value)?,
            2 => cpu.cr2 = value,
            3 => {
                let keep = if cpu.cr4 & cr4::PCIDE != 0 { 1 << 63 } else { 0 };
                if cpu.long_mode() && (value & !keep) >> PHYSICAL_BITS != 0 {
                    return Err(cpu.gp());
                }
                cpu.load_cr3(value)?;
            }
            4 => cpu.write_cr4(value)?,
            _ => {
                if value > 15 {
                    return Err(cpu.gp());
                }
                match &cpu.lapic {
                    Some(lapic) => lapic.set_cr8(value as u8),
                    None => cpu.cr8 = value,
                }
            }
        }
        Ok(Flow::Leave)
    }
}

impl Cpu {
    /// MOV to CR0 with all checks.
    fn write_cr0(&mut self, value: u64) -> Result<(), Trap> {
        let old = self.cr0;
        let new = value & CR0_BITS | cr0::ET;
        if value >> 32 != 0 || new & (cr0::PG | cr0::PE) == cr0::PG || new & (cr0::NW | cr0::CD) == cr0::NW {
            return Err(self.gp());
        }
        let mut efer = self.efer;
        if new & !old & cr0::PG != 0 && efer & efer::LME != 0 {
            // Into long mode: PAE tables, not from a 64-bit segment, and not with a 16-bit TSS (Intel SDM vol. 3 section 4.1.2).
            let tss16 = self.tr.access & 8 == 0;
            if self.cr4 & cr4::PAE == 0 || self.seg[CS].access & access::L != 0 || tss16 {
                return Err(self.gp());
            }
            efer |= efer::LMA;
        }
        if old & !new & cr0::PG != 0 {
            if self.is_64bit() || self.cr4 & cr4::PCIDE != 0 {
                return Err(self.gp());
            }
            efer &= !efer::LMA;
        }
        let pae = new & cr0::PG != 0 && self.cr4 & cr4::PAE != 0 && efer & efer::LMA == 0;
        if pae && (old ^ new) & (cr0::PG | cr0::CD | cr0::NW) != 0 {
            self.load_pdptes(self.cr3)?;
        }
        self.cr0 = new;
        self.efer = efer;
        if (old ^ new) & (cr0::PG | cr0::PE | cr0::WP) != 0 {
            self.flush_tlb();
        }
        self.update_mode();
        Ok(())
    }

    /// MOV to CR4 with all checks.
    fn write_cr4(&mut self, new: u64) -> Result<(), Trap> {
        let old = self.cr4;
        let leaves_pae = old & !new & cr4::PAE != 0;
        let enters_pcid = new & !old & cr4::PCIDE != 0;
        if new & !CR4_BITS != 0 || leaves_pae && self.long_mode() || enters_pcid && (!self.long_mode() || self.cr3 & 0xfff != 0) {
            return Err(self.gp());
        }
        let paging = cr4::PAE | cr4::PSE | cr4::PGE | cr4::SMEP;
        let pae = self.cr0 & cr0::PG != 0 && new & cr4::PAE != 0 && !self.long_mode();
        if pae && (old ^ new) & paging != 0 {
            self.load_pdptes(self.cr3)?;
        }
        self.cr4 = new;
        if (old ^ new) & (paging | cr4::PCIDE) != 0 {
            self.flush_tlb();
        }
        self.update_mode();
        Ok(())
    }
}

struct Clts;
impl Slow for Clts {
    fn execute(cpu: &mut Cpu, _op: &Op) -> Result<Flow, Trap> {
        cpu.require_cpl0()?;
        cpu.cr0 &= !cr0::TS;
        cpu.update_mode();
        Ok(Flow::Leave)
    }
}

struct Lmsw;
impl Slow for Lmsw {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        cpu.require_cpl0()?;
        let value = u64::from(cpu.operand_16(op)?);
        let low = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
        // PE can be set but not cleared.
        cpu.write_cr0(cpu.cr0 & !(low & !cr0::PE) | value & low)?;
        Ok(Flow::Leave)
    }
}

struct Smsw;
impl Slow for Smsw {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let value = cpu.cr0;
        cpu.set_operand_16(op, value)?;
        Ok(Flow::Next)
    }
}

struct Invlpg;
impl Slow for Invlpg {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        cpu.require_cpl0()?;
        let offset = cpu.effective_address(op);
        // No limit check: it is not an access. An address that is not canonical does nothing.
        let base = if cpu.is_64bit() && !matches!(usize::from(op.seg), crate::cpu::FS | crate::cpu::GS) {
            0
        } else {
            cpu.seg[usize::from(op.seg) % 6].base
        };
        let mut address = base.wrapping_add(offset);
        if !cpu.is_64bit() {
            address &= 0xffff_ffff;
        }
        if is_canonical(address) {
            cpu.invalidate_page(address);
        }
        Ok(Flow::Leave)
    }
}

struct Invpcid;
impl Slow for Invpcid {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        cpu.require_cpl0()?;
        let kind = cpu.regs[usize::from(op.a) & REG_MASK];
        let kind = if cpu.is_64bit() { kind } else { kind & 0xffff_ffff };
        let at = cpu.operand_address(op, 16, false)?;
        let mut bytes = [0; 16];
        cpu.load_bytes(at, &mut bytes)?;
        let descriptor = u128::from_le_bytes(bytes);
        let (pcid, address) = (descriptor as u64, (descriptor >> 64) as u64);
        let wrong_pcid = pcid > 0xfff || kind < 2 && pcid != 0 && cpu.cr4 & cr4::PCIDE == 0;
        if kind > 3 || wrong_pcid || kind == 0 && !is_canonical(address) {
            return Err(cpu.gp());
        }
        cpu.invpcid(kind, pcid, address);
        Ok(Flow::Leave)
    }
}

/// INVD, WBINVD: the host keeps caches coherent.
struct CacheFlush;
impl Slow for CacheFlush {
    fn execute(cpu: &mut Cpu, _op: &Op) -> Result<Flow, Trap> {
        cpu.require_cpl0()?;
        Ok(Flow::Next)
    }
}

struct Hlt;
impl Slow for Hlt {
    fn execute(cpu: &mut Cpu, _op: &Op) -> Result<Flow, Trap> {
        cpu.require_cpl0()?;
        cpu.halted = true;
        cpu.stats.halts += 1;
        cpu.attention.set_own(attention::IDLE);
        Ok(Flow::Leave)
    }
}

impl Cpu {
    /// #GP(0) when IOPL does not allow CLI and STI.
    fn require_iopl(&mut self) -> Result<(), Trap> {
        let iopl = (self.rflags & rflags::IOPL) >> 12;
        if self.cr0 & cr0::PE == 0 || u64::from(self.cpl) <= iopl { Ok(()) } else { Err(self.gp()) }
    }
}

struct Cli;
impl Slow for Cli {
    fn execute(cpu: &mut Cpu, _op: &Op) -> Result<Flow, Trap> {
        cpu.require_iopl()?;
        cpu.rflags &= !rflags::IF;
        Ok(Flow::Next)
    }
}

struct Sti;
impl Slow for Sti {
    fn execute(cpu: &mut Cpu, _op: &Op) -> Result<Flow, Trap> {
        cpu.require_iopl()?;
        if cpu.rflags & rflags::IF == 0 {
            cpu.load_flags(cpu.flags() | rflags::IF);
            // The next instruction is still executed first.
            cpu.attention.set_own(attention::SHADOW);
        }
        Ok(Flow::Leave)
    }
}

impl Cpu {
    /// What the bus needs to follow the guest's linear addresses.
    pub(super) fn paging(&self) -> vmm::Paging {
        vmm::Paging { cr0: self.cr0, cr3: self.cr3, cr4: self.cr4, efer: self.efer }
    }
}

/// VMCALL and VMMCALL.
struct Hypercall<const AMD: bool>;
impl<const AMD: bool> Slow for Hypercall<AMD> {
    fn execute(cpu: &mut Cpu, _op: &Op) -> Result<Flow, Trap> {
        let (cpl, long_mode, paging) = (cpu.cpl, cpu.is_64bit(), cpu.paging());
        let mut call = vmm::Hypercall { cpl, long_mode, vmmcall: AMD, paging, ..vmm::Hypercall::default() };
        call.gpr.copy_from_slice(&cpu.regs[RAX..16]);
        cpu.stats.hypercalls += 1;
        if !cpu.bus().hypercall(cpu.id, &mut call) {
            return Err(cpu.ud());
        }
        cpu.regs[RAX..16].copy_from_slice(&call.gpr);
        Ok(Flow::Leave)
    }
}
