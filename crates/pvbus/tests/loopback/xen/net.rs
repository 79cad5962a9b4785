//! xnf against Netback, and against backends that lie.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

use abi::virtio::net::{HDR_F_NEEDS_CSUM, HEADER_BYTES, Header};
use abi::xen::io::netif::{RxRequest, RxResponse, TxRequest, TxResponse, rx_flag, tx_flag};
use abi::xen::io::ring::{REQ_PROD, RSP_PROD, SLOTS};
use dialects::network::Network;
use dialects::xen::net::Netback;
use dialects::xen::xenbus::Backend;
use dialects::xen::{Access, Xen};
use pvbus::Tree;
use pvbus::net::{Checksum, NetDevice, NetError, Received};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, IntoBytes};

use super::{HostKeys, Noise, Place, Rig};

const CARD: Place = Place { front: "/local/domain/1/device/vif/0", back: "/local/domain/0/backend/vif/1/0" };
const MAC: (&str, &str) = ("mac", "00:16:3e:00:00:01");

type Packet = (Header, Vec<u8>);

/// A network in memory.
#[derive(Clone, Default)]
struct Wire {
    sent: Arc<Mutex<Vec<Packet>>>,
    arriving: Arc<Mutex<VecDeque<Packet>>>,
    is_full: Arc<Mutex<bool>>,
}

impl Network for Wire {
    fn send(&mut self, packet: &[u8]) -> io::Result<()> {
        if *self.is_full.lock().unwrap() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let (header, frame) = Header::read_from_prefix(packet).unwrap();
        self.sent.lock().unwrap().push((header, frame.to_vec()));
        Ok(())
    }
    fn receive(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        let Some((header, frame)) = self.arriving.lock().unwrap().pop_front() else { return Ok(None) };
        packet[..HEADER_BYTES].copy_from_slice(header.as_bytes());
        packet[HEADER_BYTES..][..frame.len()].copy_from_slice(&frame);
        Ok(Some(HEADER_BYTES + frame.len()))
    }
}

impl Wire {
    /// Frames that were sent, since last asked.
    fn frames(&self) -> Vec<Vec<u8>> {
        self.sent.lock().unwrap().drain(..).map(|(_, frame)| frame).collect()
    }

    fn arrive(&self, frame: &[u8]) {
        self.arriving.lock().unwrap().push_back((Header::default(), frame.to_vec()));
    }
}

impl Rig {
    /// A card with its backend at work.
    fn card(&self, own: &[(&str, &str)]) -> Wire {
        let wire = Wire::default();
        self.plug(CARD, own);
        let driver = Netback::new(Arc::clone(&self.xen), Arc::new(|| {}));
        let mut backend = Backend::new(driver, Arc::new(HostKeys(self.store.host())), CARD.back.into(), CARD.front.into());
        let mut network = wire.clone();
        self.machine.spawn(move || {
            backend.frontend_changed();
            backend.driver().work(Some(&mut network)).unwrap();
        });
        wire
    }
}

fn only_card<'h>(tree: &Tree<'h>) -> Arc<dyn NetDevice + 'h> {
    let cards = tree.cards();
    assert_eq!(cards.len(), 1);
    cards.into_iter().next().unwrap()
}

/// A frame of so many bytes that is not one of IP's.
fn frame(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8).collect()
}

/// Everything that has come.
fn received(card: &dyn NetDevice) -> Vec<(Vec<u8>, Checksum)> {
    let mut buffer = vec![0; 65536];
    let mut frames = Vec::new();
    while let Some(Received { length, checksum }) = card.receive(&mut buffer).unwrap() {
        frames.push((buffer[..length].to_vec(), checksum));
    }
    frames
}

#[test]
fn card_connects_with_its_address_and_an_event_channel_for_each_direction() {
    let rig = Rig::new();
    rig.card(&[MAC]);
    let mut tree = Tree::attach(&rig.machine);
    assert_eq!(rig.lines(&mut tree), ["xnf0 at xen0: address 00:16:3e:00:00:01"]);
    let card = only_card(&tree);
    assert_eq!((card.name(), card.mac(), card.mtu()), ("xnf0", [0, 0x16, 0x3e, 0, 0, 1], 1500));
    assert!(card.takes_blank_checksums());
    assert_ne!(rig.front(CARD, "event-channel-tx"), rig.front(CARD, "event-channel-rx"));
    assert_eq!(rig.front(CARD, "state"), "4");
}

#[test]
fn frames_of_any_length_go_both_ways() {
    let rig = Rig::new();
    let wire = rig.card(&[MAC, ("mtu", "65517")]);
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let card = only_card(&tree);
    for length in [14, 60, 1514, 4095, 4096, 4097, 9018, 65535] {
        assert_eq!(card.send(&frame(length), Checksum::Complete), Ok(true), "{length}");
        wire.arrive(&frame(length));
        rig.machine.let_others_run();
        assert_eq!(wire.frames(), [frame(length)], "{length}");
        assert_eq!(received(&*card), [(frame(length), Checksum::Complete)], "{length}");
    }
    for length in [0, 13, 65536] {
        assert_eq!(card.send(&frame(length), Checksum::Complete), Err(NetError::Length), "{length}");
    }
}

#[test]
fn thousands_of_frames_keep_their_order() {
    let rig = Rig::new();
    let wire = rig.card(&[MAC]);
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let card = only_card(&tree);
    let numbered = |number: usize| [&frame(100), &number.to_be_bytes()[..]].concat();
    let (mut sent, mut came) = (Vec::new(), Vec::new());
    for number in 0..3000 {
        while !card.send(&numbered(number), Checksum::Complete).unwrap() {
            rig.machine.let_others_run();
            sent.extend(wire.frames());
        }
        wire.arrive(&numbered(number));
        if number % 50 == 0 {
            rig.machine.let_others_run();
            came.extend(received(&*card).into_iter().map(|(frame, _)| frame));
        }
    }
    for _ in 0..100 {
        rig.machine.let_others_run();
        came.extend(received(&*card).into_iter().map(|(frame, _)| frame));
    }
    sent.extend(wire.frames());
    let wanted: Vec<_> = (0..3000).map(numbered).collect();
    assert!(sent == wanted && came == wanted, "{} {}", sent.len(), came.len());
}

#[test]
fn network_that_takes_nothing_makes_the_sender_wait() {
    let rig = Rig::new();
    let wire = rig.card(&[MAC]);
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let card = only_card(&tree);
    *wire.is_full.lock().unwrap() = true;
    let taken = (0..1000).take_while(|_| {
        rig.machine.let_others_run();
        card.send(&frame(60), Checksum::Complete).unwrap()
    });
    let taken = taken.count();
    assert!((32..=64).contains(&taken), "{taken}");
    *wire.is_full.lock().unwrap() = false;
    for _ in 0..4 {
        rig.machine.let_others_run();
    }
    assert_eq!(wire.frames().len(), taken);
    assert_eq!(card.send(&frame(60), Checksum::Complete), Ok(true));
}

/// UDP over IPv4 whose checksum is the sum of the pseudo header only, and whole.
fn udp() -> (Vec<u8>, Vec<u8>) {
    let mut blank = vec![0; 12];
    blank.extend([8, 0, 0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    blank.extend([0, 7, 0, 9, 0, 12, 0x14, 0x20, b'a', b'b', b'c', b'd']);
    let mut whole = blank.clone();
    pvbus::net::checksum::complete(&mut whole);
    assert_ne!(blank, whole);
    (blank, whole)
}

#[test]
fn blank_checksums_are_left_to_the_hosts_network() {
    let rig = Rig::new();
    let wire = rig.card(&[MAC]);
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let (blank, _) = udp();
    only_card(&tree).send(&blank, Checksum::Blank).unwrap();
    rig.machine.let_others_run();
    let (header, sent) = wire.sent.lock().unwrap().pop().unwrap();
    assert_eq!((header.flags, sent), (HDR_F_NEEDS_CSUM, blank));
}

#[test]
fn received_frames_say_what_is_known_of_their_checksum() {
    let rig = Rig::new();
    let wire = rig.card(&[MAC]);
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    let (blank, whole) = udp();
    wire.arriving.lock().unwrap().push_back((Header { flags: HDR_F_NEEDS_CSUM, ..Header::default() }, blank.clone()));
    wire.arrive(&whole);
    rig.machine.let_others_run();
    assert_eq!(received(&*only_card(&tree)), [(blank, Checksum::Blank), (whole, Checksum::Complete)]);
}

#[test]
fn frame_longer_than_the_buffer_is_lost_alone() {
    let rig = Rig::new();
    let wire = rig.card(&[MAC, ("mtu", "9000")]);
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    for length in [9000, 5000, 60] {
        wire.arrive(&frame(length));
    }
    rig.machine.let_others_run();
    let mut buffer = [0; 100];
    let card = only_card(&tree);
    assert_eq!(card.receive(&mut buffer), Ok(Some(Received { length: 60, checksum: Checksum::Complete })));
    assert_eq!((&buffer[..60], card.receive(&mut [])), (&frame(60)[..], Ok(None)));
}

#[test]
fn cards_come_and_go_while_the_machine_runs_and_leave_nothing() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    for round in 0..3 {
        let wire = rig.card(&[MAC]);
        assert_eq!(rig.lines(&mut tree), [format!("xnf{round} at xen0: address 00:16:3e:00:00:01")]);
        let card = only_card(&tree);
        card.send(&frame(60), Checksum::Complete).unwrap();
        rig.machine.let_others_run();
        assert_eq!(wire.frames().len(), 1);
        rig.machine.end_latest_thread();
        rig.unplug(CARD);
        assert_eq!(rig.lines(&mut tree), [format!("xnf{round} detached")]);
        assert!(tree.cards().is_empty());
        assert_eq!(card.send(&frame(60), Checksum::Complete), Err(NetError::Gone));
        assert_eq!(card.receive(&mut [0; 2000]), Err(NetError::Gone));
        assert_eq!(rig.machine.pages_in_use(), 2, "the shared info and the grants");
    }
}

#[test]
fn backend_that_closes_ends_the_card() {
    let rig = Rig::new();
    rig.card(&[MAC]);
    let mut tree = Tree::attach(&rig.machine);
    rig.poll(&mut tree);
    rig.machine.end_latest_thread();
    rig.back(CARD, "state", "5");
    assert_eq!(rig.lines(&mut tree), ["xnf0 at xen0: its backend closes"]);
    assert_eq!((rig.front(CARD, "state").as_str(), rig.machine.pages_in_use()), ("6", 2));
}

#[test]
fn directories_that_make_no_sense_end_the_device_with_a_reason() {
    for (own, offers, reason) in [
        (&[MAC][..], &[][..], "the backend has no feature-rx-copy"),
        (&[], &["feature-rx-copy"], "the device's mac makes no sense"),
        (&[("mac", "00:16:3e:00:00")], &["feature-rx-copy"], "the device's mac makes no sense"),
        (&[("mac", "00:16:3e:00:00:01:02")], &["feature-rx-copy"], "the device's mac makes no sense"),
        (&[("mac", "00:16:3e:00:00:+1")], &["feature-rx-copy"], "the device's mac makes no sense"),
        (&[MAC, ("mtu", "67")], &["feature-rx-copy"], "the device's mtu makes no sense"),
        (&[MAC, ("mtu", "65518")], &["feature-rx-copy"], "the device's mtu makes no sense"),
    ] {
        let rig = Rig::new();
        let mut tree = Tree::attach(&rig.machine);
        rig.plug(CARD, own);
        offers.iter().for_each(|offer| rig.back(CARD, offer, "1"));
        rig.back(CARD, "state", "2");
        assert_eq!(rig.lines(&mut tree), [format!("xnf0 at xen0: {reason}")]);
        assert_eq!((rig.front(CARD, "state").as_str(), rig.machine.pages_in_use()), ("5", 1), "the shared info");
        rig.back(CARD, "state", "6");
        assert_eq!(rig.lines(&mut tree), [""; 0]);
        assert_eq!(rig.front(CARD, "state"), "6", "both have closed");
    }
}

/// A backend that is the test, with the pages of both rings.
struct Liar {
    xen: Arc<Xen>,
    tx: u64,
    rx: u64,
}

impl Liar {
    /// The request in a slot of the receive ring.
    fn request(&self, slot: u64) -> RxRequest {
        self.xen.memory().read_obj::<[u8; 8]>(GuestAddress(self.rx + SLOTS + slot * 8)).map(|bytes| zerocopy::transmute!(bytes)).unwrap()
    }

    /// Answers slots of the receive ring, from the first on, and shows `shown` answers.
    fn receive(&self, responses: &[(u16, u16, u16, i16)], shown: u32) {
        for (slot, &(id, offset, flags, status)) in (0..).zip(responses) {
            let response = RxResponse { id: id.into(), offset: offset.into(), flags: flags.into(), status: status.cast_unsigned().into() };
            self.xen.memory().write_slice(response.as_bytes(), GuestAddress(self.rx + SLOTS + slot * 8)).unwrap();
        }
        self.xen.memory().write_obj(shown, GuestAddress(self.rx + RSP_PROD)).unwrap();
    }

    /// The same of the transmit ring.
    fn transmit(&self, ids: &[u16], shown: u32) {
        for (slot, &id) in (0..).zip(ids) {
            let response = TxResponse { id: id.into(), status: 0.into() };
            self.xen.memory().write_slice(response.as_bytes(), GuestAddress(self.tx + SLOTS + slot * 12)).unwrap();
        }
        self.xen.memory().write_obj(shown, GuestAddress(self.tx + RSP_PROD)).unwrap();
    }
}

impl Rig {
    /// A card that the test is the backend of.
    fn card_by_hand<'h>(&'h self, tree: &mut Tree<'h>) -> (Arc<dyn NetDevice + 'h>, Liar) {
        self.plug(CARD, &[MAC]);
        self.back(CARD, "feature-rx-copy", "1");
        self.back(CARD, "feature-sg", "1");
        self.back(CARD, "state", "2");
        self.poll(tree);
        self.back(CARD, "state", "4");
        self.poll(tree);
        let map = |key: &str| self.xen.map(self.front(CARD, key).parse().unwrap(), Access::Write).unwrap();
        (only_card(tree), Liar { xen: Arc::clone(&self.xen), tx: map("tx-ring-ref"), rx: map("rx-ring-ref") })
    }
}

/// Connects a card by hand and lets the test do the backend's part.
fn against(test: impl FnOnce(&Liar, &dyn NetDevice)) {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    let (card, liar) = rig.card_by_hand(&mut tree);
    test(&liar, &*card);
}

/// What a card says to `responses`, and afterwards.
fn answers(responses: &[(u16, u16, u16, i16)], shown: u32) -> [Result<Option<usize>, NetError>; 2] {
    let mut answers = [Ok(None); 2];
    against(|liar, card| {
        liar.receive(responses, shown);
        answers = [(); 2].map(|()| card.receive(&mut [0; 70000]).map(|frame| frame.map(|frame| frame.length)));
    });
    answers
}

const BROKEN: [Result<Option<usize>, NetError>; 2] = [Err(NetError::Broken), Err(NetError::Gone)];

#[test]
fn receive_index_that_lies_ends_the_card() {
    for shown in [65, 256, 257, u32::MAX, 1 << 31] {
        assert_eq!(answers(&[], shown), BROKEN, "{shown}");
    }
}

#[test]
fn received_bytes_outside_of_the_page_end_the_card() {
    for (offset, status) in [(4096, 1), (1, 4096), (u16::MAX, 0), (0, i16::MAX), (4000, 97)] {
        assert_eq!(answers(&[(0, offset, 0, status)], 1), BROKEN, "{offset} {status}");
    }
    assert_eq!(answers(&[(0, 4000, 0, 96)], 1), [Ok(Some(96)), Ok(None)]);
}

#[test]
fn receive_answer_to_another_request_ends_the_card() {
    assert_eq!(answers(&[(1, 0, 0, 60)], 1), BROKEN);
    assert_eq!(answers(&[(0, 0, 0, 60), (0, 0, 0, 60)], 2), [Ok(Some(60)), Err(NetError::Broken)]);
}

#[test]
fn errors_of_the_backend_and_frames_that_are_none_are_lost_alone() {
    let good = (1, 0, 0, 60);
    for bad in [(0, 0, 0, -1), (0, 0, 0, i16::MIN), (0, 0, 0, 0), (0, 0, 0, 13)] {
        assert_eq!(answers(&[bad, good], 2), [Ok(Some(60)), Ok(None)], "{bad:?}");
    }
    // More is announced than comes.
    assert_eq!(answers(&[(0, 0, rx_flag::MORE_DATA, 60)], 1), [Ok(None), Ok(None)]);
    // A large frame that is to be cut, which was not asked for: its extra has a slot.
    let extra = (1, 0, 0, 0);
    assert_eq!(answers(&[(0, 0, rx_flag::EXTRA_INFO, 60), extra, (2, 0, 0, 61)], 3), [Ok(Some(61)), Ok(None)]);
}

#[test]
fn ring_full_of_nothing_is_not_looked_at_for_ever() {
    let nothing: Vec<_> = (0..64).map(|id| (id, 0, 0, 0)).collect();
    assert_eq!(answers(&nothing, 64), BROKEN);
    let endless: Vec<_> = (0..64).map(|id| (id, 0, rx_flag::MORE_DATA, 4096)).collect();
    assert_eq!(answers(&endless, 64), [Ok(None), Ok(None)]);
}

#[test]
fn transmit_answers_that_lie_end_the_card() {
    for (ids, shown) in [(&[][..], 2), (&[1], 1), (&[64], 1), (&[u16::MAX], 1), (&[], u32::MAX)] {
        against(|liar, card| {
            card.send(&frame(60), Checksum::Complete).unwrap();
            liar.transmit(ids, shown);
            assert_eq!(card.send(&frame(60), Checksum::Complete), Err(NetError::Broken), "{ids:?} {shown}");
            assert_eq!(card.send(&frame(60), Checksum::Complete), Err(NetError::Gone));
        });
    }
    // The same page twice.
    against(|liar, card| {
        card.send(&frame(60), Checksum::Complete).unwrap();
        card.send(&frame(60), Checksum::Complete).unwrap();
        liar.transmit(&[0, 0], 2);
        assert_eq!(card.send(&frame(60), Checksum::Complete), Err(NetError::Broken));
    });
}

#[test]
fn long_frame_is_slots_of_a_page_with_the_whole_length_in_the_first() {
    against(|liar, card| {
        card.send(&frame(1514), Checksum::Verified).unwrap();
        let slot = |slot: u64| -> TxRequest {
            let bytes: [u8; 12] = liar.xen.memory().read_obj(GuestAddress(liar.tx + SLOTS + slot * 12)).unwrap();
            zerocopy::transmute!(bytes)
        };
        assert_eq!((slot(0).size.get(), slot(0).flags.get()), (1514, tx_flag::DATA_VALIDATED));
        assert_eq!(liar.xen.memory().read_obj::<u32>(GuestAddress(liar.tx + REQ_PROD)).unwrap(), 1);
        assert_eq!(liar.request(63).id.get(), 63, "the last of the buffers");
    });
}

#[test]
fn states_that_jump_connect_nothing() {
    for states in [&["4"][..], &["7", "8", "9", "x", "4294967300", "4"], &["3", "1", "0"]] {
        let rig = Rig::new();
        let mut tree = Tree::attach(&rig.machine);
        rig.plug(CARD, &[MAC]);
        for state in states {
            rig.back(CARD, "state", state);
            assert_eq!(rig.poll(&mut tree), [], "{states:?}");
        }
        assert_eq!(rig.front(CARD, "state"), "1");
        assert!(tree.cards().is_empty());
    }
}

#[test]
fn noise_in_the_rings_ends_the_card_at_worst() {
    let rig = Rig::new();
    let mut tree = Tree::attach(&rig.machine);
    let mut noise = Noise(1);
    let mut ends = 0;
    for _ in 0..200 {
        let (card, liar) = rig.card_by_hand(&mut tree);
        for _ in 0..20 {
            let ring = [liar.tx, liar.rx][noise.below(2)];
            noise.write(&rig.xen, ring);
            // A kernel goes on with a card until it is gone.
            let sent = card.send(&frame(14 + noise.below(1500)), Checksum::Complete);
            let received = card.receive(&mut vec![0; noise.below(70000)]);
            if received == Err(NetError::Gone) {
                assert!(sent.is_err());
                ends += 1;
                break;
            }
        }
        for key in ["tx-ring-ref", "rx-ring-ref"] {
            rig.xen.unmap(rig.front(CARD, key).parse().unwrap(), Access::Write);
        }
        rig.unplug(CARD);
        rig.poll(&mut tree);
        assert_eq!(rig.machine.pages_in_use(), 2);
    }
    assert!((100..200).contains(&ends), "{ends} cards have ended: the noise is not what it should be");
}
