//! The device tree: pvbus0 at mainbus0, and what is attached to it.
//!
//! [`Tree::attach`] is autoconf: it makes one line for the bus and one for each device, as OpenBSD's dmesg has them, and gives each interface
//! its minor number and, if a driver opened one, its store. Afterwards the kernel calls [`Tree::poll`] when the time it was told has come,
//! and [`Tree::on_interrupt`]; what the devices want comes back as [`Event`]s.
//!
//! Drivers are tried in the order of OpenBSD's kernel configuration: vmt, pvclock, then xen and hyperv; vmmci is found on PCI.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::block::BlockDevice;
use crate::detect::{Detection, Interface, Kind, Note, detect};
use crate::driver::{Driver, Event, News};
use crate::hal::{Hal, Nanos};
use crate::hyperv::{Hyperv0, ReferenceClock};
use crate::ioctl::Stores;
use crate::kvm::{ClockError, Pvclock, PvclockDevice};
use crate::net::NetDevice;
use crate::openbsd::{self, Vmmci};
use crate::vmware::Vmt;
use crate::xen::{Xen, Xen0};

/// The bus with its devices.
pub struct Tree<'h> {
    detection: Detection,
    dmesg: Vec<String>,
    devices: Vec<Device<'h>>,
    stores: Stores<'h>,
    clock: Option<Arc<Pvclock<'h>>>,
    reference_clock: Option<Arc<ReferenceClock<'h>>>,
    xen: Option<Xen<'h>>,
}

/// A device that is attached.
struct Device<'h> {
    name: &'static str,
    parent: &'static str,
    driver: Box<dyn Driver<'h> + 'h>,
}

/// What came of a poll.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Polled {
    /// What the devices want.
    pub events: Vec<Event>,
    /// When to poll again; `None` for not before an interrupt.
    pub next: Option<Nanos>,
}

impl<'h> Tree<'h> {
    /// Looks for interfaces and attaches what there is.
    #[must_use]
    pub fn attach(hal: &'h dyn Hal) -> Tree<'h> {
        let detection = detect(hal);
        let stores = Stores::new();
        let mut tree = Tree { detection, dmesg: Vec::new(), devices: Vec::new(), stores, clock: None, reference_clock: None, xen: None };
        tree.attach_bus();
        tree.attach_vmt(hal);
        tree.attach_pvclock(hal);
        tree.attach_xen(hal);
        tree.attach_hyperv(hal);
        tree.attach_vmmci(hal);
        tree
    }

    /// Does what is due.
    pub fn poll(&mut self, now: Nanos) -> Polled {
        self.poll_those(now, |_| true)
    }

    /// Polls the devices at an interrupt line. Their next time is as [`Tree::poll`] said before, unless this says sooner.
    pub fn on_interrupt(&mut self, line: u8, now: Nanos) -> Polled {
        self.poll_those(now, |driver| driver.interrupt_line() == Some(line))
    }

    /// Polls the devices that hypervisors call for, by [`Hal::upcall_vector`]. Their next time is as with [`Tree::on_interrupt`].
    pub fn on_upcall(&mut self, now: Nanos) -> Polled {
        self.poll_those(now, |driver| driver.takes_upcalls())
    }

    /// Tells the devices about the kernel. Poll afterwards.
    pub fn tell(&mut self, news: &News, now: Nanos) {
        self.devices.iter_mut().for_each(|device| device.driver.hear(news, now));
    }

    /// The devices `/dev/pvbusN`.
    pub fn stores(&mut self) -> &mut Stores<'h> {
        &mut self.stores
    }

    /// What detection found.
    #[must_use]
    pub const fn detection(&self) -> &Detection {
        &self.detection
    }

    /// The lines of attaching.
    #[must_use]
    pub fn dmesg(&self) -> &[String] {
        &self.dmesg
    }

    /// Names of the devices, each with its parent's, the bus first.
    pub fn devices(&self) -> impl Iterator<Item = (&'static str, &'static str)> + '_ {
        let bus = (self.stores.open(0).is_ok()).then_some(("pvbus0", "mainbus0"));
        bus.into_iter().chain(self.devices.iter().map(|device| (device.name, device.parent)))
    }

    /// The host's clock, if there is one.
    #[must_use]
    pub fn clock(&self) -> Option<Arc<Pvclock<'h>>> {
        self.clock.clone()
    }

    /// Hyper-V's reference time, if hyperv0 is attached and its hypervisor keeps it.
    #[must_use]
    pub fn reference_clock(&self) -> Option<Arc<ReferenceClock<'h>>> {
        self.reference_clock.clone()
    }

    /// The disks that are connected now.
    #[must_use]
    pub fn disks(&self) -> Vec<Arc<dyn BlockDevice + 'h>> {
        self.devices.iter().flat_map(|device| device.driver.disks()).collect()
    }

    /// The network cards that are connected now.
    #[must_use]
    pub fn cards(&self) -> Vec<Arc<dyn NetDevice + 'h>> {
        self.devices.iter().flat_map(|device| device.driver.cards()).collect()
    }

    /// Xen's domain, if this machine is one: its store with transactions.
    #[must_use]
    pub fn xen(&self) -> Option<Xen<'h>> {
        self.xen.clone()
    }

    /// Interrupt lines that the kernel shall bring to [`Tree::on_interrupt`].
    pub fn interrupt_lines(&self) -> impl Iterator<Item = u8> + '_ {
        self.devices.iter().filter_map(|device| device.driver.interrupt_line())
    }

    fn poll_those(&mut self, now: Nanos, which: impl Fn(&dyn Driver<'h>) -> bool) -> Polled {
        let mut polled = Polled::default();
        for device in self.devices.iter_mut().filter(|device| which(&*device.driver)) {
            let next = device.driver.poll(now, &mut polled.events);
            polled.next = [polled.next, next].into_iter().flatten().min();
        }
        polled
    }

    fn attach_bus(&mut self) {
        let interfaces = self.detection.on_bus();
        let names: Vec<String> = interfaces.iter().map(|interface| name(interface)).collect();
        for interface in interfaces {
            self.stores.add(interface.kind, None);
        }
        if !names.is_empty() {
            self.dmesg.push(format!("pvbus0 at mainbus0: {}", names.join(", ")));
        }
    }

    fn attach_vmt(&mut self, hal: &'h dyn Hal) {
        let Some(interface) = self.detection.find(Kind::Vmware) else { return };
        match Vmt::attach(hal, interface) {
            Ok(vmt) => {
                if let Some(store) = vmt.store() {
                    self.stores.set(Kind::Vmware, store);
                }
                self.add("vmt0", "pvbus0", "", vmt);
            }
            Err(error) => self.dmesg.push(format!("vmt0 at pvbus0: not attached: {error}")),
        }
    }

    /// OpenBSD's order: KVM's clock, otherwise that of OpenBSD.
    fn attach_pvclock(&mut self, hal: &'h dyn Hal) {
        let mut last = None;
        for interface in [Kind::Kvm, Kind::OpenBsd].into_iter().filter_map(|kind| self.detection.find(kind)) {
            match Pvclock::attach(hal, interface) {
                Ok(clock) => {
                    let clock = Arc::new(clock);
                    let about = if clock.is_stable() == Ok(true) { "" } else { ": one processor only" };
                    self.clock = Some(Arc::clone(&clock));
                    return self.add("pvclock0", "pvbus0", about, PvclockDevice::new(clock));
                }
                Err(ClockError::NoFeature) => {}
                Err(error) => last = Some(error),
            }
        }
        if let Some(error) = last {
            self.dmesg.push(format!("pvclock0 at pvbus0: not attached: {error}"));
        }
    }

    fn attach_xen(&mut self, hal: &'h dyn Hal) {
        let Some(interface) = self.detection.find(Kind::Xen).filter(|interface| !interface.notes.contains(&Note::NoHypercalls)) else {
            return;
        };
        match Xen0::attach(hal, interface) {
            Ok(xen0) => {
                if let Some(store) = xen0.store() {
                    self.stores.set(Kind::Xen, store);
                }
                self.xen = Some(xen0.xen());
                let port = xen0.port();
                self.add("xen0", "pvbus0", &xen0.about(), xen0);
                // As NetBSD's xenbus(4) says it.
                self.dmesg.push(format!("xenbus0: using event channel {port}"));
            }
            Err(error) => self.dmesg.push(format!("xen0 at pvbus0: not attached: {error}")),
        }
    }

    fn attach_hyperv(&mut self, hal: &'h dyn Hal) {
        // By its own name rather than by another: whoever has renamed it has one interface.
        let renamed = || self.detection.interfaces.iter().find(|interface| interface.trusted && interface.is_hyperv());
        let interface = self.detection.find(Kind::HyperV).or_else(renamed);
        let Some(interface) = interface.filter(|interface| !interface.notes.contains(&Note::NoVmbus)) else { return };
        match Hyperv0::attach(hal, interface) {
            Ok(hyperv0) => {
                if let Some(store) = hyperv0.store() {
                    self.stores.set(interface.kind, store);
                }
                self.reference_clock = hyperv0.clock();
                let components = hyperv0.components();
                self.add("hyperv0", "pvbus0", &hyperv0.about(), hyperv0);
                self.dmesg.extend(components);
            }
            Err(error) => self.dmesg.push(format!("hyperv0 at pvbus0: not attached: {error}")),
        }
    }

    /// Also without an interface: vmd has had the device longer than vmm(4) has had a clock.
    fn attach_vmmci(&mut self, hal: &'h dyn Hal) {
        let Some(address) = openbsd::find(hal) else { return };
        match Vmmci::attach(hal, address) {
            Ok(vmmci) => {
                let place = format!(" dev {} function {}", address.device, address.function);
                self.add("vmmci0", "pci0", &place, vmmci);
            }
            Err(error) => self.dmesg.push(format!("vmmci0 at pci0 dev {} function {}: {error}", address.device, address.function)),
        }
    }

    fn add(&mut self, name: &'static str, parent: &'static str, about: &str, driver: impl Driver<'h> + 'h) {
        self.dmesg.push(format!("{name} at {parent}{about}"));
        self.devices.push(Device { name, parent, driver: Box::new(driver) });
    }
}

/// An interface as the bus's line has it: OpenBSD tells the version of Hyper-V and Xen.
fn name(interface: &Interface) -> String {
    match interface.version {
        Some(version) if matches!(interface.kind, Kind::HyperV | Kind::Xen) => format!("{} {version}", interface.kind),
        _ => format!("{}", interface.kind),
    }
}

#[cfg(test)]
mod tests {
    use abi::hypervisor as words;

    use super::*;
    use crate::testing::{FakeHal, Nothing};

    const BASE: u32 = words::FIRST_BASE;

    #[test]
    fn bus_names_its_interfaces_in_openbsds_order_with_versions_of_two() {
        let hal = FakeHal::new(Nothing)
            .base(BASE, BASE + 5, words::XEN)
            .leaf(BASE + 1, 4 << 16 | 17, 0, 0, 0)
            .base(BASE + 0x100, BASE + 0x105, words::HYPERV)
            .leaf(BASE + 0x102, 0, 10 << 16, 0, 0)
            .base(BASE + 0x200, BASE + 0x201, words::KVM)
            .base(BASE + 0x300, BASE + 0x301, words::NVMM);
        let mut tree = Tree::attach(&hal);
        assert_eq!(tree.dmesg(), ["pvbus0 at mainbus0: KVM, Hyper-V 10.0, Xen 4.17, NVMM"]);
        assert_eq!(tree.stores().kinds().collect::<Vec<_>>(), [Kind::Kvm, Kind::HyperV, Kind::Xen, Kind::Nvmm]);
        assert_eq!(tree.devices().collect::<Vec<_>>(), [("pvbus0", "mainbus0")]);
        assert_eq!(tree.poll(0), Polled::default());
    }

    #[test]
    fn machine_without_a_hypervisor_has_no_bus() {
        let hal = FakeHal::new(Nothing).leaf(1, 0, 0, 0, 0);
        let tree = Tree::attach(&hal);
        assert!(tree.dmesg().is_empty() && tree.devices().next().is_none());
    }

    #[test]
    fn signature_without_a_backdoor_gives_the_bus_but_no_vmt() {
        let hal = FakeHal::new(Nothing).base(BASE, BASE + 0x10, words::VMWARE);
        let tree = Tree::attach(&hal);
        assert_eq!(tree.dmesg()[0], "pvbus0 at mainbus0: VMware");
        assert!(tree.dmesg()[1].starts_with("vmt0 at pvbus0: not attached"), "{:?}", tree.dmesg());
        assert_eq!(tree.devices().count(), 1);
    }

    #[test]
    fn tree_may_be_behind_a_kernels_lock() {
        fn is_send<T: Send>() {}
        is_send::<Tree<'static>>();
    }
}
