//! CPUID leaves: Hypervisor Top-Level Functional Specification (TLFS) 6.0b, 2.4; Linux `arch/x86/include/asm/hyperv-tlfs.h`.
//!
//! Numbers are offsets from the interface's base. The words by which a guest tells Hyper-V from its imitations are in
//! [`crate::hypervisor::hyperv`] and named here again.

pub use crate::hypervisor::hyperv::{
    HYPERCALL, INTERFACE, LEAF_FEATURES, LEAF_INTERFACE, LEAF_VERSION, POST_MESSAGES, SIGNAL_EVENTS, SYNIC, TIME_REF_COUNT,
};

/// EBX, ECX and EDX of the base leaf: `Microsoft Hv`.
pub const SIGNATURE: [u32; 3] = crate::hypervisor::registers(crate::hypervisor::HYPERV);

/// EAX: [`hint`]s, EBX: how often to try a spinlock before `HvCallNotifyLongSpinWait`, all ones for never.
pub const LEAF_HINTS: u32 = 4;
/// EAX: most virtual processors, EBX: most logical ones, ECX: most interrupt vectors for remapping.
pub const LEAF_LIMITS: u32 = 5;

/// EAX of [`LEAF_FEATURES`], beside those of [`crate::hypervisor::hyperv`].
pub mod feature {
    /// MSR of the time that the processor ran.
    pub const VP_RUNTIME: u32 = 1 << 0;
    /// MSRs of synthetic timers.
    pub const STIMER: u32 = 1 << 3;
    /// MSRs of the local APIC and of the assist page.
    pub const APIC: u32 = 1 << 4;
    /// MSR of the processor's index.
    pub const VP_INDEX: u32 = 1 << 6;
    /// MSR that resets the machine.
    pub const RESET: u32 = 1 << 7;
    /// Reference TSC page.
    pub const REFERENCE_TSC: u32 = 1 << 9;
    /// MSRs of the clocks' frequencies; [`super::more::FREQUENCIES`] says that they can be used.
    pub const FREQUENCIES: u32 = 1 << 11;
}

/// EBX of [`LEAF_FEATURES`], beside those of [`crate::hypervisor::hyperv`].
pub mod privilege {
    /// `HvExtCallQueryCapabilities` may be called.
    pub const EXTENDED_HYPERCALLS: u32 = 1 << 20;
}

/// EDX of [`LEAF_FEATURES`].
pub mod more {
    /// MSRs of the clocks' frequencies.
    pub const FREQUENCIES: u32 = 1 << 8;
    /// MSRs for a crash.
    pub const CRASH: u32 = 1 << 10;
    /// Lists of pages to flush may name large pages ([`EXTENDED_RANGES`](super::super::hypercall::flush::EXTENDED_RANGES)).
    pub const EXTENDED_RANGES: u32 = 1 << 14;
    /// Interrupt sources can be polled ([`POLLING`](super::super::msr::sint::POLLING)).
    pub const SINT_POLLING: u32 = 1 << 17;
    /// The MSR of the hypercall page can be locked ([`HYPERCALL_LOCKED`](super::super::msr::HYPERCALL_LOCKED)).
    pub const HYPERCALL_LOCK: u32 = 1 << 18;
    /// Synthetic timers can interrupt by a vector of the local APIC.
    pub const STIMER_DIRECT: u32 = 1 << 19;
}

/// EAX of [`LEAF_HINTS`].
pub mod hint {
    /// Flush other processors' TLBs by hypercalls.
    pub const REMOTE_FLUSH: u32 = 1 << 2;
    /// Reach the local APIC by its MSRs.
    pub const APIC_MSRS: u32 = 1 << 3;
    /// Be patient with timeouts.
    pub const RELAXED_TIMING: u32 = 1 << 5;
    /// Do not let interrupts end by themselves.
    pub const NO_AUTO_EOI: u32 = 1 << 9;
    /// Interrupt other processors by hypercalls.
    pub const CLUSTER_IPI: u32 = 1 << 10;
}
