//! The test device, used as kvm-unit-tests do.

use abi::hyperv::hypercall::code;
use abi::hyperv::msr::sint;
use abi::hyperv::synic::SLOT_SIZE;

use super::super::testdev::PORT;
use super::*;

const VECTOR: u64 = 0xb0;

fn word(command: u32, vp: u32, source: u32, connection: u32) -> u32 {
    connection << 24 | command << 16 | vp << 8 | source
}

fn with_device() -> Machine {
    let machine = machine();
    machine.hyperv.add_test_device();
    machine
}

impl Machine {
    fn command(&self, word: u32) {
        assert!(self.hyperv.port_out(0, PORT, 4, word));
    }

    fn post(&self, connection: u64, payload: u64) -> u16 {
        self.put(INPUT, &[connection, 0x1234_5678 | 8 << 32, payload]);
        self.call(0, code::POST_MESSAGE.into(), INPUT, 0).0
    }
}

#[test]
fn port_is_there_only_for_tests() {
    assert!(!machine().hyperv.port_out(0, PORT, 4, 0));
    let machine = with_device();
    assert!(!machine.hyperv.port_out(0, PORT, 1, 0) && !machine.hyperv.port_out(0, PORT + 4, 4, 0));
    assert_eq!(machine.hyperv.port_in(0, PORT, 4), Some(0));
}

/// hyperv_synic: every source of every processor, raised by every other.
#[test]
fn raised_sources_interrupt_their_processor() {
    let machine = with_device();
    for vp in 0..PROCESSORS {
        for source in 0..msr::SINTS {
            machine.turn_on(vp, source, u64::from(0x40 + source) | sint::AUTO_EOI);
            machine.command(word(3, vp, source, 0));
            assert_eq!(machine.interrupts(), [], "no route yet");
            machine.command(word(1, vp, source, 0));
            machine.command(word(3, vp, source, 0));
            assert_eq!(machine.interrupts(), [(vp, 0x40 + source as u8)]);
            machine.command(word(2, vp, source, 0));
            machine.command(word(3, vp, source, 0));
            assert_eq!(machine.interrupts(), []);
        }
    }
    machine.command(word(1, 0, 3, 0));
    machine.write(0, msr::SINT0 + 3, sint::MASKED);
    machine.command(word(3, 0, 3, 0));
    machine.write(0, msr::SINT0 + 3, 0x50);
    machine.write(0, msr::SCONTROL, 0);
    machine.command(word(3, 0, 3, 0));
    assert_eq!(machine.interrupts(), [], "masked, and off");
}

/// hyperv_connections: "send message to another cpu", "send message to busy slot", "receive pending message".
#[test]
fn messages_come_back_at_the_source_of_their_connection() {
    let machine = with_device();
    machine.turn_on(1, 8, VECTOR);
    machine.command(word(4, 1, 8, 0x11));
    let slot = MESSAGES + 8 * SLOT_SIZE;
    assert_eq!(machine.post(0x11, 41), Status::SUCCESS.0);
    assert_eq!((machine.word(slot), machine.word(slot + 16)), (0x1234_5678 | 8 << 32, 41));
    assert_eq!(machine.interrupts(), [(1, VECTOR as u8)]);
    assert_eq!(machine.post(0x11, 42), Status::SUCCESS.0);
    assert_eq!((machine.word(slot), machine.word(slot + 16)), (0x1234_5678 | 8 << 32 | 1 << 40, 41), "busy, and more waits");
    assert_eq!(machine.interrupts(), []);
    machine.put(slot, &[0]);
    machine.write(1, msr::EOM, 0);
    assert_eq!((machine.word(slot), machine.word(slot + 16)), (0x1234_5678 | 8 << 32, 42));
    assert_eq!(machine.interrupts(), [(1, VECTOR as u8)]);
    machine.command(word(5, 1, 8, 0x11));
    assert_eq!(machine.post(0x11, 43), Status::INVALID_CONNECTION_ID.0);
}

/// hyperv_connections: "signal event on another cpu", "signal event already set"; the memory form and the fast one.
#[test]
fn events_come_back_as_the_flag_of_their_connection() {
    let machine = with_device();
    machine.turn_on(2, 9, VECTOR);
    machine.command(word(6, 2, 9, 0x22));
    let signal = || machine.call(0, u64::from(code::SIGNAL_EVENT) | control::FAST, 0x22, 0).0;
    assert_eq!(signal(), Status::SUCCESS.0);
    assert_eq!(machine.word(FLAGS + 9 * SLOT_SIZE), 1 << 0x22);
    assert_eq!(machine.interrupts(), [(2, VECTOR as u8)]);
    machine.put(INPUT, &[0x22]);
    assert_eq!(machine.call(0, code::SIGNAL_EVENT.into(), INPUT, 0).0, Status::SUCCESS.0);
    assert_eq!(machine.interrupts(), [], "it was set already");
    machine.command(word(7, 2, 9, 0x22));
    assert_eq!(signal(), Status::INVALID_CONNECTION_ID.0);
}

/// What the suite asks first: anything but "no such call" means that there are connections.
#[test]
fn others_connections_stay_theirs() {
    let machine = with_device();
    machine.command(word(4, 0, 8, 0x10));
    assert_eq!(machine.call(0, u64::from(code::SIGNAL_EVENT) | control::FAST, 0x1234, 0).0, Status::INVALID_CONNECTION_ID.0);
    assert_eq!(machine.call(0, u64::from(code::SIGNAL_EVENT) | control::FAST, 1, 0).0, Status::SUCCESS.0);
    assert_eq!(machine.post(0x110, 0), Status::INVALID_CONNECTION_ID.0, "not connection 0x10");
}

#[test]
fn wild_commands_do_nothing() {
    let machine = with_device();
    for command in 0..=255 {
        machine.command(word(command, 255, 255, 255));
        machine.command(word(command, 0, 16, 7));
    }
    machine.command(word(1, 255, 255, 0));
    machine.command(word(3, 255, 255, 0));
    machine.command(word(4, 255, 255, 0x30));
    assert_eq!(machine.post(0x30, 0), Status::INSUFFICIENT_BUFFERS.0);
    assert_eq!(machine.interrupts(), []);
    machine.hyperv.reset();
    assert_eq!(machine.post(0x30, 0), Status::INVALID_CONNECTION_ID.0);
}
