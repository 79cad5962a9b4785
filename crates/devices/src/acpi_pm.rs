//! ACPI fixed hardware: power management events and control (PM1a), and the power management timer.
//!
//! ACPI 6.5 section 4.8.3. The machine is always in ACPI mode (the FADT has no SMI command). Sleep type 5 switches off; other
//! sleep states do not exist. The power button is the fixed-feature one and speaks by the system control interrupt.
//! The timer counts at 3.579545 MHz, 32 bits wide; its overflow interrupt is not there, as no system uses it.

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm::time::Clock;

use crate::ports::{read_bytes, write_bytes};
use crate::snapshot::{RestoreError, Saved, Snapshot};
use crate::{DeviceMap, InterruptLine, MachineEvents, PortDevice};

/// Name and version in a [`Saved`] state.
const STATE: (&str, u32) = ("acpi-pm", 1);
/// PM1a event block: status, then enable, 16 bits each.
pub const PM1_EVENT: u16 = 0x600;
/// PM1a control block.
pub const PM1_CONTROL: u16 = 0x604;
/// The timer.
pub const PM_TIMER: u16 = 0x608;
const PORTS: RangeInclusive<u16> = PM1_EVENT..=PM_TIMER + 3;
/// Sleep type that switches off; the DSDT's `_S5` says so.
pub const SLEEP_TYPE_OFF: u8 = 5;

/// Frequency of the timer.
const TIMER_HZ: u128 = 3_579_545;
const POWER_BUTTON: u16 = 1 << 8;
/// Status and enable bits that exist: global lock release, power button, and the RTC alarm, which is only ever enabled: without
/// sleep states it has nothing to wake.
const EVENTS: u16 = 1 << 5 | POWER_BUTTON | 1 << 10;
const SCI_ENABLE: u16 = 1;
const SLEEP_TYPE_SHIFT: u32 = 10;
const SLEEP_ENABLE: u16 = 1 << 13;
/// Control bits that are remembered: sleep type.
const CONTROL: u16 = 7 << SLEEP_TYPE_SHIFT;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    status: u16,
    enable: u16,
    control: u16,
}

/// PM1a and the timer.
pub struct AcpiPm {
    clock: Arc<dyn Clock>,
    sci: Arc<dyn InterruptLine>,
    events: Arc<dyn MachineEvents>,
    registers: Mutex<Registers>,
}

impl AcpiPm {
    /// Power-on state; `sci` is the line of [`crate::interrupts::SCI_IRQ`].
    pub fn new(clock: Arc<dyn Clock>, sci: Arc<dyn InterruptLine>, events: Arc<dyn MachineEvents>) -> Arc<AcpiPm> {
        Arc::new(AcpiPm { clock, sci, events, registers: Mutex::default() })
    }

    /// Puts the ports into `map`.
    pub fn map(self: &Arc<Self>, map: &mut DeviceMap) {
        map.add_ports(PORTS, self.clone());
    }

    /// Somebody pressed the power button.
    pub fn press_power_button(&self) {
        let mut registers = self.lock();
        registers.status |= POWER_BUTTON;
        self.update(&registers);
    }

    /// Whether the guest wants to know of the power button.
    pub fn button_is_enabled(&self) -> bool {
        self.lock().enable & POWER_BUTTON != 0
    }

    /// Power-on state.
    pub fn reset(&self) {
        let mut registers = self.lock();
        *registers = Registers::default();
        self.update(&registers);
    }

    fn timer(&self) -> u32 {
        (u128::from(self.clock.now()) * TIMER_HZ / 1_000_000_000) as u32
    }

    fn update(&self, registers: &Registers) {
        self.sci.set(registers.status & registers.enable & EVENTS != 0);
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PortDevice for AcpiPm {
    fn port_in(&self, port: u16, size: u8) -> u32 {
        let (registers, timer) = (*self.lock(), self.timer());
        read_bytes(port, size, |port| {
            let byte = usize::from(port & 1);
            match port & !1 {
                PM1_EVENT => registers.status.to_le_bytes()[byte],
                0x602 => registers.enable.to_le_bytes()[byte],
                PM1_CONTROL => (registers.control | SCI_ENABLE).to_le_bytes()[byte],
                PM_TIMER | 0x60a => timer.to_le_bytes()[usize::from(port & 3)],
                _ if PORTS.contains(&port) => 0,
                _ => 0xff,
            }
        })
    }

    fn port_out(&self, port: u16, size: u8, value: u32) {
        let mut off = false;
        let mut registers = self.lock();
        write_bytes(port, size, value, |port, byte| {
            let shift = 8 * (port & 1);
            let (bits, mask) = (u16::from(byte) << shift, 0xff << shift);
            match port & !1 {
                PM1_EVENT => registers.status &= !bits,
                0x602 => registers.enable = (registers.enable & !mask | bits) & EVENTS,
                PM1_CONTROL => {
                    registers.control = (registers.control & !mask | bits) & CONTROL;
                    off |= bits & SLEEP_ENABLE != 0 && registers.control >> SLEEP_TYPE_SHIFT == u16::from(SLEEP_TYPE_OFF);
                }
                _ => {}
            }
        });
        self.update(&registers);
        drop(registers);
        if off {
            self.events.power_off();
        }
    }
}

impl Snapshot for AcpiPm {
    fn state(&self) -> Saved {
        Saved::new(STATE.0, STATE.1, &*self.lock())
    }

    fn restore(&self, state: &Saved) -> Result<(), RestoreError> {
        let new = state.open(STATE.0, STATE.1)?;
        let mut registers = self.lock();
        *registers = new;
        self.update(&registers);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Events, Level, Time};

    fn pm() -> (Arc<AcpiPm>, Time, Arc<Level>, Arc<Events>) {
        let (time, sci, events) = (Time::new(Duration::ZERO), Arc::new(Level::default()), Arc::new(Events::default()));
        (AcpiPm::new(time.clock.clone(), sci.clone(), events.clone()), time, sci, events)
    }

    #[test]
    fn timer_counts_at_its_frequency() {
        let (pm, time, _, _) = pm();
        time.advance(1_000_000_000);
        assert_eq!(pm.port_in(PM_TIMER, 4), 3_579_545);
        assert_eq!(pm.port_in(PM_TIMER + 1, 1), 3_579_545 >> 8 & 0xff);
    }

    #[test]
    fn sleep_type_five_switches_off() {
        let (pm, _, _, events) = pm();
        pm.port_out(PM1_CONTROL, 2, 5 << 10);
        assert!(events.take().is_empty());
        pm.port_out(PM1_CONTROL, 2, 1 << 10 | 1 << 13);
        assert!(events.take().is_empty());
        pm.port_out(PM1_CONTROL, 2, 5 << 10 | 1 << 13);
        assert_eq!(events.take(), ["power off"]);
        assert_eq!(pm.port_in(PM1_CONTROL, 2) & 1, 1, "always in ACPI mode");
    }

    #[test]
    fn power_button_raises_sci_until_its_status_is_cleared() {
        let (pm, _, sci, _) = pm();
        assert!(!pm.button_is_enabled());
        pm.port_out(0x602, 2, 0x100);
        assert!(pm.button_is_enabled());
        pm.press_power_button();
        assert!(sci.get());
        assert_eq!(pm.port_in(PM1_EVENT, 2), 0x100);
        pm.port_out(PM1_EVENT, 2, 0x100);
        assert!(!sci.get());
    }

    proptest! {
        #[test]
        fn no_guest_input_panics(steps in prop::collection::vec((0u16..12, any::<u32>(), 0usize..3), 0..100)) {
            let (pm, _, _, _) = pm();
            for (port, value, size) in steps {
                pm.port_out(0x600 + port, [1, 2, 4][size], value);
                pm.port_in(0x600 + port, [1, 2, 4][size]);
            }
            let saved = pm.state();
            pm.restore(&saved).unwrap();
        }
    }
}
