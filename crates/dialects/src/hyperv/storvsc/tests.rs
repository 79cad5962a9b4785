//! A driver that is none, honest and not, against the controller.

use abi::hyperv::scsi::{opcode, status as scsi_status};
use abi::hyperv::storvsc::{Properties, direction, srb_status, version};
use zerocopy::{FromBytes, FromZeros};

use super::scsi::{Kind as UnitKind, Unit};
use super::*;
use crate::disk::testing::{Asked, MemoryDisk};
use crate::hyperv::testing::{Driver, Front};
use crate::hyperv::vmbus::Attached;

const SECTORS: usize = 64;

struct Rig {
    driver: Driver,
    disk: Arc<MemoryDisk>,
    units: Arc<Units>,
    device: Attached<Storvsc>,
    front: Front,
}

fn unit(disk: &Arc<MemoryDisk>) -> Unit {
    Unit::new(disk.clone(), UnitKind::Disk, 1)
}

impl Rig {
    /// A channel that is open, and nothing said.
    fn open() -> Rig {
        let mut driver = Driver::new();
        let (disk, units) = (Arc::new(MemoryDisk::new(SECTORS, false)), Arc::new(Units::default()));
        units.add(|_| unit(&disk)).unwrap();
        let mut device = driver.guest.bus.attach(Storvsc::new(Guid::from_u128(7), units.clone()), Arc::new(|| {}));
        let relid = driver.guest.connect()[0].relid.get();
        let front = driver.open(relid);
        device.work();
        Rig { driver, disk, units, device, front }
    }

    fn ready() -> Rig {
        let mut rig = Rig::open();
        for (operation, body) in [
            (operation::BEGIN_INITIALIZATION, 0),
            (operation::QUERY_PROTOCOL_VERSION, version::V6_2),
            (operation::QUERY_PROPERTIES, 0),
            (operation::END_INITIALIZATION, 0),
        ] {
            assert_eq!(rig.say(operation, body).status.get(), status::SUCCESS);
        }
        rig
    }

    /// An operation with a number: its answer.
    fn say(&mut self, operation: u32, number: u16) -> Words {
        let mut words = words(operation, 0);
        words.body[..2].copy_from_slice(&number.to_le_bytes());
        self.front.in_band(5, words.as_bytes());
        self.device.work();
        self.answer(5)
    }

    fn answer(&mut self, transaction: u64) -> Words {
        let packet = self.front.receive().expect("an answer");
        assert_eq!((packet.kind, packet.transaction), (abi::hyperv::ring::kind::COMPLETION, transaction));
        let words = Words::read_from_bytes(&packet.payload).unwrap();
        assert_eq!(words.operation.get(), operation::COMPLETE_IO);
        words
    }

    /// A command with data at these places.
    fn execute(&mut self, srb: &Srb, ranges: &[(u64, u32)]) -> Srb {
        let mut words = words(operation::EXECUTE_SRB, 0);
        words.body = zerocopy::transmute!(*srb);
        if ranges.is_empty() {
            self.front.in_band(9, words.as_bytes());
        } else {
            self.front.direct(9, ranges, words.as_bytes());
        }
        self.device.work();
        let answer = self.answer(9);
        assert_eq!(answer.status.get(), status::SUCCESS);
        zerocopy::transmute!(answer.body)
    }
}

fn srb(cdb: &[u8], data_in: u8, length: u32) -> Srb {
    let mut srb = Srb { cdb_length: cdb.len() as u8, sense_length: 20, data_in, transfer_length: length.into(), ..Srb::new_zeroed() };
    srb.payload[..cdb.len()].copy_from_slice(cdb);
    srb
}

/// A read or write of `count` sectors from `first`.
fn transfer(operation: u8, first: u8, count: u8) -> Srb {
    let data_in = if operation == opcode::READ_10 { direction::READ } else { direction::WRITE };
    srb(&[operation, 0, 0, 0, 0, first, 0, 0, count, 0], data_in, u32::from(count) * 512)
}

#[test]
fn driver_and_controller_agree_on_a_version() {
    let mut rig = Rig::open();
    assert_eq!(rig.say(operation::BEGIN_INITIALIZATION, 0).status.get(), status::SUCCESS);
    for version in [0x0603, 0x0100, u16::MAX] {
        assert_eq!(rig.say(operation::QUERY_PROTOCOL_VERSION, version).status.get(), status::REVISION_MISMATCH);
    }
    for version in version::ALL {
        assert_eq!(rig.say(operation::QUERY_PROTOCOL_VERSION, version).status.get(), status::SUCCESS);
    }
    let properties = rig.say(operation::QUERY_PROPERTIES, 0);
    let (properties, _) = Properties::read_from_prefix(&properties.body).unwrap();
    assert_eq!((properties.max_subchannels.get(), properties.flags.get(), properties.max_transfer_bytes.get()), (4, 1, 1 << 20));
}

#[test]
fn what_comes_out_of_turn_is_refused() {
    let mut rig = Rig::open();
    for operation in [3, 4, 8, 9, 10, 13] {
        assert_eq!(rig.say(operation, 1).status.get(), status::INVALID_DEVICE_STATE, "{operation}");
    }
    let mut rig = Rig::ready();
    for operation in [0, 1, 2, 11, 12, 14, u32::MAX] {
        assert_eq!(rig.say(operation, 1).status.get(), status::INVALID_DEVICE_REQUEST, "{operation}");
    }
    for operation in [4, 5, 6, 7] {
        assert_eq!(rig.say(operation, 0).status.get(), status::SUCCESS, "{operation}");
    }
}

#[test]
fn data_moves_between_pages_and_disk() {
    let mut rig = Rig::ready();
    let page = rig.driver.pages(2);
    let answer = rig.execute(&transfer(opcode::READ_10, 3, 2), &[(page + 0xf00, 1024)]);
    assert_eq!((answer.srb_status, answer.scsi_status, answer.transfer_length.get()), (srb_status::SUCCESS, scsi_status::GOOD, 1024));
    assert_eq!(rig.driver.read(page + 0xeff, 1026), [[0].as_slice(), &[3; 512], &[4; 512], &[0]].concat());
    rig.driver.write(page, &[9; 512]);
    let answer = rig.execute(&transfer(opcode::WRITE_10, 63, 1), &[(page, 256), (page + 256, 256)]);
    assert_eq!(answer.transfer_length.get(), 512);
    assert_eq!(rig.disk.bytes.lock().unwrap()[62 * 512..][510..514], [62, 62, 9, 9]);
    let answer = rig.execute(&srb(&[opcode::SYNCHRONIZE_CACHE_10, 0, 0, 0, 0, 0, 0, 0, 0, 0], direction::NONE, 0), &[]);
    assert_eq!(answer.srb_status, srb_status::SUCCESS);
    assert_eq!(*rig.disk.asked.lock().unwrap(), [Asked::Flush]);
}

#[test]
fn command_that_fails_is_answered_with_sense_data() {
    let mut rig = Rig::ready();
    let page = rig.driver.pages(1);
    let answer = rig.execute(&transfer(opcode::READ_10, 64, 1), &[(page, 512)]);
    assert_eq!((answer.srb_status, answer.scsi_status), (srb_status::ERROR | srb_status::AUTOSENSE_VALID, scsi_status::CHECK_CONDITION));
    assert_eq!((answer.sense_length, answer.payload[2], answer.payload[12], answer.transfer_length.get()), (18, 5, 0x21, 0));
    let answer = rig.execute(&Srb { sense_length: 0, ..transfer(opcode::READ_10, 64, 1) }, &[(page, 512)]);
    assert_eq!((answer.srb_status & 0x3f, answer.sense_length), (srb_status::ERROR, 0));
}

/// Linux takes these failures for success, and looks at the data.
#[test]
fn what_a_unit_does_not_tell_of_itself_is_zeroes() {
    let mut rig = Rig::ready();
    let page = rig.driver.pages(1);
    let questions: [&[u8]; 3] = [
        &[opcode::INQUIRY, 1, 0xb3, 0, 16, 0],
        &[opcode::MODE_SENSE_6, 0, 5, 0, 16, 0],
        &[opcode::MODE_SENSE_10, 0, 5, 0, 0, 0, 0, 0, 16, 0],
    ];
    for question in questions {
        rig.driver.write(page, &[9; 20]);
        let answer = rig.execute(&srb(question, direction::READ, 20), &[(page, 20)]);
        assert_eq!((answer.srb_status & 0x3f, answer.payload[2]), (srb_status::ERROR, 5));
        assert_eq!(rig.driver.read(page, 20), [[0; 16].as_slice(), &[9; 4]].concat(), "{question:?}");
    }
}

#[test]
fn units_that_are_not_there_say_so() {
    let mut rig = Rig::ready();
    let page = rig.driver.pages(1);
    let inquiry = srb(&[opcode::INQUIRY, 0, 0, 0, 36, 0], direction::READ, 36);
    let luns = srb(&[opcode::REPORT_LUNS, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], direction::READ, 256);
    for (path, target, lun) in [(0, 0, 1), (0, 1, 0), (1, 0, 0)] {
        let answer = rig.execute(&Srb { path, target, lun, ..inquiry }, &[(page, 36)]);
        assert_eq!((answer.srb_status, rig.driver.read(page, 1)), (srb_status::SUCCESS, vec![0x7f]));
        let answer = rig.execute(&Srb { path, target, lun, ..transfer(opcode::READ_10, 0, 1) }, &[(page, 512)]);
        assert_eq!(answer.srb_status & 0x3f, srb_status::INVALID_LUN);
        let expected = if (path, target) == (0, 0) { 16 } else { 8 };
        assert_eq!(rig.execute(&Srb { path, target, lun, ..luns }, &[(page, 256)]).transfer_length.get(), expected);
    }
}

#[test]
fn pages_that_are_no_memory_fail_their_command_only() {
    let mut rig = Rig::ready();
    let page = rig.driver.pages(1);
    for ranges in [[(1 << 40, 512)].as_slice(), &[(page, 256), (!0xfff, 256)], &[((64 << 20) - 256, 512)]] {
        let answer = rig.execute(&transfer(opcode::READ_10, 0, 1), ranges);
        assert_eq!((answer.srb_status, answer.transfer_length.get()), (srb_status::INVALID_REQUEST, 0));
    }
    let answer = rig.execute(&transfer(opcode::READ_10, 0, 8), &[(page, 512)]);
    assert_eq!(answer.srb_status & 0x3f, srb_status::ERROR, "fewer pages than it says");
    let answer = rig.execute(&Srb { cdb_length: 21, ..transfer(opcode::READ_10, 0, 1) }, &[(page, 512)]);
    assert_eq!(answer.srb_status, srb_status::INVALID_REQUEST);
    assert_eq!(rig.execute(&transfer(opcode::READ_10, 1, 1), &[(page, 512)]).srb_status, srb_status::SUCCESS);
}

#[test]
fn answers_are_as_long_as_the_guests_packets() {
    let mut rig = Rig::ready();
    for (length, expected) in [(12, 48), (48, 48), (64, 64), (72, 64)] {
        let mut bytes = words(operation::RESET_BUS, 0).as_bytes().to_vec();
        bytes.resize(length, 0);
        rig.front.in_band(1, &bytes);
        rig.device.work();
        assert_eq!(rig.front.receive().unwrap().payload.len(), expected);
    }
}

#[test]
fn disks_come_and_go_while_the_guest_runs() {
    let mut rig = Rig::ready();
    rig.device.work();
    assert!(rig.front.receive().is_none());
    let lun = rig.units.add(|_| unit(&rig.disk)).unwrap();
    rig.device.work();
    let packet = rig.front.receive().unwrap();
    let (words, _) = Words::read_from_prefix(&packet.payload).unwrap();
    assert_eq!((packet.kind, packet.transaction, words.operation.get()), (abi::hyperv::ring::kind::IN_BAND, 0, operation::ENUMERATE_BUS));
    let page = rig.driver.pages(1);
    let read = Srb { lun, ..transfer(opcode::READ_10, 7, 1) };
    assert_eq!(rig.execute(&read, &[(page, 512)]).srb_status, srb_status::SUCCESS);
    assert!(rig.units.remove(lun) && !rig.units.remove(lun));
    rig.device.work();
    assert!(rig.front.receive().is_some());
    assert_eq!(rig.execute(&read, &[(page, 512)]).srb_status & 0x3f, srb_status::INVALID_LUN);
    (1..64).for_each(|_| assert!(rig.units.add(|_| unit(&rig.disk)).is_ok()));
    assert_eq!(rig.units.add(|_| unit(&rig.disk)), Err(Full));
}

#[test]
fn several_channels_are_served() {
    let mut rig = Rig::ready();
    assert_eq!(rig.say(operation::CREATE_SUB_CHANNELS, 0).status.get(), status::INVALID_PARAMETER);
    assert_eq!(rig.say(operation::CREATE_SUB_CHANNELS, 5).status.get(), status::INVALID_PARAMETER);
    assert_eq!(rig.say(operation::CREATE_SUB_CHANNELS, 2).status.get(), status::SUCCESS);
    let offers = rig.driver.offers();
    assert_eq!(offers.iter().map(|(_, index)| *index).collect::<Vec<_>>(), [1, 2]);
    let mut second = rig.driver.open(offers[1].0);
    rig.device.work();
    std::mem::swap(&mut rig.front, &mut second);
    let page = rig.driver.pages(1);
    assert_eq!(rig.execute(&transfer(opcode::READ_10, 7, 1), &[(page, 512)]).srb_status, srb_status::SUCCESS);
    rig.driver.close(&rig.front);
    rig.device.work();
    std::mem::swap(&mut rig.front, &mut second);
    assert_eq!(rig.execute(&transfer(opcode::READ_10, 7, 1), &[(page, 512)]).srb_status, srb_status::SUCCESS);
}

#[test]
fn guest_that_reads_no_answers_is_waited_for() {
    let mut rig = Rig::ready();
    // More answers than the ring to the guest has room for.
    for _ in 0..3 {
        for _ in 0..2 {
            (0..100).for_each(|_| rig.front.in_band(1, words(operation::RESET_BUS, 0).as_bytes()));
            while rig.device.work().more {}
        }
        let mut answers = 0;
        while rig.front.receive().is_some() {
            answers += 1;
            while rig.device.work().more {}
        }
        assert_eq!(answers, 200);
    }
}

#[test]
fn ring_that_lies_ends_the_channel_and_not_the_device() {
    let mut rig = Rig::ready();
    rig.front.lie(0x3003);
    rig.device.work();
    rig.driver.close(&rig.front);
    rig.device.work();
    rig.front = rig.driver.open(rig.front.relid());
    rig.device.work();
    assert_eq!(rig.say(operation::BEGIN_INITIALIZATION, 0).status.get(), status::SUCCESS);
}

proptest::proptest! {
    #[test]
    fn every_packet_is_answered(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..100), operation in 0u32..16, is_direct: bool) {
        let mut rig = Rig::ready();
        let page = rig.driver.pages(2);
        let mut bytes = bytes;
        if let Some(first) = bytes.first_chunk_mut() {
            *first = operation.to_le_bytes();
        }
        if is_direct {
            rig.front.direct(1, &[(page + 1, 6000)], &bytes);
        } else {
            rig.front.in_band(1, &bytes);
        }
        rig.device.work();
        assert_eq!(rig.front.receive().map(|packet| packet.transaction), Some(1));
    }
}
