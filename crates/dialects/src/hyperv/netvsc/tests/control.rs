//! Objects queried and set, without a channel.

use abi::hyperv::rndis::{self, Header, OFFLOAD_SIZES, Offload, checksum_offload, message, oid, rss, status};
use zerocopy::FromBytes;

use super::super::control::Adapter;
use super::MAC;

fn adapter() -> Adapter {
    Adapter::new(MAC, 4, 1514)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A query's or set's message.
fn request(kind: u32, oid: u32, input: &[u8]) -> Vec<u8> {
    [words(&[kind, 28 + input.len() as u32, 7, oid, input.len() as u32, 20, 0]), input.to_vec()].concat()
}

/// Status and value of the answer to a query.
fn query(adapter: &mut Adapter, oid: u32, input: &[u8]) -> (u32, Vec<u8>) {
    let answer = adapter.answer(&request(message::QUERY, oid, input)).unwrap();
    let (header, body) = Header::read_from_prefix(&answer).unwrap();
    assert_eq!((header.kind.get(), header.length.get() as usize), (0x8000_0004, answer.len()));
    let (complete, _) = rndis::QueryComplete::read_from_prefix(body).unwrap();
    assert_eq!(complete.request_id.get(), 7);
    (complete.status.get(), body[complete.offset.get() as usize..][..complete.length.get() as usize].to_vec())
}

fn set(adapter: &mut Adapter, oid: u32, input: &[u8]) -> u32 {
    let answer = adapter.answer(&request(message::SET, oid, input)).unwrap();
    assert_eq!(answer[..12], words(&[0x8000_0005, 16, 7]));
    u32::from_le_bytes(answer[12..].try_into().unwrap())
}

#[test]
fn initialize_keepalive_reset_and_halt_are_answered_as_they_should() {
    let mut adapter = adapter();
    let answer = adapter.answer(&words(&[message::INITIALIZE, 24, 1, 1, 0, 0x4000])).unwrap();
    assert_eq!(answer[..40], words(&[0x8000_0002, 52, 1, 0, 1, 0, 1, 0, 8, 128 << 10]));
    let answer = adapter.answer(&words(&[message::INITIALIZE, 24, 1, 2, 0, 0x4000])).unwrap();
    assert_eq!(answer[12..16], words(&[status::BAD_VERSION]));
    assert_eq!(adapter.answer(&words(&[message::KEEPALIVE, 12, 9])).unwrap(), words(&[0x8000_0008, 16, 9, 0]));
    assert_eq!(adapter.answer(&words(&[message::RESET, 12, 0])).unwrap(), words(&[0x8000_0006, 16, 0, 1]));
    assert_eq!(adapter.answer(&words(&[message::HALT, 12, 9])), None);
    assert_eq!(adapter.link_status(), words(&[message::INDICATE_STATUS, 20, status::MEDIA_CONNECT, 0, 0]));
}

#[test]
fn every_object_that_is_listed_is_there() {
    let mut adapter = adapter();
    let (_, list) = query(&mut adapter, oid::SUPPORTED_LIST, &[]);
    for oid in list.chunks(4).map(|oid| u32::from_le_bytes(oid.try_into().unwrap())) {
        let only_set = matches!(oid, oid::RSS_PARAMETERS | oid::CONFIG_PARAMETER | oid::MULTICAST_LIST | oid::OFFLOAD_PARAMETERS);
        assert_eq!(query(&mut adapter, oid, &[]).0 == status::SUCCESS, !only_set, "{oid:#x}");
    }
    assert_eq!(query(&mut adapter, oid::PERMANENT_ADDRESS, &[]).1, MAC);
    assert_eq!(query(&mut adapter, oid::MAXIMUM_FRAME_SIZE, &[]).1, words(&[1500]));
    assert_eq!(query(&mut adapter, oid::RSS_CAPABILITIES, &[]).1.len(), 18);
    assert_eq!(query(&mut adapter, 0x1234, &[]), (status::NOT_SUPPORTED, vec![]));
    assert_eq!(set(&mut adapter, oid::PERMANENT_ADDRESS, &MAC), status::NOT_SUPPORTED);
}

#[test]
fn offloads_come_in_the_revision_that_is_asked_for() {
    for (revision, size) in (1u8..).zip(OFFLOAD_SIZES) {
        let (_, value) = query(&mut adapter(), oid::OFFLOAD_CAPABILITIES, &[0xa7, revision, size as u8, 0]);
        assert_eq!((value.len(), &value[..4]), (size, [0xa7, revision, size as u8, 0].as_slice()));
    }
    let (_, value) = query(&mut adapter(), oid::OFFLOAD_CAPABILITIES, &[0xa7, 99, 0, 0]);
    let offload = Offload::read_from_bytes(&value).unwrap();
    assert_eq!((offload.lso_v2.ipv4_encapsulation.get(), offload.lso_v2.ipv6_encapsulation.get()), (2, 2));
    assert_ne!(offload.checksum.ipv4_tx[1].get() & checksum_offload::UDP, 0);
    assert_eq!(offload.rsc, [1, 1]);
}

#[test]
fn guest_says_whether_segments_are_put_together() {
    let mut adapter = adapter();
    // As Linux sends them, and as those did that knew less.
    let parameters = |rsc: [u8; 2]| [[0x80, 3, 28, 0].as_slice(), &[0; 18], &rsc, &[0; 4]].concat();
    for (rsc, coalesces) in [([2, 2], [true; 2]), ([1, 0], [false, true]), ([0, 1], [false; 2]), ([2, 2], [true; 2])] {
        assert_eq!(set(&mut adapter, oid::OFFLOAD_PARAMETERS, &parameters(rsc)), status::SUCCESS);
        assert_eq!(adapter.coalesces, coalesces);
    }
    assert_eq!(set(&mut adapter, oid::OFFLOAD_PARAMETERS, &parameters([0; 2])[..22]), status::SUCCESS);
    assert_eq!(set(&mut adapter, oid::OFFLOAD_PARAMETERS, &parameters([3, 2])), status::INVALID_DATA);
    assert_eq!(adapter.coalesces, [true; 2], "as before");
    adapter.reset();
    assert_eq!(adapter.coalesces, [false; 2]);
}

#[test]
fn filter_says_which_frames_are_received() {
    let mut adapter = adapter();
    let (own, group, all) = ([0x52; 60], [0x33; 60], [0xff; 60]);
    for (filter, wanted) in
        [(0, [false; 3]), (1, [true, false, false]), (4, [false, true, false]), (8, [false, false, true]), (0x20, [true; 3])]
    {
        assert_eq!(set(&mut adapter, oid::CURRENT_PACKET_FILTER, &words(&[filter])), status::SUCCESS);
        assert_eq!([own, group, all].map(|frame| adapter.accepts(&frame)), wanted, "{filter:#x}");
    }
    adapter.reset();
    assert!(!adapter.accepts(&own));
    assert_eq!(set(&mut adapter, oid::CURRENT_PACKET_FILTER, &[1]), status::INVALID_DATA);
}

#[test]
fn flows_go_where_the_table_says() {
    let mut adapter = adapter();
    let parameters = |flags: u16, table: &[u32]| {
        let mut bytes = vec![0x89, 2, 40, 0];
        bytes.extend(flags.to_le_bytes());
        bytes.extend([0; 6]);
        bytes.extend(words(&[4 * table.len() as u32, 28, 0, 0]));
        bytes.extend(words(table));
        bytes
    };
    assert_eq!([0, 1, 2].map(|flow| adapter.queue(flow)), [0; 3]);
    assert_eq!(set(&mut adapter, oid::RSS_PARAMETERS, &parameters(0, &[0, 3, 1])), status::SUCCESS);
    assert_eq!([0, 1, 2, 3].map(|flow| adapter.queue(flow)), [0, 3, 1, 0]);
    for wrong in [parameters(0, &[4]), parameters(0, &[0x100]), parameters(0, &[0; 129]), parameters(0, &[0])[..30].to_vec(), vec![0; 27]] {
        assert_eq!(set(&mut adapter, oid::RSS_PARAMETERS, &wrong), status::INVALID_DATA);
        assert_eq!(adapter.queue(1), 3, "as before");
    }
    assert_eq!(set(&mut adapter, oid::RSS_PARAMETERS, &parameters(rss::DISABLE, &[])), status::SUCCESS);
    assert_eq!(adapter.queue(1), 0);
}

#[test]
fn address_can_be_changed_by_parameter() {
    let mut adapter = adapter();
    let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let parameter = |name: &str, value: &str| {
        let (name, value) = (utf16(name), utf16(value));
        [words(&[20, name.len() as u32, 2, 20 + name.len() as u32, value.len() as u32]), name, value].concat()
    };
    assert_eq!(set(&mut adapter, oid::CONFIG_PARAMETER, &parameter("NetworkAddress", "0200DEADbeef")), status::SUCCESS);
    assert_eq!(query(&mut adapter, oid::CURRENT_ADDRESS, &[]).1, [2, 0, 0xde, 0xad, 0xbe, 0xef]);
    assert_eq!(query(&mut adapter, oid::PERMANENT_ADDRESS, &[]).1, MAC);
    for (name, value) in
        [("Speed", "0200DEADbeef"), ("NetworkAddress", "0300DEADbeef"), ("NetworkAddress", "02"), ("NetworkAddress", "äöüäöü")]
    {
        assert_eq!(set(&mut adapter, oid::CONFIG_PARAMETER, &parameter(name, value)), status::NOT_SUPPORTED);
    }
}

#[test]
fn messages_that_are_cut_or_lie_are_harmless() {
    let mut adapter = adapter();
    let good = request(message::SET, oid::CURRENT_PACKET_FILTER, &words(&[1]));
    for length in 0..good.len() {
        let _ = adapter.answer(&good[..length]);
    }
    for (at, value) in [(16, u32::MAX), (20, u32::MAX), (20, 25), (16, 5)] {
        let mut lie = good.clone();
        lie[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let answer = adapter.answer(&lie).unwrap();
        assert_eq!(answer[12..], words(&[status::INVALID_DATA]));
    }
    assert!(!adapter.accepts(&[0x52; 60]));
    for kind in [0, 9, 0x8000_0002, u32::MAX] {
        assert_eq!(adapter.answer(&words(&[kind, 8, 0, 0, 0, 0, 0, 0])), None);
    }
}
