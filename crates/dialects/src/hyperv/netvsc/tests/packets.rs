//! RNDIS packets and the host's, without a channel.

use abi::hyperv::rndis::{self, HEADER_SIZE, PacketInfo, checksum as fact, info, lso};
use abi::virtio::net::{HDR_F_NEEDS_CSUM, HEADER_BYTES, Header};
use zerocopy::{FromBytes, IntoBytes};

use super::super::packet::{unwrap, wrap};
use super::{TCP, frame, message};
use crate::network::{Abilities, checksum};

fn fact(kind: u32, value: u32) -> Vec<u8> {
    let fact = PacketInfo { size: 16.into(), kind: kind.into(), offset: 12.into() };
    [fact.as_bytes(), &value.to_le_bytes()].concat()
}

/// What a network gets of a message, as header and frame.
fn sent(message: &[u8], offloads: bool) -> Option<(Header, Vec<u8>)> {
    let mut buffer = [[0xee; 20].as_slice(), message].concat();
    let range = 20..buffer.len();
    let packet = unwrap(&mut buffer, range, Abilities { offloads, long_packets: false })?;
    let (header, frame) = Header::read_from_prefix(&buffer[packet]).unwrap();
    Some((header, frame.to_vec()))
}

fn is_right(frame: &[u8]) -> bool {
    checksum::is_right(frame, checksum::place(frame).unwrap())
}

#[test]
fn frame_is_what_the_offsets_say() {
    let frame = frame(TCP, 40);
    let (header, got) = sent(&message(&frame, &[]), true).unwrap();
    assert_eq!((header.as_bytes(), got), ([0; HEADER_BYTES].as_slice(), frame));
}

#[test]
fn checksums_are_made_here_or_left_to_the_network() {
    for (protocol, bit) in [(TCP, fact::TCP), (17, fact::UDP)] {
        let frame = frame(protocol, 41);
        let facts = fact(info::CHECKSUM, fact::IPV4 | fact::IP_HEADER | bit | 34 << 16);
        let (header, got) = sent(&message(&frame, &facts), false).unwrap();
        assert_eq!(header.flags, 0);
        assert!(is_right(&got));
        let (header, mut got) = sent(&message(&frame, &facts), true).unwrap();
        assert_eq!((header.flags, header.csum_start.get()), (HDR_F_NEEDS_CSUM, 34));
        let place = checksum::place(&got).unwrap();
        checksum::complete(&mut got, place);
        assert!(is_right(&got), "what is left is the pseudo header");
    }
}

#[test]
fn segments_are_for_networks_that_cut() {
    let mut frame = frame(TCP, 4000);
    // As Linux leaves it: no length, no checksum.
    frame[16..18].fill(0);
    let facts = fact(info::LSO, 1448 | 34 << 20 | lso::V2);
    let (header, got) = sent(&message(&frame, &facts), true).unwrap();
    assert_eq!((header.gso_type, header.gso_size.get(), header.hdr_len.get(), header.flags), (1, 1448, 54, HDR_F_NEEDS_CSUM));
    assert_eq!(usize::from(u16::from_be_bytes([got[16], got[17]])), frame.len() - 14);
    assert!(sent(&message(&frame, &facts), false).is_none());
    assert!(sent(&message(&frame, &fact(info::LSO, 1448)), true).is_none(), "version 1");
    assert!(sent(&message(&frame, &fact(info::LSO, lso::V2)), true).is_none(), "segments of nothing");
}

#[test]
fn packets_are_whole_for_networks_that_take_them_so() {
    let mut frame = frame(TCP, 4000);
    frame[16..18].fill(0);
    let mut buffer = message(&frame, &fact(info::LSO, 1448 | 34 << 20 | lso::V2));
    let range = 0..buffer.len();
    let packet = unwrap(&mut buffer, range, Abilities { offloads: false, long_packets: true }).unwrap();
    let (header, got) = buffer[packet].split_at(HEADER_BYTES);
    assert_eq!((header, got.len()), ([0; HEADER_BYTES].as_slice(), frame.len()));
    assert!(is_right(got));
}

#[test]
fn tag_goes_into_the_frame_and_out_of_it() {
    let plain = frame(TCP, 40);
    let (_, tagged) = sent(&message(&plain, &fact(info::VLAN, 5 | 8 | 0x123 << 4)), true).unwrap();
    assert_eq!(tagged[12..16], [0x81, 0, 0xb1, 0x23]);
    assert_eq!([&tagged[..12], &tagged[16..]].concat(), plain);
    let mut packet = [[0; HEADER_BYTES].as_slice(), &tagged].concat();
    let (head, pieces) = wrap(&mut packet, false).unwrap();
    assert_eq!(pieces.concat(), plain);
    assert_eq!(head[HEADER_SIZE + 36..], fact(info::VLAN, 5 | 8 | 0x123 << 4));
}

#[test]
fn received_checksums_are_called_right_only_when_they_are() {
    let mut frame = frame(TCP, 40);
    let place = checksum::place(&frame).unwrap();
    checksum::prepare(&mut frame, place);
    let header = Header { flags: HDR_F_NEEDS_CSUM, ..Header::default() };
    let mut blank = [header.as_bytes(), &frame].concat();
    let (head, pieces) = wrap(&mut blank, true).unwrap();
    assert_eq!(head[HEADER_SIZE + 36..], fact(info::CHECKSUM, fact::TCP_SUCCEEDED));
    let right = pieces.concat();
    assert!(is_right(&right));
    for (frame, trusts, told) in [(&right, true, true), (&right, false, false), (&frame, true, false)] {
        let mut packet = [[0; HEADER_BYTES].as_slice(), frame].concat();
        let (head, _) = wrap(&mut packet, trusts).unwrap();
        assert_eq!(head.len() > HEADER_SIZE + 36, told);
    }
}

#[test]
fn offsets_that_lie_are_no_packet() {
    let good = message(&frame(TCP, 40), &fact(info::CHECKSUM, 0));
    assert!(sent(&good, true).is_some());
    let mut lies = Vec::new();
    // Data's offset and length; facts' offset and length; a fact's size and offset.
    for (at, values) in [
        (8, [0, 35, 200, u32::MAX]),
        (12, [0, 13, 200, u32::MAX]),
        (28, [200, u32::MAX, 1 << 31, 90]),
        (32, [1, 200, u32::MAX, 15]),
        (44, [0, 11, 17, u32::MAX]),
        (52, [13, 16, u32::MAX, 1 << 31]),
    ] {
        for value in values {
            let mut lie = good.clone();
            lie[at..at + 4].copy_from_slice(&value.to_le_bytes());
            lies.push(lie);
        }
    }
    for lie in &lies {
        assert!(sent(lie, true).is_none(), "{lie:x?}");
    }
    for length in 0..good.len() {
        assert!(sent(&good[..length], true).is_none(), "cut after {length}");
    }
    let header = rndis::Header::read_from_prefix(&good).unwrap().0;
    assert_eq!(header.length.get() as usize, good.len());
}

#[test]
fn frames_that_are_not_what_is_said_of_them_are_refused() {
    let mut arp = frame(TCP, 40);
    arp[12..14].copy_from_slice(&[8, 6]);
    for facts in [fact(info::CHECKSUM, fact::IPV4 | fact::TCP), fact(info::LSO, 1448 | lso::V2)] {
        for has_offloads in [true, false] {
            assert!(sent(&message(&arp, &facts), has_offloads).is_none());
        }
    }
    let mut long = frame(TCP, 40);
    long[16..18].copy_from_slice(&[0xff, 0xff]);
    assert!(sent(&message(&long, &fact(info::CHECKSUM, fact::IPV4 | fact::TCP)), true).is_none(), "a packet longer than its frame");
}
