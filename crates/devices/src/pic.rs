//! The two 8259A interrupt controllers of a PC, and the edge/level control registers beside them.
//!
//! Intel 8259A data sheet (order 231468) and, for ELCR at 0x4d0/0x4d1, the 82371SB (PIIX3) data sheet section 2.5.
//! The slave's output is the master's input 2. The master's output is INTR, see [`PicPair::output`].
//!
//! An edge request stays latched until it is acknowledged, also when the line goes low: our edge-triggered devices pulse
//! their lines. A request that went away otherwise (level) is answered with the spurious vector 7.

use serde::{Deserialize, Serialize};

/// Master command and data port.
pub const MASTER: u16 = 0x20;
/// Slave command and data port.
pub const SLAVE: u16 = 0xa0;
/// Edge/level control registers of master and slave.
pub const ELCR: u16 = 0x4d0;
/// The master's input that the slave's output is wired to.
const CASCADE: u8 = 2;
/// Inputs whose ELCR bit can be set: the timer, the keyboard, the cascade, the RTC and the FPU are always edges.
const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];
/// The input that a request which went away is reported as.
const SPURIOUS: u8 = 7;

const ICW1: u8 = 0x10;
const ICW1_NEEDS_ICW4: u8 = 0x01;
const ICW1_SINGLE: u8 = 0x02;
const ICW4_AUTO_EOI: u8 = 0x02;
const ICW4_SPECIAL_FULLY_NESTED: u8 = 0x10;
const OCW3: u8 = 0x08;
const OCW3_POLL: u8 = 0x04;

/// What the next write to the data port is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Expects {
    Mask,
    Icw2,
    Icw3,
    Icw4,
}

/// One controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Pic {
    master: bool,
    /// Level of the inputs.
    lines: u8,
    irr: u8,
    isr: u8,
    imr: u8,
    elcr: u8,
    vector_base: u8,
    expects: Expects,
    needs_icw3: bool,
    needs_icw4: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_fully_nested: bool,
    special_mask: bool,
    poll: bool,
    read_isr: bool,
    /// The input with the highest priority.
    first: u8,
}

impl Pic {
    fn new(master: bool) -> Pic {
        Pic {
            master,
            lines: 0,
            irr: 0,
            isr: 0,
            imr: 0xff,
            elcr: 0,
            vector_base: 0,
            expects: Expects::Mask,
            needs_icw3: false,
            needs_icw4: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_fully_nested: false,
            special_mask: false,
            poll: false,
            read_isr: false,
            first: 0,
        }
    }

    fn set_line(&mut self, input: u8, level: bool) {
        let bit = 1 << input;
        let was = self.lines & bit != 0;
        if level {
            self.lines |= bit;
            if !was || self.is_level(input) {
                self.irr |= bit;
            }
        } else {
            self.lines &= !bit;
            if self.is_level(input) {
                self.irr &= !bit;
            }
        }
    }

    /// The cascade input follows the slave's output whatever ELCR says.
    fn is_level(&self, input: u8) -> bool {
        self.elcr & 1 << input != 0 || self.master && input == CASCADE
    }

    /// The set bit of `inputs` that has the highest priority, and how far it is from the first.
    fn highest(&self, inputs: u8) -> Option<(u8, u8)> {
        (0..8).map(|rank| (rank, (self.first + rank) & 7)).find(|(_, input)| inputs & 1 << input != 0)
    }

    /// The input to acknowledge next.
    fn request(&self) -> Option<u8> {
        let (rank, input) = self.highest(self.irr & !self.imr)?;
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        if self.special_fully_nested && self.master {
            in_service &= !(1 << CASCADE);
        }
        match self.highest(in_service) {
            Some((busy, _)) if busy <= rank => None,
            _ => Some(input),
        }
    }

    fn acknowledge(&mut self, input: u8) {
        if !self.is_level(input) {
            self.irr &= !(1 << input);
        }
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.first = (input + 1) & 7;
            }
        } else {
            self.isr |= 1 << input;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & ICW1 != 0 {
            *self = Pic {
                imr: 0,
                elcr: self.elcr,
                lines: self.lines,
                irr: self.lines & self.elcr,
                vector_base: self.vector_base,
                expects: Expects::Icw2,
                needs_icw3: value & ICW1_SINGLE == 0,
                needs_icw4: value & ICW1_NEEDS_ICW4 != 0,
                ..Pic::new(self.master)
            };
        } else if value & OCW3 != 0 {
            self.poll = value & OCW3_POLL != 0;
            if value & 2 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let level = value & 7;
        match value >> 5 {
            // Non-specific EOI, with and without rotation. In special mask mode masked levels stay.
            operation @ (1 | 5) => {
                let mask = if self.special_mask { self.imr } else { 0 };
                if let Some((_, input)) = self.highest(self.isr & !mask) {
                    self.isr &= !(1 << input);
                    if operation == 5 {
                        self.first = (input + 1) & 7;
                    }
                }
            }
            3 => self.isr &= !(1 << level),
            7 => {
                self.isr &= !(1 << level);
                self.first = (level + 1) & 7;
            }
            6 => self.first = (level + 1) & 7,
            4 => self.rotate_on_auto_eoi = true,
            0 => self.rotate_on_auto_eoi = false,
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        let after_icw3 = if self.needs_icw4 { Expects::Icw4 } else { Expects::Mask };
        self.expects = match self.expects {
            Expects::Mask => {
                self.imr = value;
                Expects::Mask
            }
            Expects::Icw2 => {
                self.vector_base = value & 0xf8;
                if self.needs_icw3 { Expects::Icw3 } else { after_icw3 }
            }
            // The wiring is fixed.
            Expects::Icw3 => after_icw3,
            Expects::Icw4 => {
                self.auto_eoi = value & ICW4_AUTO_EOI != 0;
                self.special_fully_nested = value & ICW4_SPECIAL_FULLY_NESTED != 0;
                Expects::Mask
            }
        };
    }

    fn read(&mut self, data: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            return match self.request() {
                Some(input) => {
                    self.acknowledge(input);
                    0x80 | input
                }
                None => 0,
            };
        }
        match (data, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }
}

/// Both controllers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicPair {
    master: Pic,
    slave: Pic,
}

impl Default for PicPair {
    fn default() -> PicPair {
        PicPair::new()
    }
}

impl PicPair {
    /// Power-on state: everything masked until the initialisation sequence.
    pub fn new() -> PicPair {
        PicPair { master: Pic::new(true), slave: Pic::new(false) }
    }

    /// Power-on state, with the inputs as they are.
    pub fn reset(&mut self) {
        let (master, slave) = (self.master.lines & !(1 << CASCADE), self.slave.lines);
        *self = PicPair::new();
        (self.master.lines, self.slave.lines) = (master, slave);
    }

    /// Sets the level of input `irq`, 0 to 15. Input 2 does not exist.
    pub fn set_irq(&mut self, irq: u8, level: bool) {
        match irq {
            CASCADE => {}
            0..8 => self.master.set_line(irq, level),
            8..16 => self.slave.set_line(irq - 8, level),
            _ => {}
        }
        self.cascade();
    }

    /// Makes `irq` level triggered, as firmware does for PCI's interrupts.
    pub fn set_level_triggered(&mut self, irq: u8) {
        let (pic, writable) = if irq < 8 { (&mut self.master, ELCR_WRITABLE[0]) } else { (&mut self.slave, ELCR_WRITABLE[1]) };
        pic.elcr |= 1 << (irq & 7) & writable;
    }

    /// Level of INTR.
    pub fn output(&self) -> bool {
        self.master.request().is_some()
    }

    /// Interrupt acknowledge cycle: the vector.
    pub fn acknowledge(&mut self) -> u8 {
        let Some(input) = self.master.request() else { return self.master.vector_base | SPURIOUS };
        self.master.acknowledge(input);
        if input != CASCADE {
            return self.master.vector_base | input;
        }
        let vector = match self.slave.request() {
            Some(input) => {
                self.slave.acknowledge(input);
                self.slave.vector_base | input
            }
            None => self.slave.vector_base | SPURIOUS,
        };
        self.cascade();
        vector
    }

    /// Read of one of the six ports.
    pub fn read(&mut self, port: u16) -> u8 {
        let value = match port {
            MASTER | 0x21 => self.master.read(port & 1 != 0),
            SLAVE | 0xa1 => self.slave.read(port & 1 != 0),
            ELCR => self.master.elcr,
            0x4d1 => self.slave.elcr,
            _ => 0xff,
        };
        self.cascade();
        value
    }

    /// Write to one of the six ports.
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            MASTER => self.master.write_command(value),
            0x21 => self.master.write_data(value),
            SLAVE => self.slave.write_command(value),
            0xa1 => self.slave.write_data(value),
            ELCR => self.master.elcr = value & ELCR_WRITABLE[0],
            0x4d1 => self.slave.elcr = value & ELCR_WRITABLE[1],
            _ => {}
        }
        self.cascade();
    }

    fn cascade(&mut self) {
        let slave = self.slave.request().is_some();
        self.master.set_line(CASCADE, slave);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As Linux initialises it: vectors 0x30 and 0x38, nothing masked.
    fn pair() -> PicPair {
        let mut pair = PicPair::new();
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0xa0, 0x11), (0xa1, 0x38), (0xa1, 2), (0xa1, 1)] {
            pair.write(port, value);
        }
        pair.write(0x21, 0);
        pair.write(0xa1, 0);
        pair
    }

    fn pulse(pair: &mut PicPair, irq: u8) {
        pair.set_irq(irq, true);
        pair.set_irq(irq, false);
    }

    #[test]
    fn lower_input_wins_and_blocks_until_eoi() {
        let mut pair = pair();
        pulse(&mut pair, 4);
        pulse(&mut pair, 1);
        assert_eq!(pair.acknowledge(), 0x31);
        assert!(!pair.output());
        pair.write(0x20, 0x20);
        assert_eq!(pair.acknowledge(), 0x34);
    }

    #[test]
    fn slave_interrupts_come_through_the_cascade() {
        let mut pair = pair();
        pulse(&mut pair, 8);
        pulse(&mut pair, 12);
        assert_eq!(pair.acknowledge(), 0x38);
        assert!(!pair.output());
        pair.write(0xa0, 0x20);
        assert!(!pair.output(), "the master's input 2 is still in service");
        pair.write(0x20, 0x20);
        assert_eq!(pair.acknowledge(), 0x3c);
    }

    #[test]
    fn edge_is_latched_once_and_level_repeats() {
        let mut pair = pair();
        pair.set_irq(5, true);
        assert_eq!(pair.acknowledge(), 0x35);
        pair.write(0x20, 0x65);
        assert!(!pair.output(), "an edge is one interrupt");
        pair.set_irq(5, false);
        pair.write(ELCR, 0x20);
        pair.set_irq(5, true);
        assert_eq!(pair.acknowledge(), 0x35);
        pair.write(0x20, 0x65);
        assert!(pair.output(), "a level goes on");
        pair.set_irq(5, false);
        assert!(!pair.output());
        assert_eq!(pair.acknowledge(), 0x37, "spurious");
        pair.write(0x20, 0x0b);
        assert_eq!(pair.read(0x20), 0, "a spurious interrupt is not in service");
    }

    #[test]
    fn masked_request_waits() {
        let mut pair = pair();
        pair.write(0x21, 0x08);
        pulse(&mut pair, 3);
        assert!(!pair.output());
        pair.write(0x20, 0x0a);
        assert_eq!(pair.read(0x20), 0x08);
        pair.write(0x21, 0);
        assert_eq!(pair.acknowledge(), 0x33);
    }

    #[test]
    fn auto_eoi_leaves_nothing_in_service() {
        let mut pair = pair();
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3)] {
            pair.write(port, value);
        }
        pulse(&mut pair, 3);
        pulse(&mut pair, 1);
        assert_eq!(pair.acknowledge(), 0x31);
        assert_eq!(pair.acknowledge(), 0x33);
        assert!(!pair.output());
    }

    #[test]
    fn rotation_puts_the_served_input_last() {
        let mut pair = pair();
        pulse(&mut pair, 1);
        pair.acknowledge();
        pair.write(0x20, 0xa0);
        pulse(&mut pair, 1);
        pulse(&mut pair, 3);
        assert_eq!(pair.acknowledge(), 0x33);
        pair.write(0x20, 0xc7 & 0xc0 | 7);
        pair.write(0x20, 0x63);
        assert_eq!(pair.acknowledge(), 0x31, "set priority 7 restores the usual order");
    }

    #[test]
    fn special_mask_lets_lower_inputs_through() {
        let mut pair = pair();
        pulse(&mut pair, 1);
        pair.acknowledge();
        pulse(&mut pair, 4);
        assert!(!pair.output());
        pair.write(0x21, 0x02);
        pair.write(0x20, 0x68);
        assert_eq!(pair.acknowledge(), 0x34);
    }

    #[test]
    fn poll_acknowledges() {
        let mut pair = pair();
        pulse(&mut pair, 6);
        pair.write(0x20, 0x0c);
        assert_eq!(pair.read(0x20), 0x86);
        assert!(!pair.output());
        pair.write(0x20, 0x0c);
        assert_eq!(pair.read(0x20), 0);
        pair.write(0x20, 0x0b);
        assert_eq!(pair.read(0x20), 0x40);
    }

    #[test]
    fn timer_cannot_be_made_level_triggered() {
        let mut pair = pair();
        pair.write(ELCR, 0xff);
        pair.write(0x4d1, 0xff);
        assert_eq!((pair.read(ELCR), pair.read(0x4d1)), (0xf8, 0xde));
    }

    proptest! {
        #[test]
        fn no_guest_input_panics(steps in prop::collection::vec((0u8..5, 0usize..6, any::<u8>()), 0..300)) {
            const PORTS: [u16; 6] = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1];
            let mut pair = PicPair::new();
            for (what, port, value) in steps {
                match what {
                    0 => { pair.read(PORTS[port]); }
                    1 => pair.write(PORTS[port], value),
                    2 => pair.set_irq(value & 15, value & 16 != 0),
                    3 => { pair.acknowledge(); }
                    _ => { pair.output(); }
                }
            }
        }
    }
}
