//! How a virtio device reaches its driver: MSI-X messages, or the ISR byte and an INTx line (virtio 1.2 section 4.1.4.5).
//!
//! Shared by the transport (a vCPU's thread) and the workers. Its one lock is a leaf: it is held only to keep the ISR byte and
//! the line's level together.

use std::fmt::Display;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use abi::virtio::pci::{ISR_CONFIG, ISR_QUEUE, NO_VECTOR};
use serde::{Deserialize, Serialize};

/// What devices tell their driver.
pub trait Interrupt: Send + Sync {
    /// Queue `queue` has used buffers.
    fn queue_used(&self, queue: u16);
    /// Device configuration changed.
    fn config_changed(&self);
    /// The driver broke the rules so badly that only a reset helps; `why` is for the log.
    fn needs_reset(&self, why: &dyn Display);
}

/// Where interrupts of a transport go: the PCI function.
pub trait InterruptSink: Send + Sync {
    /// Whether messages are on; otherwise the line is used.
    fn msix_enabled(&self) -> bool;
    /// Sends the message of MSI-X table entry `vector`.
    fn message(&self, vector: u16);
    /// Sets the level of the INTx line.
    fn line(&self, asserted: bool);
}

/// Interrupt state of one device.
pub struct Interrupts {
    sink: Arc<dyn InterruptSink>,
    config_vector: AtomicU16,
    queue_vectors: Box<[AtomicU16]>,
    /// The ISR byte; the line changes under this lock.
    isr: Mutex<u8>,
    needs_reset: AtomicBool,
    /// Changes with the device configuration (4.1.4.3).
    generation: AtomicU8,
    complaints: AtomicU32,
}

/// Complaints about a driver that a person sees; a driver can cause as many as it likes.
const MAX_COMPLAINTS: u32 = 8;

/// [`Interrupts`] as plain data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptsState {
    /// Vector of configuration changes.
    pub config_vector: u16,
    /// Vectors by queue.
    pub queue_vectors: Vec<u16>,
    /// The ISR byte.
    pub isr: u8,
    /// DEVICE_NEEDS_RESET.
    pub needs_reset: bool,
}

impl Interrupts {
    /// Interrupts of a device with `queues` queues.
    pub fn new(queues: usize, sink: Arc<dyn InterruptSink>) -> Interrupts {
        Interrupts {
            sink,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: Mutex::new(0),
            needs_reset: AtomicBool::new(false),
            generation: AtomicU8::new(0),
            complaints: AtomicU32::new(0),
        }
    }

    /// Number of MSI-X vectors that make sense: one for each queue and one for configuration changes.
    pub fn vectors(&self) -> u16 {
        self.queue_vectors.len() as u16 + 1
    }

    /// Sets the vector of configuration changes; one that does not exist becomes [`NO_VECTOR`] (4.1.5.1.2).
    pub fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.checked(vector), Ordering::Release);
    }

    /// Vector of configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    /// Sets the vector of queue `queue`, like [`Interrupts::set_config_vector`].
    pub fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(usize::from(queue)) {
            slot.store(self.checked(vector), Ordering::Release);
        }
    }

    /// Vector of queue `queue`.
    pub fn queue_vector(&self, queue: u16) -> u16 {
        self.queue_vectors.get(usize::from(queue)).map_or(NO_VECTOR, |slot| slot.load(Ordering::Acquire))
    }

    /// Configuration generation.
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    /// Reads the ISR byte, which clears it and drops the line.
    pub fn take_isr(&self) -> u8 {
        let mut isr = self.isr();
        let value = std::mem::take(&mut *isr);
        self.sink.line(false);
        value
    }

    /// Whether DEVICE_NEEDS_RESET is set.
    pub fn is_broken(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// Back to the beginning.
    pub fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        self.queue_vectors.iter().for_each(|slot| slot.store(NO_VECTOR, Ordering::Release));
        self.needs_reset.store(false, Ordering::Release);
        self.take_isr();
    }

    /// All of it as plain data.
    pub fn state(&self) -> InterruptsState {
        InterruptsState {
            config_vector: self.config_vector(),
            queue_vectors: (0..self.queue_vectors.len()).map(|queue| self.queue_vector(queue as u16)).collect(),
            isr: *self.isr(),
            needs_reset: self.is_broken(),
        }
    }

    /// Takes over `state`.
    pub fn restore(&self, state: &InterruptsState) {
        self.set_config_vector(state.config_vector);
        for (queue, vector) in state.queue_vectors.iter().enumerate().take(self.queue_vectors.len()) {
            self.set_queue_vector(queue as u16, *vector);
        }
        self.needs_reset.store(state.needs_reset, Ordering::Release);
        self.take_isr();
        if state.isr != 0 {
            self.raise_line(state.isr);
        }
    }

    fn checked(&self, vector: u16) -> u16 {
        if vector < self.vectors() { vector } else { NO_VECTOR }
    }

    fn isr(&self) -> MutexGuard<'_, u8> {
        self.isr.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn raise_line(&self, bits: u8) {
        let mut isr = self.isr();
        *isr |= bits;
        self.sink.line(true);
    }

    fn raise(&self, vector: u16, isr: u8) {
        if self.sink.msix_enabled() {
            if vector != NO_VECTOR {
                self.sink.message(vector);
            }
        } else {
            self.raise_line(isr);
        }
    }
}

impl Interrupt for Interrupts {
    fn queue_used(&self, queue: u16) {
        self.raise(self.queue_vector(queue), ISR_QUEUE);
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(self.config_vector(), ISR_CONFIG);
    }

    fn needs_reset(&self, why: &dyn Display) {
        if self.complaints.fetch_add(1, Ordering::Relaxed) < MAX_COMPLAINTS {
            tracing::warn!(%why, "virtio: device needs a reset");
        }
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            self.config_changed();
        }
    }
}
