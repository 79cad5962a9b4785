//! Asking a guest to shut down, to reboot, to set its clock or to bring its file systems to rest: the ways there are, and which one a guest
//! listens to.
//!
//! ```text
//!   vmware    VMware's tools in the guest, once they have announced that they obey (TCLO OS_Halt, OS_Reboot, Time_Synchronize)
//!   hyperv    the guest's drivers for integration components, once they have agreed on a version; they alone know of file systems
//!   xen       the guest's xenbus driver, once it has announced that it obeys (control/shutdown)
//!   openbsd   the vmmci(4) driver, once it runs
//!   acpi      the power button, once the guest has enabled it; it cannot say "reboot"
//! ```
//!
//! `auto` takes the first of them that the guest listens to; for the clock vmmci(4) is the first, as its driver says beforehand whether it can.

use std::fmt;
use std::str::FromStr;

use devices::virtio::vmmci::{self, RequestError};
use dialects::hyperv::ic::ShutdownError;
use dialects::vmware::{self, PowerRequest};
use serde::{Deserialize, Serialize};

use crate::config::ConfigError;
use crate::control::Running;
use crate::hyperv::AskError;

/// A way to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Via {
    /// The first that the guest listens to.
    Auto,
    /// The power button.
    Acpi,
    /// VMware's tools.
    Vmware,
    /// vmmci(4).
    Openbsd,
    /// Xen's `control/shutdown`.
    Xen,
    /// Hyper-V's integration components.
    Hyperv,
}

impl FromStr for Via {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Via, ConfigError> {
        [Via::Auto, Via::Acpi, Via::Vmware, Via::Openbsd, Via::Xen, Via::Hyperv]
            .into_iter()
            .find(|via| via.to_string() == text)
            .ok_or_else(|| ConfigError::Syntax(format!("unknown way '{text}'; one of: auto, acpi, vmware, openbsd, xen, hyperv")))
    }
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Via::Auto => "auto",
            Via::Acpi => "acpi",
            Via::Vmware => "vmware",
            Via::Openbsd => "openbsd",
            Via::Xen => "xen",
            Via::Hyperv => "hyperv",
        })
    }
}

/// What the guest is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wish {
    /// Shut down and power off.
    Shutdown,
    /// Shut down and reboot.
    Reboot,
    /// Take the host's time of day.
    SetClock,
    /// Bring file systems to rest, so that disks can be copied.
    Freeze,
    /// Let file systems go on.
    Thaw,
}

impl fmt::Display for Wish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Wish::Shutdown => "to shut down",
            Wish::Reboot => "to reboot",
            Wish::SetClock => "to set its clock",
            Wish::Freeze => "to bring its file systems to rest",
            Wish::Thaw => "to let its file systems go on",
        })
    }
}

/// Why the guest was not asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PowerError {
    /// Power is off between two boots, or before the first or after the last.
    #[error("the machine is not running at this moment")]
    NotRunning,
    /// The machine does not have it.
    #[error("the machine was started without the dialect {0}")]
    NoDialect(Via),
    /// VMware's tools say why.
    #[error(transparent)]
    Vmware(#[from] vmware::PowerError),
    /// The guest does not use it.
    #[error("the guest has no Xen driver that obeys control/shutdown")]
    NoXenDriver,
    /// XenStore has no word for it.
    #[error("control/shutdown has no word to ask the guest {0}")]
    NoWord(Wish),
    /// Hyper-V's components say why.
    #[error(transparent)]
    Hyperv(#[from] AskError),
    /// vmmci(4) says why.
    #[error(transparent)]
    Vmmci(#[from] RequestError),
    /// The button is not enabled.
    #[error("the guest does not listen to its power button")]
    NoButton,
    /// There is no word for it.
    #[error("the guest cannot be asked {1} by {0}")]
    Unspeakable(Via, Wish),
    /// Nobody listens.
    #[error("the guest listens to nobody who could ask it {0}")]
    Deaf(Wish),
}

impl PowerError {
    /// Whether a guest that is still booting gives it, so that the same request may be taken later.
    pub fn may_pass(&self) -> bool {
        matches!(
            self,
            PowerError::NotRunning
                | PowerError::NoXenDriver
                | PowerError::NoButton
                | PowerError::Deaf(_)
                | PowerError::Vmware(vmware::PowerError::NoTools | vmware::PowerError::NotTaken)
                | PowerError::Hyperv(AskError::Shutdown(ShutdownError::NoDriver))
                | PowerError::Vmmci(RequestError::NoDriver)
        )
    }
}

/// Asks the guest; by which way.
///
/// # Errors
/// [`PowerError`] when it does not listen there.
pub fn ask(machine: &Running, wish: Wish, via: Via) -> Result<Via, PowerError> {
    match via {
        Via::Vmware => vmware(machine, wish),
        Via::Openbsd => openbsd(machine, wish),
        Via::Acpi => acpi(machine, wish),
        Via::Xen => xen(machine, wish),
        Via::Hyperv => hyperv(machine, wish),
        Via::Auto => {
            let tried = match wish {
                Wish::SetClock => openbsd(machine, wish).or_else(|_| hyperv(machine, wish)).or_else(|_| vmware(machine, wish)),
                // It is the only one that has words for them, and says best why not.
                Wish::Freeze | Wish::Thaw => return hyperv(machine, wish),
                Wish::Shutdown | Wish::Reboot => xen(machine, wish)
                    .or_else(|_| hyperv(machine, wish))
                    .or_else(|_| vmware(machine, wish))
                    .or_else(|_| openbsd(machine, wish))
                    .or_else(|_| acpi(machine, wish)),
            };
            tried.map_err(|_| PowerError::Deaf(wish))
        }
    }
}

fn xen(machine: &Running, wish: Wish) -> Result<Via, PowerError> {
    machine.board.domain().ok_or(PowerError::NoDialect(Via::Xen))?.ask(wish)?;
    Ok(Via::Xen)
}

fn hyperv(machine: &Running, wish: Wish) -> Result<Via, PowerError> {
    machine.board.hyperv().ok_or(PowerError::NoDialect(Via::Hyperv))?.components().ask(wish)?;
    Ok(Via::Hyperv)
}

fn vmware(machine: &Running, wish: Wish) -> Result<Via, PowerError> {
    let vmware = machine.paravirtual.vmware().ok_or(PowerError::NoDialect(Via::Vmware))?;
    vmware.request(match wish {
        Wish::Shutdown => PowerRequest::Halt,
        Wish::Reboot => PowerRequest::Reboot,
        Wish::SetClock => PowerRequest::SetClock,
        Wish::Freeze | Wish::Thaw => return Err(PowerError::Unspeakable(Via::Vmware, wish)),
    })?;
    Ok(Via::Vmware)
}

fn openbsd(machine: &Running, wish: Wish) -> Result<Via, PowerError> {
    let vmmci = machine.board.vmmci().ok_or(PowerError::NoDialect(Via::Openbsd))?;
    vmmci.request(match wish {
        Wish::Shutdown => vmmci::Request::Shutdown,
        Wish::Reboot => vmmci::Request::Reboot,
        Wish::SetClock => vmmci::Request::SyncRtc,
        Wish::Freeze | Wish::Thaw => return Err(PowerError::Unspeakable(Via::Openbsd, wish)),
    })?;
    Ok(Via::Openbsd)
}

fn acpi(machine: &Running, wish: Wish) -> Result<Via, PowerError> {
    let power = machine.board.power();
    match wish {
        Wish::Shutdown if power.button_is_enabled() => power.press_power_button(),
        Wish::Shutdown => return Err(PowerError::NoButton),
        _ => return Err(PowerError::Unspeakable(Via::Acpi, wish)),
    }
    Ok(Via::Acpi)
}
