//! xbf against backends that lie.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use abi::xen::io::blkif::{Response, op};
use abi::xen::io::ring::RSP_PROD;
use dialects::xen::{Access, Xen};
use pvbus::block::DiskError;
use pvbus::{Hal, Tree};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use super::super::{HOME, Rig, SECOND};
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
