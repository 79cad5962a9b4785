//! PCI: the functions that are there (PCI Local Bus Specification 3.0 chapter 6).
//!
//! Firmware, or a monitor that starts kernels without any, has given addresses to everything; they are read, never changed.

use alloc::vec::Vec;
use core::fmt;

use abi::pci::*;
use pvbus::Hal;
use pvbus::hal::PciAddress;

use crate::hal::Kernel;

const DEVICES: u8 = 32;
const FUNCTIONS: u8 = 8;
const BARS: u8 = 6;
/// What a function that is not there reads as.
const NOBODY: u16 = 0xffff;
/// Class and subclass of a bridge to another PCI bus, whose number stands at [`SECONDARY_BUS`].
const CLASS_BRIDGE: u32 = 0x0604;
const SECONDARY_BUS: u8 = 0x19;
/// Header type without the bit for several functions: an ordinary one, which has six BARs and capabilities.
const HEADER_ORDINARY: u8 = 0;

/// A function, by its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Function(PciAddress);

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PciAddress { bus, device, function } = self.0;
        write!(f, "{bus}:{device}:{function}")
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

impl Function {
    /// Four bytes of configuration space; `offset` is a multiple of 4.
    pub fn read32(self, offset: u8) -> u32 {
        Kernel.pci_read(self.0, offset & !3).unwrap_or(u32::MAX)
    }

    /// Two bytes of configuration space; `offset` is even.
    pub fn read16(self, offset: u8) -> u16 {
        (self.read32(offset) >> (8 * (offset & 2))) as u16
    }

    /// A byte of configuration space.
    pub fn read8(self, offset: u8) -> u8 {
        self.read32(offset).to_le_bytes()[usize::from(offset & 3)]
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
pub fn functions() -> Vec<Function> {
    let mut found = Vec::new();
    let mut buses = alloc::vec![0];
    let mut next = 0;
    while let Some(&bus) = buses.get(next) {
        next += 1;
        for device in 0..DEVICES {
            let at = |function| Function(PciAddress { bus, device, function });
            if at(0).id().is_none() {
                continue;
            }
            let count = if at(0).read8(HEADER_TYPE) & HEADER_MULTI_FUNCTION != 0 { FUNCTIONS } else { 1 };
            for function in (0..count).map(at).filter(|function| function.id().is_some()) {
                found.push(function);
                let secondary = function.read8(SECONDARY_BUS);
                if function.class() >> 8 == CLASS_BRIDGE && !buses.contains(&secondary) {
                    buses.push(secondary);
                }
            }
        }
    }
    found
}
