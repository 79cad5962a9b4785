//! How a guest finds out what it runs on: the CPUID leaves reserved for hypervisors.
//!
//! CPUID leaf 1 ECX bit 31 tells that there is a hypervisor (Intel and AMD keep the bit free). An interface has a base leaf, 0x40000000 or a
//! multiple of 0x100 above it: EAX is its highest leaf, EBX, ECX and EDX are twelve bytes of signature. Several interfaces stand at
//! several bases. Signatures: Linux `arch/x86/include/asm/` and `arch/x86/kernel/cpu/`, OpenBSD `sys/dev/pv/pvreg.h`, systemd `src/basic/virt.c`.

/// Leaf 1 ECX: a hypervisor is present.
pub const PRESENT: u32 = 1 << 31;
/// Base of the first interface.
pub const FIRST_BASE: u32 = 0x4000_0000;
/// Distance between bases.
pub const BASE_STEP: u32 = 0x100;
/// Number of bases that guests look at: 0x40000000 to 0x4000ff00.
pub const BASES: u32 = 0x100;

/// First leaf behind the range of hypervisors' leaves that guests look at.
pub const RANGE_END: u32 = FIRST_BASE + BASES * BASE_STEP;

/// Signature of an interface: EBX, ECX and EDX of its base leaf, in this order, as bytes.
pub type Signature = [u8; 12];

/// Linux KVM.
pub const KVM: Signature = *b"KVMKVMKVM\0\0\0";
/// Microsoft Hyper-V.
pub const HYPERV: Signature = *b"Microsoft Hv";
/// VMware ESXi, Workstation and Fusion.
pub const VMWARE: Signature = *b"VMwareVMware";
/// Xen.
pub const XEN: Signature = *b"XenVMMXenVMM";
/// OpenBSD vmm(4).
pub const OPENBSD: Signature = *b"OpenBSDVMM58";
/// FreeBSD bhyve.
pub const BHYVE: Signature = *b"bhyve bhyve ";
/// QEMU without a hypervisor under it.
pub const QEMU_TCG: Signature = *b"TCGTCGTCGTCG";
/// Oracle VirtualBox under its own name.
pub const VIRTUALBOX: Signature = *b"VBoxVBoxVBox";
/// Parallels, which has the bytes in another order than its name.
pub const PARALLELS: Signature = *b" lrpepyh  vr";
/// Parallels, by the order that some versions have.
pub const PARALLELS_PLAIN: Signature = *b"prl hyperv  ";
/// ACRN.
pub const ACRN: Signature = *b"ACRNACRNACRN";
/// Jailhouse.
pub const JAILHOUSE: Signature = *b"Jailhouse\0\0\0";
/// QNX.
pub const QNX: Signature = *b"QNXQVMBSQG\0\0";
/// NetBSD nvmm.
pub const NVMM: Signature = *b"___ NVMM ___";
/// KVM behind a Hyper-V facade of some Linux clouds.
pub const LINUX_KVM_HV: Signature = *b"Linux KVM Hv";

/// Hyper-V's leaves (Hypervisor Top-Level Functional Specification, 2.4).
pub mod hyperv {
    /// Offset from the base: EAX is [`INTERFACE`] where the leaves below mean what they do on Hyper-V.
    pub const LEAF_INTERFACE: u32 = 1;
    /// Offset: EAX build number, EBX major version in the high and minor in the low half.
    pub const LEAF_VERSION: u32 = 2;
    /// Offset: EAX and EBX are the partition's privileges, EDX more features.
    pub const LEAF_FEATURES: u32 = 3;
    /// `Hv#1`.
    pub const INTERFACE: u32 = 0x3123_7648;
    /// EAX of [`LEAF_FEATURES`]: MSR of the partition reference counter.
    pub const TIME_REF_COUNT: u32 = 1 << 1;
    /// EAX: synthetic interrupt controller.
    pub const SYNIC: u32 = 1 << 2;
    /// EAX: hypercall MSRs.
    pub const HYPERCALL: u32 = 1 << 5;
    /// EBX: may post messages.
    pub const POST_MESSAGES: u32 = 1 << 4;
    /// EBX: may signal events.
    pub const SIGNAL_EVENTS: u32 = 1 << 5;
}

/// Xen's leaves (`xen/include/public/arch-x86/cpuid.h`).
pub mod xen {
    /// Offset from the base: EAX is the major version in the high and the minor in the low half.
    pub const LEAF_VERSION: u32 = 1;
    /// Offset: EAX number of hypercall pages, EBX index of the MSR that fills them.
    pub const LEAF_HYPERCALL: u32 = 2;
    /// Offset: EAX features for HVM guests, EBX the processor's number, ECX the domain's.
    pub const LEAF_HVM: u32 = 4;
}

/// A signature as the registers EBX, ECX and EDX hold it.
pub const fn registers(signature: Signature) -> [u32; 3] {
    let s = signature;
    [
        u32::from_le_bytes([s[0], s[1], s[2], s[3]]),
        u32::from_le_bytes([s[4], s[5], s[6], s[7]]),
        u32::from_le_bytes([s[8], s[9], s[10], s[11]]),
    ]
}
