//! The board: all devices of one machine, wired to each other and to the bus.
//!
//! ```text
//!   ISA   serial (IRQ 4), PIT (0), keyboard controller (1), reset ports, real-time clock (8),
//!         ACPI power management (9), firmware configuration
//!   PCI   00 host bridge, 01 ISA bridge, then disks and network cards in the order of the command line,
//!         a source of random numbers, and OpenBSD's control device where that dialect is
//! ```

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::acpi::{self, AcpiConfig, AcpiTables};
use devices::acpi_pm::AcpiPm;
use devices::debug_exit::DebugExit;
use devices::fw_cfg::{E820Entry, FwCfg, FwCfgItems};
use devices::i8042::{I8042, KEYBOARD_IRQ};
use devices::interrupts::{InterruptRouter, SCI_IRQ};
use devices::net::{self, NetError};
use devices::pci::{PciAddress, PciBus, PciError, host_bridge, isa_bridge};
use devices::pit::{Pit, TIMER_IRQ};
use devices::reset::ResetPorts;
use devices::rtc::{CmosConfig, RTC_IRQ, Rtc};
use devices::serial::{COM1, COM1_IRQ, Serial};
use devices::smbios::{self, Smbios, SmbiosConfig};
use devices::testdev::TestDevice;
use devices::virtio::block::Block;
use devices::virtio::console::Console;
use devices::virtio::net::Net;
use devices::virtio::rng::{HostEntropy, Rng};
use devices::virtio::vmmci::Vmmci;
use devices::virtio::{VirtioDevice, VirtioPci};
use devices::xen_platform::XenPlatform;
use devices::{DeviceBus, DeviceMap, MachineEvents};
use dialects::hyperv::Hyperv;
use dialects::hyperv::connections::{Connections, Synic};
use dialects::hyperv::vmbus::VmBus;
use dialects::store::Store;
use dialects::xen::Xen;
use vm_memory::{Bytes, GuestAddress};
use vmm::time::Timers;
use vmm::{BackendVm, GuestMemory};

use crate::boot::{self, E820Range, LOW_RAM_END};
use crate::bus::MachineBus;
use crate::config::{DialectName, MachineConfig, SerialTarget, Uuid};
use crate::hotplug::{Device, PlugError, Slots};
use crate::hyperv;
use crate::inventory::Inventory;
use crate::machine::{Event, EventSender, Outcome};
use crate::paravirtual::Paravirtual;
use crate::store::{MachineStore, StoreServer};
use crate::xen::{self, Domain, Plugs, firmware};

/// Why a board cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// A file that a device needs.
    #[error("{what}: {source}")]
    Host {
        /// What it is for.
        what: String,
        /// The host's answer.
        source: std::io::Error,
    },
    /// A card's network.
    #[error(transparent)]
    Net(#[from] NetError),
    /// More devices than the bus has room for.
    #[error(transparent)]
    Pci(#[from] PciError),
}

/// What a machine starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// A kernel, by the PVH protocol.
    Pvh,
    /// A kernel, by another one.
    Kernel,
    /// Firmware, which looks for a disk.
    Firmware,
}

/// What a board is given, already made.
pub struct Parts<'a> {
    /// The store, in which the machine is a domain with Xen's dialect, and whose keys Hyper-V's pools show.
    pub store: &'a Arc<MachineStore>,
    /// Who serves the ring of that domain.
    pub store_server: &'a StoreServer,
    /// Disks and network cards, in order of their slots.
    pub inventory: &'a Arc<Inventory>,
    /// The machine's UUID.
    pub identity: Uuid,
    /// What starts first.
    pub start: Start,
    /// The dialects.
    pub paravirtual: &'a Paravirtual,
    /// Names and contents of files in the firmware configuration device.
    pub files: Vec<(String, Vec<u8>)>,
}

/// Takes bytes that were typed; how many it took.
type ConsoleInput = Box<dyn Fn(&[u8]) -> usize + Send + Sync>;

/// The devices that somebody outside the processors talks to.
pub struct Board {
    serial: Arc<Serial>,
    /// The paravirtual console, when what is typed goes there.
    console: Option<ConsoleInput>,
    power: Arc<AcpiPm>,
    /// OpenBSD's control device, when that dialect is there.
    vmmci: Option<Arc<Vmmci>>,
    /// What the machine is in XenStore, when the Xen dialect is there.
    domain: Option<Domain>,
    /// What is on VMBus, when the Hyper-V dialect is there.
    hyperv: Option<hyperv::Devices>,
    pci: Arc<PciBus>,
}

impl Board {
    /// Builds all devices and the bus that reaches them.
    ///
    /// # Errors
    /// [`BoardError`] when a file, socket or interface that a device needs is not to be had.
    pub fn build(
        config: &MachineConfig,
        mut parts: Parts,
        vm: &Arc<dyn BackendVm>,
        memory: &GuestMemory,
        timers: &Arc<Timers>,
        events: EventSender,
    ) -> Result<(Board, MachineBus), BoardError> {
        let ended = Arc::new(AtomicBool::new(false));
        let sender = events.clone();
        let events: Arc<dyn MachineEvents> = Arc::new(Events { ended: Arc::clone(&ended), sender: events });
        let interrupts = InterruptRouter::new(Arc::new(Arc::clone(vm)));
        let mut map = DeviceMap::default();

        let mut pci = PciBus::new();
        pci.add(PciAddress { slot: 0, function: 0 }, host_bridge(), &interrupts)?;
        pci.add(PciAddress { slot: 1, function: 0 }, isa_bridge(), &interrupts)?;
        if parts.paravirtual.xen.is_some() {
            // The first with a memory BAR, which is where the dialect has memory.
            if parts.start != Start::Pvh {
                pci.add_next(XenPlatform::new(), &interrupts)?;
            }
        }
        if let Some(hyperv) = &parts.paravirtual.hyperv {
            hyperv.connect(Arc::new(Arc::clone(vm)), Arc::new(hyperv::Ending::new(Arc::clone(&events), sender, Arc::clone(&interrupts))));
        }
        let mut add = |device: Box<dyn VirtioDevice>| {
            let function = VirtioPci::new(device, Arc::clone(memory), Arc::new(Arc::clone(vm)));
            pci.add_next(function, &interrupts)
        };
        for disk in parts.inventory.disks(DeviceBus::Virtio) {
            add(Box::new(Block::new(disk.image, &disk.name)))?;
        }
        let mut emulated = Vec::new();
        if parts.start == Start::Firmware {
            for disk in parts.inventory.disks(DeviceBus::Xen) {
                emulated.push(add(Box::new(Block::new(disk.image, &disk.name)))?);
            }
        }
        for nic in parts.inventory.nics(DeviceBus::Virtio) {
            if let Some(network) = net::open(&nic.network)? {
                add(Box::new(Net::new(network, nic.mac)))?;
            }
        }
        let mut console = None;
        if let Some(target) = &config.console {
            let input: ConsoleInput = match &parts.paravirtual.xen {
                // A Xen guest's hvc0 is Xen's.
                Some(xen) => {
                    xen.open_console(terminal_output(target)?);
                    let xen = Arc::clone(xen);
                    Box::new(move |bytes| xen.console_input(bytes))
                }
                None => {
                    let (device, input) = Console::new(terminal_output(target)?);
                    add(Box::new(device))?;
                    Box::new(move |bytes| input.push(bytes))
                }
            };
            console = (*target == SerialTarget::Stdio).then_some(input);
        }
        if !config.deterministic {
            add(Box::new(Rng::new(Box::new(HostEntropy))))?;
        }
        let vmmci = config.dialects.contains(DialectName::Openbsd).then(|| Vmmci::new(Arc::clone(timers), Arc::clone(&events)));
        if let Some(vmmci) = &vmmci {
            pci.add_next(vmmci.clone(), &interrupts)?;
        }
        pci.assign()?;
        // The bus first: fixed ports among its own win.
        let pci = Arc::new(pci);
        pci.map(&mut map);
        if let Some(xen) = &parts.paravirtual.xen {
            let plugs = Plugs { events: Arc::clone(&events), pci: Arc::clone(&pci), disks: emulated, interrupts: Arc::clone(&interrupts) };
            xen.connect(Arc::new(Arc::clone(vm)), Arc::new(plugs));
        }

        interrupts.map(&mut map);
        let serial = Serial::new(COM1, interrupts.isa_line(COM1_IRQ), terminal_output(&config.serial)?);
        serial.map(&mut map);
        Pit::new(Arc::clone(timers), interrupts.isa_line(TIMER_IRQ)).map(&mut map);
        I8042::new(interrupts.isa_line(KEYBOARD_IRQ), Arc::clone(&events)).map(&mut map);
        ResetPorts::new(Arc::clone(&events)).map(&mut map);
        let power = AcpiPm::new(Arc::clone(timers.clock()), interrupts.isa_line(SCI_IRQ), Arc::clone(&events));
        power.map(&mut map);
        let cmos = CmosConfig {
            low_memory: config.memory.0.min(LOW_RAM_END),
            high_memory: config.memory.0.saturating_sub(LOW_RAM_END),
            processors: config.cpus as u8,
        };
        Rtc::new(Arc::clone(timers), interrupts.isa_line(RTC_IRQ), &cmos).map(&mut map);
        FwCfg::new(Arc::clone(memory), firmware_items(config, parts.identity, std::mem::take(&mut parts.files))).map(&mut map);
        if config.testdev {
            TestDevice::new(&interrupts).map(&mut map);
        }
        if config.debug_exit {
            DebugExit::new(events).map(&mut map);
        }
        let domain = match &parts.paravirtual.xen {
            Some(xen) => Some(xen_domain(config, &parts, xen)?),
            None => None,
        };
        if let Some(dialect) = parts.paravirtual.hyperv.as_ref().filter(|_| config.testdev) {
            dialect.add_test_device();
        }
        let hyperv = match &parts.paravirtual.hyperv {
            Some(dialect) => Some(hyperv_devices(&parts, dialect, memory, timers)?),
            None => None,
        };
        Ok((
            Board { domain, hyperv, serial, console, power, vmmci, pci },
            MachineBus::new(map, parts.paravirtual.dialects.clone(), interrupts, ended),
        ))
    }

    /// Bytes typed at the terminal, for the serial port or the console, whichever has it; how many were taken.
    pub fn terminal_input(&self, bytes: &[u8]) -> usize {
        match &self.console {
            Some(console) => console(bytes),
            None => self.serial.input(bytes),
        }
    }

    /// The power button.
    pub fn power(&self) -> &AcpiPm {
        &self.power
    }

    /// OpenBSD's control device, when that dialect is there.
    pub fn vmmci(&self) -> Option<&Vmmci> {
        self.vmmci.as_deref()
    }

    /// The machine in XenStore.
    pub fn domain(&self) -> Option<&Domain> {
        self.domain.as_ref()
    }

    /// What is on VMBus.
    pub fn hyperv(&self) -> Option<&hyperv::Devices> {
        self.hyperv.as_ref()
    }

    /// The slots of `bus` for devices that come while the machine runs.
    ///
    /// # Errors
    /// [`PlugError`] when it has none.
    pub fn slots(&self, bus: DeviceBus) -> Result<&dyn Slots, PlugError> {
        match bus {
            DeviceBus::Virtio => Err(PlugError::Fixed(bus)),
            DeviceBus::Hyperv => self.hyperv.as_ref().map(|devices| devices as &dyn Slots).ok_or(PlugError::NoBus(bus)),
            DeviceBus::Xen => self.domain.as_ref().map(|domain| domain as &dyn Slots).ok_or(PlugError::NoBus(bus)),
        }
    }

    /// Ends what devices have under way, and their threads.
    pub fn shut_down(&self) {
        self.pci.reset();
        if let Some(domain) = &self.domain {
            domain.shut_down();
        }
        if let Some(hyperv) = &self.hyperv {
            hyperv.shut_down();
        }
    }
}

/// The machine in XenStore, with the disks and network cards that are Xen's.
fn xen_domain(config: &MachineConfig, parts: &Parts<'_>, xen: &Arc<Xen>) -> Result<Domain, BoardError> {
    let host = |source| BoardError::Host { what: "Xen's backends".into(), source };
    let domain = Domain::new(Arc::clone(xen), parts.store_server, &parts.identity.to_string(), config.cpus, config.console.is_some())
        .map_err(host)?;
    fill(&domain, DeviceBus::Xen, parts.inventory)?;
    Ok(domain)
}

/// What is on VMBus.
fn hyperv_devices(
    parts: &Parts<'_>,
    dialect: &Arc<Hyperv>,
    memory: &GuestMemory,
    timers: &Arc<Timers>,
) -> Result<hyperv::Devices, BoardError> {
    let host = |source| BoardError::Host { what: "Hyper-V's devices".into(), source };
    let bus = VmBus::new(memory.clone(), Arc::clone(dialect) as Arc<dyn Synic>);
    bus.watch_monitor(timers);
    dialect.serve(Arc::clone(&bus) as Arc<dyn Connections>);
    let store: Arc<dyn Store> = parts.store.clone();
    let components = hyperv::Components::new(Arc::clone(&bus), timers, store, parts.identity).map_err(host)?;
    let devices = hyperv::Devices::new(bus, parts.identity, components);
    fill(&devices, DeviceBus::Hyperv, parts.inventory)?;
    Ok(devices)
}

/// Plugs in what the inventory has for a bus.
fn fill(slots: &dyn Slots, bus: DeviceBus, inventory: &Arc<Inventory>) -> Result<(), BoardError> {
    let plug = |name: &str, device| {
        let plugged = slots.plug(device, inventory.gone(name));
        let plugged = plugged.map_err(|source| BoardError::Host { what: format!("devices with bus={bus}"), source })?;
        inventory.set_plugged(name, plugged);
        Ok::<_, BoardError>(())
    };
    for disk in inventory.disks(bus) {
        plug(&disk.name, disk.device())?;
    }
    for nic in inventory.nics(bus) {
        if let Some(network) = net::open(&nic.network)? {
            plug(&nic.name, Device::Nic(nic.mac, network))?;
        }
    }
    Ok(())
}

/// The memory map that the kernel is told.
pub fn memory_map(config: &MachineConfig) -> Vec<E820Range> {
    let mut map = boot::e820(config.memory.0);
    if config.dialects.contains(DialectName::Xen) {
        map.extend([xen::reserved(), firmware::reserved()]);
        map.sort_unstable_by_key(|range| range.start);
    }
    map
}

/// Puts the ACPI and SMBIOS tables into memory, for kernels that start without firmware; the RSDP's address. Nothing else is there:
/// the memory map reserves the range. Firmware builds its own from fw_cfg, but with Xen's dialect it takes those that are there.
pub fn place_tables(config: &MachineConfig, identity: Uuid, start: Start, memory: &GuestMemory) -> Option<u64> {
    let with_firmware = start == Start::Firmware;
    if with_firmware && !config.dialects.contains(DialectName::Xen) {
        return None;
    }
    let (acpi, smbios) = (acpi_tables(config), smbios_tables(config, identity));
    if with_firmware {
        firmware::place(memory, &acpi.place(firmware::ACPI), &smbios.place(firmware::SMBIOS), &memory_map(config));
        return None;
    }
    memory.write_slice(&smbios.place(smbios::DEFAULT_BASE), GuestAddress(smbios::DEFAULT_BASE.into())).ok()?;
    let base = acpi::DEFAULT_BASE;
    memory.write_slice(&acpi.place(base), GuestAddress(base.into())).ok()?;
    Some(base.into())
}

/// What the machine calls itself. With VMware's dialect it has VMware's names, by which cloud-init and others know that they may ask for keys; the
/// serial number is the UUID as VMware writes it (Linux `arch/x86/kernel/cpu/vmware.c` looks for its beginning).
fn smbios_tables(config: &MachineConfig, identity: Uuid) -> Smbios {
    let Uuid(uuid) = identity;
    if config.dialects.dialects().contains(&DialectName::Vmware) {
        let hex: Vec<String> = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        let serial = format!("VMware-{}-{}", hex[..8].join(" "), hex[8..].join(" "));
        Smbios::new(&SmbiosConfig { manufacturer: "VMware, Inc.", product: "VMware Virtual Platform", serial: &serial, uuid })
    } else {
        let serial = identity.to_string();
        Smbios::new(&SmbiosConfig { manufacturer: "pvbus", product: "pvbus virtual machine", serial: &serial, uuid })
    }
}

fn acpi_tables(config: &MachineConfig) -> AcpiTables {
    AcpiTables::new(&AcpiConfig { processors: config.cpus as u8, fw_cfg: true, vmbus: config.dialects.contains(DialectName::Hyperv) })
}

fn firmware_items(config: &MachineConfig, identity: Uuid, files: Vec<(String, Vec<u8>)>) -> FwCfgItems {
    let mut items = FwCfgItems::new(config.memory.0, config.cpus as u16);
    let ranges = memory_map(config);
    let ranges: Vec<E820Entry> = ranges.iter().map(|range| E820Entry { base: range.start, size: range.size, kind: range.kind }).collect();
    items.add_e820(&ranges);
    for (name, bytes) in acpi_tables(config).files() {
        items.add_file(name, bytes);
    }
    for (name, bytes) in smbios_tables(config, identity).files() {
        items.add_file(name, bytes);
    }
    for (name, bytes) in files {
        items.add_file(&name, bytes);
    }
    items
}

fn terminal_output(target: &SerialTarget) -> Result<Box<dyn Write + Send>, BoardError> {
    Ok(match target {
        SerialTarget::Stdio => Box::new(std::io::stdout()),
        SerialTarget::Null => Box::new(std::io::sink()),
        SerialTarget::File(path) => match File::options().append(true).create(true).open(path) {
            Ok(file) => Box::new(file),
            Err(source) => return Err(BoardError::Host { what: format!("terminal output to {}", path.display()), source }),
        },
    })
}

/// Device events as machine events. A machine that has ended no longer listens, so that send errors mean nothing.
struct Events {
    ended: Arc<AtomicBool>,
    sender: EventSender,
}

impl Events {
    fn end(&self, outcome: Outcome) {
        self.ended.store(true, Ordering::Relaxed);
        let _ = self.sender.send(Event::End(outcome));
    }
}

impl MachineEvents for Events {
    fn power_off(&self) {
        self.end(Outcome::PowerOff);
    }

    fn reset(&self) {
        self.end(Outcome::Reset);
    }

    fn debug_exit(&self, value: u32) {
        self.end(Outcome::DebugExit(value));
    }
}
