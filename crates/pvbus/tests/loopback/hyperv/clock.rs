//! Reference time, by both of its ways.

use pvbus::{Hal, News, Tree};

use super::{Rig, SECOND};

#[test]
fn reference_time_is_the_host_s_by_register_and_by_page() {
    let rig = Rig::new();
    let tree = Tree::attach(&rig.machine);
    let clock = tree.reference_clock().unwrap();
    for second in 1..5 {
        rig.machine.wait_until(second * SECOND);
        let (counter, page) = (clock.by_counter().unwrap(), clock.by_page().unwrap());
        // Scales are rounded down.
        assert!(page == counter && (second * SECOND).abs_diff(page) <= 200, "{counter} {page}");
    }
}

#[test]
fn host_does_not_write_to_the_page_once_the_machine_has_gone_down() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    assert_ne!(rig.machine.read_msr(abi::hyperv::msr::REFERENCE_TSC), Ok(0));
    tree.tell(&News::GoingDown { reboot: true }, rig.machine.now());
    assert_eq!(rig.machine.read_msr(abi::hyperv::msr::REFERENCE_TSC), Ok(0));
}
