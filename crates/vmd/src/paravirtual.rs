//! Makes a machine's dialects: the one place that knows their concrete types.
//!
//! The bus and CPUID see them as [`Dialect`]s in the order of their bases; the host's tools reach through [`Paravirtual`] what only one of
//! them has.

use std::sync::Arc;

use dialects::Dialect;
use dialects::kvm::Kvm;
use dialects::store::Store;
use vmm::GuestMemory;
use vmm::time::Clock;

use crate::layout::DialectName;

/// What dialects are made from.
pub struct Surroundings {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// Guest time.
    pub clock: Arc<dyn Clock>,
    /// Ticks a second of the guest's TSC.
    pub tsc_hz: u64,
    /// Number of processors.
    pub vcpus: u32,
    /// The machine's information store.
    pub store: Arc<dyn Store>,
    /// The machine's UUID, as the text form's bytes stand.
    pub uuid: [u8; 16],
}

/// The dialects of a machine with power on.
pub struct Paravirtual {
    /// All of them, in the order of their bases.
    pub dialects: Vec<Arc<dyn Dialect>>,
}

impl Paravirtual {
    /// Makes the dialects named by `names`, in this order.
    pub fn new(names: &[DialectName], with: &Surroundings) -> Paravirtual {
        let mut made = Paravirtual { dialects: Vec::new() };
        for name in names {
            match name {
                DialectName::Kvm => {
                    made.dialects.push(Arc::new(Kvm::new(with.memory.clone(), Arc::clone(&with.clock), with.tsc_hz, with.vcpus)));
                }
                DialectName::Vmware | DialectName::Openbsd => {}
            }
        }
        made
    }
}
