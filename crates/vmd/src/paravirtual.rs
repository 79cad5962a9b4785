//! Makes a machine's dialects: the one place that knows their concrete types.
//!
//! The bus and CPUID see them as [`Dialect`]s in the order of their bases; the host's tools reach through [`Paravirtual`] what only one of
//! them has.

use std::sync::Arc;

use dialects::Dialect;
use dialects::kvm::clock::PvClock;
use dialects::kvm::{self, Kvm, StealSource};
use dialects::openbsd::Openbsd;
use dialects::store::Store;
use dialects::vmware::{Platform, Random, Vmware};
use vmm::time::Timers;
use vmm::{BackendVm, GuestMemory};

use crate::layout::DialectName;

/// Ticks a second of the local APICs' timers: they count nanoseconds on both backends (Linux `APIC_BUS_CYCLE_NS`).
const APIC_HZ: u32 = 1_000_000_000;

/// What dialects are made from.
pub struct Surroundings {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// Bytes of it that the guest is told of.
    pub memory_size: u64,
    /// Guest time.
    pub timers: Arc<Timers>,
    /// Ticks a second of the guest's TSC.
    pub tsc_hz: u64,
    /// Number of processors.
    pub vcpus: u32,
    /// What the backend says in [`vmm::Backend::kvm_dialect`].
    pub backend_kvm: Option<u32>,
    /// How long the host keeps the processors waiting, where that is known.
    pub steal: Option<Arc<dyn StealSource>>,
    /// The machine's information store.
    pub store: Arc<dyn Store>,
    /// The machine's UUID, as the text form's bytes stand.
    pub uuid: [u8; 16],
}

/// The dialects of a machine with power on.
pub struct Paravirtual {
    /// All of them, in the order of their bases.
    pub dialects: Vec<Arc<dyn Dialect>>,
    /// KVM's, when it is there and not the backend's.
    kvm: Option<Arc<Kvm>>,
}

impl Paravirtual {
    /// Makes the dialects named by `names`, in this order. What the guest must not guess comes from `random`.
    pub fn new(names: &[DialectName], with: &Surroundings, random: Random) -> Paravirtual {
        let Surroundings { memory, timers, vcpus, .. } = with;
        // Of all dialects that have it, so that its MSRs have one owner.
        let clock = match with.backend_kvm {
            None => Some(Arc::new(PvClock::new(memory.clone(), Arc::clone(timers.clock()), with.tsc_hz, *vcpus))),
            Some(_) => None,
        };
        let mut made = Paravirtual { dialects: Vec::new(), kvm: None };
        let mut random = Some(random);
        for name in names {
            let dialect: Arc<dyn Dialect> = match (name, &clock) {
                (DialectName::Kvm, Some(clock)) => {
                    let kvm = Kvm::new(memory.clone(), Arc::clone(clock), Arc::clone(timers), with.steal.clone(), *vcpus);
                    made.kvm = Some(Arc::clone(&kvm));
                    kvm
                }
                (DialectName::Kvm, None) => Arc::new(kvm::Leaf { features: with.backend_kvm.unwrap_or_default() }),
                (DialectName::Openbsd, clock) => Arc::new(Openbsd::new(clock.clone())),
                (DialectName::Vmware, _) => {
                    let platform = Platform { tsc_hz: with.tsc_hz, bus_hz: APIC_HZ, memory: with.memory_size, uuid: with.uuid };
                    // Each name is there once.
                    let Some(random) = random.take() else { continue };
                    Arc::new(Vmware::new(platform, Arc::clone(timers.clock()), Arc::clone(&with.store), random))
                }
            };
            made.dialects.push(dialect);
        }
        made
    }

    /// Connects the dialects with the machine, which is made after them because its CPUID is theirs, too.
    pub fn connect(&self, vm: &Arc<dyn BackendVm>) {
        if let Some(kvm) = &self.kvm {
            kvm.connect(Arc::new(Arc::clone(vm)));
        }
    }
}
