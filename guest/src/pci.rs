//! PCI: the functions that are there, by configuration mechanism #1 (PCI Local Bus Specification 3.0 sections 3.2.2.3.2 and 6).
//!
//! Firmware, or a monitor that starts kernels without any, has given addresses to everything; they are read, never changed.
#![allow(unsafe_code)] // Port I/O.

use alloc::vec::Vec;
use core::fmt;

use abi::pci::*;

use crate::cpu::{inl, outl};

const SLOTS: u8 = 32;
const FUNCTIONS: u8 = 8;
const BARS: u8 = 6;
/// What a function that is not there reads as.
const NOBODY: u16 = 0xffff;
/// Class and subclass of a bridge to another PCI bus, whose number stands at [`SECONDARY_BUS`].
const CLASS_BRIDGE: u32 = 0x0604;
const SECONDARY_BUS: u8 = 0x19;
/// Header type without the bit for several functions: an ordinary one, which has six BARs and capabilities.
const HEADER_ORDINARY: u8 = 0;

/// Place of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// Bus number.
    pub bus: u8,
    /// Device number.
    pub slot: u8,
    /// Function number.
    pub function: u8,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.bus, self.slot, self.function)
    }
}

/// Where a BAR leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bar {
    /// First port.
    Io(u16),
    /// First address.
    Memory(u64),
}

impl Address {
    /// Four bytes of configuration space; `offset` is a multiple of 4.
    pub fn read32(self, offset: u8) -> u32 {
        self.select(offset);
        inl(CONFIG_DATA)
    }

    /// Two bytes of configuration space; `offset` is even.
    pub fn read16(self, offset: u8) -> u16 {
        (self.read32(offset) >> (8 * (offset & 2))) as u16
    }

    /// A byte of configuration space.
    pub fn read8(self, offset: u8) -> u8 {
        self.read32(offset).to_le_bytes()[usize::from(offset & 3)]
    }

    fn select(self, offset: u8) {
        let place = u32::from(self.bus) << 16 | u32::from(self.slot) << 11 | u32::from(self.function) << 8;
        // SAFETY: selects, and does nothing else.
        unsafe { outl(CONFIG_ADDRESS, CONFIG_ENABLE | place | u32::from(offset & !3)) };
    }

    /// Vendor and device, when there is a function here.
    pub fn id(self) -> Option<(u16, u16)> {
        let vendor = self.read16(VENDOR_ID);
        (vendor != NOBODY).then(|| (vendor, self.read16(DEVICE_ID)))
    }

    /// Class, subclass and programming interface, a byte each.
    pub fn class(self) -> u32 {
        self.read32(REVISION) >> 8
    }

    /// Interrupt of the 8259 pair, when the function has one.
    pub fn irq(self) -> Option<u8> {
        let (line, pin) = (self.read8(INTERRUPT_LINE), self.read8(INTERRUPT_PIN));
        (pin != 0 && (1..16).contains(&line)).then_some(line)
    }

    /// The BARs in use.
    pub fn bars(self) -> Vec<(u8, Bar)> {
        let mut bars = Vec::new();
        let mut index = 0;
        while index < BARS && self.header() == HEADER_ORDINARY {
            let number = index;
            let at = |index| self.read32(BAR0 + 4 * index);
            let low = at(index);
            index += 1;
            if low & BAR_IO != 0 {
                bars.push((number, Bar::Io((low & !3) as u16)));
                continue;
            }
            let mut address = u64::from(low & !0xf);
            if low & BAR_MEMORY_64 != 0 && index < BARS {
                address |= u64::from(at(index)) << 32;
                index += 1;
            }
            if address != 0 {
                bars.push((number, Bar::Memory(address)));
            }
        }
        bars
    }

    /// Identifications and places of the capabilities.
    pub fn capabilities(self) -> Vec<(u8, u8)> {
        let mut capabilities = Vec::new();
        if self.read16(STATUS) & STATUS_CAPABILITIES == 0 || self.header() != HEADER_ORDINARY {
            return capabilities;
        }
        let mut at = self.read8(CAPABILITIES) & !3;
        // A list that bites its tail ends all the same: there is room for so many.
        while at >= FIRST_CAPABILITY && capabilities.len() < usize::from(u8::MAX - FIRST_CAPABILITY) / 4 {
            capabilities.push((self.read8(at), at));
            at = self.read8(at + 1) & !3;
        }
        capabilities
    }

    fn header(self) -> u8 {
        self.read8(HEADER_TYPE) & !HEADER_MULTI_FUNCTION
    }
}

/// All functions, on bus 0 and behind its bridges.
pub fn functions() -> Vec<Address> {
    let mut found = Vec::new();
    let mut buses = alloc::vec![0];
    let mut next = 0;
    while let Some(&bus) = buses.get(next) {
        next += 1;
        for slot in 0..SLOTS {
            let first = Address { bus, slot, function: 0 };
            if first.id().is_none() {
                continue;
            }
            let count = if first.read8(HEADER_TYPE) & HEADER_MULTI_FUNCTION != 0 { FUNCTIONS } else { 1 };
            for address in (0..count).map(|function| Address { bus, slot, function }).filter(|address| address.id().is_some()) {
                found.push(address);
                let secondary = address.read8(SECONDARY_BUS);
                if address.class() >> 8 == CLASS_BRIDGE && !buses.contains(&secondary) {
                    buses.push(secondary);
                }
            }
        }
    }
    found
}
