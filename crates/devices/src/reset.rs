//! The chip set's own ways to reset: port 0x92 (system control port A) and port 0xcf9 (reset control).
//!
//! IBM PS/2 Technical Reference for the first, Intel 82371SB (PIIX3) data sheet section 2.7 for the second. A20 is always open;
//! its bit in port 0x92 only remembers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::snapshot::{RestoreError, Saved, Snapshot};
use crate::{DeviceMap, MachineEvents, PortDevice};

/// Name and version in a [`Saved`] state.
const STATE: (&str, u32) = ("reset", 1);
const CONTROL_A: u16 = 0x92;
const CONTROL_A_RESET: u8 = 1;
const CONTROL_A_A20: u8 = 2;
/// Port of the reset control register; the FADT names it.
pub const RESET_CONTROL: u16 = 0xcf9;
/// What to write there: a hard reset.
pub const RESET_VALUE: u8 = 6;
const RESET_CPU: u8 = 4;

/// Both ports.
pub struct ResetPorts {
    events: Arc<dyn MachineEvents>,
    control_a: AtomicU8,
    reset_control: AtomicU8,
}

impl ResetPorts {
    /// Power-on state.
    pub fn new(events: Arc<dyn MachineEvents>) -> Arc<ResetPorts> {
        Arc::new(ResetPorts { events, control_a: AtomicU8::new(CONTROL_A_A20), reset_control: AtomicU8::new(0) })
    }

    /// Puts the ports into `map`, after the PCI bus, among whose ports one of them is.
    pub fn map(self: &Arc<Self>, map: &mut DeviceMap) {
        map.add_ports(CONTROL_A..=CONTROL_A, self.clone());
        map.add_ports(RESET_CONTROL..=RESET_CONTROL, self.clone());
    }

    /// Power-on state.
    pub fn reset(&self) {
        self.control_a.store(CONTROL_A_A20, Ordering::Relaxed);
        self.reset_control.store(0, Ordering::Relaxed);
    }
}

impl PortDevice for ResetPorts {
    fn port_in(&self, port: u16, size: u8) -> u32 {
        let register = if port == CONTROL_A { &self.control_a } else { &self.reset_control };
        crate::ports::read_bytes(port, size, |at| if at == port { register.load(Ordering::Relaxed) } else { 0xff })
    }

    fn port_out(&self, port: u16, _size: u8, value: u32) {
        let value = value as u8;
        let reset = if port == CONTROL_A {
            let old = self.control_a.swap(value & (CONTROL_A_A20 | CONTROL_A_RESET), Ordering::Relaxed);
            value & !old & CONTROL_A_RESET != 0
        } else {
            let old = self.reset_control.swap(value & RESET_VALUE, Ordering::Relaxed);
            value & !old & RESET_CPU != 0
        };
        if reset {
            self.events.reset();
        }
    }
}

impl Snapshot for ResetPorts {
    fn state(&self) -> Saved {
        Saved::new(STATE.0, STATE.1, &(self.control_a.load(Ordering::Relaxed), self.reset_control.load(Ordering::Relaxed)))
    }

    fn restore(&self, state: &Saved) -> Result<(), RestoreError> {
        let (control_a, reset_control) = state.open(STATE.0, STATE.1)?;
        self.control_a.store(control_a, Ordering::Relaxed);
        self.reset_control.store(reset_control, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Events;

    #[test]
    fn reset_control_acts_on_the_rising_bit_as_linux_writes_it() {
        let events = Arc::new(Events::default());
        let ports = ResetPorts::new(events.clone());
        ports.port_out(RESET_CONTROL, 1, 0x02);
        assert!(events.take().is_empty());
        ports.port_out(RESET_CONTROL, 1, 0x06);
        assert_eq!(events.take(), ["reset"]);
    }

    #[test]
    fn port_92_opens_a20_or_resets() {
        let events = Arc::new(Events::default());
        let ports = ResetPorts::new(events.clone());
        assert_eq!(ports.port_in(CONTROL_A, 1), 2);
        ports.port_out(CONTROL_A, 1, 2);
        assert!(events.take().is_empty());
        ports.port_out(CONTROL_A, 1, 3);
        assert_eq!(events.take(), ["reset"]);
        let other = ResetPorts::new(events);
        other.restore(&ports.state()).unwrap();
        assert_eq!(other.port_in(CONTROL_A, 1), 3);
    }
}
