//! Words of the boot protocols: Linux, PVH, OpenBSD, and the memory map that all of them hand over.
//!
//! Sources: Linux `Documentation/arch/x86/boot.rst` and `zero-page.rst` (protocol 2.15), Xen
//! `xen/include/public/arch-x86/hvm/start_info.h` and `docs/misc/pvh.pandoc`, OpenBSD `sys/arch/amd64/include/biosvar.h` 1.28,
//! `sys/sys/reboot.h` and `usr.sbin/vmd/loadfile.h`. Multiboot has a file of its own, [`crate::multiboot`].

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Type of an address range as the BIOS call E820h reports it (ACPI 6.5 table 15.4): RAM.
pub const E820_RAM: u32 = 1;
/// E820h: reserved.
pub const E820_RESERVED: u32 = 2;
/// E820h: ACPI tables, RAM once they are read.
pub const E820_ACPI: u32 = 3;
/// E820h: memory to be kept over sleep.
pub const E820_NVS: u32 = 4;

/// An address range as E820h, Linux' zero page (`struct boot_e820_entry`) and OpenBSD (`bios_memmap_t`) write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
pub struct E820Entry {
    /// First address.
    pub address: U64,
    /// Size in bytes.
    pub size: U64,
    /// One of the `E820_` types.
    pub kind: U32,
}

const _: () = assert!(size_of::<E820Entry>() == 20);

/// Linux/x86 boot protocol: offsets in the file's first sectors, which are offsets in the zero page too.
pub mod linux {
    /// Zero page: address of the ACPI RSDP (u64), protocol 2.14.
    pub const ACPI_RSDP_ADDR: usize = 0x070;
    /// Zero page: number of E820 entries (u8).
    pub const E820_ENTRIES: usize = 0x1e8;
    /// Zero page: the E820 table.
    pub const E820_TABLE: usize = 0x2d0;
    /// Most E820 entries that the table holds (`E820_MAX_ENTRIES_ZEROPAGE`).
    pub const E820_MAX: usize = 128;
    /// Size of the zero page.
    pub const ZERO_PAGE_SIZE: usize = 4096;

    /// Number of 512-byte real-mode sectors after the first (u8); 0 means 4.
    pub const SETUP_SECTS: usize = 0x1f1;
    /// Size of the protected-mode part in 16-byte units (u32).
    pub const SYSSIZE: usize = 0x1f4;
    /// 0xAA55 (u16).
    pub const BOOT_FLAG: usize = 0x1fe;
    /// Value of [`BOOT_FLAG`].
    pub const BOOT_FLAG_MAGIC: u16 = 0xaa55;
    /// Second byte of the jump: the header ends at 0x202 plus this (u8).
    pub const JUMP_OFFSET: usize = 0x201;
    /// "HdrS".
    pub const HEADER: usize = 0x202;
    /// Value of [`HEADER`].
    pub const HEADER_MAGIC: &[u8; 4] = b"HdrS";
    /// Protocol version, major in the high byte (u16).
    pub const VERSION: usize = 0x206;
    /// Which boot loader this is (u8).
    pub const TYPE_OF_LOADER: usize = 0x210;
    /// A loader without a number of its own.
    pub const LOADER_UNDEFINED: u8 = 0xff;
    /// Flags (u8).
    pub const LOADFLAGS: usize = 0x211;
    /// [`LOADFLAGS`]: the protected-mode part is loaded at 1 MiB (bzImage).
    pub const LOADED_HIGH: u8 = 1;
    /// Address of the 32-bit entry (u32).
    pub const CODE32_START: usize = 0x214;
    /// Initial ramdisk's address (u32).
    pub const RAMDISK_IMAGE: usize = 0x218;
    /// Initial ramdisk's size (u32).
    pub const RAMDISK_SIZE: usize = 0x21c;
    /// Command line's address (u32), protocol 2.02.
    pub const CMD_LINE_PTR: usize = 0x228;
    /// Highest address of the initial ramdisk's last byte (u32), protocol 2.03.
    pub const INITRD_ADDR_MAX: usize = 0x22c;
    /// Alignment of a relocatable kernel (u32), protocol 2.05.
    pub const KERNEL_ALIGNMENT: usize = 0x230;
    /// Whether the kernel is relocatable (u8), protocol 2.05.
    pub const RELOCATABLE_KERNEL: usize = 0x234;
    /// More flags (u16), protocol 2.12.
    pub const XLOADFLAGS: usize = 0x236;
    /// [`XLOADFLAGS`]: there is a 64-bit entry at 0x200 of the protected-mode part.
    pub const XLF_KERNEL_64: u16 = 1;
    /// Longest command line without its terminator (u32), protocol 2.06.
    pub const CMDLINE_SIZE: usize = 0x238;
    /// Where the kernel prefers to be loaded (u64), protocol 2.10.
    pub const PREF_ADDRESS: usize = 0x258;
    /// Memory the kernel needs from its load address on (u32), protocol 2.10.
    pub const INIT_SIZE: usize = 0x260;
    /// End of the newest header's fields that are read here.
    pub const HEADER_END: usize = 0x264;

    /// Offset of the 64-bit entry in the protected-mode part.
    pub const ENTRY_64: u64 = 0x200;
    /// Selector of the code segment at entry (`__BOOT_CS`).
    pub const BOOT_CS: u16 = 0x10;
    /// Selector of the data segments at entry (`__BOOT_DS`).
    pub const BOOT_DS: u16 = 0x18;
    /// [`INITRD_ADDR_MAX`] of protocols before 2.03.
    pub const INITRD_ADDR_MAX_OLD: u32 = 0x37ff_ffff;
    /// [`CMDLINE_SIZE`] of protocols before 2.06.
    pub const CMDLINE_SIZE_OLD: u32 = 255;
}

/// PVH: direct boot of a 32-bit entry with `struct hvm_start_info`.
pub mod pvh {
    use super::{FromBytes, Immutable, IntoBytes, KnownLayout, U32, U64};

    /// Name of the ELF note.
    pub const NOTE_NAME: &[u8] = b"Xen";
    /// Type of the ELF note that holds the entry's physical address (`XEN_ELFNOTE_PHYS32_ENTRY`).
    pub const NOTE_PHYS32_ENTRY: u32 = 18;
    /// "xEn3" with the 0x80 bit of the "E" set (`XEN_HVM_START_MAGIC_VALUE`).
    pub const START_MAGIC: u32 = 0x336e_c578;
    /// Version that has the memory map.
    pub const START_VERSION: u32 = 1;

    /// `struct hvm_start_info`.
    #[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
    #[repr(C)]
    pub struct StartInfo {
        /// [`START_MAGIC`].
        pub magic: U32,
        /// [`START_VERSION`].
        pub version: U32,
        /// SIF_ flags; 0 outside the control domain.
        pub flags: U32,
        /// Number of [`Module`] entries.
        pub nr_modules: U32,
        /// Physical address of the [`Module`] array.
        pub modlist_paddr: U64,
        /// Physical address of the command line, zero terminated.
        pub cmdline_paddr: U64,
        /// Physical address of the ACPI RSDP.
        pub rsdp_paddr: U64,
        /// Physical address of the [`MemmapEntry`] array.
        pub memmap_paddr: U64,
        /// Number of [`MemmapEntry`] entries.
        pub memmap_entries: U32,
        /// Zero.
        pub reserved: U32,
    }

    /// `struct hvm_modlist_entry`.
    #[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
    #[repr(C)]
    pub struct Module {
        /// Physical address.
        pub paddr: U64,
        /// Size in bytes.
        pub size: U64,
        /// Physical address of the module's command line.
        pub cmdline_paddr: U64,
        /// Zero.
        pub reserved: U64,
    }

    /// `struct hvm_memmap_table_entry`; the types are E820h's.
    #[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
    #[repr(C)]
    pub struct MemmapEntry {
        /// First address.
        pub addr: U64,
        /// Size in bytes.
        pub size: U64,
        /// E820 type.
        pub kind: U32,
        /// Zero.
        pub reserved: U32,
    }

    const _: () = assert!(size_of::<StartInfo>() == 56);
    const _: () = assert!(size_of::<Module>() == 32);
    const _: () = assert!(size_of::<MemmapEntry>() == 24);
}

/// OpenBSD: what boot(8), and vmd(8) in its place, hands to the kernel.
pub mod openbsd {
    use super::{FromBytes, Immutable, IntoBytes, KnownLayout, U32, U64};

    /// Name of the ELF notes.
    pub const NOTE_NAME: &[u8] = b"OpenBSD";
    /// Program header of the bytes that the loader fills at random.
    pub const PT_OPENBSD_RANDOMIZE: u32 = 0x65a3_dbe6;
    /// Entry and `end` addresses are masked with this to become physical (`LOADADDR` of amd64's loadfile_machdep.h).
    pub const ADDRESS_MASK: u64 = 0x0fff_ffff;

    /// Physical address of the boot arguments (`BOOTARGS_PAGE`).
    pub const BOOTARGS_PAGE: u64 = 0x2000;
    /// Physical address of the page whose end is the first stack (`STACK_PAGE`).
    pub const STACK_PAGE: u64 = 0xf000;
    /// Physical address of the GDT (`GDT_PAGE`).
    pub const GDT_PAGE: u64 = 0x1_0000;

    /// Version of the boot arguments that vmd(8) states (`BOOTARG_APIVER`).
    pub const BOOTARG_APIVER: u32 = 0x0e;
    /// Boot argument: array of [`super::E820Entry`], ended by an entry of zeros.
    pub const BOOTARG_MEMMAP: u32 = 0;
    /// Boot argument: [`ConsoleDevice`].
    pub const BOOTARG_CONSDEV: u32 = 5;
    /// Ends the boot arguments.
    pub const BOOTARG_END: u32 = 0xffff_ffff;

    /// `bios_consdev_t`.
    #[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
    #[repr(C, packed)]
    pub struct ConsoleDevice {
        /// Device number.
        pub device: U32,
        /// Baud rate.
        pub speed: U32,
        /// Port.
        pub address: U64,
        /// Clock in Hz; 0 is the usual one.
        pub frequency: U32,
        /// 1: memory mapped.
        pub flags: U32,
        /// Register width in bytes; 0 is the usual one.
        pub register_width: U32,
        /// Register spacing as a shift.
        pub register_shift: U32,
    }

    const _: () = assert!(size_of::<ConsoleDevice>() == 32);

    /// `makedev(8, 0)`: com0.
    pub const DEVICE_COM0: u32 = 8 << 8;
    /// `MAKEBOOTDEV(4, 0, 0, 0, 0)`: sd0a (`B_DEVMAGIC` 0xa0000000, type 4).
    pub const BOOTDEV_SD0A: u32 = 0xa000_0004;

    /// boothowto: ask for the root device (`-a`).
    pub const RB_ASKNAME: u32 = 0x0001;
    /// boothowto: single user (`-s`).
    pub const RB_SINGLE: u32 = 0x0002;
    /// boothowto: enter the debugger (`-d`).
    pub const RB_KDB: u32 = 0x0040;
    /// boothowto: change configuration (`-c`).
    pub const RB_CONFIG: u32 = 0x0400;
}
