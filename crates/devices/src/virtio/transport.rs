//! Virtio over PCI, modern only (virtio 1.2 section 4.1): configuration space, the regions of the BAR, MSI-X and INTx.
//!
//! One memory BAR holds everything, a page for each structure:
//!
//! ```text
//!   0x0000 common configuration   0x2000 device configuration   0x4000 MSI-X table
//!   0x1000 ISR status             0x3000 notifications          0x4800 MSI-X pending bits
//! ```
//!
//! The VIRTIO_PCI_CAP_PCI_CFG window (4.1.4.9) reaches the same regions through configuration space, for firmware that cannot map
//! the BAR. What registers mean is [`super::registers`]' affair.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use abi::pci::CAP_VENDOR;
use abi::virtio::pci::{CAP_COMMON_CFG, CAP_DEVICE_CFG, CAP_ISR_CFG, CAP_NOTIFY_CFG, CAP_PCI_CFG, common};
use abi::virtio::{PCI_DEVICE_BASE, PCI_REVISION, PCI_VENDOR, device_type};
use vmm::memory::GuestMemory;

use super::VirtioDevice;
use super::interrupt::{InterruptSink, Interrupts};
use super::registers::{Registers, RegistersState};
use crate::MsiSink;
use crate::pci::{BarKind, Msix, PciConfig, PciFunction, PciIdentity};
use crate::snapshot::{RestoreError, Saved, Snapshot};

/// Name and version in a [`Saved`] state.
const STATE: (&str, u32) = ("virtio", 1);

/// The BAR and its regions.
const BAR: u8 = 0;
const BAR_SIZE: u64 = 0x8000;
const REGION: u64 = 0x1000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PENDING: u32 = 0x4800;

/// Bytes between the notification addresses of two queues.
const NOTIFY_MULTIPLIER: u64 = 4;
/// Subsystem id of virtio devices that are not transitional, as QEMU's.
const SUBSYSTEM: u16 = 0x1100;

/// Offsets in a virtio capability (4.1.4).
mod capability {
    /// The BAR.
    pub const BAR: u8 = 4;
    /// Offset in the BAR.
    pub const OFFSET: u8 = 8;
    /// Length.
    pub const LENGTH: u8 = 12;
    /// Window of [`super::CAP_PCI_CFG`].
    pub const DATA: u8 = 16;
    /// Bytes of the window.
    pub const DATA_BYTES: u8 = 4;
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    config: Arc<PciConfig>,
    registers: Mutex<Registers>,
    interrupts: Arc<Interrupts>,
    /// Offset of the window's capability in configuration space.
    window: u8,
}

/// Where the device's interrupts go.
struct Wires {
    config: Arc<PciConfig>,
    msix: Arc<Msix>,
}

impl VirtioPci {
    /// `device` as a function that works on `memory` and sends its messages to `msi`.
    pub fn new(device: Box<dyn VirtioDevice>, memory: GuestMemory, msi: Arc<dyn MsiSink>) -> Arc<VirtioPci> {
        let queues = device.queue_sizes().len();
        let msix = Msix::new(queues as u16 + 1, msi);
        let config = Arc::new(configuration(device.device_type(), queues, &msix));
        let wires = Wires { config: Arc::clone(&config), msix };
        let interrupts = Arc::new(Interrupts::new(queues, Arc::new(wires)));
        let registers = Mutex::new(Registers::new(device, memory, Arc::clone(&interrupts)));
        // The window is the last of the vendor capabilities.
        let window = config.capability(CAP_VENDOR).last().copied().unwrap_or_default();
        Arc::new(VirtioPci { config, registers, interrupts, window })
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the window points at: offset in the BAR and length, if an access there is allowed (4.1.4.9.1).
    fn window_target(&self) -> Option<(u64, usize)> {
        let field = |offset| self.config.read_u32(self.window + offset);
        let (bar, offset, length) = (field(capability::BAR) as u8, field(capability::OFFSET), field(capability::LENGTH));
        let allowed = bar == BAR && matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length) && u64::from(offset) < BAR_SIZE;
        allowed.then_some((u64::from(offset), length as usize))
    }
}

impl PciFunction for VirtioPci {
    fn config(&self) -> &PciConfig {
        &self.config
    }

    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        let at = offset % REGION;
        match offset - at {
            COMMON => self.registers().read_common(at, data),
            ISR => {
                data.fill(0);
                if let (0, Some(byte)) = (at, data.first_mut()) {
                    *byte = self.interrupts.take_isr();
                }
            }
            DEVICE => self.registers().read_config(at, data),
            _ => data.fill(0),
        }
    }

    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        let at = offset % REGION;
        match offset - at {
            COMMON => self.registers().write_common(at, data),
            DEVICE => self.registers().write_config(at, data),
            // The address says which queue; drivers write its number there as well.
            NOTIFY if at.is_multiple_of(NOTIFY_MULTIPLIER) => self.registers().notify((at / NOTIFY_MULTIPLIER) as u16),
            _ => {}
        }
    }

    fn config_read(&self, offset: u8, data: &mut [u8]) -> bool {
        if !touches_window(self.window, offset, data.len()) {
            return false;
        }
        self.config.read(offset, data);
        let mut value = [0; capability::DATA_BYTES as usize];
        if let Some((target, length)) = self.window_target() {
            self.bar_read(BAR, target, &mut value[..length]);
        }
        let first = usize::from(self.window + capability::DATA);
        for (at, byte) in (usize::from(offset)..).zip(data) {
            if let Some(window) = at.checked_sub(first).and_then(|at| value.get(at)) {
                *byte = *window;
            }
        }
        true
    }

    fn config_written(&self, offset: u8, len: usize) {
        if touches_window(self.window, offset, len)
            && let Some((target, length)) = self.window_target()
        {
            let value = self.config.read_u32(self.window + capability::DATA).to_le_bytes();
            self.bar_write(BAR, target, &value[..length]);
        }
    }

    fn reset(&self) {
        self.registers().reset();
    }
}

impl Snapshot for VirtioPci {
    fn state(&self) -> Saved {
        Saved::new(STATE.0, STATE.1, &self.registers().state())
    }

    fn restore(&self, state: &Saved) -> Result<(), RestoreError> {
        let state: RegistersState = state.open(STATE.0, STATE.1)?;
        self.registers().restore(&state).map_err(|what| RestoreError::Impossible { device: STATE.0, what })
    }
}

impl InterruptSink for Wires {
    fn msix_enabled(&self) -> bool {
        self.msix.is_enabled()
    }

    fn message(&self, vector: u16) {
        self.msix.trigger(vector);
    }

    fn line(&self, asserted: bool) {
        self.config.set_intx(asserted);
    }
}

fn touches_window(window: u8, offset: u8, len: usize) -> bool {
    let first = usize::from(window + capability::DATA);
    usize::from(offset) < first + usize::from(capability::DATA_BYTES) && first < usize::from(offset) + len
}

fn configuration(kind: u16, queues: usize, msix: &Arc<Msix>) -> PciConfig {
    let identity = PciIdentity {
        vendor: PCI_VENDOR,
        device: PCI_DEVICE_BASE + kind,
        class: class(kind),
        revision: PCI_REVISION,
        subsystem_vendor: PCI_VENDOR,
        subsystem: SUBSYSTEM,
    };
    let notify_bytes = queues as u64 * NOTIFY_MULTIPLIER;
    let mut notify = structure(CAP_NOTIFY_CFG, NOTIFY, notify_bytes);
    notify.extend_from_slice(&(NOTIFY_MULTIPLIER as u32).to_le_bytes());
    notify[0] = notify.len() as u8 + 2;
    let mut window = structure(CAP_PCI_CFG, 0, 0);
    window.extend_from_slice(&[0; capability::DATA_BYTES as usize]);
    window[0] = window.len() as u8 + 2;
    // The guest writes BAR, offset, length and data.
    let mut window_writable = vec![0xff; window.len()];
    window_writable[..2].fill(0);
    window_writable[3..6].fill(0);
    PciConfig::new(identity)
        .with_bar(BAR, BarKind::Memory32, BAR_SIZE)
        .with_intx()
        .with_msix(Arc::clone(msix), BAR, MSIX_TABLE, MSIX_PENDING)
        .with_capability(CAP_VENDOR, &structure(CAP_COMMON_CFG, COMMON, common::SIZE), &[])
        .with_capability(CAP_VENDOR, &structure(CAP_ISR_CFG, ISR, 1), &[])
        .with_capability(CAP_VENDOR, &structure(CAP_DEVICE_CFG, DEVICE, REGION), &[])
        .with_capability(CAP_VENDOR, &notify, &[])
        .with_capability(CAP_VENDOR, &window, &window_writable)
}

/// The body of a virtio capability: its length, type, BAR, id, padding, offset and length in the BAR.
fn structure(kind: u8, offset: u64, length: u64) -> Vec<u8> {
    let mut body = vec![16, kind, BAR, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&(length as u32).to_le_bytes());
    body
}

/// Class code by device type, as QEMU gives them.
fn class(kind: u16) -> u32 {
    match kind {
        device_type::NET => 0x02_0000,
        device_type::BLOCK => 0x01_0000,
        device_type::CONSOLE => 0x07_8000,
        _ => 0x00_ff00,
    }
}

#[cfg(test)]
mod tests;
