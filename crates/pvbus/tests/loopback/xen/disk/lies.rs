//! xbf against backends that lie.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use abi::xen::io::blkif::{Response, SLOT, op};
use abi::xen::io::ring::{RSP_PROD, SLOTS};
use dialects::xen::{Access, Xen};
use pvbus::block::{BlockDevice, DiskError, Request};
use pvbus::{Hal, Tree};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use super::super::{HOME, Noise, Rig, SECOND};
use super::{DISK, only_disk};

#[test]
fn states_that_jump_connect_nothing() {
    for states in [&["4"][..], &["7", "8", "9", "x", "4294967300", "4"], &["3", "1", "0"]] {
        let rig = Rig::new();
        let mut tree = Tree::attach(&rig.machine);
        rig.plug(DISK, &[]);
        for state in states {
            rig.back(DISK, "state", state);
            assert_eq!(rig.poll(&mut tree), [], "{states:?}");
        }
        assert_eq!(rig.front(DISK, "state"), "1");
        assert!(tree.disks().is_empty());
    }
}

#[test]
fn keys_that_make_no_sense_end_the_device_with_a_reason() {
    for (sectors, sector_size, reason) in [
        ("x", "512", "the backend's sectors makes no sense"),
        ("36028797018963968", "512", "the backend's sectors makes no sense"),
        ("8", "0", "the backend's sector-size makes no sense"),
        ("8", "8192", "the backend's sector-size makes no sense"),
        ("8", "513", "the backend's sector-size makes no sense"),
    ] {
        let rig = Rig::new();
        let mut tree = Tree::attach(&rig.machine);
        assert_eq!(rig.connect_by_hand(&mut tree, sectors, sector_size), [format!("xbf0 at xen0: {reason}")]);
        assert_eq!(rig.front(DISK, "state"), "5");
        let error = rig.host.read(&format!("{HOME}/error/device/vbd/51712/error")).unwrap();
        assert_eq!(error, reason.as_bytes());
        // Shared info and grants.
        assert_eq!(rig.machine.pages_in_use(), 2);
    }
}

/// A disk whose backend is the test: it does `backend`, with the page of the ring, whenever the guest waits.
fn against(backend: impl FnMut(&Xen, u64) + Send + 'static) -> (Result<(), DiskError>, Result<(), DiskError>) {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    assert_eq!(rig.connect_by_hand(&mut tree, "8", "512"), ["xbf0 at xen0: disk, 0MB, 512 bytes/sector, 8 sectors"]);
    let page = rig.xen.map(rig.front(DISK, "ring-ref").parse().unwrap(), Access::Write).unwrap();
    let (xen, mut backend) = (Arc::clone(&rig.xen), backend);
    rig.machine.spawn(move || backend(&xen, page));
    let disk = only_disk(&tree);
    let begin = rig.machine.now();
    let first = disk.read(0, &mut [0; 512]);
    assert!(rig.machine.now() - begin <= 31 * SECOND);
    (first, disk.read(0, &mut [0; 512]))
}

/// Puts one response into the ring.
fn respond(xen: &Xen, page: u64, id: u64, operation: u8, status: i16) {
    let response = Response { id: id.into(), operation, pad: 0, status: status.cast_unsigned().into(), pad2: 0.into() };
    xen.memory().write_slice(response.as_bytes(), GuestAddress(page + 64)).unwrap();
    xen.memory().write_obj(1_u32, GuestAddress(page + RSP_PROD)).unwrap();
}

#[test]
fn responses_that_were_never_asked_for_end_the_disk() {
    for (id, operation) in [(2, op::READ), (0, op::READ), (u64::MAX, op::READ), (1, op::WRITE)] {
        let answers = against(move |xen, page| respond(xen, page, id, operation, 0));
        assert_eq!(answers, (Err(DiskError::Broken), Err(DiskError::Gone)), "{id} {operation}");
    }
}

#[test]
fn ring_index_that_lies_ends_the_disk() {
    for index in [2_u32, 33, u32::MAX, 1 << 31] {
        let answers = against(move |xen, page| xen.memory().write_obj(index, GuestAddress(page + RSP_PROD)).unwrap());
        assert_eq!(answers, (Err(DiskError::Broken), Err(DiskError::Gone)), "{index}");
    }
}

#[test]
fn backend_that_does_not_answer_is_waited_for_once() {
    assert_eq!(against(|_, _| ()), (Err(DiskError::Timeout), Err(DiskError::Gone)));
}

#[test]
fn failed_request_fails_alone() {
    for (status, error) in [(-1, DiskError::Failed), (-2, DiskError::Unsupported), (7, DiskError::Failed)] {
        let done = AtomicBool::new(false);
        let answers = against(move |xen, page| {
            if !done.swap(true, Ordering::Relaxed) {
                respond(xen, page, 1, op::READ, status);
            }
        });
        assert_eq!(answers, (Err(error), Err(DiskError::Timeout)), "the second was asked, and nobody answered");
    }
}

/// A disk of 64 sectors that the test is the backend of, with the page of its ring.
fn by_hand<'h>(rig: &'h Rig, tree: &mut Tree<'h>) -> (Arc<dyn BlockDevice + 'h>, u64) {
    rig.connect_by_hand(tree, "64", "512");
    (only_disk(tree), rig.xen.map(rig.front(DISK, "ring-ref").parse().unwrap(), Access::Write).unwrap())
}

/// Puts answers to reads into the ring, from the first slot on, and shows `shown` of them.
fn answer(xen: &Xen, page: u64, ids: &[u64], shown: u32) {
    for (slot, &id) in (0..).zip(ids) {
        let response = Response { id: id.into(), operation: op::READ, pad: 0, status: 0.into(), pad2: 0.into() };
        xen.memory().write_slice(response.as_bytes(), GuestAddress(page + SLOTS + slot * SLOT as u64)).unwrap();
    }
    xen.memory().write_obj(shown, GuestAddress(page + RSP_PROD)).unwrap();
}

const READ: Request<'_> = Request::Read { sector: 0, length: 512 };

#[test]
fn second_answer_to_a_request_ends_the_disk() {
    // In one look, and in two.
    for looks in [&[2][..], &[1, 2]] {
        let rig = Rig::new();
        let mut tree = Tree::attach(&rig.machine);
        let (disk, page) = by_hand(&rig, &mut tree);
        let [first, second] = [(); 2].map(|()| disk.begin(READ).unwrap().unwrap());
        let mut first = Some(first);
        for shown in looks {
            answer(&rig.xen, page, &[1, 1], *shown);
            first = first.and_then(|first| disk.end(first, &mut []).unwrap_or(None));
        }
        assert!(matches!(disk.end(second, &mut []), Err(DiskError::Broken | DiskError::Gone)));
        assert_eq!(disk.geometry(), None);
    }
}

#[test]
fn answers_in_any_order_belong_to_their_requests() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    let (disk, page) = by_hand(&rig, &mut tree);
    let [one, two, three] = [(); 3].map(|()| disk.begin(READ).unwrap().unwrap());
    answer(&rig.xen, page, &[3, 1], 2);
    assert!(disk.end(three, &mut []).unwrap().is_none() && disk.end(one, &mut []).unwrap().is_none());
    let two = disk.end(two, &mut []).unwrap().unwrap();
    answer(&rig.xen, page, &[3, 1, 2], 3);
    assert!(disk.end(two, &mut []).unwrap().is_none());
}

#[test]
fn ring_index_that_goes_back_ends_the_disk() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    let (disk, page) = by_hand(&rig, &mut tree);
    let ticket = disk.begin(READ).unwrap().unwrap();
    answer(&rig.xen, page, &[1], 1);
    assert!(disk.end(ticket, &mut []).unwrap().is_none());
    answer(&rig.xen, page, &[1], 0);
    assert!(matches!(disk.begin(READ), Err(DiskError::Broken)));
    assert!(matches!(disk.begin(READ), Err(DiskError::Gone)));
}

#[test]
fn sizes_that_change_are_followed_and_nonsense_ends_the_disk() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    let (disk, _) = by_hand(&rig, &mut tree);
    for (sectors, line) in
        [("4096", Some("xbf0 at xen0: disk, 2MB, 4096 sectors now")), ("4096", None), ("0", Some("xbf0 at xen0: disk, 0MB, 0 sectors now"))]
    {
        rig.back(DISK, "sectors", sectors);
        rig.back(DISK, "state", "4");
        assert_eq!(rig.lines(&mut tree), Vec::from_iter(line), "{sectors}");
    }
    assert!(matches!(disk.begin(READ), Err(DiskError::Range)));
    assert_eq!(rig.front(DISK, "state"), "4");
    rig.back(DISK, "sectors", "-1");
    rig.back(DISK, "state", "4");
    assert_eq!(rig.lines(&mut tree), ["xbf0 at xen0: the backend's sectors makes no sense"]);
    assert_eq!((disk.geometry(), rig.front(DISK, "state").as_str()), (None, "5"));
}

#[test]
fn offers_without_measure_are_taken_with_measure() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    rig.plug(DISK, &[]);
    for key in ["max-ring-page-order", "feature-max-indirect-segments"] {
        rig.back(DISK, key, "18446744073709551615");
    }
    rig.back(DISK, "state", "2");
    rig.poll(&mut tree);
    assert_eq!((rig.front(DISK, "ring-page-order").as_str(), rig.front(DISK, "ring-ref8").as_str()), ("3", ""));
    for (key, value) in [("sectors", "64"), ("sector-size", "512"), ("info", "0"), ("state", "4")] {
        rig.back(DISK, key, value);
    }
    rig.poll(&mut tree);
    assert_eq!(only_disk(&tree).geometry().unwrap().request_bytes, 32 * 4096);
}

#[test]
fn ring_of_the_other_tradition_is_counted_in_pages() {
    for (pages, order) in [("8", "3"), ("5", "2"), ("1", ""), ("0", "")] {
        let rig = Rig::new();
        let mut tree = Tree::attach(&rig.machine);
        rig.plug(DISK, &[]);
        rig.back(DISK, "max-ring-pages", pages);
        rig.back(DISK, "state", "2");
        rig.poll(&mut tree);
        assert_eq!(rig.front(DISK, "ring-page-order"), order, "{pages}");
    }
}

#[test]
fn pages_that_the_backend_keeps_mapped_come_back_when_it_lets_go() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    let (disk, page) = by_hand(&rig, &mut tree);
    assert_eq!(rig.front(DISK, "feature-persistent"), "1");
    let ticket = disk.begin(READ).unwrap().unwrap();
    // The grant of the first request's first segment.
    let data: u32 = rig.xen.memory().read_obj(GuestAddress(page + SLOTS + 24)).unwrap();
    rig.xen.map(data, Access::Write).unwrap();
    rig.unplug(DISK);
    rig.poll(&mut tree);
    assert!(matches!(disk.end(ticket, &mut []), Err(DiskError::Gone)));
    assert_eq!(rig.machine.pages_in_use(), 2 + 2, "the ring and the page of data");
    rig.xen.unmap(data, Access::Write);
    rig.poll(&mut tree);
    assert_eq!(rig.machine.pages_in_use(), 2 + 1, "the ring");
}

#[test]
fn noise_in_the_ring_ends_the_disk_at_worst() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    let mut noise = Noise(1);
    let mut ends = 0;
    for _ in 0..200 {
        let (disk, page) = by_hand(&rig, &mut tree);
        let mut tickets = Vec::new();
        for _ in 0..20 {
            noise.write(&rig.xen, page);
            tickets.extend(disk.begin(Request::Read { sector: 0, length: 512 * (1 + noise.below(64)) }).ok().flatten());
            if let Some(ticket) = tickets.pop() {
                tickets.extend(disk.end(ticket, &mut vec![0; noise.below(40000)]).ok().flatten());
            }
        }
        ends += u32::from(disk.geometry().is_none());
        rig.xen.unmap(rig.front(DISK, "ring-ref").parse().unwrap(), Access::Write);
        rig.unplug(DISK);
        rig.poll(&mut tree);
        assert_eq!(rig.machine.pages_in_use(), 2);
    }
    assert!((100..=200).contains(&ends), "{ends} disks have ended: the noise is not what it should be");
}
