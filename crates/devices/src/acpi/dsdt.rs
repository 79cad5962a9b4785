//! The DSDT: the PCI root bridge with its windows and interrupt wires, the ISA devices, and the way to switch off.

use abi::pci::{CONFIG_ADDRESS, CONFIG_DATA};
use acpi_tables::aml::*;
use acpi_tables::{Aml, AmlSink};

use super::AcpiConfig;
use crate::acpi_pm::{PM_TIMER, PM1_EVENT, SLEEP_TYPE_OFF};
use crate::interrupts::{pci_gsi, pci_irq};
use crate::pci::MEMORY_WINDOW;
use crate::serial::{COM1, COM1_IRQ};
use crate::{fw_cfg, rtc};

/// `_STA`: present, enabled, shown, working (ACPI 6.5 section 6.3.7).
const PRESENT: u8 = 0xf;

/// AML that is ready.
struct Bytes(Vec<u8>);

impl Aml for Bytes {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// The table's body after its header.
pub(super) fn body(config: &AcpiConfig) -> Vec<u8> {
    let mut aml = Vec::new();
    let (off, zero) = (SLEEP_TYPE_OFF, 0u8);
    Name::new("_S5_".into(), &Package::new(vec![&off, &off, &zero, &zero])).to_aml_bytes(&mut aml);
    interrupt_mode().to_aml_bytes(&mut aml);
    let root = [root_bridge(), isa_devices(config)].map(Bytes);
    Device::new("_SB_.PCI0".into(), root.iter().map(|part| part as &dyn Aml).collect()).to_aml_bytes(&mut aml);
    if config.vmbus {
        vmbus(&mut aml);
    }
    aml
}

/// What Linux' hv_vmbus and Windows' vmbus.sys bind to: a device with this name as its `_HID`, whose `_CRS` can be evaluated
/// (`drivers/hv/vmbus_drv.c`, `vmbus_acpi_add`). It has no memory: that is for passed-through PCI functions and framebuffers.
fn vmbus(aml: &mut Vec<u8>) {
    let resources = ResourceTemplate::new(vec![]);
    let parts: [(&str, &dyn Aml); 5] = [("_HID", &"VMBUS"), ("_DDN", &"VMBUS"), ("_UID", &ZERO), ("_STA", &PRESENT), ("_CRS", &resources)];
    let parts = parts.map(|(name, value)| Name::new(name.into(), value));
    Device::new("_SB_.VMBS".into(), parts.iter().map(|part| part as &dyn Aml).collect()).to_aml_bytes(aml);
}

/// `_PIC`: the system tells which interrupt controller it uses, 0 for the 8259 pair.
fn interrupt_mode() -> Bytes {
    let mut aml = Vec::new();
    Name::new("PICF".into(), &ZERO).to_aml_bytes(&mut aml);
    Method::new("_PIC".into(), 1, false, vec![&Store::new(&Path::new("PICF"), &Arg(0))]).to_aml_bytes(&mut aml);
    Bytes(aml)
}

fn root_bridge() -> Vec<u8> {
    let mut aml = Vec::new();
    Name::new("_HID".into(), &EISAName::new("PNP0A03")).to_aml_bytes(&mut aml);
    Name::new("_UID".into(), &ZERO).to_aml_bytes(&mut aml);
    let (first, last) = (*MEMORY_WINDOW.start() as u32, *MEMORY_WINDOW.end() as u32);
    let buses = AddressSpace::<u16>::new_bus_number(0, 0);
    let configuration = IO::new(CONFIG_ADDRESS, CONFIG_ADDRESS, 1, 8);
    let ports = [AddressSpace::<u16>::new_io(0, CONFIG_ADDRESS - 1, None), AddressSpace::<u16>::new_io(CONFIG_DATA + 4, u16::MAX, None)];
    let memory = AddressSpace::<u32>::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None);
    let resources = ResourceTemplate::new(vec![&buses, &configuration, &ports[0], &ports[1], &memory]);
    Name::new("_CRS".into(), &resources).to_aml_bytes(&mut aml);
    Name::new("PRTA".into(), &routes(pci_gsi)).to_aml_bytes(&mut aml);
    Name::new("PRTP".into(), &routes(pci_irq)).to_aml_bytes(&mut aml);
    Method::new(
        "_PRT".into(),
        0,
        false,
        vec![&If::new(&Path::new("PICF"), vec![&Return::new(&Path::new("PRTA"))]), &Return::new(&Path::new("PRTP"))],
    )
    .to_aml_bytes(&mut aml);
    aml
}

/// PCI routing package: INTA of every slot, by the number that `number` gives it. Our functions have no other pins.
fn routes(number: fn(u8, u8) -> u8) -> PackageBuilder {
    let mut package = PackageBuilder::new();
    for slot in 1..32u8 {
        let address = u32::from(slot) << 16 | 0xffff;
        package.add_element(&Package::new(vec![&address, &ZERO, &ZERO, &number(slot, 0)]));
    }
    package
}

fn isa_devices(config: &AcpiConfig) -> Vec<u8> {
    let mut aml = Vec::new();
    let mut device = |name: &str, id: &dyn Aml, resources: Vec<&dyn Aml>| {
        let (id, resources) = (Name::new("_HID".into(), id), Name::new("_CRS".into(), &ResourceTemplate::new(resources)));
        Device::new(name.into(), vec![&id, &resources]).to_aml_bytes(&mut aml);
    };
    device("COM1", &EISAName::new("PNP0501"), vec![&IO::new(COM1, COM1, 1, 8), &irq(COM1_IRQ)]);
    device("RTC_", &EISAName::new("PNP0B00"), vec![&IO::new(rtc::INDEX, rtc::INDEX, 1, 2), &irq(rtc::RTC_IRQ)]);
    device("TIMR", &EISAName::new("PNP0100"), vec![&IO::new(0x40, 0x40, 1, 4), &irq(crate::pit::TIMER_IRQ)]);
    // What no driver asks for must not be given to others.
    let power_management = IO::new(PM1_EVENT, PM1_EVENT, 1, (PM_TIMER + 4 - PM1_EVENT) as u8);
    device("MRES", &EISAName::new("PNP0C02"), vec![&power_management, &IO::new(0x4d0, 0x4d0, 1, 2)]);
    if config.fw_cfg {
        device("FWCF", &"QEMU0002", vec![&IO::new(fw_cfg::SELECTOR, fw_cfg::SELECTOR, 1, 12)]);
    }
    aml
}

/// ISA interrupt as a resource: the two-byte descriptor of edge-triggered, active-high interrupts (ACPI 6.5 section 6.4.2.1).
fn irq(number: u8) -> Bytes {
    let [low, high] = (1u16 << number).to_le_bytes();
    Bytes(vec![0x22, low, high])
}
