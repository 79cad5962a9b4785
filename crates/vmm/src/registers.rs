//! Register state of a processor, with the contents of vmm(4)'s `struct vcpu_reg_state`.

use serde::{Deserialize, Serialize};

use crate::paging::Paging;

/// Index of RAX in [`Registers::gpr`]; the others follow in encoding order.
pub const RAX: usize = 0;
/// Index of RCX.
pub const RCX: usize = 1;
/// Index of RDX.
pub const RDX: usize = 2;
/// Index of RBX.
pub const RBX: usize = 3;
/// Index of RSP.
pub const RSP: usize = 4;
/// Index of RBP.
pub const RBP: usize = 5;
/// Index of RSI.
pub const RSI: usize = 6;
/// Index of RDI.
pub const RDI: usize = 7;

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Limit in bytes, granularity already applied.
    pub limit: u32,
    /// Access rights in VMX's layout: type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15, unusable 16 (Intel SDM vol. 3 table 25-2).
    pub access: u32,
    /// Linear base address.
    pub base: u64,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes (size minus one).
    pub limit: u16,
}

bitflags::bitflags! {
    /// Groups of registers, as the mask of READREGS and WRITEREGS.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct RegisterMask: u64 {
        /// General registers, RIP and RFLAGS.
        const GPR = 1;
        /// Segment registers, GDTR and IDTR.
        const SEGMENT = 2;
        /// Control registers.
        const CONTROL = 4;
        /// Model-specific registers.
        const MSR = 8;
        /// Debug registers.
        const DEBUG = 0x10;
    }
}

/// All registers that vmm(4) knows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// RAX RCX RDX RBX RSP RBP RSI RDI R8 to R15, in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8, the task priority.
    pub cr8: u64,
    /// XCR0.
    pub xcr0: u64,
    /// PAE page-directory pointers (only meaningful in PAE paging outside long mode).
    pub pdpte: [u64; 4],
    /// EFER.
    pub efer: u64,
    /// STAR.
    pub star: u64,
    /// LSTAR.
    pub lstar: u64,
    /// CSTAR.
    pub cstar: u64,
    /// SFMASK.
    pub sfmask: u64,
    /// KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// ES.
    pub es: Segment,
    /// CS.
    pub cs: Segment,
    /// SS.
    pub ss: Segment,
    /// DS.
    pub ds: Segment,
    /// FS.
    pub fs: Segment,
    /// GS.
    pub gs: Segment,
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: DescriptorTable,
    /// IDTR.
    pub idtr: DescriptorTable,
}

impl Registers {
    /// What decides how linear addresses become physical ones.
    pub fn paging(&self) -> Paging {
        Paging { cr0: self.cr0, cr3: self.cr3, cr4: self.cr4, efer: self.efer }
    }

    /// Power-on and reset state (Intel SDM vol. 3 table 10-1): real mode at F000:FFF0 with the base at 4 GiB - 64 KiB.
    pub fn reset() -> Registers {
        let data = Segment { selector: 0, limit: 0xffff, access: 0x93, base: 0 };
        Registers {
            rip: 0xfff0,
            rflags: 2,
            // ET, NW and CD.
            cr0: 0x6000_0010,
            xcr0: 1,
            // Fast strings; Linux gives up `rep movsb` without it (Intel SDM vol. 4, IA32_MISC_ENABLE bit 0).
            misc_enable: 1,
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            es: data,
            cs: Segment { selector: 0xf000, limit: 0xffff, access: 0x9b, base: 0xffff_0000 },
            ss: data,
            ds: data,
            fs: data,
            gs: data,
            ldtr: Segment { selector: 0, limit: 0xffff, access: 0x82, base: 0 },
            tr: Segment { selector: 0, limit: 0xffff, access: 0x8b, base: 0 },
            gdtr: DescriptorTable { base: 0, limit: 0xffff },
            idtr: DescriptorTable { base: 0, limit: 0xffff },
            ..Registers::default()
        }
    }
}

impl std::fmt::Display for Registers {
    /// A register dump for people, a dozen lines.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const NAMES: [&str; 16] =
            ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8 ", "r9 ", "r10", "r11", "r12", "r13", "r14", "r15"];
        for (row, names) in NAMES.chunks(4).enumerate() {
            for (column, name) in names.iter().enumerate() {
                write!(f, "{name} {:016x}  ", self.gpr[row * 4 + column])?;
            }
            writeln!(f)?;
        }
        writeln!(f, "rip {:016x}  rflags {:08x}", self.rip, self.rflags)?;
        writeln!(f, "cr0 {:08x} cr2 {:016x} cr3 {:016x} cr4 {:08x} efer {:x}", self.cr0, self.cr2, self.cr3, self.cr4, self.efer)?;
        for (name, s) in [
            ("cs", self.cs),
            ("ss", self.ss),
            ("ds", self.ds),
            ("es", self.es),
            ("fs", self.fs),
            ("gs", self.gs),
            ("ldtr", self.ldtr),
            ("tr", self.tr),
        ] {
            writeln!(f, "{name:4} {:04x} base {:016x} limit {:08x} access {:05x}", s.selector, s.base, s.limit, s.access)?;
        }
        write!(f, "gdtr {:016x}+{:x}  idtr {:016x}+{:x}", self.gdtr.base, self.gdtr.limit, self.idtr.base, self.idtr.limit)
    }
}
