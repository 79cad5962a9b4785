//! Devices that come and go while the machine runs: what a bus does for that ([`Slots`]), and what is known of a device in it ([`Plugged`]).
//!
//! ```text
//!   vmctl disk add, nic rm ... ── Inventory ──plug──> Slots of a bus      (the Xen domain, VMBus)
//!                                     │  <──────────── Plugged
//!                                     ├──ask_back, pull──> Plugged
//!                                     <──Gone────────── when the guest has let go
//! ```
//!
//! The bus also gets its devices of the command line this way when power comes on. The [`Inventory`] outlasts the machine's reboots; a `Plugged`
//! does not.
//!
//! [`Inventory`]: crate::inventory::Inventory

use std::fmt;
use std::sync::Arc;

use devices::DeviceBus;
use devices::block::{Disk, DiskError};
use devices::net::{Mac, NetBackend, NetError};
use serde::{Deserialize, Serialize};

use crate::power::PowerError;

/// What is plugged in.
pub enum Device {
    /// A disk.
    Disk {
        /// The image, open and locked.
        image: Arc<dyn Disk>,
        /// See [`devices::block::DiskSpec::persistent_grants`].
        persistent_grants: bool,
    },
    /// A drive with a DVD in it.
    Dvd(Arc<dyn Disk>),
    /// A card of this address.
    Nic(Mac, Box<dyn NetBackend>),
}

/// Called once when the guest has let go of a device that it was asked for, and the bus has, too. Not called when power goes, or for a device that
/// is pulled.
pub type Gone = Box<dyn FnOnce() + Send>;

/// A bus that takes devices while the machine runs.
pub trait Slots: Send + Sync {
    /// Plugs a device into the next free slot.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left, or power is off.
    fn plug(&self, device: Device, gone: Gone) -> std::io::Result<Arc<dyn Plugged>>;
}

/// A device in its slot.
pub trait Plugged: Send + Sync {
    /// By which name the guest finds it.
    fn place(&self) -> String;

    /// How it is.
    fn condition(&self) -> Condition;

    /// Asks the guest to let go of it.
    fn ask_back(&self);

    /// Takes it away, whether the guest uses it or not.
    fn pull(&self);
}

/// How a device is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// Between guest and bus.
    pub stage: Stage,
    /// What one of the two has to say of it, usually why it does not work or is not let go.
    pub said: Option<String>,
}

/// How far guest and bus are with a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// The guest has no driver for it, or not yet.
    Offered,
    /// The guest's driver uses it.
    InUse,
    /// The guest was asked to let go.
    Leaving,
    /// One of the two has given it up.
    Failed,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Offered => "offered",
            Stage::InUse => "in use",
            Stage::Leaving => "leaving",
            Stage::Failed => "failed",
        })
    }
}

/// Why a device is not plugged or unplugged.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// Power is off.
    #[error(transparent)]
    Power(#[from] PowerError),
    /// The text.
    #[error("{0}")]
    Syntax(String),
    /// The bus.
    #[error("a running machine takes and gives back only devices with bus=xen or bus=hyperv, and this one has bus={0}")]
    Fixed(DeviceBus),
    /// The bus is not there.
    #[error("bus={0}: the machine was started without --dialect {0}")]
    NoBus(DeviceBus),
    /// The image.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The network.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A card without a network.
    #[error("a card needs a network: user or tap:NAME")]
    NoNetwork,
    /// No such device.
    #[error("there is no device {0}")]
    NotFound(String),
    /// The host's answer.
    #[error("the device cannot be plugged in: {0}")]
    Host(#[from] std::io::Error),
}
