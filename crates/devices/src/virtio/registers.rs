//! The registers of a virtio device as its driver sees them through PCI (virtio 1.2 section 4.1.4), without the PCI.
//!
//! [`Registers`] owns the device and everything a driver can write: feature selection, device status, queue registers. Each
//! write is checked against the step of initialisation ([`super::status`]): features freeze at FEATURES_OK, queue registers at
//! DRIVER_OK or when the queue is enabled; what comes too early or too late is ignored, as the specification lets a device do.

use std::sync::Arc;

use abi::virtio::pci::common;
use abi::virtio::{feature, status};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_queue::QueueState;
use vmm::memory::GuestMemory;

use super::interrupt::{Interrupt, Interrupts, InterruptsState};
use super::queue::{Ring, RingPosition};
use super::status::{Action, DeviceStatus};
use super::{Activation, VirtioDevice};

/// Features that every device here has from its transport.
const TRANSPORT_FEATURES: u64 = feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC;

/// A device and its registers.
pub struct Registers {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    interrupts: Arc<Interrupts>,
    status: DeviceStatus,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

/// Registers of one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct QueueRegisters {
    size: u16,
    enabled: bool,
    descriptors: u64,
    driver_area: u64,
    device_area: u64,
}

impl QueueRegisters {
    fn new(size: u16) -> QueueRegisters {
        QueueRegisters { size, enabled: false, descriptors: 0, driver_area: 0, device_area: 0 }
    }
}

/// [`Registers`] and its device as plain data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RegistersState {
    device_type: u16,
    status: DeviceStatus,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    positions: Vec<Option<RingPosition>>,
    interrupts: InterruptsState,
    device: Value,
}

impl Registers {
    /// `device` after power on.
    pub fn new(device: Box<dyn VirtioDevice>, memory: GuestMemory, interrupts: Arc<Interrupts>) -> Registers {
        let queues = device.queue_sizes().iter().map(|&size| QueueRegisters::new(size)).collect();
        Registers {
            device,
            memory,
            interrupts,
            status: DeviceStatus::default(),
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
        }
    }

    /// Read of the common configuration structure.
    pub fn read_common(&self, offset: u64, data: &mut [u8]) {
        let mut bytes = [0u8; common::SIZE as usize];
        let mut put = |at: u64, value: &[u8]| bytes[at as usize..at as usize + value.len()].copy_from_slice(value);
        put(common::DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        put(common::DEVICE_FEATURE, &half(self.features(), self.device_feature_select).to_le_bytes());
        put(common::DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        put(common::DRIVER_FEATURE, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(common::CONFIG_MSIX_VECTOR, &self.interrupts.config_vector().to_le_bytes());
        put(common::NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(common::DEVICE_STATUS, &[self.status_bits()]);
        put(common::CONFIG_GENERATION, &[self.interrupts.generation()]);
        put(common::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        // A queue that does not exist has size 0 (4.1.4.3.1).
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(common::QUEUE_SIZE, &queue.size.to_le_bytes());
            put(common::QUEUE_MSIX_VECTOR, &self.interrupts.queue_vector(self.queue_select).to_le_bytes());
            put(common::QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(common::QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(common::QUEUE_DESC, &queue.descriptors.to_le_bytes());
            put(common::QUEUE_DRIVER, &queue.driver_area.to_le_bytes());
            put(common::QUEUE_DEVICE, &queue.device_area.to_le_bytes());
        }
        super::read_config_bytes(&bytes, usize::try_from(offset).unwrap_or(usize::MAX), data);
    }

    /// Write to the common configuration structure. Fields are written whole; 64-bit ones also in halves (4.1.3.1).
    pub fn write_common(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = [0u8; 8];
        if data.len() > bytes.len() {
            return;
        }
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            (common::DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = value as u32,
            (common::DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = value as u32,
            (common::DRIVER_FEATURE, 4) => self.write_driver_feature(value as u32),
            (common::CONFIG_MSIX_VECTOR, 2) => self.interrupts.set_config_vector(value as u16),
            (common::DEVICE_STATUS, 1) => self.write_status(value as u8),
            (common::QUEUE_SELECT, 2) => self.queue_select = value as u16,
            (common::QUEUE_SIZE..common::SIZE, len) => self.write_queue(offset, len, value),
            _ => tracing::debug!(offset, len = data.len(), "virtio: write to no register"),
        }
    }

    /// Read of the device configuration.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(usize::try_from(offset).unwrap_or(usize::MAX), data);
    }

    /// Write to the device configuration.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(usize::try_from(offset).unwrap_or(usize::MAX), data);
    }

    /// Queue notification.
    pub fn notify(&mut self, queue: u16) {
        let enabled = self.queues.get(usize::from(queue)).is_some_and(|queue| queue.enabled);
        if enabled && self.status.is_running() {
            self.device.notify(queue);
        }
    }

    /// Device status as read.
    pub fn status_bits(&self) -> u8 {
        let broken = if self.interrupts.is_broken() { status::DEVICE_NEEDS_RESET } else { 0 };
        self.status.bits() | broken
    }

    /// Everything back to power on.
    pub fn reset(&mut self) {
        self.write_status(0);
    }

    /// Device and registers as plain data. A running device stops for the moment it takes.
    pub fn state(&mut self) -> RegistersState {
        let rings = if self.status.is_running() { self.device.deactivate() } else { Vec::new() };
        let positions = rings.iter().map(|ring| ring.as_ref().map(Ring::position)).collect();
        let state = RegistersState {
            device_type: self.device.device_type(),
            status: self.status,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            queues: self.queues.clone(),
            positions,
            interrupts: self.interrupts.state(),
            device: self.device.state(),
        };
        if self.status.is_running() {
            self.activate(rings);
        }
        state
    }

    /// Takes over `state`; a device that ran runs again.
    ///
    /// # Errors
    /// What does not fit this device; nothing changed then.
    pub fn restore(&mut self, state: &RegistersState) -> Result<(), &'static str> {
        if state.device_type != self.device.device_type() || state.queues.len() != self.queues.len() {
            return Err("it is of another type of device");
        }
        if state.driver_features & !self.features() != 0 {
            return Err("its driver uses features that this device does not offer");
        }
        let rings = if self.status.is_running() { self.device.deactivate() } else { Vec::new() };
        if let Err(what) = self.device.restore(&state.device) {
            if self.status.is_running() {
                self.activate(rings);
            }
            return Err(what);
        }
        self.status = state.status;
        self.device_feature_select = state.device_feature_select;
        self.driver_feature_select = state.driver_feature_select;
        self.driver_features = state.driver_features;
        self.queue_select = state.queue_select;
        self.queues.clone_from(&state.queues);
        self.interrupts.restore(&state.interrupts);
        if self.status.is_running() {
            let rings = if self.interrupts.is_broken() { None } else { self.make_rings(&state.positions) };
            self.activate_or_break(rings);
        }
        Ok(())
    }

    fn features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn write_driver_feature(&mut self, value: u32) {
        if !self.status.takes_features() {
            return;
        }
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
            1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    fn write_status(&mut self, value: u8) {
        let wanted = self.driver_features;
        let fit = wanted & !self.features() == 0 && wanted & feature::VERSION_1 != 0;
        let was_running = self.status.is_running();
        match self.status.write(value, fit) {
            Action::None => {}
            Action::Reset => {
                if was_running {
                    drop(self.device.deactivate());
                }
                self.device.reset();
                self.device_feature_select = 0;
                self.driver_feature_select = 0;
                self.driver_features = 0;
                self.queue_select = 0;
                self.queues = self.device.queue_sizes().iter().map(|&size| QueueRegisters::new(size)).collect();
                self.interrupts.reset();
            }
            Action::Activate => {
                let rings = self.make_rings(&[]);
                self.activate_or_break(rings);
            }
        }
    }

    fn write_queue(&mut self, offset: u64, len: usize, value: u64) {
        let max = self.device.queue_sizes().get(usize::from(self.queue_select)).copied();
        let (Some(queue), Some(max)) = (self.queues.get_mut(usize::from(self.queue_select)), max) else { return };
        if !self.status.takes_queues() {
            tracing::debug!(offset, "virtio: write to a queue register outside of queue setup");
            return;
        }
        if (offset, len) == (common::QUEUE_MSIX_VECTOR, 2) {
            self.interrupts.set_queue_vector(self.queue_select, value as u16);
            return;
        }
        if queue.enabled {
            return;
        }
        match (offset, len) {
            (common::QUEUE_SIZE, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= max {
                    queue.size = size;
                }
            }
            (common::QUEUE_ENABLE, 2) => queue.enabled = value == 1,
            _ => {
                for (base, field) in [
                    (common::QUEUE_DESC, &mut queue.descriptors),
                    (common::QUEUE_DRIVER, &mut queue.driver_area),
                    (common::QUEUE_DEVICE, &mut queue.device_area),
                ] {
                    match (offset.wrapping_sub(base), len) {
                        (0, 8) => *field = value,
                        (0, 4) => *field = *field & !0xffff_ffff | value,
                        (4, 4) => *field = *field & 0xffff_ffff | value << 32,
                        _ => {}
                    }
                }
            }
        }
    }

    /// Rings of the enabled queues, at `positions` or at the beginning; `None` when one cannot be.
    fn make_rings(&self, positions: &[Option<RingPosition>]) -> Option<Vec<Option<Ring>>> {
        let mut rings = Vec::with_capacity(self.queues.len());
        for (index, (queue, &max_size)) in self.queues.iter().zip(self.device.queue_sizes()).enumerate() {
            if !queue.enabled {
                rings.push(None);
                continue;
            }
            let position = positions.get(index).copied().flatten().unwrap_or(RingPosition { next_avail: 0, next_used: 0 });
            let state = QueueState {
                max_size,
                next_avail: position.next_avail,
                next_used: position.next_used,
                event_idx_enabled: self.driver_features & feature::EVENT_IDX != 0,
                size: queue.size,
                ready: true,
                desc_table: queue.descriptors,
                avail_ring: queue.driver_area,
                used_ring: queue.device_area,
            };
            let interrupt: Arc<dyn Interrupt> = self.interrupts.clone();
            match Ring::new(index as u16, state, Arc::clone(&self.memory), interrupt) {
                Ok(ring) => rings.push(Some(ring)),
                Err(error) => {
                    self.interrupts.needs_reset(&error);
                    return None;
                }
            }
        }
        Some(rings)
    }

    fn activate_or_break(&mut self, rings: Option<Vec<Option<Ring>>>) {
        match rings {
            Some(rings) => self.activate(rings),
            // Activated without rings, so that there is always something to deactivate.
            None => self.activate(self.queues.iter().map(|_| None).collect()),
        }
    }

    fn activate(&mut self, rings: Vec<Option<Ring>>) {
        let activation =
            Activation { memory: Arc::clone(&self.memory), features: self.driver_features, rings, interrupt: self.interrupts.clone() };
        if let Err(error) = self.device.activate(activation) {
            self.interrupts.needs_reset(&format_args!("the host has no thread for it: {error}"));
        }
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
