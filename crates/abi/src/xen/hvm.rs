//! Parameters and operations of HVM guests, and the platform device: `hvm/params.h`, `hvm/hvm_op.h`, `docs/misc/hvm-emulated-unplug.pandoc`.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Operations of `HYPERVISOR_hvm_op`.
pub mod op {
    /// [`Param`](super::Param).
    pub const SET_PARAM: u64 = 0;
    /// [`Param`](super::Param).
    pub const GET_PARAM: u64 = 1;
    /// [`UpcallVector`](super::UpcallVector).
    pub const SET_UPCALL_VECTOR: u64 = 23;
}

/// `struct xen_hvm_param`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Param {
    /// Whose.
    pub domid: U16,
    /// Zero.
    pub pad: U16,
    /// [`param`].
    pub index: U32,
    /// Its value.
    pub value: U64,
}

/// `struct xen_hvm_evtchn_upcall_vector`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct UpcallVector {
    /// Whose.
    pub vcpu: U32,
    /// Interrupt vector, 16 to 255.
    pub vector: u8,
    /// Zero.
    pub pad: [u8; 3],
}

/// Indices of [`Param`] (`HVM_PARAM_*`).
pub mod param {
    /// How events are announced: [`via`](super::via) in bits 63:56.
    pub const CALLBACK_IRQ: u32 = 0;
    /// Page number of the XenStore ring.
    pub const STORE_PFN: u32 = 1;
    /// The guest's port of the XenStore ring.
    pub const STORE_EVTCHN: u32 = 2;
    /// Page number of the console ring.
    pub const CONSOLE_PFN: u32 = 17;
    /// The guest's port of the console ring.
    pub const CONSOLE_EVTCHN: u32 = 18;
}

/// Bits 63:56 of [`param::CALLBACK_IRQ`].
pub mod via {
    /// A global interrupt; number 0 means off.
    pub const GSI: u64 = 0;
    /// A pin of a PCI device: device in bits 15:11, pin in bits 1:0 (INTA is 0).
    pub const PCI_INTX: u64 = 1;
    /// Bits 7:0 are a vector that every vCPU gets without its local APIC.
    pub const VECTOR: u64 = 2;
}

/// Pages that a domain's builder sets aside (`tools/libs/guest/xg_dom_x86.c`, `SPECIALPAGE_*`, `END_SPECIAL_REGION`): the first.
pub const SPECIAL_PAGES: u64 = 0xfeff_8000;
/// Bytes of all of them.
pub const SPECIAL_PAGES_SIZE: u64 = 0x8000;
/// The page of the XenStore ring.
pub const STORE_PAGE: u64 = 0xfeff_c000;
/// The page of the console ring.
pub const CONSOLE_PAGE: u64 = 0xfeff_f000;

/// PCI vendor of the platform device: XenSource.
pub const PLATFORM_VENDOR: u16 = 0x5853;
/// PCI device of the platform device.
pub const PLATFORM_DEVICE: u16 = 0x0001;
/// PCI class of the platform device: system peripheral of no standard kind.
pub const PLATFORM_CLASS: u32 = 0xff_8000;
/// Size of the platform device's I/O BAR.
pub const PLATFORM_IO_SIZE: u64 = 0x100;
/// Size of its memory BAR, where guests place the grant table.
pub const PLATFORM_MEMORY_SIZE: u64 = 0x100_0000;

/// Ports by which a guest unplugs emulated devices.
pub mod unplug {
    /// Reads [`MAGIC`]; a 16-bit write is the mask of what to unplug, a 32-bit write the driver's build number.
    pub const PORT: u16 = 0x10;
    /// Reads [`PROTOCOL`]; a 16-bit write is the driver's product number, an 8-bit write a character of the log.
    pub const PORT_VERSION: u16 = 0x12;
    /// The ports are there and the driver is welcome.
    pub const MAGIC: u32 = 0x49d2;
    /// With product and build numbers.
    pub const PROTOCOL: u32 = 1;
    /// Bit of the mask: all emulated disks.
    pub const DISKS: u16 = 1 << 0;
    /// All but the first.
    pub const MORE_DISKS: u16 = 1 << 2;
}
