//! The first serial port: National Semiconductor PC16550D data sheet, section 8.
//!
//! Output waits for the transmitter. Input wakes the processor by interrupt 4 and is read by whoever waits for it.
#![allow(unsafe_code)] // Port I/O.

use crate::cpu::{inb, outb};

/// COM1 of a PC.
pub const PORT: u16 = 0x3f8;
/// Its interrupt.
pub const IRQ: u8 = 4;

/// Transmitter and receiver; with [`LCR_DLAB`] the low byte of the divisor.
const DATA: u16 = PORT;
/// Interrupt enable; with [`LCR_DLAB`] the high byte of the divisor.
const IER: u16 = PORT + 1;
/// FIFO control.
const FCR: u16 = PORT + 2;
/// Line control.
const LCR: u16 = PORT + 3;
/// Modem control.
const MCR: u16 = PORT + 4;
/// Line status.
const LSR: u16 = PORT + 5;

const IER_RECEIVED: u8 = 1 << 0;
const FCR_ENABLE: u8 = 1 << 0;
const LCR_8N1: u8 = 3;
const LCR_DLAB: u8 = 1 << 7;
/// DTR, RTS, and OUT2, which lets interrupts through on a PC.
const MCR_READY: u8 = 0b1011;
const LSR_DATA_READY: u8 = 1 << 0;
const LSR_TRANSMITTER_EMPTY: u8 = 1 << 5;
/// What ports read as that nobody answers at.
const NOBODY: u8 = 0xff;

/// Sets up the port: 115200 baud, 8 data bits, no parity, interrupts for input. `typed` gets what was typed before: turning the
/// FIFO on empties it.
pub fn init(mut typed: impl FnMut(u8)) {
    while let Some(byte) = read() {
        typed(byte);
    }
    for (port, value) in [(LCR, LCR_DLAB), (DATA, 1), (IER, 0), (LCR, LCR_8N1), (FCR, FCR_ENABLE), (MCR, MCR_READY), (IER, IER_RECEIVED)] {
        // SAFETY: a serial port writes to no memory.
        unsafe { outb(port, value) };
    }
}

/// Sends a byte.
pub fn write(byte: u8) {
    // Without a port this reads as ones, and does not wait.
    while inb(LSR) & LSR_TRANSMITTER_EMPTY == 0 {
        core::hint::spin_loop();
    }
    // SAFETY: a serial port writes to no memory.
    unsafe { outb(DATA, byte) };
}

/// A byte that was received.
pub fn read() -> Option<u8> {
    let status = inb(LSR);
    (status != NOBODY && status & LSR_DATA_READY != 0).then(|| inb(DATA))
}
