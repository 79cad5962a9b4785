//! CPUID between KVM's tables and ours.
//!
//! KVM tells what it can show a guest (KVM_GET_SUPPORTED_CPUID) and wants the whole table for each processor
//! (KVM_SET_CPUID2), with the fields that differ by processor filled in: the APIC id in leaf 1, 0xb, 0x1f and 0x8000001e
//! (Intel SDM vol. 2A, CPUID; AMD APM vol. 3 appendix E). OSXSAVE and the like follow the guest's CR4 in the kernel.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use vmm::{BackendError, CpuidEntry, CpuidTable, VcpuId};

use crate::host_error;

/// Leaves that belong to hypervisors.
const HYPERVISOR_LEAVES: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4fff_ffff;
/// Leaf 1 ECX: running under a hypervisor. A dialect sets it.
const HYPERVISOR_BIT: u32 = 1 << 31;
/// Leaf 1 ECX: the LAPIC timer has the TSC-deadline mode. KVM never reports it by itself (api.rst, KVM_GET_SUPPORTED_CPUID).
const TSC_DEADLINE_BIT: u32 = 1 << 24;
/// KVM's own feature leaf.
const KVM_FEATURES: u32 = 0x4000_0001;

/// What KVM can show a guest, without hypervisor leaves.
pub(crate) fn supported(kvm: &Kvm) -> Result<CpuidTable, BackendError> {
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|e| host_error("KVM_GET_SUPPORTED_CPUID", e))?;
    let mut table = from_kvm(cpuid.as_slice());
    if let Some(leaf) = table.get_mut(1, 0) {
        leaf.ecx &= !HYPERVISOR_BIT;
        if kvm.check_extension(kvm_ioctls::Cap::TscDeadlineTimer) {
            leaf.ecx |= TSC_DEADLINE_BIT;
        }
    }
    Ok(table)
}

/// EAX of KVM's feature leaf 0x40000001: which parts of the KVM dialect this kernel serves.
pub(crate) fn kvm_features(kvm: &Kvm) -> u32 {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .ok()
        .and_then(|cpuid| cpuid.as_slice().iter().find(|e| e.function == KVM_FEATURES).map(|e| e.eax))
        .unwrap_or(0)
}

fn from_kvm(entries: &[kvm_cpuid_entry2]) -> CpuidTable {
    let mut table = CpuidTable::default();
    for entry in entries.iter().filter(|e| !HYPERVISOR_LEAVES.contains(&e.function)) {
        table.set(CpuidEntry {
            leaf: entry.function,
            subleaf: (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(entry.index),
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        });
    }
    table
}

/// The table for processor `id`, as KVM_SET_CPUID2 wants it.
pub(crate) fn for_vcpu(table: &CpuidTable, id: VcpuId) -> Result<CpuId, BackendError> {
    let entries: Vec<kvm_cpuid_entry2> = table
        .entries()
        .iter()
        .map(|entry| {
            let mut entry = *entry;
            match entry.leaf {
                1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | (id << 24),
                0xb | 0x1f => entry.edx = id,
                0x8000_001e => entry.eax = id,
                _ => {}
            }
            kvm_cpuid_entry2 {
                function: entry.leaf,
                index: entry.subleaf.unwrap_or(0),
                flags: if entry.subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
                eax: entry.eax,
                ebx: entry.ebx,
                ecx: entry.ecx,
                edx: entry.edx,
                padding: [0; 3],
            }
        })
        .collect();
    CpuId::from_entries(&entries)
        .map_err(|_| BackendError::Invalid(format!("{} CPUID entries, but KVM takes {KVM_MAX_CPUID_ENTRIES} at most", entries.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_number_reaches_every_leaf_that_carries_it() {
        let mut table = CpuidTable::default();
        for (leaf, subleaf) in [(1, None), (0xb, Some(0)), (0xb, Some(1)), (0x8000_001e, None), (7, Some(0))] {
            table.set(CpuidEntry { leaf, subleaf, eax: 0, ebx: 0xff12_3456, ecx: 0, edx: 0 });
        }
        let kvm = for_vcpu(&table, 3).unwrap();
        let of = |function, index| *kvm.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap();
        assert_eq!(of(1, 0).ebx, 0x0312_3456);
        assert_eq!((of(0xb, 0).edx, of(0xb, 1).edx), (3, 3));
        assert_eq!(of(0x8000_001e, 0).eax, 3);
        assert_eq!(of(7, 0).edx, 0);
        assert_eq!(of(7, 0).flags, KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
        assert_eq!(of(1, 0).flags, 0);
    }

    #[test]
    fn hypervisor_leaves_are_left_out() {
        let entries = [
            kvm_cpuid_entry2 { function: 0, eax: 1, ..Default::default() },
            kvm_cpuid_entry2 { function: 0x4000_0001, eax: 1, ..Default::default() },
        ];
        let table = from_kvm(&entries);
        assert_eq!(table.entries().len(), 1);
        assert_eq!(table.entries()[0].subleaf, None);
    }

    #[test]
    fn oversized_table_is_refused() {
        let mut table = CpuidTable::default();
        for leaf in 0..300 {
            table.set(CpuidEntry { leaf, subleaf: None, eax: 0, ebx: 0, ecx: 0, edx: 0 });
        }
        assert!(matches!(for_vcpu(&table, 0), Err(BackendError::Invalid(_))));
    }
}
