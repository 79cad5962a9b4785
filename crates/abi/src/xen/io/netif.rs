//! Network devices: `io/netif.h`. Two rings of one page each: what the frontend transmits, and buffers in which it receives.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a transmit slot.
pub const TX_SLOT: usize = 12;
/// Bytes of a receive slot.
pub const RX_SLOT: usize = 8;
/// Slots that one packet may have.
pub const MAX_SLOTS: usize = 18;

/// Bits of the flags of a [`TxRequest`] (`NETTXF_*`).
pub mod tx_flag {
    /// The checksum field holds the sum of the pseudo header only.
    pub const CSUM_BLANK: u16 = 1;
    /// The checksum was looked at, or needs not to be.
    pub const DATA_VALIDATED: u16 = 2;
    /// More slots of the packet follow.
    pub const MORE_DATA: u16 = 4;
    /// An [`Extra`](super::Extra) follows.
    pub const EXTRA_INFO: u16 = 8;
}

/// Bits of the flags of a [`RxResponse`] (`NETRXF_*`).
pub mod rx_flag {
    /// The checksum was looked at, or needs not to be.
    pub const DATA_VALIDATED: u16 = 1;
    /// The checksum field holds the sum of the pseudo header only.
    pub const CSUM_BLANK: u16 = 2;
    /// More slots of the packet follow.
    pub const MORE_DATA: u16 = 4;
    /// An [`Extra`](super::Extra) follows.
    pub const EXTRA_INFO: u16 = 8;
}

/// Values of [`Extra::kind`].
pub mod extra {
    /// Large packet to be cut up (`XEN_NETIF_EXTRA_TYPE_GSO`).
    pub const GSO: u8 = 1;
    /// [`Extra::flags`](super::Extra::flags): another one follows.
    pub const MORE: u8 = 1;
    /// TCP over IPv4.
    pub const GSO_TCPV4: u8 = 1;
    /// TCP over IPv6.
    pub const GSO_TCPV6: u8 = 2;
}

/// Values of response status (`NETIF_RSP_*`).
pub mod status {
    /// Not sent.
    pub const DROPPED: i16 = -2;
    /// Malformed.
    pub const ERROR: i16 = -1;
    /// Done.
    pub const OKAY: i16 = 0;
    /// For slots of [`Extra`](super::Extra).
    pub const NULL: i16 = 1;
}

/// `struct netif_tx_request`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TxRequest {
    /// The page.
    pub gref: U32,
    /// Where in the page.
    pub offset: U16,
    /// [`tx_flag`].
    pub flags: U16,
    /// The frontend's own.
    pub id: U16,
    /// Of a packet's first slot: bytes of the packet; of others: bytes in this slot.
    pub size: U16,
}

const _: () = assert!(size_of::<TxRequest>() == TX_SLOT);

/// `struct netif_extra_info`, in a slot of either ring.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Extra {
    /// [`extra`].
    pub kind: u8,
    /// [`extra::MORE`].
    pub flags: u8,
    /// Bytes of payload in each piece.
    pub gso_size: U16,
    /// Which protocol.
    pub gso_type: u8,
    /// Zero.
    pub pad: u8,
    /// Zero.
    pub features: U16,
}

const _: () = assert!(size_of::<Extra>() == RX_SLOT);

/// `struct netif_tx_response`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TxResponse {
    /// The request's.
    pub id: U16,
    /// [`status`].
    pub status: U16,
}

/// `struct netif_rx_request`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RxRequest {
    /// The frontend's own.
    pub id: U16,
    /// Zero.
    pub pad: U16,
    /// The page.
    pub gref: U32,
}

/// `struct netif_rx_response`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RxResponse {
    /// The request's.
    pub id: U16,
    /// Where in the page.
    pub offset: U16,
    /// [`rx_flag`].
    pub flags: U16,
    /// Bytes, or a negative [`status`].
    pub status: U16,
}
