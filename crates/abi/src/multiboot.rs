//! Words of multiboot 1: what a kernel's header says and what the boot loader answers.
//!
//! Source: the Multiboot Specification version 0.6.96, sections 3.1 (header), 3.2 (machine state) and 3.3 (information).

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// First word of the header.
pub const HEADER_MAGIC: u32 = 0x1bad_b002;
/// The header lies wholly within this many bytes of the file, 4-byte aligned.
pub const HEADER_SEARCH: usize = 8192;
/// What EAX holds at entry.
pub const ENTRY_MAGIC: u32 = 0x2bad_b002;

/// Header flag: modules are aligned to pages.
pub const HEADER_PAGE_ALIGN: u32 = 1 << 0;
/// Header flag: the kernel wants memory information.
pub const HEADER_MEMORY_INFO: u32 = 1 << 1;
/// Header flag: the kernel wants a video mode.
pub const HEADER_VIDEO_MODE: u32 = 1 << 2;
/// Header flags a loader must understand or else refuse the kernel.
pub const HEADER_REQUIRED: u32 = 0xffff;
/// Header flag: the address fields are valid (the "a.out kludge").
pub const HEADER_ADDRESSES: u32 = 1 << 16;

/// The header, as far as [`HEADER_ADDRESSES`] extends it.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// [`HEADER_MAGIC`].
    pub magic: U32,
    /// `HEADER_` flags.
    pub flags: U32,
    /// Makes the sum of the first three words zero.
    pub checksum: U32,
    /// Physical address of the header itself.
    pub header_addr: U32,
    /// Physical address of the loaded part's begin.
    pub load_addr: U32,
    /// Physical address of the loaded part's end; 0 for the end of the file.
    pub load_end_addr: U32,
    /// Physical address of the end of what is to be zeroed; 0 for nothing.
    pub bss_end_addr: U32,
    /// Physical address of the entry.
    pub entry_addr: U32,
}

const _: () = assert!(size_of::<Header>() == 32);

/// Size of the header without the address fields.
pub const HEADER_SIZE_SHORT: usize = 12;

/// Information flag: `mem_lower` and `mem_upper`.
pub const INFO_MEMORY: u32 = 1 << 0;
/// Information flag: `cmdline`.
pub const INFO_CMDLINE: u32 = 1 << 2;
/// Information flag: modules.
pub const INFO_MODULES: u32 = 1 << 3;
/// Information flag: the memory map.
pub const INFO_MEMORY_MAP: u32 = 1 << 6;
/// Information flag: `boot_loader_name`.
pub const INFO_LOADER_NAME: u32 = 1 << 9;

/// The information structure, up to the fields given here; the video fields after them are not valid.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Info {
    /// `INFO_` flags.
    pub flags: U32,
    /// KiB of memory from 0.
    pub mem_lower: U32,
    /// KiB of memory from 1 MiB to the first hole.
    pub mem_upper: U32,
    /// BIOS disk.
    pub boot_device: U32,
    /// Address of the command line.
    pub cmdline: U32,
    /// Number of modules.
    pub mods_count: U32,
    /// Address of the [`Module`] array.
    pub mods_addr: U32,
    /// Symbol table of the kernel.
    pub syms: [U32; 4],
    /// Size of the memory map in bytes.
    pub mmap_length: U32,
    /// Address of the memory map, an array of [`MemoryMapEntry`].
    pub mmap_addr: U32,
    /// BIOS drives.
    pub drives_length: U32,
    /// BIOS drives.
    pub drives_addr: U32,
    /// ROM configuration table.
    pub config_table: U32,
    /// Address of the loader's name.
    pub boot_loader_name: U32,
    /// APM table.
    pub apm_table: U32,
}

const _: () = assert!(size_of::<Info>() == 72);

/// One module.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Module {
    /// First address.
    pub mod_start: U32,
    /// Address after the last.
    pub mod_end: U32,
    /// Address of the module's string.
    pub string: U32,
    /// Zero.
    pub reserved: U32,
}

/// One range of the memory map; the types are those of E820h.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
pub struct MemoryMapEntry {
    /// Size of what follows this field: 20.
    pub size: U32,
    /// First address.
    pub base: U64,
    /// Bytes.
    pub length: U64,
    /// Type.
    pub kind: U32,
}

const _: () = assert!(size_of::<MemoryMapEntry>() == 24);
