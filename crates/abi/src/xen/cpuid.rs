//! CPUID leaves: `arch-x86/cpuid.h`. Numbers are offsets from the interface's base.

/// EBX, ECX and EDX of the base leaf: `XenVMMXenVMM`.
pub const SIGNATURE: [u32; 3] = crate::hypervisor::registers(crate::hypervisor::XEN);

/// EAX: version, major in the upper half.
pub const VERSION: u32 = 1;
/// EAX: number of hypercall pages, EBX: [`MSR_HYPERCALL_PAGE`], ECX: features of paravirtualized guests.
pub const HYPERCALL_PAGE: u32 = 2;
/// The TSC, in three subleaves: EAX [`tsc`] flags, EBX mode, ECX kHz; offset, multiplier and shift; host kHz.
pub const TIME: u32 = 3;
/// EAX: [`hvm`] features, EBX: vCPU id, ECX: domain.
pub const HVM: u32 = 4;
/// EAX: width of machine addresses, for paravirtualized guests.
pub const PV: u32 = 5;

/// EAX of [`TIME`], subleaf 0.
pub mod tsc {
    /// The host's TSC is reliable (bit 1).
    pub const HOST_RELIABLE: u32 = 1 << 1;
    /// EBX: the guest reads the TSC natively (`TSC_MODE_NEVER_EMULATE`).
    pub const MODE_NATIVE: u32 = 2;
}

/// EAX of [`HVM`] (`XEN_HVM_CPUID_*`).
pub mod hvm {
    /// ECX holds the domain's number.
    pub const DOMID_PRESENT: u32 = 1 << 4;
    /// Each vCPU can have a vector of its own for events, which it ends like any interrupt.
    pub const UPCALL_VECTOR: u32 = 1 << 6;
}

/// MSR that the guest writes a page's address to, for it to be filled with the entries of hypercalls. The index is the hypervisor's to choose;
/// this one, which Xen takes beside Hyper-V, is nobody else's.
pub const MSR_HYPERCALL_PAGE: u32 = 0x4000_0200;
/// Bytes of one hypercall's entry in the page.
pub const HYPERCALL_ENTRY: usize = 32;
