//! Texts of the two protocols over GuestRPC's channels.
//!
//! RPCI: the guest asks `command arguments`, the host answers `1 data` or `0 reason`. TCLO: the host asks, the guest answers `OK data` or
//! `ERROR reason`. (open-vm-tools `lib/rpcOut/rpcout.c`, `lib/rpcIn/rpcin.c`, `lib/include/vmware/guestrpc/`; OpenBSD `sys/dev/pv/vmt.c`.)

/// RPCI: `info-get KEY`.
pub const INFO_GET: &str = "info-get";
/// RPCI: `info-set KEY VALUE`.
pub const INFO_SET: &str = "info-set";
/// What every key of the information store begins with.
pub const GUESTINFO: &str = "guestinfo.";
/// RPCI: reason for a key that is not there. cloud-init compares this text.
pub const NO_VALUE: &str = "No value found";
/// RPCI: reason when the host's administrator does not allow a command.
pub const PERMISSION_DENIED: &str = "Permission denied";
/// RPCI: reason for a command that does not exist.
pub const UNKNOWN_COMMAND: &str = "Unknown command";
/// RPCI: what an answer to a request that worked begins with.
pub const SUCCESS: &[u8] = b"1 ";
/// RPCI: what an answer to a request that failed begins with.
pub const FAILURE: &[u8] = b"0 ";
/// RPCI: `tools.os.statechange.status 1 N`, N of [`state_change`]: the guest has done what a power request wanted.
pub const STATE_CHANGE_STATUS: &str = "tools.os.statechange.status";
/// RPCI: the guest takes power requests.
pub const CAPABILITY_STATE_CHANGE: &str = "tools.capability.statechange";
/// RPCI: `vmx.capability.unified_loop toolbox`: one loop in the guest answers all requests.
pub const CAPABILITY_UNIFIED_LOOP: &str = "vmx.capability.unified_loop toolbox";
/// RPCI: `tools.capability.hgfs_server toolbox 1`, with 0 when the tools end: the tools are there.
pub const CAPABILITY_HGFS_SERVER: &str = "tools.capability.hgfs_server toolbox";
/// RPCI: `tools.set.version N`.
pub const SET_VERSION: &str = "tools.set.version";
/// Version of tools that the host does not look after (open-vm-tools `lib/include/vm_tools_version.h`, `TOOLS_VERSION_UNMANAGED`).
pub const VERSION_UNMANAGED: u32 = 0x7fff_ffff;
/// RPCI: `SetGuestInfo  K VALUE`.
pub const SET_GUEST_INFO: &str = "SetGuestInfo";

/// TCLO: begin anew; answered by [`RESET_REPLY`].
pub const RESET: &str = "reset";
/// TCLO: what a guest answers to [`RESET`].
pub const RESET_REPLY: &str = "OK ATR toolbox";
/// TCLO: what a reply to a request that worked begins with.
pub const OK: &str = "OK ";
/// TCLO: reply to a request that the guest does not know or cannot do now.
pub const ERROR_UNKNOWN: &str = "ERROR Unknown command";
/// TCLO: reply of a guest without an IPv4 address to [`BROADCAST_IP`].
pub const ERROR_NO_ADDRESS: &str = "ERROR Unable to find guest IP address";
/// TCLO: are you there.
pub const PING: &str = "ping";
/// TCLO: tell your capabilities.
pub const CAPABILITIES_REGISTER: &str = "Capabilities_Register";
/// TCLO: power off.
pub const OS_HALT: &str = "OS_Halt";
/// TCLO: reboot.
pub const OS_REBOOT: &str = "OS_Reboot";
/// TCLO: the machine was powered on.
pub const OS_POWER_ON: &str = "OS_PowerOn";
/// TCLO: the machine was resumed.
pub const OS_RESUME: &str = "OS_Resume";
/// TCLO: the machine is about to be suspended.
pub const OS_SUSPEND: &str = "OS_Suspend";
/// TCLO: `Set_Option NAME VALUE`.
pub const SET_OPTION: &str = "Set_Option";

/// TCLO: take the host's time of day, with 1 also when that is earlier (open-vm-tools `services/plugins/timeSync/timeSync.c`).
pub const TIME_SYNCHRONIZE: &str = "Time_Synchronize 1";
/// TCLO: publish the first IPv4 address as [`GUESTINFO_IP`].
pub const BROADCAST_IP: &str = "Set_Option broadcastIP 1";
/// Key of the first IPv4 address.
pub const GUESTINFO_IP: &str = "guestinfo.ip";

/// A backup of the machine by a snapshot of file systems at rest (open-vm-tools `lib/include/vmware/guestrpc/vmbackup.h`).
pub mod vmbackup {
    /// TCLO: bring the file systems to rest; `1` is for letting scripts know.
    pub const START: &str = "vmbackup.start 1";
    /// TCLO: the snapshot has been taken.
    pub const SNAPSHOT_DONE: &str = "vmbackup.snapshotDone";
    /// TCLO: stop it.
    pub const ABORT: &str = "vmbackup.abort";
    /// RPCI: `vmbackup.eventSet EVENT CODE TEXT`.
    pub const EVENT_SET: &str = "vmbackup.eventSet";
    /// Event: begun.
    pub const RESET: &str = "reset";
    /// Event: the snapshot can be taken.
    pub const SNAPSHOT_COMMIT: &str = "prov.snapshotCommit";
    /// Event: still at it.
    pub const KEEP_ALIVE: &str = "req.keepAlive";
    /// Event: given up.
    pub const ABORTED: &str = "req.aborted";
    /// Event: over.
    pub const DONE: &str = "req.done";
    /// Code: fine.
    pub const SUCCESS: u8 = 0;
    /// Code: the file systems cannot be brought to rest.
    pub const SYNC_ERROR: u8 = 3;
    /// Code: the host, or time, wanted it stopped.
    pub const REMOTE_ABORT: u8 = 4;
}

/// Network cards in XDR (RFC 4506), version 3 (open-vm-tools `lib/guestRpc/nicinfo.x`). Optional parts are one word, 0 or 1, before them.
///
/// ```text
///   version, 1, cards<16>{ mac string, addresses<2048>{ type, bytes<>, prefix, origin?, status? }, dns?, wins?, dhcpv4?, dhcpv6? },
///   routes<>, dns?, wins?, dhcpv4?, dhcpv6?
/// ```
pub mod nic_info {
    /// Version.
    pub const V3: u32 = 3;
    /// Most cards.
    pub const MAX_NICS: usize = 16;
    /// Most addresses of a card.
    pub const MAX_ADDRESSES: usize = 2048;
    /// Type of an address: IPv4.
    pub const IPV4: u32 = 1;
    /// Type of an address: IPv6.
    pub const IPV6: u32 = 2;
}

/// Numbers of the power requests in `tools.os.statechange.status`.
pub mod state_change {
    /// [`super::OS_HALT`].
    pub const HALT: u8 = 1;
    /// [`super::OS_REBOOT`].
    pub const REBOOT: u8 = 2;
    /// [`super::OS_POWER_ON`].
    pub const POWER_ON: u8 = 3;
    /// [`super::OS_RESUME`].
    pub const RESUME: u8 = 4;
    /// [`super::OS_SUSPEND`].
    pub const SUSPEND: u8 = 5;
}

/// Kinds of [`SET_GUEST_INFO`].
pub mod guest_info {
    /// Name of the host.
    pub const DNS_NAME: u8 = 1;
    /// First IP address.
    pub const IP_ADDRESS: u8 = 2;
    /// Disks and their free space.
    pub const DISK_FREE_SPACE: u8 = 3;
    /// Build number of the tools.
    pub const BUILD_NUMBER: u8 = 4;
    /// Full name of the operating system.
    pub const OS_NAME_FULL: u8 = 5;
    /// Short name of the operating system.
    pub const OS_NAME: u8 = 6;
    /// Uptime in hundredths of a second.
    pub const UPTIME: u8 = 7;
    /// Memory statistics.
    pub const MEMORY: u8 = 8;
    /// Network cards, version 2, XDR.
    pub const NIC_V2: u8 = 9;
    /// Network cards, version 3, XDR.
    pub const NIC_V3: u8 = 10;
    /// Details of the operating system.
    pub const OS_DETAILED: u8 = 11;
}
