//! Several dialects in one machine, as `--dialect all` gives them.

use std::sync::Arc;

use abi::hypervisor::FIRST_BASE;
use dialects::kvm::Kvm;
use dialects::kvm::clock::PvClock;
use dialects::openbsd::Openbsd;
use dialects::store::{Client, Store as _};
use pvbus::{Event, Hal, Kind, Tree};

use crate::machine::Machine;
use crate::vmware;

const HZ: u64 = 1_000_000_000;

#[test]
fn all_interfaces_attach_and_each_has_its_minor_number_and_store() {
    let machine = Machine::new();
    let clock = Arc::new(PvClock::new(machine.memory.clone(), machine.clock.clone(), HZ, 1));
    let kvm = Kvm::new(machine.memory.clone(), clock.clone(), machine.timers.clone(), None, 1);
    let (vmware, store) = vmware::dialect(&machine);
    let openbsd = Arc::new(Openbsd::new(Some(clock)));
    let machine = machine.with(FIRST_BASE, vmware).with(FIRST_BASE + 0x100, openbsd).with(FIRST_BASE + 0x300, kvm);
    store.write(Client::Host, "vm-data/demo", b"seen by all").unwrap();

    let mut tree = Tree::attach(&machine);
    assert_eq!(tree.dmesg(), ["pvbus0 at mainbus0: KVM, VMware, OpenBSD", "vmt0 at pvbus0", "pvclock0 at pvbus0"]);
    assert_eq!(tree.stores().kinds().collect::<Vec<_>>(), [Kind::Kvm, Kind::Vmware, Kind::OpenBsd]);
    assert_eq!(tree.stores().store(Kind::Vmware).unwrap().read(b"guestinfo.demo").unwrap(), b"seen by all");
    assert!(tree.stores().store(Kind::Kvm).is_none());

    let mut sources = Vec::new();
    for event in tree.poll(machine.now()).events {
        if let Event::Time(time) = event {
            sources.push((time.source, time.seconds));
        }
    }
    assert_eq!(sources.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), [Kind::Vmware, Kind::Kvm]);
    assert_eq!(sources[0].1, sources[1].1, "both tell the same time");
}
