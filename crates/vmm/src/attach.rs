//! Attaching vmm0: what is said about it, and what its guests are shown of the processor.
//!
//! OpenBSD prints `vmm0 at mainbus0: VMX/EPT` or `SVM/RVI`; ours adds `soft`, with the reason when something better was looked for.
//! The CPUID of machines made by CREATE follows OpenBSD's vmm(4): no local APIC and what hangs on one, no nested virtualization, and
//! hypervisor leaves `OpenBSDVMM58` at 0x40000000 and, so that Linux uses pvclock, `KVMKVMKVM` at 0x40000100.

use std::fmt;

use abi::kvm::feature;

use crate::backend::Backend;
use crate::cpuid::{CpuidEntry, CpuidTable};

/// What attaching prints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// `VMX/EPT`, `SVM/RVI` or `soft`.
    pub technology: String,
    /// Why it is this one.
    pub reason: Option<String>,
}

impl Attachment {
    /// Of a monitor over `backend`; `reason` says why no other was taken.
    pub fn new(backend: &dyn Backend, reason: Option<String>) -> Attachment {
        Attachment { technology: backend.technology().to_owned(), reason }
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vmm0 at mainbus0: {}", self.technology)?;
        match &self.reason {
            Some(reason) => write!(f, " ({reason})"),
            None => Ok(()),
        }
    }
}

/// Leaf 1 ECX: DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2, SDBG, PDCM, PCID, DCA, x2APIC, TSC-deadline.
const LEAF1_ECX_HIDDEN: u32 =
    1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 15 | 1 << 17 | 1 << 18 | 1 << 21 | 1 << 24;
/// Leaf 1 EDX: MCE, APIC, MTRR, MCA, DS, ACPI, HTT, TM.
const LEAF1_EDX_HIDDEN: u32 = 1 << 7 | 1 << 9 | 1 << 12 | 1 << 14 | 1 << 21 | 1 << 22 | 1 << 28 | 1 << 29;
/// Leaf 1 ECX: under a hypervisor.
const LEAF1_HYPERVISOR: u32 = 1 << 31;
/// Leaf 7 EBX: HLE, INVPCID, RTM, all AVX-512, SGX, PT.
const LEAF7_EBX_HIDDEN: u32 =
    1 << 2 | 1 << 4 | 1 << 10 | 1 << 11 | 1 << 16 | 1 << 17 | 1 << 21 | 1 << 25 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 30 | 1 << 31;
/// Leaf 0x80000001 ECX: SVM.
const LEAF_8000_0001_ECX_HIDDEN: u32 = 1 << 2;
/// Signatures in EBX, ECX, EDX.
const OPENBSD_SIGNATURE: &[u8; 12] = b"OpenBSDVMM58";
/// OpenBSD's leaves, then KVM's.
const OPENBSD_LEAVES: u32 = 0x4000_0000;
const KVM_LEAVES: u32 = 0x4000_0100;

/// What CPUID answers in a machine made by CREATE.
pub(crate) fn guest_cpuid(backend: &dyn Backend, pvclock: bool) -> CpuidTable {
    let mut table = backend.supported_cpuid();
    if let Some(leaf) = table.get_mut(1, 0) {
        leaf.ecx = leaf.ecx & !LEAF1_ECX_HIDDEN | LEAF1_HYPERVISOR;
        leaf.edx &= !LEAF1_EDX_HIDDEN;
        // One logical processor, no CLFLUSH difference.
        leaf.ebx &= 0x0000_ffff;
    }
    if let Some(leaf) = table.get_mut(7, 0) {
        leaf.ebx &= !LEAF7_EBX_HIDDEN;
    }
    if let Some(leaf) = table.get_mut(0x8000_0001, 0) {
        leaf.ecx &= !LEAF_8000_0001_ECX_HIDDEN;
    }
    for leaf in [0xb, 0x1f] {
        table.remove(leaf..=leaf);
    }
    let features = if pvclock || backend.kvm_dialect().is_some() { feature::CLOCKSOURCE2 | feature::CLOCKSOURCE_STABLE } else { 0 };
    let [o0, o1, o2] = OPENBSD_SIGNATURE.as_chunks::<4>().0 else { unreachable!("twelve bytes are three words") };
    let openbsd = [o0, o1, o2].map(|bytes| u32::from_le_bytes(*bytes));
    let mut set = |leaf, eax, [ebx, ecx, edx]: [u32; 3]| table.set(CpuidEntry { leaf, subleaf: None, eax, ebx, ecx, edx });
    set(OPENBSD_LEAVES, 0, openbsd);
    set(OPENBSD_LEAVES + 1, features, [0; 3]);
    set(KVM_LEAVES, KVM_LEAVES + 1, abi::kvm::SIGNATURE);
    set(KVM_LEAVES + 1, features | feature::NOP_IO_DELAY, [0; 3]);
    table
}
