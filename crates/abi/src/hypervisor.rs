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

/// A signature as the registers EBX, ECX and EDX hold it.
pub const fn registers(signature: Signature) -> [u32; 3] {
    let s = signature;
    [
        u32::from_le_bytes([s[0], s[1], s[2], s[3]]),
        u32::from_le_bytes([s[4], s[5], s[6], s[7]]),
        u32::from_le_bytes([s[8], s[9], s[10], s[11]]),
    ]
}
