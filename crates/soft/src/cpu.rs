//! The state of one processor.

use std::sync::Arc;

use devices::lapic::LocalApic;
use vmm::{Bus, DescriptorTable, Exit, Segment, VcpuId, VcpuStats};

use crate::attention::Attention;
use crate::block::BlockCache;
use crate::flags::StatusFlags;
use crate::mmu::Tlb;
use crate::native::FxArea;
use crate::op::{Op, Trap};
use crate::vm::VmShared;

/// Index into [`Cpu::regs`] of a register that is always zero.
pub(crate) const ZERO: usize = 16;
/// Index into [`Cpu::regs`] of the address at which the running block was entered (RIP; not masked).
pub(crate) const RIP_BASE: usize = 17;
/// Index into [`Cpu::regs`] of the FS base, the copy that flat addressing uses.
pub(crate) const FS_BASE: usize = 18;
/// Index into [`Cpu::regs`] of the GS base, the copy that flat addressing uses.
pub(crate) const GS_BASE: usize = 19;
/// Mask that keeps register indices inside [`Cpu::regs`] without a bounds check.
pub(crate) const REG_MASK: usize = 31;

/// Segment register numbers in encoding order.
pub(crate) const ES: usize = 0;
/// CS.
pub(crate) const CS: usize = 1;
/// SS.
pub(crate) const SS: usize = 2;
/// DS.
pub(crate) const DS: usize = 3;
/// FS.
pub(crate) const FS: usize = 4;
/// GS.
pub(crate) const GS: usize = 5;

/// CR0 bits (Intel SDM vol. 3 section 2.5).
pub(crate) mod cr0 {
    pub const PE: u64 = 1;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits (Intel SDM vol. 3 section 2.5).
pub(crate) mod cr4 {
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const SMEP: u64 = 1 << 20;
}

/// EFER bits (Intel SDM vol. 3 section 2.2.1).
pub(crate) mod efer {
    pub const SCE: u64 = 1;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// RFLAGS bits (Intel SDM vol. 1 section 3.4.3).
pub(crate) mod rflags {
    pub const CF: u64 = 1;
    pub const FIXED: u64 = 2;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six arithmetic flags.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

/// Exception vectors (Intel SDM vol. 3 table 6-1).
pub(crate) mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

/// Access-rights bits of [`vmm::Segment::access`].
pub(crate) mod access {
    pub const TYPE: u32 = 0xf;
    /// Code or data segment (not a system one).
    pub const S: u32 = 1 << 4;
    pub const DPL_SHIFT: u32 = 5;
    pub const P: u32 = 1 << 7;
    pub const L: u32 = 1 << 13;
    /// Default operand size of code, stack pointer size of stacks, upper bound of expand-down data.
    pub const DB: u32 = 1 << 14;
    pub const G: u32 = 1 << 15;
    pub const UNUSABLE: u32 = 1 << 16;
}

/// Default operand and address size of the code that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum Width {
    /// Real mode, virtual-8086 mode, 16-bit protected and compatibility mode.
    Bits16 = 0,
    /// 32-bit protected and compatibility mode.
    Bits32 = 1,
    /// 64-bit mode.
    Bits64 = 2,
}

/// Why an instruction could not be completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TrapKind {
    /// An exception; for a page fault CR2 has not been written yet, the address is here.
    Exception {
        /// Its vector.
        vector: u8,
        /// Its error code, where the vector has one.
        error: Option<u32>,
        /// Linear address of a page fault.
        address: u64,
    },
    /// A reference to an address that is not canonical: #SS(0) through the stack segment, else #GP(0).
    NotCanonical,
    /// `Vcpu::run` has to return this; the instruction will be entered again.
    Exit(Exit),
    /// The instruction writes to instructions of the running block: it has to be executed alone.
    Alone,
}

/// One processor. Field order puts what every instruction touches first.
#[repr(C)]
pub(crate) struct Cpu {
    /// RAX to R15 in encoding order, then [`ZERO`], [`RIP_BASE`], [`FS_BASE`], [`GS_BASE`] and scratch.
    pub regs: [u64; 32],
    /// Instruction pointer; exact between blocks and inside `slow` handlers.
    pub rip: u64,
    /// Address after the current instruction; set inside `slow` handlers.
    pub next_rip: u64,
    /// Arithmetic flags.
    pub status_flags: StatusFlags,
    /// RFLAGS without the arithmetic flags (and with bit 1 set).
    pub rflags: u64,
    /// Guest instructions executed.
    pub instructions: u64,
    /// Stack pointer of the host below which translated code returns to the run loop.
    pub stack_floor: usize,
    /// Data TLB.
    pub tlb: Tlb,
    /// Why the last block ended with `Outcome::Trapped`.
    pub trap: TrapKind,
    /// The current instruction is executed alone, so it may write to its own block.
    pub alone: bool,
    /// Privilege level.
    pub cpl: u8,
    /// Size of the code that runs.
    pub width: Width,
    /// All ones for 64-bit code; masks RIP to 32 or 16 bits in other code.
    pub rip_mask: u64,
    /// ES CS SS DS FS GS.
    pub seg: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    /// Task priority without a local APIC (with one, it holds the TPR).
    pub cr8: u64,
    /// PAE page-directory pointers, loaded by writes to CR3 outside long mode.
    pub pdpte: [u64; 4],
    pub efer: u64,
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    /// Model-specific registers without other home.
    pub msr: crate::system::Msrs,
    /// x87, MMX and SSE state in FXSAVE64's layout.
    pub fx: FxArea,
    /// An NMI is being handled.
    pub nmi_blocked: bool,
    /// HLT: sleeps until an interrupt.
    pub halted: bool,
    /// After INIT: sleeps until a start-up IPI.
    pub wait_for_sipi: bool,
    /// The last instruction is complete, but `Vcpu::run` has to return this before the next one; announce it by `attention::IDLE`.
    pub pending_exit: Option<Exit>,
    /// An event that is to be delivered before the next instruction; announced by `attention::IDLE`.
    pub undelivered: Option<crate::system::Event>,
    /// The current instruction ends without a look at RFLAGS.TF: it delivered an event, or it was MOV to SS.
    pub step_over: bool,
    /// What RDRAND gives.
    pub random: crate::system::Random,
    /// Data breakpoints (bit by number) that the current instruction's accesses hit, when `attention::STEP` is set.
    pub watch_hits: u8,
    /// Running hash of block addresses, and time spent halted; deterministic mode only.
    pub trace_hash: u64,
    pub idle_time: u64,
    /// Answer for the IN that the last run ended with.
    pub port_in: Option<u32>,
    /// The last run ended with an IN, at which RIP still is.
    pub awaits_port_in: bool,
    pub stats: VcpuStats,
    pub id: VcpuId,
    pub lapic: Option<Arc<LocalApic>>,
    pub attention: Arc<Attention>,
    pub vm: Arc<VmShared>,
    pub blocks: BlockCache,
    /// The bus of the running `Vcpu::run`; see [`Cpu::bus`].
    pub bus: Option<BusPointer>,
}

/// The bus that `Vcpu::run` was given, without its lifetime.
#[derive(Clone, Copy)]
pub(crate) struct BusPointer(pub(crate) *const (dyn Bus + 'static));

impl Cpu {
    /// RIP wraps at the code's width.
    #[inline(always)]
    pub fn mask_rip(&self, rip: u64) -> u64 {
        rip & self.rip_mask
    }

    /// Whether paging is in long mode's format.
    #[inline(always)]
    pub fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// Whether the processor is in protected mode (and not virtual-8086).
    #[inline(always)]
    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0 && self.rflags & rflags::VM == 0
    }

    /// Whether the processor is in virtual-8086 mode.
    #[inline(always)]
    pub fn v86(&self) -> bool {
        self.rflags & rflags::VM != 0
    }

    /// Records an exception without error code.
    #[cold]
    pub fn raise(&mut self, vector: u8) -> Trap {
        self.trap = TrapKind::Exception { vector, error: None, address: 0 };
        Trap(())
    }

    /// Records an exception with error code.
    #[cold]
    pub fn raise_code(&mut self, vector: u8, error: u32) -> Trap {
        self.trap = TrapKind::Exception { vector, error: Some(error), address: 0 };
        Trap(())
    }

    /// Records #GP(0).
    #[cold]
    pub fn gp(&mut self) -> Trap {
        self.raise_code(vector::GP, 0)
    }

    /// Records #UD.
    #[cold]
    pub fn ud(&mut self) -> Trap {
        self.raise(vector::UD)
    }

    /// Records that `Vcpu::run` has to return; the instruction will be entered again.
    #[cold]
    pub fn exit(&mut self, exit: Exit) -> Trap {
        self.trap = TrapKind::Exit(exit);
        Trap(())
    }

    /// Gives what a memory access could not know its final form.
    pub fn note_trap(&mut self, op: &Op) {
        if self.trap == TrapKind::NotCanonical {
            let vector = if usize::from(op.seg) == SS { vector::SS } else { vector::GP };
            self.trap = TrapKind::Exception { vector, error: Some(0), address: 0 };
        }
    }

    /// Recomputes what follows from CR0, EFER, RFLAGS.VM, CS and SS. Call it after changing any of them, and leave the block.
    pub fn update_mode(&mut self) {
        let cs = self.seg[CS];
        self.cpl = if self.cr0 & cr0::PE == 0 {
            0
        } else if self.v86() {
            3
        } else {
            // SS.DPL is the privilege level (Intel SDM vol. 3 section 5.5); in 64-bit mode SS may be null, and its cached DPL holds it.
            ((self.seg[SS].access >> access::DPL_SHIFT) & 3) as u8
        };
        self.width = if self.long_mode() && cs.access & access::L != 0 {
            Width::Bits64
        } else if self.protected() && cs.access & access::DB != 0 || !self.protected() && !self.v86() && cs.access & access::DB != 0 {
            Width::Bits32
        } else {
            Width::Bits16
        };
        // EIP keeps 32 bits in 16-bit code too; the limit check holds it below 64 KiB.
        self.rip_mask = if self.width == Width::Bits64 { u64::MAX } else { 0xffff_ffff };
        self.regs[FS_BASE] = self.seg[FS].base;
        self.regs[GS_BASE] = self.seg[GS].base;
        self.update_translation();
    }

    /// Sets the base of FS or GS.
    pub fn set_segment_base(&mut self, segment: usize, base: u64) {
        self.seg[segment].base = base;
        match segment {
            FS => self.regs[FS_BASE] = base,
            GS => self.regs[GS_BASE] = base,
            _ => {}
        }
    }
}
