//! Virtio 1.2 devices on PCI: block, network, entropy, console; and, apart from them, OpenBSD's [`vmmci`], which is virtio 0.9.
//!
//! A device is a [`VirtioDevice`]: what it offers, its configuration bytes, and what it does with its rings between activation
//! (the driver set DRIVER_OK) and deactivation (reset, or a snapshot). The transport in front of it owns all registers that a
//! driver writes, and checks them; a device sees only what passed. Workers run on their own threads, woken by doorbells, and
//! answer through [`Interrupt`], which never takes the transport's lock, so that a reset may wait for a worker.
//!
//! ```text
//!   vCPU --MMIO--> transport --activate(rings)--> device --> worker thread --> disk, network
//!                     | notify(queue) ------------^             |
//!   vCPU <--MSI-X/INTx-- interrupts <---------------------------+
//! ```
//!
//! Specification: "Virtual I/O Device (VIRTIO) Version 1.2", OASIS. Split rings only. Rings are `virtio-queue`'s, under
//! [`queue::Ring`], which also finds what that crate lets pass.

pub mod block;
pub mod console;
#[cfg(test)]
pub(crate) mod driver;
pub mod interrupt;
pub mod net;
pub mod queue;
pub mod registers;
pub mod rng;
pub mod status;
pub mod transport;
pub mod vmmci;
pub mod worker;

use std::sync::Arc;

use serde_json::Value;
use vmm::memory::GuestMemory;

pub use transport::VirtioPci;

use interrupt::Interrupt;
use queue::Ring;

/// The device half of a virtio device.
pub trait VirtioDevice: Send {
    /// Device type (section 5), one of [`abi::virtio::device_type`].
    fn device_type(&self) -> u16;

    /// Features that belong to this type; the transport adds its own.
    fn features(&self) -> u64;

    /// Largest size of each queue: powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Reads device configuration at `offset`; bytes past its end read as zero.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// Writes device configuration.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready: work on the rings begins. What is already on them has to be looked at, too.
    ///
    /// # Errors
    /// What the host refused (a thread); the driver is told that the device needs a reset.
    fn activate(&mut self, activation: Activation) -> std::io::Result<()>;

    /// The driver put buffers on queue `queue`. Only called between activation and deactivation.
    fn notify(&mut self, queue: u16);

    /// Work on the rings ends before this returns; nothing of the guest's memory is touched afterwards. Hands the rings back, by
    /// queue number; a snapshot activates again with them.
    fn deactivate(&mut self) -> Vec<Option<Ring>>;

    /// The driver reset the device: whatever it negotiated is forgotten. Comes after [`VirtioDevice::deactivate`].
    fn reset(&mut self) {}

    /// State beyond registers and rings.
    fn state(&self) -> Value {
        Value::Null
    }

    /// Takes over what [`VirtioDevice::state`] said.
    ///
    /// # Errors
    /// What is wrong with it; nothing changed then.
    fn restore(&mut self, state: &Value) -> Result<(), &'static str> {
        let _ = state;
        Ok(())
    }
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// Features that were negotiated.
    pub features: u64,
    /// Rings by queue number; `None` where the driver did not enable the queue.
    pub rings: Vec<Option<Ring>>,
    /// For configuration changes and giving up.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Copies `config[offset..]` into `data`, as far as both go; the rest of `data` becomes zero.
pub(crate) fn read_config_bytes(config: &[u8], offset: usize, data: &mut [u8]) {
    data.fill(0);
    let tail = config.get(offset..).unwrap_or_default();
    let len = tail.len().min(data.len());
    data[..len].copy_from_slice(&tail[..len]);
}
