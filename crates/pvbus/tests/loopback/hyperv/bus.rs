//! The bus itself.

use std::sync::Arc;

use abi::hyperv::vmbus::guid;
use abi::hypervisor::{FIRST_BASE, LINUX_KVM_HV};
use dialects::hyperv::ic::Shutdown;
use pvbus::{Event, Hal, Kind, News, Tree};

use super::{Rig, SECOND};

#[test]
fn bus_attaches_with_the_newest_version_of_both() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    assert_eq!(tree.dmesg()[0], "pvbus0 at mainbus0: Hyper-V 10.0");
    assert!(tree.dmesg()[1].starts_with("hyperv0 at pvbus0: protocol 5.3, features 0x"), "{:?}", tree.dmesg());
    assert_eq!(tree.devices().collect::<Vec<_>>(), [("pvbus0", "mainbus0"), ("hyperv0", "pvbus0")]);
    assert!(tree.stores().store(Kind::HyperV).is_some());
    assert_ne!(rig.hyperv.guest_system(), 0, "the hypervisor knows who calls");
}

#[test]
fn bus_attaches_by_whatever_name_hyperv_s_leaves_are_shown() {
    for (signature, kind) in [(LINUX_KVM_HV, Kind::LinuxKvmHv), (*b"Somebody\0\0\0\0", Kind::Unknown(*b"Somebody\0\0\0\0"))] {
        let mut rig = Rig::new();
        rig.machine.rename(FIRST_BASE, signature);
        let mut tree = Tree::attach(&rig.machine);
        assert_eq!(tree.dmesg()[0], format!("pvbus0 at mainbus0: {kind}"));
        assert!(tree.dmesg()[1].starts_with("hyperv0 at pvbus0: protocol 5.3, features 0x"), "{:?}", tree.dmesg());
        assert!(tree.stores().store(kind).is_some() && tree.stores().store(Kind::HyperV).is_none());
    }
}

#[test]
fn older_hosts_are_asked_for_older_versions() {
    use abi::hyperv::vmbus::version::{WIN8, WIN8_1, WIN10, WIN10_RS3, WIN10_V5, WIN10_V5_1, WIN10_V5_2, WS2008};
    let versions =
        [(WIN10_V5_2, "5.2"), (WIN10_V5_1, "5.1"), (WIN10_V5, "5.0"), (WIN10_RS3, "4.1"), (WIN10, "4.0"), (WIN8_1, "3.0"), (WIN8, "2.4")];
    for (version, text) in versions {
        let (rig, liar) = Rig::with_liar(guid::KVP);
        liar.set_newest(version);
        let mut tree = Tree::attach(&rig.machine);
        assert!(tree.dmesg()[1].starts_with(&format!("hyperv0 at pvbus0: protocol {text}, ")), "{:?}", tree.dmesg());
        rig.poll(&mut tree);
        liar.rings();
    }
    let (rig, liar) = Rig::with_liar(guid::KVP);
    liar.set_newest(WS2008);
    assert!(Tree::attach(&rig.machine).dmesg()[1].ends_with("the host speaks no version of VMBus from 2.4 to 5.3"));
}

#[test]
fn platform_without_a_bus_is_told_so_and_gets_its_registers_back() {
    let rig = Rig::silent();
    let tree = Tree::attach(&rig.machine);
    assert_eq!(tree.dmesg()[1], "hyperv0 at pvbus0: not attached: the host has no VMBus behind this interface");
    assert_eq!(rig.hyperv.guest_system(), 0);
    assert_eq!(rig.machine.pages_in_use(), 0);
}

#[test]
fn going_down_leaves_the_host_with_nothing_of_the_guest_s() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    let begin = rig.machine.now();
    tree.tell(&News::GoingDown { reboot: true }, begin);
    assert!(rig.machine.now() - begin < SECOND, "the host has answered");
}

#[test]
fn host_calls_by_the_kernel_s_vector_when_there_is_something_new() {
    let mut rig = Rig::new();
    rig.machine.upcall_vector = Some(0x31);
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    rig.interrupts.0.lock().unwrap().clear();
    let next = tree.poll(rig.machine.now()).next;
    assert_eq!(next, Some(rig.machine.now() + SECOND), "nothing is due");
    let shutdown = Shutdown::new(Arc::new(|| {}));
    rig.plug(shutdown.device(&rig.machine.timers));
    assert_eq!(*rig.interrupts.0.lock().unwrap(), [0x31], "of the offer");
    rig.poll(&mut tree);
    rig.interrupts.0.lock().unwrap().clear();
    shutdown.request(false).unwrap();
    rig.machine.let_others_run();
    assert_eq!(*rig.interrupts.0.lock().unwrap(), [0x31], "of the packet");
    assert_eq!(tree.on_upcall(rig.machine.now()).events, [Event::Shutdown(Kind::HyperV)]);
}
