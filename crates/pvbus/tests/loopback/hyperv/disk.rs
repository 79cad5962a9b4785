//! hvs against the host's SCSI controllers.

use std::sync::Arc;

use abi::hyperv::vmbus::Guid;
use dialects::disk::testing::{Asked, MemoryDisk};
use dialects::hyperv::storvsc::scsi::{Kind, Unit};
use dialects::hyperv::storvsc::{Storvsc, Units};
use pvbus::block::{BlockDevice, DiskError, Geometry, Request};
use pvbus::{Hal, Tree};

use super::Rig;

const SECTORS: usize = 1024;
const INSTANCE: Guid = Guid::from_u128(0x1234);

impl Rig {
    /// A controller with these disks.
    fn controller(&self, disks: &[&Arc<MemoryDisk>]) -> Arc<Units> {
        let units = Arc::<Units>::default();
        for disk in disks {
            add(&units, disk);
        }
        self.plug(Storvsc::new(INSTANCE, Arc::clone(&units)));
        units
    }
}

fn add(units: &Units, disk: &Arc<MemoryDisk>) -> u8 {
    units.add(|lun| Unit::new(Arc::clone(disk) as _, Kind::Disk, lun.into())).unwrap()
}

fn disk(read_only: bool) -> Arc<MemoryDisk> {
    Arc::new(MemoryDisk::new(SECTORS, read_only))
}

fn only_disk<'h>(tree: &Tree<'h>) -> Arc<dyn BlockDevice + 'h> {
    let disks = tree.disks();
    assert_eq!(disks.len(), 1);
    disks.into_iter().next().unwrap()
}

#[test]
fn controller_and_disk_attach_with_openbsds_lines() {
    let rig = Rig::new();
    rig.controller(&[&disk(false)]);
    let mut tree = Tree::attach(&rig.machine);
    let lines = rig.lines(&mut tree);
    assert_eq!(lines[0], "hvs0 at hyperv0 channel 1: scsi, protocol 6.2");
    assert!(lines[1].starts_with("sd0 at hvs0 targ 0 lun 0: <Msft, "), "{}", lines[1]);
    assert_eq!(lines[2], "sd0: 0MB, 512 bytes/sector, 1024 sectors, thin");
    assert_eq!(lines.len(), 3);
}

#[test]
fn data_of_any_length_moves_both_ways() {
    let rig = Rig::new();
    let host = disk(false);
    rig.controller(&[&host]);
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let disk = only_disk(&tree);
    let geometry =
        Geometry { sectors: 1024, sector_size: 512, is_read_only: false, has_flush: true, has_discard: true, request_bytes: 65536 };
    assert_eq!((disk.name(), disk.geometry()), ("sd0", Some(geometry)));
    for (sector, sectors) in [(0, 1), (7, 9), (3, 128), (5, 300), (0, 1024)] {
        let mut bytes = vec![0; sectors * 512];
        disk.read(sector as u64, &mut bytes).unwrap();
        assert_eq!(bytes, host.bytes.lock().unwrap()[sector * 512..][..sectors * 512], "{sector} {sectors}");
    }
    let new: Vec<u8> = (0..300 * 512).map(|at| (at % 251) as u8).collect();
    disk.write(20, &new).unwrap();
    assert_eq!(host.bytes.lock().unwrap()[20 * 512..][..new.len()], new);
    assert_eq!(host.bytes.lock().unwrap()[19 * 512..20 * 512], [19; 512]);
    disk.flush().unwrap();
    disk.discard(8, 16).unwrap();
    assert_eq!(*host.asked.lock().unwrap(), [Asked::Flush, Asked::Discard(4096, 8192)]);
}

#[test]
fn requests_that_the_disk_cannot_do_are_refused() {
    let rig = Rig::new();
    rig.controller(&[&disk(true)]);
    let mut tree = Tree::attach(&rig.machine);
    assert_eq!(rig.lines(&mut tree)[2], "sd0: 0MB, 512 bytes/sector, 1024 sectors, readonly");
    let disk = only_disk(&tree);
    assert_eq!(disk.write(0, &[0; 512]), Err(DiskError::ReadOnly));
    assert_eq!(disk.discard(0, 1), Err(DiskError::ReadOnly));
    for (sector, length) in [(1024, 512), (1023, 1024), (u64::MAX, 512), (0, 511), (0, 513)] {
        assert_eq!(disk.read(sector, &mut vec![0; length]), Err(DiskError::Range), "{sector} {length}");
    }
    assert_eq!(disk.read(1024, &mut []), Ok(()));
}

#[test]
fn failing_command_fails_alone() {
    let rig = Rig::new();
    let broken = MemoryDisk { is_broken: true, ..MemoryDisk::new(SECTORS, false) };
    rig.controller(&[&Arc::new(broken)]);
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let disk = only_disk(&tree);
    assert_eq!(disk.read(0, &mut [0; 512]), Err(DiskError::Failed));
    assert_eq!(disk.write(0, &[0; 512]), Err(DiskError::Failed));
    assert!(disk.geometry().is_some());
    assert_eq!(rig.lines(&mut tree), [""; 0]);
}

#[test]
fn disks_come_and_go_at_a_controller_that_stays() {
    let rig = Rig::new();
    let units = rig.controller(&[&disk(false)]);
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let first = only_disk(&tree);
    let lun = add(&units, &disk(true));
    assert_eq!(rig.lines(&mut tree)[1], "sd1: 0MB, 512 bytes/sector, 1024 sectors, readonly");
    assert_eq!(tree.disks().len(), 2);
    assert!(units.remove(lun) && units.remove(0));
    assert_eq!(rig.lines(&mut tree), ["sd0 detached", "sd1 detached"]);
    // Another one in its place is another one.
    add(&units, &disk(false));
    rig.poll(&mut tree);
    assert_eq!(only_disk(&tree).name(), "sd2");
    assert_eq!(first.read(0, &mut [0; 512]), Err(DiskError::Gone));
}

#[test]
fn controllers_come_and_go_while_the_machine_runs_and_leave_nothing() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let in_use = rig.machine.pages_in_use();
    for round in 0..3 {
        rig.controller(&[&disk(false)]);
        assert_eq!(rig.lines(&mut tree).len(), 3);
        let disk = only_disk(&tree);
        disk.read(0, &mut [0; 512]).unwrap();
        rig.machine.end_latest_thread();
        assert_eq!(rig.lines(&mut tree), [format!("hvs{round} detached"), format!("sd{round} detached")]);
        assert!(tree.disks().is_empty());
        assert_eq!(disk.read(0, &mut [0; 512]), Err(DiskError::Gone));
        assert_eq!(rig.machine.pages_in_use(), in_use, "round {round}");
    }
}

#[test]
fn many_requests_are_under_way_at_once() {
    let rig = Rig::new();
    rig.controller(&[&disk(false)]);
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let disk = only_disk(&tree);
    rig.machine.pause_others(true);
    let mut tickets = Vec::new();
    while let Some(ticket) = disk.begin(Request::Read { sector: tickets.len() as u64, length: 512 }).unwrap() {
        tickets.push(ticket);
    }
    assert_eq!(tickets.len(), 16);
    rig.machine.pause_others(false);
    rig.machine.wait_until(rig.machine.now() + 1);
    for (at, ticket) in tickets.into_iter().enumerate().rev() {
        let mut bytes = [0xff; 512];
        assert!(disk.end(ticket, &mut bytes).unwrap().is_none());
        assert_eq!(bytes, [at as u8; 512]);
    }
}
