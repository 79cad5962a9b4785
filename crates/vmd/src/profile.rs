//! What CPUID tells the guest: the backend's leaves, trimmed to this machine, and the dialects' leaves.
//!
//! The topology is one package with as many cores as processors, one thread each; APIC ids are the processors' numbers.
//! (Intel SDM vol. 2, CPUID.) What differs between processors the backend fills in.
//!
//! Dialects stand at consecutive hypervisor bases, each with its leaves inside its own 0x100 ([`abi::hypervisor`]).

use std::sync::Arc;

use abi::hypervisor::{BASE_STEP, BASES, FIRST_BASE, PRESENT};
use dialects::Dialect;
use vmm::{CpuidEntry, CpuidTable};

/// Leaf 1 EDX: the package may hold more than one logical processor.
const HTT: u32 = 1 << 28;
/// Advanced power management leaf, and in its EDX: the TSC is invariant.
const POWER: u32 = 0x8000_0007;
const INVARIANT_TSC: u32 = 1 << 8;
/// Leaf 0xB, level types in ECX 15:8.
const LEVEL_SMT: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// CPUID of a machine with `cpus` processors.
pub fn cpuid(mut table: CpuidTable, cpus: u32, dialects: &[Arc<dyn Dialect>]) -> CpuidTable {
    if let Some(features) = table.get_mut(1, 0) {
        features.ebx = features.ebx & 0x0000_ffff | cpus << 16;
        features.edx = if cpus > 1 { features.edx | HTT } else { features.edx & !HTT };
        features.ecx = if dialects.is_empty() { features.ecx & !PRESENT } else { features.ecx | PRESENT };
    }
    if let Some(power) = table.get_mut(POWER, 0).filter(|_| dialects.iter().any(|dialect| dialect.has_clock())) {
        power.edx &= !INVARIANT_TSC;
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
    table.remove(FIRST_BASE..=FIRST_BASE + (BASES * BASE_STEP - 1));
    let mut base = FIRST_BASE;
    for dialect in dialects {
        let mut leaves = CpuidTable::default();
        dialect.add_cpuid(base, &mut leaves);
        add_interface(base, &leaves, &mut table);
        base += BASE_STEP;
    }
    if !dialects.is_empty() {
        // Intel's processors, and so KVM, answer a leaf that is not there with the highest basic one, which need not end a guest's search.
        table.set(CpuidEntry { leaf: base, subleaf: None, eax: 0, ebx: 0, ecx: 0, edx: 0 });
    }
    table
}

/// Adds one dialect's leaves: those in its own range, for what lies beyond is another's, and with EAX of the base leaf no lower than the
/// highest of them, because FreeBSD takes no interface whose EAX is below its base (`sys/x86/x86/identcpu.c`).
fn add_interface(base: u32, leaves: &CpuidTable, table: &mut CpuidTable) {
    let own = base..base + BASE_STEP;
    let highest = leaves.entries().iter().map(|entry| entry.leaf).filter(|leaf| own.contains(leaf)).max().unwrap_or(base);
    for entry in leaves.entries().iter().filter(|entry| own.contains(&entry.leaf)) {
        let eax = if entry.leaf == base { entry.eax.clamp(highest, own.end - 1) } else { entry.eax };
        table.set(CpuidEntry { eax, ..*entry });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend() -> CpuidTable {
        let mut table = CpuidTable::default();
        table.set(CpuidEntry { leaf: 0, subleaf: None, eax: 7, ebx: 0, ecx: 0, edx: 0 });
        table.set(CpuidEntry { leaf: 1, subleaf: None, eax: 0x306a9, ebx: 0, ecx: PRESENT, edx: 0 });
        table
    }

    #[test]
    fn one_processor_without_dialects_looks_bare() {
        let table = cpuid(backend(), 1, &[]);
        assert_eq!(table.get(1, 0).unwrap().ecx & PRESENT, 0);
        assert_eq!(table.get(1, 0).unwrap().edx & HTT, 0);
        assert!(table.get(FIRST_BASE, 0).is_none());
    }

    #[test]
    fn topology_counts_the_processors() {
        let table = cpuid(backend(), 6, &[]);
        assert_eq!(table.get(0, 0).unwrap().eax, 0xb);
        assert_eq!(table.get(1, 0).unwrap().ebx >> 16 & 0xff, 6);
        let cores = table.get(0xb, 1).unwrap();
        assert_eq!((cores.eax, cores.ebx), (3, 6));
    }

    #[test]
    fn dialect_with_a_clock_takes_the_invariant_tsc_away() {
        let mut table = backend();
        table.set(CpuidEntry { leaf: POWER, subleaf: None, eax: 0, ebx: 0, ecx: 0, edx: INVARIANT_TSC | 1 });
        let edx = |dialects: &[Arc<dyn Dialect>]| cpuid(table.clone(), 1, dialects).get(POWER, 0).unwrap().edx;
        assert_eq!(edx(&[Arc::new(Careless)]), INVARIANT_TSC | 1);
        assert_eq!(edx(&[Arc::new(Careless), Arc::new(dialects::kvm::Leaf { features: 0 })]), 1);
    }

    /// A dialect with the base leaf of OpenBSD's vmm(4), which says nothing of its highest leaf, and a leaf that is not its own.
    struct Careless;

    impl Dialect for Careless {
        fn name(&self) -> &'static str {
            "careless"
        }

        fn add_cpuid(&self, base: u32, table: &mut CpuidTable) {
            for (leaf, ebx) in [(base, 0x4141_4141), (base + 1, 1), (base + 0x100, 2), (1, 3)] {
                table.set(CpuidEntry { leaf, subleaf: None, eax: 0, ebx, ecx: 0, edx: 0 });
            }
        }

        fn reset(&self) {}
    }

    #[test]
    fn interfaces_stand_side_by_side_and_zeros_behind_the_last() {
        let table = cpuid(backend(), 1, &[Arc::new(Careless), Arc::new(Careless)]);
        for base in [0x4000_0000, 0x4000_0100] {
            let first = table.get(base, 0).unwrap();
            assert_eq!((first.eax, first.ebx), (base + 1, 0x4141_4141), "EAX is no lower than the highest leaf");
            assert_eq!(table.get(base + 1, 0).unwrap().ebx, 1);
        }
        let end = table.get(0x4000_0200, 0).unwrap();
        assert_eq!((end.eax, end.ebx, end.ecx, end.edx), (0, 0, 0, 0));
        assert_eq!(table.get(1, 0).unwrap().ebx, 1 << 16, "no dialect changes another's leaf");
        assert_ne!(table.get(1, 0).unwrap().ecx & PRESENT, 0);
    }
}
