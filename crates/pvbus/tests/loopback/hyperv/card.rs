//! hvn against the host's network cards.

use std::sync::{Arc, Mutex};

use abi::hyperv::vmbus::Guid;
use abi::virtio::net::{HDR_F_NEEDS_CSUM, Header};
use dialects::hyperv::netvsc::Netvsc;
use dialects::hyperv::vmbus::{BrokenRing, Channel, Device, Offer};
use dialects::network::testing::MemoryWire;
use dialects::network::{self, Worked};
use pvbus::net::{Checksum, NetDevice, NetError};
use pvbus::{Hal, Tree};
use zerocopy::FromBytes;

use super::Rig;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const INSTANCE: Guid = Guid::from_u128(0x5678);

/// A card on a wire.
struct Wired {
    card: Netvsc,
    wire: Arc<Mutex<MemoryWire>>,
    link: Arc<Mutex<bool>>,
}

impl Device for Wired {
    type Error = BrokenRing;

    fn offer(&self) -> Offer {
        self.card.offer()
    }
    fn opened(&mut self, channel: Channel) {
        self.card.opened(channel);
    }
    fn closed(&mut self, index: u16) {
        self.card.closed(index);
    }
    fn work(&mut self) -> Result<Worked, BrokenRing> {
        self.card.set_link(*self.link.lock().unwrap());
        self.card.work(Some(&mut *self.wire.lock().unwrap())).map_err(|error| match error {
            network::NetError::Ring(ring) => ring,
            network::NetError::Network(error) => panic!("{error}"),
        })
    }
}

impl Rig {
    fn card(&self) -> (Arc<Mutex<MemoryWire>>, Arc<Mutex<bool>>) {
        let (wire, link) = (Arc::<Mutex<MemoryWire>>::default(), Arc::new(Mutex::new(true)));
        self.plug(Wired { card: Netvsc::new(INSTANCE, MAC), wire: Arc::clone(&wire), link: Arc::clone(&link) });
        (wire, link)
    }

    /// Lets the host work.
    fn turn(&self) {
        self.machine.wait_until(self.machine.now() + 1000);
    }
}

fn only_card<'h>(tree: &Tree<'h>) -> Arc<dyn NetDevice + 'h> {
    let cards = tree.cards();
    assert_eq!(cards.len(), 1);
    cards.into_iter().next().unwrap()
}

/// A frame of this length, to everybody.
fn frame(length: usize, mark: u8) -> Vec<u8> {
    let mut frame = vec![mark; length];
    frame[..6].fill(0xff);
    frame[6..14].copy_from_slice(&[2, 0, 0, 0, 0, 9, 0x88, 0xb5]);
    frame
}

/// UDP over IPv4; the field of the checksum holds the sum of the pseudo header.
fn datagram() -> Vec<u8> {
    let mut frame = Vec::from([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 7]);
    frame.extend([8, 0, 0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let pseudo: u16 = 0x0a00 + 1 + 0x0a00 + 2 + 17 + 12;
    frame.extend([0, 7, 0, 9, 0, 12, (pseudo >> 8) as u8, pseudo as u8, 1, 2, 3, 4]);
    frame
}

#[test]
fn card_attaches_with_openbsds_line() {
    let rig = Rig::new();
    let _host = rig.card();
    let mut tree = Tree::attach(&rig.machine);
    assert_eq!(rig.lines(&mut tree), ["hvn0 at hyperv0 channel 1: NVS 6.1 NDIS 6.30, address 02:00:00:00:00:07"]);
    let card = only_card(&tree);
    assert_eq!((card.name(), card.mac(), card.mtu(), card.takes_blank_checksums()), ("hvn0", MAC, 1500, true));
}

#[test]
fn frames_of_any_length_go_both_ways() {
    let rig = Rig::new();
    let (wire, _link) = rig.card();
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let card = only_card(&tree);
    let mut buffer = [0; 2048];
    for (length, mark) in [(60, 1), (1514, 2), (61, 3), (1000, 4)] {
        assert!(card.send(&frame(length, mark), Checksum::Complete).unwrap());
        rig.turn();
        let sent = wire.lock().unwrap().sent.pop().unwrap();
        assert_eq!(sent[sent.len() - length..], frame(length, mark));
    }
    for length in [13, 1519] {
        assert_eq!(card.send(&vec![0; length], Checksum::Complete), Err(NetError::Length));
    }
    let head = wire_head(&wire, &rig, &*card);
    for (length, mark) in [(60, 5), (1514, 6)] {
        wire.lock().unwrap().arriving.push_back([head.clone(), frame(length, mark)].concat());
    }
    rig.turn();
    for (length, mark) in [(60, 5), (1514, 6)] {
        let received = card.receive(&mut buffer).unwrap().unwrap();
        assert_eq!(buffer[..received.length], frame(length, mark));
    }
    assert_eq!(card.receive(&mut buffer).unwrap(), None);
}

/// What a packet on the wire has before its frame.
fn wire_head(wire: &Mutex<MemoryWire>, rig: &Rig, card: &dyn NetDevice) -> Vec<u8> {
    card.send(&frame(60, 0), Checksum::Complete).unwrap();
    rig.turn();
    let sent = wire.lock().unwrap().sent.pop().unwrap();
    vec![0; sent.len() - 60]
}

#[test]
fn blank_checksums_are_left_to_the_hosts_network() {
    let rig = Rig::new();
    let (wire, _link) = rig.card();
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let card = only_card(&tree);
    assert!(card.takes_blank_checksums());
    card.send(&datagram(), Checksum::Blank).unwrap();
    rig.turn();
    let sent = wire.lock().unwrap().sent.pop().unwrap();
    let (header, sent) = Header::read_from_prefix(&sent).unwrap();
    assert_eq!((header.flags, sent), (HDR_F_NEEDS_CSUM, datagram().as_slice()));
}

#[test]
fn many_frames_wait_until_there_is_room() {
    let rig = Rig::new();
    let (wire, _link) = rig.card();
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let card = only_card(&tree);
    let head = wire_head(&wire, &rig, &*card);
    // Out: until nothing more is taken, and on when the host has looked.
    let mut sent = 0;
    for _ in 0..10 {
        while card.send(&frame(1514, 1), Checksum::Complete).unwrap() {
            sent += 1;
        }
        rig.turn();
    }
    assert_eq!(wire.lock().unwrap().sent.len(), sent);
    assert!(sent >= 64 * 9, "{sent}");
    // In: more than the receive buffer holds.
    for mark in 0..2000_u32 {
        wire.lock().unwrap().arriving.push_back([head.clone(), frame(1514, mark as u8)].concat());
    }
    let (mut buffer, mut received) = ([0; 2048], 0_u32);
    for _ in 0..3000 {
        match card.receive(&mut buffer).unwrap() {
            Some(one) => {
                assert_eq!(buffer[..one.length], frame(1514, received as u8));
                received += 1;
            }
            None => rig.turn(),
        }
    }
    assert_eq!(received, 2000);
}

#[test]
fn link_s_state_is_told() {
    let rig = Rig::new();
    let (_wire, link) = rig.card();
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let card = only_card(&tree);
    for (is_up, line) in [(false, "hvn0: link down"), (true, "hvn0: link up")] {
        *link.lock().unwrap() = is_up;
        rig.turn();
        assert_eq!(card.receive(&mut [0; 2048]), Ok(None));
        assert_eq!(rig.lines(&mut tree), [line]);
    }
}

#[test]
fn cards_come_and_go_while_the_machine_runs_and_leave_nothing() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let in_use = rig.machine.pages_in_use();
    for round in 0..3 {
        let _host = rig.card();
        rig.poll(&mut tree);
        let card = only_card(&tree);
        card.send(&frame(60, 1), Checksum::Complete).unwrap();
        rig.turn();
        assert_eq!(card.receive(&mut [0; 2048]), Ok(None));
        rig.machine.end_latest_thread();
        assert_eq!(rig.lines(&mut tree), [format!("hvn{round} detached")]);
        assert!(tree.cards().is_empty());
        assert_eq!(card.send(&frame(60, 1), Checksum::Complete), Err(NetError::Gone));
        assert_eq!(rig.machine.pages_in_use(), in_use, "round {round}");
    }
}
