//! A guest that rings for ever and always has another request, in the loop that also serves a socket. Honest guests: `crates/vmd/src/xen/ring/tests.rs`.

// Tests fail by panicking; the lint knows only functions marked as tests.
#![allow(clippy::unwrap_used)]

use std::mem::offset_of;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use abi::xen::xenstore::{Interface, RING_SIZE};
use rustix::event::{EventfdFlags, eventfd};
use tempfile::TempDir;
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
    bell: Arc<OwnedFd>,
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

/// A store, and a loop that serves the ring of such a guest and a socket.
struct Rig {
    directory: TempDir,
    store: SharedStore,
    guest: Weak<Endless>,
    /// Is always ringing, and may outlive the guest.
    bell: Arc<OwnedFd>,
    stop: OwnedFd,
    service: Option<JoinHandle<()>>,
}

impl Rig {
    /// The loop's thread is called `name`.
    fn new(name: &str) -> Rig {
        let directory = tempfile::tempdir().unwrap();
        let (store, stop) = (SharedStore::new(Config::default()), eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let bell = Arc::new(eventfd(1, EventfdFlags::NONBLOCK).unwrap());
        let line = Arc::new(Endless { req_cons: 0.into(), rsp_prod: 0.into(), answered: 0.into(), bell: Arc::clone(&bell) });
        let guest = Arc::downgrade(&line);
        let client = store.with(|server| server.introduce(GUEST, Ring { gfn: 1, port: 1 })).unwrap();
        let (introductions, introduced) = channel();
        introductions.send(Introduced { domain: GUEST, client, line }).unwrap();
        let listener = Listener::bind(&directory.path().join("socket")).unwrap();
        let (served, stopped) = (store.clone(), stop.try_clone().unwrap());
        let service = std::thread::Builder::new().name(name.into()).spawn(move || {
            let mut service = Service::new(&served, None).unwrap();
            service.listen(listener).unwrap();
            service.serve_rings(introduced);
            service.run(&[stopped.as_fd()], None).unwrap();
        });
        Rig { directory, store, guest, bell, stop, service: Some(service.unwrap()) }
    }

    /// Bytes that the guest was answered.
    fn answered(&self) -> u64 {
        self.guest.upgrade().map_or(0, |guest| guest.answered.load(Ordering::SeqCst))
    }

    fn release(&self) {
        self.store.with(|server| server.forget(GUEST));
        eventually("its page is let go", || self.guest.strong_count() == 0);
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        rustix::io::write(&self.stop, &1u64.to_ne_bytes()).unwrap();
        self.service.take().unwrap().join().unwrap();
    }
}

#[test]
fn guest_that_never_stops_starves_nobody_and_its_ring_ends_with_it() {
    let rig = Rig::new("endless");
    eventually("the guest is served", || rig.answered() > 1 << 20);
    let mut client = Client::connect(&rig.directory.path().join("socket")).unwrap();
    for number in 0..20 {
        client.write("/x", format!("{number}").as_bytes()).unwrap();
    }
    let before = rig.answered();
    eventually("the guest is served beside the socket", || rig.answered() > before + (1 << 20));
    rig.release();
    assert_eq!(client.read("/x").unwrap(), b"19");
}

#[test]
fn bell_that_rings_on_after_its_ring_was_released_wakes_nobody() {
    let rig = Rig::new("released");
    eventually("the guest is served", || rig.answered() > 0);
    rig.release();
    eventually("the loop sleeps", || status("released", "State") == "S (sleeping)");
    let sleeps = || status("released", "voluntary_ctxt_switches").parse::<u64>().unwrap();
    let before = sleeps();
    for _ in 0..100 {
        rustix::io::write(&*rig.bell, &1u64.to_ne_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(sleeps(), before);
    let mut client = Client::connect(&rig.directory.path().join("socket")).unwrap();
    client.write("/x", b"1").unwrap();
    eventually("it was awake for a client", || sleeps() > before);
}

/// What the kernel says of the thread of this name: proc_pid_status(5).
fn status(thread: &str, field: &str) -> String {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let mut all = tasks.flat_map(|task| std::fs::read_to_string(task.path().join("status")));
    let status = all.find(|status| status.contains(&format!("Name:\t{thread}\n"))).unwrap();
    status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(":\t")).unwrap().into()
}
