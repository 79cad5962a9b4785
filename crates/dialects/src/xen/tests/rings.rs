//! The console's ring and XenStore's.

use abi::xen::io::console;
use abi::xen::xenstore::{RING_SIZE, connection, ring_error};

use super::super::xenstore::{Connection, Served, StoreRing};
use super::*;

/// What was written to a terminal.
#[derive(Clone, Default)]
struct Terminal(Arc<Mutex<Vec<u8>>>);

impl Write for Terminal {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn console_carries_both_ways() {
    let guest = Guest::running();
    let terminal = Terminal::default();
    guest.xen.open_console(Box::new(terminal.clone()));
    let port = guest.xen.console_port().unwrap();
    let at = words::CONSOLE_PAGE;
    // Across the end of the ring.
    for index in [console::OUT_CONS, console::OUT_PROD] {
        guest.put_u32(at + index, u32::MAX - 1);
    }
    for (offset, byte) in [2046, 2047, 0, 1].into_iter().zip(*b"boot") {
        guest.memory.write_obj(byte, GuestAddress(at + console::OUT + offset)).unwrap();
    }
    guest.put_u32(at + console::OUT_PROD, 2);
    assert_eq!(guest.port_call(evtchn::op::SEND, port), 0);
    assert_eq!(*terminal.0.lock().unwrap(), b"boot");
    assert_eq!(guest.u32_at(at + console::OUT_CONS), 2);
    assert_eq!(guest.interrupts().len(), 1, "there is room again");
    assert_eq!(guest.xen.console_input(&[b'x'; 2000]), 1024, "as much as has room");
    assert_eq!(guest.u32_at(at + console::IN_PROD), 1024);
}

#[test]
fn console_index_that_lies_breaks_the_console_only() {
    let guest = Guest::running();
    let terminal = Terminal::default();
    guest.xen.open_console(Box::new(terminal.clone()));
    let port = guest.xen.console_port().unwrap();
    guest.put_u32(words::CONSOLE_PAGE + console::OUT_PROD, 2049);
    assert_eq!(guest.port_call(evtchn::op::SEND, port), 0);
    guest.put_u32(words::CONSOLE_PAGE + console::OUT_PROD, 1);
    assert_eq!(guest.port_call(evtchn::op::SEND, port), 0);
    assert!(terminal.0.lock().unwrap().is_empty());
    assert_eq!(guest.xen.console_input(b"x"), 0);
}

/// A server that answers every byte with two.
#[derive(Default)]
struct Doubling {
    received: Vec<u8>,
    output: Vec<u8>,
    broken: bool,
    reconnected: bool,
}

impl Connection for Doubling {
    fn wants_input(&self) -> bool {
        self.output.len() < 4096
    }
    fn receive(&mut self, bytes: &[u8]) {
        self.received.extend_from_slice(bytes);
        self.output.extend(bytes.iter().flat_map(|byte| [*byte, *byte]));
    }
    fn output(&self) -> &[u8] {
        &self.output
    }
    fn sent(&mut self, count: usize) {
        self.output.drain(..count);
    }
    fn is_broken(&self) -> bool {
        self.broken
    }
    fn reconnect(&mut self) {
        *self = Doubling { reconnected: true, ..Doubling::default() };
    }
}

const REQ_CONS: u64 = words::STORE_PAGE + 2048;
const REQ_PROD: u64 = words::STORE_PAGE + 2052;
const RSP_CONS: u64 = words::STORE_PAGE + 2056;
const RSP_PROD: u64 = words::STORE_PAGE + 2060;
const FEATURES: u64 = words::STORE_PAGE + 2064;
const CONNECTION: u64 = words::STORE_PAGE + 2068;
const ERROR: u64 = words::STORE_PAGE + 2072;

#[test]
fn store_ring_passes_bytes_as_far_as_there_is_room() {
    let guest = Guest::new();
    let mut ring = StoreRing::new(guest.memory.clone(), 15);
    assert_eq!(guest.u32_at(FEATURES), 15);
    let mut server = Doubling::default();
    assert_eq!(ring.serve(&mut server), Served::default(), "nothing to do, nobody to tell");
    guest.memory.write_slice(&[7; RING_SIZE], GuestAddress(words::STORE_PAGE)).unwrap();
    guest.put_u32(REQ_PROD, RING_SIZE as u32);
    assert!(ring.serve(&mut server).notify);
    assert_eq!((guest.u32_at(REQ_CONS), guest.u32_at(RSP_PROD)), (1024, 1024));
    assert_eq!(server.output.len(), 1024, "waits for room");
    guest.put_u32(RSP_CONS, 1000);
    assert!(ring.serve(&mut server).notify);
    assert_eq!(guest.u32_at(RSP_PROD), 2024);
}

#[test]
fn store_ring_index_that_lies_is_reported_until_the_guest_reconnects() {
    for (index, value) in [(REQ_PROD, 1025), (REQ_CONS, 1), (RSP_PROD, 1025), (RSP_CONS, 1)] {
        let guest = Guest::new();
        let mut ring = StoreRing::new(guest.memory.clone(), 15);
        let mut server = Doubling::default();
        guest.put_u32(index, value);
        assert!(ring.serve(&mut server).notify);
        assert_eq!(guest.u32_at(ERROR), ring_error::RING_INDEX);
        assert_eq!(ring.serve(&mut server), Served::default(), "left alone");
        guest.put_u32(CONNECTION, connection::RECONNECT);
        assert!(ring.serve(&mut server).notify);
        assert!(server.reconnected);
        assert_eq!([CONNECTION, ERROR, REQ_PROD, RSP_PROD].map(|at| guest.u32_at(at)), [0; 4]);
    }
}

#[test]
fn broken_protocol_is_reported() {
    let guest = Guest::new();
    let mut ring = StoreRing::new(guest.memory.clone(), 15);
    ring.serve(&mut Doubling { broken: true, ..Doubling::default() });
    assert_eq!(guest.u32_at(ERROR), ring_error::PROTOCOL);
}
