//! Grant tables, version 1: `grant_table.h`.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `struct grant_entry_v1`: a page that another domain may use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Entry {
    /// [`flag`].
    pub flags: U16,
    /// Who may use it.
    pub domid: U16,
    /// Page number in the granting domain.
    pub frame: U32,
}

const _: () = assert!(size_of::<Entry>() == 8);

/// Entries in a frame of the table.
pub const ENTRIES_PER_FRAME: u32 = 512;
/// References below are for the toolstack (`GNTTAB_NR_RESERVED_ENTRIES`).
pub const RESERVED: u32 = 8;

/// Bits of [`Entry::flags`] (`GTF_*`).
pub mod flag {
    /// Bits of the entry's type.
    pub const TYPE_MASK: u16 = 3;
    /// Type: the page may be mapped.
    pub const PERMIT_ACCESS: u16 = 1;
    /// Not for writing.
    pub const READONLY: u16 = 1 << 2;
    /// In use for reading; set by the user of the page.
    pub const READING: u16 = 1 << 3;
    /// In use for writing; set by the user of the page.
    pub const WRITING: u16 = 1 << 4;
}

/// Operations of `HYPERVISOR_grant_table_op` for domains that only grant.
pub mod op {
    /// [`QuerySize`](super::QuerySize).
    pub const QUERY_SIZE: u64 = 6;
    /// [`SetVersion`](super::SetVersion).
    pub const SET_VERSION: u64 = 8;
    /// [`GetVersion`](super::GetVersion).
    pub const GET_VERSION: u64 = 10;
}

/// Values of status fields (`GNTST_*`).
pub mod status {
    /// Done.
    pub const OKAY: i16 = 0;
    /// No such domain.
    pub const BAD_DOMAIN: i16 = -2;
}

/// `struct gnttab_query_size`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct QuerySize {
    /// Whose table.
    pub dom: U16,
    /// Zero.
    pub pad: U16,
    /// Answer: frames in use.
    pub nr_frames: U32,
    /// Answer: frames there can be.
    pub max_nr_frames: U32,
    /// Answer: [`status`].
    pub status: U16,
    /// Zero.
    pub pad1: U16,
}

const _: () = assert!(size_of::<QuerySize>() == 16);

/// `struct gnttab_set_version`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetVersion {
    /// Wanted; the answer is what it is now.
    pub version: U32,
}

/// `struct gnttab_get_version`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GetVersion {
    /// Whose table.
    pub dom: U16,
    /// Zero.
    pub pad: U16,
    /// Answer.
    pub version: U32,
}
