//! The bus itself: configuration mechanism #1, BAR routes, assignment of addresses.

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use abi::pci::*;

use super::PciFunction;
use super::config::{BarKind, ConfigState};
use crate::interrupts::{InterruptRouter, pci_irq};
use crate::snapshot::{RestoreError, Saved, Snapshot};
use crate::{DeviceMap, MmioDevice, PortDevice};

/// Name and version in a [`Saved`] state.
const STATE: (&str, u32) = ("pci", 1);
/// Memory addresses that BARs can have. RAM ends below it, the I/O APIC begins above it.
pub const MEMORY_WINDOW: RangeInclusive<u64> = 0xc000_0000..=0xfebf_ffff;
/// Ports that [`PciBus::assign`] gives to BARs.
pub const IO_WINDOW: RangeInclusive<u16> = 0xc000..=0xffff;
/// Ports at which a BAR answers; below are those of the board.
const IO_DECODED: RangeInclusive<u16> = 0x1000..=0xffff;
/// Memory BARs get at least a page, so that each can be mapped apart.
const PAGE: u64 = 0x1000;
const SLOTS: u8 = 32;
const FUNCTIONS: u8 = 8;

/// Place of a function on bus 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciAddress {
    /// Device number, 0 to 31.
    pub slot: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

/// Why the bus cannot be built.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciError {
    /// Slot and function are taken, or do not exist.
    #[error("PCI address 00:{:02x}.{} is taken or does not exist", .0.slot, .0.function)]
    Address(PciAddress),
    /// All 32 slots are taken.
    #[error("more than 31 PCI devices")]
    Full,
    /// The BARs do not fit into their window.
    #[error("PCI devices need more than the {0} window holds")]
    Window(&'static str),
}

/// Where an access goes.
#[derive(Clone)]
struct Route {
    range: Range<u64>,
    function: Arc<dyn PciFunction>,
    bar: u8,
}

#[derive(Default)]
struct Routes {
    memory: Vec<Route>,
    io: Vec<Route>,
}

/// Bus 0 of the machine.
#[derive(Default)]
pub struct PciBus {
    functions: BTreeMap<PciAddress, Arc<dyn PciFunction>>,
    /// What was written to port 0xcf8.
    address: AtomicU32,
    /// Slots whose functions are unplugged, by their bits.
    unplugged: AtomicU32,
    routes: RwLock<Routes>,
}

impl PciBus {
    /// An empty bus.
    pub fn new() -> PciBus {
        PciBus::default()
    }

    /// Puts `function` at `address`, its INTA wired as `router` does.
    ///
    /// # Errors
    /// [`PciError::Address`] when that is taken.
    pub fn add(&mut self, address: PciAddress, function: Arc<dyn PciFunction>, router: &Arc<InterruptRouter>) -> Result<(), PciError> {
        if address.slot >= SLOTS || address.function >= FUNCTIONS || self.functions.contains_key(&address) {
            return Err(PciError::Address(address));
        }
        if function.config().has_intx() {
            function.config().connect(router.pci_line(address.slot, 0));
        }
        self.functions.insert(address, function);
        Ok(())
    }

    /// Puts `function` at the first free slot; says which.
    ///
    /// # Errors
    /// [`PciError::Full`] when there is none.
    pub fn add_next(&mut self, function: Arc<dyn PciFunction>, router: &Arc<InterruptRouter>) -> Result<PciAddress, PciError> {
        let free = |slot: &u8| !self.functions.keys().any(|taken| taken.slot == *slot);
        let slot = (1..SLOTS).find(free).ok_or(PciError::Full)?;
        let address = PciAddress { slot, function: 0 };
        self.add(address, function, router)?;
        Ok(address)
    }

    /// Programs BARs, interrupt lines and command registers as firmware does. Firmware may do it again.
    ///
    /// # Errors
    /// [`PciError::Window`] when there are not enough addresses.
    pub fn assign(&self) -> Result<(), PciError> {
        let mut memory = *MEMORY_WINDOW.start();
        let mut io = u64::from(*IO_WINDOW.start());
        for (address, function) in &self.functions {
            let config = function.config();
            let mut command = 0;
            for (index, kind, size) in config.bars() {
                let (next, end, size, enable, name) = match kind {
                    BarKind::Io => (&mut io, u64::from(*IO_WINDOW.end()), size, COMMAND_IO, "I/O"),
                    _ => (&mut memory, *MEMORY_WINDOW.end(), size.max(PAGE), COMMAND_MEMORY, "memory"),
                };
                let base = next.next_multiple_of(size);
                if base + (size - 1) > end {
                    return Err(PciError::Window(name));
                }
                *next = base + size;
                command |= enable;
                config.set_bar(index, base);
            }
            if config.has_intx() {
                config.write(INTERRUPT_LINE, &[pci_irq(address.slot, 0)]);
            }
            if command != 0 {
                config.write(COMMAND, &command.to_le_bytes());
            }
        }
        self.update_routes();
        Ok(())
    }

    /// Puts the bus into `map`: the configuration ports, and all addresses that BARs can have. Devices that have fixed ports or
    /// addresses among these must be added later.
    pub fn map(self: &Arc<Self>, map: &mut DeviceMap) {
        map.add_ports(CONFIG_ADDRESS..=CONFIG_DATA + 3, Arc::new(ConfigPorts(self.clone())));
        map.add_ports(IO_DECODED, Arc::new(IoWindow(self.clone())));
        map.add_mmio(MEMORY_WINDOW, Arc::new(MemoryWindow(self.clone())));
    }

    /// The functions and where they are.
    pub fn functions(&self) -> impl Iterator<Item = (PciAddress, &Arc<dyn PciFunction>)> {
        self.functions.iter().map(|(address, function)| (*address, function))
    }

    /// Takes a function, with all others of its slot, off the bus until power goes: it stops, and answers nowhere.
    pub fn unplug(&self, address: PciAddress) {
        self.unplugged.fetch_or(1 << (address.slot % SLOTS), Ordering::SeqCst);
        self.update_routes();
        self.functions.iter().filter(|(at, _)| at.slot == address.slot).for_each(|(_, function)| function.reset());
    }

    /// Power-on state of the bus and all functions. Follow it with [`PciBus::assign`].
    pub fn reset(&self) {
        self.address.store(0, Ordering::Relaxed);
        self.unplugged.store(0, Ordering::SeqCst);
        for function in self.functions.values() {
            function.reset();
            function.config().reset();
        }
        self.update_routes();
    }

    /// Read of configuration space; functions that do not exist read as ones.
    pub fn config_read(&self, address: PciAddress, offset: u8, data: &mut [u8]) {
        match self.plugged(address) {
            Some(function) => {
                if !function.config_read(offset, data) {
                    function.config().read(offset, data);
                }
                self.mark_multi_function(address, offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Write to configuration space.
    pub fn config_write(&self, address: PciAddress, offset: u8, data: &[u8]) {
        if let Some(function) = self.plugged(address) {
            if function.config().write(offset, data) {
                self.update_routes();
            }
            function.config_written(offset, data.len());
        }
    }

    fn plugged(&self, address: PciAddress) -> Option<&Arc<dyn PciFunction>> {
        self.functions.get(&address).filter(|_| self.unplugged.load(Ordering::SeqCst) & 1 << (address.slot % SLOTS) == 0)
    }

    /// Header type bit 7 of function 0 says whether there are others; the bus knows, the function does not.
    fn mark_multi_function(&self, address: PciAddress, offset: u8, data: &mut [u8]) {
        let Some(at) = HEADER_TYPE.checked_sub(offset) else { return };
        let others = self.functions.range(address..).nth(1).is_some_and(|(next, _)| next.slot == address.slot);
        if let (0, true, Some(byte)) = (address.function, others, data.get_mut(usize::from(at))) {
            *byte |= HEADER_MULTI_FUNCTION;
        }
    }

    fn update_routes(&self) {
        let mut routes = self.routes.write().unwrap_or_else(PoisonError::into_inner);
        let mut new = Routes::default();
        for function in self.functions.keys().filter_map(|address| self.plugged(*address)) {
            for (bar, io, range) in function.config().active_bars() {
                let list = if io { &mut new.io } else { &mut new.memory };
                list.push(Route { range, function: function.clone(), bar });
            }
        }
        *routes = new;
    }

    /// The function that answers at `at`. The lock is not held while it does.
    fn route(&self, io: bool, at: u64) -> Option<(Route, u64)> {
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        let list = if io { &routes.io } else { &routes.memory };
        let route = list.iter().find(|route| route.range.contains(&at))?;
        Some((route.clone(), at - route.range.start))
    }

    fn read(&self, io: bool, at: u64, data: &mut [u8]) {
        match self.route(io, at) {
            Some((Route { function, bar, .. }, offset)) => match function.config().msix() {
                Some(msix) if msix.covers(bar, offset) => msix.read(offset, data),
                _ => function.bar_read(bar, offset, data),
            },
            None => data.fill(0xff),
        }
    }

    fn write(&self, io: bool, at: u64, data: &[u8]) {
        if let Some((Route { function, bar, .. }, offset)) = self.route(io, at) {
            match function.config().msix() {
                Some(msix) if msix.covers(bar, offset) => msix.write(offset, data),
                _ => function.bar_write(bar, offset, data),
            }
        }
    }

    /// Function and register that port 0xcf8 points at, for an access at `port`.
    fn selected(&self, port: u16) -> Option<(PciAddress, u8)> {
        let address = self.address.load(Ordering::Relaxed);
        let bus = address >> 16 & 0xff;
        let place = PciAddress { slot: (address >> 11 & 0x1f) as u8, function: (address >> 8 & 7) as u8 };
        (address & CONFIG_ENABLE != 0 && bus == 0).then_some((place, (address & 0xfc) as u8 | (port & 3) as u8))
    }
}

impl Snapshot for PciBus {
    fn state(&self) -> Saved {
        let functions: Vec<_> = self.functions.iter().map(|(at, f)| (at.slot, at.function, f.config().state())).collect();
        Saved::new(STATE.0, STATE.1, &(self.address.load(Ordering::Relaxed), functions))
    }

    fn restore(&self, state: &Saved) -> Result<(), RestoreError> {
        let (address, functions): (u32, Vec<(u8, u8, ConfigState)>) = state.open(STATE.0, STATE.1)?;
        let there = self.functions.keys().map(|at| (at.slot, at.function));
        if !there.eq(functions.iter().map(|(slot, function, _)| (*slot, *function))) {
            return Err(RestoreError::Impossible { device: STATE.0, what: "the bus has other functions" });
        }
        self.address.store(address, Ordering::Relaxed);
        for (function, (_, _, config)) in self.functions.values().zip(&functions) {
            function.config().restore(config);
        }
        self.update_routes();
        Ok(())
    }
}

struct ConfigPorts(Arc<PciBus>);

impl PortDevice for ConfigPorts {
    fn port_in(&self, port: u16, size: u8) -> u32 {
        if port < CONFIG_DATA {
            return if (port, size) == (CONFIG_ADDRESS, 4) { self.0.address.load(Ordering::Relaxed) } else { u32::MAX };
        }
        let Some((address, offset)) = self.0.selected(port) else { return u32::MAX };
        let mut data = [0; 4];
        self.0.config_read(address, offset, &mut data[..usize::from(size.min(4))]);
        u32::from_le_bytes(data)
    }

    fn port_out(&self, port: u16, size: u8, value: u32) {
        if (port, size) == (CONFIG_ADDRESS, 4) {
            self.0.address.store(value & !0x7f00_0003, Ordering::Relaxed);
        } else if port >= CONFIG_DATA
            && let Some((address, offset)) = self.0.selected(port)
        {
            self.0.config_write(address, offset, &value.to_le_bytes()[..usize::from(size.min(4))]);
        }
    }
}

struct IoWindow(Arc<PciBus>);

impl PortDevice for IoWindow {
    fn port_in(&self, port: u16, size: u8) -> u32 {
        let mut data = [0; 4];
        self.0.read(true, u64::from(port), &mut data[..usize::from(size.min(4))]);
        u32::from_le_bytes(data)
    }

    fn port_out(&self, port: u16, size: u8, value: u32) {
        self.0.write(true, u64::from(port), &value.to_le_bytes()[..usize::from(size.min(4))]);
    }
}

struct MemoryWindow(Arc<PciBus>);

impl MmioDevice for MemoryWindow {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(false, MEMORY_WINDOW.start() + offset, data);
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        self.0.write(false, MEMORY_WINDOW.start() + offset, data);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::MsiSink;
    use crate::interrupts::InterruptSink;
    use crate::pci::{Msix, PciConfig, PciIdentity, host_bridge, isa_bridge};

    struct Nobody;
    impl MsiSink for Nobody {
        fn signal_msi(&self, _: u64, _: u32) {}
    }
    impl InterruptSink for Nobody {
        fn set_extint(&self, _: bool) {}
        fn set_ioapic_routes(&self, _: &[Option<vmm::backend::IoapicRoute>]) {}
    }

    /// A function with 32 ports, a page of registers and MSI-X.
    struct Device {
        config: PciConfig,
        writes: Mutex<Vec<(u8, u64, Vec<u8>)>>,
    }

    impl Device {
        fn new() -> Arc<Device> {
            let identity = PciIdentity { vendor: 0x1af4, device: 0x1041, class: 0x02_0000, revision: 1, subsystem_vendor: 0, subsystem: 0 };
            let config = PciConfig::new(identity)
                .with_bar(0, BarKind::Io, 32)
                .with_bar(1, BarKind::Memory32, 0x1000)
                .with_bar(4, BarKind::Memory64, 0x4000)
                .with_msix(Msix::new(4, Arc::new(Nobody)), 1, 0, 0x800)
                .with_intx();
            Arc::new(Device { config, writes: Mutex::default() })
        }
    }

    impl PciFunction for Device {
        fn config(&self) -> &PciConfig {
            &self.config
        }
        fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
            data.fill(bar << 4 | offset as u8);
        }
        fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
            self.writes.lock().unwrap().push((bar, offset, data.to_vec()));
        }
        fn reset(&self) {}
    }

    fn machine() -> (Arc<Device>, Arc<PciBus>, DeviceMap) {
        let router = InterruptRouter::new(Arc::new(Nobody));
        let mut bus = PciBus::new();
        bus.add(PciAddress { slot: 0, function: 0 }, host_bridge(), &router).unwrap();
        bus.add(PciAddress { slot: 1, function: 0 }, isa_bridge(), &router).unwrap();
        let device = Device::new();
        assert_eq!(bus.add_next(device.clone(), &router), Ok(PciAddress { slot: 2, function: 0 }));
        bus.assign().unwrap();
        let bus = Arc::new(bus);
        let mut map = DeviceMap::default();
        bus.map(&mut map);
        (device, bus, map)
    }

    fn config(map: &DeviceMap, slot: u32, register: u32) -> u32 {
        map.port(0xcf8).unwrap().port_out(0xcf8, 4, CONFIG_ENABLE | slot << 11 | register);
        map.port(0xcfc).unwrap().port_in(0xcfc, 4)
    }

    #[test]
    fn configuration_space_is_reached_by_the_ports() {
        let (_, _, map) = machine();
        assert_eq!(config(&map, 0, 0), 0x1237_8086);
        assert_eq!(config(&map, 1, 0), 0x7000_8086);
        assert_eq!(config(&map, 2, 0), 0x1041_1af4);
        assert_eq!(config(&map, 3, 0), u32::MAX);
        assert_eq!(map.port(0xcfe).unwrap().port_in(0xcfe, 2), 0xffff);
        config(&map, 2, 0);
        assert_eq!(map.port(0xcfe).unwrap().port_in(0xcfe, 2), 0x1041);
    }

    #[test]
    fn bars_are_assigned_and_reach_the_function() {
        let (device, _, map) = machine();
        assert_eq!(config(&map, 2, 0x10), 0xc001);
        assert_eq!(config(&map, 2, 0x3c) & 0xff, 10);
        let base = u64::from(config(&map, 2, 0x20) & !0xf);
        let (window, offset) = map.mmio(base + 8).unwrap();
        window.mmio_write(offset, &[1, 2]);
        map.port(0xc004).unwrap().port_out(0xc004, 2, 0x0605);
        assert_eq!(*device.writes.lock().unwrap(), [(4, 8, vec![1, 2]), (0, 4, vec![5, 6])]);
        assert_eq!(map.port(0xc003).unwrap().port_in(0xc003, 1), 3);
        assert_eq!(map.port(0xc020).unwrap().port_in(0xc020, 1), 0xff);
    }

    #[test]
    fn moved_bar_answers_at_its_new_address_only() {
        let (_, bus, map) = machine();
        let place = PciAddress { slot: 2, function: 0 };
        let old = config(&map, 2, 0x10) & !1;
        bus.config_write(place, 0x10, &0xd000u32.to_le_bytes());
        assert_eq!(map.port(0xd002).unwrap().port_in(0xd002, 1), 2);
        assert_eq!(map.port(old as u16).unwrap().port_in(old as u16, 1), 0xff);
        bus.config_write(place, COMMAND, &[0, 0]);
        assert_eq!(map.port(0xd002).unwrap().port_in(0xd002, 1), 0xff);
    }

    #[test]
    fn msix_table_is_not_the_functions_business() {
        let (device, _, map) = machine();
        let base = u64::from(config(&map, 2, 0x14));
        let (window, offset) = map.mmio(base + 8).unwrap();
        window.mmio_write(offset, &7u32.to_le_bytes());
        let mut data = [0; 4];
        window.mmio_read(offset, &mut data);
        assert_eq!(u32::from_le_bytes(data), 7);
        assert!(device.writes.lock().unwrap().is_empty());
    }

    #[test]
    fn second_function_makes_the_first_say_so() {
        let router = InterruptRouter::new(Arc::new(Nobody));
        let mut bus = PciBus::new();
        for function in [0, 1] {
            bus.add(PciAddress { slot: 3, function }, isa_bridge(), &router).unwrap();
        }
        let mut header = [0];
        bus.config_read(PciAddress { slot: 3, function: 0 }, HEADER_TYPE, &mut header);
        assert_eq!(header, [HEADER_MULTI_FUNCTION]);
        assert!(bus.add(PciAddress { slot: 3, function: 1 }, isa_bridge(), &router).is_err());
    }

    #[test]
    fn state_survives_a_restore() {
        let (_, bus, map) = machine();
        bus.config_write(PciAddress { slot: 2, function: 0 }, 0x10, &0xd000u32.to_le_bytes());
        config(&map, 2, 0x40);
        let (_, other, other_map) = machine();
        other.restore(&bus.state()).unwrap();
        assert_eq!(other.state(), bus.state());
        assert_eq!(other_map.port(0xd002).unwrap().port_in(0xd002, 1), 2);
    }

    proptest! {
        #[test]
        fn no_guest_input_panics(steps in prop::collection::vec((0u8..6, any::<u32>(), any::<u32>(), 0usize..3), 0..200)) {
            let (_, _, map) = machine();
            for (what, at, value, size) in steps {
                let size = [1, 2, 4][size];
                let port = 0xcfc + (at & 3) as u16;
                match what {
                    0 => { config(&map, at >> 8 & 3, at & 0xfc); }
                    1 => map.port(port).unwrap().port_out(port, size, value),
                    2 => { map.port(port).unwrap().port_in(port, size); }
                    3 => map.port(0xcf8).unwrap().port_out(0xcf8 + (at & 3) as u16, size, value),
                    4 => {
                        let (window, offset) = map.mmio(0xc000_0000 + u64::from(at & 0x7fff)).unwrap();
                        window.mmio_write(offset, &value.to_le_bytes()[..usize::from(size)]);
                        window.mmio_read(offset, &mut [0; 8]);
                    }
                    _ => { map.port(0xc000 + (at & 0x3f) as u16).unwrap().port_in(0xc000 + (at & 0x3f) as u16, size); }
                }
            }
        }
    }
}
