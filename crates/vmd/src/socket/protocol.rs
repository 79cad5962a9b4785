//! What is said on the control socket: UTF-8, one JSON value a line.
//!
//! The server speaks first, [`Reply::Hello`] with its version. Then each [`Request`] gets one [`Reply`], in order. After a
//! [`Request::KvWatch`] further lines [`Reply::Changed`] come at any time. A line that is no request, and one longer than
//! [`MAX_REQUEST`], is answered with [`Reply::Refused`] and ends the connection. When the machine has ended, the server closes.
//!
//! ```text
//!   < {"hello":{"protocol":"pvbus-control","version":1}}
//!   > {"request":"kv-set","path":"vm-data/hostname","value":"web1"}
//!   < "done"
//!   > {"request":"kv-get","path":"vm-data/absent"}
//!   < {"refused":{"kind":"not-found","text":"there is no key vm-data/absent"}}
//! ```

use std::collections::BTreeMap;

use dialects::store::{MAX_VALUE, StoreError};
use serde::{Deserialize, Serialize};

use crate::hotplug::PlugError;
use crate::inventory::DeviceStatus;
use crate::kv::JsonValue;
use crate::power::{PowerError, Via, Wish};
use crate::status::Status;

/// Name in the greeting.
pub const PROTOCOL: &str = "pvbus-control";
/// Version in the greeting. It changes when a client of the older one would misunderstand.
pub const VERSION: u32 = 1;
/// Longest line of a request: a value whose every byte JSON escapes with another, and room for the rest.
pub const MAX_REQUEST: usize = 2 * MAX_VALUE + (64 << 10);
/// Most paths that one connection can watch.
pub const MAX_WATCHES: usize = 64;

/// From the client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// The value at a path. Answer: [`Reply::Value`].
    KvGet {
        /// Path in the store.
        path: String,
    },
    /// Sets the value at a path. Answer: [`Reply::Done`].
    KvSet {
        /// Path in the store.
        path: String,
        /// Its new value.
        value: JsonValue,
    },
    /// Names of the children of a path. Answer: [`Reply::Names`].
    KvList {
        /// Path in the store; empty for the machine's root.
        path: String,
    },
    /// Everything at and below a path. Answer: [`Reply::Tree`].
    KvTree {
        /// Path in the store; empty for the machine's root.
        path: String,
    },
    /// Removes a path and everything below it. Answer: [`Reply::Done`].
    KvRemove {
        /// Path in the store.
        path: String,
    },
    /// Tells of changes at and below a path, from now on. Answer: [`Reply::Done`].
    KvWatch {
        /// Path in the store; empty for the machine's root.
        path: String,
    },
    /// How the machine is. Answer: [`Reply::Status`].
    Status,
    /// Asks the guest. Answer: [`Reply::Asked`].
    Ask {
        /// For what.
        wish: Wish,
        /// By which way.
        via: Via,
    },
    /// Pulls the plug, or presses the reset button. Answer: [`Reply::Done`].
    Force {
        /// Whether it starts again.
        reboot: bool,
    },
    /// The machine's disks and network cards. Answer: [`Reply::Devices`].
    Devices,
    /// Plugs in a disk. Answer: [`Reply::Added`].
    DiskAdd {
        /// As for `vmctl run --disk`.
        disk: String,
    },
    /// Plugs in a network card. Answer: [`Reply::Added`].
    NicAdd {
        /// As for `vmctl run --nic`.
        nic: String,
    },
    /// Asks the guest to let go of a device. Answer: [`Reply::Done`]; it is gone once it is not among [`Request::Devices`] any more.
    DeviceRemove {
        /// The device's name.
        device: String,
        /// Takes it at once, whatever the guest does with it.
        force: bool,
    },
}

/// From the server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// The first line.
    Hello {
        /// [`PROTOCOL`].
        protocol: String,
        /// [`VERSION`].
        version: u32,
    },
    /// It is done.
    Done,
    /// The value.
    Value(JsonValue),
    /// The names, sorted.
    Names(Vec<String>),
    /// Paths and values, as [`crate::kv::tree`] finds them.
    Tree(BTreeMap<String, JsonValue>),
    /// A key has changed. Two changes in quick succession may both show the later value.
    Changed {
        /// Its path.
        path: String,
        /// Its value now; `None` when it is gone.
        value: Option<JsonValue>,
    },
    /// How the machine is.
    Status(Box<Status>),
    /// The guest has been asked by this way.
    Asked(Via),
    /// All devices.
    Devices(Vec<DeviceStatus>),
    /// The device is there now; the guest finds it when it looks.
    Added(DeviceStatus),
    /// Why not.
    Refused {
        /// For programs.
        kind: Refusal,
        /// For people.
        text: String,
    },
}

/// Kinds of refusals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Refusal {
    /// There is no such key or device.
    NotFound,
    /// The store refuses for another reason.
    Store,
    /// The guest cannot be asked.
    Power,
    /// The device cannot be plugged in or out.
    Device,
    /// The machine is not ready to tell, or its guest does not listen yet: later it may.
    NotReady,
    /// Not a request of this protocol. The connection ends.
    BadRequest,
    /// Too many clients or watches, or one that does not read what it asked for.
    Limit,
}

impl Reply {
    /// The server's first line.
    pub fn hello() -> Reply {
        Reply::Hello { protocol: PROTOCOL.into(), version: VERSION }
    }

    /// A refusal.
    pub fn refused(kind: Refusal, text: impl Into<String>) -> Reply {
        Reply::Refused { kind, text: text.into() }
    }

    /// The line, with its end.
    pub fn to_line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self)
            .unwrap_or_else(|error| format!("{{\"refused\":{{\"kind\":\"bad-request\",\"text\":\"{error}\"}}}}").into());
        line.push(b'\n');
        line
    }
}

impl From<StoreError> for Reply {
    fn from(error: StoreError) -> Reply {
        let kind = if matches!(error, StoreError::NotFound(_)) { Refusal::NotFound } else { Refusal::Store };
        Reply::refused(kind, error.to_string())
    }
}

impl From<PowerError> for Reply {
    fn from(error: PowerError) -> Reply {
        let kind = if error.may_pass() { Refusal::NotReady } else { Refusal::Power };
        Reply::refused(kind, error.to_string())
    }
}

impl From<PlugError> for Reply {
    fn from(error: PlugError) -> Reply {
        let kind = if matches!(error, PlugError::NotFound(_)) { Refusal::NotFound } else { Refusal::Device };
        Reply::refused(kind, error.to_string())
    }
}
