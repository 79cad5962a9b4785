//! Integration components: small services between host and guest, each on a channel of its own.
//!
//! A packet is a [`Pipe`] header, a [`Message`] header and a body. The host begins with [`kind::NEGOTIATE`]; the guest answers each packet by the
//! same packet with its changes, in band. (Linux `include/linux/hyperv.h`, `drivers/hv/{channel_mgmt,hv_util}.c`; OpenVMM
//! `vm/devices/hyperv_ic_protocol`.)

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `struct vmbuspipe_hdr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Pipe {
    /// [`PIPE_DATA`].
    pub flags: U32,
    /// Bytes that follow.
    pub length: U32,
}

/// [`Pipe::flags`] of a message.
pub const PIPE_DATA: u32 = 1;

/// A version: major, minor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Version {
    /// Major.
    pub major: U16,
    /// Minor.
    pub minor: U16,
}

impl Version {
    /// This version.
    #[must_use]
    pub const fn new(major: u16, minor: u16) -> Version {
        Version { major: U16::new(major), minor: U16::new(minor) }
    }
}

/// `struct icmsg_hdr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Message {
    /// Version of this header and the negotiation.
    pub framework: Version,
    /// [`kind`].
    pub kind: U16,
    /// Version of the body.
    pub version: Version,
    /// Bytes of the body.
    pub size: U16,
    /// [`status`].
    pub status: U32,
    /// The host's number for the request.
    pub transaction: u8,
    /// [`flags`].
    pub flags: u8,
    /// Zero.
    pub reserved: U16,
}

const _: () = assert!(size_of::<Pipe>() == 8 && size_of::<Message>() == 20);

/// Bytes before a body.
pub const HEADER_BYTES: usize = size_of::<Pipe>() + size_of::<Message>();

/// Values of [`Message::kind`] (`ICMSGTYPE_*`).
pub mod kind {
    /// Body: [`Negotiate`](super::Negotiate).
    pub const NEGOTIATE: u16 = 0;
    /// Body: [`Heartbeat`](super::Heartbeat).
    pub const HEARTBEAT: u16 = 1;
    /// Body: in [`kvp`](crate::hyperv::kvp).
    pub const KVP: u16 = 2;
    /// Body: [`Shutdown`](super::Shutdown).
    pub const SHUTDOWN: u16 = 3;
    /// Body: [`TimeSync`](super::TimeSync) or [`TimeSync3`](super::TimeSync3).
    pub const TIMESYNC: u16 = 4;
    /// Body: [`Vss`](super::Vss).
    pub const VSS: u16 = 5;
}

/// Bits of [`Message::flags`] (`ICMSGHDRFLAG_*`).
pub mod flags {
    /// The message wants or is an answer.
    pub const TRANSACTION: u8 = 1;
    /// It wants one.
    pub const REQUEST: u8 = 2;
    /// It is one.
    pub const RESPONSE: u8 = 4;
}

/// Values of [`Message::status`] (`HV_S_OK`, `HV_E_FAIL` and their like; Windows' `HRESULT`s).
pub mod status {
    /// Done.
    pub const OK: u32 = 0;
    /// Failed.
    pub const FAIL: u32 = 0x8000_4005;
    /// The guest cannot.
    pub const NOT_SUPPORTED: u32 = 0x8007_0032;
    /// No more items.
    pub const NO_MORE_ITEMS: u32 = 0x8007_0103;
}

/// `struct icmsg_negotiate`: what the host speaks; framework versions and then message versions ([`Version`]) follow. The guest answers with one
/// of each, or with counts of zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Negotiate {
    /// How many versions of the framework.
    pub framework_count: U16,
    /// How many versions of the body.
    pub message_count: U16,
    /// Zero.
    pub reserved: U32,
}

const _: () = assert!(size_of::<Negotiate>() == 8);

/// Versions that Hyper-V's hosts and Linux speak (`UTIL_FW_VERSION`, `SD_VERSION`, ... of Linux `drivers/hv/hv_util.c`, `hv_kvp.c`, `hv_snapshot.c`).
pub mod version {
    use super::Version;

    /// Of the framework.
    pub const FRAMEWORK: [Version; 2] = [Version::new(1, 0), Version::new(3, 0)];
    /// Of [`Shutdown`](super::Shutdown).
    pub const SHUTDOWN: [Version; 4] = [Version::new(1, 0), Version::new(3, 0), Version::new(3, 1), Version::new(3, 2)];
    /// Of [`Heartbeat`](super::Heartbeat).
    pub const HEARTBEAT: [Version; 2] = [Version::new(1, 0), Version::new(3, 0)];
    /// Of [`TimeSync3`](super::TimeSync3), and [`TIMESYNC_4`].
    pub const TIMESYNC: [Version; 3] = [Version::new(1, 0), Version::new(3, 0), TIMESYNC_4];
    /// Of [`TimeSync`](super::TimeSync).
    pub const TIMESYNC_4: Version = Version::new(4, 0);
    /// Of [`kvp`](crate::hyperv::kvp).
    pub const KVP: [Version; 3] = [Version::new(1, 0), Version::new(3, 0), Version::new(4, 0)];
    /// Of [`Vss`](super::Vss).
    pub const VSS: [Version; 1] = [Version::new(5, 0)];
}

/// `struct heartbeat_msg_data`, with what a guest may say about its programs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Heartbeat {
    /// The host's count; Linux adds one.
    pub sequence: U64,
    /// State of programs: zero when nothing is known.
    pub application_state: U32,
    /// Zero.
    pub reserved: [U32; 7],
}

const _: () = assert!(size_of::<Heartbeat>() == 40);

/// Bytes of [`Shutdown::message`].
pub const SHUTDOWN_TEXT: usize = 2048;

/// `struct shutdown_msg_data`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Shutdown {
    /// Windows' code for its log.
    pub reason: U32,
    /// Seconds that users get.
    pub timeout: U32,
    /// [`shutdown`].
    pub flags: U32,
    /// For users, ended by a zero.
    pub message: [u8; SHUTDOWN_TEXT],
}

const _: () = assert!(size_of::<Shutdown>() == 2060);

/// Values of [`Shutdown::flags`] (`shutdown_onchannelcallback`).
pub mod shutdown {
    /// Power off.
    pub const POWER_OFF: u32 = 0;
    /// Reboot.
    pub const REBOOT: u32 = 2;
    /// Added: whether programs want it or not.
    pub const FORCE: u32 = 1;
    /// Code of a planned shutdown without any other word for it (`SHTDN_REASON_FLAG_PLANNED` of Windows' `reason.h`).
    pub const REASON_PLANNED: u32 = 0x8000_0000;
}

/// `struct ictimesync_ref_data`, since [`version::TIMESYNC_4`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TimeSync {
    /// The host's time of day, as [`EPOCH_DELTA`] has it.
    pub host_time: U64,
    /// The partition's reference counter when that was read, in 100 ns.
    pub reference_time: U64,
    /// [`timesync`].
    pub flags: u8,
    /// Leap seconds, as in NTP.
    pub leap_flags: u8,
    /// Stratum, as in NTP.
    pub stratum: u8,
    /// Zero.
    pub reserved: [u8; 5],
}

const _: () = assert!(size_of::<TimeSync>() == 24);

/// `struct ictimesync_data`, before [`version::TIMESYNC_4`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TimeSync3 {
    /// The host's time of day, as [`EPOCH_DELTA`] has it.
    pub host_time: U64,
    /// The guest's answer.
    pub guest_time: U64,
    /// How long the message was under way.
    pub round_trip_time: U64,
    /// [`timesync`].
    pub flags: u8,
}

const _: () = assert!(size_of::<TimeSync3>() == 25);

/// Values of [`TimeSync::flags`] (`ICTIMESYNCFLAG_*`).
pub mod timesync {
    /// Set the clock.
    pub const SYNC: u8 = 1;
    /// Compare with it.
    pub const SAMPLE: u8 = 2;
}

/// Times of day are in units of 100 ns since 1601; this is 1970 (`WLTIMEDELTA`).
pub const EPOCH_DELTA: u64 = 116_444_736_000_000_000;

/// `struct hv_vss_msg` (Linux `include/uapi/linux/hyperv.h`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Vss {
    /// [`vss`].
    pub operation: u8,
    /// Zero.
    pub reserved: [u8; 7],
    /// In the answer to [`vss::HOT_BACKUP`]: what kinds of backup there are; Linux says `VSS_HBU_NO_AUTO_RECOVERY`, 5.
    pub flags: U32,
}

const _: () = assert!(size_of::<Vss>() == 12);

/// Values of [`Vss::operation`] (`enum hv_vss_op`).
pub mod vss {
    /// Can file systems be brought to rest?
    pub const HOT_BACKUP: u8 = 2;
    /// Bring them to rest.
    pub const FREEZE: u8 = 5;
    /// Let them go on.
    pub const THAW: u8 = 6;
}
