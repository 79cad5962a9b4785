//! QEMU's firmware configuration device: ports, keys, DMA control bits. QEMU `docs/specs/fw_cfg.rst`.

/// Selector, 16 bits.
pub const SELECTOR: u16 = 0x510;
/// Data, 8 bits.
pub const DATA: u16 = 0x511;
/// Upper half of the DMA command's address, big endian; reads as the first half of [`DMA_SIGNATURE`].
pub const DMA_ADDRESS_HIGH: u16 = 0x514;
/// Lower half; writing it starts the transfer.
pub const DMA_ADDRESS_LOW: u16 = 0x518;
/// What the DMA address registers read as, in port order.
pub const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";

/// "QEMU".
pub const KEY_SIGNATURE: u16 = 0x00;
/// Features, 32 bits.
pub const KEY_ID: u16 = 0x01;
/// RAM in bytes, 64 bits.
pub const KEY_RAM_SIZE: u16 = 0x03;
/// Nonzero without display, 16 bits.
pub const KEY_NO_GRAPHIC: u16 = 0x04;
/// Number of processors, 16 bits.
pub const KEY_PROCESSORS: u16 = 0x05;
/// Nonzero to show a boot menu, 16 bits.
pub const KEY_BOOT_MENU: u16 = 0x0e;
/// Highest number of processors, 16 bits.
pub const KEY_MOST_PROCESSORS: u16 = 0x0f;
/// Directory of files.
pub const KEY_DIRECTORY: u16 = 0x19;
/// Key of the first file.
pub const KEY_FIRST_FILE: u16 = 0x20;
/// x86: nonzero when IRQ 0 is at I/O APIC pin 2, 8 bits.
pub const KEY_IRQ0_OVERRIDE: u16 = 0x8002;
/// Bytes of a name in the directory, with its terminating zero.
pub const FILE_NAME_SIZE: usize = 56;

/// [`KEY_ID`]: selector and data ports.
pub const ID_TRADITIONAL: u32 = 1;
/// [`KEY_ID`]: DMA.
pub const ID_DMA: u32 = 2;

/// DMA control: the transfer failed.
pub const DMA_ERROR: u32 = 1;
/// DMA control: from the item to memory.
pub const DMA_READ: u32 = 2;
/// DMA control: move on without a transfer.
pub const DMA_SKIP: u32 = 4;
/// DMA control: select the item in bits 31:16 first.
pub const DMA_SELECT: u32 = 8;
/// DMA control: from memory to the item.
pub const DMA_WRITE: u32 = 16;
