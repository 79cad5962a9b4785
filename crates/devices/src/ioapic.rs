//! The I/O APIC: 24 inputs that become messages to local APICs.
//!
//! Intel 82093AA data sheet (order 290566), version 0x20 as in Intel's later chip sets: with the EOI register, so that a guest
//! can end a level-triggered interrupt by itself. Registers are reached by index and window; only 32-bit accesses count.
//!
//! A level-triggered entry sends its message once, holds remote IRR until the end of interrupt comes back, and sends again if
//! the line is still up. An edge on a masked entry is lost, as the data sheet says.

use abi::apic::*;
use serde::{Deserialize, Serialize};
use vmm::backend::IoapicRoute;

/// Number of inputs.
pub const PINS: usize = 24;
/// Version 0x20, and the index of the last entry.
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;
/// Bits of an entry that the guest cannot write.
const READ_ONLY: u64 = REDIRECTION_PENDING | REDIRECTION_REMOTE_IRR;
/// Bits of an entry that exist.
const DEFINED: u64 = 0xff00_0000_0001_ffff;

/// State of the I/O APIC. What it sends goes to the function that is passed to each call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApic {
    id: u32,
    select: u8,
    entries: [u64; PINS],
    /// Level of the inputs, one bit each.
    lines: u32,
}

impl Default for IoApic {
    fn default() -> IoApic {
        IoApic::new()
    }
}

impl IoApic {
    /// Power-on state: all inputs masked.
    pub fn new() -> IoApic {
        IoApic { id: 0, select: 0, entries: [REDIRECTION_MASKED; PINS], lines: 0 }
    }

    /// Power-on state, with the inputs as they are.
    pub fn reset(&mut self) {
        *self = IoApic { lines: self.lines, ..IoApic::new() };
    }

    /// Sets the level of `pin`.
    pub fn set_pin(&mut self, pin: u8, level: bool, send: &mut dyn FnMut(IoapicRoute)) {
        let Some(&entry) = self.entries.get(usize::from(pin)) else { return };
        let bit = 1 << pin;
        let rises = level && self.lines & bit == 0;
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
        if entry & REDIRECTION_LEVEL != 0 {
            self.service(usize::from(pin), send);
        } else if rises && entry & REDIRECTION_MASKED == 0 {
            send(message(entry));
        }
    }

    /// A local APIC ended the level-triggered interrupt `vector`.
    pub fn end_of_interrupt(&mut self, vector: u8, send: &mut dyn FnMut(IoapicRoute)) {
        for pin in 0..PINS {
            let entry = self.entries[pin];
            if entry as u8 == vector && entry & REDIRECTION_REMOTE_IRR != 0 {
                self.entries[pin] &= !REDIRECTION_REMOTE_IRR;
                self.service(pin, send);
            }
        }
    }

    /// Read of the 32-bit register at `offset`.
    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            IOAPIC_REGSEL => u32::from(self.select),
            IOAPIC_WINDOW => match self.select {
                IOAPIC_REG_ID | IOAPIC_REG_ARBITRATION => self.id,
                IOAPIC_REG_VERSION => VERSION,
                index => self.half(index).map_or(u32::MAX, |(pin, high)| (self.entries[pin] >> (32 * u32::from(high))) as u32),
            },
            _ => 0,
        }
    }

    /// Write to the 32-bit register at `offset`. Says whether [`IoApic::routes`] may have changed.
    pub fn write(&mut self, offset: u64, value: u32, send: &mut dyn FnMut(IoapicRoute)) -> bool {
        match offset {
            IOAPIC_REGSEL => self.select = value as u8,
            IOAPIC_EOI => self.end_of_interrupt(value as u8, send),
            IOAPIC_WINDOW if self.select == IOAPIC_REG_ID => self.id = value & 0x0f00_0000,
            IOAPIC_WINDOW => {
                if let Some((pin, high)) = self.half(self.select) {
                    self.write_entry(pin, high, value, send);
                    return true;
                }
            }
            _ => {}
        }
        false
    }

    /// The message of each input that has one. Masked entries too: their last interrupt may still be in service.
    pub fn routes(&self) -> [Option<IoapicRoute>; PINS] {
        self.entries.map(|entry| (entry & !REDIRECTION_MASKED != 0).then(|| message(entry)))
    }

    fn write_entry(&mut self, pin: usize, high: bool, value: u32, send: &mut dyn FnMut(IoapicRoute)) {
        let old = self.entries[pin];
        let mut entry = if high { old & 0xffff_ffff | u64::from(value) << 32 } else { old & !0xffff_ffff | u64::from(value) };
        entry = entry & DEFINED & !READ_ONLY | old & READ_ONLY;
        if entry & REDIRECTION_LEVEL == 0 {
            // Linux ends an interrupt on I/O APICs without EOI register by a turn to edge and back.
            entry &= !REDIRECTION_REMOTE_IRR;
        }
        self.entries[pin] = entry;
        self.service(pin, send);
    }

    /// Sends the message of a level-triggered input that is up and not yet in service.
    fn service(&mut self, pin: usize, send: &mut dyn FnMut(IoapicRoute)) {
        let entry = self.entries[pin];
        let wants = entry & (REDIRECTION_LEVEL | REDIRECTION_REMOTE_IRR | REDIRECTION_MASKED) == REDIRECTION_LEVEL;
        if wants && self.lines & 1 << pin != 0 {
            self.entries[pin] |= REDIRECTION_REMOTE_IRR;
            send(message(entry));
        }
    }

    /// The entry that register `index` is a half of, and whether the upper one.
    fn half(&self, index: u8) -> Option<(usize, bool)> {
        let register = index.checked_sub(IOAPIC_REG_REDIRECTION)?;
        let pin = usize::from(register >> 1);
        (pin < PINS).then_some((pin, register & 1 != 0))
    }
}

/// The message that an entry sends. Entry bits 10:0 and 15 are where message data has them.
fn message(entry: u64) -> IoapicRoute {
    let logical = if entry & REDIRECTION_LOGICAL != 0 { MSI_ADDRESS_LOGICAL } else { 0 };
    let level = if entry & REDIRECTION_LEVEL != 0 { MSI_DATA_LEVEL | ICR_ASSERT } else { 0 };
    IoapicRoute { address: MSI_ADDRESS_BASE | (entry >> 56) << MSI_DESTINATION_SHIFT | logical, data: entry as u32 & 0x7ff | level }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Board {
        ioapic: IoApic,
        sent: Vec<IoapicRoute>,
    }

    impl Board {
        fn program(&mut self, pin: u8, entry: u64) {
            for (half, value) in [(1, (entry >> 32) as u32), (0, entry as u32)] {
                self.write(IOAPIC_REGSEL, u32::from(0x10 + 2 * pin + half));
                self.write(IOAPIC_WINDOW, value);
            }
        }

        fn write(&mut self, offset: u64, value: u32) {
            let sent = &mut self.sent;
            self.ioapic.write(offset, value, &mut |route| sent.push(route));
        }

        fn set(&mut self, pin: u8, level: bool) {
            let sent = &mut self.sent;
            self.ioapic.set_pin(pin, level, &mut |route| sent.push(route));
        }

        fn end(&mut self, vector: u8) {
            let sent = &mut self.sent;
            self.ioapic.end_of_interrupt(vector, &mut |route| sent.push(route));
        }

        fn low(&mut self, pin: u8) -> u64 {
            self.write(IOAPIC_REGSEL, u32::from(0x10 + 2 * pin));
            u64::from(self.ioapic.read(IOAPIC_WINDOW))
        }
    }

    #[test]
    fn version_says_24_inputs_and_an_eoi_register() {
        let mut board = Board::default();
        board.write(IOAPIC_REGSEL, 1);
        assert_eq!(board.ioapic.read(IOAPIC_WINDOW), 0x0017_0020);
    }

    #[test]
    fn edge_sends_one_message_with_all_fields() {
        let mut board = Board::default();
        board.program(4, 0x0300_0000_0000_0000 | REDIRECTION_LOGICAL | 0x141);
        board.set(4, true);
        board.set(4, true);
        assert_eq!(board.sent, [IoapicRoute { address: 0xfee0_3004, data: 0x141 }]);
        board.set(4, false);
        board.set(4, true);
        assert_eq!(board.sent.len(), 2);
    }

    #[test]
    fn edge_on_a_masked_input_is_lost() {
        let mut board = Board::default();
        board.program(4, REDIRECTION_MASKED | 0x41);
        board.set(4, true);
        board.program(4, 0x41);
        assert!(board.sent.is_empty());
    }

    #[test]
    fn level_is_sent_once_until_its_end_and_again_while_it_stays() {
        let mut board = Board::default();
        board.program(16, REDIRECTION_LEVEL | 0x51);
        board.set(16, true);
        board.set(16, true);
        assert_eq!(board.sent.len(), 1);
        assert_eq!(board.sent[0].data, 0xc051);
        assert_ne!(board.low(16) & REDIRECTION_REMOTE_IRR, 0);
        board.end(0x52);
        assert_eq!(board.sent.len(), 1);
        board.end(0x51);
        assert_eq!(board.sent.len(), 2);
        board.set(16, false);
        board.write(IOAPIC_EOI, 0x51);
        assert_eq!(board.sent.len(), 2);
        assert_eq!(board.low(16) & REDIRECTION_REMOTE_IRR, 0);
    }

    #[test]
    fn level_that_was_masked_is_sent_when_unmasked() {
        let mut board = Board::default();
        board.program(16, REDIRECTION_LEVEL | REDIRECTION_MASKED | 0x51);
        board.set(16, true);
        assert!(board.sent.is_empty());
        board.program(16, REDIRECTION_LEVEL | 0x51);
        assert_eq!(board.sent.len(), 1);
    }

    #[test]
    fn turn_to_edge_clears_remote_irr() {
        let mut board = Board::default();
        board.program(16, REDIRECTION_LEVEL | 0x51);
        board.set(16, true);
        board.program(16, REDIRECTION_MASKED | 0x51);
        board.program(16, REDIRECTION_LEVEL | 0x51);
        assert_eq!(board.sent.len(), 2);
    }

    #[test]
    fn routes_name_programmed_inputs() {
        let mut board = Board::default();
        board.program(9, REDIRECTION_LEVEL | REDIRECTION_MASKED | 0x51);
        let routes = board.ioapic.routes();
        assert_eq!(routes[9], Some(IoapicRoute { address: 0xfee0_0000, data: 0xc051 }));
        assert_eq!(routes.iter().flatten().count(), 1);
    }

    proptest! {
        #[test]
        fn no_guest_input_panics(steps in prop::collection::vec((0u8..4, any::<u8>(), any::<u32>()), 0..300)) {
            let mut board = Board::default();
            for (what, at, value) in steps {
                match what {
                    0 => board.write(u64::from(at & 0x70), value),
                    1 => { board.ioapic.read(u64::from(at)); }
                    2 => board.set(at, value & 1 != 0),
                    _ => board.end(at),
                }
            }
            board.ioapic.routes();
        }
    }
}
