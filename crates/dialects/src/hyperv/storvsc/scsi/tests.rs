//! Commands as guests send them, and as they should not.

use abi::hyperv::scsi::{FUA, Inquiry, mmc, mode, vpd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm::memory::GuestMemory;

use super::*;
use crate::disk::testing::{Asked, MemoryDisk};

const SECTORS: usize = 64;
/// Where the guest has its data.
const DATA: u64 = 0x1000;

struct Rig {
    memory: GuestMemory,
    disk: Arc<MemoryDisk>,
    unit: Unit,
}

/// Pads a command.
fn cdb(bytes: &[u8]) -> [u8; CDB_SIZE] {
    let mut all = [0; CDB_SIZE];
    all[..bytes.len()].copy_from_slice(bytes);
    all
}

fn code(outcome: Outcome) -> (u8, u16) {
    let sense = outcome.unwrap_err();
    assert_eq!((sense.response_code, sense.additional_length), (0x70, 10));
    (sense.key, sense.asc.get())
}

impl Rig {
    fn new(kind: Kind, disk: MemoryDisk) -> Rig {
        let disk = Arc::new(disk);
        let unit = Unit::new(disk.clone(), kind, 0x1122_3344_5566_7788);
        Rig { memory: vmm::memory::map(&[(0, 0x10_0000)]).unwrap(), disk, unit }
    }

    fn disk() -> Rig {
        Rig::new(Kind::Disk, MemoryDisk::new(SECTORS, false))
    }

    fn dvd() -> Rig {
        Rig::new(Kind::Dvd, MemoryDisk::new(SECTORS, false))
    }

    fn slices(&self, len: usize) -> [GuestSlice<'_>; 2] {
        let first = len / 3;
        [(DATA, first), (DATA + first as u64, len - first)].map(|(at, len)| self.memory.get_slice(GuestAddress(at), len).unwrap())
    }

    /// A command with room for `room` bytes: what it moved.
    fn ask(&self, bytes: &[u8], room: usize) -> Result<Vec<u8>, Sense> {
        let moved = self.unit.execute(&cdb(bytes), Data::ToGuest(&self.slices(room)))?;
        let mut answer = vec![0; moved as usize];
        self.memory.read_slice(&mut answer, GuestAddress(DATA)).unwrap();
        Ok(answer)
    }

    /// A command with data.
    fn give(&self, bytes: &[u8], data: &[u8]) -> Outcome {
        self.memory.write_slice(data, GuestAddress(DATA)).unwrap();
        self.unit.execute(&cdb(bytes), Data::FromGuest(&self.slices(data.len())))
    }

    fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.disk.asked.lock().unwrap())
    }
}

#[test]
fn disk_says_who_it_is() {
    let rig = Rig::disk();
    let answer = rig.ask(&[opcode::INQUIRY, 0, 0, 0, 36], 36).unwrap();
    assert_eq!((answer[0], answer[1], answer[2], answer[4]), (0, 0, 5, 31));
    assert_eq!(&answer[8..36], b"Msft    Virtual Disk    1.0 ");
    assert_eq!(rig.ask(&[opcode::INQUIRY, 0, 0, 0, 5], 36).unwrap().len(), 5, "no more than is asked for");
    assert_eq!(rig.ask(&[opcode::INQUIRY, 0, 0, 0, 255], 8).unwrap().len(), 8, "no more than there is room for");
    assert_eq!(Rig::dvd().ask(&[opcode::INQUIRY, 0, 0, 0, 36], 36).unwrap()[..2], [5, 0x80]);
}

#[test]
fn vital_product_data_is_there_page_by_page() {
    let rig = Rig::disk();
    let page = |page: u8| rig.ask(&[opcode::INQUIRY, Inquiry::EVPD, page, 0, 255], 255);
    let listed = page(vpd::SUPPORTED_PAGES).unwrap();
    for number in &listed[4..] {
        let answer = page(*number).unwrap();
        assert_eq!((answer[1], usize::from(answer[3])), (*number, answer.len() - 4));
    }
    assert_eq!(&page(vpd::SERIAL_NUMBER).unwrap()[4..], b"1122334455667788");
    let names = page(vpd::DEVICE_IDENTIFICATION).unwrap();
    assert_eq!(names[4..16], [1, 3, 0, 8, 0x31, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88]);
    assert_eq!(&names[16..28], b"\x02\x01\0\x18Msft    ");
    let limits = page(vpd::BLOCK_LIMITS).unwrap();
    assert_eq!((limits.len(), &limits[20..24]), (64, [0, 0x20, 0, 0].as_slice()), "blocks of an UNMAP");
    assert_eq!(page(vpd::LOGICAL_BLOCK_PROVISIONING).unwrap()[5], 0x80);
    assert_eq!(code(page(0xb3).map(|_| 0)), (5, 0x2400));
    let rig = Rig::new(Kind::Disk, MemoryDisk::new(SECTORS, true));
    let answer = rig.ask(&[opcode::INQUIRY, Inquiry::EVPD, vpd::LOGICAL_BLOCK_PROVISIONING, 0, 255], 255).unwrap();
    assert_eq!(answer[5], 0, "nothing is given back by a disk that is not written");
}

#[test]
fn capacity_is_told_in_both_forms() {
    let rig = Rig::disk();
    assert_eq!(rig.ask(&[opcode::READ_CAPACITY_10], 8).unwrap(), [0, 0, 0, 63, 0, 0, 2, 0]);
    let long = [opcode::SERVICE_ACTION_IN_16, READ_CAPACITY_16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32];
    let answer = rig.ask(&long, 32).unwrap();
    assert_eq!((answer[7], &answer[8..12], answer[14]), (63, [0, 0, 2, 0].as_slice(), 0x80));
    assert_eq!(Rig::dvd().ask(&[opcode::READ_CAPACITY_10], 8).unwrap(), [0, 0, 0, 15, 0, 0, 8, 0]);
    assert_eq!(code(rig.ask(&[opcode::SERVICE_ACTION_IN_16, 0x12], 32).map(|_| 0)), (5, 0x2000));
}

#[test]
fn reads_and_writes_of_every_form_reach_the_disk() {
    let rig = Rig::disk();
    let reads: [&[u8]; 4] = [
        &[opcode::READ_6, 0, 0, 5, 2],
        &[opcode::READ_10, 0, 0, 0, 0, 5, 0, 0, 2],
        &[opcode::READ_12, 0, 0, 0, 0, 5, 0, 0, 0, 2],
        &[opcode::READ_16, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 2],
    ];
    for read in reads {
        let bytes = rig.ask(read, 1024).unwrap();
        assert_eq!((bytes.len(), bytes[0], bytes[511], bytes[512]), (1024, 5, 5, 6));
    }
    let writes: [&[u8]; 4] = [
        &[opcode::WRITE_6, 0, 0, 10, 1],
        &[opcode::WRITE_10, 0, 0, 0, 0, 11, 0, 0, 1],
        &[opcode::WRITE_12, 0, 0, 0, 0, 12, 0, 0, 0, 1],
        &[opcode::WRITE_16, 0, 0, 0, 0, 0, 0, 0, 0, 13, 0, 0, 0, 1],
    ];
    for (number, write) in writes.iter().enumerate() {
        assert_eq!(rig.give(write, &[200 + number as u8; 512]), Ok(512));
    }
    let bytes = rig.disk.bytes.lock().unwrap().clone();
    assert_eq!([9, 10, 11, 12, 13, 14].map(|sector| bytes[sector * 512]), [9, 200, 201, 202, 203, 14]);
    assert_eq!(rig.asked(), []);
}

#[test]
fn data_that_is_not_the_commands_is_left_alone() {
    let rig = Rig::disk();
    assert_eq!(rig.ask(&[opcode::READ_10, 0, 0, 0, 0, 5, 0, 0, 1], 2048).unwrap().len(), 512, "more room than data");
    assert_eq!(rig.memory.read_obj::<u8>(GuestAddress(DATA + 512)).unwrap(), 0);
    assert_eq!(code(rig.ask(&[opcode::READ_10, 0, 0, 0, 0, 5, 0, 0, 2], 1023).map(|_| 0)), (5, 0x2400), "less room than data");
    assert_eq!(code(rig.give(&[opcode::READ_10, 0, 0, 0, 0, 5, 0, 0, 1], &[0; 512])), (5, 0x2400), "the wrong direction");
    assert_eq!(code(rig.unit.execute(&cdb(&[opcode::WRITE_10, 0, 0, 0, 0, 5, 0, 0, 1]), Data::None)), (5, 0x2400));
    assert_eq!(rig.give(&[opcode::WRITE_10, 0, 0, 0, 0, 5, 0, 0, 0], &[1; 512]), Ok(0), "no blocks");
    assert_eq!(rig.disk.bytes.lock().unwrap()[5 * 512], 5);
}

#[test]
fn blocks_that_are_not_there_are_out_of_range() {
    let rig = Rig::disk();
    let ranges: [&[u8]; 5] = [
        &[opcode::READ_10, 0, 0, 0, 0, 64, 0, 0, 1],
        &[opcode::READ_10, 0, 0, 0, 0, 63, 0, 0, 2],
        &[opcode::READ_16, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1],
        &[opcode::READ_6, 0, 0, 0, 0],
        &[opcode::VERIFY_10, 0, 0, 0, 0, 60, 0, 0, 5],
    ];
    for range in ranges {
        assert_eq!(code(rig.ask(range, 4096).map(|_| 0)), (5, 0x2100), "{range:?}");
    }
    assert_eq!(rig.ask(&[opcode::VERIFY_10, 0, 0, 0, 0, 60, 0, 0, 4], 0), Ok(vec![]));
    let compare = rig.give(&[opcode::VERIFY_10, 2, 0, 0, 0, 60, 0, 0, 1], &[60; 512]);
    assert_eq!(code(compare), (5, 0x2400), "which is not done, and not said to be");
}

#[test]
fn writes_become_durable_when_that_is_asked_for() {
    let rig = Rig::disk();
    for flush in [&[opcode::SYNCHRONIZE_CACHE_10] as &[u8], &[opcode::SYNCHRONIZE_CACHE_16], &[opcode::START_STOP_UNIT]] {
        assert_eq!(rig.unit.execute(&cdb(flush), Data::None), Ok(0));
        assert_eq!(rig.asked(), [Asked::Flush]);
    }
    rig.give(&[opcode::WRITE_10, FUA, 0, 0, 0, 0, 0, 0, 1], &[1; 512]).unwrap();
    assert_eq!(rig.asked(), [Asked::Flush]);
    let cache = rig.ask(&[opcode::MODE_SENSE_6, 0, mode::CACHING, 0, 192], 192).unwrap();
    assert_eq!((cache.len(), cache[2], cache[4], cache[6]), (24, 0x10, 8, 4), "FUA is known, there is a cache");
    let cache = rig.ask(&[opcode::MODE_SENSE_10, 0, 0x40 | mode::ALL, 0, 0, 0, 0, 0, 255], 255).unwrap();
    assert_eq!((cache.len(), cache[8], cache[10]), (28, 8, 0), "which cannot be changed");
    assert_eq!(code(rig.ask(&[opcode::MODE_SENSE_6, 0, 0xc0 | mode::ALL, 0, 192], 192).map(|_| 0)), (5, 0x3900));
}

#[test]
fn blocks_are_given_back() {
    let rig = Rig::disk();
    let list = |ranges: &[(u64, u32)]| {
        let mut bytes = vec![0, 6 + 16 * ranges.len() as u8, 0, 16 * ranges.len() as u8, 0, 0, 0, 0];
        for (block, count) in ranges {
            bytes.extend(block.to_be_bytes());
            bytes.extend(count.to_be_bytes());
            bytes.extend([0; 4]);
        }
        bytes
    };
    let unmap = |bytes: &[u8]| rig.give(&[opcode::UNMAP, 0, 0, 0, 0, 0, 0, 0, bytes.len() as u8], bytes);
    assert_eq!(unmap(&list(&[(8, 8), (32, 0), (40, 24)])), Ok(56));
    assert_eq!(rig.asked(), [Asked::Discard(4096, 4096), Asked::Discard(40 * 512, 24 * 512)]);
    assert_eq!(code(unmap(&list(&[(8, 8), (60, 5)]))), (5, 0x2100));
    assert_eq!(code(unmap(&list(&[(0, u32::MAX)]))), (5, 0x2600));
    assert_eq!(code(unmap(&[0, 22, 0, 16, 0, 0, 0, 0])), (5, 0x2600), "a list that is not there");
    assert_eq!(code(unmap(&[0, 0, 0])), (5, 0x2600));
    assert_eq!(unmap(&[]), Ok(0));
    assert_eq!(rig.asked(), [], "nothing of a list that is wrong");
}

#[test]
fn disk_that_is_not_to_be_written_is_not() {
    let rig = Rig::new(Kind::Disk, MemoryDisk::new(SECTORS, true));
    assert_eq!(code(rig.give(&[opcode::WRITE_10, 0, 0, 0, 0, 0, 0, 0, 1], &[1; 512])), (7, 0x2700));
    assert_eq!(code(rig.give(&[opcode::UNMAP, 0, 0, 0, 0, 0, 0, 0, 8], &[0; 8])), (7, 0x2700));
    assert_eq!(rig.ask(&[opcode::MODE_SENSE_6, 0, mode::ALL, 0, 4], 4).unwrap()[2], 0x90);
}

#[test]
fn failures_of_the_host_are_errors_of_the_medium() {
    let rig = Rig::new(Kind::Disk, MemoryDisk { is_broken: true, ..MemoryDisk::new(SECTORS, false) });
    assert_eq!(code(rig.ask(&[opcode::READ_10, 0, 0, 0, 0, 0, 0, 0, 1], 512).map(|_| 0)), (3, 0x1100));
    assert_eq!(code(rig.give(&[opcode::WRITE_10, 0, 0, 0, 0, 0, 0, 0, 1], &[1; 512])), (3, 0x0c00));
    assert_eq!(code(rig.unit.execute(&cdb(&[opcode::SYNCHRONIZE_CACHE_10]), Data::None)), (3, 0x0c00));
}

#[test]
fn dvd_has_one_track_and_cannot_be_written() {
    let rig = Rig::dvd();
    let block = rig.ask(&[opcode::READ_10, 0, 0, 0, 0, 2, 0, 0, 1], 2048).unwrap();
    assert_eq!((block[0], block[2047]), (8, 11));
    let toc = rig.ask(&[opcode::READ_TOC, 0, 0, 0, 0, 0, 1, 0, 255], 255).unwrap();
    assert_eq!(toc, [0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x14, 0xaa, 0, 0, 0, 0, 16]);
    let configuration = rig.ask(&[opcode::GET_CONFIGURATION, 0, 0, 0, 0, 0, 0, 0, 255], 255).unwrap();
    assert_eq!((configuration[7], &configuration[12..16]), (0x10, [0, 0x10, 1, 0].as_slice()));
    let capabilities = rig.ask(&[opcode::MODE_SENSE_10, 0, mode::CAPABILITIES, 0, 0, 0, 0, 0, 255], 255).unwrap();
    assert_eq!((capabilities.len(), &capabilities[8..15]), (30, [0x2a, 20, 8, 0, 0, 0, 0x20].as_slice()), "it reads, and has a tray");
    let event = rig.ask(&[opcode::GET_EVENT_STATUS, 1, 0, 0, 1 << mmc::EVENT_MEDIA, 0, 0, 0, 8], 8).unwrap();
    assert_eq!(event[5], mmc::MEDIA_PRESENT);
    assert_eq!(code(rig.give(&[opcode::WRITE_10, 0, 0, 0, 0, 0, 0, 0, 1], &[1; 2048])), (5, 0x2000));
    assert_eq!(code(rig.unit.execute(&cdb(&[opcode::START_STOP_UNIT, 0, 0, 0, 2]), Data::None)), (5, 0x5302));
}

#[test]
fn every_command_and_any_field_is_answered() {
    for kind in [Kind::Disk, Kind::Dvd] {
        let rig = Rig::new(kind, MemoryDisk::new(SECTORS, false));
        for opcode in 0..=255 {
            for fill in [0, 1, 0x3f, 0x7f, 0x80, 0xff] {
                let mut all = [fill; CDB_SIZE];
                all[0] = opcode;
                for data in [Data::None, Data::ToGuest(&rig.slices(512)), Data::FromGuest(&rig.slices(512))] {
                    let _ = rig.unit.execute(&all, data);
                }
            }
        }
        assert_eq!(rig.unit.execute(&cdb(&[opcode::TEST_UNIT_READY]), Data::None), Ok(0));
    }
}
