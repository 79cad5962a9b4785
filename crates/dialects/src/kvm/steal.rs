//! Steal time: how long a processor was ready to run while the host ran something else.
//!
//! Linux guests show it in `/proc/stat` and keep it out of their tasks' times. The numbers come from a [`StealSource`] and are written to the
//! guest at intervals: often while time is stolen, seldom while none is, so that an idle machine stays idle. `preempted` stays zero, as
//! `msr.rst` has it for hosts that do not know: a thread that the host takes off its processor cannot say so.

use std::sync::Arc;

use abi::kvm::{self as words, StealTime};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use vmm::{GuestMemory, MsrFault, VcpuId};
use zerocopy::{FromBytes, IntoBytes};

use super::page::{holds, publish};

/// Nanoseconds between two looks while time is stolen.
const SHORT: u64 = 10_000_000;
/// And while none is.
const LONG: u64 = 320_000_000;
/// Offset of the version in the record.
const VERSION_AT: usize = std::mem::offset_of!(StealTime, version);

/// Where the host's numbers come from.
pub trait StealSource: Send + Sync {
    /// Nanoseconds that processor `vcpu` has waited for a host processor since it began to run. Never goes back.
    fn stolen(&self, vcpu: VcpuId) -> u64;

    /// Nanoseconds that it has had one. Never goes back.
    fn ran(&self, vcpu: VcpuId) -> u64;
}

/// Steal time of all processors of a machine.
pub(super) struct Steal {
    memory: GuestMemory,
    source: Arc<dyn StealSource>,
    processors: Vec<Processor>,
    pace: Pace,
}

/// How long it is between the last look and the next: short while time is stolen, longer and longer while none is.
pub(crate) struct Pace(u64);

impl Default for Pace {
    fn default() -> Pace {
        Pace(SHORT)
    }
}

impl Pace {
    /// Nanoseconds until the next look, after one that has `changed` something or not.
    pub(crate) fn next(&mut self, changed: bool) -> u64 {
        self.0 = if changed { SHORT } else { (2 * self.0).min(LONG) };
        self.0
    }
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Processor {
    /// Last value written to the MSR.
    msr: u64,
    /// What the source said when the record was last written.
    seen: u64,
}

impl Processor {
    fn record(&self) -> Option<u64> {
        (self.msr & words::STEAL_TIME_ENABLE != 0).then_some(self.msr & !words::STEAL_TIME_ENABLE)
    }
}

impl Steal {
    pub(super) fn new(memory: GuestMemory, source: Arc<dyn StealSource>, vcpus: u32) -> Steal {
        Steal { memory, source, processors: vec![Processor::default(); vcpus as usize], pace: Pace::default() }
    }

    pub(super) fn read_msr(&self, vcpu: VcpuId) -> Result<u64, MsrFault> {
        self.processors.get(vcpu as usize).map(|processor| processor.msr).ok_or(MsrFault)
    }

    /// WRMSR. What the record holds is counted on from, so that a guest that registers again keeps its sum.
    pub(super) fn write_msr(&mut self, vcpu: VcpuId, value: u64) -> Result<(), MsrFault> {
        let processor = self.processors.get_mut(vcpu as usize).ok_or(MsrFault)?;
        let new = Processor { msr: value, seen: self.source.stolen(vcpu) };
        if value & words::STEAL_TIME_RESERVED != 0 {
            return Err(MsrFault);
        }
        if let Some(gpa) = new.record() {
            if !holds(&self.memory, gpa, size_of::<StealTime>()) {
                return Err(MsrFault);
            }
            add(&self.memory, gpa, 0)?;
            self.pace = Pace::default();
        }
        *processor = new;
        Ok(())
    }

    /// Brings all records up to date. Nanoseconds until the next time, or `None` when no guest wants to know.
    pub(super) fn update(&mut self) -> Option<u64> {
        let mut changed = false;
        let mut enabled = false;
        for (vcpu, processor) in (0..).zip(&mut self.processors) {
            let Some(gpa) = processor.record() else { continue };
            enabled = true;
            let stolen = self.source.stolen(vcpu);
            let more = stolen.saturating_sub(processor.seen);
            // Checked when it was registered.
            if more != 0 && add(&self.memory, gpa, more).is_ok() {
                processor.seen = stolen;
                changed = true;
            }
        }
        let next = self.pace.next(changed);
        enabled.then_some(next)
    }

    /// Whether some record has to be kept up to date.
    pub(super) fn is_enabled(&self) -> bool {
        self.processors.iter().any(|processor| processor.record().is_some())
    }

    pub(super) fn reset(&mut self) {
        self.processors.fill(Processor::default());
    }

    pub(super) fn state(&self) -> Vec<Processor> {
        self.processors.clone()
    }

    /// Takes over `state`, in which time stolen by another host counts no more.
    pub(super) fn restore(&mut self, state: &[Processor]) {
        for ((vcpu, processor), from) in (0..).zip(&mut self.processors).zip(state) {
            *processor = Processor { msr: from.msr, seen: self.source.stolen(vcpu) };
        }
    }
}

/// Adds `more` nanoseconds to the record at `gpa`.
fn add(memory: &GuestMemory, gpa: u64, more: u64) -> Result<(), MsrFault> {
    let mut bytes = [0; size_of::<StealTime>()];
    memory.read_slice(&mut bytes, GuestAddress(gpa)).map_err(|_| MsrFault)?;
    let old = StealTime::read_from_bytes(&bytes).map_err(|_| MsrFault)?;
    let new = StealTime { steal: old.steal.get().wrapping_add(more).into(), flags: 0.into(), preempted: 0, ..old };
    publish(memory, gpa, new.as_bytes(), VERSION_AT, old.version.get())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    const RECORD: u64 = 0x1040;

    #[derive(Default)]
    struct Host(AtomicU64);

    impl StealSource for Host {
        fn stolen(&self, vcpu: VcpuId) -> u64 {
            self.0.load(Ordering::Relaxed) * u64::from(vcpu)
        }
        fn ran(&self, _vcpu: VcpuId) -> u64 {
            0
        }
    }

    fn machine() -> (GuestMemory, Arc<Host>, Steal) {
        let memory = vmm::memory::map(&[(0, 0x4000)]).unwrap();
        let host = Arc::new(Host::default());
        (memory.clone(), host.clone(), Steal::new(memory, host, 2))
    }

    fn record(memory: &GuestMemory) -> (u64, u32) {
        let mut bytes = [0; 64];
        memory.read_slice(&mut bytes, GuestAddress(RECORD)).unwrap();
        let record = StealTime::read_from_bytes(&bytes).unwrap();
        assert_eq!((record.flags.get(), record.preempted), (0, 0));
        (record.steal.get(), record.version.get())
    }

    #[test]
    fn stolen_time_is_counted_from_the_registration_on() {
        let (memory, host, mut steal) = machine();
        host.0.store(1000, Ordering::Relaxed);
        steal.write_msr(1, RECORD | 1).unwrap();
        assert_eq!(record(&memory), (0, 2));
        host.0.store(1500, Ordering::Relaxed);
        steal.update();
        assert_eq!(record(&memory), (500, 4));
        assert_eq!(steal.read_msr(1), Ok(RECORD | 1));
    }

    #[test]
    fn record_that_is_registered_again_keeps_its_sum() {
        let (memory, host, mut steal) = machine();
        steal.write_msr(1, RECORD | 1).unwrap();
        host.0.store(7, Ordering::Relaxed);
        steal.update();
        steal.write_msr(1, 0).unwrap();
        host.0.store(100, Ordering::Relaxed);
        assert_eq!(steal.update(), None);
        steal.write_msr(1, RECORD | 1).unwrap();
        host.0.store(101, Ordering::Relaxed);
        steal.update();
        assert_eq!(record(&memory).0, 8);
    }

    #[test]
    fn quiet_machine_is_looked_at_seldom() {
        let (_, host, mut steal) = machine();
        steal.write_msr(1, RECORD | 1).unwrap();
        let intervals: Vec<u64> = (0..7).filter_map(|_| steal.update()).collect();
        assert_eq!((intervals[0], intervals[6]), (2 * SHORT, LONG));
        host.0.store(1, Ordering::Relaxed);
        assert_eq!(steal.update(), Some(SHORT));
    }

    #[test]
    fn bad_addresses_fault() {
        let (_, _, mut steal) = machine();
        for value in [RECORD | 0x11, 0x4001, u64::MAX] {
            assert_eq!(steal.write_msr(0, value), Err(MsrFault), "{value:#x}");
        }
        assert_eq!(steal.write_msr(2, RECORD | 1), Err(MsrFault));
        assert!(!steal.is_enabled());
    }

    #[test]
    fn restored_machine_does_not_count_what_another_host_stole() {
        let (memory, host, mut steal) = machine();
        steal.write_msr(1, RECORD | 1).unwrap();
        host.0.store(5000, Ordering::Relaxed);
        steal.restore(&steal.state());
        host.0.store(5003, Ordering::Relaxed);
        steal.update();
        assert_eq!(record(&memory).0, 3);
    }
}
