//! Many requests at once.

use abi::xen::io::ring::REQ_PROD;
use dialects::disk::testing::MemoryDisk;
use dialects::xen::Access;
use pvbus::Tree;
use pvbus::block::{BlockDevice, DiskError, Request, Ticket};
use vm_memory::{Bytes, GuestAddress};

use super::super::Rig;
use super::{DISK, only_disk};

/// 4 MiB.
const SECTORS: usize = 8192;
/// Offers of a backend that has rings of several pages and indirect segments.
const ALL: &[&str] = &["max-ring-page-order", "feature-max-indirect-segments"];
const PAGE: usize = 4096;

/// Begins requests for a page each until there is no room.
fn begin_all(disk: &dyn BlockDevice) -> Vec<Ticket> {
    let begin = |page: u64| disk.begin(Request::Read { sector: page * 8, length: PAGE }).unwrap();
    (0..1000).map_while(begin).collect()
}

/// What something costs.
#[derive(Debug, PartialEq, Eq)]
struct Cost {
    /// How often the guest waits.
    waits: u64,
    /// How often it calls the hypervisor.
    hypercalls: u64,
    /// How many requests the backend has to answer.
    requests: u32,
}

/// What `work` costs with a backend that hides `hidden`.
fn cost(hidden: &'static [&'static str], work: impl Fn(&dyn BlockDevice)) -> Cost {
    let rig = Rig::new();
    rig.limited_disk(MemoryDisk::new(SECTORS, false), hidden);
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let disk = only_disk(&tree);
    let ring_ref = ["ring-ref", "ring-ref0"].iter().find_map(|key| rig.front(DISK, key).parse().ok()).unwrap();
    let ring = rig.xen.map(ring_ref, Access::Read).unwrap();
    let now = || {
        let requests: u32 = rig.xen.memory().read_obj(GuestAddress(ring + REQ_PROD)).unwrap();
        (rig.machine.waits(), rig.machine.hypercalls(), requests)
    };
    let before = now();
    work(&*disk);
    let after = now();
    Cost { waits: after.0 - before.0, hypercalls: after.1 - before.1, requests: after.2 - before.2 }
}

#[test]
fn requests_are_ended_in_any_order_and_their_data_is_their_own() {
    let rig = Rig::new();
    rig.disk(MemoryDisk::new(SECTORS, false));
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let disk = only_disk(&tree);
    let mut tickets: Vec<_> = (0..).zip(begin_all(&*disk)).collect();
    assert_eq!(tickets.len(), 256, "one for each slot");
    rig.machine.let_others_run();
    tickets.reverse();
    tickets.rotate_left(77);
    for (page, ticket) in tickets {
        let mut bytes = [0; PAGE];
        assert!(disk.end(ticket, &mut bytes).unwrap().is_none());
        let wanted: Vec<u8> = (0..PAGE).map(|at| (page * 8 + at / 512) as u8).collect();
        assert_eq!(bytes[..], wanted, "{page}");
    }
}

#[test]
fn request_that_is_under_way_is_not_ended() {
    let rig = Rig::new();
    rig.disk(MemoryDisk::new(SECTORS, false));
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let disk = only_disk(&tree);
    let ticket = disk.begin(Request::Write { sector: 8, bytes: &[7; PAGE] }).unwrap().unwrap();
    let ticket = disk.end(ticket, &mut []).unwrap().unwrap();
    disk.pause();
    assert!(disk.end(ticket, &mut []).unwrap().is_none());
    for request in [
        Request::Read { sector: 0, length: 33 * PAGE },
        Request::Read { sector: 0, length: 0 },
        Request::Write { sector: SECTORS as u64, bytes: &[0; 512] },
        Request::Discard { sector: 1, sectors: u64::MAX },
    ] {
        assert!(matches!(disk.begin(request), Err(DiskError::Range)), "{request:?}");
    }
}

#[test]
fn long_transfer_goes_on_while_others_have_all_pages() {
    let rig = Rig::new();
    rig.disk(MemoryDisk::new(SECTORS, false));
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let disk = only_disk(&tree);
    let tickets = begin_all(&*disk);
    disk.pause();
    for ticket in tickets.into_iter().skip(1) {
        assert!(disk.end(ticket, &mut []).unwrap().is_none());
    }
    let mut bytes = vec![0; SECTORS * 512];
    disk.read(0, &mut bytes).unwrap();
    assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == (at / 512) as u8));
}

/// The numbers of `docs/pvbus.md`.
#[test]
fn rings_of_several_pages_and_indirect_segments_pay() {
    let long = |disk: &dyn BlockDevice| disk.read(0, &mut vec![0; 1 << 20]).unwrap();
    let many = |disk: &dyn BlockDevice| {
        let mut begun = 0;
        while begun < 512 {
            let tickets = begin_all(disk);
            begun += tickets.len();
            for mut ticket in tickets {
                while let Some(open) = disk.end(ticket, &mut [0; PAGE]).unwrap() {
                    ticket = open;
                    disk.pause();
                }
            }
        }
    };
    let costs = |work: &dyn Fn(&dyn BlockDevice)| [ALL, &ALL[1..], &[]].map(|hidden| cost(hidden, work));
    let cost = |waits, hypercalls, requests| Cost { waits, hypercalls, requests };
    // With a ring of one page, of eight, and with indirect segments.
    assert_eq!(costs(&long), [cost(1, 1, 24), cost(1, 1, 24), cost(1, 1, 8)]);
    assert_eq!(costs(&many), [cost(16, 16, 512), cost(2, 2, 512), cost(2, 2, 512)]);
}
