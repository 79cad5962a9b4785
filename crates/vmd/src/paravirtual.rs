//! Makes a machine's dialects: the one place that knows their concrete types.
//!
//! The bus and CPUID see them as [`Dialect`]s in the order of their bases; the host's tools reach through [`Paravirtual`] what only one of
//! them has.

use std::sync::Arc;

use dialects::Dialect;
use dialects::hyperv::Hyperv;
use dialects::kvm::clock::PvClock;
use dialects::kvm::{self, Kvm, StealSource};
use dialects::openbsd::Openbsd;
use dialects::store::Store;
use dialects::vmware::{Platform, Vmware};
use dialects::xen::Xen;
use vmm::time::Timers;
use vmm::{BackendVm, Frequencies, GuestMemory};

use crate::config::{DialectName, Uuid};

/// What dialects are made from.
pub struct Surroundings {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// Bytes of RAM in it.
    pub ram: u64,
    /// Guest time.
    pub timers: Arc<Timers>,
    /// How fast the processors' clocks run.
    pub frequencies: Frequencies,
    /// Number of processors.
    pub vcpus: u32,
    /// What the backend says in [`vmm::Backend::kvm_dialect`].
    pub backend_kvm: Option<u32>,
    /// How long the host keeps the processors waiting, where that is known.
    pub steal: Option<Arc<dyn StealSource>>,
    /// The machine's information store.
    pub store: Arc<dyn Store>,
    /// The machine's UUID.
    pub uuid: Uuid,
    /// Random numbers that a guest cannot guess, or in a deterministic machine always the same.
    pub random: fn() -> u64,
}

/// The dialects of a machine with power on.
pub struct Paravirtual {
    /// All of them, in the order of their bases.
    pub dialects: Vec<Arc<dyn Dialect>>,
    /// KVM's, when it is there and not the backend's.
    kvm: Option<Arc<Kvm>>,
    /// Xen's, when it is there.
    pub xen: Option<Arc<Xen>>,
    /// Hyper-V's, when it is there.
    pub hyperv: Option<Arc<Hyperv>>,
    vmware: Option<Arc<Vmware>>,
}

impl Paravirtual {
    /// Makes the dialects named by `names`, in this order.
    pub fn new(names: &[DialectName], with: &Surroundings) -> Paravirtual {
        let Surroundings { memory, timers, vcpus, .. } = with;
        // Of all dialects that have it, so that its MSRs have one owner.
        let own_clock = Arc::new(PvClock::new(memory.clone(), Arc::clone(timers.clock()), with.frequencies.tsc_hz, *vcpus));
        let clock = with.backend_kvm.is_none().then(|| Arc::clone(&own_clock));
        let mut made = Paravirtual { dialects: Vec::new(), kvm: None, vmware: None, xen: None, hyperv: None };
        for name in names {
            let dialect: Arc<dyn Dialect> = match (name, &clock) {
                (DialectName::Kvm, Some(clock)) => {
                    // Xen and KVM are called by the same instruction, and Xen cannot do without.
                    let new = if names.contains(&DialectName::Xen) { Kvm::without_hypercalls } else { Kvm::new };
                    let kvm = new(memory.clone(), Arc::clone(clock), Arc::clone(timers), with.steal.clone(), *vcpus);
                    made.kvm = Some(Arc::clone(&kvm));
                    kvm
                }
                (DialectName::Kvm, None) => Arc::new(kvm::Leaf { features: with.backend_kvm.unwrap_or_default() }),
                (DialectName::Openbsd, clock) => Arc::new(Openbsd::new(clock.clone())),
                (DialectName::Xen, _) => {
                    let xen = Xen::new(memory.clone(), Arc::clone(&own_clock), Arc::clone(timers), with.steal.clone(), with.uuid.0, *vcpus);
                    made.xen = Some(Arc::clone(&xen));
                    xen
                }
                (DialectName::Hyperv, _) => {
                    let hyperv = Hyperv::new(memory.clone(), Arc::clone(timers), with.frequencies, with.steal.clone(), *vcpus);
                    made.hyperv = Some(Arc::clone(&hyperv));
                    hyperv
                }
                (DialectName::Vmware, _) => {
                    let vmware = Arc::new(vmware(with));
                    made.vmware = Some(Arc::clone(&vmware));
                    vmware
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

    /// VMware's, for what only that one has.
    pub fn vmware(&self) -> Option<&Vmware> {
        self.vmware.as_deref()
    }
}

fn vmware(with: &Surroundings) -> Vmware {
    let platform = Platform { tsc_hz: with.frequencies.tsc_hz, bus_hz: with.frequencies.apic_hz, memory: with.ram, uuid: with.uuid.0 };
    Vmware::new(platform, Arc::clone(with.timers.clock()), Arc::clone(&with.store), Box::new(with.random))
}
