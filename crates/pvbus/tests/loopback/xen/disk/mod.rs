//! xbf against Blkback: what a disk is like, and how it comes and goes. Many requests at once are in `queue.rs`, backends that lie in `lies.rs`.

mod lies;
mod queue;

use std::sync::Arc;

use dialects::disk::testing::{Asked, MemoryDisk};
use dialects::xen::block::Blkback;
use dialects::xen::xenbus::{Backend, ConnectError, Driver, Frontend};
use pvbus::Tree;
use pvbus::block::{BlockDevice, DiskError, Geometry};

use super::{HostKeys, Place, Rig};

const DISK: Place = Place { front: "/local/domain/1/device/vbd/51712", back: "/local/domain/0/backend/vbd/1/51712" };
const SECTORS: usize = 256;

/// A backend that offers less than ours can do.
struct Limited {
    blkback: Blkback,
    /// Offers that are not made.
    hidden: &'static [&'static str],
}

impl Driver for Limited {
    fn offers(&self) -> Vec<(&'static str, String)> {
        let mut offers = self.blkback.offers();
        offers.retain(|(name, _)| !self.hidden.contains(name));
        offers
    }
    fn connect(&mut self, frontend: &Frontend<'_>) -> Result<Vec<(&'static str, String)>, ConnectError> {
        let mut keys = self.blkback.connect(frontend)?;
        keys.retain(|(name, _)| !self.hidden.contains(name));
        Ok(keys)
    }
    fn disconnect(&mut self) {
        self.blkback.disconnect();
    }
}

impl Rig {
    /// A disk with its backend at work.
    fn disk(&self, disk: MemoryDisk) -> Arc<MemoryDisk> {
        self.limited_disk(disk, &[])
    }

    /// The same, with a backend that does not offer everything.
    fn limited_disk(&self, disk: MemoryDisk, hidden: &'static [&'static str]) -> Arc<MemoryDisk> {
        let disk = Arc::new(disk);
        self.plug(DISK, &[]);
        let (xen, host) = (Arc::clone(&self.xen), self.store.host());
        let driver = Limited { blkback: Blkback::new(xen, disk.clone(), Arc::new(|| {})).keeping_grants(true), hidden };
        let mut backend = Backend::new(driver, Arc::new(HostKeys(self.store.host())), DISK.back.into(), DISK.front.into());
        self.machine.spawn(move || {
            if host.exists(DISK.back).unwrap() {
                backend.frontend_changed();
                backend.driver().blkback.work().unwrap();
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
    let host = rig.disk(MemoryDisk::new(SECTORS, false));
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
    disk.discard(16, 8).unwrap();
    assert_eq!(*host.asked.lock().unwrap(), [Asked::Flush, Asked::Discard(16 * 512, 8 * 512)]);
}

#[test]
fn requests_that_the_disk_cannot_do_are_refused() {
    let rig = Rig::new();
    rig.disk(MemoryDisk::new(SECTORS, true));
    let mut tree = Tree::attach(&rig.machine);
    assert_eq!(rig.lines(&mut tree), ["xbf0 at xen0: disk, 0MB, 512 bytes/sector, 256 sectors, read-only"]);
    let disk = only_disk(&tree);
    assert_eq!(disk.write(0, &[0; 512]), Err(DiskError::ReadOnly));
    assert_eq!(disk.discard(0, 8), Err(DiskError::ReadOnly));
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
        rig.disk(MemoryDisk::new(SECTORS, false));
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
    rig.disk(MemoryDisk::new(SECTORS, false));
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
fn pages_of_data_stay_mapped_between_requests_and_until_the_backend_goes() {
    let rig = Rig::new();
    let host = rig.disk(MemoryDisk::new(SECTORS, false));
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let disk = only_disk(&tree);
    for round in 1..4 {
        disk.write(0, &[round; 20 * 4096]).unwrap();
        let mut bytes = [0; 20 * 4096];
        disk.read(0, &mut bytes).unwrap();
        assert!(bytes.iter().chain(&host.bytes.lock().unwrap()[..bytes.len()]).all(|byte| *byte == round));
    }
    rig.unplug(DISK);
    rig.poll(&mut tree);
    assert_eq!(rig.machine.pages_in_use(), 2 + 8 + 21, "this backend does not look, and still has the ring, the data and its segments");
    rig.machine.end_latest_thread();
    rig.poll(&mut tree);
    assert_eq!(rig.machine.pages_in_use(), 2);
}
