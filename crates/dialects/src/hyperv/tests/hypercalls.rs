//! Hypercalls, as Linux and OpenBSD make them and as nobody should.

use abi::hyperv::hypercall::{ALL, SPARSE, code, flush};
use vmm::registers::{RBX, RDI, RSI};

use super::*;

const FAST: u64 = control::FAST;
const SUCCESS: (u16, u64) = (Status::SUCCESS.0, 0);

fn rep(code: u16, count: u64, start: u64) -> u64 {
    u64::from(code) | count << control::COUNT_SHIFT | start << control::START_SHIFT
}

/// A control word with a variable header of so many words.
fn with_banks(word: u64, banks: u64) -> u64 {
    word | banks << control::VARIABLE_SHIFT
}

fn failed(status: Status) -> (u16, u64) {
    (status.0, 0)
}

#[test]
fn user_programs_and_real_mode_have_no_hypercalls() {
    let machine = machine();
    for ring in [1, 2, 3] {
        let mut call = from_ring(ring);
        call.gpr[RCX] = code::SIGNAL_EVENT as u64 | FAST;
        machine.hyperv.port_call(0, &mut call);
        assert!(call.undefined);
    }
    let mut call = from_ring(0);
    call.paging.cr0 = 0;
    machine.hyperv.port_call(0, &mut call);
    assert!(call.undefined);
    assert!(machine.recorder.signals.lock().unwrap().is_empty());
}

#[test]
fn strings_and_reads_of_the_port_do_nothing() {
    let machine = machine();
    for (write, string) in [(false, false), (true, true)] {
        let mut call = PortCall { write, string, ..from_ring(0) };
        let before = call;
        machine.hyperv.port_call(0, &mut call);
        assert_eq!(call, before);
    }
}

#[test]
fn unknown_calls_are_answered_so() {
    let machine = machine();
    // GetPartitionId is not promised.
    for code in [0u64, 0x46, 0x5e, 0x8002, 0xffff] {
        assert_eq!(machine.call(0, code, INPUT, OUTPUT), failed(Status::INVALID_HYPERCALL_CODE), "{code:#x}");
    }
    for bits in [1 << 31, 1 << 44, 1 << 60] {
        assert_eq!(machine.call(0, bits | u64::from(code::SIGNAL_EVENT) | FAST, 1, 0), failed(Status::INVALID_HYPERCALL_INPUT));
    }
}

#[test]
fn messages_reach_their_connection() {
    let machine = machine();
    machine.put(INPUT, &[1, 1 | 240 << 32]);
    machine.memory.write_slice(&[7; 240], GuestAddress(INPUT + 16)).unwrap();
    assert_eq!(machine.call(0, code::POST_MESSAGE.into(), INPUT, 0), SUCCESS);
    assert_eq!(*machine.recorder.heard.lock().unwrap(), [(1, 1, vec![7; 240])]);
    machine.put(INPUT, &[0xff00_0004, 1]);
    assert_eq!(machine.call(0, code::POST_MESSAGE.into(), INPUT, 0), failed(Status::INVALID_CONNECTION_ID));
    assert_eq!(machine.recorder.heard.lock().unwrap()[1], (4, 1, vec![]), "24 bits are the connection");
}

#[test]
fn messages_that_cannot_be_are_refused() {
    let machine = machine();
    let post = |input: u64, words: [u64; 2]| {
        machine.put(INPUT, &words);
        machine.call(0, code::POST_MESSAGE.into(), input, 0)
    };
    assert_eq!(post(INPUT, [1, 1 | 241 << 32]), failed(Status::INVALID_PARAMETER), "too long");
    assert_eq!(post(INPUT, [1, 1 | u64::from(u32::MAX) << 32]), failed(Status::INVALID_PARAMETER));
    assert_eq!(post(INPUT, [1, 0]), failed(Status::INVALID_PARAMETER), "the kind of an empty slot");
    assert_eq!(post(INPUT, [1, 1 << 31]), failed(Status::INVALID_PARAMETER), "the hypervisor's own kinds");
    assert_eq!(post(INPUT + 4, [1, 1]), failed(Status::INVALID_ALIGNMENT));
    assert_eq!(post(RAM, [1, 1]), failed(Status::INVALID_ALIGNMENT));
    assert_eq!(post(!7, [1, 1]), failed(Status::INVALID_ALIGNMENT));
    assert_eq!(machine.call(0, u64::from(code::POST_MESSAGE) | FAST, 1, 1), failed(Status::INVALID_HYPERCALL_INPUT));
    assert!(machine.recorder.heard.lock().unwrap().is_empty());
}

#[test]
fn input_that_crosses_a_page_is_refused() {
    let machine = machine();
    let at = INPUT + 0x1000 - 24;
    machine.put(at, &[1, 1 | 8 << 32, 0]);
    assert_eq!(machine.call(0, code::POST_MESSAGE.into(), at, 0), SUCCESS);
    machine.put(at, &[1, 1 | 9 << 32, 0]);
    assert_eq!(machine.call(0, code::POST_MESSAGE.into(), at, 0), failed(Status::INVALID_ALIGNMENT));
    machine.put(at, &[0, flush::ALL_PROCESSORS, 0]);
    assert_eq!(machine.call(0, code::FLUSH_SPACE.into(), at, 0), SUCCESS);
    assert_eq!(machine.call(0, rep(code::FLUSH_LIST, 1, 0), at, 0), failed(Status::INVALID_ALIGNMENT));
}

/// Linux' fast form, OpenBSD's form in memory, and the registers of 32-bit callers.
#[test]
fn events_reach_their_connection_in_every_form() {
    let machine = machine();
    assert_eq!(machine.call(0, u64::from(code::SIGNAL_EVENT) | FAST, 1 | 5 << 32, 0), SUCCESS);
    machine.put(INPUT, &[1 | 6 << 32]);
    assert_eq!(machine.call(0, code::SIGNAL_EVENT.into(), INPUT, 0), SUCCESS);
    let mut call = PortCall { long_mode: false, ..from_ring(0) };
    (call.gpr[RDX], call.gpr[RAX], call.gpr[RBX], call.gpr[RCX]) = (0, u64::from(code::SIGNAL_EVENT) | FAST, 7, 1);
    machine.hyperv.port_call(0, &mut call);
    assert_eq!((call.gpr[RDX], call.gpr[RAX]), (0, 0));
    assert_eq!(*machine.recorder.signals.lock().unwrap(), [(1, 5), (1, 6), (1, 7)]);
    assert_eq!(machine.call(0, u64::from(code::SIGNAL_EVENT) | FAST, 2, 0), failed(Status::INVALID_CONNECTION_ID));
    assert_eq!(machine.call(0, u64::from(code::SIGNAL_EVENT) | FAST, 1 | 1 << 48, 0), failed(Status::INVALID_PARAMETER));
}

#[test]
fn without_vmbus_there_are_no_connections() {
    let memory = vmm::memory::map(&[(0, RAM)]).unwrap();
    let timers = Timers::new(Arc::new(StepClock::new(Duration::ZERO)));
    let hyperv = Hyperv::new(memory, timers, Frequencies { tsc_hz: 1, apic_hz: 1 }, None, 1);
    let mut call = from_ring(0);
    (call.gpr[RCX], call.gpr[RDX]) = (u64::from(code::SIGNAL_EVENT) | FAST, 1);
    hyperv.port_call(0, &mut call);
    assert_eq!(call.gpr[RAX], u64::from(Status::INVALID_CONNECTION_ID.0));
}

#[test]
fn whole_address_spaces_are_flushed_on_the_processors_named() {
    let machine = machine();
    machine.put(INPUT, &[0x1234_5000, 0, 0b110]);
    assert_eq!(machine.call(1, code::FLUSH_SPACE.into(), INPUT, 0), SUCCESS);
    machine.put(INPUT, &[0, flush::ALL_PROCESSORS, 0]);
    assert_eq!(machine.call(2, code::FLUSH_SPACE.into(), INPUT, 0), SUCCESS);
    machine.put(INPUT, &[0, 0, u64::MAX]);
    assert_eq!(machine.call(0, code::FLUSH_SPACE.into(), INPUT, 0), SUCCESS);
    assert_eq!(*machine.recorder.flushes.lock().unwrap(), [(1, 0b110, None), (2, 0b111, None), (0, 0b111, None)]);
    machine.put(INPUT, &[0, 1 << 4, 1]);
    assert_eq!(machine.call(0, code::FLUSH_SPACE.into(), INPUT, 0), failed(Status::INVALID_PARAMETER));
}

#[test]
fn listed_pages_are_flushed_and_counted() {
    let machine = machine();
    machine.put(INPUT, &[0, 0, 1, 0x7000, 0xffff_8000_0000_0000 | 2]);
    assert_eq!(machine.call(0, rep(code::FLUSH_LIST, 2, 0), INPUT, 0), (0, 2));
    assert_eq!(machine.call(0, rep(code::FLUSH_LIST, 2, 1), INPUT, 0), (0, 2), "goes on with the second");
    let high = 0xffff_8000_0000_0000;
    let flushes = machine.recorder.flushes.lock().unwrap();
    assert_eq!(flushes[0], (0, 1, Some(vec![0x7000, high, high + 0x1000, high + 0x2000])));
    assert_eq!(flushes[1], (0, 1, Some(vec![high, high + 0x1000, high + 0x2000])));
}

#[test]
fn long_lists_flush_everything() {
    let machine = machine();
    machine.put(INPUT, &[0, 0, 1, 0x7000 | 0xfff]);
    assert_eq!(machine.call(0, rep(code::FLUSH_LIST, 1, 0), INPUT, 0), (0, 1));
    machine.put(INPUT, &[0, flush::EXTENDED_RANGES, 1, 0x7000]);
    assert_eq!(machine.call(0, rep(code::FLUSH_LIST, 1, 0), INPUT, 0), (0, 1));
    assert_eq!(*machine.recorder.flushes.lock().unwrap(), [(0, 1, None), (0, 1, None)]);
}

#[test]
fn rep_counts_that_lie_are_refused() {
    let machine = machine();
    machine.put(INPUT, &[0, 0, 1, 0x7000]);
    for (count, start) in [(0, 0), (1, 1), (1, 2), (0, 0xfff)] {
        let (status, done) = machine.call(0, rep(code::FLUSH_LIST, count, start), INPUT, 0);
        assert_eq!((status, done), (Status::INVALID_HYPERCALL_INPUT.0, start));
    }
    // More elements than the page has room for.
    assert_eq!(machine.call(0, rep(code::FLUSH_LIST, 0xfff, 0), INPUT, 0), failed(Status::INVALID_ALIGNMENT));
    // A simple call has no elements, and no variable header.
    assert_eq!(machine.call(0, rep(code::FLUSH_SPACE, 1, 0), INPUT, 0), failed(Status::INVALID_HYPERCALL_INPUT));
    assert_eq!(machine.call(0, with_banks(code::FLUSH_SPACE.into(), 1), INPUT, 0), failed(Status::INVALID_HYPERCALL_INPUT));
    assert_eq!(machine.call(0, rep(code::SIGNAL_EVENT, 1, 0) | FAST, 1, 0), failed(Status::INVALID_HYPERCALL_INPUT));
    assert!(machine.recorder.flushes.lock().unwrap().is_empty());
}

#[test]
fn sparse_sets_name_processors() {
    let machine = machine();
    let (space, list) = (u64::from(code::FLUSH_SPACE_EX), rep(code::FLUSH_LIST_EX, 1, 0));
    machine.put(INPUT, &[0, 0, SPARSE, 1, 0b101]);
    assert_eq!(machine.call(0, with_banks(space, 1), INPUT, 0), SUCCESS);
    machine.put(INPUT, &[0, 0, SPARSE, 0b11, 0b010, u64::MAX, 0x9000]);
    assert_eq!(machine.call(0, with_banks(list, 2), INPUT, 0), (0, 1));
    machine.put(INPUT, &[0, 0, ALL, 0]);
    assert_eq!(machine.call(0, space, INPUT, 0), SUCCESS);
    machine.put(INPUT, &[0, 0, SPARSE, 0b10, 0b111]);
    assert_eq!(machine.call(0, with_banks(space, 1), INPUT, 0), SUCCESS);
    let expected = [(0, 0b101, None), (0, 0b010, Some(vec![0x9000])), (0, 0b111, None), (0, 0, None)];
    assert_eq!(*machine.recorder.flushes.lock().unwrap(), expected);
}

#[test]
fn sparse_sets_that_lie_are_refused() {
    let machine = machine();
    let call = |words: &[u64], banks: u64| {
        machine.put(INPUT, words);
        machine.call(0, with_banks(code::FLUSH_SPACE_EX.into(), banks), INPUT, 0)
    };
    assert_eq!(call(&[0, 0, SPARSE, 0b11, 1], 1), failed(Status::INVALID_HYPERCALL_INPUT), "two banks named, one there");
    assert_eq!(call(&[0, 0, SPARSE, u64::MAX], 0), failed(Status::INVALID_HYPERCALL_INPUT));
    assert_eq!(call(&[0, 0, 2, 1, 1], 1), failed(Status::INVALID_PARAMETER), "no such format");
    assert_eq!(call(&[0, 0, SPARSE, u64::MAX], 0x3ff), failed(Status::INVALID_ALIGNMENT), "banks beyond the page");
    assert!(machine.recorder.flushes.lock().unwrap().is_empty());
}

#[test]
fn interrupts_go_to_the_processors_named() {
    let machine = machine();
    assert_eq!(machine.call(0, u64::from(code::SEND_CLUSTER_IPI) | FAST, 0xfd, 0b101), SUCCESS);
    assert_eq!(machine.interrupts(), [(0, 0xfd), (2, 0xfd)]);
    machine.put(INPUT, &[0xfc, SPARSE, 1, 1 << 1 | 1 << 63]);
    assert_eq!(machine.call(0, with_banks(code::SEND_CLUSTER_IPI_EX.into(), 1), INPUT, 0), SUCCESS);
    assert_eq!(machine.interrupts(), [(1, 0xfc)], "the machine has no processor 63");
    for vector in [0xf, 0x100, u64::from(u32::MAX), 0x30 | 1 << 32] {
        let refused = machine.call(0, u64::from(code::SEND_CLUSTER_IPI) | FAST, vector, 1);
        assert_eq!(refused, failed(Status::INVALID_PARAMETER), "{vector:#x}");
    }
    assert_eq!(machine.interrupts(), []);
}

#[test]
fn extended_capabilities_are_none_and_go_where_they_may() {
    let machine = machine();
    machine.put(OUTPUT, &[u64::MAX; 2]);
    assert_eq!(machine.call(0, code::EXT_QUERY_CAPABILITIES.into(), 0, OUTPUT), SUCCESS);
    assert_eq!((machine.word(OUTPUT), machine.word(OUTPUT + 8)), (0, u64::MAX));
    for output in [OUTPUT + 4, RAM, !7] {
        assert_eq!(machine.call(0, code::EXT_QUERY_CAPABILITIES.into(), 0, output), failed(Status::INVALID_ALIGNMENT));
    }
}

#[test]
fn long_spinning_is_noticed() {
    assert_eq!(machine().call(0, u64::from(code::NOTIFY_LONG_SPIN_WAIT) | FAST, 1000, 0), SUCCESS);
}

#[test]
fn callers_of_32_bits_get_their_answer_in_a_pair() {
    let machine = machine();
    machine.put(INPUT, &[0, 0, 1, 0x7000]);
    let mut call = PortCall { long_mode: false, ..from_ring(0) };
    (call.gpr[RDX], call.gpr[RAX]) = (1, code::FLUSH_LIST.into());
    (call.gpr[RBX], call.gpr[RCX], call.gpr[RDI], call.gpr[RSI]) = (0, INPUT, 0, 0);
    machine.hyperv.port_call(0, &mut call);
    assert_eq!((call.gpr[RDX], call.gpr[RAX]), (1, 0));
}
