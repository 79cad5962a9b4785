//! Model-specific registers and time-stamp counter: RDMSR, WRMSR, RDTSC, RDTSCP, RDPMC.
//!
//! Intel SDM vol. 4 (the registers), vol. 2 (the instructions). The processor keeps what operating systems expect of any processor
//! and what it acts upon; the local APIC keeps its own; dialects have theirs behind the bus. What nobody has is #GP(0), logged once.
//! Memory type ranges are kept and have no effect: the host's caches are coherent.

use iced_x86::{Instruction, Mnemonic};
use serde::{Deserialize, Serialize};
use vmm::MsrFault;

use super::{RAX, RCX, RDX, is_canonical};
use crate::cpu::{Cpu, FS, GS, cr0, cr4, efer};
use crate::mmu::PHYSICAL_BITS;
use crate::op::{Flow, Op, Slow, Trap, slow};

/// Indices, by their names in Intel SDM vol. 4 table 2-2.
mod index {
    pub const TSC: u32 = 0x10;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const APIC_BASE: u32 = 0x1b;
    pub const FEATURE_CONTROL: u32 = 0x3a;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const BIOS_UPDT_TRIG: u32 = 0x79;
    pub const BIOS_SIGN_ID: u32 = 0x8b;
    pub const PLATFORM_INFO: u32 = 0xce;
    pub const MTRR_CAP: u32 = 0xfe;
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    pub const FLUSH_CMD: u32 = 0x10b;
    pub const MISC_FEATURES_ENABLES: u32 = 0x140;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const MCG_CTL: u32 = 0x17b;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const LAST_BRANCH_FROM: u32 = 0x1db;
    pub const LAST_INT_TO: u32 = 0x1de;
    pub const MTRR_PHYS_BASE0: u32 = 0x200;
    pub const MTRR_PHYS_MASK7: u32 = 0x20f;
    pub const MTRR_FIX64K: u32 = 0x250;
    pub const MTRR_FIX16K_80000: u32 = 0x258;
    pub const MTRR_FIX16K_A0000: u32 = 0x259;
    pub const MTRR_FIX4K_C0000: u32 = 0x268;
    pub const MTRR_FIX4K_F8000: u32 = 0x26f;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const MC0_CTL: u32 = 0x400;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const X2APIC_FIRST: u32 = 0x800;
    pub const X2APIC_LAST: u32 = 0x8ff;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const SFMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
}

/// Machine-check banks.
const BANKS: usize = 4;
/// MCG_CAP: the banks, and that MCG_CTL exists.
const MCG_CAP: u64 = BANKS as u64 | 1 << 8;
/// MTRRCAP: eight variable ranges, fixed ranges, write combining.
const MTRR_CAP: u64 = 8 | 1 << 8 | 1 << 10;
/// Power-on PAT (Intel SDM vol. 3 section 12.12.4).
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// MTRRs as firmware leaves them: on, write-back by default.
const MTRR_DEF_TYPE_RESET: u64 = 0xc06;
/// Fast strings (bit 0); neither branch trace store nor PEBS (bits 11 and 12 say they are not there).
const MISC_ENABLE_RESET: u64 = 1 | 1 << 11 | 1 << 12;
/// Maximum non-turbo ratio 10 (of 100 MHz): 1 GHz, bits 15:8.
const PLATFORM_INFO: u64 = 10 << 8;
/// FEATURE_CONTROL: locked, without VMX.
const FEATURE_CONTROL: u64 = 1;
/// Microcode revision 1, in the upper half.
const MICROCODE: u64 = 1 << 32;
/// SPEC_CTRL: IBRS, STIBP, SSBD.
const SPEC_CTRL_BITS: u64 = 7;
/// DEBUGCTL: LBR and BTF are kept; neither does anything.
const DEBUGCTL_BITS: u64 = 3;
const EFER_BITS: u64 = efer::SCE | efer::LME | efer::LMA | efer::NXE;

/// The processor leaks nothing by speculation, because it does not speculate (IA32_ARCH_CAPABILITIES): RDCL_NO, IBRS_ALL,
/// SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, IF_PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO,
/// RFDS_NO, ITS_NO.
const ARCH_CAPABILITIES: u64 =
    1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 13 | 1 << 14 | 1 << 15 | 1 << 20 | 1 << 24 | 1 << 26 | 1 << 27 | 1 << 62;

/// Makes the op for an instruction of this file.
pub(super) fn lower(insn: &Instruction, op: &mut Op) -> bool {
    op.run = match insn.mnemonic() {
        Mnemonic::Rdmsr => slow::<Rdmsr>,
        Mnemonic::Wrmsr => slow::<Wrmsr>,
        Mnemonic::Rdtsc => slow::<Rdtsc<false>>,
        Mnemonic::Rdtscp => slow::<Rdtsc<true>>,
        Mnemonic::Rdpmc => slow::<Rdpmc>,
        _ => return false,
    };
    true
}

/// Model-specific registers that live nowhere else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub misc_enable: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    tsc_adjust: u64,
    /// Only without a local APIC, which otherwise keeps it for its deadline timer.
    tsc_offset: u64,
    pat: u64,
    spec_ctrl: u64,
    debugctl: u64,
    mcg_status: u64,
    mcg_ctl: u64,
    bank_ctl: [u64; BANKS],
    mtrr_def_type: u64,
    mtrr_variable: [u64; 16],
    /// 64K, two of 16K, eight of 4K.
    mtrr_fixed: [u64; 11],
    /// Indices that a #GP has been logged for.
    #[serde(skip)]
    logged: Vec<u32>,
}

impl Default for Msrs {
    fn default() -> Msrs {
        Msrs {
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            misc_enable: MISC_ENABLE_RESET,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            tsc_adjust: 0,
            tsc_offset: 0,
            pat: PAT_RESET,
            spec_ctrl: 0,
            debugctl: 0,
            mcg_status: 0,
            mcg_ctl: 0,
            bank_ctl: [0; BANKS],
            mtrr_def_type: MTRR_DEF_TYPE_RESET,
            mtrr_variable: [0; 16],
            mtrr_fixed: [0x0606_0606_0606_0606; 11],
            logged: Vec::new(),
        }
    }
}

/// Whether all bytes are memory types: UC, WC, WT, WP, WB, and for PAT UC-.
fn memory_types(value: u64, uc_minus: bool) -> bool {
    value.to_le_bytes().iter().all(|&byte| matches!(byte, 0 | 1 | 4 | 5 | 6) || uc_minus && byte == 7)
}

/// Place of a fixed-range register in `Msrs::mtrr_fixed`.
fn fixed_range(index: u32) -> Option<usize> {
    Some(match index {
        index::MTRR_FIX64K => 0,
        index::MTRR_FIX16K_80000 => 1,
        index::MTRR_FIX16K_A0000 => 2,
        index::MTRR_FIX4K_C0000..=index::MTRR_FIX4K_F8000 => 3 + (index - index::MTRR_FIX4K_C0000) as usize,
        _ => return None,
    })
}

impl Cpu {
    /// What the guest's time-stamp counter is ahead of the machine's clock.
    pub fn tsc_offset(&self) -> u64 {
        self.lapic.as_ref().map_or(self.msr.tsc_offset, |lapic| lapic.tsc_offset())
    }

    fn set_tsc_offset(&mut self, offset: u64) {
        match &self.lapic {
            Some(lapic) => lapic.set_tsc_offset(offset),
            None => self.msr.tsc_offset = offset,
        }
    }

    /// RDMSR for somebody outside the guest; only what the processor itself has.
    pub fn peek_msr(&self, index: u32) -> Option<u64> {
        self.own_msr(index)?.ok()
    }

    /// WRMSR for somebody outside the guest. The end of a level-triggered interrupt is not told to the I/O APIC.
    pub fn poke_msr(&mut self, index: u32, value: u64) -> Option<()> {
        self.set_own_msr(index, value)?.ok().map(|_| ())
    }

    /// RDMSR of what the processor or its local APIC has.
    fn own_msr(&self, index: u32) -> Option<Result<u64, MsrFault>> {
        let msr = &self.msr;
        Some(Ok(match index {
            index::TSC => self.tsc(),
            index::APIC_BASE | index::TSC_DEADLINE | index::X2APIC_FIRST..=index::X2APIC_LAST => {
                return Some(self.lapic.as_ref()?.read_msr(index));
            }
            index::PLATFORM_ID => 0,
            index::FEATURE_CONTROL => FEATURE_CONTROL,
            index::TSC_ADJUST => msr.tsc_adjust,
            index::SPEC_CTRL => msr.spec_ctrl,
            index::BIOS_SIGN_ID => MICROCODE,
            index::PLATFORM_INFO => PLATFORM_INFO,
            index::MTRR_CAP => MTRR_CAP,
            index::ARCH_CAPABILITIES => ARCH_CAPABILITIES,
            index::MISC_FEATURES_ENABLES => 0,
            index::SYSENTER_CS => msr.sysenter_cs,
            index::SYSENTER_ESP => msr.sysenter_esp,
            index::SYSENTER_EIP => msr.sysenter_eip,
            index::MCG_CAP => MCG_CAP,
            index::MCG_STATUS => msr.mcg_status,
            index::MCG_CTL => msr.mcg_ctl,
            index::MISC_ENABLE => msr.misc_enable,
            index::DEBUGCTL => msr.debugctl,
            index::LAST_BRANCH_FROM..=index::LAST_INT_TO => 0,
            index::MTRR_PHYS_BASE0..=index::MTRR_PHYS_MASK7 => msr.mtrr_variable[(index - index::MTRR_PHYS_BASE0) as usize],
            index::PAT => msr.pat,
            index::MTRR_DEF_TYPE => msr.mtrr_def_type,
            index::EFER => self.efer,
            index::STAR => msr.star,
            index::LSTAR => msr.lstar,
            index::CSTAR => msr.cstar,
            index::SFMASK => msr.sfmask,
            index::FS_BASE => self.seg[FS].base,
            index::GS_BASE => self.seg[GS].base,
            index::KERNEL_GS_BASE => msr.kernel_gs_base,
            index::TSC_AUX => msr.tsc_aux,
            _ => {
                if let Some(n) = fixed_range(index) {
                    msr.mtrr_fixed[n]
                } else {
                    let (bank, register) = bank_register(index)?;
                    if register == 0 { msr.bank_ctl[bank] } else { 0 }
                }
            }
        }))
    }

    /// WRMSR of what the processor or its local APIC has. The vector of a level-triggered interrupt that it ended comes back.
    fn set_own_msr(&mut self, index: u32, value: u64) -> Option<Result<Option<u8>, MsrFault>> {
        if matches!(index, index::APIC_BASE | index::TSC_DEADLINE | index::X2APIC_FIRST..=index::X2APIC_LAST) {
            return Some(self.lapic.as_ref()?.write_msr(index, value));
        }
        // Writing back what is there is always right for read-only registers that kernels restore.
        let good = match index {
            index::TSC => {
                let offset = value.wrapping_sub(self.vm.timers.clock().now());
                self.msr.tsc_adjust = self.msr.tsc_adjust.wrapping_add(offset.wrapping_sub(self.tsc_offset()));
                self.set_tsc_offset(offset);
                true
            }
            index::TSC_ADJUST => {
                let offset = self.tsc_offset().wrapping_add(value.wrapping_sub(self.msr.tsc_adjust));
                self.msr.tsc_adjust = value;
                self.set_tsc_offset(offset);
                true
            }
            index::SPEC_CTRL => store_if(&mut self.msr.spec_ctrl, value, value & !SPEC_CTRL_BITS == 0),
            index::PRED_CMD | index::FLUSH_CMD => value & !1 == 0,
            // Updates of microcode are accepted and change nothing.
            index::BIOS_UPDT_TRIG | index::BIOS_SIGN_ID => true,
            index::MISC_FEATURES_ENABLES => value == 0,
            index::SYSENTER_CS => store_if(&mut self.msr.sysenter_cs, value & 0xffff_ffff, true),
            index::SYSENTER_ESP => store_if(&mut self.msr.sysenter_esp, value, is_canonical(value)),
            index::SYSENTER_EIP => store_if(&mut self.msr.sysenter_eip, value, is_canonical(value)),
            index::MCG_STATUS => store_if(&mut self.msr.mcg_status, value, value & !7 == 0),
            index::MCG_CTL => store_if(&mut self.msr.mcg_ctl, value, value == 0 || value == u64::MAX),
            index::MISC_ENABLE => store_if(&mut self.msr.misc_enable, value, true),
            index::DEBUGCTL => store_if(&mut self.msr.debugctl, value, value & !DEBUGCTL_BITS == 0),
            index::LAST_BRANCH_FROM..=index::LAST_INT_TO => true,
            index::MTRR_PHYS_BASE0..=index::MTRR_PHYS_MASK7 => {
                let slot = &mut self.msr.mtrr_variable[(index - index::MTRR_PHYS_BASE0) as usize];
                let base = index & 1 == 0;
                let low = if base { memory_types(value & 0xff, false) && value & 0xf00 == 0 } else { value & 0x7ff == 0 };
                store_if(slot, value, low && value >> PHYSICAL_BITS == 0)
            }
            index::PAT => store_if(&mut self.msr.pat, value, memory_types(value, true)),
            index::MTRR_DEF_TYPE => store_if(&mut self.msr.mtrr_def_type, value, value & !0xcff == 0 && memory_types(value & 0xff, false)),
            index::EFER => self.set_efer(value),
            index::STAR => store_if(&mut self.msr.star, value, true),
            index::LSTAR => store_if(&mut self.msr.lstar, value, is_canonical(value)),
            index::CSTAR => store_if(&mut self.msr.cstar, value, is_canonical(value)),
            index::SFMASK => store_if(&mut self.msr.sfmask, value, value >> 32 == 0),
            index::FS_BASE | index::GS_BASE => {
                let segment = if index == index::FS_BASE { FS } else { GS };
                let good = is_canonical(value);
                if good {
                    self.set_segment_base(segment, value);
                }
                good
            }
            index::KERNEL_GS_BASE => store_if(&mut self.msr.kernel_gs_base, value, is_canonical(value)),
            index::TSC_AUX => store_if(&mut self.msr.tsc_aux, value, value >> 32 == 0),
            // Present but read-only.
            index::PLATFORM_ID | index::FEATURE_CONTROL | index::MTRR_CAP | index::ARCH_CAPABILITIES | index::MCG_CAP => false,
            // Real ones let a few bits be written.
            index::PLATFORM_INFO => value == PLATFORM_INFO,
            _ => {
                if let Some(n) = fixed_range(index) {
                    store_if(&mut self.msr.mtrr_fixed[n], value, memory_types(value, false))
                } else {
                    let (bank, register) = bank_register(index)?;
                    if register == 0 { store_if(&mut self.msr.bank_ctl[bank], value, true) } else { value == 0 }
                }
            }
        };
        Some(if good { Ok(None) } else { Err(MsrFault) })
    }

    /// WRMSR to IA32_EFER: LME cannot change while paging is on, LMA is the processor's.
    fn set_efer(&mut self, value: u64) -> bool {
        let changed = self.efer ^ value;
        if value & !EFER_BITS != 0 || changed & efer::LME != 0 && self.cr0 & cr0::PG != 0 {
            return false;
        }
        self.efer = value & !efer::LMA | self.efer & efer::LMA;
        if changed & efer::NXE != 0 {
            self.flush_tlb();
        }
        self.update_mode();
        true
    }

    /// One line for each index that nobody has.
    fn log_msr(&mut self, index: u32, write: Option<u64>) {
        /// A guest that tries all of them fills no memory of ours.
        const MOST: usize = 256;
        if self.msr.logged.len() < MOST && !self.msr.logged.contains(&index) {
            self.msr.logged.push(index);
            tracing::debug!(vcpu = self.id, index = format_args!("{index:#x}"), value = ?write, "unknown MSR: #GP");
        }
    }

    /// EDX:EAX.
    fn set_edx_eax(&mut self, value: u64) {
        self.regs[RAX] = value & 0xffff_ffff;
        self.regs[RDX] = value >> 32;
    }
}

/// Bank and register (CTL, STATUS, ADDR, MISC) of a machine-check MSR.
fn bank_register(index: u32) -> Option<(usize, u32)> {
    let offset = index.checked_sub(index::MC0_CTL)?;
    let bank = offset as usize / 4;
    (bank < BANKS).then_some((bank, offset % 4))
}

/// Stores `value` if it is `good`; returns whether it is.
fn store_if(slot: &mut u64, value: u64, good: bool) -> bool {
    if good {
        *slot = value;
    }
    good
}

struct Rdmsr;
impl Slow for Rdmsr {
    fn execute(cpu: &mut Cpu, _op: &Op) -> Result<Flow, Trap> {
        cpu.require_cpl0()?;
        let index = cpu.regs[RCX] as u32;
        cpu.stats.msr += 1;
        let answer = match cpu.own_msr(index) {
            Some(answer) => Some(answer),
            None => cpu.bus().read_msr(cpu.id, index),
        };
        match answer {
            Some(Ok(value)) => {
                cpu.set_edx_eax(value);
                Ok(Flow::Next)
            }
            Some(Err(MsrFault)) => Err(cpu.gp()),
            None => {
                cpu.log_msr(index, None);
                Err(cpu.gp())
            }
        }
    }
}

struct Wrmsr;
impl Slow for Wrmsr {
    fn execute(cpu: &mut Cpu, _op: &Op) -> Result<Flow, Trap> {
        cpu.require_cpl0()?;
        let index = cpu.regs[RCX] as u32;
        let value = cpu.regs[RDX] << 32 | cpu.regs[RAX] & 0xffff_ffff;
        cpu.stats.msr += 1;
        let answer = match cpu.set_own_msr(index, value) {
            Some(answer) => Some(answer),
            None => cpu.bus().write_msr(cpu.id, index, value).map(|answer| answer.map(|()| None)),
        };
        match answer {
            Some(Ok(ended)) => {
                if let Some(vector) = ended {
                    cpu.bus().end_of_interrupt(vector);
                }
                Ok(Flow::Leave)
            }
            Some(Err(MsrFault)) => Err(cpu.gp()),
            None => {
                cpu.log_msr(index, Some(value));
                Err(cpu.gp())
            }
        }
    }
}

/// RDTSC and RDTSCP.
struct Rdtsc<const AUX: bool>;
impl<const AUX: bool> Slow for Rdtsc<AUX> {
    fn execute(cpu: &mut Cpu, _op: &Op) -> Result<Flow, Trap> {
        if cpu.cr4 & cr4::TSD != 0 && cpu.cpl != 0 {
            return Err(cpu.gp());
        }
        let tsc = cpu.tsc();
        cpu.set_edx_eax(tsc);
        if AUX {
            cpu.regs[RCX] = cpu.msr.tsc_aux;
        }
        Ok(Flow::Next)
    }
}

/// There are no performance counters: any index is out of range.
struct Rdpmc;
impl Slow for Rdpmc {
    fn execute(cpu: &mut Cpu, _op: &Op) -> Result<Flow, Trap> {
        Err(cpu.gp())
    }
}
