use std::sync::{Arc, Mutex};

use abi::virtio::block::*;
use abi::virtio::pci::common;
use abi::virtio::{feature, status};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::driver::{Driver, INDIRECT, NEXT, WRITE, queue_base};
use super::*;
use crate::block::Disk;

/// A disk in memory that notes what is done to it.
struct Ram {
    data: Mutex<Vec<u8>>,
    log: Mutex<Vec<String>>,
    read_only: bool,
}

impl Ram {
    fn new(sectors: usize) -> Arc<Ram> {
        Ram::with(sectors, false)
    }

    fn with(sectors: usize, read_only: bool) -> Arc<Ram> {
        let data = (0..sectors * 512).map(|at| (at / 512) as u8).collect();
        Arc::new(Ram { data: Mutex::new(data), log: Mutex::default(), read_only })
    }

    fn note(&self, text: String) {
        self.log.lock().unwrap().push(text);
    }

    fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }
}

impl Disk for Ram {
    fn size(&self) -> u64 {
        self.data.lock().unwrap().len() as u64
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn read_at(&self, offset: u64, data: &mut [u8]) -> std::io::Result<()> {
        data.copy_from_slice(&self.data.lock().unwrap()[offset as usize..][..data.len()]);
        Ok(())
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        if offset == 7 * 512 {
            return Err(std::io::Error::other("sector 7 is bad"));
        }
        self.note(format!("write {offset} {}", data.len()));
        self.data.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }
    fn flush(&self) -> std::io::Result<()> {
        self.note("flush".into());
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.note(format!("discard {offset} {len}"));
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> std::io::Result<()> {
        self.note(format!("zero {offset} {len} {may_unmap}"));
        Ok(())
    }
}

fn start(disk: &Arc<Ram>, without: u64) -> Driver {
    Driver::start(Box::new(Block::new(disk.clone(), "the-disk")), without)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// A request with everything in one piece each; returns status and data.
fn request(driver: &mut Driver, kind: u32, sector: u64, out: &[u8], room: usize) -> (u8, Vec<u8>, u32) {
    let head = driver.buffer(&header(kind, sector));
    let data = driver.buffer(out);
    let into = driver.buffer(&vec![0xee; room]);
    let state = driver.buffer(&[0xff]);
    let mut readable = vec![(head, 16)];
    if !out.is_empty() {
        readable.push((data, out.len() as u32));
    }
    let mut writable = Vec::new();
    if room > 0 {
        writable.push((into, room as u32));
    }
    writable.push((state, 1));
    let chain = driver.add(0, &readable, &writable);
    driver.tell(0);
    let (used, len) = driver.wait(0);
    assert_eq!(used, chain);
    (driver.bytes(state, 1)[0], driver.bytes(into, room), len)
}

#[test]
fn what_is_written_is_read_back() {
    let disk = Ram::new(64);
    let mut driver = start(&disk, 0);
    assert_eq!(request(&mut driver, T_OUT, 3, &[9; 1024], 0).0, S_OK);
    let (state, data, len) = request(&mut driver, T_IN, 2, &[], 2048);
    assert_eq!((state, len), (S_OK, 2049));
    assert_eq!(data, [vec![2; 512], vec![9; 1024], vec![5; 512]].concat());
}

#[test]
fn header_data_and_status_may_be_cut_anywhere() {
    let disk = Ram::new(64);
    let mut driver = start(&disk, 0);
    let bytes = driver.buffer(&[header(T_OUT, 1), vec![4; 512]].concat());
    let state = driver.buffer(&[0xff]);
    driver.add(0, &[(bytes, 1), (bytes + 1, 17), (bytes + 18, 510)], &[(state, 1)]);
    let bytes = driver.buffer(&header(T_IN, 1));
    let room = driver.room(513);
    driver.add(0, &[(bytes, 16)], &[(room, 500), (room + 500, 13)]);
    driver.kick(0);
    driver.wait(0);
    assert_eq!(driver.wait(0).1, 513);
    assert_eq!(driver.bytes(state, 1), [S_OK]);
    assert_eq!(driver.bytes(room, 513), [vec![4; 512], vec![S_OK]].concat());
}

#[test]
fn indirect_tables_work() {
    let disk = Ram::new(64);
    let mut driver = start(&disk, 0);
    let table = driver.room(48);
    let (head, room) = (driver.buffer(&header(T_IN, 5)), driver.room(513));
    driver.set_descriptor_at(table, head, 16, NEXT, 1);
    driver.set_descriptor_at(table + 16, room, 512, NEXT | WRITE, 2);
    driver.set_descriptor_at(table + 32, room + 512, 1, WRITE, 0);
    driver.set_descriptor(0, 7, table, 48, INDIRECT, 0);
    driver.offer(0, 7);
    driver.kick(0);
    assert_eq!(driver.wait(0), (7, 513));
    assert_eq!(driver.bytes(room, 512), [5; 512]);
}

#[test]
fn a_hundred_requests_at_once_are_all_answered() {
    let disk = Ram::new(64);
    let mut driver = start(&disk, 0);
    for round in 0..10 {
        driver.arm(0);
        for sector in 0..20u64 {
            let (head, room) = (driver.buffer(&header(T_IN, sector + round)), driver.room(513));
            driver.add(0, &[(head, 16)], &[(room, 513)]);
            driver.tell(0);
        }
        for _ in 0..20 {
            assert_eq!(driver.wait(0).1, 513);
        }
    }
    let interrupts = driver.counter.messages.lock().unwrap().len();
    assert!((1..=200).contains(&interrupts), "{interrupts}");
}

#[test]
fn event_idx_keeps_unwanted_interrupts_away() {
    let disk = Ram::new(64);
    let mut driver = start(&disk, 0);
    // used_event stays 0: only the first answer is of interest.
    for _ in 0..8 {
        request(&mut driver, T_IN, 0, &[], 512);
    }
    assert_eq!(driver.counter.messages.lock().unwrap().len(), 1);
}

#[test]
fn a_driver_without_event_idx_can_forbid_interrupts() {
    let disk = Ram::new(64);
    let mut driver = start(&disk, feature::EVENT_IDX);
    driver.memory.write_obj(1u16, GuestAddress(queue_base(0) + 0x8000)).unwrap();
    request(&mut driver, T_IN, 0, &[], 512);
    request(&mut driver, T_IN, 0, &[], 512);
    assert_eq!(driver.counter.messages.lock().unwrap().len(), 0);
    driver.memory.write_obj(0u16, GuestAddress(queue_base(0) + 0x8000)).unwrap();
    request(&mut driver, T_IN, 0, &[], 512);
    driver.wait_until(|driver| driver.counter.messages.lock().unwrap().len() == 1);
}

#[test]
fn flush_comes_after_the_writes_before_it() {
    let disk = Ram::new(64);
    let mut driver = start(&disk, 0);
    request(&mut driver, T_OUT, 0, &[1; 512], 0);
    request(&mut driver, T_OUT, 1, &[1; 512], 0);
    assert_eq!(request(&mut driver, T_FLUSH, 0, &[], 0).0, S_OK);
    assert_eq!(disk.log(), ["write 0 512", "write 512 512", "flush"]);
}

#[test]
fn without_the_flush_feature_each_write_is_durable() {
    let disk = Ram::new(64);
    let mut driver = start(&disk, F_FLUSH);
    request(&mut driver, T_OUT, 0, &[1; 512], 0);
    assert_eq!(disk.log(), ["write 0 512", "flush"]);
}

#[test]
fn the_id_is_told() {
    let mut driver = start(&Ram::new(1), 0);
    let (state, id, len) = request(&mut driver, T_GET_ID, 0, &[], 20);
    assert_eq!((state, &id[..9], len), (S_OK, &b"the-disk\0"[..], 21));
}

#[test]
fn discard_and_write_zeroes_reach_the_disk() {
    let disk = Ram::new(64);
    let mut driver = start(&disk, 0);
    let range = |sector: u64, count: u32, flags: u32| [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat();
    assert_eq!(request(&mut driver, T_DISCARD, 0, &[range(8, 8, 0), range(32, 16, 0)].concat(), 0).0, S_OK);
    assert_eq!(request(&mut driver, T_WRITE_ZEROES, 0, &range(1, 2, 1), 0).0, S_OK);
    assert_eq!(request(&mut driver, T_WRITE_ZEROES, 0, &range(1, 2, 0), 0).0, S_OK);
    assert_eq!(disk.log(), ["discard 4096 4096", "discard 16384 8192", "zero 512 1024 true", "zero 512 1024 false"]);
    // Bad ones change nothing, not even their first range.
    assert_eq!(request(&mut driver, T_DISCARD, 0, &[range(0, 8, 0), range(60, 8, 0)].concat(), 0).0, S_IOERR);
    assert_eq!(request(&mut driver, T_DISCARD, 0, &range(0, 8, 1), 0).0, S_UNSUPP);
    assert_eq!(request(&mut driver, T_WRITE_ZEROES, 0, &range(0, 8, 2), 0).0, S_UNSUPP);
    assert_eq!(request(&mut driver, T_WRITE_ZEROES, 0, &range(u64::MAX, 1, 0), 0).0, S_IOERR);
    assert_eq!(request(&mut driver, T_DISCARD, 0, &range(0, u32::MAX, 0), 0).0, S_IOERR);
    assert_eq!(request(&mut driver, T_DISCARD, 0, &[0; 15], 0).0, S_IOERR);
    assert_eq!(request(&mut driver, T_DISCARD, 0, &[], 0).0, S_IOERR);
    assert_eq!(request(&mut driver, T_DISCARD, 0, &range(0, 1, 0).repeat(17), 0).0, S_IOERR);
    assert_eq!(disk.log().len(), 4);
}

#[test]
fn positions_and_lengths_outside_of_the_disk_are_errors() {
    let disk = Ram::new(8);
    let mut driver = start(&disk, 0);
    for (kind, sector, out, room) in [
        (T_IN, 8, 0, 512),
        (T_IN, 7, 0, 1024),
        (T_IN, u64::MAX, 0, 512),
        (T_IN, 1 << 55, 0, 512),
        (T_IN, 0, 0, 511),
        (T_IN, 0, 0, 100),
        (T_OUT, 8, 512, 0),
        (T_OUT, 0, 5000 / 512 * 512, 0),
        (T_OUT, 0, 300, 0),
    ] {
        assert_eq!(request(&mut driver, kind, sector, &vec![1; out], room).0, S_IOERR, "{kind} {sector} {out} {room}");
    }
    assert!(disk.log().is_empty());
    assert_eq!(request(&mut driver, T_IN, 0, &[], 512).0, S_OK);
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut driver = start(&Ram::new(8), 0);
    for kind in [2, 3, 5, 14, 99, u32::MAX] {
        assert_eq!(request(&mut driver, kind, 0, &[], 0).0, S_UNSUPP);
    }
}

#[test]
fn errors_of_the_host_reach_the_guest() {
    let mut driver = start(&Ram::new(64), 0);
    assert_eq!(request(&mut driver, T_OUT, 7, &[0; 512], 0).0, S_IOERR);
    assert_eq!(request(&mut driver, T_OUT, 6, &[0; 512], 0).0, S_OK);
}

#[test]
fn a_read_only_disk_is_never_written() {
    let disk = Ram::with(64, true);
    let mut driver = start(&disk, 0);
    assert!(driver.features & F_RO != 0 && driver.features & (F_DISCARD | F_WRITE_ZEROES) == 0);
    assert_eq!(request(&mut driver, T_OUT, 0, &[1; 512], 0).0, S_IOERR);
    assert_eq!(request(&mut driver, T_DISCARD, 0, &[0; 16], 0).0, S_IOERR);
    assert_eq!(request(&mut driver, T_IN, 4, &[], 512).1, [4; 512]);
    assert!(disk.log().is_empty());
}

#[test]
fn buffers_outside_of_memory_are_errors() {
    let mut driver = start(&Ram::new(64), 0);
    for address in [16 << 20, (16 << 20) - 100, 1 << 40, u64::MAX - 511, u64::MAX] {
        let (head, state) = (driver.buffer(&header(T_IN, 0)), driver.buffer(&[0xff]));
        driver.add(0, &[(head, 16)], &[(address, 512), (state, 1)]);
        driver.kick(0);
        driver.wait(0);
        assert_eq!(driver.bytes(state, 1), [S_IOERR], "{address:#x}");
    }
    assert_eq!(request(&mut driver, T_IN, 4, &[], 512).1, [4; 512]);
}

#[test]
fn requests_without_header_or_status_hurt_nobody() {
    let mut driver = start(&Ram::new(64), 0);
    let head = driver.buffer(&header(T_IN, 0));
    let state = driver.buffer(&[0xff]);
    // No status, status out of memory, no header, short header, empty pieces.
    driver.add(0, &[(head, 16)], &[]);
    driver.add(0, &[(head, 16)], &[(1 << 50, 1)]);
    driver.add(0, &[], &[(state, 1)]);
    driver.add(0, &[(head, 15)], &[(state, 1)]);
    driver.add(0, &[(head, 0), (head, 16)], &[(head, 0), (state, 0)]);
    driver.kick(0);
    assert_eq!([0; 5].map(|_| driver.wait(0).1), [0, 0, 1, 1, 0]);
    assert_eq!(request(&mut driver, T_IN, 4, &[], 512).1, [4; 512]);
}

fn breaks(prepare: impl FnOnce(&mut Driver)) {
    let mut driver = start(&Ram::new(64), 0);
    prepare(&mut driver);
    driver.kick(0);
    driver.wait_broken();
    // The configuration vector was not set: the status alone tells. A reset makes all good.
    driver.negotiate(0);
    driver.set_up_queue(0, 64);
    driver.set_status(0xf);
    assert_eq!(driver.status(), 0xf);
    assert_eq!(request(&mut driver, T_IN, 4, &[], 512).1, [4; 512]);
}

#[test]
fn a_descriptor_loop_needs_a_reset() {
    breaks(|driver| {
        driver.set_descriptor(0, 0, 0x1000, 16, NEXT, 1);
        driver.set_descriptor(0, 1, 0x1000, 16, NEXT, 0);
        driver.offer(0, 0);
    });
}

#[test]
fn a_chain_that_leaves_its_table_needs_a_reset() {
    breaks(|driver| {
        driver.set_descriptor(0, 0, 0x1000, 16, NEXT, 64);
        driver.offer(0, 0);
    });
    breaks(|driver| driver.offer(0, 64));
    breaks(|driver| driver.offer(0, 0xffff));
}

#[test]
fn readable_after_writable_needs_a_reset() {
    breaks(|driver| {
        driver.set_descriptor(0, 0, 0x1000, 16, NEXT | WRITE, 1);
        driver.set_descriptor(0, 1, 0x1000, 16, 0, 0);
        driver.offer(0, 0);
    });
}

#[test]
fn an_available_index_that_ran_ahead_needs_a_reset() {
    breaks(|driver| driver.set_available(0, 65));
    breaks(|driver| driver.set_available(0, 0x8000));
    breaks(|driver| driver.set_available(0, 0xffff));
}

#[test]
fn bad_indirect_tables_need_a_reset() {
    for (address, len) in [(0x1000, 0), (0x1000, 17), (0x1000, 16 * 0x10000), (1 << 45, 32), (u64::MAX - 15, 32)] {
        breaks(|driver| {
            driver.set_descriptor(0, 0, address, len, INDIRECT, 0);
            driver.offer(0, 0);
        });
    }
    // A table in a table.
    breaks(|driver| {
        let table = driver.room(16);
        driver.set_descriptor_at(table, table, 16, INDIRECT, 0);
        driver.set_descriptor(0, 0, table, 16, INDIRECT, 0);
        driver.offer(0, 0);
    });
}

#[test]
fn a_chain_of_more_than_four_gigabytes_needs_a_reset() {
    breaks(|driver| {
        for index in 0..8 {
            driver.set_descriptor(0, index, 0, 0xffff_ffff, WRITE | if index < 7 { NEXT } else { 0 }, index + 1);
        }
        driver.offer(0, 0);
    });
}

#[test]
fn rings_outside_of_memory_need_a_reset() {
    for register in [common::QUEUE_DESC, common::QUEUE_DRIVER, common::QUEUE_DEVICE] {
        for address in [1u64 << 40, (16 << 20) - 16, u64::MAX - 15] {
            let disk = Ram::new(8);
            let mut driver = Driver::cold(Box::new(Block::new(disk, "")));
            driver.negotiate(0);
            driver.write(common::QUEUE_SELECT, 2, 0);
            driver.write(common::QUEUE_DESC, 8, 0x10000);
            driver.write(common::QUEUE_DRIVER, 8, 0x20000);
            driver.write(common::QUEUE_DEVICE, 8, 0x30000);
            driver.write(register, 8, address);
            driver.write(common::QUEUE_ENABLE, 2, 1);
            driver.set_status(0xf);
            assert_eq!(driver.status(), 0xf | status::DEVICE_NEEDS_RESET);
            driver.kick(0);
            driver.set_status(0);
            assert_eq!(driver.status(), 0);
        }
    }
}

#[test]
fn queue_registers_are_fixed_while_the_device_runs() {
    let disk = Ram::new(64);
    let mut driver = start(&disk, 0);
    let before: Vec<u8> = {
        let mut bytes = vec![0; common::SIZE as usize];
        driver.registers.read_common(0, &mut bytes);
        bytes
    };
    for (register, len, value) in [
        (common::QUEUE_SIZE, 2, 256u64),
        (common::QUEUE_SIZE, 2, 0xffff),
        (common::QUEUE_MSIX_VECTOR, 2, 0),
        (common::QUEUE_ENABLE, 2, 0),
        (common::QUEUE_ENABLE, 2, 1),
        (common::QUEUE_DESC, 8, 0xdead_0000),
        (common::QUEUE_DESC, 4, 0xdead_0000),
        (common::QUEUE_DRIVER, 8, 0xdead_0000),
        (common::QUEUE_DRIVER + 4, 4, 7),
        (common::QUEUE_DEVICE, 8, 0xdead_0000),
        (common::DRIVER_FEATURE, 4, 0),
        (common::DEVICE_STATUS, 1, 0xb),
        (common::DEVICE_STATUS, 1, 0x3),
        (common::NUM_QUEUES, 2, 9),
    ] {
        driver.write(register, len, value);
    }
    let mut after = vec![0; common::SIZE as usize];
    driver.registers.read_common(0, &mut after);
    assert_eq!(before, after);
    assert_eq!(request(&mut driver, T_IN, 4, &[], 512).1, [4; 512]);
}

#[test]
fn queue_sizes_are_powers_of_two_up_to_the_largest() {
    let mut driver = Driver::cold(Box::new(Block::new(Ram::new(8), "")));
    driver.negotiate(0);
    for (size, kept) in [(128, 128), (0, 128), (100, 128), (512, 128), (0x8000, 128), (1, 1), (256, 256)] {
        driver.write(common::QUEUE_SIZE, 2, size);
        assert_eq!(driver.read(common::QUEUE_SIZE, 2), kept);
    }
    driver.write(common::QUEUE_SELECT, 2, 1);
    assert_eq!(driver.read(common::QUEUE_SIZE, 2), 0);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for extra in [1u64 << 40, F_RO, 1 << 33] {
        let mut driver = Driver::cold(Box::new(Block::new(Ram::new(8), "")));
        driver.set_status(3);
        let offered = driver.offered();
        for (select, value) in [(0, (offered | extra) & 0xffff_ffff), (1, (offered | extra) >> 32)] {
            driver.write(common::DRIVER_FEATURE_SELECT, 4, select);
            driver.write(common::DRIVER_FEATURE, 4, value);
        }
        driver.set_status(0xb);
        assert_eq!(driver.status(), 3);
    }
    // A legacy driver, which does not know VERSION_1.
    let mut driver = Driver::cold(Box::new(Block::new(Ram::new(8), "")));
    driver.set_status(0xb);
    assert_eq!(driver.status(), 3);
}

#[test]
fn notifications_to_a_device_that_does_not_run_are_ignored() {
    let mut driver = Driver::cold(Box::new(Block::new(Ram::new(8), "")));
    driver.kick(0);
    driver.negotiate(0);
    driver.kick(0);
    driver.kick(9);
    driver.set_status(0xf);
    driver.kick(0);
    assert_eq!(driver.status(), 0xf);
}

#[test]
fn a_running_disk_moves_to_another_machine() {
    let disk = Ram::new(64);
    let mut driver = start(&disk, 0);
    request(&mut driver, T_OUT, 3, &[9; 512], 0);
    let state = serde_json::to_string(&driver.registers.state()).unwrap();
    // It goes on here.
    assert_eq!(request(&mut driver, T_IN, 3, &[], 512).1, [9; 512]);
    let state: super::super::registers::RegistersState = serde_json::from_str(&state).unwrap();
    let mut other = Driver::cold_in(Box::new(Block::new(disk.clone(), "")), driver.memory.clone());
    // The state is from before the last request: it is done again, as after any snapshot.
    other.registers.restore(&state).unwrap();
    assert_eq!(other.status(), 0xf);
    let mut wrong = Driver::cold(Box::new(super::super::rng::Rng::new(Box::new(super::super::rng::HostEntropy))));
    assert!(wrong.registers.restore(&state).unwrap_err().contains("another type"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is on the rings and in the registers, the device stands, and works again after a reset.
    #[test]
    fn garbage_never_takes_the_device_down(
        rings in proptest::collection::vec((0u64..0x1_0000, any::<u64>()), 0..60),
        descriptors in proptest::collection::vec((0u16..64, any::<u32>(), 0u32..0x2000, 0u16..8, 0u16..70), 0..60),
        registers in proptest::collection::vec((0u64..0x40, 0usize..5, any::<u64>()), 0..30),
        available in any::<u16>(),
    ) {
        let mut driver = start(&Ram::new(64), 0);
        for (offset, value) in rings {
            driver.memory.write_obj(value, GuestAddress(queue_base(0) + offset)).unwrap();
        }
        for (index, address, len, flags, next) in descriptors {
            driver.set_descriptor(0, index, u64::from(address) & 0x1ff_ffff, len, flags, next);
        }
        driver.set_available(0, available % 65);
        driver.kick(0);
        for (offset, width, value) in registers {
            driver.write(offset, [1, 2, 4, 8, 3][width], value);
            driver.kick(0);
        }
        driver.negotiate(0);
        driver.set_up_queue(0, 64);
        driver.set_status(0xf);
        prop_assert_eq!(request(&mut driver, T_IN, 4, &[], 512).0, S_OK);
    }
}
