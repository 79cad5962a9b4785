//! What a machine with the Xen dialect has besides: memory that is no RAM, its domain in XenStore ([`Domain`]), and backends.
//!
//! ```text
//!   0x1000        what SeaBIOS finds of the machine, when it boots (`firmware.rs`), and its tables at 0xfc000000
//!   0xc0000000    the platform device's memory BAR, where HVM guests place the grant table
//!   0xfeff8000    special pages: the rings of XenStore and console; reserved in the memory map
//!   above RAM     from 4 GiB, 128 MiB that the map does not mention: a PVH Linux places its grant table at their end
//! ```

mod device;
mod disk;
mod domain;
pub mod firmware;
mod nic;
mod ring;

use std::sync::Arc;

use abi::boot::E820_RESERVED;
use abi::xen::hvm::{SPECIAL_PAGES, SPECIAL_PAGES_SIZE};
use devices::MachineEvents;
use devices::interrupts::{InterruptRouter, PCI_GSI, PCI_GSIS};
use devices::pci::{MEMORY_WINDOW, PciAddress, PciBus};
use dialects::xen::{MAX_FRAMES, Machine, SetLine, Shutdown, Wire};
use vmm::memory::PAGE_SIZE;

use crate::boot::{E820Range, HIGH_RAM_START, LOW_RAM_END};

/// Where the platform device's memory BAR is: it is the first device that has one, and so at the beginning of the window.
pub const PLATFORM_MEMORY: u64 = *MEMORY_WINDOW.start();
/// What Linux takes at once, aligned, for pages that it thinks without memory (`drivers/xen/unpopulated-alloc.c`, `PAGES_PER_SECTION`).
const SECTION: u64 = 128 << 20;

/// Ranges (address, size) of memory for the dialect, in a machine with `memory_size` bytes of RAM.
pub fn memory(memory_size: u64) -> Vec<(u64, u64)> {
    let mut ranges = vec![
        (PLATFORM_MEMORY, u64::from(MAX_FRAMES) * PAGE_SIZE),
        (firmware::TABLES, firmware::TABLES_SIZE),
        (SPECIAL_PAGES, SPECIAL_PAGES_SIZE),
    ];
    let end_of_ram = HIGH_RAM_START + memory_size.saturating_sub(LOW_RAM_END);
    ranges.push((end_of_ram.next_multiple_of(SECTION), SECTION));
    ranges
}

/// What the memory map says of it.
pub fn reserved() -> E820Range {
    E820Range { start: SPECIAL_PAGES, size: SPECIAL_PAGES_SIZE, kind: E820_RESERVED }
}

pub use domain::Domain;

/// The plugs of the machine, and of its emulated disks: those that firmware boots from, which are the Xen disks once more; and its interrupt lines.
pub struct Plugs {
    /// Ends the machine.
    pub events: Arc<dyn MachineEvents>,
    /// The bus of the emulated disks.
    pub pci: Arc<PciBus>,
    /// Where they are.
    pub disks: Vec<PciAddress>,
    /// Where lines lead.
    pub interrupts: Arc<InterruptRouter>,
}

impl Machine for Plugs {
    fn shut_down(&self, reason: Shutdown) {
        match reason {
            Shutdown::Reboot => self.events.reset(),
            Shutdown::PowerOff | Shutdown::Crash => self.events.power_off(),
        }
    }

    fn unplug_disks(&self, with_first: bool) {
        self.disks.iter().skip(usize::from(!with_first)).for_each(|disk| self.pci.unplug(*disk));
    }

    fn line(&self, wire: Wire) -> Option<SetLine> {
        let line = match wire {
            Wire::Gsi(irq @ 0..PCI_GSI) => self.interrupts.isa_line(irq),
            Wire::Gsi(gsi) if gsi < PCI_GSI + PCI_GSIS => self.interrupts.gsi_line(gsi),
            Wire::Gsi(_) => return None,
            Wire::Intx { slot, pin } => self.interrupts.pci_line(slot, pin),
        };
        Some(Box::new(move |level| line.set(level)))
    }
}

#[cfg(test)]
mod tests {
    use devices::MsiSink;
    use devices::interrupts::InterruptSink;
    use devices::xen_platform::{MEMORY_BAR, XenPlatform};
    use vmm::backend::IoapicRoute;

    use super::*;

    struct Nowhere;

    impl MsiSink for Nowhere {
        fn signal_msi(&self, _address: u64, _data: u32) {}
    }

    impl InterruptSink for Nowhere {
        fn set_extint(&self, _asserted: bool) {}
        fn set_ioapic_routes(&self, _routes: &[Option<IoapicRoute>]) {}
    }

    #[test]
    fn platform_devices_memory_is_where_the_memory_is() {
        let mut pci = PciBus::new();
        pci.add_next(XenPlatform::new(), &InterruptRouter::new(Arc::new(Nowhere))).unwrap();
        pci.assign().unwrap();
        let (_, function) = pci.functions().next().unwrap();
        let bars = function.config().active_bars();
        assert!(bars.iter().any(|(bar, _, range)| *bar == MEMORY_BAR && range.start == PLATFORM_MEMORY), "{bars:?}");
    }

    #[test]
    fn memory_lies_beside_ram_of_any_size() {
        for size in [2 << 20, 512 << 20, LOW_RAM_END, LOW_RAM_END + (1 << 30), 128 << 30] {
            let mut ranges = crate::boot::layout(size, 256 << 10);
            ranges.extend(memory(size));
            ranges.sort_unstable();
            assert!(ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{size:#x}: {ranges:x?}");
        }
    }
}
