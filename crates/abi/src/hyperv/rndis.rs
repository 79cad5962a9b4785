//! Remote NDIS: what a network card and its driver tell each other, inside NVSP.
//!
//! A message is a [`Header`], a structure and what its offsets point at; offsets count from behind the header. (Microsoft's "Remote NDIS
//! Specification"; Linux `drivers/net/hyperv/hyperv_net.h`, `include/linux/rndis.h`; OpenVMM `vm/devices/net/netvsp/src/rndisprot.rs`. Objects are
//! NDIS's, `ntddndis.h`.)

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Types of messages (`RNDIS_MSG_*`).
pub mod message {
    /// Both: [`super::Packet`].
    pub const PACKET: u32 = 0x0000_0001;
    /// Guest: [`super::Initialize`].
    pub const INITIALIZE: u32 = 0x0000_0002;
    /// Guest: the card is not used any more; no answer.
    pub const HALT: u32 = 0x0000_0003;
    /// Guest: [`super::Query`].
    pub const QUERY: u32 = 0x0000_0004;
    /// Guest: [`super::Query`], too.
    pub const SET: u32 = 0x0000_0005;
    /// Guest: begin anew.
    pub const RESET: u32 = 0x0000_0006;
    /// Host: [`super::IndicateStatus`].
    pub const INDICATE_STATUS: u32 = 0x0000_0007;
    /// Guest: are you there.
    pub const KEEPALIVE: u32 = 0x0000_0008;
    /// Bit of the answer's type.
    pub const COMPLETION: u32 = 0x8000_0000;
}

/// Statuses (`NDIS_STATUS_*`).
pub mod status {
    /// Done.
    pub const SUCCESS: u32 = 0;
    /// What is asked for is not to be had.
    pub const NOT_SUPPORTED: u32 = 0xc000_00bb;
    /// What was given makes no sense.
    pub const INVALID_DATA: u32 = 0xc001_0015;
    /// The version is not known.
    pub const BAD_VERSION: u32 = 0xc001_0004;
    /// Indicated: there is a link.
    pub const MEDIA_CONNECT: u32 = 0x4001_000b;
    /// Indicated: there is none.
    pub const MEDIA_DISCONNECT: u32 = 0x4001_000c;
}

/// Objects to be queried and set (`OID_*`).
pub mod oid {
    /// Which of these there are.
    pub const SUPPORTED_LIST: u32 = 0x0001_0101;
    /// Whether the card works.
    pub const HARDWARE_STATUS: u32 = 0x0001_0102;
    /// Kinds of network it can be on.
    pub const MEDIA_SUPPORTED: u32 = 0x0001_0103;
    /// Kind of network it is on.
    pub const MEDIA_IN_USE: u32 = 0x0001_0104;
    /// Longest payload of a frame.
    pub const MAXIMUM_FRAME_SIZE: u32 = 0x0001_0106;
    /// Speed, in units of 100 bit/s.
    pub const LINK_SPEED: u32 = 0x0001_0107;
    /// Who made it.
    pub const VENDOR_ID: u32 = 0x0001_010c;
    /// What it is.
    pub const VENDOR_DESCRIPTION: u32 = 0x0001_010d;
    /// What is received; [`super::FILTER_DIRECTED`] and others.
    pub const CURRENT_PACKET_FILTER: u32 = 0x0001_010e;
    /// Longest frame.
    pub const MAXIMUM_TOTAL_SIZE: u32 = 0x0001_0111;
    /// Whether there is a link: zero when there is.
    pub const MEDIA_CONNECT_STATUS: u32 = 0x0001_0114;
    /// [`super::RssCapabilities`].
    pub const RSS_CAPABILITIES: u32 = 0x0001_0203;
    /// [`super::RssParameters`].
    pub const RSS_PARAMETERS: u32 = 0x0001_0204;
    /// A parameter by its name.
    pub const CONFIG_PARAMETER: u32 = 0x0001_021b;
    /// Address that the card was made with.
    pub const PERMANENT_ADDRESS: u32 = 0x0101_0101;
    /// Address that the card has.
    pub const CURRENT_ADDRESS: u32 = 0x0101_0102;
    /// Group addresses that are received.
    pub const MULTICAST_LIST: u32 = 0x0101_0103;
    /// Most group addresses.
    pub const MAXIMUM_LIST_SIZE: u32 = 0x0101_0104;
    /// [`super::OffloadParameters`].
    pub const OFFLOAD_PARAMETERS: u32 = 0xfc01_020c;
    /// [`super::Offload`].
    pub const OFFLOAD_CAPABILITIES: u32 = 0xfc01_020d;
}

/// Packet filter: frames to the card's address (`NDIS_PACKET_TYPE_DIRECTED`).
pub const FILTER_DIRECTED: u32 = 0x01;
/// Packet filter: frames to listed groups.
pub const FILTER_MULTICAST: u32 = 0x02;
/// Packet filter: frames to all groups.
pub const FILTER_ALL_MULTICAST: u32 = 0x04;
/// Packet filter: frames to everybody.
pub const FILTER_BROADCAST: u32 = 0x08;
/// Packet filter: all frames.
pub const FILTER_PROMISCUOUS: u32 = 0x20;

/// What each message begins with.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// One of [`message`].
    pub kind: U32,
    /// Bytes of the message, this header included.
    pub length: U32,
}

/// Bytes of [`Header`].
pub const HEADER_SIZE: usize = size_of::<Header>();
/// Major version of RNDIS.
pub const MAJOR_VERSION: u32 = 1;
/// [`InitializeComplete::device_flags`]: without connections (`RNDIS_DF_CONNECTIONLESS`).
pub const CONNECTIONLESS: u32 = 1;

/// `struct rndis_initialize_request`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Initialize {
    /// The guest's number for the request; the answer has it, too, here and in all others.
    pub request_id: U32,
    /// [`MAJOR_VERSION`].
    pub major_version: U32,
    /// Minor version.
    pub minor_version: U32,
    /// Most bytes of what the host sends at once.
    pub max_transfer_size: U32,
}

/// `struct rndis_initialize_complete`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InitializeComplete {
    /// The request's.
    pub request_id: U32,
    /// One of [`status`].
    pub status: U32,
    /// [`MAJOR_VERSION`].
    pub major_version: U32,
    /// Minor version: 0.
    pub minor_version: U32,
    /// [`CONNECTIONLESS`].
    pub device_flags: U32,
    /// Zero: Ethernet.
    pub medium: U32,
    /// Most messages in one NVSP packet.
    pub max_packets: U32,
    /// Most bytes of what the guest sends at once.
    pub max_transfer_size: U32,
    /// Messages in one NVSP packet begin at multiples of this power of two.
    pub alignment_exponent: U32,
    /// Zero.
    pub reserved: [U32; 2],
}

const _: () = assert!(size_of::<InitializeComplete>() == 44);

/// `struct rndis_query_request`, and of the same shape `struct rndis_set_request`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Query {
    /// The guest's number.
    pub request_id: U32,
    /// One of [`oid`].
    pub oid: U32,
    /// Bytes of the value.
    pub length: U32,
    /// Where the value is.
    pub offset: U32,
    /// Zero.
    pub vc_handle: U32,
}

/// `struct rndis_query_complete`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct QueryComplete {
    /// The request's.
    pub request_id: U32,
    /// One of [`status`].
    pub status: U32,
    /// Bytes of the value.
    pub length: U32,
    /// Where the value is.
    pub offset: U32,
}

/// `struct rndis_set_complete` and `struct rndis_keepalive_complete`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Complete {
    /// The request's.
    pub request_id: U32,
    /// One of [`status`].
    pub status: U32,
}

/// `struct rndis_reset_complete`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ResetComplete {
    /// One of [`status`].
    pub status: U32,
    /// Not zero: filter and addresses have to be set again.
    pub addressing_reset: U32,
}

/// `struct rndis_indicate_status`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IndicateStatus {
    /// One of [`status`].
    pub status: U32,
    /// Bytes of what belongs to it.
    pub length: U32,
    /// Where that is.
    pub offset: U32,
}

/// `struct rndis_packet`: a frame and facts about it.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Packet {
    /// Where the frame is.
    pub data_offset: U32,
    /// Bytes of it.
    pub data_length: U32,
    /// Out-of-band data: none.
    pub oob: [U32; 3],
    /// Where the facts ([`PacketInfo`]) are.
    pub info_offset: U32,
    /// Bytes of all of them.
    pub info_length: U32,
    /// Zero.
    pub vc_handle: U32,
    /// Zero.
    pub reserved: U32,
}

const _: () = assert!(size_of::<Packet>() == 36);

/// `struct rndis_per_packet_info`: a fact about a packet.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PacketInfo {
    /// Bytes of this and the value.
    pub size: U32,
    /// One of [`info`].
    pub kind: U32,
    /// Where the value is, from the beginning of this.
    pub offset: U32,
}

/// Bytes of [`PacketInfo`].
pub const PACKET_INFO_SIZE: usize = size_of::<PacketInfo>();

/// Kinds of [`PacketInfo`] (`enum ndis_per_pkt_info_type`).
pub mod info {
    /// Checksums to be made, or found right; [`super::checksum`].
    pub const CHECKSUM: u32 = 0;
    /// Segments to be cut; [`super::lso`].
    pub const LSO: u32 = 2;
    /// Tag of a VLAN: priority in bits 0 to 2, CFI in bit 3, number from bit 4.
    pub const VLAN: u32 = 6;
    /// Which part of a packet this is; [`super::part`]. Bit 31 says that it is between host and guest only (`RNDIS_PKTINFO_ID`).
    pub const PART: u32 = 1 << 31 | 1;
}

/// Bits of a fact about a part (`struct rndis_pktinfo_id`).
pub mod part {
    /// Version 1 of the fact (`RNDIS_PKTINFO_ID_V1`).
    pub const V1: u32 = 1;
    /// It is a part of a packet; all parts are in one packet of the channel (`RNDIS_PKTINFO_SUBALLOC`).
    pub const IS_PART: u32 = 1 << 8;
    /// The first.
    pub const FIRST: u32 = 1 << 9;
    /// The last.
    pub const LAST: u32 = 1 << 10;
}

/// Bits of a checksum fact (`struct ndis_tcp_ip_checksum_info`).
pub mod checksum {
    /// From the guest: it is IPv4.
    pub const IPV4: u32 = 1 << 0;
    /// From the guest: it is IPv6.
    pub const IPV6: u32 = 1 << 1;
    /// From the guest: TCP's is to be made.
    pub const TCP: u32 = 1 << 2;
    /// From the guest: UDP's is to be made.
    pub const UDP: u32 = 1 << 3;
    /// From the guest: IPv4's is to be made.
    pub const IP_HEADER: u32 = 1 << 4;
    /// To the guest: TCP's is right.
    pub const TCP_SUCCEEDED: u32 = 1 << 3;
    /// To the guest: UDP's is right.
    pub const UDP_SUCCEEDED: u32 = 1 << 4;
}

/// Fields of a segmentation fact (`struct ndis_tcp_lso_info`).
pub mod lso {
    /// Bits of the size of a segment's payload.
    pub const MSS: u32 = 0xf_ffff;
    /// It is version 2.
    pub const V2: u32 = 1 << 30;
    /// It is IPv6.
    pub const IPV6: u32 = 1 << 31;
}

/// First bytes of NDIS's structures (`struct ndis_object_header`).
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ObjectHeader {
    /// One of [`object`].
    pub kind: u8,
    /// Revision.
    pub revision: u8,
    /// Bytes of the structure.
    pub size: U16,
}

/// Types of objects (`NDIS_OBJECT_TYPE_*`).
pub mod object {
    /// [`super::OffloadParameters`].
    pub const DEFAULT: u8 = 0x80;
    /// [`super::RssCapabilities`].
    pub const RSS_CAPABILITIES: u8 = 0x88;
    /// [`super::RssParameters`].
    pub const RSS_PARAMETERS: u8 = 0x89;
    /// [`super::Offload`].
    pub const OFFLOAD: u8 = 0xa7;
}

/// Encapsulation: Ethernet (`NDIS_OFFLOAD_ENCAP_8023`).
pub const ENCAPSULATION_ETHERNET: u32 = 2;

/// Bits of [`ChecksumOffload`]'s flags (`NDIS_TXCSUM_CAP_*`).
pub mod checksum_offload {
    /// IPv6: extension headers may be there.
    pub const IPV6_EXTENSIONS: u32 = 0x001;
    /// TCP options may be there.
    pub const TCP_OPTIONS: u32 = 0x004;
    /// TCP's checksum.
    pub const TCP: u32 = 0x010;
    /// UDP's checksum.
    pub const UDP: u32 = 0x040;
    /// IPv4's header checksum.
    pub const IPV4: u32 = 0x100;
}

/// `struct ndis_csum_offload`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ChecksumOffload {
    /// IPv4, sent: encapsulation, flags.
    pub ipv4_tx: [U32; 2],
    /// IPv4, received.
    pub ipv4_rx: [U32; 2],
    /// IPv6, sent.
    pub ipv6_tx: [U32; 2],
    /// IPv6, received.
    pub ipv6_rx: [U32; 2],
}

/// Bits of [`LsoV2::ipv6_options`] (`NDIS_LSOV2_CAP_IP6`): extension headers and TCP options may be there.
pub const LSO_IPV6_ALL: u32 = 0x5;

/// `struct ndis_lsov2_offload`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LsoV2 {
    /// IPv4: encapsulation.
    pub ipv4_encapsulation: U32,
    /// Largest packet to be cut.
    pub ipv4_max_size: U32,
    /// Least number of segments that are worth it.
    pub ipv4_min_segments: U32,
    /// And IPv6.
    pub ipv6_encapsulation: U32,
    /// Largest packet to be cut.
    pub ipv6_max_size: U32,
    /// Least number of segments that are worth it.
    pub ipv6_min_segments: U32,
    /// [`LSO_IPV6_ALL`] or less.
    pub ipv6_options: U32,
}

/// `struct ndis_offload`, as far as NDIS 6.30 has it.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Offload {
    /// Of type [`object::OFFLOAD`]; the revision says how much of this is there.
    pub header: ObjectHeader,
    /// Checksums.
    pub checksum: ChecksumOffload,
    /// Segmentation version 1: none.
    pub lso_v1: [U32; 4],
    /// IPsec version 1: none.
    pub ipsec_v1: [U32; 7],
    /// Segmentation version 2.
    pub lso_v2: LsoV2,
    /// Zero.
    pub flags: U32,
    /// IPsec version 2: none; since revision 2.
    pub ipsec_v2: [U32; 8],
    /// Received segments are put together: over IPv4, over IPv6; since revision 3.
    pub rsc: [u8; 2],
    /// Zero.
    pub padding: [u8; 2],
    /// GRE: none.
    pub gre: [U32; 2],
}

/// Sizes of [`Offload`] in revisions 1, 2 and 3.
pub const OFFLOAD_SIZES: [usize; 3] = [112, 144, size_of::<Offload>()];
const _: () = assert!(size_of::<Offload>() == 156);

/// Values of [`OffloadParameters`]' checksum fields (`NDIS_OFFLOAD_PARAMETERS_*`).
pub mod offload_parameter {
    /// As it is.
    pub const NO_CHANGE: u8 = 0;
    /// Neither direction.
    pub const DISABLED: u8 = 1;
    /// Sent packets only.
    pub const TX_ONLY: u8 = 2;
    /// Received packets only.
    pub const RX_ONLY: u8 = 3;
    /// Both.
    pub const ENABLED: u8 = 4;
}

/// `struct ndis_offload_params`, as far as everybody has it.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OffloadParameters {
    /// Of type [`object::DEFAULT`].
    pub header: ObjectHeader,
    /// Of the IPv4 header.
    pub ipv4_checksum: u8,
    /// TCP over IPv4.
    pub tcp4_checksum: u8,
    /// UDP over IPv4.
    pub udp4_checksum: u8,
    /// TCP over IPv6.
    pub tcp6_checksum: u8,
    /// UDP over IPv6.
    pub udp6_checksum: u8,
}

const _: () = assert!(size_of::<OffloadParameters>() == 9);

/// Where in `struct ndis_offload_params` of revision 3 it is said whether received segments are to be put together, over IPv4 and over IPv6.
pub const RSC_PARAMETERS: core::ops::Range<usize> = 22..24;
/// Value there: they are not (`NDIS_OFFLOAD_PARAMETERS_RSC_DISABLED`). Zero is [`offload_parameter::NO_CHANGE`] here, too.
pub const RSC_DISABLED: u8 = 1;
/// Value there: they are.
pub const RSC_ENABLED: u8 = 2;

/// `struct ndis_recv_scale_cap`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RssCapabilities {
    /// Of type [`object::RSS_CAPABILITIES`], revision 2.
    pub header: ObjectHeader,
    /// [`rss`] bits.
    pub flags: U32,
    /// Interrupts.
    pub interrupts: U32,
    /// Queues: the first channel and its subchannels.
    pub queues: U32,
    /// Entries of the indirection table.
    pub table_entries: U16,
}

/// Bytes of [`RssCapabilities`], which has no padding.
pub const RSS_CAPABILITIES_SIZE: usize = size_of::<RssCapabilities>();
const _: () = assert!(RSS_CAPABILITIES_SIZE == 18);

/// Words of receive side scaling.
pub mod rss {
    /// Capability: TCP over IPv4 (`NDIS_RSS_CAPS_HASH_TYPE_TCP_IPV4`).
    pub const CAP_TCP_IPV4: u32 = 0x100;
    /// Capability: TCP over IPv6.
    pub const CAP_TCP_IPV6: u32 = 0x200;
    /// Parameter's flag: off (`NDIS_RSS_PARAM_FLAG_DISABLE_RSS`).
    pub const DISABLE: u16 = 0x10;
    /// Most entries of the indirection table.
    pub const TABLE_ENTRIES: usize = 128;
}

/// `struct ndis_recv_scale_param`, up to the key.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RssParameters {
    /// Of type [`object::RSS_PARAMETERS`].
    pub header: ObjectHeader,
    /// [`rss::DISABLE`] and what has not changed.
    pub flags: U16,
    /// Not used.
    pub base_cpu: U16,
    /// Hash function and types.
    pub hash: U32,
    /// Bytes of the indirection table, of an [`U32`] each.
    pub table_size: U16,
    /// Padding.
    pub pad: U16,
    /// Where the table is, from the beginning of this.
    pub table_offset: U32,
    /// Bytes of the key.
    pub key_size: U16,
    /// Padding.
    pub pad2: U16,
    /// Where the key is, from the beginning of this.
    pub key_offset: U32,
}

const _: () = assert!(size_of::<RssParameters>() == 28);
