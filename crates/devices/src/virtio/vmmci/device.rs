//! The function and its registers: the legacy header of 20 bytes, then the device's configuration, all in I/O BAR 0.
//!
//! Reads give bytes out of one picture of the registers, so that any width at any offset is right: OpenBSD reads 64-bit fields as two
//! halves, the upper one first (`virtio_pci_read_device_config_8`), Linux' legacy transport byte by byte.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use abi::openbsd::vmmci as words;
use abi::virtio::pci::legacy;
use abi::virtio::status;
use serde::{Deserialize, Serialize};
use vmm::time::{Timer, TimerClient, Timers};

use super::super::interrupt::{Interrupt, InterruptSink, Interrupts, InterruptsState};
use super::super::read_config_bytes;
use super::conversation::{Action, Conversation, Event, Request};
use crate::MachineEvents;
use crate::pci::{BarKind, PciConfig, PciFunction, PciIdentity};
use crate::snapshot::{RestoreError, Saved, Snapshot};

/// Name and version in a [`Saved`] state.
const STATE: (&str, u32) = ("vmmci", 1);
const BAR: u8 = 0;
const HEADER: usize = legacy::DEVICE_CONFIG as usize;
const SIZE: usize = HEADER + words::CONFIG_SIZE;
const FEATURES: u32 = words::F_TIMESYNC | words::F_ACK | words::F_SYNCRTC;
/// The seconds and the microseconds in the BAR.
const SECONDS: Range<usize> = HEADER + words::TIME_SEC as usize..HEADER + words::TIME_USEC as usize;
const TIME: Range<usize> = SECONDS.start..SIZE;

/// Why a request does not reach the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// No driver.
    #[error("the guest has no running vmmci driver")]
    NoDriver,
    /// The driver is of a kind that does not know the request.
    #[error("the guest's vmmci driver cannot set its clock")]
    Unsupported,
    /// The guest acknowledged an earlier request, or powers down by itself.
    #[error("the guest is going down already")]
    GoingDown,
}

/// The control device.
pub struct Vmmci {
    config: Arc<PciConfig>,
    interrupts: Interrupts,
    events: Arc<dyn MachineEvents>,
    timers: Arc<Timers>,
    timer: OnceLock<Timer>,
    registers: Mutex<Registers>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    status: u8,
    driver_features: u32,
    queue_select: u16,
    conversation: Conversation,
    time: Latch,
}

/// The time of day that the guest is reading.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Latch {
    wall: Duration,
    /// Which bytes of the seconds have been read of it. Reading one of them again is the beginning of a new reading.
    seen: u8,
}

#[derive(Serialize, Deserialize)]
struct State {
    registers: Registers,
    interrupts: InterruptsState,
}

impl Vmmci {
    /// The device. A guest that lets a time limit pass is ended by `events`.
    pub fn new(timers: Arc<Timers>, events: Arc<dyn MachineEvents>) -> Arc<Vmmci> {
        let config = Arc::new(
            PciConfig::new(PciIdentity {
                vendor: words::PCI_VENDOR,
                device: words::PCI_PRODUCT,
                class: words::PCI_CLASS,
                // Legacy devices have revision 0 (virtio 1.2 section 4.1.2.3).
                revision: 0,
                subsystem_vendor: words::PCI_VENDOR,
                subsystem: words::DEVICE_TYPE,
            })
            .with_bar(BAR, BarKind::Io, SIZE as u64)
            .with_intx(),
        );
        let interrupts = Interrupts::new(0, Arc::new(Wire(Arc::clone(&config))));
        let registers = Mutex::default();
        let vmmci = Arc::new(Vmmci { config, interrupts, events, timers, timer: OnceLock::new(), registers });
        let weak: Weak<dyn TimerClient> = Arc::<Vmmci>::downgrade(&vmmci);
        let _ = vmmci.timer.set(vmmci.timers.timer(weak, 0));
        vmmci
    }

    /// Asks the guest for something. What becomes of it is in [`Vmmci::conversation`].
    ///
    /// # Errors
    /// [`RequestError`] when the guest cannot be asked.
    pub fn request(&self, request: Request) -> Result<(), RequestError> {
        let mut registers = self.lock();
        if registers.status & status::DRIVER_OK == 0 {
            return Err(RequestError::NoDriver);
        }
        if request == Request::SyncRtc && registers.driver_features & words::F_SYNCRTC == 0 {
            return Err(RequestError::Unsupported);
        }
        let acknowledges = registers.driver_features & words::F_ACK != 0;
        match self.on(&mut registers, Event::Request { request, acknowledges }) {
            Action::Refuse => return Err(RequestError::GoingDown),
            Action::Interrupt => self.interrupts.config_changed(),
            _ => {}
        }
        Ok(())
    }

    /// Whether a driver runs in the guest.
    pub fn has_driver(&self) -> bool {
        self.lock().status & status::DRIVER_OK != 0
    }

    /// Where host and guest stand.
    pub fn conversation(&self) -> Conversation {
        self.lock().conversation
    }

    fn on(&self, registers: &mut Registers, event: Event) -> Action {
        let action = registers.conversation.on(event, self.timers.clock().now());
        self.arm(registers.conversation.deadline());
        action
    }

    fn arm(&self, deadline: Option<u64>) {
        if let Some(&timer) = self.timer.get() {
            self.timers.arm(timer, deadline);
        }
    }

    fn write_status(&self, registers: &mut Registers, value: u8) {
        if value == 0 {
            // The driver's half. What host and guest agreed on, and its time limit, outlasts a driver that is taken down.
            *registers = Registers { conversation: registers.conversation, ..Registers::default() };
            self.interrupts.reset();
        } else {
            registers.status = value;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers {
    /// The registers as bytes; the ISR byte, whose reading has an effect, is left zero.
    fn picture(&self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        let mut put = |at: u64, value: &[u8]| bytes[at as usize..at as usize + value.len()].copy_from_slice(value);
        put(legacy::DEVICE_FEATURES, &FEATURES.to_le_bytes());
        put(legacy::DRIVER_FEATURES, &self.driver_features.to_le_bytes());
        put(legacy::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        put(legacy::DEVICE_STATUS, &[self.status]);
        put(legacy::DEVICE_CONFIG + words::COMMAND, &self.conversation.command().to_le_bytes());
        put(legacy::DEVICE_CONFIG + words::TIME_SEC, &self.time.wall.as_secs().to_le_bytes());
        put(legacy::DEVICE_CONFIG + words::TIME_USEC, &u64::from(self.time.wall.subsec_micros()).to_le_bytes());
        bytes
    }
}

impl Latch {
    /// The bytes `read` of the BAR are about to be read: takes the time anew when that begins a new reading.
    fn reading(&mut self, read: &Range<usize>, now: impl FnOnce() -> Duration) {
        let seconds = SECONDS.filter(|at| read.contains(at)).fold(0, |mask, at| mask | 1 << (at - SECONDS.start));
        if self.seen & seconds != 0 || self.seen == 0 {
            *self = Latch { wall: now(), seen: 0 };
        }
        self.seen |= seconds;
    }
}

impl PciFunction for Vmmci {
    fn config(&self) -> &PciConfig {
        &self.config
    }

    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        let offset = usize::try_from(offset).unwrap_or(SIZE);
        let read = offset..offset.saturating_add(data.len());
        let mut registers = self.lock();
        if read.start < TIME.end && TIME.start < read.end {
            registers.time.reading(&read, || self.timers.clock().wall());
        }
        read_config_bytes(&registers.picture(), offset, data);
        drop(registers);
        let isr = (legacy::ISR_STATUS as usize).checked_sub(offset);
        if let Some(byte) = isr.and_then(|at| data.get_mut(at)) {
            *byte = self.interrupts.take_isr();
        }
    }

    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        const COMMAND: u64 = legacy::DEVICE_CONFIG + words::COMMAND;
        let mut bytes = [0; 4];
        bytes[..data.len().min(4)].copy_from_slice(&data[..data.len().min(4)]);
        let value = u32::from_le_bytes(bytes);
        let mut registers = self.lock();
        match (offset, data.len()) {
            (legacy::DRIVER_FEATURES, 4) => registers.driver_features = value & FEATURES,
            (legacy::QUEUE_SELECT, 2) => registers.queue_select = value as u16,
            (legacy::DEVICE_STATUS, 1) => self.write_status(&mut registers, value as u8),
            // Commands fit into a byte, and a driver that writes the register byte by byte writes the others as zeros.
            (COMMAND, _) => {
                self.on(&mut registers, Event::Written(value));
            }
            _ => {}
        }
    }

    fn reset(&self) {
        *self.lock() = Registers::default();
        self.arm(None);
        self.interrupts.reset();
    }
}

impl TimerClient for Vmmci {
    fn timer_due(&self, _token: u64) {
        let action = self.on(&mut self.lock(), Event::Tick);
        match action {
            Action::PowerOff => self.events.power_off(),
            Action::Reset => self.events.reset(),
            _ => {}
        }
    }
}

impl Snapshot for Vmmci {
    fn state(&self) -> Saved {
        let state = State { registers: self.lock().clone(), interrupts: self.interrupts.state() };
        Saved::new(STATE.0, STATE.1, &state)
    }

    fn restore(&self, state: &Saved) -> Result<(), RestoreError> {
        let State { registers, interrupts } = state.open(STATE.0, STATE.1)?;
        self.arm(registers.conversation.deadline());
        *self.lock() = registers;
        self.interrupts.restore(&interrupts);
        Ok(())
    }
}

/// The INTx line; there is no MSI-X.
struct Wire(Arc<PciConfig>);

impl InterruptSink for Wire {
    fn msix_enabled(&self) -> bool {
        false
    }

    fn message(&self, _vector: u16) {}

    fn line(&self, asserted: bool) {
        self.0.set_intx(asserted);
    }
}
