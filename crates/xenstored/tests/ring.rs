//! A guest's ring before the real server: the page as a guest may fill it, honest or not, with Xen's own dialect between the two.

// Tests fail by panicking; the lint knows only functions marked as tests.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::Ordering;

use abi::xen::hvm::STORE_PAGE;
use abi::xen::xenstore::{HEADER_SIZE, Header, Interface, RING_SIZE, connection, op, ring_error};
use dialects::xen::xenstore::StorePage;
use vm_memory::{Address, Bytes, GuestAddress};
use vmm::GuestMemory;
use xenstore::ring::{Served, StoreRing};
use xenstore::{ClientId, Config, DomId, FEATURES, NoHost, Ring, Server, Store};
use zerocopy::{FromBytes, IntoBytes};

const PAGE: u64 = 4096;
const GUEST: DomId = DomId(1);

/// A guest that has nothing but its page, and the host's client.
struct Rig {
    memory: GuestMemory,
    ring: StoreRing<StorePage>,
    server: Server,
    id: ClientId,
    host: ClientId,
}

macro_rules! word {
    ($field:ident) => {
        GuestAddress(STORE_PAGE + std::mem::offset_of!(Interface, $field) as u64)
    };
}

impl Rig {
    fn new() -> Rig {
        let memory = vmm::memory::map(&[(0, PAGE), (STORE_PAGE, PAGE)]).unwrap();
        let mut server = Server::new(Store::new(Config::default()), Box::new(NoHost));
        let id = server.introduce(GUEST, Ring { gfn: STORE_PAGE / PAGE, port: 1 }).unwrap();
        let host = server.connect(DomId::HOST, true);
        let ring = StoreRing::new(StorePage::new(memory.clone()), server.store().features(GUEST));
        Rig { memory, ring, server, id, host }
    }

    fn get(&self, at: GuestAddress) -> u32 {
        self.memory.load(at, Ordering::SeqCst).unwrap()
    }

    fn set(&self, at: GuestAddress, value: u32) {
        self.memory.store(value, at, Ordering::SeqCst).unwrap();
    }

    fn serve(&mut self) {
        while self.ring.serve(&mut self.server, self.id).again {}
    }

    /// Puts as much of `bytes` into the ring as fits; how much that is.
    fn put(&self, bytes: &[u8]) -> usize {
        let (cons, prod) = (self.get(word!(req_cons)), self.get(word!(req_prod)));
        let room = RING_SIZE - prod.wrapping_sub(cons) as usize;
        let count = bytes.len().min(room);
        for (byte, at) in bytes[..count].iter().zip(0..) {
            self.memory.write_obj(*byte, word!(req).unchecked_add(u64::from(prod.wrapping_add(at)) % RING_SIZE as u64)).unwrap();
        }
        self.set(word!(req_prod), prod.wrapping_add(count as u32));
        count
    }

    /// Takes what is in the ring.
    fn take(&self) -> Vec<u8> {
        let (cons, prod) = (self.get(word!(rsp_cons)), self.get(word!(rsp_prod)));
        let at = |at: u32| word!(rsp).unchecked_add(u64::from(cons.wrapping_add(at)) % RING_SIZE as u64);
        let bytes = (0..prod.wrapping_sub(cons)).map(|index| self.memory.read_obj(at(index)).unwrap()).collect();
        self.set(word!(rsp_cons), prod);
        bytes
    }

    /// Sends a request and reads until its reply is whole.
    fn ask(&mut self, operation: u32, payload: &[u8]) -> (u32, Vec<u8>) {
        let request = message(operation, payload);
        let (mut sent, mut received) = (0, Vec::new());
        for _ in 0..100 {
            sent += self.put(&request[sent..]);
            self.serve();
            received.extend(self.take());
            if let Ok((header, payload)) = Header::read_from_prefix(&received)
                && payload.len() == header.len.get() as usize
            {
                return (header.op.get(), payload.into());
            }
        }
        panic!("no answer, but {received:?}");
    }

    fn host_writes(&mut self, path: &str) {
        let before = self.server.output(self.host).len();
        self.server.receive(self.host, &message(op::WRITE, format!("{path}\0value").as_bytes()));
        assert_eq!(self.server.output(self.host).len() - before, HEADER_SIZE + 3, "the host is answered");
    }
}

fn message(operation: u32, payload: &[u8]) -> Vec<u8> {
    let header = Header { op: operation.into(), req_id: 1.into(), tx_id: 0.into(), len: (payload.len() as u32).into() };
    [header.as_bytes(), payload].concat()
}

/// XSA-38.
#[test]
fn ring_indices_may_wrap_around_two_to_the_32() {
    let mut rig = Rig::new();
    rig.host_writes("/a");
    for index in [word!(req_cons), word!(req_prod), word!(rsp_cons), word!(rsp_prod)] {
        rig.set(index, u32::MAX - 100);
    }
    for _ in 0..40 {
        assert_eq!(rig.ask(op::READ, b"/a\0"), (op::ERROR, b"EACCES\0".to_vec()));
    }
    assert!(rig.get(word!(req_prod)) < 2000 && rig.get(word!(rsp_cons)) < 2000, "they have wrapped");
    assert_eq!(rig.get(word!(error)), ring_error::NONE);
}

#[test]
fn message_longer_than_the_ring_goes_through_in_pieces() {
    let mut rig = Rig::new();
    let host = rig.host;
    let path = "/local/domain/1/data";
    rig.host_writes(path);
    rig.server.receive(host, &message(op::SET_PERMS, format!("{path}\0n1\0").as_bytes()));
    let value = vec![b'v'; 2000];
    assert_eq!(rig.ask(op::WRITE, &[b"data\0", value.as_slice()].concat()).1, b"OK\0");
    assert_eq!(rig.ask(op::READ, b"data\0"), (op::READ, value));
}

/// XSA-38.
#[test]
fn index_that_goes_back_or_too_far_breaks_its_ring_only_until_it_reconnects() {
    let producers = [u32::MAX, RING_SIZE as u32 + 1, 1 << 31].map(|value| (word!(req_prod), value));
    let others = [(word!(req_cons), 1), (word!(rsp_prod), RING_SIZE as u32 + 1), (word!(rsp_cons), 1)];
    for (index, value) in producers.into_iter().chain(others) {
        let mut rig = Rig::new();
        rig.set(index, value);
        rig.serve();
        assert_eq!(rig.get(word!(error)), ring_error::RING_INDEX);
        rig.host_writes("/a");
        let served = rig.ring.serve(&mut rig.server, rig.id);
        assert_eq!(served, Served::default(), "it is left alone");
        rig.ring = StoreRing::new(StorePage::new(rig.memory.clone()), FEATURES);
        rig.serve();
        assert_eq!(rig.get(word!(error)), ring_error::RING_INDEX, "another server goes on with what this one left");
        rig.set(word!(connection), connection::RECONNECT);
        rig.serve();
        assert_eq!((rig.get(word!(connection)), rig.get(word!(error))), (connection::CONNECTED, ring_error::NONE));
        assert_eq!(rig.ask(op::READ, b"/a\0").1, b"EACCES\0");
    }
}

/// XSA-72, XSA-330.
#[test]
fn broken_protocol_is_told_in_the_ring_and_a_reconnection_drops_watches_and_transactions() {
    let mut rig = Rig::new();
    assert_eq!(rig.ask(op::TRANSACTION_START, b"\0").1, b"1\0");
    rig.put(&message(op::WATCH, b"data\0token\0"));
    rig.serve();
    assert_eq!(rig.server.store().open_counts(GUEST), (1, 1));
    let mut lie = message(op::READ, b"");
    lie[12..].copy_from_slice(&4097u32.to_le_bytes());
    rig.take();
    rig.put(&lie);
    rig.serve();
    assert_eq!(rig.get(word!(error)), ring_error::PROTOCOL);
    rig.host_writes("/a");
    rig.set(word!(connection), connection::RECONNECT);
    rig.serve();
    assert_eq!(rig.server.store().open_counts(GUEST), (0, 0));
    assert_eq!(rig.ask(op::READ, b"/a\0").1, b"EACCES\0");
}

/// XSA-326, and oxenstored's writer that waited for a guest.
#[test]
fn guest_that_reads_no_replies_parks_what_its_quota_allows_and_holds_up_nobody() {
    let mut rig = Rig::new();
    let request = message(op::READ, b"/a\0");
    let mut parked = 0;
    for _ in 0..1000 {
        parked += rig.put(&request);
        rig.serve();
        rig.host_writes("/a");
    }
    let requests = parked / request.len();
    assert!(requests < 200, "{requests} requests are parked");
    assert_eq!(rig.get(word!(rsp_prod)), RING_SIZE as u32, "the ring is full");
}

/// XSA-325.
#[test]
fn domain_that_is_released_with_requests_in_its_ring_gets_none_of_them_done() {
    let mut rig = Rig::new();
    rig.put(&message(op::WATCH, b"data\0token\0").repeat(10));
    rig.server.forget(GUEST);
    rig.serve();
    assert_eq!(rig.server.store().open_counts(GUEST), (0, 0));
    assert_eq!(rig.take(), b"");
    rig.host_writes("/a");
}
