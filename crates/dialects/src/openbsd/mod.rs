//! Host half of OpenBSD vmm(4)'s dialect: its CPUID leaf, and the paravirtual clock, which is KVM's ([`crate::kvm::clock`]).
//!
//! OpenBSD's `vmm_handle_cpuid` (`sys/arch/amd64/amd64/vmm_machdep.c`) shows this leaf at the first base and KVM's at the second, so that Linux
//! finds the clock, too: the layout `openbsd` has both dialects, on one clock. The highest leaf in EAX is 0, as OpenBSD has it, although there
//! is a second leaf; a board may raise it for guests that honour EAX. The control device vmmci(4), the dialect's other half, is a PCI function
//! (`devices::virtio::vmmci`).

use std::sync::Arc;

use abi::kvm::feature;
use abi::openbsd as words;
use vmm::{CpuidEntry, CpuidTable, MsrFault, VcpuId};

use crate::Dialect;
use crate::kvm::clock::PvClock;

/// Both bits that pvclock(4) wants (`sys/dev/pv/pvclock.c`, `pvclock_match`).
const FEATURES: u32 = feature::CLOCKSOURCE2 | feature::CLOCKSOURCE_STABLE;

/// OpenBSD's dialect of one machine.
pub struct Openbsd {
    /// `None` when the backend answers the clock's MSRs by itself.
    clock: Option<Arc<PvClock>>,
}

impl Openbsd {
    /// The dialect on this clock, which others may share.
    pub fn new(clock: Option<Arc<PvClock>>) -> Openbsd {
        Openbsd { clock }
    }
}

impl Dialect for Openbsd {
    fn name(&self) -> &'static str {
        "openbsd"
    }

    fn add_cpuid(&self, base: u32, table: &mut CpuidTable) {
        let [ebx, ecx, edx] = words::SIGNATURE;
        table.set(CpuidEntry { leaf: base, subleaf: None, eax: 0, ebx, ecx, edx });
        table.set(CpuidEntry { leaf: base + 1, subleaf: None, eax: FEATURES, ebx: 0, ecx: 0, edx: 0 });
    }

    fn read_msr(&self, vcpu: VcpuId, index: u32) -> Option<Result<u64, MsrFault>> {
        self.clock.as_ref()?.read_msr(vcpu, index)
    }

    fn write_msr(&self, vcpu: VcpuId, index: u32, value: u64) -> Option<Result<(), MsrFault>> {
        self.clock.as_ref()?.write_msr(vcpu, index, value)
    }

    fn reset(&self) {
        if let Some(clock) = &self.clock {
            clock.reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use vmm::time::{StepClock, Timers};

    use super::*;
    use crate::kvm::Kvm;

    #[test]
    fn leaf_is_what_openbsd_shows() {
        let mut table = CpuidTable::default();
        Openbsd::new(None).add_cpuid(0x4000_0000, &mut table);
        let base = table.get(0x4000_0000, 0).unwrap();
        assert_eq!(base.eax, 0);
        assert_eq!([base.ebx, base.ecx, base.edx].map(u32::to_le_bytes).as_flattened(), b"OpenBSDVMM58");
        assert_eq!(table.get(0x4000_0001, 0).unwrap().eax, 0x0100_0008);
    }

    #[test]
    fn both_dialects_have_one_clock() {
        let memory = vmm::memory::map(&[(0, 0x4000)]).unwrap();
        let timers = Timers::new(Arc::new(StepClock::new(Duration::ZERO)));
        let clock = Arc::new(PvClock::new(memory.clone(), Arc::clone(timers.clock()), 1_000_000_000, 1));
        let openbsd = Openbsd::new(Some(Arc::clone(&clock)));
        let kvm = Kvm::new(memory, clock, timers, None, 1);
        openbsd.write_msr(0, abi::kvm::MSR_SYSTEM_TIME_NEW, 0x1001).unwrap().unwrap();
        assert_eq!(kvm.read_msr(0, abi::kvm::MSR_SYSTEM_TIME_NEW), Some(Ok(0x1001)));
        assert_eq!(openbsd.read_msr(0, abi::kvm::MSR_STEAL_TIME), None);
    }

    #[test]
    fn backend_with_its_own_clock_is_not_disturbed() {
        assert_eq!(Openbsd::new(None).write_msr(0, abi::kvm::MSR_SYSTEM_TIME_NEW, 0x1001), None);
    }
}
