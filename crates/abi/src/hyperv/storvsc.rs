//! Storage: the packets on a channel of a SCSI controller.
//!
//! Every packet is a [`Packet`], in the guest's requests and in the host's completions alike; data travels beside it, in GPA-direct ranges. The
//! guest asks for the protocol's version first, newest to oldest, and then for what the controller can do. (Linux `drivers/scsi/storvsc_drv.c`,
//! OpenVMM `vm/devices/storage/storvsp_protocol`.)

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::scsi::CDB_SIZE;

/// Versions of the protocol: major in the upper byte, minor in the lower (`VMSTOR_PROTO_VERSION`).
pub mod version {
    /// Windows Server 2008 R2 before its release.
    pub const V2_0: u16 = 0x0200;
    /// Windows 7.
    pub const V4_2: u16 = 0x0402;
    /// Windows 8.
    pub const V5_1: u16 = 0x0501;
    /// Windows 8.1.
    pub const V6_0: u16 = 0x0600;
    /// Windows 10.
    pub const V6_2: u16 = 0x0602;
    /// All of them, oldest first.
    pub const ALL: [u16; 5] = [V2_0, V4_2, V5_1, V6_0, V6_2];
}

/// Values of [`Packet::operation`] (`enum vstor_packet_operation`).
pub mod operation {
    /// Host: a request is done.
    pub const COMPLETE_IO: u32 = 1;
    /// Host: a device was taken away.
    pub const REMOVE_DEVICE: u32 = 2;
    /// Guest: do a SCSI command.
    pub const EXECUTE_SRB: u32 = 3;
    /// Guest: reset a logical unit.
    pub const RESET_LUN: u32 = 4;
    /// Guest: reset the controller.
    pub const RESET_ADAPTER: u32 = 5;
    /// Guest: reset the bus.
    pub const RESET_BUS: u32 = 6;
    /// Guest: begin anew.
    pub const BEGIN_INITIALIZATION: u32 = 7;
    /// Guest: the beginning is over.
    pub const END_INITIALIZATION: u32 = 8;
    /// Guest: is this version of the protocol known.
    pub const QUERY_PROTOCOL_VERSION: u32 = 9;
    /// Guest: what can the controller do.
    pub const QUERY_PROPERTIES: u32 = 10;
    /// Host: look again what is there.
    pub const ENUMERATE_BUS: u32 = 11;
    /// Guest: offer this many channels more.
    pub const CREATE_SUB_CHANNELS: u32 = 13;
}

/// Values of [`Packet::status`] (`NTSTATUS`).
pub mod status {
    /// Done.
    pub const SUCCESS: u32 = 0;
    /// The operation's arguments make no sense.
    pub const INVALID_PARAMETER: u32 = 0xc000_000d;
    /// There is no such operation.
    pub const INVALID_DEVICE_REQUEST: u32 = 0xc000_0010;
    /// The version is not known.
    pub const REVISION_MISMATCH: u32 = 0xc000_0059;
    /// Not at this time.
    pub const INVALID_DEVICE_STATE: u32 = 0xc000_0184;
}

/// Values and flags of [`Srb::srb_status`] (`SRB_STATUS_*`).
pub mod srb_status {
    /// Done.
    pub const SUCCESS: u8 = 0x01;
    /// Given up.
    pub const ABORTED: u8 = 0x02;
    /// Failed; [`Srb::scsi_status`](super::Srb::scsi_status) says how.
    pub const ERROR: u8 = 0x04;
    /// The request makes no sense.
    pub const INVALID_REQUEST: u8 = 0x06;
    /// There was less data than there was room for, or room than data.
    pub const DATA_OVERRUN: u8 = 0x12;
    /// There is no such logical unit.
    pub const INVALID_LUN: u8 = 0x20;
    /// Flag: there is sense data.
    pub const AUTOSENSE_VALID: u8 = 0x80;
}

/// Values of [`Srb::data_in`] (`enum storvsc_request_type`).
pub mod direction {
    /// The guest's memory is read.
    pub const WRITE: u8 = 0;
    /// The guest's memory is written.
    pub const READ: u8 = 1;
    /// No data.
    pub const NONE: u8 = 2;
}

/// Bit of [`Packet::flags`]: the sender wants to know when it is done (`REQUEST_COMPLETION_FLAG`).
pub const REQUEST_COMPLETION: u32 = 1;
/// Bit of [`Properties::flags`]: several channels (`STORAGE_CHANNEL_SUPPORTS_MULTI_CHANNEL`).
pub const MULTI_CHANNEL: u32 = 1;
/// Bytes of sense data in a completion (`STORVSC_SENSE_BUFFER_SIZE`).
pub const SENSE_SIZE: usize = 20;
/// Bytes of [`Packet`] before Windows 8, without the last fields of [`Srb`].
pub const OLD_PACKET_SIZE: usize = 48;
/// Bytes of what [`Packet::operation`] is about.
pub const BODY_SIZE: usize = 52;

/// `struct vstor_packet`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Packet {
    /// One of [`operation`].
    pub operation: U32,
    /// [`REQUEST_COMPLETION`] or zero.
    pub flags: U32,
    /// One of [`status`], in completions.
    pub status: U32,
    /// [`Srb`], [`Properties`], [`Version`], a number of channels as [`U16`], or nothing.
    pub body: [u8; BODY_SIZE],
}

/// Bytes of [`Packet`].
pub const PACKET_SIZE: usize = size_of::<Packet>();
const _: () = assert!(PACKET_SIZE == 64);

/// `struct vmscsi_request`: a SCSI command, or what came of it.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Srb {
    /// Bytes of this structure; OpenBSD counts the packet's header, too.
    pub length: U16,
    /// One of [`srb_status`].
    pub srb_status: u8,
    /// One of [`super::scsi::status`].
    pub scsi_status: u8,
    /// The controller's number.
    pub port: u8,
    /// The bus.
    pub path: u8,
    /// The target on it.
    pub target: u8,
    /// The logical unit of it.
    pub lun: u8,
    /// Bytes of the command.
    pub cdb_length: u8,
    /// Bytes of room for sense data, or of sense data.
    pub sense_length: u8,
    /// One of [`direction`].
    pub data_in: u8,
    /// Reserved.
    pub reserved: u8,
    /// Bytes of data: those there is room for, or those that were moved.
    pub transfer_length: U32,
    /// The command, of [`CDB_SIZE`] bytes at most, or sense data.
    pub payload: [u8; SENSE_SIZE],
    /// Reserved; from here on since Windows 8.
    pub reserved2: U16,
    /// Queue tag.
    pub queue_tag: u8,
    /// Queue action.
    pub queue_action: u8,
    /// `SRB_FLAGS_*`.
    pub srb_flags: U32,
    /// Seconds until the guest loses its patience.
    pub timeout: U32,
    /// Sort key.
    pub queue_sort_key: U32,
}

const _: () = assert!(size_of::<Srb>() == BODY_SIZE);
const _: () = assert!(CDB_SIZE <= SENSE_SIZE);

/// `struct vmstorage_channel_properties`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Properties {
    /// Zero: OpenBSD takes bytes 2 and 3 for the numbers of bus and initiator.
    pub reserved: U32,
    /// Most channels besides the first.
    pub max_subchannels: U16,
    /// Zero.
    pub reserved2: U16,
    /// [`MULTI_CHANNEL`] or zero.
    pub flags: U32,
    /// Most bytes of one request.
    pub max_transfer_bytes: U32,
    /// Zero.
    pub reserved3: U64,
}

const _: () = assert!(size_of::<Properties>() == 24);

/// `struct vmstorage_protocol_version`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Version {
    /// One of [`version`].
    pub major_minor: U16,
    /// Windows' build; zero.
    pub revision: U16,
}

const _: () = assert!(size_of::<Version>() == 4);
