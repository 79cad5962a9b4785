//! Which backend runs a machine.
//!
//! `auto` measures instead of guessing ([`kvm::probe()`]): a `/dev/kvm` that opens may still be useless for a kernel.

use std::sync::Arc;

use kvm::KvmBackend;
use vmm::{Backend, BackendError};

use crate::config::{BackendChoice, DialectName, MachineConfig};
use crate::hyperv;

/// A backend and why it is this one.
pub struct Chosen {
    /// The backend.
    pub backend: Arc<dyn Backend>,
    /// For people, one line.
    pub reason: String,
}

/// The backend for this machine.
///
/// # Errors
/// [`BackendError`] when the one that was named is not to be had.
pub fn choose(config: &MachineConfig) -> Result<Chosen, BackendError> {
    let soft = |reason: String| Chosen { backend: Arc::new(soft::Soft::new()), reason };
    match config.backend {
        BackendChoice::Soft => Ok(soft("as asked".into())),
        BackendChoice::Kvm => Ok(Chosen { backend: Arc::new(KvmBackend::new()?), reason: "as asked".into() }),
        BackendChoice::Auto if config.deterministic => Ok(soft("only the software CPU is deterministic".into())),
        BackendChoice::Auto if config.dialects.contains(DialectName::Xen) => {
            Ok(soft("KVM answers by itself the instruction by which Linux calls Xen".into()))
        }
        BackendChoice::Auto if config.dialects.contains(DialectName::Hyperv) => Ok(soft(hyperv::NOT_ON_KVM.into())),
        BackendChoice::Auto => match kvm::probe().choose() {
            Ok(reason) => Ok(Chosen { backend: Arc::new(KvmBackend::new()?), reason }),
            Err(reason) => Ok(soft(reason)),
        },
    }
}
