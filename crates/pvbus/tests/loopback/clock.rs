//! pvclock against the clock that KVM's and OpenBSD's dialects share.

use std::sync::Arc;

use abi::hypervisor::FIRST_BASE;
use dialects::kvm::Kvm;
use dialects::kvm::clock::PvClock;
use dialects::openbsd::Openbsd;
use pvbus::kvm::{ClockError, WallTime};
use pvbus::{Event, Hal, Kind, News, Tree};

use crate::machine::{EPOCH, Machine};

const HZ: u64 = 1_000_000_000;
const SECOND: u64 = 1_000_000_000;

fn clock(machine: &Machine) -> Arc<PvClock> {
    Arc::new(PvClock::new(machine.memory.clone(), machine.clock.clone(), HZ, 1))
}

fn kvm() -> Machine {
    let machine = Machine::new();
    let kvm = Kvm::new(machine.memory.clone(), clock(&machine), machine.timers.clone(), None, 1);
    machine.with(FIRST_BASE, kvm)
}

fn openbsd() -> Machine {
    let machine = Machine::new();
    let clock = clock(&machine);
    machine.with(FIRST_BASE, Arc::new(Openbsd::new(Some(clock))))
}

#[test]
fn clock_tells_the_hosts_time() {
    for machine in [kvm(), openbsd()] {
        let tree = Tree::attach(&machine);
        let clock = tree.clock().unwrap();
        for second in 1..5 {
            machine.wait_until(second * SECOND);
            let now = clock.now().unwrap();
            assert!(now.abs_diff(second * SECOND) < 2, "{now}");
        }
        assert_eq!(clock.is_stable(), Ok(true));
    }
}

#[test]
fn time_of_day_is_the_hosts() {
    let machine = kvm();
    let tree = Tree::attach(&machine);
    machine.wait_until(90 * SECOND);
    let WallTime { seconds, nanoseconds } = tree.clock().unwrap().time_of_day().unwrap();
    let expected = EPOCH.as_nanos() + 90 * u128::from(SECOND);
    let told = u128::from(seconds) * u128::from(SECOND) + u128::from(nanoseconds);
    assert!(told.abs_diff(expected) < 1000, "{told} {expected}");
}

#[test]
fn lines_are_those_of_openbsd() {
    assert_eq!(Tree::attach(&kvm()).dmesg(), ["pvbus0 at mainbus0: KVM", "pvclock0 at pvbus0"]);
    assert_eq!(Tree::attach(&openbsd()).dmesg(), ["pvbus0 at mainbus0: OpenBSD", "pvclock0 at pvbus0"]);
}

#[test]
fn openbsds_layout_has_both_interfaces_and_kvms_clock_is_used() {
    let machine = Machine::new();
    let clock = clock(&machine);
    let kvm = Kvm::new(machine.memory.clone(), clock.clone(), machine.timers.clone(), None, 1);
    let machine = machine.with(FIRST_BASE, Arc::new(Openbsd::new(Some(clock)))).with(FIRST_BASE + 0x100, kvm);
    let tree = Tree::attach(&machine);
    assert_eq!(tree.dmesg()[0], "pvbus0 at mainbus0: KVM, OpenBSD");
    assert_eq!(tree.clock().unwrap().kind(), Kind::Kvm);
}

#[test]
fn kernel_hears_the_time_and_the_host_is_told_when_the_machine_goes_down() {
    let machine = kvm();
    let mut tree = Tree::attach(&machine);
    let polled = tree.poll(machine.now());
    assert!(matches!(polled.events[..], [Event::Time(time)] if time.set && time.seconds == EPOCH.as_secs()));
    tree.tell(&News::GoingDown { reboot: false }, machine.now());
    assert_eq!(machine.read_msr(abi::kvm::MSR_SYSTEM_TIME_NEW), Ok(0));
    assert_eq!(tree.poll(machine.now()).next, None);
}

#[test]
fn backend_that_keeps_no_clock_is_an_error_and_no_hang() {
    let machine = Machine::new().with(FIRST_BASE, Arc::new(Openbsd::new(None)));
    let tree = Tree::attach(&machine);
    assert!(tree.clock().is_none());
    assert!(tree.dmesg()[1].starts_with("pvclock0 at pvbus0: not attached"), "{:?}", tree.dmesg());
    let interface = tree.detection().find(Kind::OpenBsd).unwrap();
    assert!(matches!(pvbus::kvm::Pvclock::attach(&machine, interface), Err(ClockError::Hal(pvbus::HalError::Fault))));
}
