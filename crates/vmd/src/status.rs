//! How a machine is: what `vmctl status` shows.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use devices::virtio::vmmci::Conversation;
use dialects::hyperv::ic::{FileSystems, Pulse};
use dialects::store::{Client, Store};
use dialects::vmware::{PowerRequest, Progress, REPORTS, ToolsStatus};
use serde::{Deserialize, Serialize};

use crate::config::{MachineConfig, Size, Uuid};
use crate::control::Running;
use crate::kv;

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

/// Reports of VMware's tools that are shown: names below [`REPORTS`], and how people call them.
const SHOWN: [(&str, &str); 4] =
    [("dns-name", "guest name"), ("ip", "guest address"), ("os-name-full", "guest system"), ("tools-version", "tools version")];

/// What the guest listens to and what it told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// Whether the power button does something.
    pub power_button: bool,
    /// VMware's tools, on machines that have that dialect.
    pub vmware_tools: Option<VmwareTools>,
    /// What the tools told about the guest, by its name in the store.
    pub reports: BTreeMap<String, String>,
    /// What vmmci(4) is about, on machines that have it.
    pub vmmci: Option<Vmmci>,
    /// Hyper-V's integration components, on machines that have that dialect.
    pub hyperv: Option<Hyperv>,
}

/// Hyper-V's integration components.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hyperv {
    /// Whether the guest answers.
    pub heartbeat: Heartbeat,
    /// How its file systems are.
    pub file_systems: Rest,
}

/// Whether the guest answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Heartbeat {
    /// It has no driver for that.
    NoDriver,
    /// It does.
    Ok,
    /// It has not for so many seconds.
    Lost(u64),
}

impl From<Pulse> for Heartbeat {
    fn from(pulse: Pulse) -> Heartbeat {
        match pulse {
            Pulse::None => Heartbeat::NoDriver,
            Pulse::Beating => Heartbeat::Ok,
            Pulse::Lost(nanoseconds) => Heartbeat::Lost(nanoseconds / 1_000_000_000),
        }
    }
}

impl fmt::Display for Heartbeat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Heartbeat::NoDriver => f.write_str("no driver in the guest"),
            Heartbeat::Ok => f.write_str("ok"),
            Heartbeat::Lost(seconds) => write!(f, "lost, no answer for {seconds} seconds"),
        }
    }
}

/// How the guest's file systems are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rest {
    /// The guest has no driver to bring them to rest.
    NoDriver,
    /// They work.
    Working,
    /// The guest is at it.
    Freezing,
    /// They are at rest.
    Frozen,
    /// The guest is at it.
    Thawing,
    /// They could not be brought to rest, for this status of Windows'.
    CannotFreeze(u32),
}

impl From<FileSystems> for Rest {
    fn from(file_systems: FileSystems) -> Rest {
        match file_systems {
            FileSystems::NoDriver => Rest::NoDriver,
            FileSystems::Working => Rest::Working,
            FileSystems::Freezing => Rest::Freezing,
            FileSystems::Frozen => Rest::Frozen,
            FileSystems::Thawing => Rest::Thawing,
            FileSystems::CannotFreeze(status) => Rest::CannotFreeze(status),
        }
    }
}

impl fmt::Display for Rest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rest::NoDriver => f.write_str("no driver in the guest to bring them to rest"),
            Rest::Working => f.write_str("working"),
            Rest::Freezing => f.write_str("coming to rest"),
            Rest::Frozen => f.write_str("at rest"),
            Rest::Thawing => f.write_str("about to go on"),
            Rest::CannotFreeze(status) => {
                write!(f, "working; the guest could not bring them to rest, status {status:#x} (does hv_vss_daemon run?)")
            }
        }
    }
}

/// VMware's tools in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmwareTools {
    /// Whether they run: they have opened a channel for requests and answered the first.
    pub run: bool,
    /// Whether they take power requests.
    pub take_power_requests: bool,
    /// How far the last power request got, in words for people.
    pub last_request: Option<String>,
}

impl VmwareTools {
    /// From what the dialect knows.
    pub fn new(tools: &ToolsStatus) -> VmwareTools {
        let last_request = tools.power.as_ref().map(|power| {
            let request = match power.request {
                PowerRequest::Halt => "shutdown",
                PowerRequest::Reboot => "reboot",
                PowerRequest::SetClock => "setting of the clock",
            };
            match &power.progress {
                Progress::Queued => format!("{request} not fetched yet"),
                Progress::Sent => format!("{request} fetched"),
                Progress::Accepted => format!("{request} accepted"),
                Progress::Done => format!("{request} under way"),
                Progress::Refused(reason) => format!("{request} refused: {reason}"),
            }
        });
        VmwareTools { run: tools.are_running, take_power_requests: tools.take_power_requests, last_request }
    }
}

impl fmt::Display for VmwareTools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.run, self.take_power_requests) {
            (false, _) => "do not run",
            (true, false) => "run, take no power requests",
            (true, true) => "run, take power requests",
        })?;
        match &self.last_request {
            Some(text) => write!(f, "; {}", kv::printable(text.as_bytes())),
            None => Ok(()),
        }
    }
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
    pub fn new(about: About, uptime: Duration, boots: u64, machine: Option<&Running>, store: &dyn Store) -> Status {
        let guest = machine.map(|machine| Guest {
            power_button: machine.board.power().button_is_enabled(),
            vmware_tools: machine.paravirtual.vmware().map(|vmware| VmwareTools::new(&vmware.tools())),
            reports: reports(store),
            vmmci: machine.board.vmmci().map(|vmmci| Vmmci::new(vmmci.has_driver(), vmmci.conversation())),
            hyperv: machine.board.hyperv().map(|hyperv| Hyperv {
                heartbeat: hyperv.components().pulse().into(),
                file_systems: hyperv.components().file_systems().into(),
            }),
        });
        Status { pid: std::process::id(), uptime: uptime.as_secs_f64(), boots, about, guest }
    }
}

fn reports(store: &dyn Store) -> BTreeMap<String, String> {
    let report = |name: &str| store.read(Client::Host, &format!("{REPORTS}/{name}")).ok();
    SHOWN.iter().filter_map(|(name, _)| Some(((*name).to_owned(), kv::printable(&report(name)?)))).collect()
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, value: &dyn fmt::Display| writeln!(f, "{name:<14}{value}");
        line("pid", &self.pid)?;
        let seconds = self.uptime as u64;
        line("uptime", &format_args!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60))?;
        if self.boots > 1 {
            line("reboots", &(self.boots - 1))?;
        }
        line("uuid", &self.about.uuid)?;
        line("backend", &self.about.backend)?;
        line("processors", &self.about.cpus)?;
        line("memory", &Size(self.about.memory))?;
        line("dialects", &if self.about.dialects.is_empty() { "none".into() } else { self.about.dialects.join(", ") })?;
        let Some(guest) = &self.guest else { return line("guest", &"power is off") };
        line("power button", &if guest.power_button { "the guest listens" } else { "the guest does not listen" })?;
        if let Some(tools) = &guest.vmware_tools {
            line("vmware tools", tools)?;
        }
        for (name, title) in SHOWN {
            if let Some(text) = guest.reports.get(name) {
                line(title, text)?;
            }
        }
        if let Some(vmmci) = &guest.vmmci {
            line("vmmci", vmmci)?;
        }
        if let Some(hyperv) = &guest.hyperv {
            line("heartbeat", &hyperv.heartbeat)?;
            line("file systems", &hyperv.file_systems)?;
        }
        Ok(())
    }
}
