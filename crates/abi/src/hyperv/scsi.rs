//! SCSI: commands, sense data and what devices tell of themselves, as far as a disk and a DVD drive need them.
//!
//! Sources: SPC-4 (primary commands), SBC-3 (block commands) and MMC-6 (multimedia commands) of T10. Numbers are big-endian.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Most bytes of a command here.
pub const CDB_SIZE: usize = 16;

/// First byte of a command (SPC-4 annex D.3).
pub mod opcode {
    /// Is the device ready.
    pub const TEST_UNIT_READY: u8 = 0x00;
    /// Tell the sense data.
    pub const REQUEST_SENSE: u8 = 0x03;
    /// Read, with 21 bits of address.
    pub const READ_6: u8 = 0x08;
    /// Write, with 21 bits of address.
    pub const WRITE_6: u8 = 0x0a;
    /// Who are you.
    pub const INQUIRY: u8 = 0x12;
    /// Tell parameters.
    pub const MODE_SENSE_6: u8 = 0x1a;
    /// Start, stop, load or eject.
    pub const START_STOP_UNIT: u8 = 0x1b;
    /// Lock the medium in the drive.
    pub const PREVENT_ALLOW_MEDIUM_REMOVAL: u8 = 0x1e;
    /// How large, in 32 bits.
    pub const READ_CAPACITY_10: u8 = 0x25;
    /// Read, with 32 bits of address.
    pub const READ_10: u8 = 0x28;
    /// Write, with 32 bits of address.
    pub const WRITE_10: u8 = 0x2a;
    /// Can this be read.
    pub const VERIFY_10: u8 = 0x2f;
    /// Make writes durable.
    pub const SYNCHRONIZE_CACHE_10: u8 = 0x35;
    /// Give blocks back.
    pub const UNMAP: u8 = 0x42;
    /// Tell the table of contents (MMC).
    pub const READ_TOC: u8 = 0x43;
    /// Tell profile and features (MMC).
    pub const GET_CONFIGURATION: u8 = 0x46;
    /// Tell what has happened (MMC).
    pub const GET_EVENT_STATUS: u8 = 0x4a;
    /// Tell parameters, with 16 bits of length.
    pub const MODE_SENSE_10: u8 = 0x5a;
    /// Read, with 64 bits of address.
    pub const READ_16: u8 = 0x88;
    /// Write, with 64 bits of address.
    pub const WRITE_16: u8 = 0x8a;
    /// Make writes durable, with 64 bits of address.
    pub const SYNCHRONIZE_CACHE_16: u8 = 0x91;
    /// With [`super::READ_CAPACITY_16`] as service action: how large, in 64 bits.
    pub const SERVICE_ACTION_IN_16: u8 = 0x9e;
    /// Which logical units are there.
    pub const REPORT_LUNS: u8 = 0xa0;
    /// Read, with 32 bits of address and of length.
    pub const READ_12: u8 = 0xa8;
    /// Write, with 32 bits of address and of length.
    pub const WRITE_12: u8 = 0xaa;
}

/// Service action of [`opcode::SERVICE_ACTION_IN_16`].
pub const READ_CAPACITY_16: u8 = 0x10;

/// Statuses (SAM-5 section 5.3.1).
pub mod status {
    /// Done.
    pub const GOOD: u8 = 0x00;
    /// There is sense data.
    pub const CHECK_CONDITION: u8 = 0x02;
}

/// Sense keys (SPC-4 section 4.5.6).
pub mod sense_key {
    /// Nothing.
    pub const NO_SENSE: u8 = 0x0;
    /// The medium cannot be read or written.
    pub const MEDIUM_ERROR: u8 = 0x3;
    /// The command is wrong.
    pub const ILLEGAL_REQUEST: u8 = 0x5;
    /// Something has happened to the unit; the command was not done.
    pub const UNIT_ATTENTION: u8 = 0x6;
    /// Writes are refused.
    pub const DATA_PROTECT: u8 = 0x7;
}

/// Additional sense code and its qualifier, as upper and lower byte (SPC-4 annex D.2).
pub mod asc {
    /// Nothing more.
    pub const NONE: u16 = 0x0000;
    /// It could not be written.
    pub const WRITE_ERROR: u16 = 0x0c00;
    /// It could not be read.
    pub const UNRECOVERED_READ_ERROR: u16 = 0x1100;
    /// There is no such command.
    pub const INVALID_COMMAND: u16 = 0x2000;
    /// There are no such blocks.
    pub const LBA_OUT_OF_RANGE: u16 = 0x2100;
    /// A field of the command is wrong.
    pub const INVALID_FIELD_IN_CDB: u16 = 0x2400;
    /// There is no such logical unit.
    pub const LUN_NOT_SUPPORTED: u16 = 0x2500;
    /// A field of the parameters is wrong.
    pub const INVALID_FIELD_IN_PARAMETERS: u16 = 0x2600;
    /// Writes are refused.
    pub const WRITE_PROTECTED: u16 = 0x2700;
    /// Parameters cannot be saved.
    pub const SAVING_NOT_SUPPORTED: u16 = 0x3900;
    /// The medium stays in the drive.
    pub const MEDIUM_REMOVAL_PREVENTED: u16 = 0x5302;
}

/// Bytes of [`Sense`].
pub const SENSE_SIZE: usize = size_of::<Sense>();

/// Sense data in fixed format (SPC-4 section 4.5.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Sense {
    /// [`Sense::CURRENT`].
    pub response_code: u8,
    /// Obsolete.
    pub obsolete: u8,
    /// One of [`sense_key`].
    pub key: u8,
    /// Zero.
    pub information: [u8; 4],
    /// Bytes that follow.
    pub additional_length: u8,
    /// Zero.
    pub command_specific: [u8; 4],
    /// One of [`asc`].
    pub asc: U16,
    /// Zero.
    pub field_replaceable_unit: u8,
    /// Zero.
    pub sense_key_specific: [u8; 3],
}

const _: () = assert!(size_of::<Sense>() == 18);

impl Sense {
    /// Response code: about this command, in fixed format.
    pub const CURRENT: u8 = 0x70;

    /// Sense data of a key and an additional code.
    pub const fn new(key: u8, asc: u16) -> Sense {
        Sense {
            response_code: Sense::CURRENT,
            obsolete: 0,
            key,
            information: [0; 4],
            additional_length: 10,
            command_specific: [0; 4],
            asc: U16::new(asc),
            field_replaceable_unit: 0,
            sense_key_specific: [0; 3],
        }
    }
}

/// Peripheral device types (SPC-4 section 6.6.2), in the lower bits of INQUIRY data's first byte.
pub mod device_type {
    /// A disk.
    pub const DISK: u8 = 0x00;
    /// A CD or DVD drive.
    pub const CD_DVD: u8 = 0x05;
    /// With the qualifier for "no such logical unit".
    pub const ABSENT: u8 = 0x7f;
}

/// Standard INQUIRY data (SPC-4 section 6.6.2), as long as it is usual.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Inquiry {
    /// One of [`device_type`].
    pub peripheral: u8,
    /// Bit 7: the medium is removable.
    pub removable: u8,
    /// [`Inquiry::SPC_3`].
    pub version: u8,
    /// [`Inquiry::RESPONSE_FORMAT`].
    pub response_format: u8,
    /// Bytes that follow.
    pub additional_length: u8,
    /// Zero.
    pub flags: [u8; 2],
    /// [`Inquiry::COMMAND_QUEUE`].
    pub queue: u8,
    /// Who made it, in ASCII and blanks; as all texts here.
    pub vendor: [u8; 8],
    /// What it is.
    pub product: [u8; 16],
    /// Of which revision.
    pub revision: [u8; 4],
}

const _: () = assert!(size_of::<Inquiry>() == 36);

impl Inquiry {
    /// [`Inquiry::removable`]: it is.
    pub const REMOVABLE: u8 = 0x80;
    /// [`Inquiry::version`]: the device follows SPC-3.
    pub const SPC_3: u8 = 0x05;
    /// [`Inquiry::response_format`]: this format, hierarchical addresses.
    pub const RESPONSE_FORMAT: u8 = 0x12;
    /// [`Inquiry::queue`]: several commands at a time.
    pub const COMMAND_QUEUE: u8 = 0x02;
    /// Bit of the command's second byte: a page of vital product data is wanted.
    pub const EVPD: u8 = 0x01;
}

/// Pages of vital product data (SPC-4 section 7.8, SBC-3 section 6.6).
pub mod vpd {
    /// Which pages there are.
    pub const SUPPORTED_PAGES: u8 = 0x00;
    /// Serial number.
    pub const SERIAL_NUMBER: u8 = 0x80;
    /// Designators: names of the device.
    pub const DEVICE_IDENTIFICATION: u8 = 0x83;
    /// Limits of block commands.
    pub const BLOCK_LIMITS: u8 = 0xb0;
    /// What a disk is made of.
    pub const BLOCK_CHARACTERISTICS: u8 = 0xb1;
    /// Giving blocks back.
    pub const LOGICAL_BLOCK_PROVISIONING: u8 = 0xb2;
}

/// First bytes of a page of vital product data (SPC-4 section 7.8.2).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct VpdHeader {
    /// One of [`device_type`].
    pub peripheral: u8,
    /// One of [`vpd`].
    pub page: u8,
    /// Bytes that follow.
    pub length: U16,
}

const _: () = assert!(size_of::<VpdHeader>() == 4);

/// First bytes of a designator (SPC-4 section 7.8.6.1).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Designator {
    /// Code set: [`Designator::BINARY`] or [`Designator::ASCII`].
    pub code_set: u8,
    /// Of the logical unit; [`Designator::T10`] or [`Designator::NAA`].
    pub kind: u8,
    /// Zero.
    pub reserved: u8,
    /// Bytes that follow.
    pub length: u8,
}

const _: () = assert!(size_of::<Designator>() == 4);

impl Designator {
    /// Bytes.
    pub const BINARY: u8 = 1;
    /// Text.
    pub const ASCII: u8 = 2;
    /// Vendor's name and what the vendor likes.
    pub const T10: u8 = 1;
    /// A number that is nobody else's; locally assigned (7.8.6.6.4) when its first four bits are 3.
    pub const NAA: u8 = 3;
}

/// Block limits, after the header (SBC-3 section 6.6.4). A zero says nothing.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BlockLimits {
    /// WSNZ.
    pub wsnz: u8,
    /// Most blocks of a COMPARE AND WRITE.
    pub max_compare_and_write: u8,
    /// Best granularity of transfers, in blocks.
    pub optimal_granularity: U16,
    /// Most blocks of a transfer.
    pub max_transfer: U32,
    /// Best length of a transfer, in blocks.
    pub optimal_transfer: U32,
    /// Most blocks of a prefetch.
    pub max_prefetch: U32,
    /// Most blocks of an UNMAP.
    pub max_unmap: U32,
    /// Most descriptors of an UNMAP.
    pub max_unmap_descriptors: U32,
    /// Best granularity of UNMAPs, in blocks.
    pub unmap_granularity: U32,
    /// Alignment of that; bit 31: it is valid.
    pub unmap_alignment: U32,
    /// Most blocks of a WRITE SAME.
    pub max_write_same: U64,
    /// Reserved.
    pub reserved: [u8; 20],
}

const _: () = assert!(size_of::<BlockLimits>() == 60);

/// Block device characteristics, after the header (SBC-3 section 6.6.2).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BlockCharacteristics {
    /// [`BlockCharacteristics::NON_ROTATING`], or turns in a minute.
    pub rotation_rate: U16,
    /// Zero: said nothing of.
    pub rest: [u8; 58],
}

const _: () = assert!(size_of::<BlockCharacteristics>() == 60);

impl BlockCharacteristics {
    /// Nothing turns.
    pub const NON_ROTATING: u16 = 1;
}

/// Logical block provisioning, after the header (SBC-3 section 6.6.5).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Provisioning {
    /// Zero: no thresholds.
    pub threshold_exponent: u8,
    /// [`Provisioning::UNMAP`].
    pub commands: u8,
    /// [`Provisioning::THIN`].
    pub kind: u8,
    /// Zero.
    pub reserved: u8,
}

const _: () = assert!(size_of::<Provisioning>() == 4);

impl Provisioning {
    /// LBPU: there is an UNMAP command.
    pub const UNMAP: u8 = 0x80;
    /// Blocks take space when they are written.
    pub const THIN: u8 = 2;
}

/// Answer to READ CAPACITY (10) (SBC-3 section 5.15).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Capacity10 {
    /// The last block, or all ones where 32 bits are not enough.
    pub last_block: U32,
    /// Bytes of a block.
    pub block_size: U32,
}

const _: () = assert!(size_of::<Capacity10>() == 8);

/// Answer to READ CAPACITY (16) (SBC-3 section 5.16).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Capacity16 {
    /// The last block.
    pub last_block: U64,
    /// Bytes of a block.
    pub block_size: U32,
    /// Zero: no protection.
    pub protection: u8,
    /// Logical blocks in a physical one, as a power of two.
    pub physical_exponent: u8,
    /// [`Capacity16::LBPME`] and the first aligned block.
    pub provisioning: U16,
    /// Zero.
    pub reserved: [u8; 16],
}

const _: () = assert!(size_of::<Capacity16>() == 32);

impl Capacity16 {
    /// Blocks can be given back.
    pub const LBPME: u16 = 0x8000;
}

/// First bytes of UNMAP's parameters (SBC-3 section 5.28.2).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct UnmapHeader {
    /// Bytes that follow this field.
    pub data_length: U16,
    /// Bytes of descriptors.
    pub descriptors_length: U16,
    /// Reserved.
    pub reserved: U32,
}

const _: () = assert!(size_of::<UnmapHeader>() == 8);

/// A range of an UNMAP (SBC-3 section 5.28.2).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct UnmapDescriptor {
    /// First block.
    pub block: U64,
    /// Number of blocks.
    pub count: U32,
    /// Reserved.
    pub reserved: U32,
}

const _: () = assert!(size_of::<UnmapDescriptor>() == 16);

/// Parameters (SPC-4 section 7.5, SBC-3 section 6.5).
pub mod mode {
    /// Page: what the cache does.
    pub const CACHING: u8 = 0x08;
    /// Page of a DVD drive: what it can do and how it is made (MMC-3 section 5.5.10).
    pub const CAPABILITIES: u8 = 0x2a;
    /// Bytes of the capabilities page, header and all, of a drive that writes nothing.
    pub const CAPABILITIES_SIZE: usize = 22;
    /// Capabilities page's third byte: DVD-ROMs are read.
    pub const READS_DVD_ROM: u8 = 0x08;
    /// Capabilities page's seventh byte: the medium lies in a tray.
    pub const TRAY: u8 = 1 << 5;
    /// Page: all.
    pub const ALL: u8 = 0x3f;
    /// Device-specific byte: writes are refused.
    pub const WRITE_PROTECTED: u8 = 0x80;
    /// Device-specific byte: FUA is known.
    pub const DPO_FUA: u8 = 0x10;
    /// Caching page's third byte: writes are durable only after SYNCHRONIZE CACHE.
    pub const WRITE_CACHE: u8 = 0x04;
    /// Bytes of the caching page, header and all.
    pub const CACHING_SIZE: usize = 20;
    /// Page control, in the upper bits of the command's third byte: which parameters can be changed.
    pub const CHANGEABLE: u8 = 1;
    /// Page control: those that were saved.
    pub const SAVED: u8 = 3;
}

/// Bit of a read's or write's second byte: to or from the medium itself (SBC-3 section 5.34).
pub const FUA: u8 = 0x08;

/// Bits of VERIFY's second byte: the blocks are to be compared with data of the guest (BYTCHK, SBC-3 section 5.36).
pub const BYTE_CHECK: u8 = 0x06;

/// Multimedia: what a DVD drive has besides (MMC-6).
pub mod mmc {
    /// Profile: a DVD-ROM (table 91).
    pub const PROFILE_DVD_ROM: u16 = 0x0010;
    /// Feature: which profiles there are (section 5.3.1).
    pub const FEATURE_PROFILES: u16 = 0x0000;
    /// Event class: media (table 313).
    pub const EVENT_MEDIA: u8 = 4;
    /// Media status: the tray is closed and something is in it (table 328).
    pub const MEDIA_PRESENT: u8 = 0x02;
    /// START STOP UNIT's fourth byte: load or eject (bit 1), start (bit 0).
    pub const LOAD_EJECT: u8 = 0x02;
    /// And start.
    pub const START: u8 = 0x01;
    /// Control and address of a data track (table 483).
    pub const DATA_TRACK: u8 = 0x14;
    /// Number of the track that is none: the lead-out.
    pub const LEAD_OUT: u8 = 0xaa;
}
