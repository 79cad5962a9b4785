//! VMware's guestinfo, by the backdoor.
//!
//! The client is pvbus'; this file finds the gate that this program may use, and says what stands in its way. A hypercall is tried where CPUID
//! offers one, it wants no permission; then the port, first as it is (VMware lets everybody use it, and KVM with
//! `enable_vmware_backdoor`), then with the permission of ioperm(2).

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::time::Duration;

use pvbus::hal::Gate;
use pvbus::vmware::{Backdoor, BackdoorError, Guestinfo, Rpci};
use pvbus::{HalError, Interface, Kind, Store, StoreError};

use super::Opened;
use crate::error::Error;
use crate::machine::MACHINE;
use crate::sys::{file, process, time};

/// Tells whether the kernel keeps programs from the hardware (kernel_lockdown(7)).
const LOCKDOWN: &[u8] = b"/sys/kernel/security/lockdown";

/// The store.
pub struct Vmware {
    guestinfo: Guestinfo<'static>,
    gate: Gate,
}

impl Vmware {
    /// The store of `interface`, or whatever answers where there is none in CPUID.
    ///
    /// # Errors
    /// [`Error::Denied`] when the port is there but not for this program, [`Error::NoStore`] when nobody answers.
    pub fn open(interface: Option<&Interface>, patience: Duration) -> Result<Vmware, Error> {
        let backdoor = Backdoor::find(&MACHINE, interface).map_err(|error| match error {
            BackdoorError::Hal(HalError::Denied) => Error::Denied(denied(process::is_root(), &lockdown())),
            error => Error::NoStore(error.to_string()),
        })?;
        Ok(Vmware { guestinfo: Guestinfo::new(Rpci::new(backdoor).with_timeout(time::nanos(patience))), gate: backdoor.gate() })
    }

    /// How the host is reached.
    #[must_use]
    pub fn way(&self) -> String {
        let gate = match self.gate {
            Gate::In | Gate::Out => "port 0x5658",
            Gate::Vmcall => "VMCALL, which CPUID offers",
            Gate::Vmmcall => "VMMCALL, which CPUID offers",
        };
        let permission = match self.gate {
            Gate::Vmcall | Gate::Vmmcall => "",
            _ if MACHINE.needed_permission() => ", opened by ioperm(2)",
            _ => ", open to all programs",
        };
        format!("GuestRPC by the backdoor at {gate}{permission}")
    }
}

impl Store for Vmware {
    fn kind(&self) -> Kind {
        Kind::Vmware
    }

    fn read(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        self.guestinfo.read(key)
    }

    fn write(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.guestinfo.write(key, value)
    }
}

impl Opened for Vmware {
    fn rules(&self) -> &'static str {
        "VMware's keys begin with guestinfo. and have no blanks; they cannot be listed or removed; key and value are 64 KiB at most"
    }
}

/// Why ioperm(2) refused.
fn denied(is_root: bool, lockdown: &str) -> String {
    let locked = ["[integrity]", "[confidentiality]"].iter().any(|mode| lockdown.contains(mode));
    match (is_root, locked) {
        (_, true) => {
            "VMware's backdoor port is closed to programs and the kernel is locked down (Secure Boot), so that not even root opens it: \
                      the host would have to offer VMCALL, or set kvm.enable_vmware_backdoor"
                .into()
        }
        (false, _) => "VMware's backdoor port is closed to programs here, only root opens it".into(),
        (true, _) => "VMware's backdoor port is closed to programs, and the kernel does not open it to this one (CAP_SYS_RAWIO, \
                      kernel option X86_IOPL_IOPERM)"
            .into(),
    }
}

fn lockdown() -> String {
    let bytes = file::read(LOCKDOWN, 256).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusal_names_what_stands_in_the_way() {
        assert!(denied(false, "[none] integrity confidentiality").contains("only root"));
        assert!(denied(true, "none [integrity] confidentiality").contains("locked down"));
        assert!(denied(false, "none integrity [confidentiality]").contains("locked down"));
        assert!(denied(true, "").contains("CAP_SYS_RAWIO"));
    }
}
