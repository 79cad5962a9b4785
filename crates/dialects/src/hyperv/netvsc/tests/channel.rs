//! The card on its channels.

use abi::hyperv::netvsc::{CHANNEL_CONTROL, CHANNEL_DATA, NO_SECTION, kind, status, version};
use abi::hyperv::ring::kind as packet;
use abi::hyperv::rndis::{self, FILTER_DIRECTED, message as rndis_kind, oid};
use abi::hyperv::vmbus::message as vmbus;
use abi::virtio::net::{GSO_TCPV4, HDR_F_NEEDS_CSUM, Header};
use zerocopy::{FromBytes, IntoBytes};

use super::super::buffers::SECTION_SIZE;
use super::super::*;
use super::{MAC, TCP, frame, message};
use crate::hyperv::testing::{Driver, Front};
use crate::hyperv::vmbus::testing::Received;
use crate::hyperv::vmbus::{Attached, Device};
use crate::network::testing::MemoryWire;

/// Pages of both buffers.
const BUFFER_PAGES: u64 = 16;
const RECEIVE_ID: u16 = 0xcafe;

/// A card and its wire.
struct Card {
    card: Netvsc,
    wire: MemoryWire,
}

impl Device for Card {
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
        self.card.work(Some(&mut self.wire)).map_err(|error| match error {
            NetError::Ring(error) => error,
            NetError::Network(error) => panic!("{error}"),
        })
    }
}

struct Rig {
    driver: Driver,
    device: Attached<Card>,
    front: Front,
    receive: u64,
    send: u64,
    /// How many parts the receive buffer has, and their size.
    parts: (u32, u32),
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

impl Rig {
    /// A channel that is open, and nothing said.
    fn open() -> Rig {
        let mut driver = Driver::new();
        let card = Card { card: Netvsc::new(Guid::from_u128(9), MAC), wire: MemoryWire::default() };
        let mut device = driver.guest.bus.attach(card, std::sync::Arc::new(|| {}));
        let relid = driver.guest.connect()[0].relid.get();
        let front = driver.open(relid);
        device.work();
        let (receive, send) = (driver.pages(BUFFER_PAGES), driver.pages(BUFFER_PAGES));
        Rig { driver, device, front, receive, send, parts: (0, 0) }
    }

    /// A card in use, with both buffers, that receives what is for it.
    fn up() -> Rig {
        let mut rig = Rig::open();
        assert_eq!(word(&rig.ask(&words(&[kind::INIT, version::V61, version::V61])), 12), status::SUCCESS);
        rig.ask(&words(&[kind::SEND_NDIS_CONFIG, 1514, 0, 0, 0]));
        rig.lend_receive_buffer();
        let gpadl = rig.driver.lend(&rig.front, rig.send, BUFFER_PAGES);
        let answer = rig.ask(&words(&[kind::SEND_SEND_BUFFER, gpadl, 0]));
        assert_eq!(answer[..12], words(&[kind::SEND_SEND_BUFFER_COMPLETE, status::SUCCESS, SECTION_SIZE]));
        rig.control(&words(&[rndis_kind::SET, 32, 1, oid::CURRENT_PACKET_FILTER, 4, 20, 0, FILTER_DIRECTED]));
        let answer = rig.receive();
        assert_eq!(answer.1, words(&[0x8000_0005, 16, 1, 0]));
        rig
    }

    fn lend_receive_buffer(&mut self) {
        let gpadl = self.driver.lend(&self.front, self.receive, BUFFER_PAGES);
        let answer = self.ask(&words(&[kind::SEND_RECEIVE_BUFFER, gpadl, RECEIVE_ID.into()]));
        assert_eq!(answer[..16], words(&[kind::SEND_RECEIVE_BUFFER_COMPLETE, status::SUCCESS, 1, 0]));
        self.parts = (word(&answer, 20), word(&answer, 16));
        assert_eq!(word(&answer, 24), self.parts.0 * self.parts.1);
    }

    /// An NVSP message: its answer.
    fn ask(&mut self, message: &[u8]) -> Vec<u8> {
        self.front.in_band(3, message);
        self.completion(3)
    }

    fn completion(&mut self, transaction: u64) -> Vec<u8> {
        while self.device.work().more {}
        let answer = self.front.receive().expect("an answer");
        assert_eq!((answer.kind, answer.transaction), (packet::COMPLETION, transaction));
        answer.payload
    }

    /// RNDIS messages in a page.
    fn control(&mut self, bytes: &[u8]) {
        let page = self.driver.pages(1);
        self.driver.write(page, bytes);
        self.front.direct(4, &[(page, bytes.len() as u32)], &words(&[kind::SEND_RNDIS_PACKET, CHANNEL_CONTROL, NO_SECTION, 0]));
        assert_eq!(self.completion(4)[..8], words(&[kind::SEND_RNDIS_PACKET_COMPLETE, status::SUCCESS]));
    }

    /// RNDIS messages in a section of the send buffer, and in pages: the status of both.
    fn transmit(&mut self, section: u32, bytes: &[u8], pages: &[(u64, u32)]) -> u32 {
        self.driver.write(self.send + u64::from(section * SECTION_SIZE), bytes);
        self.transmit_as(section, bytes.len() as u32, pages)
    }

    fn transmit_as(&mut self, section: u32, length: u32, pages: &[(u64, u32)]) -> u32 {
        let payload = words(&[kind::SEND_RNDIS_PACKET, CHANNEL_DATA, section, length]);
        match pages {
            [] => self.front.in_band(8, &payload),
            _ => self.front.direct(8, pages, &payload),
        }
        let answer = self.completion(8);
        assert_eq!(word(&answer, 0), kind::SEND_RNDIS_PACKET_COMPLETE);
        word(&answer, 4)
    }

    /// What the host puts into the receive buffer next: the packet, and the message.
    fn receive(&mut self) -> (Received, Vec<u8>) {
        let packet = self.front.receive().expect("a message");
        assert_eq!((packet.kind, packet.extra[..2].to_vec()), (packet::TRANSFER_PAGES, RECEIVE_ID.to_le_bytes().to_vec()));
        assert_eq!((word(&packet.payload, 0), word(&packet.extra, 4)), (kind::SEND_RNDIS_PACKET, 1));
        let (length, offset) = (word(&packet.extra, 8), word(&packet.extra, 12));
        assert!(length <= self.parts.1 && offset % self.parts.1 == 0);
        let message = self.driver.read(self.receive + u64::from(offset), length as usize);
        (packet, message)
    }

    fn give_back(&mut self, transaction: u64) {
        self.front.complete(transaction, &words(&[kind::SEND_RNDIS_PACKET_COMPLETE, status::SUCCESS]));
    }

    fn arrive(&mut self, frame: &[u8]) {
        self.device.device().wire.arriving.push_back([[0; HEADER_BYTES].as_slice(), frame].concat());
    }

    fn sent(&mut self) -> Vec<Vec<u8>> {
        let sent = std::mem::take(&mut self.device.device().wire.sent);
        sent.iter().map(|packet| packet[HEADER_BYTES..].to_vec()).collect()
    }
}

#[test]
fn versions_are_agreed_on_and_units_have_their_size() {
    let mut rig = Rig::open();
    for (version, answer, length) in [
        (version::V61, [kind::INIT_COMPLETE, u32::MAX, 34, status::SUCCESS], 40),
        (version::V6, [kind::INIT_COMPLETE, u32::MAX, 34, status::SUCCESS], 32),
        (version::V5, [kind::INIT_COMPLETE, u32::MAX, 34, status::SUCCESS], 32),
        (version::V1, [kind::INIT_COMPLETE, version::V1, 34, status::SUCCESS], 32),
        (0x0006_0002, [kind::INIT_COMPLETE, u32::MAX, 34, 0], 40),
    ] {
        let got = rig.ask(&words(&[kind::INIT, version, version]));
        assert_eq!((got.len(), &got[..16]), (length, words(&answer).as_slice()), "{version:#x}");
    }
    for other in [kind::SEND_NDIS_CONFIG, kind::SEND_NDIS_VERSION, kind::REVOKE_SEND_BUFFER, 129, 0, 9999] {
        assert_eq!(word(&rig.ask(&words(&[other, 0, 0, 0, 0])), 0), kind::INIT_COMPLETE, "answered, so that nobody waits for ever");
    }
}

#[test]
fn frames_go_out_from_sections_and_from_pages() {
    let mut rig = Rig::up();
    let (first, second) = (frame(TCP, 100), frame(17, 1000));
    assert_eq!(rig.transmit(2, &message(&first, &[]), &[]), status::SUCCESS);
    let page = rig.driver.pages(1);
    let bytes = message(&second, &[]);
    rig.driver.write(page + 8, &bytes[44..]);
    // As Linux sends what is not worth copying: the header in a section, the frame in a page.
    assert_eq!(rig.transmit(0, &bytes[..44], &[(page + 8, bytes.len() as u32 - 44)]), status::SUCCESS);
    assert_eq!(rig.sent(), [first, second]);
}

#[test]
fn several_messages_come_in_one_packet() {
    let mut rig = Rig::up();
    let frames: Vec<Vec<u8>> = (0..8).map(|n| frame(TCP, 100 + n)).collect();
    let mut all = Vec::new();
    for frame in &frames {
        let mut bytes = message(frame, &[]);
        // Padded to what they are aligned to, and saying so.
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        let length = bytes.len() as u32;
        bytes[4..8].copy_from_slice(&length.to_le_bytes());
        all.extend(bytes);
    }
    assert_eq!(rig.transmit(0, &all, &[]), status::SUCCESS);
    assert_eq!(rig.sent(), frames);
    all.extend(message(&frames[0], &[]));
    assert_eq!(rig.transmit(0, &all, &[]), status::INVALID_RNDIS_PACKET, "more than there may be");
    assert_eq!(rig.sent().len(), 8);
}

#[test]
fn packet_waits_for_a_network_that_is_full() {
    let mut rig = Rig::up();
    rig.device.device().wire.is_full = true;
    let bytes = message(&frame(TCP, 10), &[]);
    rig.driver.write(rig.send, &bytes);
    rig.front.in_band(8, &words(&[kind::SEND_RNDIS_PACKET, CHANNEL_DATA, 0, bytes.len() as u32]));
    assert!(rig.device.work().blocked);
    assert!(rig.front.receive().is_none());
    rig.device.device().wire.is_full = false;
    assert_eq!(word(&rig.completion(8), 4), status::SUCCESS);
    assert_eq!(rig.sent().len(), 1);
}

#[test]
fn sections_and_pages_that_are_not_there_are_failures() {
    let mut rig = Rig::up();
    let last = BUFFER_PAGES as u32 * 4096 / SECTION_SIZE;
    for (section, length) in [(last, 100), (u32::MAX - 1, 100), (0, SECTION_SIZE + 1), (0, u32::MAX), (last - 1, SECTION_SIZE * 2)] {
        assert_eq!(rig.transmit_as(section, length, &[]), status::FAILURE, "{section:#x} {length:#x}");
    }
    assert_eq!(rig.transmit_as(NO_SECTION, 0, &[(1 << 40, 100)]), status::FAILURE);
    let page = rig.driver.pages(33);
    assert_eq!(rig.transmit_as(NO_SECTION, 0, &[(page, 33 * 4096)]), status::FAILURE, "more than was said");
    for length in [1, 7, 8] {
        assert_eq!(rig.transmit(0, &[0; 8][..length], &[]), status::INVALID_RNDIS_PACKET);
    }
    let mut long = message(&frame(TCP, 10), &[]);
    long[4] += 1;
    assert_eq!(rig.transmit(0, &long, &[]), status::INVALID_RNDIS_PACKET);
    assert!(rig.sent().is_empty());
    let mut rig = Rig::open();
    assert_eq!(rig.transmit_as(0, 100, &[]), status::FAILURE, "no send buffer at all");
}

#[test]
fn frames_arrive_in_the_receive_buffer() {
    let mut rig = Rig::up();
    let frame = frame(TCP, 1460);
    rig.arrive(&frame);
    rig.arrive(&[[0xff; 6].as_slice(), &[0; 60]].concat());
    let worked = rig.device.work();
    assert!(worked.has_room);
    let (packet, got) = rig.receive();
    assert_eq!(got[44..], frame);
    assert_eq!(rndis::Header::read_from_prefix(&got).unwrap().0.length.get() as usize, got.len());
    assert!(rig.front.receive().is_none(), "broadcasts were not asked for");
    rig.give_back(packet.transaction);
    rig.device.work();
}

#[test]
fn frame_waits_until_the_guest_gives_parts_back() {
    let mut rig = Rig::up();
    // The answer to the filter has a part still.
    let parts = rig.parts.0 as usize - 1;
    (0..parts + 3).for_each(|n| rig.arrive(&frame(TCP, n)));
    while rig.device.work().more {}
    assert!(!rig.device.work().has_room);
    let got: Vec<_> = (0..parts).map(|_| rig.receive().0.transaction).collect();
    assert!(rig.front.receive().is_none());
    rig.give_back(got[0]);
    rig.give_back(got[0]);
    rig.give_back(0);
    rig.give_back(u64::MAX);
    while rig.device.work().more {}
    assert_eq!(rig.receive().1.len(), 44 + 54 + parts, "one part, one frame, and in order");
    assert!(rig.front.receive().is_none());
    got[1..].iter().for_each(|transaction| rig.give_back(*transaction));
    while rig.device.work().more {}
    assert_eq!(rig.receive().1.len(), 44 + 54 + parts + 1);
}

#[test]
fn long_packet_has_parts_enough_or_waits() {
    let mut rig = Rig::up();
    let header = Header { flags: HDR_F_NEEDS_CSUM, gso_type: GSO_TCPV4, gso_size: 1448.into(), ..Header::default() };
    let long = [header.as_bytes(), &frame(TCP, 4000)].concat();
    rig.device.device().wire.arriving.push_back(long.clone());
    rig.device.work();
    let packet = rig.front.receive().unwrap();
    assert_eq!((word(&packet.extra, 4), packet.extra.len()), (3, 8 + 3 * 8), "three parts, one transaction");
    // All but two parts are taken by others.
    let parts = rig.parts.0 as usize;
    (0..parts - 1 - 3 - 2).for_each(|_| rig.arrive(&frame(TCP, 1)));
    rig.device.device().wire.arriving.push_back(long);
    while rig.device.work().more {}
    assert!(!rig.device.work().has_room);
    (0..parts - 6).for_each(|_| drop(rig.receive()));
    assert!(rig.front.receive().is_none());
    rig.give_back(packet.transaction);
    assert!(rig.device.work().has_room);
    assert_eq!(word(&rig.front.receive().unwrap().extra, 4), 3);
}

#[test]
fn frame_that_no_part_can_hold_is_lost() {
    let mut rig = Rig::up();
    rig.arrive(&frame(TCP, 4000));
    rig.arrive(&frame(TCP, 1));
    assert!(rig.device.work().has_room);
    assert_eq!(rig.receive().1.len(), 44 + 55);
}

#[test]
fn longer_frames_have_larger_parts() {
    let mut rig = Rig::up();
    assert!(rig.parts.1 < 2048);
    rig.ask(&words(&[kind::REVOKE_RECEIVE_BUFFER, RECEIVE_ID.into()]));
    rig.ask(&words(&[kind::SEND_NDIS_CONFIG, 9014, 0, 0, 0]));
    rig.lend_receive_buffer();
    assert!(rig.parts.1 > 9014);
    rig.ask(&words(&[kind::SEND_NDIS_CONFIG, u32::MAX, 0, 0, 0]));
    let gpadl = rig.driver.lend(&rig.front, rig.receive, BUFFER_PAGES);
    assert_eq!(word(&rig.ask(&words(&[kind::SEND_RECEIVE_BUFFER, gpadl, 1])), 4), status::FAILURE, "too small for one");
    assert_eq!(word(&rig.ask(&words(&[kind::SEND_RECEIVE_BUFFER, 0x7777, 1])), 4), status::FAILURE, "no such memory");
}

#[test]
fn guest_that_asks_without_reading_loses_answers_only() {
    let mut rig = Rig::up();
    let keepalive = words(&[rndis_kind::KEEPALIVE, 12, 9]);
    let all = keepalive.repeat(8);
    // More than parts, and than waiting answers.
    rig.driver.write(rig.send, &all);
    (0..20).for_each(|_| rig.front.in_band(8, &words(&[kind::SEND_RNDIS_PACKET, CHANNEL_DATA, 0, all.len() as u32])));
    while rig.device.work().more {}
    let (mut answers, mut completions) = (0, 0);
    while let Some(packet) = rig.front.receive() {
        if packet.kind == packet::COMPLETION {
            completions += 1;
        } else {
            answers += 1;
            rig.give_back(packet.transaction);
        }
        while rig.device.work().more {}
    }
    assert_eq!(completions, 20);
    assert!((32..160).contains(&answers), "{answers}");
    rig.control(&keepalive);
    assert_eq!(rig.receive().1, words(&[0x8000_0008, 16, 9, 0]));
}

#[test]
fn guest_hears_of_its_link() {
    let mut rig = Rig::up();
    for (is_up, told) in [(false, Some(0x4001_000c)), (false, None), (true, Some(0x4001_000b))] {
        rig.device.device().card.set_link(is_up);
        rig.device.work();
        let message = told.map(|_| rig.receive().1);
        assert_eq!(message, told.map(|status| words(&[rndis_kind::INDICATE_STATUS, 20, status, 0, 0])));
        assert!(rig.front.receive().is_none());
    }
}

#[test]
fn flows_are_spread_over_channels() {
    let mut rig = Rig::up();
    let answer = rig.ask(&words(&[kind::SUBCHANNEL, 1, 9]));
    assert_eq!(answer[..12], words(&[kind::SUBCHANNEL, status::SUCCESS, 3]));
    let offers = rig.driver.offers();
    assert_eq!(offers.len(), 3);
    let mut second = rig.driver.open(offers[0].0);
    let parameters = [words(&[0x28_0289, 0, 0, 8, 28, 0, 0]), words(&[1, 1])].concat();
    rig.control(&[words(&[rndis_kind::SET, 28 + 36, 1, oid::RSS_PARAMETERS, 36, 20, 0]), parameters].concat());
    assert_eq!(word(&rig.receive().1, 12), 0);
    rig.arrive(&frame(TCP, 1));
    rig.device.work();
    assert!(rig.front.receive().is_none());
    std::mem::swap(&mut rig.front, &mut second);
    let (packet, _) = rig.receive();
    rig.give_back(packet.transaction);
    assert_eq!(rig.transmit(1, &message(&frame(TCP, 5), &[]), &[]), status::SUCCESS, "and sent from there");
    assert_eq!(word(&rig.ask(&words(&[kind::SUBCHANNEL, 1, 9])), 0), kind::INIT_COMPLETE, "but nothing else");
    rig.driver.close(&rig.front);
    rig.arrive(&frame(TCP, 2));
    rig.device.work();
    std::mem::swap(&mut rig.front, &mut second);
    rig.receive();
}

#[test]
fn guest_is_told_to_send_on_all_channels_once_it_has_opened_them() {
    for (version, unit) in [(version::V61, 40), (version::V6, 32), (version::V5, 32)] {
        let mut rig = Rig::open();
        rig.ask(&words(&[kind::INIT, version, version]));
        rig.ask(&words(&[kind::SUBCHANNEL, 1, 2]));
        let offers = rig.driver.offers();
        for (relid, _) in offers {
            assert!(rig.front.receive().is_none(), "not yet");
            rig.driver.open(relid);
            rig.device.work();
        }
        let told = rig.front.receive().unwrap();
        assert_eq!((told.kind, told.transaction, told.payload.len()), (packet::IN_BAND, 0, unit + 64));
        assert_eq!(told.payload[..12], words(&[kind::SEND_INDIRECTION_TABLE, 16, unit as u32]));
        assert_eq!(told.payload[unit..], words(&[0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0]));
        rig.device.work();
        assert!(rig.front.receive().is_none(), "once");
    }
}

#[test]
fn channel_can_be_closed_and_opened_again() {
    let mut rig = Rig::up();
    rig.driver.close(&rig.front);
    rig.device.work();
    rig.front = rig.driver.open(rig.front.relid());
    rig.arrive(&frame(TCP, 1));
    rig.device.work();
    assert!(rig.front.receive().is_none(), "nothing is lent");
    assert_eq!(word(&rig.ask(&words(&[kind::INIT, version::V5, version::V5])), 12), status::SUCCESS);
    rig.lend_receive_buffer();
}

#[test]
fn card_that_is_taken_back_works_until_the_guest_has_let_go() {
    let mut rig = Rig::up();
    rig.device.rescind();
    assert_eq!(rig.transmit(0, &message(&frame(TCP, 5), &[]), &[]), status::SUCCESS);
    assert!(!rig.device.is_let_go());
    rig.driver.close(&rig.front);
    rig.device.work();
    assert!(!rig.device.is_let_go());
    rig.driver.guest.post_relid(vmbus::RELID_RELEASED, rig.front.relid());
    assert!(rig.device.is_let_go());
    rig.driver.offers();
    assert!(rig.driver.guest.connect().is_empty(), "it is not offered again");
}

#[test]
fn ring_that_lies_ends_the_channel_and_not_the_device() {
    let mut rig = Rig::up();
    rig.front.lie(0x3004);
    rig.device.work();
    rig.driver.close(&rig.front);
    rig.device.work();
    rig.front = rig.driver.open(rig.front.relid());
    rig.device.work();
    assert_eq!(word(&rig.ask(&words(&[kind::INIT, version::V61, version::V61])), 12), status::SUCCESS);
}

/// Words as messages have them: types, lengths, offsets.
fn word_of_a_message() -> impl proptest::strategy::Strategy<Value = u32> {
    use proptest::prelude::*;
    prop_oneof![0..200u32, Just(u32::MAX), Just(0x8000_0002), any::<u32>(), Just(oid::RSS_PARAMETERS), Just(oid::CONFIG_PARAMETER)]
}

proptest::proptest! {
    #[test]
    fn card_goes_on_after_any_messages(nvsp in proptest::collection::vec(word_of_a_message(), 0..12), rndis in proptest::collection::vec(word_of_a_message(), 0..64)) {
        let mut rig = Rig::up();
        rig.driver.write(rig.send, &words(&rndis));
        rig.front.in_band(1, &words(&nvsp));
        rig.front.in_band(2, &words(&[kind::SEND_RNDIS_PACKET, CHANNEL_DATA, 0, 4 * rndis.len() as u32]));
        while rig.device.work().more {}
        // Whatever it was told before, and however the answers to that are ordered.
        while rig.front.receive().is_some() {}
        // It may have asked for subchannels, which are offered.
        while rig.driver.guest.next().is_some() {}
        proptest::prop_assert_eq!(word(&rig.ask(&words(&[kind::INIT, version::V61, version::V61])), 12), status::SUCCESS);
        rig.lend_receive_buffer();
    }
}
