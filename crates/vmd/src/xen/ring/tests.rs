//! A socket and a guest's ring in the one loop that serves both.

use std::io::{Read, Write};
use std::mem::offset_of;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use abi::xen::event_channel;
use abi::xen::hypercall::number;
use abi::xen::xenstore::{HEADER_SIZE, Header, Interface, RING_SIZE, op};
use dialects::Dialect;
use dialects::kvm::clock::PvClock;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use vmm::Hypercall;
use vmm::time::{StepClock, Timers};
use xenstore::Config;
use xenstore::client::Client;
use xenstore::ring::Page;
use zerocopy::{FromBytes, IntoBytes};

use super::*;
use crate::store::make_home;
use crate::xen::PLATFORM_MEMORY;

/// Where the guest has the arguments of its hypercalls.
const ARGUMENT: u64 = PLATFORM_MEMORY;

/// A kernel's driver of the ring, and nothing else of it.
struct Guest {
    xen: Arc<Xen>,
    page: StorePage,
    received: Vec<u8>,
}

impl Guest {
    fn new() -> Guest {
        let memory = vmm::memory::map(&crate::xen::memory(0)).unwrap();
        let timers = Timers::new(Arc::new(StepClock::new(Duration::ZERO)));
        let clock = Arc::new(PvClock::new(memory.clone(), Arc::clone(timers.clock()), 1_000_000_000, 1));
        Guest { page: StorePage::new(memory.clone()), xen: Xen::new(memory, clock, timers, None, [0; 16], 1), received: Vec::new() }
    }

    /// It has no other port than the store's, which is the first.
    fn kick(&self) {
        self.xen.memory().write_obj(1u32, GuestAddress(ARGUMENT)).unwrap();
        let mut call = Hypercall { long_mode: true, ..Hypercall::default() };
        (call.gpr[0], call.gpr[7], call.gpr[6]) = (number::EVENT_CHANNEL_OP, event_channel::op::SEND, ARGUMENT);
        assert!(self.xen.hypercall(0, &mut call) && call.gpr[0] == 0);
    }

    /// Puts a message into the ring as soon as it has room.
    fn send(&self, message: &[u8]) {
        let prod = self.page.load(offset_of!(Interface, req_prod));
        let is_free = || prod.wrapping_sub(self.page.load(offset_of!(Interface, req_cons))) as usize + message.len() <= RING_SIZE;
        until("requests are taken", is_free);
        for (byte, index) in message.chunks(1).zip(prod as usize..) {
            self.page.write(offset_of!(Interface, req) + index % RING_SIZE, byte);
        }
        self.page.store(offset_of!(Interface, req_prod), prod.wrapping_add(message.len() as u32));
        self.kick();
    }

    /// Waits for the next message of the server.
    fn receive(&mut self) -> (u32, Vec<u8>) {
        loop {
            if let Ok((header, rest)) = Header::read_from_prefix(&self.received)
                && let Some(payload) = rest.get(..header.len.get() as usize)
            {
                let message = (header.op.get(), payload.to_vec());
                self.received.drain(..HEADER_SIZE + message.1.len());
                return message;
            }
            let cons = self.page.load(offset_of!(Interface, rsp_cons));
            let mut prod = cons;
            until("something comes", || {
                prod = self.page.load(offset_of!(Interface, rsp_prod));
                prod != cons
            });
            for index in cons..prod {
                let mut byte = [0];
                self.page.read(offset_of!(Interface, rsp) + index as usize % RING_SIZE, &mut byte);
                self.received.extend(byte);
            }
            self.page.store(offset_of!(Interface, rsp_cons), prod);
            self.kick();
        }
    }

    fn ask(&mut self, operation: u32, payload: &str) -> String {
        self.send(&message(operation, payload));
        let (answered, payload) = self.receive();
        assert_eq!(answered, operation, "{payload:?}");
        String::from_utf8(payload).unwrap()
    }
}

fn message(operation: u32, payload: &str) -> Vec<u8> {
    let header = Header { op: operation.into(), req_id: 0.into(), tx_id: 0.into(), len: (payload.len() as u32).into() };
    [header.as_bytes(), payload.as_bytes()].concat()
}

#[track_caller]
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < end, "{what}");
        std::thread::yield_now();
    }
}

/// A machine's store with a socket, and a guest whose ring is served.
struct Both {
    directory: TempDir,
    server: StoreServer,
    guest: Guest,
    ring: ServedRing,
}

impl Both {
    fn new() -> Both {
        let directory = tempfile::tempdir().unwrap();
        let server = StoreServer::new(SharedStore::new(Config::default()), Some(&directory.path().join("socket"))).unwrap();
        server.store().host().update(make_home).unwrap();
        let guest = Guest::new();
        let ring = ServedRing::new(&guest.xen, &server).unwrap();
        Both { directory, server, guest, ring }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }
}

#[test]
fn socket_and_ring_take_turns_in_one_loop_and_hear_of_each_other() {
    let mut both = Both::new();
    let mut client = Client::connect(&both.socket()).unwrap();
    client.watch("/local/domain/1/data", "token").unwrap();
    client.next_event().unwrap();
    let guest = &mut both.guest;
    assert_eq!((guest.ask(op::WATCH, "vm-data\0token\0"), guest.receive().0), ("OK\0".into(), op::WATCH_EVENT));
    for turn in 0..500 {
        assert_eq!(guest.ask(op::WRITE, &format!("data/said\0{turn}")), "OK\0");
        assert_eq!(client.next_event().unwrap().path, "/local/domain/1/data/said");
        assert_eq!(client.read("/local/domain/1/data/said").unwrap(), turn.to_string().as_bytes());
        client.write("/local/domain/1/vm-data/answered", turn.to_string().as_bytes()).unwrap();
        assert_eq!(guest.receive(), (op::WATCH_EVENT, b"vm-data/answered\0token\0".to_vec()));
        assert_eq!(guest.ask(op::READ, "vm-data/answered\0"), turn.to_string());
    }
}

#[test]
fn flood_on_the_socket_leaves_the_ring_its_turns() {
    let mut both = Both::new();
    let (flooder, flooded) = (UnixStream::connect(both.socket()).unwrap(), AtomicU64::new(0));
    let requests = message(op::READ, "/local/domain/1/data\0").repeat(500);
    std::thread::scope(|scope| {
        scope.spawn(|| while (&flooder).write_all(&requests).is_ok() {});
        scope.spawn(|| {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(count @ 1..) = (&flooder).read(&mut buffer) {
                flooded.fetch_add(count as u64, Ordering::Relaxed);
            }
        });
        let turns = scope.spawn(|| {
            until("the socket is flooded", || flooded.load(Ordering::Relaxed) > 1 << 20);
            for turn in 0..200 {
                let before = flooded.load(Ordering::Relaxed);
                assert_eq!(both.guest.ask(op::WRITE, &format!("data/x\0{turn}")), "OK\0");
                until("the flood goes on", || flooded.load(Ordering::Relaxed) > before);
            }
        });
        let turns = turns.join();
        // Whatever became of them, or nobody would end.
        flooder.shutdown(Shutdown::Both).unwrap();
        turns.unwrap();
    });
}

#[test]
fn flood_on_the_ring_leaves_the_socket_its_turns() {
    let mut both = Both::new();
    let mut client = Client::connect(&both.socket()).unwrap();
    let (is_over, flooded, guest) = (AtomicBool::new(false), AtomicU64::new(0), &mut both.guest);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                (0..16).for_each(|_| guest.send(&message(op::READ, "data\0")));
                (0..16).for_each(|_| drop(guest.receive()));
                flooded.fetch_add(16, Ordering::Relaxed);
            }
        });
        let turns = scope.spawn(|| {
            for turn in 0..200 {
                let before = flooded.load(Ordering::Relaxed);
                client.write("/x", turn.to_string().as_bytes()).unwrap();
                until("the flood goes on", || flooded.load(Ordering::Relaxed) > before);
            }
        });
        let turns = turns.join();
        is_over.store(true, Ordering::Relaxed);
        turns.unwrap();
    });
}

#[test]
fn ring_that_is_never_used_has_no_thread_and_shows_its_features() {
    let server = StoreServer::new(SharedStore::new(Config::default()), None).unwrap();
    server.store().host().update(make_home).unwrap();
    let guest = Guest::new();
    let ring = ServedRing::new(&guest.xen, &server).unwrap();
    assert_ne!(guest.page.load(offset_of!(Interface, server_features)), 0);
    assert!(!server.caller().has_begun());
    drop(ring);
    assert_eq!(Arc::strong_count(&guest.xen), 1, "the guest's memory is let go");
    // After a reboot it is another domain, with the same port.
    let mut guest = Guest::new();
    let _ring = ServedRing::new(&guest.xen, &server).unwrap();
    assert_eq!(guest.ask(op::WRITE, "data/x\0one"), "OK\0");
}

#[test]
fn memory_is_let_go_before_power_is_off() {
    let Both { directory, server, guest, ring } = Both::new();
    drop(ring);
    // The loop had it, and with it the memory.
    assert_eq!(Arc::strong_count(&guest.xen), 1);
    let mut client = Client::connect(&directory.path().join("socket")).unwrap();
    guest.kick();
    client.write("/x", b"1").unwrap();
    assert_eq!(server.store().with(|server| server.ring(DomId(DOMAIN))), None);
}

#[test]
fn domain_that_is_released_and_goes_on_ringing_is_served_again_after_a_reboot() {
    let Both { directory, server, guest, ring } = Both::new();
    server.store().with(|server| server.forget(DomId(DOMAIN)));
    until("its memory is let go", || Arc::strong_count(&guest.xen) == 1);
    guest.kick();
    drop((ring, guest));
    server.store().host().update(make_home).unwrap();
    let mut guest = Guest::new();
    let _ring = ServedRing::new(&guest.xen, &server).unwrap();
    assert_eq!(guest.ask(op::WRITE, "data/x\0one"), "OK\0");
    let mut client = Client::connect(&directory.path().join("socket")).unwrap();
    assert_eq!(client.read("/local/domain/1/data/x").unwrap(), b"one");
}
