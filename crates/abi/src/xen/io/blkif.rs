//! Block devices: `io/blkif.h`, in the layout of the x86-64 ABI.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Unit of positions and lengths, in bytes.
pub const SECTOR: u64 = 512;
/// Segments of a direct request (`BLKIF_MAX_SEGMENTS_PER_REQUEST`).
pub const SEGMENTS: usize = 11;
/// Pages of an indirect request (`BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST`).
pub const INDIRECT_PAGES: usize = 8;
/// Segments in such a page.
pub const SEGMENTS_PER_INDIRECT_PAGE: usize = 512;
/// Bytes of a request's slot.
pub const SLOT: usize = 112;

/// Operations (`BLKIF_OP_*`).
pub mod op {
    /// Disk to memory.
    pub const READ: u8 = 0;
    /// Memory to disk.
    pub const WRITE: u8 = 1;
    /// Makes what was written durable.
    pub const FLUSH: u8 = 3;
    /// Gives sectors back.
    pub const DISCARD: u8 = 5;
    /// The segments are in pages of their own.
    pub const INDIRECT: u8 = 6;
}

/// Values of [`Response::status`] (`BLKIF_RSP_*`).
pub mod status {
    /// Done.
    pub const OKAY: i16 = 0;
    /// Failed.
    pub const ERROR: i16 = -1;
    /// No such operation.
    pub const UNSUPPORTED: i16 = -2;
}

/// Bits of the backend's key `info` (`VDISK_*`).
pub mod info {
    /// Writes are refused.
    pub const READ_ONLY: u32 = 4;
}

/// `struct blkif_request_segment`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Segment {
    /// The page.
    pub gref: U32,
    /// First sector of it.
    pub first_sect: u8,
    /// Last sector of it.
    pub last_sect: u8,
    /// Zero.
    pub pad: U16,
}

const _: () = assert!(size_of::<Segment>() == 8);

/// `struct blkif_request`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Request {
    /// [`op::READ`], [`op::WRITE`] or [`op::FLUSH`].
    pub operation: u8,
    /// How many segments.
    pub nr_segments: u8,
    /// Virtual device, of no meaning here.
    pub handle: U16,
    /// Zero.
    pub pad: U32,
    /// The frontend's own.
    pub id: U64,
    /// Where on the disk.
    pub sector_number: U64,
    /// Which memory.
    pub segments: [Segment; SEGMENTS],
}

const _: () = assert!(size_of::<Request>() == SLOT);

/// `struct blkif_request_discard`, the beginning of a slot.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Discard {
    /// [`op::DISCARD`].
    pub operation: u8,
    /// Bit 0: so that nobody can read it again.
    pub flag: u8,
    /// Virtual device.
    pub handle: U16,
    /// Zero.
    pub pad: U32,
    /// The frontend's own.
    pub id: U64,
    /// Where on the disk.
    pub sector_number: U64,
    /// How much.
    pub nr_sectors: U64,
}

const _: () = assert!(size_of::<Discard>() == 32);

/// `struct blkif_request_indirect`, the beginning of a slot.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Indirect {
    /// [`op::INDIRECT`].
    pub operation: u8,
    /// [`op::READ`] or [`op::WRITE`].
    pub indirect_op: u8,
    /// How many segments.
    pub nr_segments: U16,
    /// Zero.
    pub pad: U32,
    /// The frontend's own.
    pub id: U64,
    /// Where on the disk.
    pub sector_number: U64,
    /// Virtual device.
    pub handle: U16,
    /// Zero.
    pub pad2: U16,
    /// Pages with segments.
    pub indirect_grefs: [U32; INDIRECT_PAGES],
}

const _: () = assert!(core::mem::offset_of!(Indirect, indirect_grefs) == 28);

/// `struct blkif_response`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Response {
    /// The request's.
    pub id: U64,
    /// The request's.
    pub operation: u8,
    /// Zero.
    pub pad: u8,
    /// [`status`].
    pub status: U16,
    /// Zero.
    pub pad2: U32,
}

const _: () = assert!(size_of::<Response>() == 16);
