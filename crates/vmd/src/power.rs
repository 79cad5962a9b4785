//! Asking a guest to shut down, to reboot or to set its clock: the ways there are, and which one a guest listens to.
//!
//! ```text
//!   vmware    VMware's tools in the guest, once they have announced that they obey (TCLO OS_Halt, OS_Reboot)
//!   openbsd   the vmmci(4) driver, once it runs
//!   acpi      the power button, once the guest has enabled it; it cannot say "reboot"
//! ```
//!
//! `auto` takes the first of them that the guest listens to.

use std::fmt;
use std::str::FromStr;

use devices::virtio::vmmci::{self, RequestError};
use serde::{Deserialize, Serialize};

use crate::config::ConfigError;
use crate::control::Running;

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
}

impl FromStr for Via {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Via, ConfigError> {
        [Via::Auto, Via::Acpi, Via::Vmware, Via::Openbsd]
            .into_iter()
            .find(|via| via.to_string() == text)
            .ok_or_else(|| ConfigError::Syntax(format!("unknown way '{text}'; one of: auto, acpi, vmware, openbsd")))
    }
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Via::Auto => "auto",
            Via::Acpi => "acpi",
            Via::Vmware => "vmware",
            Via::Openbsd => "openbsd",
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
}

impl fmt::Display for Wish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Wish::Shutdown => "to shut down",
            Wish::Reboot => "to reboot",
            Wish::SetClock => "to set its clock",
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
    /// The guest does not use it.
    #[error("VMware's tools do not run in the guest, or have not announced that they obey")]
    NoTools,
    /// vmmci(4) says why.
    #[error(transparent)]
    Vmmci(#[from] RequestError),
    /// The button is not enabled.
    #[error("the guest does not listen to its power button")]
    NoButton,
    /// A button is only a button.
    #[error("the power button cannot ask the guest {0}")]
    Unspeakable(Wish),
    /// Nobody listens.
    #[error("the guest listens to nobody who could ask it {0}")]
    Deaf(Wish),
}

/// Asks the guest; by which way.
///
/// # Errors
/// [`PowerError`] when it does not listen there.
pub fn ask(machine: &Running, wish: Wish, via: Via) -> Result<Via, PowerError> {
    match via {
        Via::Vmware => Err(PowerError::NoTools),
        Via::Openbsd => openbsd(machine, wish),
        Via::Acpi => acpi(machine, wish),
        Via::Auto => openbsd(machine, wish).or_else(|_| acpi(machine, wish)).map_err(|_| PowerError::Deaf(wish)),
    }
}

fn openbsd(machine: &Running, wish: Wish) -> Result<Via, PowerError> {
    let vmmci = machine.board.vmmci().ok_or(PowerError::NoDialect(Via::Openbsd))?;
    vmmci.request(match wish {
        Wish::Shutdown => vmmci::Request::Shutdown,
        Wish::Reboot => vmmci::Request::Reboot,
        Wish::SetClock => vmmci::Request::SyncRtc,
    })?;
    Ok(Via::Openbsd)
}

fn acpi(machine: &Running, wish: Wish) -> Result<Via, PowerError> {
    let power = machine.board.power();
    match wish {
        Wish::Shutdown if power.button_is_enabled() => power.press_power_button(),
        Wish::Shutdown => return Err(PowerError::NoButton),
        Wish::Reboot | Wish::SetClock => return Err(PowerError::Unspeakable(wish)),
    }
    Ok(Via::Acpi)
}
