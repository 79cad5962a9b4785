//! CPUID, clocks, pages that MSRs place, crash and reset.

use abi::hyperv::synic::ReferenceTsc;
use proptest::prelude::*;
use zerocopy::FromBytes;

use super::*;

#[test]
fn leaves_are_those_by_which_linux_takes_it_for_hyperv() {
    let mut table = CpuidTable::default();
    machine().hyperv.add_cpuid(0x4000_0000, &mut table);
    let base = table.get(0x4000_0000, 0).unwrap();
    // ms_hyperv_platform(): the highest leaf is in this range, and the signature.
    assert!((0x4000_0005..=0x4000_ffff).contains(&base.eax));
    assert_eq!([base.ebx, base.ecx, base.edx], abi::hypervisor::registers(*b"Microsoft Hv"));
    assert_eq!(table.get(0x4000_0001, 0).unwrap().eax, u32::from_le_bytes(*b"Hv#1"));
    // OpenBSD wants a version.
    assert_ne!(table.get(0x4000_0002, 0).unwrap().ebx >> 16, 0);
    let features = table.get(0x4000_0003, 0).unwrap();
    assert_eq!(features.eax & (1 << 5 | 1 << 6), 1 << 5 | 1 << 6);
    // Each of these makes Linux 6.1 do what only a root or an isolated partition can.
    assert_eq!(features.ebx & (1 << 1 | 1 << 12 | 1 << 22), 0);
    // "TSC invariant" would make Linux prefer the plain TSC.
    assert_eq!(features.eax & 1 << 15, 0);
    assert_eq!(table.get(0x4000_0004, 0).unwrap().ebx, u32::MAX);
}

/// Leaf 0x40000003 bit by bit (TLFS 2.4.4): what it promises is there, and what it does not is not.
#[test]
fn what_is_promised_is_there_and_nothing_else_is() {
    let machine = machine();
    machine.write(0, msr::GUEST_OS_ID, LINUX);
    let mut table = CpuidTable::default();
    machine.hyperv.add_cpuid(0x4000_0000, &mut table);
    let [features, hints] = [3, 4].map(|leaf| table.get(0x4000_0000 + leaf, 0).unwrap());
    let registers: [(u32, &[u32]); 15] = [
        (0, &[0x4000_0010]),
        (1, &[0x4000_0020]),
        (2, &[0x4000_0080, 0x4000_0081, 0x4000_0082, 0x4000_0083, 0x4000_0084, 0x4000_0090, 0x4000_009f]),
        (3, &[0x4000_00b0, 0x4000_00b1, 0x4000_00b6, 0x4000_00b7]),
        (4, &[0x4000_0071, 0x4000_0072, 0x4000_0073]),
        (5, &[0x4000_0000, 0x4000_0001]),
        (6, &[0x4000_0002]),
        (7, &[0x4000_0003]),
        // Pages of statistics.
        (8, &[0x4000_00e0, 0x4000_00e7]),
        (9, &[0x4000_0021]),
        // Idle.
        (10, &[0x4000_00f0]),
        (11, &[0x4000_0022, 0x4000_0023]),
        // Debugger.
        (12, &[0x4000_00f1, 0x4000_00f5]),
        // Migration to a TSC of another frequency.
        (13, &[0x4000_0106, 0x4000_0107, 0x4000_0108]),
        // TSC that does not change.
        (15, &[0x4000_0118]),
    ];
    for (bit, registers) in registers {
        for &index in registers {
            let is_promised = features.eax >> bit & 1 != 0;
            assert_eq!(machine.hyperv.read_msr(0, index).is_some(), is_promised, "{index:#x}");
            assert_eq!(machine.hyperv.write_msr(0, index, 0).is_some(), is_promised, "{index:#x}");
        }
    }
    // PostMessage, SignalEvent, extended calls.
    assert_eq!(features.ebx, 1 << 4 | 1 << 5 | 1 << 20);
    // Frequencies, crash, extended ranges of flushes, polled sources, a locked hypercall page, direct timers; no input in XMM registers (4), no idle (5).
    assert_eq!(features.edx, 1 << 8 | 1 << 10 | 1 << 14 | 1 << 17 | 1 << 18 | 1 << 19);
    // Flushes, local APIC by MSRs, relaxed timing, no automatic end of interrupts, interrupts by calls.
    assert_eq!(hints.eax, 1 << 2 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 10);
}

#[test]
fn run_time_is_what_the_host_counts() {
    let machine = machine();
    assert_eq!([0, 1, 2].map(|vcpu| machine.read(vcpu, msr::VP_RUNTIME)), [0, 10_000_000, 20_000_000]);
    let timers = Timers::new(machine.clock.clone());
    let ignorant = Hyperv::new(machine.memory.clone(), timers, Frequencies { tsc_hz: 1, apic_hz: 1 }, None, 1);
    assert_eq!((ignorant.read_msr(0, msr::VP_RUNTIME), ignorant.write_msr(0, msr::VP_RUNTIME, 0)), (None, None));
    let mut table = CpuidTable::default();
    ignorant.add_cpuid(0x4000_0000, &mut table);
    assert_eq!(table.get(0x4000_0003, 0).unwrap().eax & 1, 0);
}

#[test]
fn hypercall_page_is_there_only_while_the_guest_says_what_it_is() {
    let machine = machine();
    machine.write(0, msr::HYPERCALL, HYPERCALL_PAGE | msr::PAGE_ENABLE);
    assert_eq!((machine.read(0, msr::HYPERCALL), machine.word(HYPERCALL_PAGE)), (0, 0));
    machine.write(0, msr::GUEST_OS_ID, LINUX);
    machine.write(0, msr::HYPERCALL, HYPERCALL_PAGE | msr::PAGE_ENABLE);
    assert_eq!(machine.word(HYPERCALL_PAGE).to_le_bytes()[..4], [0xe7, HYPERCALL_PORT as u8, 0xc3, 0xcc]);
    machine.write(0, msr::GUEST_OS_ID, 0);
    assert_eq!(machine.read(0, msr::HYPERCALL), HYPERCALL_PAGE);
}

#[test]
fn locked_hypercall_page_stays_until_reset() {
    let machine = machine();
    machine.write(0, msr::GUEST_OS_ID, LINUX);
    machine.write(0, msr::HYPERCALL, HYPERCALL_PAGE | msr::PAGE_ENABLE | msr::HYPERCALL_LOCKED);
    assert_eq!(machine.hyperv.write_msr(0, msr::HYPERCALL, 0), Some(Err(MsrFault)));
    machine.hyperv.reset();
    assert_eq!((machine.read(0, msr::HYPERCALL), machine.read(0, msr::GUEST_OS_ID)), (0, 0));
    machine.write(0, msr::HYPERCALL, 0);
}

#[test]
fn wild_pages_fault_and_leave_memory_alone() {
    let machine = machine();
    machine.write(0, msr::GUEST_OS_ID, LINUX);
    for index in [msr::HYPERCALL, msr::REFERENCE_TSC, msr::VP_ASSIST_PAGE, msr::SIMP, msr::SIEFP] {
        for gpa in [RAM, 1 << 40, !0xfff] {
            assert_eq!(machine.hyperv.write_msr(0, index, gpa | msr::PAGE_ENABLE), Some(Err(MsrFault)), "{index:#x} at {gpa:#x}");
            // One that is not enabled is only a number.
            assert_eq!(machine.hyperv.write_msr(0, index, gpa), Some(Ok(())), "{index:#x} at {gpa:#x}");
        }
        machine.write(0, index, 0);
    }
    assert!(machine.content().iter().all(|&byte| byte == 0));
}

#[test]
fn read_only_registers_fault() {
    let machine = machine();
    for index in [msr::VP_INDEX, msr::VP_RUNTIME, msr::TIME_REF_COUNT, msr::TSC_FREQUENCY, msr::APIC_FREQUENCY, msr::SVERSION] {
        assert_eq!(machine.hyperv.write_msr(0, index, 1), Some(Err(MsrFault)), "{index:#x}");
    }
    assert_eq!(machine.read(2, msr::VP_INDEX), 2);
    assert_eq!(machine.read(0, msr::SVERSION), 1);
}

#[test]
fn registers_of_others_are_left_to_them() {
    let machine = machine();
    for index in [0x10, 0x4000_0200, 0x4b56_4d01, msr::STIMER0_CONFIG + 8, msr::SINT0 + 16, msr::CRASH_CTL + 1] {
        assert_eq!(machine.hyperv.read_msr(0, index), None, "{index:#x}");
        assert_eq!(machine.hyperv.write_msr(0, index, 0), None, "{index:#x}");
    }
}

/// As kvm-unit-tests' hyperv_clock wants it: the counter between two readings of the page.
#[test]
fn page_and_counter_tell_one_time() {
    let machine = machine();
    machine.write(1, msr::REFERENCE_TSC, OUTPUT | msr::PAGE_ENABLE);
    let mut bytes = [0; size_of::<ReferenceTsc>()];
    machine.memory.read_slice(&mut bytes, GuestAddress(OUTPUT)).unwrap();
    let page = ReferenceTsc::read_from_bytes(&bytes).unwrap();
    assert_ne!(page.sequence.get(), 0);
    for time in [0, 1, 99, 100, 12_345_678_901, 1 << 50] {
        vmm::time::Clock::advance_to(machine.clock.as_ref(), time);
        let by_page = ((u128::from(time) * u128::from(page.scale.get())) >> 64) as u64 + page.offset.get();
        assert_eq!(machine.read(0, msr::TIME_REF_COUNT), by_page);
    }
    assert_eq!((machine.read(0, msr::TSC_FREQUENCY), machine.read(0, msr::APIC_FREQUENCY)), (1_000_000_000, 1_000_000_000));
}

#[test]
fn end_of_interrupt_is_the_local_apics() {
    let machine = machine();
    machine.write(0, msr::EOI, 0);
    machine.write(0, msr::ICR, 0x3_0000_4030);
    machine.write(0, msr::TPR, 0x20);
    assert_eq!(*machine.recorder.local_apic.lock().unwrap(), [(offset::EOI, 0), (offset::ICR_LOW, 0x3_0000_4030), (offset::TPR, 0x20)]);
    assert_eq!(*machine.recorder.ended.lock().unwrap(), [0x55], "the I/O APIC hears of it");
    assert_eq!(machine.read(0, msr::TPR), offset::TPR);
}

#[test]
fn assist_page_offers_the_end_of_an_interrupt() {
    let machine = machine();
    machine.put(OUTPUT, &[u64::MAX]);
    machine.write(0, msr::VP_ASSIST_PAGE, OUTPUT | msr::PAGE_ENABLE);
    assert_eq!(machine.word(OUTPUT), 0, "a new page is empty");
    let flag = machine.recorder.flag.lock().unwrap().clone().unwrap();
    assert!(flag.offer());
    assert_eq!(machine.word(OUTPUT), u64::from(msr::ASSIST_NO_EOI));
    assert!(flag.take_back());
    machine.write(0, msr::VP_ASSIST_PAGE, 0);
    assert!(machine.recorder.flag.lock().unwrap().is_none());
}

#[test]
fn crash_is_told_once_with_its_message() {
    let machine = machine();
    assert_eq!(machine.read(0, msr::CRASH_CTL), msr::CRASH_NOTIFY | msr::CRASH_MESSAGE);
    machine.memory.write_slice(b"Kernel panic", GuestAddress(INPUT)).unwrap();
    for (parameter, value) in (0..).zip([7, 8, 9, INPUT, 12]) {
        machine.write(1, msr::CRASH_P0 + parameter, value);
        assert_eq!(machine.read(0, msr::CRASH_P0 + parameter), value);
    }
    machine.write(1, msr::CRASH_CTL, msr::CRASH_MESSAGE);
    assert!(machine.recorder.crashes.lock().unwrap().is_empty(), "without the notice there is none");
    for _ in 0..3 {
        machine.write(1, msr::CRASH_CTL, msr::CRASH_NOTIFY | msr::CRASH_MESSAGE);
    }
    let told = Crash { parameters: [7, 8, 9, INPUT, 12], message: b"Kernel panic".to_vec() };
    assert_eq!(*machine.recorder.crashes.lock().unwrap(), [told]);
}

#[test]
fn crash_with_a_wild_message_is_told_without_it() {
    for (gpa, length) in [(RAM, 16), (u64::MAX, u64::MAX), (RAM - 8, 16)] {
        let machine = machine();
        machine.write(0, msr::CRASH_P0 + 3, gpa);
        machine.write(0, msr::CRASH_P0 + 4, length);
        machine.write(0, msr::CRASH_CTL, msr::CRASH_NOTIFY | msr::CRASH_MESSAGE);
        assert_eq!(machine.recorder.crashes.lock().unwrap()[0].message, b"");
    }
}

#[test]
fn reset_register_resets_the_machine() {
    let machine = machine();
    machine.write(0, msr::RESET, 0);
    assert_eq!(*machine.recorder.resets.lock().unwrap(), 0);
    machine.write(0, msr::RESET, msr::RESET_NOW);
    assert_eq!(*machine.recorder.resets.lock().unwrap(), 1);
}

proptest! {
    #[test]
    fn no_register_and_no_call_panics(
        steps in prop::collection::vec((0..5u32, 0x4000_0000..0x4000_0120u32, prop_oneof![any::<u64>(), 0..2 * RAM, 0..64u64], any::<u64>()), 0..60),
    ) {
        let machine = machine();
        machine.write(0, msr::GUEST_OS_ID, LINUX);
        for (vcpu, index, value, word) in steps {
            let _ = machine.hyperv.write_msr(vcpu, index, value);
            let _ = machine.hyperv.read_msr(vcpu, index);
            let mut call = from_ring(0);
            (call.gpr[RCX], call.gpr[RDX], call.gpr[8], call.long_mode) = (word & !control::RESERVED & !0xffa0, value, value, vcpu != 1);
            machine.hyperv.port_call(vcpu, &mut call);
            machine.pass(value & 0xffff);
        }
    }
}
