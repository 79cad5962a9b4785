//! PCI configuration space: offsets and bits. PCI Local Bus Specification 3.0, chapter 6 and 6.8.2 (MSI-X).

/// Vendor id.
pub const VENDOR_ID: u8 = 0x00;
/// Device id.
pub const DEVICE_ID: u8 = 0x02;
/// Command register.
pub const COMMAND: u8 = 0x04;
/// Status register.
pub const STATUS: u8 = 0x06;
/// Revision; the three bytes of the class code follow it.
pub const REVISION: u8 = 0x08;
/// Cache line size.
pub const CACHE_LINE_SIZE: u8 = 0x0c;
/// Latency timer.
pub const LATENCY_TIMER: u8 = 0x0d;
/// Header type.
pub const HEADER_TYPE: u8 = 0x0e;
/// First of six base address registers.
pub const BAR0: u8 = 0x10;
/// Subsystem vendor id; the subsystem id follows it.
pub const SUBSYSTEM_VENDOR_ID: u8 = 0x2c;
/// Expansion ROM base address.
pub const ROM_BASE: u8 = 0x30;
/// Offset of the first capability.
pub const CAPABILITIES: u8 = 0x34;
/// Interrupt line: for the guest's own use.
pub const INTERRUPT_LINE: u8 = 0x3c;
/// Interrupt pin, 1 for INTA.
pub const INTERRUPT_PIN: u8 = 0x3d;
/// First byte that the header does not define.
pub const FIRST_CAPABILITY: u8 = 0x40;

/// Command: answers I/O accesses.
pub const COMMAND_IO: u16 = 1 << 0;
/// Command: answers memory accesses.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: may access memory.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command: INTx is off.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Status: INTx is asserted.
pub const STATUS_INTERRUPT: u16 = 1 << 3;
/// Status: there is a list of capabilities.
pub const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Header type: the device has several functions.
pub const HEADER_MULTI_FUNCTION: u8 = 0x80;

/// BAR: I/O space.
pub const BAR_IO: u32 = 1;
/// BAR: 64-bit memory.
pub const BAR_MEMORY_64: u32 = 2 << 1;
/// BAR: prefetchable memory.
pub const BAR_PREFETCHABLE: u32 = 1 << 3;

/// Capability id: vendor specific.
pub const CAP_VENDOR: u8 = 0x09;
/// Capability id: MSI-X.
pub const CAP_MSIX: u8 = 0x11;
/// MSI-X control: all vectors masked.
pub const MSIX_MASK_ALL: u16 = 1 << 14;
/// MSI-X control: enabled.
pub const MSIX_ENABLE: u16 = 1 << 15;
/// Bytes of an MSI-X table entry: address, data, vector control.
pub const MSIX_ENTRY_SIZE: u64 = 16;
/// MSI-X vector control: masked.
pub const MSIX_VECTOR_MASKED: u32 = 1;

/// Address port of configuration mechanism #1.
pub const CONFIG_ADDRESS: u16 = 0xcf8;
/// Data port of configuration mechanism #1.
pub const CONFIG_DATA: u16 = 0xcfc;
/// Address port: access to configuration space is enabled.
pub const CONFIG_ENABLE: u32 = 1 << 31;
