//! xbf against Blkback, and against backends that lie.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use abi::xen::io::blkif::{Response, op};
use abi::xen::io::ring::RSP_PROD;
use dialects::disk::{Disk as HostDisk, GuestSlice};
use dialects::xen::block::Blkback;
use dialects::xen::xenbus::Backend;
use dialects::xen::{Access, Xen};
use pvbus::block::{BlockDevice, DiskError, Geometry};
use pvbus::{Hal, Tree};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use super::{HOME, HostKeys, Place, Rig, SECOND};

const DISK: Place = Place { front: "/local/domain/1/device/vbd/51712", back: "/local/domain/0/backend/vbd/1/51712" };
const SECTORS: usize = 256;

/// A disk in memory, and how often it was flushed.
#[derive(Clone)]
struct Memory {
    bytes: Arc<Mutex<Vec<u8>>>,
    flushed: Arc<Mutex<u32>>,
    read_only: bool,
}

impl HostDisk for Memory {
    fn size(&self) -> u64 {
        SECTORS as u64 * 512
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn read(&self, offset: u64, slices: &[GuestSlice<'_>]) -> std::io::Result<()> {
        let bytes = self.bytes.lock().unwrap();
        let mut at = offset as usize;
        for slice in slices {
            slice.copy_from(&bytes[at..at + slice.len()]);
            at += slice.len();
        }
        Ok(())
    }
    fn write(&self, offset: u64, slices: &[GuestSlice<'_>]) -> std::io::Result<()> {
        let mut bytes = self.bytes.lock().unwrap();
        let mut at = offset as usize;
        for slice in slices {
            slice.copy_to(&mut bytes[at..at + slice.len()]);
            at += slice.len();
        }
        Ok(())
    }
    fn flush(&self) -> std::io::Result<()> {
        *self.flushed.lock().unwrap() += 1;
        Ok(())
    }
    fn discard(&self, _offset: u64, _len: u64) -> std::io::Result<()> {
        Ok(())
    }
}

impl Rig {
    /// A disk with its backend at work.
    fn disk(&self, read_only: bool) -> Memory {
        let bytes = (0..SECTORS * 512).map(|at| (at / 512) as u8).collect();
        let disk = Memory { bytes: Arc::new(Mutex::new(bytes)), flushed: Arc::default(), read_only };
        self.plug(DISK, &[]);
        let (xen, host) = (Arc::clone(&self.xen), self.store.host());
        let driver = Blkback::new(xen, Arc::new(disk.clone()), Arc::new(|| {}));
        let mut backend = Backend::new(driver, Arc::new(HostKeys(self.store.host())), DISK.back.into(), DISK.front.into());
        self.machine.spawn(move || {
            if host.exists(DISK.back).unwrap() {
                backend.frontend_changed();
                backend.driver().work().unwrap();
            }
        });
        disk
    }

    /// What a backend tells that connects.
    fn connect_by_hand(&self, tree: &mut Tree<'_>, sectors: &str, sector_size: &str) -> Vec<String> {
        self.plug(DISK, &[]);
        self.back(DISK, "state", "2");
        self.poll(tree);
        for (key, value) in [("sectors", sectors), ("sector-size", sector_size), ("info", "0"), ("state", "4")] {
            self.back(DISK, key, value);
        }
        self.lines(tree)
    }
}

fn only_disk<'h>(tree: &Tree<'h>) -> Arc<dyn BlockDevice + 'h> {
    let disks = tree.disks();
    assert_eq!(disks.len(), 1);
    disks.into_iter().next().unwrap()
}

#[test]
fn disk_connects_and_moves_data_of_any_length() {
    let rig = Rig::new();
    let host = rig.disk(false);
    let mut tree = Tree::attach(&rig.machine);
    assert_eq!(rig.lines(&mut tree), ["xbf0 at xen0: disk, 0MB, 512 bytes/sector, 256 sectors"]);
    let disk = only_disk(&tree);
    let geometry =
        Geometry { sectors: 256, sector_size: 512, is_read_only: false, has_flush: true, has_discard: true, request_bytes: 32 * 4096 };
    assert_eq!((disk.name(), disk.geometry()), ("xbf0", Some(geometry)));
    for (sector, sectors) in [(0, 1), (7, 9), (3, 88), (5, 100), (0, 256)] {
        let mut bytes = vec![0; sectors * 512];
        disk.read(sector as u64, &mut bytes).unwrap();
        assert_eq!(bytes, host.bytes.lock().unwrap()[sector * 512..][..sectors * 512], "{sector} {sectors}");
    }
    let new: Vec<u8> = (0..100 * 512).map(|at| (at % 251) as u8).collect();
    disk.write(20, &new).unwrap();
    assert_eq!(host.bytes.lock().unwrap()[20 * 512..][..new.len()], new);
    assert_eq!(host.bytes.lock().unwrap()[19 * 512..20 * 512], [19; 512]);
    disk.flush().unwrap();
    assert_eq!(*host.flushed.lock().unwrap(), 1);
}

#[test]
fn requests_that_the_disk_cannot_do_are_refused() {
    let rig = Rig::new();
    rig.disk(true);
    let mut tree = Tree::attach(&rig.machine);
    assert_eq!(rig.lines(&mut tree), ["xbf0 at xen0: disk, 0MB, 512 bytes/sector, 256 sectors, read-only"]);
    let disk = only_disk(&tree);
    assert_eq!(disk.write(0, &[0; 512]), Err(DiskError::ReadOnly));
    for (sector, length) in [(256, 512), (255, 1024), (u64::MAX, 512), (0, 511), (0, 513)] {
        assert_eq!(disk.read(sector, &mut vec![0; length]), Err(DiskError::Range), "{sector} {length}");
    }
    assert_eq!(disk.read(256, &mut []), Ok(()));
}

#[test]
fn disks_come_and_go_while_the_machine_runs_and_leave_nothing() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    for round in 0..3 {
        rig.disk(false);
        assert_eq!(rig.lines(&mut tree), [format!("xbf{round} at xen0: disk, 0MB, 512 bytes/sector, 256 sectors")]);
        let disk = only_disk(&tree);
        rig.unplug(DISK);
        assert_eq!(rig.lines(&mut tree), [format!("xbf{round} detached")]);
        assert!(tree.disks().is_empty());
        assert_eq!(disk.read(0, &mut [0; 512]), Err(DiskError::Gone));
        assert_eq!(disk.flush(), Err(DiskError::Gone));
        // Besides the shared info and the frame of grants, the ring: this backend does not look, and still has it in use.
        assert_eq!(rig.machine.pages_in_use(), 2 + 8);
        rig.machine.end_latest_thread();
        rig.poll(&mut tree);
        assert_eq!(rig.machine.pages_in_use(), 2, "given back as soon as nobody uses it");
    }
}

#[test]
fn backend_that_closes_ends_the_disk_and_gets_its_pages_back() {
    let rig = Rig::new();
    rig.disk(false);
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    only_disk(&tree).read(0, &mut [0; 20 * 4096]).unwrap();
    assert_eq!(rig.machine.pages_in_use(), 2 + 8 + 21, "the ring, the data and its segments");
    rig.machine.end_latest_thread();
    rig.back(DISK, "state", "5");
    assert_eq!(rig.lines(&mut tree), ["xbf0 at xen0: its backend closes"]);
    assert_eq!(rig.front(DISK, "state"), "6");
    assert_eq!(rig.machine.pages_in_use(), 2);
    rig.back(DISK, "state", "2");
    assert_eq!(rig.poll(&mut tree), [], "a device that comes again is a new one");
}

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
