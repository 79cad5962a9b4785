//! vmmci against its host half, on the PCI bus of the machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use devices::interrupts::{InterruptRouter, InterruptSink};
use devices::pci::PciBus;
use devices::virtio::vmmci::{Conversation, Request, Vmmci};
use devices::{MachineEvents, MsiSink};
use pvbus::{Event, Hal, Kind, News, Tree};

use crate::machine::{EPOCH, Machine};

const SECOND: u64 = 1_000_000_000;

/// How often the host ended the machine without the guest's help.
#[derive(Default)]
struct Ends(AtomicUsize);

impl MachineEvents for Ends {
    fn power_off(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn reset(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn debug_exit(&self, _: u32) {}
}

struct NoProcessor;
impl MsiSink for NoProcessor {
    fn signal_msi(&self, _: u64, _: u32) {}
}
impl InterruptSink for NoProcessor {
    fn set_extint(&self, _: bool) {}
    fn set_ioapic_routes(&self, _: &[Option<vmm::backend::IoapicRoute>]) {}
}

struct Openbsd {
    machine: Machine,
    device: Arc<Vmmci>,
    ends: Arc<Ends>,
}

fn openbsd() -> Openbsd {
    let mut machine = Machine::new();
    let ends = Arc::new(Ends::default());
    let device = Vmmci::new(machine.timers.clone(), ends.clone());
    let mut bus = PciBus::new();
    bus.add_next(device.clone(), &InterruptRouter::new(Arc::new(NoProcessor))).unwrap();
    bus.assign().unwrap();
    Arc::new(bus).map(&mut machine.ports);
    Openbsd { machine, device, ends }
}

/// Events without the time.
fn poll(tree: &mut Tree<'_>, machine: &Machine) -> Vec<Event> {
    tree.poll(machine.now()).events.into_iter().filter(|event| !matches!(event, Event::Time(_))).collect()
}

#[test]
fn device_attaches_to_pci_without_any_interface() {
    let Openbsd { machine, .. } = openbsd();
    let tree = Tree::attach(&machine);
    assert_eq!(tree.dmesg(), ["vmmci0 at pci0 dev 1 function 0"]);
    assert_eq!(tree.interrupt_lines().count(), 1);
}

#[test]
fn shutdown_and_reboot_are_acknowledged() {
    for (request, event) in [(Request::Shutdown, Event::Shutdown(Kind::OpenBsd)), (Request::Reboot, Event::Reboot(Kind::OpenBsd))] {
        let Openbsd { machine, device, ends } = openbsd();
        let mut tree = Tree::attach(&machine);
        device.request(request).unwrap();
        machine.wait_until(SECOND);
        assert_eq!(poll(&mut tree, &machine), [event]);
        assert!(matches!(device.conversation(), Conversation::Agreed { .. }));
        machine.wait_until(100 * SECOND);
        assert_eq!(ends.0.load(Ordering::Relaxed), 0, "an acknowledged request has two minutes");
    }
}

#[test]
fn interrupt_line_brings_the_command() {
    let Openbsd { machine, device, .. } = openbsd();
    let mut tree = Tree::attach(&machine);
    let line = tree.interrupt_lines().next().unwrap();
    poll(&mut tree, &machine);
    device.request(Request::Shutdown).unwrap();
    assert_eq!(tree.on_interrupt(line + 1, machine.now()).events, []);
    assert_eq!(tree.on_interrupt(line, machine.now()).events, [Event::Shutdown(Kind::OpenBsd)]);
}

#[test]
fn clock_is_told_and_told_anew_on_request() {
    let Openbsd { machine, device, .. } = openbsd();
    let mut tree = Tree::attach(&machine);
    machine.wait_until(7 * SECOND);
    let events = tree.poll(machine.now()).events;
    assert!(
        matches!(events[..], [Event::Time(time)] if time.set && time.seconds == EPOCH.as_secs() + 7 && time.nanoseconds == 123_456_000)
    );
    device.request(Request::SyncRtc).unwrap();
    let events = tree.poll(machine.now()).events;
    assert!(matches!(events[..], [Event::SyncRtc(Kind::OpenBsd), Event::Time(time)] if time.set));
    assert_eq!(device.conversation(), Conversation::Idle);
}

#[test]
fn guest_that_powers_off_says_so_and_one_that_reboots_does_not() {
    let Openbsd { machine, device, .. } = openbsd();
    let mut tree = Tree::attach(&machine);
    tree.tell(&News::GoingDown { reboot: true }, machine.now());
    assert_eq!(device.conversation(), Conversation::Idle);
    tree.tell(&News::GoingDown { reboot: false }, machine.now());
    assert!(matches!(device.conversation(), Conversation::Leaving { .. }));
}
