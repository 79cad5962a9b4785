//! Virtio 1.2's words: device numbers, feature bits, the PCI transport's registers, and what the block, network, entropy and
//! console devices put on their rings.
//!
//! Source: "Virtual I/O Device (VIRTIO) Version 1.2", OASIS Committee Specification 01; section numbers below are its own.
//! Everything on the wire is little-endian.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// PCI vendor of all virtio devices (4.1.2).
pub const PCI_VENDOR: u16 = 0x1af4;
/// PCI device number of a non-transitional device, to which the device type is added (4.1.2).
pub const PCI_DEVICE_BASE: u16 = 0x1040;
/// Lowest revision of a non-transitional device (4.1.2.1).
pub const PCI_REVISION: u8 = 1;

/// Device types (5).
pub mod device_type {
    /// Network card (5.1).
    pub const NET: u16 = 1;
    /// Block device (5.2).
    pub const BLOCK: u16 = 2;
    /// Console (5.3).
    pub const CONSOLE: u16 = 3;
    /// Entropy device (5.4).
    pub const ENTROPY: u16 = 4;
}

/// Device status field (2.1).
pub mod status {
    /// The guest has seen the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Feature negotiation is complete.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on without a reset.
    pub const DEVICE_NEEDS_RESET: u8 = 64;
    /// The driver gave up.
    pub const FAILED: u8 = 128;
}

/// Feature bits that belong to no device type (6), as masks.
pub mod feature {
    /// Descriptors may point to tables of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `used_event` and `avail_event` say when to notify.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
}

/// PCI transport (4.1.4).
pub mod pci {
    /// `cfg_type` of a vendor capability: common configuration.
    pub const CAP_COMMON_CFG: u8 = 1;
    /// `cfg_type`: notifications.
    pub const CAP_NOTIFY_CFG: u8 = 2;
    /// `cfg_type`: ISR status.
    pub const CAP_ISR_CFG: u8 = 3;
    /// `cfg_type`: device-specific configuration.
    pub const CAP_DEVICE_CFG: u8 = 4;
    /// `cfg_type`: window in configuration space to the BARs.
    pub const CAP_PCI_CFG: u8 = 5;

    /// "No vector" for `config_msix_vector` and `queue_msix_vector`.
    pub const NO_VECTOR: u16 = 0xffff;

    /// ISR bit: a queue has used buffers (4.1.4.5).
    pub const ISR_QUEUE: u8 = 1;
    /// ISR bit: the device configuration changed.
    pub const ISR_CONFIG: u8 = 2;

    /// Offsets in the I/O BAR 0 of a legacy (virtio 0.9) device without MSI-X (4.1.4.10), with their width in bytes.
    pub mod legacy {
        /// Features offered, bits 0 to 31 (4, read only).
        pub const DEVICE_FEATURES: u64 = 0;
        /// Features accepted (4).
        pub const DRIVER_FEATURES: u64 = 4;
        /// Page number of the queue (4).
        pub const QUEUE_ADDRESS: u64 = 8;
        /// Queue size in descriptors, 0 where there is no such queue (2, read only).
        pub const QUEUE_SIZE: u64 = 12;
        /// Selects the queue that the two fields above are of (2).
        pub const QUEUE_SELECT: u64 = 14;
        /// Queue to notify (2).
        pub const QUEUE_NOTIFY: u64 = 16;
        /// Device status (1).
        pub const DEVICE_STATUS: u64 = 18;
        /// ISR status; reading clears it (1, read only).
        pub const ISR_STATUS: u64 = 19;
        /// Device configuration begins here.
        pub const DEVICE_CONFIG: u64 = 20;
    }

    /// Offsets in the common configuration structure (4.1.4.3), with their width in bytes.
    pub mod common {
        /// Selects 32 bits of `DEVICE_FEATURE` (4).
        pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
        /// Features offered (4, read only).
        pub const DEVICE_FEATURE: u64 = 0x04;
        /// Selects 32 bits of `DRIVER_FEATURE` (4).
        pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
        /// Features accepted (4).
        pub const DRIVER_FEATURE: u64 = 0x0c;
        /// MSI-X vector of configuration changes (2).
        pub const CONFIG_MSIX_VECTOR: u64 = 0x10;
        /// Number of queues (2, read only).
        pub const NUM_QUEUES: u64 = 0x12;
        /// Device status (1).
        pub const DEVICE_STATUS: u64 = 0x14;
        /// Configuration generation (1, read only).
        pub const CONFIG_GENERATION: u64 = 0x15;
        /// Selects the queue that the fields below are of (2).
        pub const QUEUE_SELECT: u64 = 0x16;
        /// Queue size in descriptors (2).
        pub const QUEUE_SIZE: u64 = 0x18;
        /// Queue's MSI-X vector (2).
        pub const QUEUE_MSIX_VECTOR: u64 = 0x1a;
        /// Whether the queue is on (2).
        pub const QUEUE_ENABLE: u64 = 0x1c;
        /// Where in the notification area this queue is (2, read only).
        pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
        /// Address of the descriptor table (8, also as two halves).
        pub const QUEUE_DESC: u64 = 0x20;
        /// Address of the driver area (8).
        pub const QUEUE_DRIVER: u64 = 0x28;
        /// Address of the device area (8).
        pub const QUEUE_DEVICE: u64 = 0x30;
        /// Size of the structure as far as it is kept here.
        pub const SIZE: u64 = 0x38;
    }
}

/// Available ring flag: the driver wants no interrupt (2.7.6).
pub const AVAIL_NO_INTERRUPT: u16 = 1;

/// Block device (5.2).
pub mod block {
    use super::*;

    /// Feature: `seg_max` is valid.
    pub const F_SEG_MAX: u64 = 1 << 2;
    /// Feature: the disk is read only.
    pub const F_RO: u64 = 1 << 5;
    /// Feature: `blk_size` is valid.
    pub const F_BLK_SIZE: u64 = 1 << 6;
    /// Feature: there is a flush command; without it each write is durable before it is answered.
    pub const F_FLUSH: u64 = 1 << 9;
    /// Feature: `topology` is valid.
    pub const F_TOPOLOGY: u64 = 1 << 10;
    /// Feature: there is a discard command.
    pub const F_DISCARD: u64 = 1 << 13;
    /// Feature: there is a write-zeroes command.
    pub const F_WRITE_ZEROES: u64 = 1 << 14;

    /// Request type: read.
    pub const T_IN: u32 = 0;
    /// Request type: write.
    pub const T_OUT: u32 = 1;
    /// Request type: flush.
    pub const T_FLUSH: u32 = 4;
    /// Request type: get the device's id string.
    pub const T_GET_ID: u32 = 8;
    /// Request type: discard.
    pub const T_DISCARD: u32 = 11;
    /// Request type: write zeroes.
    pub const T_WRITE_ZEROES: u32 = 13;

    /// Status: done.
    pub const S_OK: u8 = 0;
    /// Status: failed.
    pub const S_IOERR: u8 = 1;
    /// Status: the device has no such request.
    pub const S_UNSUPP: u8 = 2;

    /// Bytes of a sector, the unit of all positions whatever `blk_size` says.
    pub const SECTOR: u64 = 512;
    /// Length of the id string.
    pub const ID_BYTES: usize = 20;
    /// Flag of a write-zeroes segment: the device may give the space back.
    pub const WRITE_ZEROES_UNMAP: u32 = 1;

    /// What every request begins with (5.2.6).
    #[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
    #[repr(C)]
    pub struct RequestHeader {
        /// One of the `T_` constants.
        pub kind: U32,
        /// Reserved (once the priority).
        pub reserved: U32,
        /// Position in sectors.
        pub sector: U64,
    }
    const _: () = assert!(size_of::<RequestHeader>() == 16);

    /// One range of a discard or write-zeroes request (5.2.6).
    #[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
    #[repr(C)]
    pub struct RangeSegment {
        /// First sector.
        pub sector: U64,
        /// Number of sectors.
        pub num_sectors: U32,
        /// [`WRITE_ZEROES_UNMAP`] or zero.
        pub flags: U32,
    }
    const _: () = assert!(size_of::<RangeSegment>() == 16);

    /// Device configuration (5.2.4).
    #[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
    #[repr(C)]
    pub struct Config {
        /// Size in sectors.
        pub capacity: U64,
        /// Largest segment in bytes (not offered).
        pub size_max: U32,
        /// Most data segments in a request.
        pub seg_max: U32,
        /// Cylinders, heads, sectors (not offered).
        pub geometry: [u8; 4],
        /// Block size in bytes.
        pub blk_size: U32,
        /// Logical blocks in a physical block, as a power of two.
        pub physical_block_exp: u8,
        /// First aligned logical block.
        pub alignment_offset: u8,
        /// Smallest good transfer, in blocks.
        pub min_io_size: U16,
        /// Best transfer, in blocks.
        pub opt_io_size: U32,
        /// Cache mode (not offered).
        pub writeback: u8,
        /// Padding.
        pub unused0: u8,
        /// Number of queues (not offered).
        pub num_queues: U16,
        /// Most sectors in one discard segment.
        pub max_discard_sectors: U32,
        /// Most segments in one discard request.
        pub max_discard_seg: U32,
        /// Alignment of discards in sectors.
        pub discard_sector_alignment: U32,
        /// Most sectors in one write-zeroes segment.
        pub max_write_zeroes_sectors: U32,
        /// Most segments in one write-zeroes request.
        pub max_write_zeroes_seg: U32,
        /// Whether write-zeroes may give space back.
        pub write_zeroes_may_unmap: u8,
        /// Padding.
        pub unused1: [u8; 3],
    }
    const _: () = assert!(size_of::<Config>() == 60);
}

/// Network device (5.1).
pub mod net {
    use super::*;

    /// Feature: the device takes packets with partial checksums.
    pub const F_CSUM: u64 = 1 << 0;
    /// Feature: the driver takes packets with partial checksums.
    pub const F_GUEST_CSUM: u64 = 1 << 1;
    /// Feature: `mac` is valid.
    pub const F_MAC: u64 = 1 << 5;
    /// Feature: the driver takes TCP segments over IPv4 to be cut.
    pub const F_GUEST_TSO4: u64 = 1 << 7;
    /// Feature: the driver takes TCP segments over IPv6 to be cut.
    pub const F_GUEST_TSO6: u64 = 1 << 8;
    /// Feature: the device cuts TCP segments over IPv4.
    pub const F_HOST_TSO4: u64 = 1 << 11;
    /// Feature: the device cuts TCP segments over IPv6.
    pub const F_HOST_TSO6: u64 = 1 << 12;
    /// Feature: one packet may take several receive buffers.
    pub const F_MRG_RXBUF: u64 = 1 << 15;
    /// Feature: `status` is valid.
    pub const F_STATUS: u64 = 1 << 16;
    /// Feature: there is a control queue.
    pub const F_CTRL_VQ: u64 = 1 << 17;
    /// Feature: the control queue takes receive modes.
    pub const F_CTRL_RX: u64 = 1 << 18;
    /// Feature: the control queue takes a new MAC address.
    pub const F_CTRL_MAC_ADDR: u64 = 1 << 23;

    /// Bit of `status`: the link is up.
    pub const S_LINK_UP: u16 = 1;

    /// Header flag: `csum_start` and `csum_offset` are valid.
    pub const HDR_F_NEEDS_CSUM: u8 = 1;
    /// Header flag of received packets: the checksum is known to be right.
    pub const HDR_F_DATA_VALID: u8 = 2;
    /// `gso_type`: the packet is not to be cut.
    pub const GSO_NONE: u8 = 0;
    /// `gso_type`: TCP over IPv4.
    pub const GSO_TCPV4: u8 = 1;
    /// `gso_type`: TCP over IPv6.
    pub const GSO_TCPV6: u8 = 4;
    /// Bit of `gso_type`: the first segment keeps its mark of congestion.
    pub const GSO_ECN: u8 = 0x80;

    /// Control class: receive modes.
    pub const CTRL_RX: u8 = 0;
    /// Control class: MAC addresses.
    pub const CTRL_MAC: u8 = 1;
    /// Command of [`CTRL_MAC`]: filter table.
    pub const CTRL_MAC_TABLE_SET: u8 = 0;
    /// Command of [`CTRL_MAC`]: the card's own address.
    pub const CTRL_MAC_ADDR_SET: u8 = 1;
    /// Answer to a control command: done.
    pub const CTRL_OK: u8 = 0;
    /// Answer to a control command: refused.
    pub const CTRL_ERR: u8 = 1;

    /// What precedes each packet on the rings (5.1.6). The same bytes precede packets on a Linux TAP device with
    /// `IFF_VNET_HDR` and a header size of 12.
    #[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
    #[repr(C)]
    pub struct Header {
        /// `HDR_F_` flags.
        pub flags: u8,
        /// How to cut the packet; 0 for not at all.
        pub gso_type: u8,
        /// Length of the headers to copy.
        pub hdr_len: U16,
        /// Length of each segment.
        pub gso_size: U16,
        /// Where the checksum starts.
        pub csum_start: U16,
        /// Where the checksum goes, from `csum_start`.
        pub csum_offset: U16,
        /// Number of receive buffers used.
        pub num_buffers: U16,
    }
    const _: () = assert!(size_of::<Header>() == 12);
    /// Size of [`Header`].
    pub const HEADER_BYTES: usize = size_of::<Header>();

    /// Device configuration (5.1.4).
    #[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
    #[repr(C)]
    pub struct Config {
        /// MAC address.
        pub mac: [u8; 6],
        /// `S_` bits.
        pub status: U16,
    }
}

/// Console device (5.3).
pub mod console {
    use super::*;

    /// Device configuration (5.3.4); nothing of it is offered.
    #[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
    #[repr(C)]
    pub struct Config {
        /// Columns.
        pub cols: U16,
        /// Rows.
        pub rows: U16,
        /// Most ports.
        pub max_nr_ports: U32,
        /// Emergency write.
        pub emerg_wr: U32,
    }
}
