//! What detection finds on known and on strange machines.

use alloc::string::ToString;
use alloc::vec::Vec;

use abi::hypervisor as words;

use super::*;
use crate::testing::{FakeHal, Nothing};

const BASE: u32 = FIRST_BASE;

fn hal() -> FakeHal<Nothing> {
    FakeHal::new(Nothing)
}

fn kinds(detection: &Detection) -> Vec<(Kind, u32)> {
    detection.interfaces.iter().map(|interface| (interface.kind, interface.base)).collect()
}

#[test]
fn without_the_processors_bit_nothing_is_looked_for() {
    let hal = hal().leaf(1, 0, 0, 0, 0).base(BASE, BASE + 1, words::KVM);
    assert_eq!(detect(&hal), Detection::default());
    assert_eq!(hal.cpuids.into_inner(), 1);
}

#[test]
fn every_base_is_read_once() {
    let hal = hal();
    assert!(detect(&hal).hypervisor);
    assert_eq!(hal.cpuids.into_inner(), 1 + words::BASES as usize);
}

#[test]
fn kvm_costs_one_leaf_more() {
    let hal = hal().base(BASE, BASE + 1, words::KVM).leaf(BASE + 1, 1 << 3 | 1 << 24, 0, 0, 1);
    let detection = detect(&hal);
    assert_eq!(detection.interfaces[0].feature_names, ["clocksource2", "clocksource-stable", "realtime"]);
    assert_eq!(hal.cpuids.into_inner(), 1 + words::BASES as usize + 1);
}

#[test]
fn all_interfaces_are_found_behind_holes() {
    let hal = hal().base(BASE, BASE + 0x10, words::VMWARE).base(BASE + 0x200, BASE + 0x205, words::XEN).base(
        BASE + 0xff00,
        BASE + 0xff01,
        words::BHYVE,
    );
    assert_eq!(kinds(&detect(&hal)), [(Kind::Vmware, BASE), (Kind::Xen, BASE + 0x200), (Kind::Bhyve, BASE + 0xff00)]);
}

#[test]
fn minor_numbers_follow_the_order_of_kinds_and_not_of_bases() {
    let hal = hal()
        .base(BASE, BASE + 1, *b"Somebody\0\0\0\0")
        .base(BASE + 0x100, BASE + 0x100, words::OPENBSD)
        .base(BASE + 0x200, BASE + 0x205, words::XEN)
        .base(BASE + 0x300, BASE + 0x301, words::KVM)
        .base(BASE + 0x400, BASE + 0x401, words::QEMU_TCG);
    let detection = detect(&hal);
    let names: Vec<&str> = detection.on_bus().iter().map(|interface| interface.kind.name()).collect();
    assert_eq!(names, ["KVM", "Xen", "OpenBSD", "QEMU TCG", "Somebody"]);
}

#[test]
fn interface_with_a_foreign_maximum_leaf_is_told_of_but_not_on_the_bus() {
    let hal = hal().base(BASE + 0x100, BASE + 1, words::VMWARE);
    let detection = detect(&hal);
    assert_eq!(detection.interfaces[0].notes, [Note::MaxLeafNotOwn]);
    assert!(detection.find(Kind::Vmware).is_none() && detection.on_bus().is_empty());
    assert_eq!(hal.cpuids.into_inner(), 1 + words::BASES as usize, "no leaf is read that does not exist");
}

#[test]
fn maximum_leaf_zero_is_believed_of_kvm_and_openbsd_only() {
    let hal = hal().base(BASE, 0, words::OPENBSD).leaf(BASE + 1, 1 << 3, 0, 0, 0).base(BASE + 0x100, 0, words::VMWARE);
    let detection = detect(&hal);
    assert_eq!(detection.interfaces[0].notes, [Note::MaxLeafZero]);
    assert_eq!(detection.interfaces[0].features.eax, 1 << 3);
    assert_eq!(detection.interfaces[1].notes, [Note::MaxLeafNotOwn]);
}

#[test]
fn openbsd_shows_kvm_at_its_second_base() {
    let hal = hal().base(BASE, 0, words::OPENBSD).base(BASE + 0x100, BASE + 0x101, words::KVM);
    let detection = detect(&hal);
    assert_eq!(detection.find(Kind::Kvm).unwrap().notes, [Note::ShownBy(Kind::OpenBsd)]);
}

#[test]
fn hyperv_in_front_of_kvm_has_no_vmbus() {
    let hal = hal()
        .base(BASE, BASE + 5, words::HYPERV)
        .leaf(BASE + 1, words::hyperv::INTERFACE, 0, 0, 0)
        .leaf(BASE + 2, 14393, 10 << 16, 0, 0)
        .leaf(BASE + 3, 0xa0, 0, 0, 0)
        .base(BASE + 0x100, BASE + 0x101, words::KVM);
    let detection = detect(&hal);
    let hyperv = detection.find(Kind::HyperV).unwrap();
    assert_eq!(hyperv.notes, [Note::NoVmbus, Note::ShownBy(Kind::Kvm)]);
    assert_eq!(hyperv.version.unwrap().to_string(), "10.0");
    assert_eq!(hyperv.feature_names, ["hypercall", "reset"]);
}

#[test]
fn hyperv_itself_has_no_notes() {
    let hal = hal().base(BASE, BASE + 0xb, words::HYPERV).leaf(BASE + 2, 20348, 10 << 16, 0, 0).leaf(BASE + 3, 0x2e7f, 0x003b_8030, 0, 0);
    assert_eq!(detect(&hal).interfaces[0].notes, []);
}

#[test]
fn hyperv_leaves_under_another_name_are_recognised() {
    let hal =
        hal().base(BASE, BASE + 5, words::LINUX_KVM_HV).leaf(BASE + 1, words::hyperv::INTERFACE, 0, 0, 0).leaf(BASE + 3, 0x222, 0, 0, 0);
    let detection = detect(&hal);
    assert_eq!(detection.interfaces[0].notes, [Note::HyperVLeaves, Note::NoVmbus, Note::NoVersion]);
    assert_eq!(detection.interfaces[0].kind.name(), "Linux KVM Hv");
}

#[test]
fn xen_tells_its_version() {
    let hal = hal().base(BASE, BASE + 5, words::XEN).leaf(BASE + 1, 4 << 16 | 17, 0, 0, 0).leaf(BASE + 2, 1, 0x4000_0000, 0, 0).leaf(
        BASE + 4,
        1 << 3 | 1 << 6,
        0,
        0,
        0,
    );
    let detection = detect(&hal);
    assert_eq!(detection.interfaces[0].version.unwrap().to_string(), "4.17");
    assert_eq!(detection.interfaces[0].feature_names, ["vcpu-id", "upcall-vector"]);
    assert_eq!(detection.interfaces[0].notes, []);
}

#[test]
fn hypervisor_that_answers_at_every_base_is_one_interface() {
    let [ebx, ecx, edx] = words::registers(words::VMWARE);
    let hal = hal().absent(Cpuid { eax: BASE + 0x10, ebx, ecx, edx });
    assert_eq!(kinds(&detect(&hal)), [(Kind::Vmware, BASE)]);
    let [ebx, ecx, edx] = words::registers(words::KVM);
    let hal = self::hal().absent(Cpuid { eax: 0, ebx, ecx, edx });
    assert_eq!(kinds(&detect(&hal)), [(Kind::Kvm, BASE)]);
}

#[test]
fn processor_that_answers_for_absent_leaves_is_no_interface() {
    // Intel answers with its highest ordinary leaf, here the three frequencies of leaf 0x16.
    let hal = hal().absent(Cpuid { eax: 0xc80, ebx: 0x1068, ecx: 0x64, edx: 0 });
    assert!(detect(&hal).interfaces.is_empty());
}

#[test]
fn second_base_of_a_kind_is_noted_and_the_first_used() {
    let hal = hal().base(BASE, BASE + 1, words::KVM).base(BASE + 0x100, BASE + 0x101, words::KVM);
    let detection = detect(&hal);
    assert_eq!(detection.interfaces[1].notes, [Note::Repeated]);
    assert_eq!(detection.find(Kind::Kvm).unwrap().base, BASE);
    assert_eq!(detection.on_bus().len(), 1);
}

proptest::proptest! {
    #[test]
    fn no_answers_of_a_processor_panic(answers in proptest::collection::vec((0u32..0x300, proptest::array::uniform4(proptest::num::u32::ANY), 0usize..16), 0..64)) {
        let known = [words::KVM, words::HYPERV, words::VMWARE, words::XEN, words::OPENBSD, words::VIRTUALBOX];
        let mut hal = hal();
        for (leaf, [eax, ebx, ecx, edx], signature) in answers {
            hal = match known.get(signature) {
                Some(signature) => hal.base(BASE + leaf, eax, *signature),
                None => hal.leaf(BASE + leaf, eax, ebx, ecx, edx),
            };
        }
        let detection = detect(&hal);
        proptest::prop_assert!(detection.on_bus().is_sorted_by_key(|interface| interface.kind));
    }
}
