use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use abi::virtio::feature;
use abi::virtio::net::*;
use abi::virtio::pci::common;
use frames::{MAX_PACKET, Offloads};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::driver::{Driver, NEXT, WRITE, queue_base};
use super::*;
use crate::net::{Mac, NetBackend, Passt, Tap};

const RX: u16 = 0;
const TX: u16 = 1;
const CONTROL: u16 = 2;

/// A network of datagrams: header and frame in each.
struct Wire {
    socket: UnixDatagram,
    offloads: Arc<Mutex<Offloads>>,
}

impl NetBackend for Wire {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
    fn send(&mut self, packet: &[u8]) -> io::Result<()> {
        self.socket.send(packet).map(drop)
    }
    fn receive(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        match self.socket.recv(packet) {
            Ok(0) => Err(io::Error::other("the other end is gone")),
            Ok(len) => Ok(Some(len)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
    fn set_guest_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        *self.offloads.lock().unwrap() = offloads;
        Ok(())
    }
}

fn wire() -> (Box<Wire>, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    (Box::new(Wire { socket: ours, offloads: Arc::default() }), theirs)
}

fn start(without: u64) -> (Driver, UnixDatagram) {
    let (network, other) = wire();
    (Driver::start(Box::new(Net::new(network, Mac([2, 0, 0, 0, 0, 1]))), without), other)
}

fn packet(len: usize, byte: u8) -> Vec<u8> {
    [vec![0; HEADER_BYTES], vec![byte; len]].concat()
}

fn receive(other: &UnixDatagram) -> Vec<u8> {
    let mut room = vec![0; MAX_PACKET];
    let len = other.recv(&mut room).unwrap();
    room.truncate(len);
    room
}

fn send(driver: &mut Driver, packet: &[u8]) {
    let at = driver.buffer(packet);
    driver.add(TX, &[(at, packet.len() as u32)], &[]);
    driver.tell(TX);
}

fn offer(driver: &mut Driver, len: usize) -> u64 {
    let room = driver.room(len);
    driver.add(RX, &[], &[(room, len as u32)]);
    driver.tell(RX);
    room
}

fn link_is_up(driver: &Driver) -> bool {
    let mut status = [0; 2];
    driver.registers.read_config(6, &mut status);
    status == [1, 0]
}

#[test]
fn frames_of_the_guest_reach_the_network() {
    let (mut driver, other) = start(0);
    let whole = packet(1514, 7);
    let at = driver.buffer(&whole);
    // Header and frame may be cut anywhere.
    driver.add(TX, &[(at, 5), (at + 5, 100), (at + 105, 1421)], &[]);
    driver.kick(TX);
    assert_eq!(receive(&other), whole);
    assert_eq!(driver.wait(TX).1, 0);
    send(&mut driver, &packet(60, 8));
    assert_eq!(receive(&other), packet(60, 8));
}

#[test]
fn received_frames_come_with_a_header() {
    let (mut driver, other) = start(0);
    let room = offer(&mut driver, 2048);
    other.send(&packet(100, 3)).unwrap();
    assert_eq!(driver.wait(RX).1, 112);
    let mut want = packet(100, 3);
    want[10] = 1;
    assert_eq!(driver.bytes(room, 112), want);
    assert!(driver.counter.messages.lock().unwrap().contains(&1));
}

#[test]
fn no_notification_is_lost_in_either_direction() {
    for without in [0, feature::EVENT_IDX] {
        let (mut driver, other) = start(without);
        let room = driver.room(2048);
        for round in 0..2000u32 {
            let len = 60 + round as usize % 1000;
            // The frame is there before its buffer, or the other way round.
            if round % 3 == 0 {
                other.send(&packet(len, 1)).unwrap();
            }
            driver.add(RX, &[], &[(room, 2048)]);
            driver.tell(RX);
            if round % 3 != 0 {
                other.send(&packet(len, 1)).unwrap();
            }
            assert_eq!(driver.wait(RX).1 as usize, HEADER_BYTES + len);
            driver.add(TX, &[(room, (HEADER_BYTES + len) as u32)], &[]);
            driver.tell(TX);
            assert_eq!(receive(&other).len(), HEADER_BYTES + len);
            driver.wait(TX);
        }
    }
}

#[test]
fn large_frames_are_spread_over_buffers() {
    let (mut driver, other) = start(0);
    let rooms: Vec<u64> = (0..5).map(|_| offer(&mut driver, 1000)).collect();
    let bytes: Vec<u8> = packet(0, 0).into_iter().chain((0..3500).map(|at| at as u8)).collect();
    other.send(&bytes).unwrap();
    let lengths = [0; 4].map(|_| driver.wait(RX).1);
    assert_eq!(lengths, [1000, 1000, 1000, 512]);
    let got: Vec<u8> = rooms[..4].iter().zip(lengths).flat_map(|(room, len)| driver.bytes(*room, len as usize)).collect();
    assert_eq!((&got[12..], got[10]), (&bytes[12..], 4));
    assert_eq!(driver.poll(RX), None);
}

#[test]
fn frames_wait_until_there_are_enough_buffers() {
    let (mut driver, other) = start(0);
    other.send(&packet(1800, 1)).unwrap();
    other.send(&packet(60, 2)).unwrap();
    offer(&mut driver, 1000);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.poll(RX), None);
    offer(&mut driver, 1000);
    offer(&mut driver, 1000);
    assert_eq!([0; 3].map(|_| driver.wait(RX).1), [1000, 812, 72]);
}

#[test]
fn without_mergeable_buffers_a_frame_that_does_not_fit_is_dropped() {
    let (mut driver, other) = start(F_MRG_RXBUF);
    let room = offer(&mut driver, 1526);
    other.send(&packet(9000, 1)).unwrap();
    other.send(&packet(1514, 2)).unwrap();
    assert_eq!(driver.wait(RX).1, 1526);
    assert_eq!(driver.bytes(room + 12, 1514), [2; 1514]);
}

#[test]
fn a_frame_larger_than_the_whole_ring_is_dropped() {
    let (mut driver, other) = start(0);
    for _ in 0..64 {
        offer(&mut driver, 100);
    }
    other.send(&packet(9000, 1)).unwrap();
    other.send(&packet(60, 2)).unwrap();
    assert_eq!(driver.wait(RX).1, 72);
}

#[test]
fn what_is_no_packet_is_dropped_and_the_next_goes_out() {
    let (mut driver, other) = start(0);
    let at = driver.buffer(&[0xff; 64]);
    for (address, len) in [(at, 0), (at, 11), (at, 25), (1 << 40, 100), (u64::MAX - 5, 100), (0, 70_000), (0, 0xffff_ffff)] {
        driver.add(TX, &[(address, len)], &[]);
        driver.kick(TX);
        assert_eq!(driver.wait(TX).1, 0);
    }
    let room = driver.room(100);
    driver.add(TX, &[], &[(room, 100)]);
    driver.kick(TX);
    driver.wait(TX);
    send(&mut driver, &packet(60, 8));
    assert_eq!(receive(&other), packet(60, 8));
}

#[test]
fn a_full_network_is_waited_for_and_loses_nothing() {
    let (mut driver, other) = start(0);
    let mut sent = 0u32;
    let mut done = 0u32;
    let at = driver.buffer(&packet(1514, 0));
    // Nobody reads: at some time nothing is answered any more.
    while sent - done < 60 && sent < 20_000 {
        driver.add(TX, &[(at, 1526)], &[]);
        driver.tell(TX);
        sent += 1;
        while driver.poll(TX).is_some() {
            done += 1;
        }
    }
    assert!(done < sent);
    for _ in 0..sent {
        assert_eq!(receive(&other).len(), 1526);
    }
    while done < sent {
        driver.wait(TX);
        done += 1;
    }
}

#[test]
fn a_network_that_ends_takes_the_link_down() {
    let (network, other) = wire();
    let mut driver = Driver::cold(Box::new(Net::new(network, Mac::default_for(0))));
    driver.negotiate(0);
    driver.write(common::CONFIG_MSIX_VECTOR, 2, 0);
    for queue in 0..3 {
        driver.set_up_queue(queue, 64);
    }
    driver.set_status(0xf);
    assert!(link_is_up(&driver));
    other.send(&[]).unwrap();
    driver.wait_until(|driver| !link_is_up(driver));
    driver.wait_until(|driver| driver.counter.messages.lock().unwrap().contains(&0));
    // What is sent now is lost, but answered.
    send(&mut driver, &packet(60, 1));
    driver.wait(TX);
    assert_eq!(driver.status(), 0xf);
}

fn control(driver: &mut Driver, command: &[u8]) -> u8 {
    let (at, answer) = (driver.buffer(command), driver.buffer(&[0xff]));
    driver.add(CONTROL, &[(at, command.len() as u32)], &[(answer, 1)]);
    driver.tell(CONTROL);
    assert_eq!(driver.wait(CONTROL).1, 1);
    driver.bytes(answer, 1)[0]
}

fn mac(driver: &Driver) -> Vec<u8> {
    let mut mac = vec![0; 6];
    driver.registers.read_config(0, &mut mac);
    mac
}

#[test]
fn the_control_queue_changes_the_address_until_reset() {
    let (mut driver, _other) = start(0);
    assert_eq!(mac(&driver), [2, 0, 0, 0, 0, 1]);
    assert_eq!(control(&mut driver, &[CTRL_MAC, CTRL_MAC_ADDR_SET, 2, 9, 9, 9, 9, 9]), CTRL_OK);
    assert_eq!(mac(&driver), [2, 9, 9, 9, 9, 9]);
    assert_eq!(control(&mut driver, &[CTRL_RX, 0, 1]), CTRL_OK);
    assert_eq!(control(&mut driver, &[CTRL_MAC, CTRL_MAC_TABLE_SET, 0, 0, 0, 0, 0, 0, 0, 0]), CTRL_OK);
    for bad in [&[][..], &[CTRL_RX], &[CTRL_RX, 6, 1], &[CTRL_RX, 0], &[CTRL_MAC, CTRL_MAC_ADDR_SET, 1], &[4, 0, 1, 0], &[0xff; 40]] {
        assert_eq!(control(&mut driver, bad), CTRL_ERR, "{bad:?}");
    }
    driver.set_status(0);
    assert_eq!(mac(&driver), [2, 0, 0, 0, 0, 1]);
}

#[test]
fn network_hears_which_offloads_the_driver_takes() {
    let all = F_CSUM | F_GUEST_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_GUEST_TSO4 | F_GUEST_TSO6;
    let takes = |checksum, tso4, tso6| Offloads { checksum, tso4, tso6 };
    for (without, told) in [(0, takes(true, true, true)), (F_GUEST_TSO6, takes(true, true, false)), (all, Offloads::default())] {
        let (network, _other) = wire();
        let offloads = Arc::clone(&network.offloads);
        let mut driver = Driver::start(Box::new(Net::new(network, Mac::default_for(0))), without);
        assert_eq!(driver.offered() & all, all);
        assert_eq!(*offloads.lock().unwrap(), told);
    }
}

#[test]
fn a_reset_gives_the_network_back_and_a_new_driver_gets_it() {
    let (mut driver, other) = start(0);
    for round in 0..5 {
        driver.negotiate(0);
        for queue in 0..3 {
            driver.set_up_queue(queue, 64);
        }
        driver.set_status(0xf);
        send(&mut driver, &packet(60, round));
        assert_eq!(receive(&other), packet(60, round));
        driver.set_status(0);
    }
}

#[test]
fn broken_rings_need_a_reset() {
    for queue in [RX, TX, CONTROL] {
        let (mut driver, other) = start(0);
        driver.set_available(queue, 500);
        driver.kick(queue);
        other.send(&packet(60, 1)).unwrap();
        driver.wait_broken();
    }
    // A receive buffer that does not even hold a header.
    let (mut driver, other) = start(0);
    offer(&mut driver, 11);
    other.send(&packet(60, 1)).unwrap();
    driver.wait_broken();
    let (mut driver, other) = start(0);
    driver.set_descriptor(RX, 0, 0x1000, 100, NEXT | WRITE, 0);
    driver.offer(RX, 0);
    other.send(&packet(60, 1)).unwrap();
    driver.wait_broken();
}

#[test]
fn buffers_outside_of_memory_get_nothing() {
    let (mut driver, other) = start(0);
    driver.add(RX, &[], &[(1 << 40, 2048)]);
    let room = offer(&mut driver, 2048);
    other.send(&packet(60, 1)).unwrap();
    other.send(&packet(61, 2)).unwrap();
    assert_eq!(driver.wait(RX).1, 0);
    assert_eq!(driver.wait(RX).1, 73);
    assert_eq!(driver.bytes(room + 12, 61), [2; 61]);
}

#[test]
fn a_snapshot_keeps_address_and_rings_and_the_card_goes_on() {
    let (mut driver, other) = start(0);
    control(&mut driver, &[CTRL_MAC, CTRL_MAC_ADDR_SET, 2, 9, 9, 9, 9, 9]);
    send(&mut driver, &packet(60, 1));
    receive(&other);
    driver.wait(TX);
    let state = driver.registers.state();
    send(&mut driver, &packet(60, 2));
    assert_eq!(receive(&other), packet(60, 2));
    driver.wait(TX);
    let (network, other) = wire();
    let mut moved = Driver::cold_in(Box::new(Net::new(network, Mac::default_for(3))), driver.memory.clone());
    moved.registers.restore(&state).unwrap();
    assert_eq!(mac(&moved), [2, 9, 9, 9, 9, 9]);
    // Sent after the snapshot, and so once more from there.
    assert_eq!(receive(&other), packet(60, 2));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn garbage_never_takes_the_card_down(
        rings in proptest::collection::vec((0u16..3, 0u64..0x1_0000, any::<u64>()), 0..80),
        descriptors in proptest::collection::vec((0u16..3, 0u16..64, any::<u32>(), 0u32..0x3000, 0u16..8, 0u16..70), 0..80),
        available in any::<[u8; 3]>(),
    ) {
        let (mut driver, other) = start(0);
        for (queue, offset, value) in rings {
            driver.memory.write_obj(value, GuestAddress(queue_base(queue) + offset)).unwrap();
        }
        for (queue, index, address, len, flags, next) in descriptors {
            driver.set_descriptor(queue, index, u64::from(address) & 0x1ff_ffff, len, flags, next);
        }
        for queue in 0..3u16 {
            driver.set_available(queue, u16::from(available[usize::from(queue)] % 65));
        }
        other.set_nonblocking(true).unwrap();
        for queue in 0..3 {
            let _ = other.send(&packet(1000, 1));
            driver.kick(queue);
        }
        let mut room = vec![0; MAX_PACKET];
        driver.set_status(0);
        while other.recv(&mut room).is_ok() {}
        driver.negotiate(0);
        for queue in 0..3 {
            driver.set_up_queue(queue, 64);
        }
        driver.set_status(0xf);
        other.set_nonblocking(false).unwrap();
        send(&mut driver, &packet(60, 9));
        prop_assert_eq!(receive(&other), packet(60, 9));
    }
}

/// An ARP request for `target`, with its header.
fn arp(target: [u8; 4], sender: [u8; 4]) -> Vec<u8> {
    let own = [2, 0, 0, 0, 0, 1];
    let mut frame = packet(0, 0);
    frame.extend_from_slice(&[0xff; 6]);
    frame.extend_from_slice(&own);
    frame.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend_from_slice(&own);
    frame.extend_from_slice(&sender);
    frame.extend_from_slice(&[0; 6]);
    frame.extend_from_slice(&target);
    frame.resize(HEADER_BYTES + 60, 0);
    frame
}

/// Asks for `target` until it answers, as every host does: a link that has just come up loses what is sent at first. Passes over whatever else comes.
fn ask_until_answered(driver: &mut Driver, target: [u8; 4], sender: [u8; 4]) {
    let mut room = offer(driver, 2048);
    for _ in 0..40 {
        send(driver, &arp(target, sender));
        let again = Instant::now() + Duration::from_millis(250);
        while Instant::now() < again {
            if driver.poll(RX).is_none() {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            let frame = driver.bytes(room + HEADER_BYTES as u64, 42);
            if frame[12..14] == [8, 6] && frame[20..22] == [0, 2] && frame[28..32] == target {
                return;
            }
            room = offer(driver, 2048);
        }
    }
    panic!("no answer");
}

fn has(program: &str) -> bool {
    Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).stdin(Stdio::null()).status().is_ok()
}

#[test]
fn passt_answers_the_guest() {
    let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    if !has("passt") || !routes.lines().any(|line| line.split_whitespace().nth(1) == Some("00000000")) {
        eprintln!("skipped: needs passt and a default route");
        return;
    }
    let passt = Passt::start(&[]).unwrap();
    let mut driver = Driver::start(Box::new(Net::new(Box::new(passt), Mac([2, 0, 0, 0, 0, 1]))), 0);
    // passt answers for every address but the guest's own.
    ask_until_answered(&mut driver, [192, 0, 2, 77], [192, 0, 2, 78]);
}

#[test]
fn a_passt_that_is_killed_takes_the_link_down() {
    if !has("passt") {
        return;
    }
    let passt = Passt::start(&[]).unwrap();
    let id = passt.process_id().unwrap();
    let driver = &mut Driver::start(Box::new(Net::new(Box::new(passt), Mac::default_for(0))), 0);
    let pid = rustix::process::Pid::from_raw(id as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    driver.wait_until(|driver| !link_is_up(driver));
}

#[test]
fn the_kernel_answers_through_a_tap() {
    let name = "pvbus-test0";
    let ip = |arguments: &[&str]| Command::new("ip").args(arguments).stderr(Stdio::null()).status().is_ok_and(|status| status.success());
    if !(ip(&["tuntap", "add", name, "mode", "tap"])
        && ip(&["addr", "add", "198.51.100.1/24", "dev", name])
        && ip(&["link", "set", name, "up"]))
    {
        ip(&["link", "del", name]);
        eprintln!("skipped: needs the right to make a TAP interface");
        return;
    }
    let tap = Tap::open(name);
    let second = Tap::open(name).err().map(|error| error.to_string());
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        assert!(second.unwrap().contains("cannot attach"));
        let mut driver = Driver::start(Box::new(Net::new(Box::new(tap.unwrap()), Mac([2, 0, 0, 0, 0, 1]))), 0);
        ask_until_answered(&mut driver, [198, 51, 100, 1], [198, 51, 100, 2]);
    }));
    ip(&["link", "del", name]);
    outcome.unwrap();
}
