//! The synthetic interrupt controller: messages, event flags, sources, timers.

use abi::hyperv::msr::{sint, stimer};
use abi::hyperv::synic::{EVENT_FLAGS, MESSAGE_FLAGS, MessageHeader, SLOT_SIZE, TimerExpired, message};
use zerocopy::FromBytes;

use super::super::synic::MAX_WAITING;
use super::*;

const SLOT_2: u64 = MESSAGES + 2 * SLOT_SIZE;

impl Machine {
    fn header(&self, slot: u64) -> MessageHeader {
        let mut bytes = [0; size_of::<MessageHeader>()];
        self.memory.read_slice(&mut bytes, GuestAddress(slot)).unwrap();
        MessageHeader::read_from_bytes(&bytes).unwrap()
    }

    /// What a guest does with a message: kind and first byte; it asks for more when it sees that more wait.
    fn consume(&self, vp: VcpuId, slot: u64) -> (u32, u8) {
        let header = self.header(slot);
        let first = self.memory.read_obj(GuestAddress(slot + 16)).unwrap();
        self.memory.write_obj(0u32, GuestAddress(slot)).unwrap();
        if self.memory.read_obj::<u8>(GuestAddress(slot + MESSAGE_FLAGS)).unwrap() & message::PENDING != 0 {
            self.write(vp, msr::EOM, 0);
        }
        (header.kind.get(), first)
    }
}

#[test]
fn message_comes_into_its_slot_with_an_interrupt() {
    let machine = machine();
    machine.turn_on(1, 2, 0xf3);
    assert!(machine.hyperv.post_message(1, 2, 1, &[5; 240]));
    let header = machine.header(SLOT_2);
    assert_eq!((header.kind.get(), header.size, header.flags, header.sender.get()), (1, 240, 0, 0));
    assert_eq!(machine.interrupts(), [(1, 0xf3)]);
    assert_eq!(machine.consume(1, SLOT_2), (1, 5));
}

#[test]
fn messages_for_a_full_slot_wait_in_order_and_say_so() {
    let machine = machine();
    machine.turn_on(0, 2, 0xf3);
    for number in 1..=3 {
        assert!(machine.hyperv.post_message(0, 2, 1, &[number]));
    }
    assert_eq!(machine.interrupts().len(), 1, "two have no slot yet");
    for number in 1..=3 {
        assert_eq!(machine.consume(0, SLOT_2), (1, number));
    }
    assert_eq!(machine.interrupts().len(), 2);
    assert_eq!(machine.header(SLOT_2).kind.get(), message::NONE);
    assert_eq!(machine.header(SLOT_2).flags, 0, "the last one did not say that more wait");
}

#[test]
fn messages_beyond_the_limit_are_refused_and_none_is_lost() {
    let machine = machine();
    machine.turn_on(0, 2, 0xf3);
    // One is in the slot.
    let taken = (0..2 * MAX_WAITING).filter(|_| machine.hyperv.post_message(0, 2, 1, &[0])).count();
    assert_eq!(taken, MAX_WAITING + 1);
    assert!(machine.hyperv.post_message(0, 3, 1, &[0]), "other sources have their own");
    for _ in 0..taken {
        assert_eq!(machine.consume(0, SLOT_2).0, 1);
    }
    assert_eq!(machine.header(SLOT_2).kind.get(), message::NONE);
    assert!(machine.hyperv.post_message(0, 2, 1, &[0]));
}

#[test]
fn controller_that_is_off_takes_nothing_and_forgets_what_waited() {
    let machine = machine();
    assert!(!machine.hyperv.post_message(0, 2, 1, &[0]) && !machine.hyperv.signal_event(0, 2, 1));
    machine.turn_on(0, 2, 0xf3);
    machine.hyperv.post_message(0, 2, 1, &[1]);
    machine.hyperv.post_message(0, 2, 1, &[2]);
    machine.write(0, msr::SCONTROL, 0);
    assert!(!machine.hyperv.post_message(0, 2, 1, &[0]) && !machine.hyperv.signal_event(0, 2, 1));
    // As a kernel does that was started by kexec: its pages are new, and empty.
    machine.write(0, msr::SIMP, OUTPUT | msr::PAGE_ENABLE);
    machine.write(0, msr::SCONTROL, msr::SCONTROL_ENABLE);
    machine.write(0, msr::EOM, 0);
    assert_eq!(machine.header(OUTPUT + 2 * SLOT_SIZE).kind.get(), message::NONE);
}

#[test]
fn wild_processors_sources_and_sizes_are_refused() {
    let machine = machine();
    machine.turn_on(0, 2, 0xf3);
    for (vp, sint, size) in [(PROCESSORS, 2, 0), (u32::MAX, 2, 0), (0, 16, 0), (0, 255, 0), (0, 2, 241)] {
        assert!(!machine.hyperv.post_message(vp, sint, 1, &vec![0; size]), "{vp} {sint} {size}");
    }
    for (vp, sint, flag) in [(PROCESSORS, 2, 1), (0, 16, 1), (0, 2, EVENT_FLAGS), (0, 2, u16::MAX)] {
        assert!(!machine.hyperv.signal_event(vp, sint, flag), "{vp} {sint} {flag}");
    }
    assert!(machine.content()[FLAGS as usize..][..0x1000].iter().all(|&byte| byte == 0));
}

#[test]
fn event_flag_interrupts_when_it_was_clear() {
    let machine = machine();
    machine.turn_on(2, 2, 0xf3);
    let last = EVENT_FLAGS - 1;
    for flag in [0, 65, last] {
        assert!(machine.hyperv.signal_event(2, 2, flag) && machine.hyperv.signal_event(2, 2, flag));
    }
    assert_eq!(machine.interrupts(), [(2, 0xf3); 3]);
    let slot = FLAGS + 2 * SLOT_SIZE;
    assert_eq!([machine.word(slot), machine.word(slot + 8), machine.word(slot + 248)], [1, 2, 1 << 63]);
    machine.put(slot, &[0]);
    machine.hyperv.signal_event(2, 2, 0);
    assert_eq!(machine.interrupts().len(), 1);
}

#[test]
fn masked_and_polled_sources_do_not_interrupt() {
    let machine = machine();
    for config in [0xf3 | sint::MASKED, 0xf3 | sint::POLLING] {
        machine.turn_on(0, 2, config);
        assert!(machine.hyperv.signal_event(0, 2, 7));
        machine.put(FLAGS + 2 * SLOT_SIZE, &[0]);
    }
    assert_eq!(machine.interrupts(), []);
    assert_eq!(machine.read(0, msr::SINT0 + 5), sint::MASKED);
}

#[test]
fn sources_have_vectors_of_interrupts() {
    let machine = machine();
    assert_eq!(machine.hyperv.write_msr(0, msr::SINT0, 15), Some(Err(MsrFault)));
    machine.write(0, msr::SINT0, 15 | sint::MASKED);
    machine.write(0, msr::SINT0, 16);
}

#[test]
fn vector_ends_by_itself_while_a_source_says_so() {
    let machine = machine();
    machine.write(0, msr::SINT0 + 1, 0x40 | sint::AUTO_EOI);
    machine.write(0, msr::SINT0 + 2, 0x40 | sint::AUTO_EOI);
    machine.write(0, msr::SINT0 + 1, 0x41);
    assert_eq!(machine.recorder.auto_eoi.lock().unwrap().iter().rfind(|(_, vector, _)| *vector == 0x40), Some(&(0, 0x40, true)));
    machine.hyperv.reset();
    assert_eq!(machine.recorder.auto_eoi.lock().unwrap().iter().rfind(|(_, vector, _)| *vector == 0x40), Some(&(0, 0x40, false)));
}

/// As Linux uses its timers: direct mode, started by the count.
#[test]
fn direct_timer_interrupts_by_its_vector() {
    let machine = machine();
    machine.write(1, msr::STIMER0_CONFIG, stimer::AUTO_ENABLE | stimer::DIRECT | 0xed << stimer::VECTOR_SHIFT);
    machine.write(1, msr::STIMER0_CONFIG + 1, 50_000);
    machine.pass(49_998);
    assert_eq!(machine.interrupts(), []);
    machine.pass(50_000);
    machine.pass(90_000);
    assert_eq!(machine.interrupts(), [(1, 0xed)]);
    assert_eq!(machine.read(1, msr::STIMER0_CONFIG) & stimer::ENABLE, 0);
    // One that is past expires at once.
    machine.write(1, msr::STIMER0_CONFIG + 1, 1);
    assert_eq!(machine.interrupts(), [(1, 0xed)]);
}

#[test]
fn timer_message_waits_for_its_slot_and_there_is_only_one() {
    let machine = machine();
    machine.turn_on(0, 2, 0xf3);
    let index = 3;
    machine.write(0, msr::STIMER0_CONFIG + 2 * index, stimer::PERIODIC | stimer::AUTO_ENABLE | 2 << stimer::SINT_SHIFT);
    machine.hyperv.post_message(0, 2, 1, &[9]);
    machine.write(0, msr::STIMER0_CONFIG + 2 * index + 1, 10_000);
    for time in [10_000, 20_000, 30_000] {
        machine.pass(time);
    }
    assert_eq!(machine.consume(0, SLOT_2), (1, 9));
    let mut bytes = [0; size_of::<TimerExpired>()];
    machine.memory.read_slice(&mut bytes, GuestAddress(SLOT_2 + 16)).unwrap();
    let expired = TimerExpired::read_from_bytes(&bytes).unwrap();
    assert_eq!((expired.index.get(), expired.expiration.get(), expired.delivery.get()), (index, 10_000, 30_000));
    assert_eq!(machine.consume(0, SLOT_2).0, message::TIMER_EXPIRED);
    assert_eq!(machine.header(SLOT_2).kind.get(), message::NONE);
    machine.pass(40_000);
    assert_eq!(machine.consume(0, SLOT_2).0, message::TIMER_EXPIRED);
}

#[test]
fn tiny_periods_do_not_become_a_storm() {
    let machine = machine();
    for timer in 0..msr::STIMERS {
        machine.write(
            0,
            msr::STIMER0_CONFIG + 2 * timer,
            stimer::PERIODIC | stimer::ENABLE | stimer::DIRECT | 0xed << stimer::VECTOR_SHIFT,
        );
        machine.write(0, msr::STIMER0_CONFIG + 2 * timer + 1, 1);
    }
    for time in 0..1_000 {
        machine.pass(time * 10);
    }
    // A millisecond, in periods of 200 us.
    assert!(machine.interrupts().len() <= 5 * msr::STIMERS as usize);
}

#[test]
fn reset_stops_timers_and_masks_sources() {
    let machine = machine();
    machine.turn_on(0, 2, 0xf3);
    machine.write(0, msr::STIMER0_CONFIG, stimer::AUTO_ENABLE | stimer::DIRECT | 0xed << stimer::VECTOR_SHIFT);
    machine.write(0, msr::STIMER0_CONFIG + 1, 10_000);
    machine.hyperv.reset();
    machine.pass(20_000);
    assert_eq!(machine.interrupts(), []);
    assert_eq!((machine.read(0, msr::SINT0 + 2), machine.read(0, msr::SCONTROL), machine.read(0, msr::SIMP)), (sint::MASKED, 0, 0));
    assert_eq!(machine.timers.next_deadline(), None);
}
