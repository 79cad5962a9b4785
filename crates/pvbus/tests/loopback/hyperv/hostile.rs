//! The guest against hosts that lie.

use std::sync::Arc;

use abi::hyperv::ic::{self, Version};
use abi::hyperv::kvp::{self, KEY_SIZE, Record, VALUE_SIZE};
use abi::hyperv::netvsc::{self, InitComplete, ReceiveBufferComplete, RndisPacket};
use abi::hyperv::ring::{Descriptor, TransferPages, TransferRange, control, kind};
use abi::hyperv::rndis;
use abi::hyperv::storvsc::{Packet, Srb, operation};
use abi::hyperv::vmbus::{GpadlCreated, GpadlTorndown, Header, OpenResult, Relid, guid, message};
use proptest::prelude::*;
use pvbus::{Hal, Kind, StoreError, Tree};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::liar::{Liar, RELID, packet, status};
use super::{Rig, SECOND};

const LIE: &str = "the host answers what was not asked; not used any more";

/// A KVP component whose channel is open.
fn kvp() -> (Rig, Arc<Liar>) {
    Rig::with_liar(guid::KVP)
}

impl Rig {
    fn attach(&self) -> Tree<'_> {
        let mut tree = Tree::attach(&self.machine);
        self.poll(&mut tree);
        tree
    }
}

#[test]
fn indices_that_lie_close_the_channel() {
    let size = 4 * 4096;
    for index in [1, 4, size, size + 8, u32::MAX, 1 << 31, 8, 16] {
        let (rig, liar) = kvp();
        let mut tree = rig.attach();
        // Eight bytes, and sixteen, are no packet.
        liar.set_to_guest(control::WRITE_INDEX, index);
        assert_eq!(rig.lines(&mut tree), [format!("kvp: {LIE}")], "{index}");
        assert!(liar.has_heard(message::CLOSE) && liar.has_heard(message::GPADL_TEARDOWN));
        assert_eq!(rig.lines(&mut tree), [""; 0], "once");
    }
    for index in [1, 4, size, u32::MAX] {
        let (rig, liar) = kvp();
        let mut tree = rig.attach();
        liar.put(kind::IN_BAND, 1, &[], &negotiation());
        liar.set_to_host(control::READ_INDEX, index);
        assert_eq!(rig.lines(&mut tree), [format!("kvp: {LIE}")], "{index}");
    }
}

#[test]
fn packet_lengths_that_lie_close_the_channel() {
    for (data_offset8, total_length8) in [(2, 0), (2, 1), (2, 7), (2, u16::MAX), (0, 4), (1, 4), (5, 4), (u16::MAX, 4)] {
        let (rig, liar) = kvp();
        let mut tree = rig.attach();
        let descriptor = Descriptor {
            kind: kind::IN_BAND.into(),
            data_offset8: data_offset8.into(),
            total_length8: total_length8.into(),
            flags: 0.into(),
            transaction: 1.into(),
        };
        liar.put_raw(&[descriptor.as_bytes(), &[0; 40]].concat());
        assert_eq!(rig.lines(&mut tree), [format!("kvp: {LIE}")], "{data_offset8} {total_length8}");
    }
}

#[test]
fn messages_out_of_order_change_nothing() {
    let (rig, liar) = kvp();
    let mut tree = rig.attach();
    let opened = liar.rings();
    for relid in [0, 1, RELID, 2047, 2048, u32::MAX] {
        for status in [0, 1] {
            let (gpadl, open_id, relid) = (0x10000.into(), relid.into(), relid.into());
            let header = Header::new(message::GPADL_CREATED);
            liar.say(GpadlCreated { header, relid, gpadl, status: status.into() }.as_bytes());
            liar.say(GpadlTorndown { header: Header::new(message::GPADL_TORNDOWN), gpadl }.as_bytes());
            liar.say(OpenResult { header: Header::new(message::OPEN_RESULT), relid, open_id, status: status.into() }.as_bytes());
            rig.poll(&mut tree);
        }
        if relid != RELID {
            liar.say(Relid { header: Header::new(message::RESCIND), relid: relid.into() }.as_bytes());
        }
        liar.say(liar.offer(if relid < 2048 { RELID } else { relid }).as_bytes());
        liar.say(Header::new(message::ALL_OFFERS_DELIVERED).as_bytes());
        liar.say(Header::new(message::UNLOAD_RESPONSE).as_bytes());
        assert_eq!(rig.lines(&mut tree), [""; 0], "{relid}");
    }
    assert_eq!(liar.rings(), opened);
    liar.put(kind::IN_BAND, 9, &[], &negotiation());
    rig.poll(&mut tree);
    assert_eq!(liar.take().expect("the channel works").0, 9);
}

#[test]
fn channel_that_is_taken_away_twice_is_released_once() {
    let (rig, liar) = kvp();
    let mut tree = rig.attach();
    for _ in 0..2 {
        liar.say(Relid { header: Header::new(message::RESCIND), relid: RELID.into() }.as_bytes());
    }
    assert_eq!(rig.lines(&mut tree), ["kvp detached"]);
    assert!(liar.has_heard(message::RELID_RELEASED));
    // A new one may have its number.
    liar.say(liar.offer(RELID).as_bytes());
    rig.poll(&mut tree);
    liar.rings();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_message_makes_the_bus_panic(messages in prop::collection::vec((0_u32..30, prop::collection::vec(any::<u8>(), 0..232)), 1..20)) {
        let (rig, liar) = kvp();
        let mut tree = rig.attach();
        for (kind, body) in messages {
            liar.say(&[Header::new(kind).as_bytes(), &body].concat());
            tree.poll(rig.machine.now());
        }
    }

    #[test]
    fn no_packet_makes_a_device_panic(
        class in 0_usize..4,
        packets in prop::collection::vec((5_u16..12, any::<u64>(), prop::collection::vec(any::<u8>(), 0..16), prop::collection::vec(any::<u8>(), 0..120)), 1..20),
    ) {
        let (rig, liar) = Rig::with_liar([guid::KVP, guid::SCSI, guid::NETWORK, guid::VSS][class]);
        let mut tree = rig.attach();
        for (kind, transaction, head, payload) in packets {
            let head = &head[..head.len() / 8 * 8];
            liar.put(kind, transaction % 4, head, &payload);
            tree.poll(rig.machine.now());
            while liar.take().is_some() {}
        }
    }
}

fn negotiation() -> Vec<u8> {
    let versions = [Version::new(3, 0), Version::new(4, 0)];
    packet(ic::kind::NEGOTIATE, &[&[1, 0, 1, 0, 0, 0, 0, 0], versions.as_bytes()].concat())
}

#[test]
fn key_value_pairs_without_end_fill_the_pool_and_no_more() {
    let (rig, liar) = kvp();
    let mut tree = rig.attach();
    let set = |number: u32| {
        let mut record = Record::new_zeroed();
        let key: Vec<u8> = format!("{number:06}\0").encode_utf16().flat_map(u16::to_le_bytes).collect();
        record.key[..key.len()].copy_from_slice(&key);
        // Sizes that lie, and a value without an end.
        (record.value_type, record.key_size, record.value_size) = (1.into(), u32::MAX.into(), u32::MAX.into());
        record.value = [b'x'; VALUE_SIZE];
        record.value[VALUE_SIZE - 4..].fill(0);
        let header = kvp::Header { operation: kvp::operation::SET, pool: kvp::pool::EXTERNAL, pad: [0; 2] };
        packet(ic::kind::KVP, &[header.as_bytes(), record.as_bytes()].concat())
    };
    let mut statuses = Vec::new();
    for number in 0..1100 {
        liar.put(kind::IN_BAND, number.into(), &[], &set(number));
        tree.poll(rig.machine.now());
        let (transaction, answer) = liar.take().expect("an answer");
        assert_eq!(transaction, u64::from(number));
        statuses.push(status(&answer));
    }
    assert!(statuses[..1024].iter().all(|status| *status == 0));
    assert!(statuses[1024..].iter().all(|status| *status == ic::status::FAIL));
    let keys = tree.stores().store(Kind::HyperV).unwrap();
    assert_eq!(keys.list(b"External").unwrap().len(), 1024);
    assert_eq!(keys.read(b"External/000000").unwrap().len(), (VALUE_SIZE / 2 - 2) * '硸'.len_utf8());
}

#[test]
fn key_without_an_end_is_refused() {
    let (rig, liar) = kvp();
    let mut tree = rig.attach();
    for key in [[b'k'; KEY_SIZE], [0; KEY_SIZE]] {
        let mut record = Record::new_zeroed();
        (record.value_type, record.key_size, record.key) = (1.into(), (KEY_SIZE as u32).into(), key);
        let header = kvp::Header { operation: kvp::operation::SET, pool: kvp::pool::EXTERNAL, pad: [0; 2] };
        liar.put(kind::IN_BAND, 1, &[], &packet(ic::kind::KVP, &[header.as_bytes(), record.as_bytes()].concat()));
        tree.poll(rig.machine.now());
        assert_eq!(status(&liar.take().unwrap().1), ic::status::FAIL);
    }
    assert_eq!(tree.stores().store(Kind::HyperV).unwrap().read(b"External/k"), Err(StoreError::NotFound));
}

/// The answer to a packet of storvsc, changed by `change`.
fn completed(packet: &[u8], change: impl FnOnce(&mut Srb)) -> Packet {
    let (mut packet, _) = Packet::read_from_prefix(packet).unwrap();
    packet.operation = operation::COMPLETE_IO.into();
    let mut srb = Srb::read_from_bytes(&packet.body).unwrap();
    change(&mut srb);
    packet.body.copy_from_slice(srb.as_bytes());
    packet
}

#[test]
fn completions_for_unknown_transactions_end_the_controller() {
    for transaction in [0, 2, 3, u64::MAX] {
        let (rig, liar) = Rig::with_liar(guid::SCSI);
        let mut tree = rig.attach();
        let (asked, packet) = liar.take().expect("the first question");
        assert_eq!(asked, 1);
        liar.put(kind::COMPLETION, transaction, &[], completed(&packet, |_| {}).as_bytes());
        assert_eq!(rig.lines(&mut tree), [format!("hvs0: {LIE}")], "{transaction}");
    }
}

#[test]
fn controller_that_speaks_no_version_is_asked_for_each_newest_first() {
    let (rig, liar) = Rig::with_liar(guid::SCSI);
    let mut tree = rig.attach();
    let mut asked = Vec::new();
    while let Some((transaction, bytes)) = liar.take() {
        let mut answer = completed(&bytes, |_| {});
        if bytes[0] == operation::QUERY_PROTOCOL_VERSION as u8 {
            asked.push(u16::from_le_bytes([bytes[12], bytes[13]]));
            answer.status = abi::hyperv::storvsc::status::REVISION_MISMATCH.into();
        }
        liar.put(kind::COMPLETION, transaction, &[], answer.as_bytes());
        let lines = rig.lines(&mut tree);
        assert!(lines.is_empty() || lines == ["hvs0: the host refuses all versions of the protocol"], "{lines:?}");
    }
    assert_eq!(asked, [0x602, 0x600, 0x501]);
}

#[test]
fn more_data_than_was_asked_for_ends_the_controller() {
    let (rig, liar) = Rig::with_liar(guid::SCSI);
    let mut tree = rig.attach();
    // Four questions about the controller have no data; the fifth has.
    for _ in 0..4 {
        let (transaction, packet) = liar.take().unwrap();
        liar.put(kind::COMPLETION, transaction, &[], completed(&packet, |_| {}).as_bytes());
        rig.poll(&mut tree);
    }
    let (transaction, packet) = liar.take().unwrap();
    liar.put(kind::COMPLETION, transaction, &[], completed(&packet, |srb| srb.transfer_length = 0x10000.into()).as_bytes());
    assert_eq!(rig.lines(&mut tree), [format!("hvs0: {LIE}")]);
}

#[test]
fn controller_that_says_nothing_is_waited_for_once() {
    let (rig, liar) = Rig::with_liar(guid::SCSI);
    let mut tree = rig.attach();
    assert!(liar.take().is_some());
    rig.machine.wait_until(rig.machine.now() + 31 * SECOND);
    assert_eq!(rig.lines(&mut tree), ["hvs0: the host does not answer; not used any more"]);
    assert!(liar.has_heard(message::CLOSE));
}

/// What a card says to what its host sends after the receive buffer was agreed on, and whether it has given the host's packet back.
fn card_after(lie: impl FnOnce(&Rig, &Liar)) -> (Vec<String>, bool) {
    let (rig, liar) = Rig::with_liar(guid::NETWORK);
    let mut tree = rig.attach();
    let nvsp = |kind: u32, body: &[u8]| [&kind.to_le_bytes(), body, &[0; 40]].concat();
    let (transaction, _) = liar.take().expect("INIT");
    let complete = InitComplete { negotiated_version: u32::MAX.into(), max_mdl_chain_length: 34.into(), status: 1.into() };
    liar.put(kind::COMPLETION, transaction, &[], &nvsp(netvsc::kind::INIT_COMPLETE, complete.as_bytes()));
    rig.poll(&mut tree);
    let transaction = core::iter::from_fn(|| liar.take()).last().expect("the receive buffer").0;
    let complete = ReceiveBufferComplete {
        status: 1.into(),
        sections: 1.into(),
        offset: 0.into(),
        part_size: 2048.into(),
        parts: 512.into(),
        end_offset: 0x10_0000.into(),
    };
    liar.put(kind::COMPLETION, transaction, &[], &nvsp(netvsc::kind::SEND_RECEIVE_BUFFER_COMPLETE, complete.as_bytes()));
    rig.poll(&mut tree);
    lie(&rig, &liar);
    (rig.lines(&mut tree), core::iter::from_fn(|| liar.take()).any(|(transaction, _)| transaction == TRANSFER))
}

/// Number of the host's packet.
const TRANSFER: u64 = 77;

/// Sends ranges of the receive buffer.
fn transfer(liar: &Liar, set_id: u16, count: u32, ranges: &[(u32, u32)]) {
    let mut head =
        Vec::from(TransferPages { set_id: set_id.into(), sender_owns_set: 0, reserved: 0, range_count: count.into() }.as_bytes());
    for (byte_offset, byte_count) in ranges {
        head.extend(TransferRange { byte_count: (*byte_count).into(), byte_offset: (*byte_offset).into() }.as_bytes());
    }
    let body = RndisPacket { channel: 0.into(), section_index: u32::MAX.into(), section_size: 0.into() };
    liar.put(kind::TRANSFER_PAGES, TRANSFER, &head, &[&107_u32.to_le_bytes(), body.as_bytes()].concat());
}

#[test]
fn ranges_outside_of_the_receive_buffer_end_the_card() {
    let size = 256 * 4096;
    for (set_id, count, ranges) in [
        (0x2409, 1, [(size, 1)].as_slice()),
        (0x2409, 1, &[(size - 4, 8)]),
        (0x2409, 1, &[(u32::MAX, u32::MAX)]),
        (0x2409, 2, &[(0, 64)]),
        (0x2409, u32::MAX, &[(0, 64)]),
        (0x2409, 0, &[]),
        (0xcafe, 1, &[(0, 64)]),
    ] {
        let lines = card_after(|_, liar| transfer(liar, set_id, count, ranges));
        assert_eq!(lines, ([format!("hvn0: {LIE}")].into(), false), "{set_id:x} {count} {ranges:x?}");
    }
}

#[test]
fn rndis_messages_that_point_outside_of_themselves_are_dropped_and_given_back() {
    for (length, offset, value_length) in [(24, 16, 6), (24, 0xffff_fff0, 6), (24, 16, u32::MAX), (7, 0, 0), (u32::MAX, 16, 6), (0, 0, 0)] {
        let lines = card_after(|rig, liar| {
            let complete =
                rndis::QueryComplete { request_id: 3.into(), status: 0.into(), length: value_length.into(), offset: offset.into() };
            let header = rndis::Header { kind: (rndis::message::QUERY | rndis::message::COMPLETION).into(), length: length.into() };
            let (_, buffer) = liar.shared(256);
            rig.machine.write(buffer, &[header.as_bytes(), complete.as_bytes()].concat());
            while liar.take().is_some() {}
            transfer(liar, 0x2409, 1, &[(0, 24)]);
        });
        assert_eq!(lines, (Vec::new(), true), "{length} {offset:x} {value_length}");
    }
}
