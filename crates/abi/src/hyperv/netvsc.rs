//! Network: the packets on a channel of a network card, NVSP.
//!
//! NVSP agrees on a version, shares buffers and carries RNDIS messages ([`super::rndis`]): the guest's in sections of its send buffer or in GPA-direct
//! ranges, the host's in its receive buffer, named by transfer-page ranges. A message is a type and what belongs to it, always in a unit of the
//! version's size. (Linux `drivers/net/hyperv/hyperv_net.h`, OpenVMM `vm/devices/net/netvsp/src/protocol.rs`.)

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Versions (`NVSP_PROTOCOL_VERSION_*`).
pub mod version {
    /// Windows Server 2008.
    pub const V1: u32 = 0x0000_0002;
    /// Windows Server 2008 R2.
    pub const V2: u32 = 0x0003_0002;
    /// Windows 8.
    pub const V4: u32 = 0x0004_0000;
    /// Windows 8.1: subchannels.
    pub const V5: u32 = 0x0005_0000;
    /// Windows 10.
    pub const V6: u32 = 0x0006_0000;
    /// Windows 10 1803: larger messages, segments coalesced by the host.
    pub const V61: u32 = 0x0006_0001;
}

/// Types of messages (`NVSP_MSG*_TYPE_*`).
pub mod kind {
    /// Guest: [`super::Init`].
    pub const INIT: u32 = 1;
    /// Host: [`super::InitComplete`].
    pub const INIT_COMPLETE: u32 = 2;
    /// Guest: version of NDIS.
    pub const SEND_NDIS_VERSION: u32 = 100;
    /// Guest: [`super::SendBuffer`], to be received into.
    pub const SEND_RECEIVE_BUFFER: u32 = 101;
    /// Host: [`super::ReceiveBufferComplete`].
    pub const SEND_RECEIVE_BUFFER_COMPLETE: u32 = 102;
    /// Guest: the receive buffer is the guest's again.
    pub const REVOKE_RECEIVE_BUFFER: u32 = 103;
    /// Guest: [`super::SendBuffer`], to be sent from.
    pub const SEND_SEND_BUFFER: u32 = 104;
    /// Host: [`super::SendBufferComplete`].
    pub const SEND_SEND_BUFFER_COMPLETE: u32 = 105;
    /// Guest: the send buffer is the guest's again.
    pub const REVOKE_SEND_BUFFER: u32 = 106;
    /// Both: [`super::RndisPacket`].
    pub const SEND_RNDIS_PACKET: u32 = 107;
    /// Both: a status; the RNDIS messages were taken.
    pub const SEND_RNDIS_PACKET_COMPLETE: u32 = 108;
    /// Guest: [`super::NdisConfig`].
    pub const SEND_NDIS_CONFIG: u32 = 125;
    /// Both: [`super::Subchannel`], or its answer.
    pub const SUBCHANNEL: u32 = 133;
    /// Host: [`super::IndirectionTable`], and the table behind the message.
    pub const SEND_INDIRECTION_TABLE: u32 = 134;
}

/// Statuses (`NVSP_STAT_*`).
pub mod status {
    /// Done.
    pub const SUCCESS: u32 = 1;
    /// Failed.
    pub const FAILURE: u32 = 2;
    /// An RNDIS message that makes no sense.
    pub const INVALID_RNDIS_PACKET: u32 = 5;
}

/// Bytes of a message before 6.1.
pub const OLD_MESSAGE_SIZE: usize = 32;
/// Bytes of a message since 6.1.
pub const MESSAGE_SIZE: usize = 40;
/// [`InitComplete::max_mdl_chain_length`]: most ranges of one packet; as Hyper-V says.
pub const MAX_MDL_CHAIN_LENGTH: u32 = 34;
/// [`RndisPacket::section_index`]: no section, the message is in ranges.
pub const NO_SECTION: u32 = 0xffff_ffff;
/// [`RndisPacket::channel`]: packets.
pub const CHANNEL_DATA: u32 = 0;
/// [`RndisPacket::channel`]: everything else.
pub const CHANNEL_CONTROL: u32 = 1;
/// [`Subchannel::operation`]: offer channels (`NVSP_SUBCHANNEL_ALLOCATE`).
pub const SUBCHANNEL_ALLOCATE: u32 = 1;

/// `struct nvsp_message_init`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Init {
    /// Oldest version that the guest knows.
    pub min_version: U32,
    /// Newest version that the guest knows; Linux says the same for both and asks again.
    pub max_version: U32,
}

/// `struct nvsp_message_init_complete`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InitComplete {
    /// The version for guests of [`version::V1`], all ones for others.
    pub negotiated_version: U32,
    /// [`MAX_MDL_CHAIN_LENGTH`].
    pub max_mdl_chain_length: U32,
    /// One of [`status`].
    pub status: U32,
}

/// `struct nvsp_1_message_send_receive_buffer`, and that of the send buffer.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SendBuffer {
    /// The buffer's GPADL.
    pub gpadl: U32,
    /// The guest's name for it.
    pub id: U16,
}

/// `struct nvsp_1_message_send_receive_buffer_complete` with its one section.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReceiveBufferComplete {
    /// One of [`status`].
    pub status: U32,
    /// How many sections follow: one.
    pub sections: U32,
    /// Where in the buffer it begins.
    pub offset: U32,
    /// Bytes of its parts.
    pub part_size: U32,
    /// How many parts.
    pub parts: U32,
    /// Where in the buffer it ends.
    pub end_offset: U32,
}

/// `struct nvsp_1_message_send_send_buffer_complete`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SendBufferComplete {
    /// One of [`status`].
    pub status: U32,
    /// Bytes of a section.
    pub section_size: U32,
}

/// `struct nvsp_1_message_send_rndis_packet`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RndisPacket {
    /// [`CHANNEL_DATA`] or [`CHANNEL_CONTROL`].
    pub channel: U32,
    /// Section of the send buffer, or [`NO_SECTION`].
    pub section_index: U32,
    /// Bytes in the section.
    pub section_size: U32,
}

/// `struct nvsp_2_send_ndis_config`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NdisConfig {
    /// Longest frame, without a VLAN's tag.
    pub mtu: U32,
    /// Zero.
    pub reserved: U32,
    /// `NVSP_2_VSC_CAPABILITY` bits.
    pub capabilities: U64,
}

/// `struct nvsp_5_subchannel_request`, and of the same shape `struct nvsp_5_subchannel_complete`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Subchannel {
    /// [`SUBCHANNEL_ALLOCATE`]; in the answer one of [`status`].
    pub operation: U32,
    /// How many channels besides the first.
    pub count: U32,
}

/// `struct nvsp_5_send_indirect_table`: on which channel the guest shall send which packets, each entry a channel's index as [`U32`].
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IndirectionTable {
    /// How many entries: [`SEND_TABLE_ENTRIES`].
    pub count: U32,
    /// Where they are, from the beginning of the message.
    pub offset: U32,
}

/// Entries of [`IndirectionTable`] (`VRSS_SEND_TAB_SIZE`); Linux takes no other number.
pub const SEND_TABLE_ENTRIES: u32 = 16;
