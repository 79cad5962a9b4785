//! A frontend of ours, honest and not, against Netback; a wire in memory on the other side.

use abi::virtio::net::{HDR_F_DATA_VALID, HDR_F_NEEDS_CSUM, Header};
use abi::xen::grant_table::flag;
use abi::xen::io::netif::{Extra, RxRequest, RxResponse, TxRequest, TxResponse, extra, rx_flag, status, tx_flag};
use abi::xen::io::xenbus::state;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, IntoBytes};

use super::super::tests::{FrontRing, Guest, Tree};
use super::super::xenbus::Backend;
use super::*;
use crate::network::testing::MemoryWire;

const BACK: &str = "/local/domain/0/backend/vif/1/0";
const FRONT: &str = "/local/domain/1/device/vif/0";

struct Rig {
    guest: Guest,
    backend: Backend<Netback>,
    wire: MemoryWire,
    tx: FrontRing,
    rx: FrontRing,
}

impl Rig {
    fn connected() -> Rig {
        let guest = Guest::running();
        let tree = Arc::new(Tree::default());
        let driver = Netback::new(guest.xen.clone(), Arc::new(|| {}));
        let mut backend = Backend::new(driver, tree.clone(), BACK.into(), FRONT.into());
        let (tx, rx) = (FrontRing::new(&guest, 12, 256), FrontRing::new(&guest, 8, 256));
        tree.set(&format!("{FRONT}/state"), state::INITIALISING);
        backend.frontend_changed();
        assert_eq!(tree.get(&format!("{BACK}/feature-rx-copy")), "1");
        tree.set(&format!("{FRONT}/tx-ring-ref"), guest.grant(tx.page, 0));
        tree.set(&format!("{FRONT}/rx-ring-ref"), guest.grant(rx.page, 0));
        tree.set(&format!("{FRONT}/event-channel-tx"), guest.port());
        tree.set(&format!("{FRONT}/event-channel-rx"), guest.port());
        for name in ["request-rx-copy", "feature-sg", "feature-gso-tcpv4"] {
            tree.set(&format!("{FRONT}/{name}"), 1);
        }
        tree.set(&format!("{FRONT}/state"), state::CONNECTED);
        backend.frontend_changed();
        assert_eq!(tree.get(&format!("{BACK}/state")), state::CONNECTED.to_string());
        Rig { guest, backend, wire: MemoryWire::default(), tx, rx }
    }

    fn work(&mut self) -> Worked {
        self.backend.driver().work(Some(&mut self.wire)).unwrap()
    }

    /// A transmit slot with `bytes` at `offset` of a page.
    fn slot(&self, bytes: &[u8], offset: u16, flags: u16, size: u16) -> TxRequest {
        let page = self.guest.page();
        self.guest.memory.write_slice(bytes, GuestAddress(page + u64::from(offset))).unwrap();
        let gref = self.guest.grant(page, flag::READONLY);
        TxRequest { gref: gref.into(), offset: offset.into(), flags: flags.into(), id: 5.into(), size: size.into() }
    }

    fn statuses(&mut self) -> Vec<i16> {
        let mut all = Vec::new();
        while let Some(bytes) = self.tx.pop::<4>(&self.guest) {
            all.push(TxResponse::read_from_bytes(&bytes).unwrap().status.get().cast_signed());
        }
        all
    }

    fn offer_buffers(&mut self, count: u16) -> Vec<u64> {
        let mut pages = Vec::new();
        for id in 0..count {
            let page = self.guest.page();
            let request = RxRequest { id: id.into(), pad: 0.into(), gref: self.guest.grant(page, 0).into() };
            self.rx.push(&self.guest, request.as_bytes());
            pages.push(page);
        }
        pages
    }

    fn received(&mut self) -> Vec<RxResponse> {
        let mut all = Vec::new();
        while let Some(bytes) = self.rx.pop::<8>(&self.guest) {
            all.push(RxResponse::read_from_bytes(&bytes).unwrap());
        }
        all
    }
}

/// An Ethernet frame with IPv4, UDP and "hello", its checksum blank: the field has the pseudo header's sum.
fn udp() -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([8, 0, 0x45, 0, 0, 33, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0, 1, 0, 2, 0, 13]);
    let pseudo: u16 = 0x0a00 + 1 + 0x0a00 + 2 + 17 + 13;
    frame.extend(pseudo.to_be_bytes());
    frame.extend(b"hello");
    frame
}

#[test]
fn packet_of_several_slots_is_put_together() {
    let mut rig = Rig::connected();
    let frame: Vec<u8> = (0..3000u32).map(|n| n as u8).collect();
    for request in [
        rig.slot(&frame[..100], 7, tx_flag::MORE_DATA, 3000),
        rig.slot(&frame[100..1000], 0, tx_flag::MORE_DATA, 900),
        rig.slot(&frame[1000..], 2096, 0, 2000),
    ] {
        rig.tx.push(&rig.guest, request.as_bytes());
    }
    rig.work();
    assert_eq!(rig.wire.sent[0][12..], frame);
    assert_eq!(rig.wire.sent[0][..12], [0; 12], "no offloads, no header");
    assert_eq!(rig.statuses(), [status::OKAY; 3]);
}

#[test]
fn blank_checksum_is_left_to_the_network() {
    let frame = udp();
    let mut rig = Rig::connected();
    let request = rig.slot(&frame, 0, tx_flag::CSUM_BLANK, frame.len() as u16);
    rig.tx.push(&rig.guest, request.as_bytes());
    rig.work();
    let (header, rest) = Header::read_from_prefix(&rig.wire.sent[0]).unwrap();
    assert_eq!((header.flags, header.csum_start.get(), header.csum_offset.get()), (HDR_F_NEEDS_CSUM, 34, 6));
    assert_eq!(rest, frame);
}

#[test]
fn large_packet_says_how_to_be_cut() {
    let mut frame = udp();
    frame[23] = 6;
    frame.resize(2000, 0);
    frame[34 + 12] = 0x50;
    let info = Extra { kind: extra::GSO, gso_type: extra::GSO_TCPV4, gso_size: 1448.into(), ..Extra::default() };
    // Only what has a checksum to be made can be cut.
    for (blank, answer) in [(tx_flag::CSUM_BLANK, status::OKAY), (0, status::ERROR)] {
        let mut rig = Rig::connected();
        let request = rig.slot(&frame, 0, blank | tx_flag::EXTRA_INFO, 2000);
        rig.tx.push(&rig.guest, request.as_bytes());
        rig.tx.push(&rig.guest, info.as_bytes());
        rig.work();
        assert_eq!(rig.wire.sent.len(), usize::from(answer == status::OKAY));
        assert_eq!(rig.statuses(), [answer, status::NULL]);
        if let Some(packet) = rig.wire.sent.first() {
            let (header, _) = Header::read_from_prefix(packet).unwrap();
            assert_eq!((header.gso_type, header.gso_size.get(), header.hdr_len.get()), (1, 1448, 54));
        }
    }
}

#[test]
fn slots_that_make_no_sense_are_answered_and_go_nowhere() {
    let mut rig = Rig::connected();
    let frame = [1; 100];
    let good = rig.slot(&frame, 0, 0, 100);
    let cases = [
        vec![TxRequest { size: 13.into(), ..good }],
        vec![TxRequest { offset: 4000.into(), ..good }],
        vec![TxRequest { offset: u16::MAX.into(), size: u16::MAX.into(), ..good }],
        vec![TxRequest { gref: 400.into(), ..good }],
        vec![TxRequest { flags: tx_flag::MORE_DATA.into(), ..good }],
        vec![TxRequest { flags: tx_flag::MORE_DATA.into(), ..good }, TxRequest { size: 101.into(), ..good }],
        vec![TxRequest { flags: tx_flag::EXTRA_INFO.into(), ..good }],
        [vec![TxRequest { flags: tx_flag::MORE_DATA.into(), size: 1.into(), ..good }; 30], vec![good]].concat(),
    ];
    for case in cases {
        case.iter().for_each(|request| rig.tx.push(&rig.guest, request.as_bytes()));
        rig.work();
        let statuses = rig.statuses();
        assert_eq!(statuses.len(), case.len(), "{case:?}");
        assert!(statuses.iter().all(|status| *status == status::ERROR), "{case:?}: {statuses:?}");
    }
    assert!(rig.wire.sent.is_empty());
    rig.tx.push(&rig.guest, good.as_bytes());
    rig.work();
    assert_eq!(rig.wire.sent.len(), 1, "and it goes on");
}

#[test]
fn packet_waits_for_a_network_that_is_full() {
    let mut rig = Rig::connected();
    rig.wire.is_full = true;
    let request = rig.slot(&[1; 60], 0, 0, 60);
    rig.tx.push(&rig.guest, request.as_bytes());
    assert!(rig.work().blocked);
    assert_eq!(rig.statuses(), [0i16; 0]);
    rig.wire.is_full = false;
    assert!(!rig.work().blocked);
    assert_eq!((rig.wire.sent.len(), rig.statuses()), (1, vec![status::OKAY]));
}

#[test]
fn received_packet_takes_the_buffers_it_needs() {
    let mut rig = Rig::connected();
    let pages = rig.offer_buffers(3);
    let frame: Vec<u8> = (0..5000u32).map(|n| (n / 7) as u8).collect();
    let header = Header { flags: HDR_F_NEEDS_CSUM, gso_type: 1, gso_size: 1448.into(), ..Header::default() };
    rig.wire.arriving.push_back([header.as_bytes(), &frame].concat());
    rig.work();
    let responses = rig.received();
    let first = rx_flag::CSUM_BLANK | rx_flag::DATA_VALIDATED | rx_flag::MORE_DATA | rx_flag::EXTRA_INFO;
    assert_eq!((responses[0].id.get(), responses[0].status.get(), responses[0].flags.get()), (0, 4096, first));
    let info = Extra::read_from_bytes(responses[1].as_bytes()).unwrap();
    assert_eq!((info.kind, info.gso_size.get()), (extra::GSO, 1448));
    assert_eq!((responses[2].id.get(), responses[2].status.get(), responses[2].flags.get()), (2, 904, 0));
    let mut bytes = vec![0; 904];
    rig.guest.memory.read_slice(&mut bytes, GuestAddress(pages[2])).unwrap();
    assert_eq!(bytes, frame[4096..]);
}

#[test]
fn checksum_that_the_network_knows_to_be_right_is_called_so() {
    let mut rig = Rig::connected();
    rig.offer_buffers(2);
    for flags in [HDR_F_DATA_VALID, 0] {
        rig.wire.arriving.push_back([Header { flags, ..Header::default() }.as_bytes(), &udp()].concat());
    }
    rig.work();
    let flags: Vec<u16> = rig.received().iter().map(|response| response.flags.get()).collect();
    assert_eq!(flags, [rx_flag::DATA_VALIDATED, 0]);
}

#[test]
fn received_packet_waits_for_buffers() {
    let mut rig = Rig::connected();
    rig.wire.arriving.push_back(vec![0; 12 + 5000]);
    assert_eq!(rig.work(), Worked::default(), "no room, so that the network is left alone");
    rig.offer_buffers(1);
    assert!(!rig.work().has_room);
    rig.offer_buffers(1);
    assert!(rig.work().has_room);
    assert_eq!(rig.received().len(), 2);
}

#[test]
fn buffer_that_is_not_granted_is_an_error_of_its_own() {
    let mut rig = Rig::connected();
    rig.rx.push(&rig.guest, RxRequest { id: 9.into(), pad: 0.into(), gref: 400.into() }.as_bytes());
    rig.wire.arriving.push_back(vec![0; 12 + 60]);
    rig.work();
    assert_eq!(rig.received()[0].status.get().cast_signed(), status::ERROR);
}

#[test]
fn ring_index_that_lies_ends_the_device() {
    for receive in [true, false] {
        let mut rig = Rig::connected();
        let page = if receive { rig.rx.page } else { rig.tx.page };
        rig.guest.put_u32(page, 257);
        rig.wire.arriving.push_back(vec![0; 12 + 60]);
        assert!(matches!(rig.backend.driver().work(Some(&mut rig.wire)), Err(NetError::Ring(_))));
    }
}

#[test]
fn frontend_that_flips_pages_is_refused() {
    let guest = Guest::running();
    let tree = Arc::new(Tree::default());
    let driver = Netback::new(guest.xen.clone(), Arc::new(|| {}));
    let mut backend = Backend::new(driver, tree.clone(), BACK.into(), FRONT.into());
    for new in [state::INITIALISING, state::CONNECTED] {
        tree.set(&format!("{FRONT}/state"), new);
        backend.frontend_changed();
    }
    assert_eq!(tree.get(&format!("{BACK}/state")), state::CLOSING.to_string());
}
