//! XenStore's words: the message header, operation numbers, error names, limits, and the page that a guest shares with the server.
//!
//! Sources: `io/xs_wire.h` (numbers, header, ring page), `docs/misc/xenstore.txt` (what each payload holds) and
//! `docs/misc/xenstore-ring.txt` (the ring page's features and reconnection) of xen-project/xen. Numbers are in the byte order of the machine, which
//! is little-endian on every machine that this project runs on.

use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `struct xsd_sockmsg`: precedes each message, in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// [`op`].
    pub op: U32,
    /// The client's own; the reply repeats it.
    pub req_id: U32,
    /// Transaction, or [`NO_TRANSACTION`]; the reply repeats it.
    pub tx_id: U32,
    /// Bytes of payload that follow, at most [`PAYLOAD_MAX`].
    pub len: U32,
}
const _: () = assert!(size_of::<Header>() == HEADER_SIZE);

/// Bytes of a [`Header`].
pub const HEADER_SIZE: usize = 16;
/// Longest payload in either direction (`XENSTORE_PAYLOAD_MAX`). A client that exceeds it is disconnected.
pub const PAYLOAD_MAX: usize = 4096;
/// Longest absolute path (`XENSTORE_ABS_PATH_MAX`).
pub const ABS_PATH_MAX: usize = 3072;
/// Longest relative path (`XENSTORE_REL_PATH_MAX`).
pub const REL_PATH_MAX: usize = 2048;
/// `tx_id` of a request outside of transactions.
pub const NO_TRANSACTION: u32 = 0;
/// Payload of a reply that says nothing but success.
pub const OK: &[u8] = b"OK\0";

/// Operations: `enum xsd_sockmsg_type`. `|` stands for a zero byte.
pub mod op {
    /// `command|[argument|...]`, privileged. Named `XS_DEBUG` in old headers.
    pub const CONTROL: u32 = 0;
    /// `path|` to `child|...`.
    pub const DIRECTORY: u32 = 1;
    /// `path|` to the value.
    pub const READ: u32 = 2;
    /// `path|` to `perm|...`.
    pub const GET_PERMS: u32 = 3;
    /// `path|token|[depth|]`.
    pub const WATCH: u32 = 4;
    /// `path|token|`.
    pub const UNWATCH: u32 = 5;
    /// `|` to `id|`.
    pub const TRANSACTION_START: u32 = 6;
    /// `T|` commits, `F|` aborts the header's transaction.
    pub const TRANSACTION_END: u32 = 7;
    /// `domid|gfn|port|`, privileged.
    pub const INTRODUCE: u32 = 8;
    /// `domid|`, privileged.
    pub const RELEASE: u32 = 9;
    /// `domid|` to `path|`.
    pub const GET_DOMAIN_PATH: u32 = 10;
    /// `path|value`.
    pub const WRITE: u32 = 11;
    /// `path|`.
    pub const MKDIR: u32 = 12;
    /// `path|`.
    pub const RM: u32 = 13;
    /// `path|perm|...`.
    pub const SET_PERMS: u32 = 14;
    /// From the server alone: `path|token|`.
    pub const WATCH_EVENT: u32 = 15;
    /// From the server alone: a name of [`error`](super::error) and a zero byte.
    pub const ERROR: u32 = 16;
    /// `domid|` to `T|` or `F|`, privileged.
    pub const IS_DOMAIN_INTRODUCED: u32 = 17;
    /// `domid|`, privileged.
    pub const RESUME: u32 = 18;
    /// `domid|target|`, privileged.
    pub const SET_TARGET: u32 = 19;
    /// `|`: the caller's watches and transactions are dropped. 20 was `XS_RESTRICT`, which is gone.
    pub const RESET_WATCHES: u32 = 21;
    /// `path|offset|` to `generation|child|...[|]`.
    pub const DIRECTORY_PART: u32 = 22;
    /// `[domid|]` to `features|`; with a domain privileged.
    pub const GET_FEATURE: u32 = 23;
    /// `domid|features|`, privileged.
    pub const SET_FEATURE: u32 = 24;
    /// `[[domid|]quota|]` to a value, or without arguments to all names; privileged.
    pub const GET_QUOTA: u32 = 25;
    /// `[domid|]quota|value|`, privileged.
    pub const SET_QUOTA: u32 = 26;
}

/// Names of errors: `xsd_errors`. A name that is not here reaches Linux as EINVAL.
pub mod error {
    /// Malformed request or path.
    pub const EINVAL: &str = "EINVAL";
    /// No right to do that.
    pub const EACCES: &str = "EACCES";
    /// Exists already.
    pub const EEXIST: &str = "EEXIST";
    /// No such node, watch, transaction or domain.
    pub const ENOENT: &str = "ENOENT";
    /// Out of memory; a transaction that failed inside.
    pub const ENOMEM: &str = "ENOMEM";
    /// A quota is used up.
    pub const ENOSPC: &str = "ENOSPC";
    /// No such operation.
    pub const ENOSYS: &str = "ENOSYS";
    /// Done, but it could not be written to disk.
    pub const EIO: &str = "EIO";
    /// Cannot be changed for the time being.
    pub const EROFS: &str = "EROFS";
    /// Not now.
    pub const EBUSY: &str = "EBUSY";
    /// The transaction conflicts; begin again.
    pub const EAGAIN: &str = "EAGAIN";
    /// Longer than a message.
    pub const E2BIG: &str = "E2BIG";
    /// Not the owner's to give away.
    pub const EPERM: &str = "EPERM";
}

/// Letters of a permission entry, each followed by a decimal domain number (`docs/misc/xenstore.txt`, SET_PERMS).
pub mod perm {
    /// No access.
    pub const NONE: u8 = b'n';
    /// Read.
    pub const READ: u8 = b'r';
    /// Write.
    pub const WRITE: u8 = b'w';
    /// Both.
    pub const BOTH: u8 = b'b';
}

/// Special watch paths (`docs/misc/xenstore.txt`, WATCH).
pub mod special {
    /// A domain was introduced.
    pub const INTRODUCE_DOMAIN: &str = "@introduceDomain";
    /// A domain shut down, crashed, was released or is gone. `@releaseDomain/<domid>` is one domain's.
    pub const RELEASE_DOMAIN: &str = "@releaseDomain";
}

/// Where the nodes of all domains are: `/local/domain/<domid>`.
pub const DOMAINS: &str = "/local/domain";

/// Domain numbers with a meaning of their own (`xen.h`, `DOMID_*`).
pub mod domid {
    /// First number that is no domain's (`DOMID_FIRST_RESERVED`).
    pub const FIRST_RESERVED: u16 = 0x7ff0;
    /// The caller (`DOMID_SELF`).
    pub const SELF: u16 = 0x7ff0;
    /// In a permission entry: every domain (`DOMID_ANY`).
    pub const ANY: u16 = 0x7ff5;
}

/// Bytes of each ring of [`Interface`] (`XENSTORE_RING_SIZE`).
pub const RING_SIZE: usize = 1024;

/// `struct xenstore_domain_interface`: the page that a guest shares with the server. Indices run freely and are masked on use.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Interface {
    /// From the guest.
    pub req: [u8; RING_SIZE],
    /// To the guest.
    pub rsp: [u8; RING_SIZE],
    /// The server has read up to here.
    pub req_cons: U32,
    /// The guest has written up to here.
    pub req_prod: U32,
    /// The guest has read up to here.
    pub rsp_cons: U32,
    /// The server has written up to here.
    pub rsp_prod: U32,
    /// [`feature`] bits.
    pub server_features: U32,
    /// [`connection`].
    pub connection: U32,
    /// [`ring_error`].
    pub error: U32,
    /// Event channel, where no toolstack tells it (`evtchn_port`).
    pub evtchn_port: U32,
}
const _: () = assert!(core::mem::offset_of!(Interface, req_cons) == 2048);
const _: () = assert!(core::mem::offset_of!(Interface, server_features) == 2064);
const _: () = assert!(size_of::<Interface>() == 2080);

/// Bits of [`Interface::server_features`].
pub mod feature {
    /// [`connection`](super::connection) works (`XENSTORE_SERVER_FEATURE_RECONNECTION`).
    pub const RECONNECTION: u32 = 1;
    /// [`ring_error`](super::ring_error) is reported (`XENSTORE_SERVER_FEATURE_ERROR`).
    pub const ERROR: u32 = 2;
    /// WATCH takes a depth (`XENSTORE_SERVER_FEATURE_WATCHDEPTH`).
    pub const WATCH_DEPTH: u32 = 4;
    /// Permission entries may name every domain (`XENSTORE_SERVER_FEATURE_DOMID_ANY`).
    pub const DOMID_ANY: u32 = 8;
}

/// Values of [`Interface::connection`].
pub mod connection {
    /// Steady state (`XENSTORE_CONNECTED`).
    pub const CONNECTED: u32 = 0;
    /// The guest asks for a fresh start (`XENSTORE_RECONNECT`).
    pub const RECONNECT: u32 = 1;
}

/// Values of [`Interface::error`].
pub mod ring_error {
    /// All is well (`XENSTORE_ERROR_NONE`).
    pub const NONE: u32 = 0;
    /// Communication failed (`XENSTORE_ERROR_COMM`).
    pub const COMM: u32 = 1;
    /// The guest's indices are impossible (`XENSTORE_ERROR_RINGIDX`).
    pub const RING_INDEX: u32 = 2;
    /// The guest's message is impossible (`XENSTORE_ERROR_PROTO`).
    pub const PROTOCOL: u32 = 3;
}
