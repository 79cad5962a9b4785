//! Virtual hardware: what a PC has besides its processors and memory.
//!
//! A device is reached by ports ([`PortDevice`]) or by memory-mapped registers ([`MmioDevice`]), is shared by all processors
//! (so it locks inside), raises interrupts by an [`InterruptLine`] or by message ([`MsiSink`]), and takes its time from
//! [`vmm::time::Timers`]. None knows which backend runs the processors.
//!
//! ```text
//!   port, MMIO --> device --InterruptLine--> InterruptRouter --> 8259 pair --INTR--> LINT0
//!                     |                            +-----------> I/O APIC --message--> MsiSink (the backend)
//!                     +------------------- MSI-X message ------------------------------^
//! ```

pub mod acpi;
pub mod acpi_pm;
pub mod block;
pub mod debug_exit;
pub mod fw_cfg;
pub mod i8042;
pub mod interrupts;
pub mod ioapic;
pub mod lapic;
pub mod net;
pub mod pci;
pub mod pic;
pub mod pit;
mod ports;
pub mod reset;
pub mod rtc;
pub mod serial;
pub mod smbios;
pub mod testdev;
#[cfg(test)]
pub(crate) mod testing;
pub mod virtio;
pub mod xen_platform;

pub use vmm::snapshot;

use std::ops::RangeInclusive;
use std::sync::Arc;

/// A device with I/O ports.
pub trait PortDevice: Send + Sync {
    /// IN of `size` bytes (1, 2 or 4) at `port`, the absolute port number. What the device does not have reads as ones.
    fn port_in(&self, port: u16, size: u8) -> u32;
    /// OUT of `size` bytes.
    fn port_out(&self, port: u16, size: u8, value: u32);
}

/// A device with memory-mapped registers.
pub trait MmioDevice: Send + Sync {
    /// Read of `data.len()` bytes at `offset` from the device's base.
    fn mmio_read(&self, offset: u64, data: &mut [u8]);
    /// Write of `data` at `offset`.
    fn mmio_write(&self, offset: u64, data: &[u8]);
}

/// By which kind of device a guest finds a disk or a network card.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DeviceBus {
    /// Virtio on PCI.
    #[default]
    Virtio,
    /// A Xen backend; needs the Xen dialect.
    Xen,
    /// A device on Hyper-V's VMBus; needs the Hyper-V dialect.
    Hyperv,
}

impl std::fmt::Display for DeviceBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DeviceBus::Virtio => "virtio",
            DeviceBus::Xen => "xen",
            DeviceBus::Hyperv => "hyperv",
        })
    }
}

impl std::str::FromStr for DeviceBus {
    type Err = String;

    fn from_str(text: &str) -> Result<DeviceBus, String> {
        match text {
            "virtio" => Ok(DeviceBus::Virtio),
            "xen" => Ok(DeviceBus::Xen),
            "hyperv" => Ok(DeviceBus::Hyperv),
            _ => Err(format!("unknown bus '{text}'; there are virtio, xen and hyperv")),
        }
    }
}

/// Where message-signalled interrupts go: the backend's machine.
pub trait MsiSink: Send + Sync {
    /// A write of `data` to `address`, Intel SDM vol. 3 section 11.11.
    fn signal_msi(&self, address: u64, data: u32);
}

impl MsiSink for Arc<dyn vmm::BackendVm> {
    fn signal_msi(&self, address: u64, data: u32) {
        vmm::BackendVm::signal_msi(self.as_ref(), address, data);
    }
}

/// What a device does to the whole machine.
pub trait MachineEvents: Send + Sync {
    /// The guest switched the power off.
    fn power_off(&self);
    /// The guest asked for a reset of all processors and devices.
    fn reset(&self);
    /// The guest ended the run with this value (isa-debug-exit); the exit status is `(value << 1) | 1`.
    fn debug_exit(&self, value: u32);
}

/// One interrupt input of the board (a GSI); level as seen by the controller. Edge-triggered devices pulse it.
pub trait InterruptLine: Send + Sync {
    /// Sets the level.
    fn set(&self, asserted: bool);
}

/// The devices of a machine by port and by address. Built once, then only read.
#[derive(Default)]
pub struct DeviceMap {
    ports: Vec<(RangeInclusive<u16>, Arc<dyn PortDevice>)>,
    mmio: Vec<(RangeInclusive<u64>, Arc<dyn MmioDevice>)>,
}

impl DeviceMap {
    /// Gives `ports` to `device`. Later entries win over earlier ones.
    pub fn add_ports(&mut self, ports: RangeInclusive<u16>, device: Arc<dyn PortDevice>) {
        self.ports.insert(0, (ports, device));
    }

    /// Gives the addresses in `range` to `device`. Later entries win over earlier ones.
    pub fn add_mmio(&mut self, range: RangeInclusive<u64>, device: Arc<dyn MmioDevice>) {
        self.mmio.insert(0, (range, device));
    }

    /// The device at `port`.
    pub fn port(&self, port: u16) -> Option<&dyn PortDevice> {
        self.ports.iter().find(|(range, _)| range.contains(&port)).map(|(_, device)| device.as_ref())
    }

    /// The device at guest physical address `gpa`, and the offset from its base.
    pub fn mmio(&self, gpa: u64) -> Option<(&dyn MmioDevice, u64)> {
        self.mmio.iter().find(|(range, _)| range.contains(&gpa)).map(|(range, device)| (device.as_ref(), gpa - range.start()))
    }
}
