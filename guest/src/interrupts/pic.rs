//! The 8259 pair: Intel 8259A data sheet (order 231468), and the edge/level registers of the 82371AB (PIIX4) data sheet, section 4.2.
//!
//! A level-triggered interrupt stays up until its device is attended to, which the main loop does later: until then it is masked.
#![allow(unsafe_code)] // Port I/O.

use crate::cpu::{inb, outb};

/// Interrupts of both.
pub(super) const IRQS: u8 = 16;

/// Command ports.
const COMMAND: [u16; 2] = [0x20, 0xa0];
/// Data ports: the interrupt mask.
const MASK: [u16; 2] = [0x21, 0xa1];
/// Edge/level control registers: a bit is set for a level-triggered interrupt.
const ELCR: [u16; 2] = [0x4d0, 0x4d1];
/// Input of the first at which the second is.
const CASCADE: u8 = 2;
/// ICW1: edge triggered, cascaded, ICW4 follows.
const ICW1: u8 = 0x11;
/// ICW4: 8086 mode, normal end of interrupt.
const ICW4: u8 = 1;
/// OCW2: end of the interrupt in service with the highest priority.
const EOI: u8 = 0x20;
/// OCW3: the next read of the command port gives the in-service register.
const READ_IN_SERVICE: u8 = 0x0b;

/// Sets up both with everything masked; the first interrupt has vector `first`.
pub(super) fn init(first: u8) {
    for (at, cascade) in [1 << CASCADE, CASCADE].into_iter().enumerate() {
        write(COMMAND[at], ICW1);
        write(MASK[at], first + 8 * at as u8);
        write(MASK[at], cascade);
        write(MASK[at], ICW4);
        write(MASK[at], !0);
    }
    unmask(CASCADE);
}

/// Lets an interrupt through.
pub(super) fn unmask(irq: u8) {
    let (at, bit) = place(irq);
    write(MASK[at], inb(MASK[at]) & !bit);
}

/// Lets a level-triggered interrupt through again, after it was noted.
pub(super) fn rearm(irq: u8) {
    if is_level(irq) {
        unmask(irq);
    }
}

/// Ends the interrupt in service. Not when there is none: the lowest one of each may come from a line that has gone down meanwhile.
pub(super) fn acknowledge(irq: u8) -> bool {
    let (at, bit) = place(irq);
    if irq % 8 == 7 {
        write(COMMAND[at], READ_IN_SERVICE);
        if inb(COMMAND[at]) & bit == 0 {
            if at == 1 {
                write(COMMAND[0], EOI);
            }
            return false;
        }
    }
    if is_level(irq) {
        write(MASK[at], inb(MASK[at]) | bit);
    }
    for at in (0..=at).rev() {
        write(COMMAND[at], EOI);
    }
    true
}

fn is_level(irq: u8) -> bool {
    let (at, bit) = place(irq);
    inb(ELCR[at]) & bit != 0
}

/// Controller and bit of an interrupt.
fn place(irq: u8) -> (usize, u8) {
    (usize::from(irq / 8 % 2), 1 << (irq % 8))
}

fn write(port: u16, value: u8) {
    // SAFETY: the controllers write to no memory.
    unsafe { outb(port, value) };
}
