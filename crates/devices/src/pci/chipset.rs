//! The two functions a PC has by itself: host bridge and ISA bridge, as on the 440FX boards that firmware knows.
//!
//! Intel 82441FX (order 290549) and 82371SB (order 290550) data sheets. SeaBIOS looks for the host bridge and writes its PAM
//! registers to make 0xc0000-0xfffff writable; here that range is plain RAM, so the registers only remember what was written.
//! The ISA bridge's PIRQ registers remember too: the wires are fixed, see [`crate::interrupts::PCI_IRQS`].

use std::sync::Arc;

use super::{PciConfig, PciFunction, PciIdentity};

const INTEL: u16 = 0x8086;
/// Subsystem ids of QEMU's boards; Linux and SeaBIOS print them and nothing more.
const SUBSYSTEM: (u16, u16) = (0x1af4, 0x1100);
/// 82441FX: programmable attribute maps PAM0 to PAM6.
const PAM: u8 = 0x59;
/// 82441FX: system management RAM control.
const SMRAM: u8 = 0x72;
/// 82371SB: PIRQA to PIRQD routes; bit 7 means not routed.
const PIRQ: u8 = 0x60;

/// A function that is only its configuration space.
pub struct Chipset(PciConfig);

/// The 82441FX host bridge. It goes to slot 0.
pub fn host_bridge() -> Arc<Chipset> {
    let config = identity(0x1237, 0x06_0000, 2).with_bytes(PAM, &[0; 7], &[0xff; 7]).with_bytes(SMRAM, &[2], &[0x7f]);
    Arc::new(Chipset(config))
}

/// The 82371SB ISA bridge. It goes to slot 1.
pub fn isa_bridge() -> Arc<Chipset> {
    Arc::new(Chipset(identity(0x7000, 0x06_0100, 0).with_bytes(PIRQ, &[0x80; 4], &[0x8f; 4])))
}

fn identity(device: u16, class: u32, revision: u8) -> PciConfig {
    let (subsystem_vendor, subsystem) = SUBSYSTEM;
    PciConfig::new(PciIdentity { vendor: INTEL, device, class, revision, subsystem_vendor, subsystem })
}

impl PciFunction for Chipset {
    fn config(&self) -> &PciConfig {
        &self.0
    }

    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn reset(&self) {}
}
