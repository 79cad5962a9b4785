//! A guest that rings for ever and always has another request, in the loop that also serves a socket.

// Tests fail by panicking; the lint knows only functions marked as tests.
#![allow(clippy::unwrap_used)]

use std::mem::offset_of;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use abi::xen::xenstore::{Interface, RING_SIZE};
use rustix::event::{EventfdFlags, eventfd};
use xenstore::client::Client;
use xenstore::ring::Page;
use xenstore::{Config, DomId, Ring, SharedStore};
use xenstored::ring::{Introduced, Line};
use xenstored::{Listener, Service};

const GUEST: DomId = DomId(1);

/// Its ring is always full of requests, all zero, which are valid ones, and it has always read all replies.
struct Endless {
    req_cons: AtomicU32,
    rsp_prod: AtomicU32,
    answered: AtomicU64,
    bell: OwnedFd,
}

impl Page for Endless {
    fn load(&self, at: usize) -> u32 {
        let (cons, prod) = (self.req_cons.load(Ordering::SeqCst), self.rsp_prod.load(Ordering::SeqCst));
        match at {
            _ if at == offset_of!(Interface, req_cons) => cons,
            _ if at == offset_of!(Interface, req_prod) => cons.wrapping_add(RING_SIZE as u32),
            _ if at == offset_of!(Interface, rsp_cons) || at == offset_of!(Interface, rsp_prod) => prod,
            _ => 0,
        }
    }

    fn store(&self, at: usize, value: u32) {
        match at {
            _ if at == offset_of!(Interface, req_cons) => self.req_cons.store(value, Ordering::SeqCst),
            _ if at == offset_of!(Interface, rsp_prod) => self.rsp_prod.store(value, Ordering::SeqCst),
            _ => {}
        }
    }

    fn read(&self, _: usize, bytes: &mut [u8]) {
        bytes.fill(0);
    }

    fn write(&self, _: usize, bytes: &[u8]) {
        self.answered.fetch_add(bytes.len() as u64, Ordering::SeqCst);
    }
}

impl Line for Endless {
    fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
    fn hear(&self) {}
    fn ring(&self) {}
}

#[track_caller]
fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn guest_that_never_stops_starves_nobody_and_its_ring_ends_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let store = SharedStore::new(Config::default());
    let stop = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let client = store.with(|server| server.introduce(GUEST, Ring { gfn: 1, port: 1 })).unwrap();
    let line =
        Arc::new(Endless { req_cons: 0.into(), rsp_prod: 0.into(), answered: 0.into(), bell: eventfd(1, EventfdFlags::NONBLOCK).unwrap() });
    let guest: Weak<Endless> = Arc::downgrade(&line);
    let (introductions, introduced) = channel();
    introductions.send(Introduced { domain: GUEST, client, line }).unwrap();
    let listener = Listener::bind(&socket).unwrap();
    let (served, stopped) = (store.clone(), stop.try_clone().unwrap());
    let service = std::thread::spawn(move || {
        let mut service = Service::new(listener, &served, None).unwrap();
        service.serve_rings(introduced);
        service.run(&[stopped.as_fd()], None).unwrap();
    });
    let answered = || guest.upgrade().map_or(0, |guest| guest.answered.load(Ordering::SeqCst));
    eventually("the guest is served", || answered() > 1 << 20);
    let mut client = Client::connect(&socket).unwrap();
    for number in 0..20 {
        client.write("/x", format!("{number}").as_bytes()).unwrap();
    }
    let before = answered();
    eventually("the guest is served beside the socket", || answered() > before + (1 << 20));
    store.with(|server| server.forget(GUEST));
    eventually("its page is let go", || guest.strong_count() == 0);
    assert_eq!(client.read("/x").unwrap(), b"19");
    rustix::io::write(&stop, &1u64.to_ne_bytes()).unwrap();
    service.join().unwrap();
}
