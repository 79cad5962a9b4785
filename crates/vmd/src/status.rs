//! How a machine is: what `vmctl status` shows.

use std::fmt;
use std::time::Duration;

use devices::virtio::vmmci::Conversation;
use serde::{Deserialize, Serialize};

use crate::config::{MachineConfig, Size, Uuid};
use crate::control::Running;

/// What the machine was made as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Bytes of RAM.
    pub memory: u64,
    /// Number of processors.
    pub cpus: u32,
    /// What executes them, as attaching vmm0 says it.
    pub backend: String,
    /// The dialects, first base first.
    pub dialects: Vec<String>,
    /// The machine's UUID.
    pub uuid: String,
}

impl About {
    /// A machine from `config` that calls itself `uuid` and runs on `backend`.
    pub fn new(config: &MachineConfig, uuid: Uuid, backend: &str) -> About {
        About {
            memory: config.memory.0,
            cpus: config.cpus,
            backend: backend.into(),
            dialects: config.dialects.dialects().iter().map(ToString::to_string).collect(),
            uuid: uuid.to_string(),
        }
    }
}

/// How the machine is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Process that runs it.
    pub pid: u32,
    /// Seconds since the first power-on.
    pub uptime: f64,
    /// Times that power came on: one, and the reboots.
    pub boots: u64,
    /// What it was made as.
    #[serde(flatten)]
    pub about: About,
    /// What the guest can be asked by; `None` while power is off between two boots.
    pub guest: Option<Guest>,
}

/// What the guest listens to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// Whether the power button does something.
    pub power_button: bool,
    /// What vmmci(4) is about, on machines that have it.
    pub vmmci: Option<Vmmci>,
}

/// The control device of OpenBSD's dialect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vmmci {
    /// The guest has no driver for it.
    NoDriver,
    /// Nothing is under way.
    Idle,
    /// The guest has not acknowledged what it was asked for.
    Asked,
    /// It has, and goes down.
    Agreed,
    /// It goes down by itself.
    Leaving,
    /// It did not go down in time.
    Overdue,
}

impl Vmmci {
    /// From what the device says.
    pub fn new(has_driver: bool, conversation: Conversation) -> Vmmci {
        match conversation {
            Conversation::Idle if !has_driver => Vmmci::NoDriver,
            Conversation::Idle => Vmmci::Idle,
            Conversation::Asked { .. } => Vmmci::Asked,
            Conversation::Agreed { .. } => Vmmci::Agreed,
            Conversation::Leaving { .. } => Vmmci::Leaving,
            Conversation::Overdue { .. } => Vmmci::Overdue,
        }
    }
}

impl fmt::Display for Vmmci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Vmmci::NoDriver => "no driver in the guest",
            Vmmci::Idle => "driver runs",
            Vmmci::Asked => "asked, the guest has not acknowledged",
            Vmmci::Agreed => "acknowledged, the guest goes down",
            Vmmci::Leaving => "the guest goes down by itself",
            Vmmci::Overdue => "the guest did not go down in time",
        })
    }
}

impl Status {
    /// Of the machine in this process.
    pub fn new(about: About, uptime: Duration, boots: u64, machine: Option<&Running>) -> Status {
        let guest = machine.map(|machine| Guest {
            power_button: machine.board.power().button_is_enabled(),
            vmmci: machine.board.vmmci().map(|vmmci| Vmmci::new(vmmci.has_driver(), vmmci.conversation())),
        });
        Status { pid: std::process::id(), uptime: uptime.as_secs_f64(), boots, about, guest }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, value: &dyn fmt::Display| writeln!(f, "{name:<14}{value}");
        line("pid", &self.pid)?;
        let seconds = self.uptime as u64;
        let reboots = self.boots.saturating_sub(1);
        let clock = format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
        line("uptime", &if reboots == 0 { clock } else { format!("{clock}, {reboots} reboots") })?;
        line("uuid", &self.about.uuid)?;
        line("backend", &self.about.backend)?;
        line("processors", &self.about.cpus)?;
        line("memory", &Size(self.about.memory))?;
        line("dialects", &if self.about.dialects.is_empty() { "none".into() } else { self.about.dialects.join(", ") })?;
        let Some(guest) = &self.guest else { return line("guest", &"power is off") };
        line("power button", &if guest.power_button { "the guest listens" } else { "the guest does not listen" })?;
        if let Some(vmmci) = &guest.vmmci {
            line("vmmci", vmmci)?;
        }
        Ok(())
    }
}
