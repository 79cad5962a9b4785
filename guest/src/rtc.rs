//! The real-time clock of a PC: Motorola MC146818 data sheet, and the century where ACPI's FADT usually points (register 32H).
#![allow(unsafe_code)] // Port I/O.

use logic::calendar::DateTime;

use crate::cpu::{inb, outb};

const INDEX: u16 = 0x70;
const DATA: u16 = 0x71;
/// Seconds, minutes, hours, day, month, year.
const DATE: [u8; 6] = [0, 2, 4, 7, 8, 9];
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const CENTURY: u8 = 0x32;
/// Status A: the registers change within 244 microseconds.
const UPDATING: u8 = 1 << 7;
/// Tries to read registers that do not change meanwhile. An update takes 2 milliseconds.
const READINGS: usize = 10_000;

/// The time of day, when there is such a clock.
pub fn read() -> Option<DateTime> {
    let mut before = None;
    for _ in 0..READINGS {
        if register(STATUS_A) & UPDATING != 0 {
            continue;
        }
        let now = (DATE.map(register), register(STATUS_B), register(CENTURY));
        if before.replace(now) == Some(now) {
            let (date, status_b, century) = now;
            return DateTime::from_rtc(date, status_b, century);
        }
    }
    None
}

fn register(number: u8) -> u8 {
    // SAFETY: selects a register, and lets non-maskable interrupts through.
    unsafe { outb(INDEX, number) };
    inb(DATA)
}
