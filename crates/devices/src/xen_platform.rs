//! Xen's platform device: what makes a guest of HVM kind look for its paravirtual devices, and gives it addresses for its grant table.
//!
//! Xen `docs/misc/hvm-emulated-unplug.pandoc`; QEMU `hw/i386/xen/xen_platform.c`. Neither BAR has registers that a driver uses. Guests place the
//! grant table at the beginning of the memory BAR, where the board has memory; the rest of it, and the ports, read as ones.

use std::sync::Arc;

use abi::xen::hvm::{PLATFORM_CLASS, PLATFORM_DEVICE, PLATFORM_IO_SIZE, PLATFORM_MEMORY_SIZE, PLATFORM_VENDOR};

use crate::pci::{BarKind, PciConfig, PciFunction, PciIdentity};

/// The BAR with memory.
pub const MEMORY_BAR: u8 = 1;

/// The device.
pub struct XenPlatform(PciConfig);

impl XenPlatform {
    /// A device as Xen's own.
    #[allow(clippy::new_ret_no_self)]
    pub fn new() -> Arc<dyn PciFunction> {
        let identity = PciIdentity {
            vendor: PLATFORM_VENDOR,
            device: PLATFORM_DEVICE,
            class: PLATFORM_CLASS,
            revision: 1,
            subsystem_vendor: PLATFORM_VENDOR,
            subsystem: PLATFORM_DEVICE,
        };
        let config = PciConfig::new(identity).with_bar(0, BarKind::Io, PLATFORM_IO_SIZE);
        Arc::new(XenPlatform(config.with_bar(MEMORY_BAR, BarKind::Memory32, PLATFORM_MEMORY_SIZE).with_intx()))
    }
}

impl PciFunction for XenPlatform {
    fn config(&self) -> &PciConfig {
        &self.0
    }

    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn reset(&self) {}
}
