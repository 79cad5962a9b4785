//! Key/value pairs: messages, and the pool files of Linux' daemon.
//!
//! In messages the fields hold UTF-16 and a terminating zero, in the files UTF-8 padded with zeros. A message is a [`Header`] and what belongs to
//! its operation. Where a guest puts its verdict: Linux in the status of the [`ic::Message`](super::ic::Message), OpenBSD over the
//! [`Header`]. (Linux `include/uapi/linux/hyperv.h`, `tools/hv/hv_kvp_daemon.c`, `drivers/hv/hv_kvp.c`; OpenBSD `sys/dev/pv/hypervic.c`.)

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a key (`HV_KVP_EXCHANGE_MAX_KEY_SIZE`).
pub const KEY_SIZE: usize = 512;
/// Bytes of a value (`HV_KVP_EXCHANGE_MAX_VALUE_SIZE`).
pub const VALUE_SIZE: usize = 2048;
/// Bytes of a record in a pool file (`struct kvp_record`): key, value.
pub const RECORD_SIZE: usize = KEY_SIZE + VALUE_SIZE;

/// Values of [`Header::operation`] (`enum hv_kvp_exchg_op`).
pub mod operation {
    /// The value of a key. Linux' answer lacks the beginning of it.
    pub const GET: u8 = 0;
    /// Set a key: [`Record`](super::Record).
    pub const SET: u8 = 1;
    /// Remove a key: [`Key`](super::Key).
    pub const DELETE: u8 = 2;
    /// The key with a number: [`Enumerate`](super::Enumerate).
    pub const ENUMERATE: u8 = 3;
    /// A network card's addresses: [`Addresses`](super::Addresses).
    pub const GET_IP_INFO: u8 = 4;
    /// Set a network card's addresses: [`Addresses`](super::Addresses).
    pub const SET_IP_INFO: u8 = 5;
}

/// Values of [`Header::pool`] (`enum hv_kvp_exchg_pool`).
pub mod pool {
    /// The host's keys for the guest.
    pub const EXTERNAL: u8 = 0;
    /// The guest's keys for the host.
    pub const GUEST: u8 = 1;
    /// What the guest's daemon tells about it.
    pub const AUTO: u8 = 2;
    /// What the host tells about itself; `Guest/Parameters` in OpenBSD's and Windows' words.
    pub const AUTO_EXTERNAL: u8 = 3;
    /// Windows' own.
    pub const AUTO_INTERNAL: u8 = 4;
}

/// `struct hv_kvp_hdr`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// [`operation`].
    pub operation: u8,
    /// [`pool`].
    pub pool: u8,
    /// Zero.
    pub pad: [u8; 2],
}

/// [`Record::value_type`]: text (`REG_SZ`).
pub const TEXT: u32 = 1;
/// [`Record::value_type`]: four bytes (`REG_U32`).
pub const NUMBER: u32 = 4;
/// [`Record::value_type`]: eight bytes (`REG_U64` of Linux and OpenBSD).
pub const LONG_NUMBER: u32 = 8;
/// [`Record::value_type`]: eight bytes, as Windows counts (`REG_QWORD`).
pub const QWORD: u32 = 11;

/// `struct hv_kvp_exchg_msg_value`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Record {
    /// [`TEXT`] or [`NUMBER`].
    pub value_type: U32,
    /// Bytes of the key, with its terminating zero.
    pub key_size: U32,
    /// Bytes of the value; of text, with its terminating zero.
    pub value_size: U32,
    /// The key.
    pub key: [u8; KEY_SIZE],
    /// The value.
    pub value: [u8; VALUE_SIZE],
}

const _: () = assert!(size_of::<Record>() == 2572);

/// `struct hv_kvp_msg_enumerate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Enumerate {
    /// From 0.
    pub index: U32,
    /// The guest's answer.
    pub record: Record,
}

/// `struct hv_kvp_msg_delete`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Key {
    /// Bytes of the key, with its terminating zero.
    pub key_size: U32,
    /// The key.
    pub key: [u8; KEY_SIZE],
}

/// Bytes of every message's body: the guest answers in place, so that its largest form has to fit (`struct hv_kvp_msg`: with
/// `struct hv_kvp_ipaddr_value`, 128 + 1024 * 3 + 512 letters and two bytes).
pub const BODY_BYTES: usize = size_of::<Header>() + 2 * (128 + 3 * 1024 + 512) + 2;

/// Letters of [`Addresses::adapter`] (`MAX_ADAPTER_ID_SIZE`).
pub const ADAPTER_LETTERS: usize = 128;
/// Letters of lists of addresses (`MAX_IP_ADDR_SIZE`).
pub const ADDRESS_LETTERS: usize = 1024;
/// Letters of a list of gateways (`MAX_GATEWAY_SIZE`).
pub const GATEWAY_LETTERS: usize = 512;

/// `struct hv_kvp_ip_msg`: a whole message about a network card. Texts are UTF-16 with a terminating zero, lists divided by semicolons.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Addresses {
    /// [`operation::GET_IP_INFO`] or [`operation::SET_IP_INFO`].
    pub operation: u8,
    /// No meaning.
    pub pool: u8,
    /// MAC address of the card, as the host writes it.
    pub adapter: [U16; ADAPTER_LETTERS],
    /// [`family`].
    pub family: u8,
    /// Not zero when the addresses are from a DHCP server.
    pub is_dhcp: u8,
    /// Addresses.
    pub addresses: [U16; ADDRESS_LETTERS],
    /// Their networks' masks: IPv4's with dots, IPv6's as lengths behind slashes.
    pub masks: [U16; ADDRESS_LETTERS],
    /// Gateways.
    pub gateways: [U16; GATEWAY_LETTERS],
    /// Name servers.
    pub name_servers: [U16; ADDRESS_LETTERS],
}

const _: () = assert!(size_of::<Addresses>() + 2 == BODY_BYTES);

/// Bits of [`Addresses::family`] (`ADDR_FAMILY_*`).
pub mod family {
    /// IPv4.
    pub const IPV4: u8 = 1;
    /// IPv6.
    pub const IPV6: u8 = 2;
}
