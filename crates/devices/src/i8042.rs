//! Keyboard controller without keys: Intel 8042 as in the IBM PC AT Technical Reference (1984), pages 1-44 to 1-57.
//!
//! It is there for what else it does: the pulse that resets the machine (command 0xfe), the A20 gate that old boot code
//! opens, and the self tests without which firmware waits for its timeouts. A keyboard answers commands and never sends a
//! key; there is no mouse port.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::ports::read_bytes;
use crate::snapshot::{RestoreError, Saved, Snapshot};
use crate::{DeviceMap, InterruptLine, MachineEvents, PortDevice};

/// Name and version in a [`Saved`] state.
const STATE: (&str, u32) = ("i8042", 1);
const DATA: u16 = 0x60;
const COMMAND: u16 = 0x64;
/// ISA interrupt of the keyboard.
pub const KEYBOARD_IRQ: u8 = 1;
/// Answers that can wait; a guest that reads none gets no more.
const QUEUE: usize = 16;

const STATUS_OUTPUT_FULL: u8 = 0x01;
const STATUS_SELF_TEST_DONE: u8 = 0x04;
const STATUS_COMMAND: u8 = 0x08;
const STATUS_UNLOCKED: u8 = 0x10;
/// Controller command byte: interrupt when there is output.
const MODE_INTERRUPT: u8 = 0x01;
/// Output port: not in reset, A20 open.
const OUTPUT_PORT: u8 = 0x03;
const OUTPUT_PORT_RUNNING: u8 = 0x01;
const ACKNOWLEDGE: u8 = 0xfa;

/// What the next write to the data port is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Expects {
    Keyboard,
    /// The parameter of a keyboard command.
    KeyboardParameter,
    Mode,
    OutputPort,
    /// A byte to put into the output buffer as the keyboard's.
    Echo,
    /// A byte for the mouse that is not there.
    Mouse,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Controller {
    mode: u8,
    expects: Expects,
    last_was_command: bool,
    output: VecDeque<u8>,
}

/// The controller.
pub struct I8042 {
    line: Arc<dyn InterruptLine>,
    events: Arc<dyn MachineEvents>,
    controller: Mutex<Controller>,
}

impl I8042 {
    /// A controller in power-on state.
    pub fn new(line: Arc<dyn InterruptLine>, events: Arc<dyn MachineEvents>) -> Arc<I8042> {
        Arc::new(I8042 { line, events, controller: Mutex::new(Controller::new()) })
    }

    /// Puts the two ports into `map`.
    pub fn map(self: &Arc<Self>, map: &mut DeviceMap) {
        map.add_ports(DATA..=DATA, self.clone());
        map.add_ports(COMMAND..=COMMAND, self.clone());
    }

    /// Power-on state.
    pub fn reset(&self) {
        let mut controller = self.lock();
        *controller = Controller::new();
        self.update(&controller);
    }

    fn update(&self, controller: &Controller) {
        self.line.set(controller.mode & MODE_INTERRUPT != 0 && !controller.output.is_empty());
    }

    fn lock(&self) -> MutexGuard<'_, Controller> {
        self.controller.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PortDevice for I8042 {
    fn port_in(&self, port: u16, size: u8) -> u32 {
        let mut controller = self.lock();
        let value = read_bytes(port, size, |port| match port {
            DATA => controller.output.pop_front().unwrap_or(0),
            COMMAND => controller.status(),
            _ => 0xff,
        });
        self.update(&controller);
        value
    }

    fn port_out(&self, port: u16, _size: u8, value: u32) {
        let mut controller = self.lock();
        let reset = match port {
            DATA => controller.write_data(value as u8),
            _ => controller.write_command(value as u8),
        };
        self.update(&controller);
        drop(controller);
        if reset {
            self.events.reset();
        }
    }
}

impl Controller {
    fn new() -> Controller {
        Controller { mode: 0, expects: Expects::Keyboard, last_was_command: false, output: VecDeque::new() }
    }

    fn status(&self) -> u8 {
        let full = if self.output.is_empty() { 0 } else { STATUS_OUTPUT_FULL };
        let command = if self.last_was_command { STATUS_COMMAND } else { 0 };
        STATUS_UNLOCKED | STATUS_SELF_TEST_DONE | full | command
    }

    fn answer(&mut self, bytes: &[u8]) {
        if self.output.len() + bytes.len() <= QUEUE {
            self.output.extend(bytes);
        }
    }

    /// Says whether the machine is to be reset.
    fn write_command(&mut self, command: u8) -> bool {
        self.last_was_command = true;
        self.expects = Expects::Keyboard;
        match command {
            0x20 => self.answer(&[self.mode]),
            0x60 => self.expects = Expects::Mode,
            // Self test, keyboard test passed.
            0xaa => self.answer(&[0x55]),
            0xab => self.answer(&[0]),
            // Mouse port test: clock line stuck low, so there is none.
            0xa9 => self.answer(&[1]),
            0xc0 => self.answer(&[0x80]),
            0xd0 => self.answer(&[OUTPUT_PORT]),
            0xd1 => self.expects = Expects::OutputPort,
            0xd2 => self.expects = Expects::Echo,
            0xd3 | 0xd4 => self.expects = Expects::Mouse,
            // Pulses of the output port's lower bits; bit 0, active low, is the processor's reset.
            0xf0..=0xff => return command & 1 == 0,
            _ => {}
        }
        false
    }

    /// Says whether the machine is to be reset.
    fn write_data(&mut self, value: u8) -> bool {
        self.last_was_command = false;
        match std::mem::replace(&mut self.expects, Expects::Keyboard) {
            Expects::Keyboard => self.keyboard(value),
            Expects::KeyboardParameter => self.answer(&[ACKNOWLEDGE]),
            Expects::Mode => self.mode = value,
            Expects::OutputPort => return value & OUTPUT_PORT_RUNNING == 0,
            Expects::Echo => self.answer(&[value]),
            // What the controller says when a device does not answer: resend.
            Expects::Mouse => self.answer(&[0xfe]),
        }
        false
    }

    fn keyboard(&mut self, command: u8) {
        match command {
            // Reset: acknowledged, basic assurance test passed.
            0xff => self.answer(&[ACKNOWLEDGE, 0xaa]),
            // Identify: an MF2 keyboard.
            0xf2 => self.answer(&[ACKNOWLEDGE, 0xab, 0x83]),
            0xee => self.answer(&[0xee]),
            // LEDs, scan code set, typematic rate.
            0xed | 0xf0 | 0xf3 => {
                self.expects = Expects::KeyboardParameter;
                self.answer(&[ACKNOWLEDGE]);
            }
            _ => self.answer(&[ACKNOWLEDGE]),
        }
    }
}

impl Snapshot for I8042 {
    fn state(&self) -> Saved {
        Saved::new(STATE.0, STATE.1, &*self.lock())
    }

    fn restore(&self, state: &Saved) -> Result<(), RestoreError> {
        let new = state.open(STATE.0, STATE.1)?;
        let mut controller = self.lock();
        *controller = new;
        self.update(&controller);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Events, Level};

    fn controller() -> (Arc<I8042>, Arc<Level>, Arc<Events>) {
        let (line, events) = (Arc::new(Level::default()), Arc::new(Events::default()));
        (I8042::new(line.clone(), events.clone()), line, events)
    }

    #[test]
    fn pulse_of_the_reset_line_resets() {
        let (controller, _, events) = controller();
        controller.port_out(COMMAND, 1, 0xff);
        assert!(events.take().is_empty());
        controller.port_out(COMMAND, 1, 0xfe);
        assert_eq!(events.take(), ["reset"]);
        controller.port_out(COMMAND, 1, 0xd1);
        controller.port_out(DATA, 1, 0xdf);
        assert!(events.take().is_empty(), "opens A20");
        controller.port_out(COMMAND, 1, 0xd1);
        controller.port_out(DATA, 1, 0xfe);
        assert_eq!(events.take(), ["reset"]);
    }

    #[test]
    fn self_tests_pass_and_the_mouse_port_is_missing() {
        let (controller, _, _) = controller();
        for (command, answer) in [(0xaa, 0x55), (0xab, 0), (0xa9, 1), (0xd0, 3)] {
            controller.port_out(COMMAND, 1, command);
            assert_eq!(controller.port_in(COMMAND, 1) & 1, 1);
            assert_eq!(controller.port_in(DATA, 1), answer);
            assert_eq!(controller.port_in(COMMAND, 1) & 1, 0);
        }
    }

    #[test]
    fn keyboard_answers_by_interrupt_when_enabled() {
        let (controller, line, _) = controller();
        controller.port_out(COMMAND, 1, 0x60);
        controller.port_out(DATA, 1, 0x61);
        controller.port_out(DATA, 1, 0xff);
        assert!(line.get());
        assert_eq!([controller.port_in(DATA, 1), controller.port_in(DATA, 1)], [0xfa, 0xaa]);
        assert!(!line.get());
        controller.port_out(DATA, 1, 0xed);
        controller.port_out(DATA, 1, 0xff);
        assert_eq!([controller.port_in(DATA, 1), controller.port_in(DATA, 1), controller.port_in(DATA, 1)], [0xfa, 0xfa, 0]);
    }

    proptest! {
        #[test]
        fn no_guest_input_panics_or_grows(steps in prop::collection::vec((any::<bool>(), any::<bool>(), any::<u32>(), 0usize..3), 0..300)) {
            let (controller, _, _) = controller();
            for (data, write, value, size) in steps {
                let (port, size) = (if data { DATA } else { COMMAND }, [1, 2, 4][size]);
                if write { controller.port_out(port, size, value) } else { controller.port_in(port, size); }
            }
            prop_assert!(controller.lock().output.len() <= QUEUE);
            let saved = controller.state();
            controller.restore(&saved).unwrap();
        }
    }
}
