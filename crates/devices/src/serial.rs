//! Serial port: a 16550A UART without a line behind it. National Semiconductor PC16550D data sheet (1995).
//!
//! What the guest sends goes to a [`Write`] at once, so the transmitter is always empty; what [`Serial::input`] takes waits in a
//! backlog until the receive FIFO has room, so that nothing typed is lost while the guest boots. Baud rate and parity are
//! remembered and have no effect. The interrupt is a level: it stays while an enabled cause does.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::ports::{read_bytes, write_bytes};
use crate::snapshot::{RestoreError, Saved, Snapshot};
use crate::{DeviceMap, InterruptLine, PortDevice};

/// Name and version in a [`Saved`] state.
const STATE: (&str, u32) = ("serial", 1);
/// Ports of COM1.
pub const COM1: u16 = 0x3f8;
/// ISA interrupt of COM1.
pub const COM1_IRQ: u8 = 4;
/// Depth of the receive FIFO.
const FIFO: usize = 16;
/// Input that waits for the FIFO; more is not taken.
const BACKLOG: usize = 4096;

const IER_RECEIVED: u8 = 0x01;
const IER_TRANSMITTER_EMPTY: u8 = 0x02;
const IER_LINE_STATUS: u8 = 0x04;
const IIR_NONE: u8 = 0x01;
const IIR_TRANSMITTER_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE_STATUS: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFO: u8 = 0xc0;
const FCR_ENABLE: u8 = 0x01;
const FCR_CLEAR_RECEIVER: u8 = 0x02;
const LCR_DLAB: u8 = 0x80;
const MCR_LOOP: u8 = 0x10;
const LSR_DATA_READY: u8 = 0x01;
const LSR_OVERRUN: u8 = 0x02;
const LSR_EMPTY: u8 = 0x60;
/// Carrier, data set ready, clear to send.
const MSR_CONNECTED: u8 = 0xb0;

/// A serial port.
pub struct Serial {
    base: u16,
    line: Arc<dyn InterruptLine>,
    uart: Mutex<Uart>,
}

struct Uart {
    registers: Registers,
    output: Box<dyn Write + Send>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    divisor: [u8; 2],
    interrupt_enable: u8,
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    overrun: bool,
    /// The transmitter became empty and nobody has looked since.
    transmitter_event: bool,
    fifo: VecDeque<u8>,
    backlog: VecDeque<u8>,
}

impl Serial {
    /// A port at `base` (8 ports) whose output goes to `output`; each byte is flushed.
    pub fn new(base: u16, line: Arc<dyn InterruptLine>, output: Box<dyn Write + Send>) -> Arc<Serial> {
        let registers = Registers { divisor: [12, 0], ..Registers::default() };
        Arc::new(Serial { base, line, uart: Mutex::new(Uart { registers, output }) })
    }

    /// Puts the port into `map`.
    pub fn map(self: &Arc<Self>, map: &mut DeviceMap) {
        map.add_ports(self.base..=self.base + 7, self.clone());
    }

    /// Hands `bytes` to the guest; says how many were taken. The rest is to be offered again later.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut uart = self.lock();
        let registers = &mut uart.registers;
        let taken = bytes.len().min(BACKLOG - registers.backlog.len().min(BACKLOG));
        registers.backlog.extend(&bytes[..taken]);
        registers.refill();
        self.update(&uart.registers);
        taken
    }

    /// Power-on state. Input that waits stays.
    pub fn reset(&self) {
        let mut uart = self.lock();
        let backlog = std::mem::take(&mut uart.registers.backlog);
        uart.registers = Registers { divisor: [12, 0], backlog, ..Registers::default() };
        self.update(&uart.registers);
    }

    /// The line follows the causes while the port is locked, so that the last change decides.
    fn update(&self, registers: &Registers) {
        self.line.set(registers.cause() != IIR_NONE);
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PortDevice for Serial {
    fn port_in(&self, port: u16, size: u8) -> u32 {
        let mut uart = self.lock();
        let value = read_bytes(port, size, |port| match port.wrapping_sub(self.base) {
            register @ 0..8 => uart.registers.read(register),
            _ => 0xff,
        });
        self.update(&uart.registers);
        value
    }

    fn port_out(&self, port: u16, size: u8, value: u32) {
        let mut uart = self.lock();
        write_bytes(port, size, value, |port, value| {
            if let Some(sent) = uart.registers.write(port.wrapping_sub(self.base), value) {
                // Nobody to tell: a terminal that went away must not stop the guest.
                let _ = uart.output.write_all(&[sent]).and_then(|()| uart.output.flush());
            }
        });
        self.update(&uart.registers);
    }
}

impl Registers {
    fn has_fifo(&self) -> bool {
        self.fifo_control & FCR_ENABLE != 0
    }

    fn is_looped(&self) -> bool {
        self.modem_control & MCR_LOOP != 0
    }

    /// Moves input from the backlog to the FIFO.
    fn refill(&mut self) {
        let depth = if self.has_fifo() { FIFO } else { 1 };
        while !self.is_looped() && self.fifo.len() < depth {
            let Some(byte) = self.backlog.pop_front() else { break };
            self.fifo.push_back(byte);
        }
    }

    /// The highest enabled cause, as the interrupt identification register tells it.
    fn cause(&self) -> u8 {
        let enabled = |bit| self.interrupt_enable & bit != 0;
        let trigger = [1, 4, 8, 14][usize::from(self.fifo_control >> 6)];
        if enabled(IER_LINE_STATUS) && self.overrun {
            IIR_LINE_STATUS
        } else if enabled(IER_RECEIVED) && !self.fifo.is_empty() {
            // Below the trigger level the FIFO's timeout speaks; with no line to wait for, at once.
            if self.has_fifo() && self.fifo.len() < trigger { IIR_TIMEOUT } else { IIR_RECEIVED }
        } else if enabled(IER_TRANSMITTER_EMPTY) && self.transmitter_event {
            IIR_TRANSMITTER_EMPTY
        } else {
            IIR_NONE
        }
    }

    fn read(&mut self, register: u16) -> u8 {
        match register {
            0 | 1 if self.line_control & LCR_DLAB != 0 => self.divisor[usize::from(register)],
            0 => {
                let byte = self.fifo.pop_front().unwrap_or(0);
                self.refill();
                byte
            }
            1 => self.interrupt_enable,
            2 => {
                let cause = self.cause();
                if cause == IIR_TRANSMITTER_EMPTY {
                    self.transmitter_event = false;
                }
                cause | if self.has_fifo() { IIR_FIFO } else { 0 }
            }
            3 => self.line_control,
            4 => self.modem_control,
            5 => {
                let overrun = if std::mem::take(&mut self.overrun) { LSR_OVERRUN } else { 0 };
                let ready = if self.fifo.is_empty() { 0 } else { LSR_DATA_READY };
                LSR_EMPTY | overrun | ready
            }
            6 if self.is_looped() => {
                let mcr = self.modem_control;
                (mcr & 2) << 3 | (mcr & 1) << 5 | (mcr & 4) << 4 | (mcr & 8) << 4
            }
            6 => MSR_CONNECTED,
            _ => self.scratch,
        }
    }

    /// The byte to send, if the write sends one.
    fn write(&mut self, register: u16, value: u8) -> Option<u8> {
        match register {
            0 | 1 if self.line_control & LCR_DLAB != 0 => self.divisor[usize::from(register)] = value,
            0 => {
                self.transmitter_event = true;
                if !self.is_looped() {
                    return Some(value);
                }
                if self.fifo.len() < if self.has_fifo() { FIFO } else { 1 } {
                    self.fifo.push_back(value);
                } else {
                    self.overrun = true;
                }
            }
            1 => {
                let rises = value & !self.interrupt_enable & IER_TRANSMITTER_EMPTY != 0;
                self.transmitter_event |= rises;
                self.interrupt_enable = value & 0x0f;
            }
            2 => {
                // Turning the FIFO on or off empties it.
                if value & FCR_CLEAR_RECEIVER != 0 || (value ^ self.fifo_control) & FCR_ENABLE != 0 {
                    self.fifo.clear();
                }
                self.fifo_control = if value & FCR_ENABLE != 0 { value & 0xc9 } else { 0 };
                self.refill();
            }
            3 => self.line_control = value,
            4 => {
                self.modem_control = value & 0x1f;
                self.refill();
            }
            7 => self.scratch = value,
            _ => {}
        }
        None
    }
}

impl Snapshot for Serial {
    fn state(&self) -> Saved {
        Saved::new(STATE.0, STATE.1, &self.lock().registers)
    }

    fn restore(&self, state: &Saved) -> Result<(), RestoreError> {
        let new: Registers = state.open(STATE.0, STATE.1)?;
        let mut uart = self.lock();
        uart.registers = new;
        self.update(&uart.registers);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::Level;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn serial() -> (Arc<Serial>, Sink, Arc<Level>) {
        let (sink, line) = (Sink::default(), Arc::new(Level::default()));
        (Serial::new(COM1, line.clone(), Box::new(sink.clone())), sink, line)
    }

    fn read(serial: &Serial, register: u16) -> u8 {
        serial.port_in(COM1 + register, 1) as u8
    }

    fn write(serial: &Serial, register: u16, value: u8) {
        serial.port_out(COM1 + register, 1, value.into());
    }

    #[test]
    fn output_goes_out_and_the_transmitter_is_always_empty() {
        let (serial, sink, line) = serial();
        write(&serial, 0, b'h');
        write(&serial, 0, b'i');
        assert_eq!(*sink.0.lock().unwrap(), b"hi");
        assert_eq!(read(&serial, 5), LSR_EMPTY);
        assert!(!line.get());
    }

    #[test]
    fn transmitter_interrupt_comes_with_its_enable_bit_and_goes_with_iir() {
        let (serial, _, line) = serial();
        for _ in 0..2 {
            write(&serial, 1, 2);
            assert!(line.get());
            assert_eq!(read(&serial, 2), IIR_TRANSMITTER_EMPTY);
            assert!(!line.get());
            assert_eq!(read(&serial, 2), IIR_NONE);
            write(&serial, 1, 0);
        }
        write(&serial, 1, 2);
        read(&serial, 2);
        write(&serial, 0, b'x');
        assert!(line.get());
    }

    #[test]
    fn typed_ahead_input_survives_fifo_resets() {
        let (serial, _, line) = serial();
        assert_eq!(serial.input(&[b'a'; 100]), 100);
        write(&serial, 2, 0x07);
        write(&serial, 1, 1);
        assert!(line.get());
        assert_eq!(read(&serial, 2), IIR_RECEIVED | IIR_FIFO);
        let mut count = 0;
        while read(&serial, 5) & LSR_DATA_READY != 0 {
            assert_eq!(read(&serial, 0), b'a');
            count += 1;
        }
        assert_eq!(count, 99, "one byte was in the receiver when the FIFO was turned on");
        assert!(!line.get());
    }

    #[test]
    fn input_beyond_the_backlog_is_not_taken() {
        let (serial, _, _) = serial();
        assert_eq!(serial.input(&[0; 2 * BACKLOG]), BACKLOG);
        assert_eq!(serial.input(&[0; 4]), 1, "the receiver took one");
    }

    #[test]
    fn loopback_returns_data_and_modem_lines() {
        let (serial, sink, _) = serial();
        serial.input(b"z");
        assert_eq!(read(&serial, 0), b'z');
        write(&serial, 4, MCR_LOOP | 0x0a);
        assert_eq!(read(&serial, 6) & 0xf0, 0x90);
        write(&serial, 0, 0x55);
        assert_eq!(read(&serial, 0), 0x55);
        assert!(sink.0.lock().unwrap().is_empty());
        write(&serial, 4, 0);
        assert_eq!(read(&serial, 6), MSR_CONNECTED);
    }

    #[test]
    fn divisor_hides_data_and_enable_registers() {
        let (serial, sink, _) = serial();
        write(&serial, 3, LCR_DLAB | 3);
        write(&serial, 0, 1);
        write(&serial, 1, 2);
        assert_eq!((read(&serial, 0), read(&serial, 1)), (1, 2));
        write(&serial, 3, 3);
        assert_eq!(read(&serial, 1), 0);
        assert!(sink.0.lock().unwrap().is_empty());
    }

    #[test]
    fn state_survives_a_restore() {
        let (serial, _, _) = serial();
        serial.input(b"abc");
        write(&serial, 1, 1);
        let (other, _, line) = self::serial();
        other.restore(&serial.state()).unwrap();
        assert!(line.get());
        assert_eq!(other.state(), serial.state());
    }

    proptest! {
        #[test]
        fn no_guest_input_panics(steps in prop::collection::vec((0u16..9, any::<u32>(), 0usize..3, any::<bool>()), 0..300)) {
            let (serial, _, _) = serial();
            for (register, value, size, is_write) in steps {
                let size = [1, 2, 4][size];
                match (register, is_write) {
                    (8, _) => { serial.input(&value.to_le_bytes()); }
                    (_, true) => serial.port_out(COM1 + register, size, value),
                    (_, false) => { serial.port_in(COM1 + register, size); }
                }
            }
        }
    }
}
