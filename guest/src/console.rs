//! What a person sees and types, and the message buffer.
//!
//! [`print!`](crate::print) writes to the terminal; [`dmesg!`](crate::dmesg) also remembers the line for the command `dmesg`. Lines end
//! in a carriage return and a line feed, as terminals expect them from a serial port.

use alloc::collections::VecDeque;
use alloc::string::String;
use core::fmt::{self, Write};

use crate::global::Global;
use crate::serial;

/// Bytes of messages that are kept.
const MESSAGES_MAX: usize = 64 << 10;
/// Bytes typed ahead that are kept.
const TYPED_MAX: usize = 4 << 10;

static CONSOLE: Global<Console> = Global::new(Console { messages: String::new(), typed: VecDeque::new() });

struct Console {
    messages: String,
    typed: VecDeque<u8>,
}

/// Writes to the terminal.
#[macro_export]
macro_rules! print {
    ($($argument:tt)*) => { $crate::console::write(format_args!($($argument)*)) };
}

/// Writes a line to the terminal.
#[macro_export]
macro_rules! println {
    () => { $crate::print!("\n") };
    ($($argument:tt)*) => { $crate::print!("{}\n", format_args!($($argument)*)) };
}

/// Writes a line to the terminal and to the message buffer.
#[macro_export]
macro_rules! dmesg {
    ($($argument:tt)*) => { $crate::console::message(format_args!($($argument)*)) };
}

/// Sets up the terminal. Needs the heap.
pub fn init() {
    CONSOLE.with(|console| serial::init(|byte| console.typed.push_back(byte)));
}

/// Writes to the terminal. Works at all times, also when the kernel is giving up.
pub fn write(text: fmt::Arguments<'_>) {
    // The terminal takes everything.
    let _ = Terminal.write_fmt(text);
}

/// Writes a line to the terminal and keeps it.
pub fn message(text: fmt::Arguments<'_>) {
    write(format_args!("{text}\n"));
    CONSOLE.with(|console| {
        let _ = writeln!(console.messages, "{text}");
        while console.messages.len() > MESSAGES_MAX {
            let end = console.messages.find('\n').map_or(console.messages.len(), |at| at + 1);
            console.messages.drain(..end);
        }
    });
}

/// Writes bytes to the terminal as they are.
pub fn echo(bytes: &[u8]) {
    bytes.iter().copied().for_each(serial::write);
}

/// What the message buffer holds.
pub fn messages() -> String {
    CONSOLE.with(|console| console.messages.clone())
}

/// Fetches what was typed from the port.
pub fn poll() {
    CONSOLE.with(|console| {
        while console.typed.len() < TYPED_MAX
            && let Some(byte) = serial::read()
        {
            console.typed.push_back(byte);
        }
    });
}

/// The next byte that was typed.
pub fn read() -> Option<u8> {
    CONSOLE.with(|console| console.typed.pop_front())
}

struct Terminal;

impl Write for Terminal {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                serial::write(b'\r');
            }
            serial::write(byte);
        }
        Ok(())
    }
}
