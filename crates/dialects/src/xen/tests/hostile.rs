//! A guest that takes back, changes and closes what a backend is using at that moment.

use std::io;

use abi::xen::io::blkif::{Indirect, Request, Response, SEGMENTS, SLOT, Segment, op, status};
use abi::xen::io::ring::{RSP_PROD, SLOTS};
use abi::xen::io::xenbus::state;

use super::super::block::Blkback;
use super::super::xenbus::Backend;
use super::*;
use crate::disk::testing::MemoryDisk;
use crate::disk::{Disk, GuestSlice};

const BACK: &str = "/local/domain/0/backend/vbd/1/51712";
const FRONT: &str = "/local/domain/1/device/vbd/51712";

/// What the guest does while its request is being done.
type Meddling = Box<dyn Fn() + Send>;

/// A disk in whose reads the guest meddles.
struct Meddled {
    disk: MemoryDisk,
    meddling: Mutex<Meddling>,
}

impl Disk for Meddled {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, slices: &[GuestSlice<'_>]) -> io::Result<()> {
        self.meddling.lock().unwrap()();
        self.disk.read(offset, slices)
    }

    fn write(&self, _offset: u64, _slices: &[GuestSlice<'_>]) -> io::Result<()> {
        panic!("nobody asked for a write")
    }

    fn flush(&self) -> io::Result<()> {
        self.disk.flush()
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        panic!("nobody asked for a discard")
    }
}

struct Rig {
    guest: Guest,
    disk: Arc<Meddled>,
    backend: Backend<Blkback>,
    ring: FrontRing,
    port: u32,
}

impl Rig {
    fn new() -> Rig {
        let (guest, tree) = (Guest::running(), Arc::new(Tree::default()));
        let disk = Arc::new(Meddled { disk: MemoryDisk::new(64, false), meddling: Mutex::new(Box::new(|| {})) });
        let driver = Blkback::new(guest.xen.clone(), disk.clone(), Arc::new(|| {}));
        let mut backend = Backend::new(driver, tree.clone(), BACK.into(), FRONT.into());
        let ring = FrontRing::new(&guest, SLOT, 32);
        let port = guest.port();
        tree.set(&format!("{FRONT}/ring-ref"), guest.grant(ring.page, 0));
        tree.set(&format!("{FRONT}/event-channel"), port);
        for new in [state::INITIALISING, state::INITIALISED] {
            tree.set(&format!("{FRONT}/state"), new);
            backend.frontend_changed();
        }
        Rig { guest, disk, backend, ring, port }
    }

    fn meddle(&self, how: impl Fn() + Send + 'static) {
        *self.disk.meddling.lock().unwrap() = Box::new(how);
    }

    /// A read of sector 5 into a page of its own: the request, and the page.
    fn read(&self) -> (Request, u64) {
        let page = self.guest.page();
        let mut segments = [Segment::default(); SEGMENTS];
        segments[0] = Segment { gref: self.guest.grant(page, 0).into(), first_sect: 0, last_sect: 0, pad: 0.into() };
        let request = Request {
            operation: op::READ,
            nr_segments: 1,
            handle: 0.into(),
            pad: 0.into(),
            id: 42.into(),
            sector_number: 5.into(),
            segments,
        };
        (request, page)
    }

    /// The answer to a request: operation, id and status.
    fn ask(&mut self, request: &[u8]) -> (u8, u64, i16) {
        self.ring.push(&self.guest, request);
        self.backend.driver().work().unwrap();
        let Response { id, operation, status, .. } = Response::read_from_bytes(&self.ring.pop::<16>(&self.guest).unwrap()).unwrap();
        (operation, id.get(), status.get().cast_signed())
    }

    fn sector(&self, page: u64) -> [u8; 512] {
        let mut bytes = [0; 512];
        self.guest.memory.read_slice(&mut bytes, GuestAddress(page)).unwrap();
        bytes
    }
}

#[test]
fn request_that_is_changed_while_it_is_done_is_done_as_it_was() {
    let mut rig = Rig::new();
    let (request, page) = rig.read();
    let (memory, slot) = (rig.guest.memory.clone(), GuestAddress(rig.ring.page + SLOTS));
    rig.meddle(move || memory.write_slice(&[0xff; SLOT], slot).unwrap());
    assert_eq!(rig.ask(request.as_bytes()), (op::READ, 42, status::OKAY));
    assert_eq!(rig.sector(page), [5; 512]);
}

#[test]
fn indirect_segments_that_are_changed_while_they_are_used_are_used_as_they_were() {
    let mut rig = Rig::new();
    let (request, page) = rig.read();
    let list = rig.guest.page();
    rig.guest.memory.write_slice(request.segments[0].as_bytes(), GuestAddress(list)).unwrap();
    let mut indirect: Indirect = zerocopy::FromZeros::new_zeroed();
    (indirect.operation, indirect.indirect_op, indirect.nr_segments) = (op::INDIRECT, op::READ, 1.into());
    (indirect.id, indirect.sector_number) = (42.into(), 5.into());
    indirect.indirect_grefs[0] = rig.guest.grant(list, flag::READONLY).into();
    let memory = rig.guest.memory.clone();
    rig.meddle(move || memory.write_slice(&[0xff; 64], GuestAddress(list)).unwrap());
    assert_eq!(rig.ask(indirect.as_bytes()), (op::READ, 42, status::OKAY));
    assert_eq!(rig.sector(page), [5; 512]);
}

#[test]
fn grant_that_is_revoked_in_use_stays_revoked_and_ends_nothing_else() {
    let mut rig = Rig::new();
    let (request, _) = rig.read();
    let grant = request.segments[0].gref.get();
    let (memory, entry) = (rig.guest.memory.clone(), GuestAddress(GRANT_TABLE + u64::from(grant) * 8));
    rig.meddle(move || memory.write_slice(Entry::default().as_bytes(), entry).unwrap());
    assert_eq!(rig.ask(request.as_bytes()).1, 42);
    assert_eq!(rig.guest.flags(grant), 0, "no mark is left in it");
    assert_eq!(rig.ask(request.as_bytes()), (op::READ, 42, status::ERROR));
    let (other, page) = rig.read();
    assert_eq!((rig.ask(other.as_bytes()).2, rig.sector(page)), (status::OKAY, [5; 512]));
}

#[test]
fn responses_that_the_frontend_makes_up_are_not_the_backends() {
    let mut rig = Rig::new();
    for lie in [7, u32::MAX, 1 << 31] {
        let answered = rig.guest.u32_at(rig.ring.page + RSP_PROD);
        rig.guest.put_u32(rig.ring.page + RSP_PROD, lie);
        let (request, page) = rig.read();
        rig.ring.push(&rig.guest, request.as_bytes());
        rig.backend.driver().work().unwrap();
        assert_eq!(rig.guest.u32_at(rig.ring.page + RSP_PROD), answered + 1, "it counts by itself");
        assert_eq!(rig.sector(page), [5; 512]);
    }
}

#[test]
fn port_that_is_closed_in_use_leaves_a_backend_that_nobody_hears() {
    let mut rig = Rig::new();
    assert_eq!(rig.guest.port_call(evtchn::op::CLOSE, rig.port), 0);
    rig.guest.interrupts();
    let (request, _) = rig.read();
    assert_eq!(rig.ask(request.as_bytes()).2, status::OKAY);
    assert_eq!(rig.guest.interrupts(), []);
    // The number may be somebody else's by then, and the backend's end of it is not.
    let taken = rig.guest.port();
    assert_eq!(taken, rig.port);
    assert_eq!(rig.guest.xen.bind(taken, Arc::new(|| {})), Ok(()));
}

#[test]
fn device_that_leaves_is_over_when_the_frontend_has_closed_and_not_before() {
    let (guest, tree) = (Guest::running(), Arc::new(Tree::default()));
    let driver = Blkback::new(guest.xen.clone(), Arc::new(MemoryDisk::new(64, false)), Arc::new(|| {}));
    let mut backend = Backend::new(driver, tree.clone(), BACK.into(), FRONT.into());
    let ring = FrontRing::new(&guest, SLOT, 32);
    let grant = guest.grant(ring.page, 0);
    tree.set(&format!("{FRONT}/ring-ref"), grant);
    tree.set(&format!("{FRONT}/event-channel"), guest.port());
    let mut says = |new: u32| {
        tree.set(&format!("{FRONT}/state"), new);
        backend.frontend_changed();
        backend.is_over()
    };
    assert!(!says(state::INITIALISING) && !says(state::CONNECTED));
    tree.set(&format!("{BACK}/online"), 0);
    assert!(!says(state::CONNECTED) && !says(state::CLOSING));
    assert_eq!(guest.flags(grant), flag::PERMIT_ACCESS, "the ring is the guest's again");
    assert!(says(state::CLOSED));
    assert!(says(state::INITIALISING), "it does not begin anew");
    assert_eq!(tree.get(&format!("{BACK}/state")), state::CLOSED.to_string());
}
