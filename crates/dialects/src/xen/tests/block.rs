//! A frontend of ours, honest and not, against Blkback; and the negotiation of both.

mod persistent;

use abi::xen::io::blkif::{Discard, INDIRECT_PAGES, Indirect, Request, Response, SEGMENTS, SLOT, Segment, op, status};
use abi::xen::io::xenbus::state;

use super::super::block::Blkback;
use super::super::xenbus::Backend;
use super::*;
use crate::disk::testing::{Asked, MemoryDisk};

const BACK: &str = "/local/domain/0/backend/vbd/1/51712";
const FRONT: &str = "/local/domain/1/device/vbd/51712";
const SECTORS: u64 = 64;

struct Rig {
    guest: Guest,
    tree: Arc<Tree>,
    disk: Arc<MemoryDisk>,
    backend: Backend<Blkback>,
    ring: FrontRing,
    grant: u32,
    port: u32,
}

impl Rig {
    /// Both sides in Initialising, a ring of one page ready.
    fn new(read_only: bool) -> Rig {
        Rig::with(read_only, false)
    }

    fn with(read_only: bool, keeps_grants: bool) -> Rig {
        let guest = Guest::running();
        let tree = Arc::new(Tree::default());
        let disk = Arc::new(MemoryDisk::new(SECTORS as usize, read_only));
        let driver = Blkback::new(guest.xen.clone(), disk.clone(), Arc::new(|| {})).keeping_grants(keeps_grants);
        let backend = Backend::new(driver, tree.clone(), BACK.into(), FRONT.into());
        let ring = FrontRing::new(&guest, SLOT, 32);
        let (grant, port) = (guest.grant(ring.page, 0), guest.port());
        let mut rig = Rig { guest, tree, disk, backend, ring, grant, port };
        rig.says(state::INITIALISING);
        rig
    }

    fn connected(read_only: bool) -> Rig {
        let mut rig = Rig::new(read_only);
        rig.connect();
        rig
    }

    fn connect(&mut self) {
        self.tree.set(&format!("{FRONT}/ring-ref"), self.grant);
        self.tree.set(&format!("{FRONT}/event-channel"), self.port);
        self.tree.set(&format!("{FRONT}/protocol"), "x86_64-abi");
        self.says(state::INITIALISED);
        assert_eq!(self.state(), state::CONNECTED);
    }

    /// The frontend's state becomes `new`.
    fn says(&mut self, new: u32) {
        self.tree.set(&format!("{FRONT}/state"), new);
        self.backend.frontend_changed();
    }

    fn state(&self) -> u32 {
        self.tree.get(&format!("{BACK}/state")).parse().unwrap()
    }

    /// What a request is answered.
    fn ask(&mut self, request: &[u8]) -> i16 {
        self.ring.push(&self.guest, request);
        self.backend.driver().work().unwrap();
        let response = Response::read_from_bytes(&self.ring.pop::<16>(&self.guest).expect("an answer")).unwrap();
        assert_eq!(response.id.get(), 42);
        response.status.get().cast_signed()
    }

    fn segment(&self, page: u64, first: u8, last: u8) -> Segment {
        Segment { gref: self.guest.grant(page, 0).into(), first_sect: first, last_sect: last, pad: 0.into() }
    }
}

fn request(operation: u8, sector: u64, with: &[Segment]) -> Request {
    let mut segments = [Segment::default(); SEGMENTS];
    segments[..with.len()].copy_from_slice(with);
    Request {
        operation,
        nr_segments: with.len() as u8,
        handle: 0.into(),
        pad: 0.into(),
        id: 42.into(),
        sector_number: sector.into(),
        segments,
    }
}

#[test]
fn reads_and_writes_move_granted_pages() {
    let mut rig = Rig::connected(false);
    let (page, other) = (rig.guest.page(), rig.guest.page());
    let segments = [rig.segment(page, 1, 2), rig.segment(other, 7, 7)];
    assert_eq!(rig.ask(request(op::READ, 10, &segments).as_bytes()), status::OKAY);
    let byte = |gpa: u64| rig.guest.memory.read_obj::<u8>(GuestAddress(gpa)).unwrap();
    assert_eq!([page + 511, page + 512, page + 1024, page + 1536, other + 7 * 512].map(byte), [0, 10, 11, 0, 12]);
    assert_eq!(rig.guest.flags(segments[0].gref.get()), flag::PERMIT_ACCESS, "not in use any more");
    let page = rig.guest.page();
    rig.guest.memory.write_slice(&[9; 4096], GuestAddress(page)).unwrap();
    let segment = rig.segment(page, 0, 0);
    assert_eq!(rig.ask(request(op::WRITE, 63, &[segment]).as_bytes()), status::OKAY);
    assert_eq!(rig.disk.bytes.lock().unwrap()[62 * 512..][510..514], [62, 62, 9, 9]);
    assert!(!rig.guest.interrupts().is_empty(), "the frontend is told");
}

#[test]
fn frontend_that_would_keep_its_pages_granted_may_end_each_grant_after_its_request() {
    let mut rig = Rig::new(false);
    // Linux says so whether or not it is offered, and gives the disk up when a page is still in use.
    rig.tree.set(&format!("{FRONT}/feature-persistent"), 1);
    rig.connect();
    assert_eq!(rig.tree.get(&format!("{BACK}/feature-persistent")), "");
    let segment = rig.segment(rig.guest.page(), 0, 0);
    for operation in [op::READ, op::WRITE] {
        assert_eq!(rig.ask(request(operation, 3, &[segment]).as_bytes()), status::OKAY);
        assert_eq!(rig.guest.flags(segment.gref.get()), flag::PERMIT_ACCESS);
    }
}

#[test]
fn resting_guest_is_told_of_what_is_done_before_the_next_request() {
    for is_idle in [false, true] {
        let mut rig = Rig::connected(false);
        rig.guest.interrupts.2.store(is_idle, Ordering::Relaxed);
        let page = rig.guest.page();
        let read = request(op::READ, 3, &[rig.segment(page, 0, 0)]);
        // Writes the ring's indices as they are when the first request is done.
        let write = request(op::WRITE, 5, &[rig.segment(rig.ring.page, 0, 0)]);
        rig.ring.push(&rig.guest, read.as_bytes());
        rig.ring.push(&rig.guest, write.as_bytes());
        rig.backend.driver().work().unwrap();
        let responses = u32::read_from_bytes(&rig.disk.bytes.lock().unwrap()[5 * 512 + 8..][..4]).unwrap();
        assert_eq!(responses, u32::from(is_idle));
        assert_eq!(rig.guest.u32_at(rig.ring.page + 8), 2);
    }
}

#[test]
fn indirect_requests_are_answered_by_what_they_did() {
    let mut rig = Rig::connected(false);
    let (list, page) = (rig.guest.page(), rig.guest.page());
    let segments = [rig.segment(page, 0, 7), rig.segment(rig.guest.page(), 0, 7)];
    rig.guest.memory.write_slice(segments.as_bytes(), GuestAddress(list)).unwrap();
    let mut indirect = Indirect {
        operation: op::INDIRECT,
        indirect_op: op::READ,
        nr_segments: 2.into(),
        pad: 0.into(),
        id: 42.into(),
        sector_number: 4.into(),
        handle: 0.into(),
        pad2: 0.into(),
        indirect_grefs: [0.into(); INDIRECT_PAGES],
    };
    indirect.indirect_grefs[0] = rig.guest.grant(list, flag::READONLY).into();
    assert_eq!(rig.ask(indirect.as_bytes()), status::OKAY);
    assert_eq!(rig.guest.memory.read_obj::<u8>(GuestAddress(page + 4095)).unwrap(), 11);
    rig.ring.push(&rig.guest, indirect.as_bytes());
    rig.backend.driver().work().unwrap();
    assert_eq!(rig.ring.pop::<16>(&rig.guest).unwrap()[8], op::READ);
    for (count, operation) in [(257, op::READ), (0, op::READ), (2, op::FLUSH), (2, op::INDIRECT)] {
        (indirect.nr_segments, indirect.indirect_op) = (count.into(), operation);
        assert_eq!(rig.ask(indirect.as_bytes()), status::ERROR, "{count} {operation}");
    }
}

#[test]
fn flush_and_discard_reach_the_disk_and_others_are_unknown() {
    let mut rig = Rig::connected(false);
    assert_eq!(rig.ask(request(op::FLUSH, 0, &[]).as_bytes()), status::OKAY);
    let discard = |sector: u64, count: u64| Discard {
        operation: op::DISCARD,
        flag: 0,
        handle: 0.into(),
        pad: 0.into(),
        id: 42.into(),
        sector_number: sector.into(),
        nr_sectors: count.into(),
    };
    assert_eq!(rig.ask(discard(8, 8).as_bytes()), status::OKAY);
    assert_eq!(*rig.disk.asked.lock().unwrap(), [Asked::Flush, Asked::Discard(4096, 4096)]);
    for (sector, count) in [(SECTORS, 1), (0, SECTORS + 1), (u64::MAX, 2), (0, u64::MAX)] {
        assert_eq!(rig.ask(discard(sector, count).as_bytes()), status::ERROR);
    }
    for operation in [2, 4, 7, 255] {
        assert_eq!(rig.ask(request(operation, 0, &[]).as_bytes()), status::UNSUPPORTED);
    }
}

#[test]
fn requests_that_make_no_sense_are_errors_and_touch_nothing() {
    let mut rig = Rig::connected(false);
    let page = rig.guest.page();
    let good = rig.segment(page, 0, 0);
    let mut bad = vec![request(op::READ, 0, &[]), request(op::READ, SECTORS, &[good]), request(op::READ, u64::MAX, &[good])];
    for (first, last) in [(1, 0), (0, 8), (255, 255)] {
        bad.push(request(op::READ, 0, &[rig.segment(page, first, last)]));
    }
    let mut many = request(op::READ, 0, &[good]);
    many.nr_segments = 12;
    bad.push(many);
    let ungranted = Segment { gref: 400.into(), ..good };
    bad.push(request(op::READ, 0, &[good, ungranted]));
    for request in bad {
        assert_eq!(rig.ask(request.as_bytes()), status::ERROR, "{request:?}");
    }
    assert_eq!(rig.guest.memory.read_obj::<u8>(GuestAddress(page)).unwrap(), 0);
    assert_eq!(rig.guest.flags(good.gref.get()), flag::PERMIT_ACCESS);
}

#[test]
fn readonly_disk_is_not_written_and_readonly_grants_are_not_filled() {
    let mut rig = Rig::connected(true);
    assert_eq!(rig.tree.get(&format!("{BACK}/info")), "4");
    let segment = rig.segment(rig.guest.page(), 0, 0);
    assert_eq!(rig.ask(request(op::WRITE, 0, &[segment]).as_bytes()), status::ERROR);
    let readonly = Segment { gref: rig.guest.grant(rig.guest.page(), flag::READONLY).into(), ..segment };
    assert_eq!(rig.ask(request(op::READ, 0, &[readonly]).as_bytes()), status::ERROR);
}

#[test]
fn revoked_grant_hurts_its_request_only() {
    let mut rig = Rig::connected(false);
    let segment = rig.segment(rig.guest.page(), 0, 0);
    rig.guest.set_grant(segment.gref.get(), Entry::default());
    assert_eq!(rig.ask(request(op::READ, 0, &[segment]).as_bytes()), status::ERROR);
    let segment = rig.segment(rig.guest.page(), 0, 0);
    assert_eq!(rig.ask(request(op::READ, 0, &[segment]).as_bytes()), status::OKAY);
}

#[test]
fn ring_index_that_lies_ends_the_device() {
    let mut rig = Rig::connected(false);
    for lie in [33, u32::MAX, 1 << 31] {
        rig.guest.put_u32(rig.ring.page, lie);
        assert!(rig.backend.driver().work().is_err(), "{lie}");
    }
    rig.backend.fail("a ring that lies");
    assert_eq!(rig.state(), state::CLOSING);
    assert_eq!(rig.guest.flags(rig.grant), flag::PERMIT_ACCESS, "the ring's page is the guest's again");
}

#[test]
fn frontend_may_close_and_begin_again() {
    let mut rig = Rig::connected(false);
    rig.says(state::CLOSING);
    assert_eq!(rig.state(), state::CLOSING);
    rig.says(state::CLOSED);
    assert_eq!(rig.state(), state::CLOSED);
    rig.says(state::INITIALISING);
    assert_eq!(rig.state(), state::INIT_WAIT);
    rig.says(state::CONNECTED);
    assert_eq!(rig.state(), state::CONNECTED);
}

#[test]
fn states_that_jump_leave_a_backend_that_can_be_begun_with() {
    let all = [0, 1, 2, 3, 4, 5, 6, 7, 8, 99, u32::MAX];
    for first in all {
        for second in all {
            let mut rig = Rig::connected(false);
            rig.says(first);
            rig.says(second);
            rig.tree.set(&format!("{FRONT}/state"), "no number");
            rig.backend.frontend_changed();
            rig.says(state::INITIALISING);
            assert_eq!(rig.state(), state::INIT_WAIT, "{first} {second}");
            rig.says(state::INITIALISED);
            assert_eq!(rig.state(), state::CONNECTED, "{first} {second}");
        }
    }
}

#[test]
fn keys_that_make_no_sense_end_the_device() {
    let cases = [
        ("ring-ref", "x"),
        ("ring-ref", "600"),
        ("event-channel", "0"),
        ("event-channel", "-1"),
        ("protocol", "ia64-abi"),
        ("ring-page-order", "5"),
        ("ring-page-order", "4294967295"),
        ("multi-queue-num-queues", "0"),
        ("multi-queue-num-queues", "5"),
        ("multi-queue-num-queues", "2"),
    ];
    for (name, value) in cases {
        let mut rig = Rig::new(false);
        rig.tree.set(&format!("{FRONT}/ring-ref"), rig.grant);
        rig.tree.set(&format!("{FRONT}/event-channel"), rig.port);
        rig.tree.set(&format!("{FRONT}/{name}"), value);
        rig.says(state::INITIALISED);
        assert_eq!(rig.state(), state::CLOSING, "{name}={value}");
        assert_ne!(rig.tree.get(&format!("{BACK}/error")), "");
        assert_eq!(rig.guest.flags(rig.grant), flag::PERMIT_ACCESS);
    }
}

#[test]
fn rings_of_several_pages_and_several_queues_are_served() {
    let mut rig = Rig::new(false);
    rig.tree.set(&format!("{FRONT}/ring-page-order"), 1);
    rig.tree.set(&format!("{FRONT}/multi-queue-num-queues"), 2);
    let mut first = 0;
    for queue in 0..2 {
        // Neighbouring pages, so that the test may write across.
        let pages = [rig.guest.page(), rig.guest.page()];
        for (number, page) in pages.into_iter().enumerate() {
            rig.tree.set(&format!("{FRONT}/queue-{queue}/ring-ref{number}"), rig.guest.grant(page, 0));
        }
        rig.tree.set(&format!("{FRONT}/queue-{queue}/event-channel"), rig.guest.port());
        first = pages[0];
    }
    rig.says(state::INITIALISED);
    assert_eq!(rig.state(), state::CONNECTED);
    rig.ring = FrontRing { page: first, ..FrontRing::new(&rig.guest, SLOT, 64) };
    // The slots from the 36th on lie in the second page, the 36th in both.
    for _ in 0..100 {
        assert_eq!(rig.ask(request(op::FLUSH, 0, &[]).as_bytes()), status::OKAY);
    }
}
