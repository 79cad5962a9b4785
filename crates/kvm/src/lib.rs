//! Backend: Linux KVM.
//!
//! The machine's processors run on the host's own, through `/dev/kvm` (kernel: Documentation/virt/kvm/api.rst). The kernel keeps
//! memory slots, local APICs and the KVM dialect; everything else of the machine is ours and is reached through
//! [`vmm::Bus`]. `VMCALL` and `VMMCALL` are answered by the kernel and never reach [`vmm::Bus::hypercall`]: dialects whose hypercall page
//! we fill use a port instead.
//!
//! ```text
//!   KvmVcpu::run --KVM_RUN--> exits.rs (copy) --> vcpu.rs --> Bus
//!                    ^ kick.rs (signal)                        diagnose.rs when KVM gives up
//! ```
//!
//! A `/dev/kvm` that opens is not yet one that is of use: [`probe()`] measures it.

mod cpuid;
mod diagnose;
mod exits;
mod kick;
pub mod probe;
mod restart;
mod slots;
mod state;
mod vcpu;
mod vm;

use std::sync::Arc;

use kvm_ioctls::Kvm;
use vmm::{Backend, BackendError, BackendVm, CpuidTable, Frequencies, VmConfig};

pub use probe::{HostAbilities, Speed, probe};

/// The only version of the API there is (api.rst, KVM_GET_API_VERSION).
const API_VERSION: i32 = 12;
/// Ticks a second of the kernel's local APICs (`APIC_BUS_CYCLE_NS`, Linux `arch/x86/kvm/lapic.h`).
const APIC_HZ: u32 = 1_000_000_000;

/// Linux KVM.
pub struct KvmBackend {
    kvm: Kvm,
    cpuid: CpuidTable,
    features: u32,
    technology: &'static str,
}

impl KvmBackend {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// [`BackendError::Host`] when it does not open, with what to do about it; [`BackendError::Unsupported`] when it is too old.
    pub fn new() -> Result<KvmBackend, BackendError> {
        let kvm = Kvm::new().map_err(|e| probe::open_error(e.into()))?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(BackendError::Unsupported(format!("/dev/kvm speaks version {version}, but 12 is needed")));
        }
        let cpuid = cpuid::supported(&kvm)?;
        let features = cpuid::kvm_features(&kvm);
        Ok(KvmBackend { kvm, cpuid, features, technology: probe::host_technology() })
    }
}

impl Backend for KvmBackend {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn technology(&self) -> &'static str {
        self.technology
    }

    fn supported_cpuid(&self) -> CpuidTable {
        self.cpuid.clone()
    }

    fn kvm_dialect(&self) -> Option<u32> {
        Some(self.features)
    }

    /// Only a processor tells, so one is made for it; without scaling in the host's hardware all have the same frequency.
    fn frequencies(&self) -> Result<Frequencies, BackendError> {
        let processor = self.kvm.create_vm().and_then(|vm| vm.create_vcpu(0));
        let khz = processor.and_then(|processor| processor.get_tsc_khz()).map_err(|e| host_error("KVM_GET_TSC_KHZ", e))?;
        Ok(Frequencies { tsc_hz: u64::from(khz) * 1000, apic_hz: APIC_HZ })
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn BackendVm>, BackendError> {
        Ok(Arc::new(vm::KvmVm::new(&self.kvm, config)?))
    }
}

fn host_error(what: &str, error: kvm_ioctls::Error) -> BackendError {
    BackendError::Host { what: what.to_owned(), source: error.into() }
}
