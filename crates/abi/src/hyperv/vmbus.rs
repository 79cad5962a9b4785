//! VMBus: the messages by which a guest and its host agree on channels.
//!
//! The guest posts messages to a connection by hypercall; the host's come in slot 2 of the synthetic interrupt controller's message page. Each
//! begins with a [`Header`]. (Linux `include/linux/hyperv.h`, `drivers/hv/{connection,channel_mgmt,channel}.c`; OpenVMM
//! `vm/devices/vmbus/vmbus_core/src/protocol.rs`.)
//!
//! ```text
//!   guest                                   host
//!   INITIATE_CONTACT (newest version first) --> VERSION_RESPONSE
//!   REQUEST_OFFERS                          --> OFFER ..., ALL_OFFERS_DELIVERED
//!   GPADL_HEADER, GPADL_BODY ...            --> GPADL_CREATED           the rings' pages
//!   OPEN                                    --> OPEN_RESULT             rings are in use
//!   CLOSE, GPADL_TEARDOWN                   --> GPADL_TORNDOWN
//!                                           <-- RESCIND                 the device goes
//!   CLOSE, GPADL_TEARDOWN, RELID_RELEASED   --> GPADL_TORNDOWN
//!   UNLOAD                                  --> UNLOAD_RESPONSE
//! ```

use core::fmt;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Synthetic interrupt source of VMBus (`VMBUS_MESSAGE_SINT`).
pub const SINT: u8 = 2;
/// Type of its messages in the hypercall and in the message page (`HVMSG_VMBUS` of Linux `include/asm-generic/hyperv-tlfs.h`).
pub const MESSAGE_TYPE: u32 = 1;
/// Most bytes of a message (`HV_MESSAGE_PAYLOAD_BYTE_COUNT`).
pub const MAX_MESSAGE: usize = 240;
/// Connection of guests older than version 5.0 (`VMBUS_MESSAGE_CONNECTION_ID`).
pub const MESSAGE_CONNECTION: u32 = 1;
/// Connection of the others' first message (`VMBUS_MESSAGE_CONNECTION_ID_4`).
pub const MESSAGE_CONNECTION_5: u32 = 4;
/// Connection of events before channels had their own, versions 0.13 and 1.1 (`VMBUS_EVENT_CONNECTION_ID`).
pub const EVENT_CONNECTION: u32 = 2;
/// Most channels: event flags of one interrupt source, without flag 0 (`MAX_NUM_CHANNELS`).
pub const MAX_CHANNELS: u32 = 2047;

/// Versions: major in the upper half, minor in the lower (`VERSION_*`).
pub mod version {
    /// Windows Server 2008: events by an interrupt page that both sides share.
    pub const WS2008: u32 = 0x0000_000d;
    /// Windows 7: a connection for each channel's events.
    pub const WIN7: u32 = 0x0001_0001;
    /// Windows 8: an event flag for each channel, on any processor.
    pub const WIN8: u32 = 0x0002_0004;
    /// Windows 8.1.
    pub const WIN8_1: u32 = 0x0003_0000;
    /// Windows 10.
    pub const WIN10: u32 = 0x0004_0000;
    /// Windows 10 RS3: channels move between processors.
    pub const WIN10_RS3: u32 = 0x0004_0001;
    /// Windows 10 RS4: the host chooses the connection of messages.
    pub const WIN10_V5: u32 = 0x0005_0000;
    /// Windows 10 RS5.
    pub const WIN10_V5_1: u32 = 0x0005_0001;
    /// Windows Server 2019.
    pub const WIN10_V5_2: u32 = 0x0005_0002;
    /// Windows Server 2022: moves of channels are answered.
    pub const WIN10_V5_3: u32 = 0x0005_0003;
}

/// Values of [`Header::kind`] (`enum vmbus_channel_message_type`).
pub mod message {
    /// Host: [`Offer`](super::Offer).
    pub const OFFER: u32 = 1;
    /// Host: [`Relid`](super::Relid), the channel's device goes.
    pub const RESCIND: u32 = 2;
    /// Guest: the header alone, what is there.
    pub const REQUEST_OFFERS: u32 = 3;
    /// Host: the header alone, that is all.
    pub const ALL_OFFERS_DELIVERED: u32 = 4;
    /// Guest: [`Open`](super::Open).
    pub const OPEN: u32 = 5;
    /// Host: [`OpenResult`](super::OpenResult).
    pub const OPEN_RESULT: u32 = 6;
    /// Guest: [`Relid`](super::Relid), the rings are not used any more.
    pub const CLOSE: u32 = 7;
    /// Guest: [`GpadlHeader`](super::GpadlHeader).
    pub const GPADL_HEADER: u32 = 8;
    /// Guest: [`GpadlBody`](super::GpadlBody).
    pub const GPADL_BODY: u32 = 9;
    /// Host: [`GpadlCreated`](super::GpadlCreated).
    pub const GPADL_CREATED: u32 = 10;
    /// Guest: [`GpadlTeardown`](super::GpadlTeardown).
    pub const GPADL_TEARDOWN: u32 = 11;
    /// Host: [`GpadlTorndown`](super::GpadlTorndown).
    pub const GPADL_TORNDOWN: u32 = 12;
    /// Guest: [`Relid`](super::Relid), the number of a rescinded channel is free.
    pub const RELID_RELEASED: u32 = 13;
    /// Guest: [`InitiateContact`](super::InitiateContact).
    pub const INITIATE_CONTACT: u32 = 14;
    /// Host: [`VersionResponse`](super::VersionResponse).
    pub const VERSION_RESPONSE: u32 = 15;
    /// Guest: the header alone, the connection is over.
    pub const UNLOAD: u32 = 16;
    /// Host: the header alone.
    pub const UNLOAD_RESPONSE: u32 = 17;
    /// Guest: [`ModifyChannel`](super::ModifyChannel).
    pub const MODIFY_CHANNEL: u32 = 22;
    /// Host: [`ModifyChannelResponse`](super::ModifyChannelResponse).
    pub const MODIFY_CHANNEL_RESPONSE: u32 = 24;
}

/// Bits of [`Offer::flags`] (`VMBUS_CHANNEL_*`).
pub mod offer_flags {
    /// The device has an interface for user programs.
    pub const ENUMERATE_DEVICE_INTERFACE: u16 = 0x1;
    /// Packets are messages or bytes of a pipe; [`Offer::user_defined`](super::Offer::user_defined) says which.
    pub const NAMED_PIPE_MODE: u16 = 0x10;
}

/// First word of [`Offer::user_defined`] with [`offer_flags::NAMED_PIPE_MODE`]: packets are messages (`VMBUS_PIPE_TYPE_MESSAGE`).
pub const PIPE_MODE_MESSAGE: u32 = 4;

/// Status of [`OpenResult`], [`GpadlCreated`] and [`ModifyChannelResponse`]: done. Anything else is a failure.
pub const STATUS_SUCCESS: u32 = 0;
/// Status: failed (`STATUS_UNSUCCESSFUL` of Windows).
pub const STATUS_UNSUCCESSFUL: u32 = 0xc000_0001;

/// Classes of devices (`HV_*_GUID`), and instances of those that a machine has once, as Hyper-V numbers them.
pub mod guid {
    use super::Guid;

    /// Class: SCSI controller.
    pub const SCSI: Guid = Guid::from_u128(0xba6163d9_04a1_4d29_b605_72e2ffb1dc7f);
    /// Class: IDE disk.
    pub const IDE: Guid = Guid::from_u128(0x32412632_86cb_44a2_9b5c_50d1417354f5);
    /// Class: network card.
    pub const NETWORK: Guid = Guid::from_u128(0xf8615163_df3e_46c5_913f_f2d2f965ed0e);
    /// Class: heartbeat.
    pub const HEARTBEAT: Guid = Guid::from_u128(0x57164f39_9115_4e78_ab55_382f3bd5422d);
    /// Instance: heartbeat.
    pub const HEARTBEAT_INSTANCE: Guid = Guid::from_u128(0xfd149e91_82e0_4a7d_afa6_2a4166cbd7c0);
    /// Class: key/value pairs.
    pub const KVP: Guid = Guid::from_u128(0xa9a0f4e7_5a45_4d96_b827_8a841e8c03e6);
    /// Instance: key/value pairs.
    pub const KVP_INSTANCE: Guid = Guid::from_u128(0x242ff919_07db_4180_9c2e_b86cb68c8c55);
    /// Class: shutdown.
    pub const SHUTDOWN: Guid = Guid::from_u128(0x0e0b6031_5213_4934_818b_38d90ced39db);
    /// Instance: shutdown.
    pub const SHUTDOWN_INSTANCE: Guid = Guid::from_u128(0xb6650ff7_33bc_4840_8048_e0676786f393);
    /// Class: time.
    pub const TIMESYNC: Guid = Guid::from_u128(0x9527e630_d0ae_497b_adce_e80ab0175caf);
    /// Instance: time.
    pub const TIMESYNC_INSTANCE: Guid = Guid::from_u128(0x2dd1ce17_079e_403c_b352_a1921ee207ee);
    /// Class: snapshots of file systems at rest.
    pub const VSS: Guid = Guid::from_u128(0x35fa2e29_ea23_4236_96ae_3a6ebacba440);
    /// Instance: snapshots of file systems at rest.
    pub const VSS_INSTANCE: Guid = Guid::from_u128(0x2450ee40_33bf_4fbd_892e_9fb06e9214cf);
}

/// A GUID as the wire has it: the first three fields little-endian (`guid_t`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// The GUID whose text has these digits.
    #[must_use]
    pub const fn from_u128(digits: u128) -> Guid {
        let [a, b, c, d, e, f, g, h, rest @ ..] = digits.to_be_bytes();
        let [i, j, k, l, m, n, o, p] = rest;
        Guid([d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p])
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f1, g, h, i, j, rest @ ..] = self.0;
        write!(f, "{d:02x}{c:02x}{b:02x}{a:02x}-{f1:02x}{e:02x}-{h:02x}{g:02x}-{i:02x}{j:02x}-")?;
        rest.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `struct vmbus_channel_message_header`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// [`message`].
    pub kind: U32,
    /// Zero.
    pub pad: U32,
}

impl Header {
    /// The header of a message of this kind.
    #[must_use]
    pub const fn new(kind: u32) -> Header {
        Header { kind: U32::new(kind), pad: U32::new(0) }
    }
}

const _: () = assert!(size_of::<Header>() == 8);

/// Bytes of [`Offer::user_defined`] and [`Open::user_data`] (`MAX_USER_DEFINED_BYTES`).
pub const USER_BYTES: usize = 120;

/// `struct vmbus_channel_offer_channel`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Offer {
    /// [`message::OFFER`].
    pub header: Header,
    /// Class of the device.
    pub class: Guid,
    /// Which device.
    pub instance: Guid,
    /// Zero.
    pub reserved: [U64; 2],
    /// [`offer_flags`].
    pub flags: U16,
    /// Megabytes of address space that the device wants.
    pub mmio_megabytes: U16,
    /// The device's own, or the mode of a pipe.
    pub user_defined: [u8; USER_BYTES],
    /// 0, or which subchannel.
    pub sub_channel_index: U16,
    /// Zero.
    pub reserved2: U16,
    /// Number of the channel in messages and event flags: 1 to [`MAX_CHANNELS`].
    pub relid: U32,
    /// Bit of the monitor page.
    pub monitor_id: u8,
    /// Bit 0: the guest signals by the monitor page.
    pub monitor_allocated: u8,
    /// Bit 0: the channel has an interrupt of its own, not one by the shared interrupt page.
    pub is_dedicated_interrupt: U16,
    /// Connection that the guest signals.
    pub connection_id: U32,
}

const _: () = assert!(size_of::<Offer>() == 196);

/// Messages that name a channel alone: [`message::RESCIND`], [`message::CLOSE`], [`message::RELID_RELEASED`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Relid {
    /// Which of the three.
    pub header: Header,
    /// Which channel.
    pub relid: U32,
}

const _: () = assert!(size_of::<Relid>() == 12);

/// `struct vmbus_channel_open_channel`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Open {
    /// [`message::OPEN`].
    pub header: Header,
    /// Which channel.
    pub relid: U32,
    /// Comes back in the result.
    pub open_id: U32,
    /// GPADL of both rings.
    pub ring_gpadl: U32,
    /// Processor that gets the channel's events.
    pub target_vp: U32,
    /// Page of the GPADL at which the ring to the guest begins.
    pub downstream_page_offset: U32,
    /// The device's own.
    pub user_data: [u8; USER_BYTES],
}

const _: () = assert!(size_of::<Open>() == 148);

/// `struct vmbus_channel_open_result`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OpenResult {
    /// [`message::OPEN_RESULT`].
    pub header: Header,
    /// Which channel.
    pub relid: U32,
    /// The request's.
    pub open_id: U32,
    /// [`STATUS_SUCCESS`] or not.
    pub status: U32,
}

const _: () = assert!(size_of::<OpenResult>() == 20);

/// `struct vmbus_channel_gpadl_header`; a `struct gpa_range` and the first page numbers (u64) follow, as many as fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpadlHeader {
    /// [`message::GPADL_HEADER`].
    pub header: Header,
    /// The channel that it is for.
    pub relid: U32,
    /// Number that the guest gives it.
    pub gpadl: U32,
    /// Bytes of all ranges with their page numbers, in this message and in those that follow.
    pub range_buflen: U16,
    /// How many ranges. Guests use one.
    pub range_count: U16,
    /// The range: how many bytes.
    pub byte_count: U32,
    /// The range: where in the first page it begins.
    pub byte_offset: U32,
}

const _: () = assert!(size_of::<GpadlHeader>() == 28);

/// Bytes of a range before its page numbers (`struct gpa_range`).
pub const GPA_RANGE: usize = 8;
/// Most page numbers in a [`GpadlHeader`]'s message.
pub const GPADL_HEADER_PFNS: usize = (MAX_MESSAGE - size_of::<GpadlHeader>()) / 8;
/// Most page numbers in a [`GpadlBody`]'s message.
pub const GPADL_BODY_PFNS: usize = (MAX_MESSAGE - size_of::<GpadlBody>()) / 8;

/// `struct vmbus_channel_gpadl_body`; page numbers (u64) follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpadlBody {
    /// [`message::GPADL_BODY`].
    pub header: Header,
    /// Linux leaves it zero.
    pub message_number: U32,
    /// The header's.
    pub gpadl: U32,
}

const _: () = assert!(size_of::<GpadlBody>() == 16);

/// `struct vmbus_channel_gpadl_created`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpadlCreated {
    /// [`message::GPADL_CREATED`].
    pub header: Header,
    /// The header's.
    pub relid: U32,
    /// The header's.
    pub gpadl: U32,
    /// [`STATUS_SUCCESS`] or not.
    pub status: U32,
}

const _: () = assert!(size_of::<GpadlCreated>() == 20);

/// `struct vmbus_channel_gpadl_teardown`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpadlTeardown {
    /// [`message::GPADL_TEARDOWN`].
    pub header: Header,
    /// The channel that it was for.
    pub relid: U32,
    /// Which.
    pub gpadl: U32,
}

const _: () = assert!(size_of::<GpadlTeardown>() == 16);

/// `struct vmbus_channel_gpadl_torndown`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpadlTorndown {
    /// [`message::GPADL_TORNDOWN`].
    pub header: Header,
    /// Which.
    pub gpadl: U32,
}

const _: () = assert!(size_of::<GpadlTorndown>() == 12);

/// `struct vmbus_channel_initiate_contact`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InitiateContact {
    /// [`message::INITIATE_CONTACT`].
    pub header: Header,
    /// [`version`].
    pub version: U32,
    /// Processor that gets the host's messages.
    pub target_vp: U32,
    /// Before 5.0: address of the interrupt page. Since: its first byte is the interrupt source of the host's messages.
    pub interrupt_page: U64,
    /// Address of the page by which the host could signal.
    pub monitor_to_guest: U64,
    /// Address of the page by which the guest could signal.
    pub monitor_to_host: U64,
}

const _: () = assert!(size_of::<InitiateContact>() == 40);

/// `struct vmbus_channel_version_response`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VersionResponse {
    /// [`message::VERSION_RESPONSE`].
    pub header: Header,
    /// 1: the version is spoken.
    pub supported: u8,
    /// 0: connected.
    pub connection_state: u8,
    /// Zero.
    pub padding: U16,
    /// Since 5.0: connection for all further messages. Before: of no meaning to guests.
    pub message_connection: U32,
}

const _: () = assert!(size_of::<VersionResponse>() == 16);

/// `struct vmbus_channel_modifychannel`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ModifyChannel {
    /// [`message::MODIFY_CHANNEL`].
    pub header: Header,
    /// Which channel.
    pub relid: U32,
    /// Processor that shall get its events.
    pub target_vp: U32,
}

const _: () = assert!(size_of::<ModifyChannel>() == 16);

/// `struct vmbus_channel_modifychannel_response`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ModifyChannelResponse {
    /// [`message::MODIFY_CHANNEL_RESPONSE`].
    pub header: Header,
    /// Which channel.
    pub relid: U32,
    /// [`STATUS_SUCCESS`] or not.
    pub status: U32,
}

const _: () = assert!(size_of::<ModifyChannelResponse>() == 16);

/// The page by which a guest signals channels with [`Offer::monitor_allocated`], without a hypercall (`struct hv_monitor_page`): groups of two words,
/// pending and armed, with a bit for each of 32 channels.
pub mod monitor {
    /// Bytes from the page's beginning to the first group.
    pub const TRIGGERS: u64 = 8;
    /// Bytes of a group.
    pub const GROUP_BYTES: u64 = 8;
    /// How many groups.
    pub const GROUPS: u32 = 4;
}

/// The interrupt page of versions before [`version::WIN8`] (`struct hv_event_flags_page` halves, Linux `drivers/hv/connection.c`): bit n of a half
/// is channel n.
pub mod interrupt_page {
    /// Bytes from the page's beginning to the bits that the host sets.
    pub const TO_GUEST: u64 = 0;
    /// Bytes to the bits that the guest sets.
    pub const TO_HOST: u64 = 2048;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guid_is_mixed_endian_on_the_wire_and_plain_in_text() {
        assert_eq!(guid::SCSI.0[..8], [0xd9, 0x63, 0x61, 0xba, 0xa1, 0x04, 0x29, 0x4d]);
        assert_eq!(guid::SCSI.to_string(), "ba6163d9-04a1-4d29-b605-72e2ffb1dc7f");
    }

    #[test]
    fn gpadl_messages_hold_as_many_pages_as_linux_puts_there() {
        assert_eq!((GPADL_HEADER_PFNS, GPADL_BODY_PFNS), (26, 28));
    }
}
