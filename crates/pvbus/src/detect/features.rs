//! Names of feature bits.
//!
//! KVM: Linux `Documentation/virt/kvm/x86/cpuid.rst`. Hyper-V: Top-Level Functional Specification 2.4.3. VMware: Linux
//! `arch/x86/include/asm/vmware.h`. Xen: `xen/include/public/arch-x86/cpuid.h`, `XEN_HVM_CPUID_*`.

use alloc::vec::Vec;

use super::Kind;
use crate::hal::Cpuid;

/// Names of bits: register, bit, name.
pub(super) type Table = &'static [(Register, u8, &'static str)];

/// The register of a leaf.
#[derive(Debug, Clone, Copy)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// Leaf base + 1.
const KVM: Table = &[
    (Eax, 0, "clocksource"),
    (Eax, 1, "nop-io-delay"),
    (Eax, 2, "mmu-op"),
    (Eax, 3, "clocksource2"),
    (Eax, 4, "async-pf"),
    (Eax, 5, "steal-time"),
    (Eax, 6, "pv-eoi"),
    (Eax, 7, "pv-unhalt"),
    (Eax, 9, "pv-tlb-flush"),
    (Eax, 10, "async-pf-vmexit"),
    (Eax, 11, "pv-send-ipi"),
    (Eax, 12, "poll-control"),
    (Eax, 13, "pv-sched-yield"),
    (Eax, 14, "async-pf-int"),
    (Eax, 15, "msi-ext-dest-id"),
    (Eax, 16, "map-gpa-range"),
    (Eax, 17, "migration-control"),
    (Eax, 24, "clocksource-stable"),
    (Edx, 0, "realtime"),
];

/// Leaf base + 3.
pub(super) const HYPERV: Table = &[
    (Eax, 0, "vp-runtime"),
    (Eax, 1, "time-ref-count"),
    (Eax, 2, "synic"),
    (Eax, 3, "stimer"),
    (Eax, 4, "apic-msrs"),
    (Eax, 5, "hypercall"),
    (Eax, 6, "vp-index"),
    (Eax, 7, "reset"),
    (Eax, 8, "stats"),
    (Eax, 9, "reference-tsc"),
    (Eax, 10, "guest-idle"),
    (Eax, 11, "frequency-msrs"),
    (Eax, 12, "debug-msrs"),
    (Eax, 13, "reenlightenment"),
    (Eax, 15, "tsc-invariant"),
    (Ebx, 0, "create-partitions"),
    (Ebx, 1, "access-partition-id"),
    (Ebx, 2, "access-memory-pool"),
    (Ebx, 4, "post-messages"),
    (Ebx, 5, "signal-events"),
    (Ebx, 6, "create-port"),
    (Ebx, 7, "connect-port"),
    (Ebx, 8, "access-stats"),
    (Ebx, 11, "debugging"),
    (Ebx, 12, "cpu-management"),
    (Ebx, 20, "extended-hypercalls"),
    (Ebx, 22, "isolation"),
    (Edx, 3, "cpu-dynamic-partitioning"),
    (Edx, 4, "xmm-hypercall-input"),
    (Edx, 8, "frequencies"),
    (Edx, 10, "crash-msrs"),
    (Edx, 14, "extended-flush-ranges"),
    (Edx, 15, "xmm-hypercall-output"),
    (Edx, 17, "sint-polling"),
    (Edx, 18, "hypercall-lock"),
    (Edx, 19, "stimer-direct"),
];

/// Leaf base + 0x10.
const VMWARE: Table = &[(Ecx, 0, "vmmcall"), (Ecx, 1, "vmcall")];

/// Leaf base + 4.
const XEN: Table = &[
    (Eax, 0, "apic-access-virt"),
    (Eax, 1, "x2apic-virt"),
    (Eax, 2, "iommu-mappings"),
    (Eax, 3, "vcpu-id"),
    (Eax, 4, "domid"),
    (Eax, 5, "ext-dest-id"),
    (Eax, 6, "upcall-vector"),
];

/// The table of a kind.
pub(super) fn of(kind: Kind) -> Table {
    match kind {
        Kind::Kvm | Kind::OpenBsd => KVM,
        Kind::HyperV => HYPERV,
        Kind::Vmware => VMWARE,
        Kind::Xen => XEN,
        _ => &[],
    }
}

/// Names of the bits that are set.
pub(super) fn names(table: Table, features: &Cpuid) -> Vec<&'static str> {
    let register = |register| match register {
        Eax => features.eax,
        Ebx => features.ebx,
        Ecx => features.ecx,
        Edx => features.edx,
    };
    table.iter().filter(|(which, bit, _)| register(*which) >> bit & 1 == 1).map(|(_, _, name)| *name).collect()
}
