//! Rings of a VMBus channel, and the packets in them.
//!
//! A channel has two rings of bytes, to the host and to the guest, each a control page ([`control`]) and data pages. Indices are bytes into the
//! data; equal indices are an empty ring, so that it is never filled to the last byte. (Linux `include/linux/hyperv.h`,
//! `drivers/hv/ring_buffer.c`.)
//!
//! ```text
//!   Descriptor | what belongs to its kind | payload, padded to 8 | trailer (8, not in total_length8)
//! ```
//!
//! A reader with a zero interrupt mask is signalled when its ring stops being empty. A writer that found no room tells in the pending send size
//! how much it waits for, and is signalled when a reader has made more free than that.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of the control page before the data.
pub const CONTROL_BYTES: u64 = 4096;
/// Everything in a ring is a multiple of this.
pub const ALIGN: usize = 8;
/// Bytes after a packet: zero, and the index at which the packet began.
pub const TRAILER_BYTES: usize = 8;

/// Offsets of the words in a ring's control page (`struct hv_ring_buffer`).
pub mod control {
    /// Where the writer goes on.
    pub const WRITE_INDEX: u64 = 0;
    /// Where the reader goes on.
    pub const READ_INDEX: u64 = 4;
    /// The reader's: not zero when it does not want to be signalled.
    pub const INTERRUPT_MASK: u64 = 8;
    /// The writer's: free bytes that it waits for, or zero.
    pub const PENDING_SEND_SIZE: u64 = 12;
    /// [`FEATURE_PENDING_SEND_SIZE`].
    pub const FEATURE_BITS: u64 = 64;
    /// The reader heeds the pending send size.
    pub const FEATURE_PENDING_SEND_SIZE: u32 = 1;
}

/// Values of [`Descriptor::kind`] (`enum vmbus_packet_type`).
pub mod kind {
    /// The payload alone.
    pub const IN_BAND: u16 = 6;
    /// [`TransferPages`](super::TransferPages): the data is in a buffer that the guest gave beforehand.
    pub const TRANSFER_PAGES: u16 = 7;
    /// [`GpaDirect`](super::GpaDirect): the data is in pages that the packet names.
    pub const GPA_DIRECT: u16 = 9;
    /// Answers the packet with the same transaction.
    pub const COMPLETION: u16 = 11;
}

/// Bit of [`Descriptor::flags`]: the other side answers with [`kind::COMPLETION`] (`VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED`).
pub const COMPLETION_REQUESTED: u16 = 1;

/// `struct vmpacket_descriptor`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Descriptor {
    /// [`kind`].
    pub kind: U16,
    /// Eighths of the bytes before the payload.
    pub data_offset8: U16,
    /// Eighths of all bytes without the trailer.
    pub total_length8: U16,
    /// [`COMPLETION_REQUESTED`].
    pub flags: U16,
    /// The sender's number for it.
    pub transaction: U64,
}

const _: () = assert!(size_of::<Descriptor>() == 16);

/// Follows the descriptor in [`kind::GPA_DIRECT`] (`struct vmbus_channel_packet_page_buffer`); then `range_count` times a [`GpaRange`] and the
/// numbers of its pages (u64).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpaDirect {
    /// Zero.
    pub reserved: U32,
    /// How many ranges.
    pub range_count: U32,
}

const _: () = assert!(size_of::<GpaDirect>() == 8);

/// Bytes in pages that need not lie together (`struct gpa_range`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpaRange {
    /// How many bytes.
    pub byte_count: U32,
    /// Where in the first page they begin.
    pub byte_offset: U32,
}

const _: () = assert!(size_of::<GpaRange>() == 8);

/// Follows the descriptor in [`kind::TRANSFER_PAGES`] (`struct vmtransfer_page_packet_header`); then `range_count` times a [`TransferRange`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TransferPages {
    /// Which buffer.
    pub set_id: U16,
    /// Not zero when the sender owns it.
    pub sender_owns_set: u8,
    /// Zero.
    pub reserved: u8,
    /// How many ranges.
    pub range_count: U32,
}

const _: () = assert!(size_of::<TransferPages>() == 8);

/// `struct vmtransfer_page_range`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TransferRange {
    /// How many bytes.
    pub byte_count: U32,
    /// Where in the buffer they begin.
    pub byte_offset: U32,
}

const _: () = assert!(size_of::<TransferRange>() == 8);
