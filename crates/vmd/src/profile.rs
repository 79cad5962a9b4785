//! What CPUID tells the guest: the backend's leaves, trimmed to this machine, and the dialects' leaves.
//!
//! The topology is one package with as many cores as processors, one thread each; APIC ids are the processors' numbers.
//! (Intel SDM vol. 2, CPUID.) What differs between processors the backend fills in.

use std::sync::Arc;

use dialects::Dialect;
use vmm::{CpuidEntry, CpuidTable};

/// First of the hypervisor leaves.
pub const HYPERVISOR_BASE: u32 = 0x4000_0000;
/// Distance between the bases of two dialects.
const BASE_STEP: u32 = 0x100;
/// Leaf 1 ECX: a hypervisor is present.
const HYPERVISOR_PRESENT: u32 = 1 << 31;
/// Leaf 1 EDX: the package may hold more than one logical processor.
const HTT: u32 = 1 << 28;
/// Leaf 0xB, level types in ECX 15:8.
const LEVEL_SMT: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// CPUID of a machine with `cpus` processors.
pub fn cpuid(mut table: CpuidTable, cpus: u32, dialects: &[Arc<dyn Dialect>]) -> CpuidTable {
    if let Some(features) = table.get_mut(1, 0) {
        features.ebx = features.ebx & 0x0000_ffff | cpus << 16;
        features.edx = if cpus > 1 { features.edx | HTT } else { features.edx & !HTT };
        features.ecx = if dialects.is_empty() { features.ecx & !HYPERVISOR_PRESENT } else { features.ecx | HYPERVISOR_PRESENT };
    }
    let core_bits = cpus.next_power_of_two().trailing_zeros();
    for subleaf in 0..=3 {
        if let Some(cache) = table.get_mut(4, subleaf).filter(|cache| cache.eax & 0x1f != 0) {
            // Bits 31:26 cores in the package, 25:14 processors that share the cache, both minus one.
            let sharing = if subleaf == 3 { cpus - 1 } else { 0 };
            cache.eax = cache.eax & 0x3fff | ((1 << core_bits) - 1) << 26 | sharing << 14;
        }
    }
    table.remove(0xb..=0xb);
    table.remove(0x1f..=0x1f);
    table.set(CpuidEntry { leaf: 0xb, subleaf: Some(0), eax: 0, ebx: 1, ecx: LEVEL_SMT, edx: 0 });
    table.set(CpuidEntry { leaf: 0xb, subleaf: Some(1), eax: core_bits, ebx: cpus, ecx: 1 | LEVEL_CORE, edx: 0 });
    if let Some(highest) = table.get_mut(0, 0) {
        highest.eax = highest.eax.max(0xb);
    }
    table.remove(HYPERVISOR_BASE..=HYPERVISOR_BASE + 0xffff);
    for (dialect, base) in dialects.iter().zip((HYPERVISOR_BASE..).step_by(BASE_STEP as usize)) {
        dialect.add_cpuid(base, &mut table);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend() -> CpuidTable {
        let mut table = CpuidTable::default();
        table.set(CpuidEntry { leaf: 0, subleaf: None, eax: 7, ebx: 0, ecx: 0, edx: 0 });
        table.set(CpuidEntry { leaf: 1, subleaf: None, eax: 0x306a9, ebx: 0, ecx: HYPERVISOR_PRESENT, edx: 0 });
        table
    }

    #[test]
    fn one_processor_without_dialects_looks_bare() {
        let table = cpuid(backend(), 1, &[]);
        assert_eq!(table.get(1, 0).unwrap().ecx & HYPERVISOR_PRESENT, 0);
        assert_eq!(table.get(1, 0).unwrap().edx & HTT, 0);
        assert!(table.get(HYPERVISOR_BASE, 0).is_none());
    }

    #[test]
    fn topology_counts_the_processors() {
        let table = cpuid(backend(), 6, &[]);
        assert_eq!(table.get(0, 0).unwrap().eax, 0xb);
        assert_eq!(table.get(1, 0).unwrap().ebx >> 16 & 0xff, 6);
        let cores = table.get(0xb, 1).unwrap();
        assert_eq!((cores.eax, cores.ebx), (3, 6));
    }
}
