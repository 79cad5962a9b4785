//! Host half of the KVM dialect. Specification: Linux `Documentation/virt/kvm/x86/`.
//!
//! [`Kvm`] is for backends that have nothing of it; a backend that keeps the dialect itself, as Linux KVM does in the kernel, only needs its
//! [`Leaf`]. A guest finds the leaf `KVMKVMKVM`, and by its feature bits:
//!
//! ```text
//!   clock.rs      a page from which it computes nanoseconds out of its TSC, and the time of day
//!   steal.rs      how long the host kept each processor waiting               <-- StealSource
//!   eoi.rs        the end of an interrupt by a bit in memory                  --> Processors::set_eoi_flag
//!   hypercall.rs  kick, yield, interrupts to many processors, time pairs      --> Processors
//! ```
//!
//! Not there, and not promised: asynchronous page faults (no guest page is ever away), TLB flushes by the steal record (it cannot know when a
//! processor is preempted), poll control (a halted processor sleeps at once). The hint "processors are dedicated" (EDX) is never given.

pub mod clock;
pub(crate) mod eoi;
mod hypercall;
pub(crate) mod page;
pub(crate) mod steal;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use abi::kvm::{self as words, feature};
use serde::{Deserialize, Serialize};
use vmm::snapshot::{RestoreError, Saved, Snapshot};
use vmm::time::{Timer, TimerClient, Timers};
use vmm::{CpuidEntry, CpuidTable, GuestMemory, Hypercall, MsrFault, VcpuId};

use crate::{Dialect, Processors};
use clock::PvClock;
use eoi::EoiMsr;
use hypercall::Surroundings;
use steal::Steal;
pub use steal::StealSource;

/// Name and version in a [`Saved`] state.
const STATE: (&str, u32) = ("kvm", 1);
/// What the leaf always promises.
const FEATURES: u32 = feature::CLOCKSOURCE | feature::NOP_IO_DELAY | feature::CLOCKSOURCE2 | feature::PV_EOI | feature::CLOCKSOURCE_STABLE;
/// What it promises besides where hypercalls are its own.
const HYPERCALLS: u32 = feature::PV_UNHALT | feature::PV_SEND_IPI | feature::PV_SCHED_YIELD;

/// The dialect's CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    /// EAX of the second leaf, [`abi::kvm::feature`].
    pub features: u32,
}

/// For a backend that answers MSRs and hypercalls by itself: what [`vmm::Backend::kvm_dialect`] says is all there is to show.
impl Dialect for Leaf {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn add_cpuid(&self, base: u32, table: &mut CpuidTable) {
        let [ebx, ecx, edx] = words::SIGNATURE;
        table.set(CpuidEntry { leaf: base, subleaf: None, eax: base + 1, ebx, ecx, edx });
        table.set(CpuidEntry { leaf: base + 1, subleaf: None, eax: self.features, ebx: 0, ecx: 0, edx: 0 });
    }

    fn has_clock(&self) -> bool {
        true
    }

    fn reset(&self) {}
}

/// The KVM dialect of one machine.
pub struct Kvm {
    memory: GuestMemory,
    clock: Arc<PvClock>,
    leaf: Leaf,
    processors: OnceLock<Arc<dyn Processors>>,
    timers: Arc<Timers>,
    timer: OnceLock<Timer>,
    state: Mutex<State>,
}

struct State {
    steal: Option<Steal>,
    eoi: Vec<EoiMsr>,
}

#[derive(Serialize, Deserialize)]
struct Plain {
    steal: Option<Vec<steal::Processor>>,
    eoi: Vec<EoiMsr>,
}

impl Kvm {
    /// The dialect for `vcpus` processors. Without a `steal` source it has no steal time. The clock's state is the clock's own affair: other
    /// dialects may share it.
    pub fn new(memory: GuestMemory, clock: Arc<PvClock>, timers: Arc<Timers>, steal: Option<Arc<dyn StealSource>>, vcpus: u32) -> Arc<Kvm> {
        Kvm::with_features(memory, clock, timers, steal, vcpus, FEATURES | HYPERCALLS)
    }

    /// The same in a machine where hypercalls are another dialect's, which the same instruction calls.
    pub fn without_hypercalls(
        memory: GuestMemory,
        clock: Arc<PvClock>,
        timers: Arc<Timers>,
        steal: Option<Arc<dyn StealSource>>,
        vcpus: u32,
    ) -> Arc<Kvm> {
        Kvm::with_features(memory, clock, timers, steal, vcpus, FEATURES)
    }

    fn with_features(
        memory: GuestMemory,
        clock: Arc<PvClock>,
        timers: Arc<Timers>,
        steal: Option<Arc<dyn StealSource>>,
        vcpus: u32,
        features: u32,
    ) -> Arc<Kvm> {
        let leaf = Leaf { features: if steal.is_some() { features | feature::STEAL_TIME } else { features } };
        let steal = steal.map(|source| Steal::new(memory.clone(), source, vcpus));
        let state = Mutex::new(State { steal, eoi: vec![EoiMsr::default(); vcpus as usize] });
        let kvm = Arc::new(Kvm { memory, clock, leaf, processors: OnceLock::new(), timers, timer: OnceLock::new(), state });
        let weak: Weak<dyn TimerClient> = Arc::<Kvm>::downgrade(&kvm);
        let _ = kvm.timer.set(kvm.timers.timer(weak, 0));
        kvm
    }

    /// Connects the dialect with the machine's processors, which are made after it. Before that nothing reaches them.
    pub fn connect(&self, processors: Arc<dyn Processors>) {
        // The first are the machine's.
        let _ = self.processors.set(processors);
    }

    fn write_steal_time(&self, vcpu: VcpuId, value: u64) -> Option<Result<(), MsrFault>> {
        let mut state = self.lock();
        let steal = state.steal.as_mut()?;
        let was_enabled = steal.is_enabled();
        let result = steal.write_msr(vcpu, value);
        if steal.is_enabled() != was_enabled {
            self.look_soon(steal);
        }
        Some(result)
    }

    fn write_eoi(&self, vcpu: VcpuId, value: u64) -> Result<(), MsrFault> {
        let new = EoiMsr::checked(&self.memory, value)?;
        *self.lock().eoi.get_mut(vcpu as usize).ok_or(MsrFault)? = new;
        self.set_eoi_flag(vcpu, new);
        Ok(())
    }

    fn set_eoi_flag(&self, vcpu: VcpuId, eoi: EoiMsr) {
        if let Some(processors) = self.processors.get() {
            processors.set_eoi_flag(vcpu, eoi.flag(&self.memory));
        }
    }

    /// Arms the timer, or stops it when nobody wants to know.
    fn look_soon(&self, steal: &mut Steal) {
        let next = steal.update();
        if let Some(&timer) = self.timer.get() {
            self.timers.arm(timer, next.map(|interval| self.timers.clock().now().saturating_add(interval)));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Dialect for Kvm {
    fn name(&self) -> &'static str {
        self.leaf.name()
    }

    fn add_cpuid(&self, base: u32, table: &mut CpuidTable) {
        self.leaf.add_cpuid(base, table);
    }

    fn has_clock(&self) -> bool {
        self.leaf.has_clock()
    }

    fn read_msr(&self, vcpu: VcpuId, index: u32) -> Option<Result<u64, MsrFault>> {
        match index {
            words::MSR_STEAL_TIME => self.lock().steal.as_ref().map(|steal| steal.read_msr(vcpu)),
            words::MSR_PV_EOI => Some(self.lock().eoi.get(vcpu as usize).map(|eoi| eoi.0).ok_or(MsrFault)),
            _ => self.clock.read_msr(vcpu, index),
        }
    }

    fn write_msr(&self, vcpu: VcpuId, index: u32, value: u64) -> Option<Result<(), MsrFault>> {
        match index {
            words::MSR_STEAL_TIME => self.write_steal_time(vcpu, value),
            words::MSR_PV_EOI => Some(self.write_eoi(vcpu, value)),
            _ => self.clock.write_msr(vcpu, index, value),
        }
    }

    fn hypercall(&self, _vcpu: VcpuId, call: &mut Hypercall) -> bool {
        if self.leaf.features & HYPERCALLS == 0 {
            return false;
        }
        let vcpus = self.lock().eoi.len();
        Surroundings { memory: &self.memory, clock: &self.clock, processors: self.processors.get().map(Arc::as_ref), vcpus }.answer(call);
        true
    }

    fn reset(&self) {
        self.clock.reset();
        let mut state = self.lock();
        state.eoi.fill(EoiMsr::default());
        for vcpu in 0..state.eoi.len() as VcpuId {
            self.set_eoi_flag(vcpu, EoiMsr::default());
        }
        if let Some(steal) = &mut state.steal {
            steal.reset();
            self.look_soon(steal);
        }
    }
}

impl TimerClient for Kvm {
    fn timer_due(&self, _token: u64) {
        if let Some(steal) = &mut self.lock().steal {
            self.look_soon(steal);
        }
    }
}

impl Snapshot for Kvm {
    fn state(&self) -> Saved {
        let state = self.lock();
        Saved::new(STATE.0, STATE.1, &Plain { steal: state.steal.as_ref().map(Steal::state), eoi: state.eoi.clone() })
    }

    /// Comes after the local APICs' states: it gives them their flags.
    fn restore(&self, state: &Saved) -> Result<(), RestoreError> {
        let new: Plain = state.open(STATE.0, STATE.1)?;
        let mut state = self.lock();
        let vcpus = state.eoi.len();
        if new.eoi.len() != vcpus || new.steal.as_ref().is_some_and(|steal| steal.len() != vcpus) {
            return Err(RestoreError::Impossible { device: STATE.0, what: "the machine has another number of processors" });
        }
        if new.steal.is_some() != state.steal.is_some() {
            return Err(RestoreError::Impossible { device: STATE.0, what: "only one of the machines has steal time" });
        }
        if new.eoi.iter().any(|eoi| EoiMsr::checked(&self.memory, eoi.0).is_err()) {
            return Err(RestoreError::Impossible { device: STATE.0, what: "the word for ends of interrupts is not in memory" });
        }
        if let (Some(steal), Some(from)) = (&mut state.steal, &new.steal) {
            steal.restore(from);
            self.look_soon(steal);
        }
        for (vcpu, &eoi) in (0..).zip(&new.eoi) {
            self.set_eoi_flag(vcpu, eoi);
        }
        state.eoi = new.eoi;
        Ok(())
    }
}
