//! RNDIS packets and the host's, without a channel.

use abi::hyperv::rndis::{self, HEADER_SIZE, PacketInfo, checksum as fact, info, lso, part};
use abi::virtio::net::{HDR_F_NEEDS_CSUM, HEADER_BYTES, Header};
use frames::checksum;
use zerocopy::{FromBytes, IntoBytes};

use super::super::packet::{Received, unwrap};
use super::{TCP, frame, message};

fn fact(kind: u32, value: u32) -> Vec<u8> {
    let fact = PacketInfo { size: 16.into(), kind: kind.into(), offset: 12.into() };
    [fact.as_bytes(), &value.to_le_bytes()].concat()
}

/// What a guest gets of a packet: the only message's head and frame.
fn wrap(packet: &mut [u8], trusts: bool) -> (Vec<u8>, Vec<u8>) {
    let [(head, pieces)] = Received::new(packet, trusts).unwrap().messages(2048).try_into().unwrap();
    (head, pieces.concat())
}

/// What a network gets of a message, as header and frame.
fn sent(message: &[u8]) -> Option<(Header, Vec<u8>)> {
    let mut buffer = [[0xee; 20].as_slice(), message].concat();
    let range = 20..buffer.len();
    let packet = unwrap(&mut buffer, range)?;
    let (header, frame) = Header::read_from_prefix(&buffer[packet]).unwrap();
    Some((header, frame.to_vec()))
}

fn is_right(frame: &[u8]) -> bool {
    checksum::is_right(frame, checksum::place(frame).unwrap())
}

#[test]
fn frame_is_what_the_offsets_say() {
    let frame = frame(TCP, 40);
    let (header, got) = sent(&message(&frame, &[])).unwrap();
    assert_eq!((header.as_bytes(), got), ([0; HEADER_BYTES].as_slice(), frame));
}

#[test]
fn checksums_are_left_to_the_network() {
    for (protocol, bit) in [(TCP, fact::TCP), (17, fact::UDP)] {
        let facts = fact(info::CHECKSUM, fact::IPV4 | fact::IP_HEADER | bit | 34 << 16);
        let (header, mut got) = sent(&message(&frame(protocol, 41), &facts)).unwrap();
        assert_eq!((header.flags, header.csum_start.get()), (HDR_F_NEEDS_CSUM, 34));
        let place = checksum::place(&got).unwrap();
        checksum::complete(&mut got, place);
        assert!(is_right(&got), "what is left is the pseudo header");
    }
}

#[test]
fn segments_are_cut_by_the_network() {
    let mut frame = frame(TCP, 4000);
    // As Linux leaves it: no length, no checksum.
    frame[16..18].fill(0);
    let facts = fact(info::LSO, 1448 | 34 << 20 | lso::V2);
    let (header, got) = sent(&message(&frame, &facts)).unwrap();
    assert_eq!((header.gso_type, header.gso_size.get(), header.hdr_len.get(), header.flags), (1, 1448, 54, HDR_F_NEEDS_CSUM));
    assert_eq!(usize::from(u16::from_be_bytes([got[16], got[17]])), frame.len() - 14);
    assert!(sent(&message(&frame, &fact(info::LSO, 1448))).is_none(), "version 1");
    assert!(sent(&message(&frame, &fact(info::LSO, lso::V2))).is_none(), "segments of nothing");
}

#[test]
fn long_packet_comes_in_parts() {
    let mut frame = frame(TCP, 4000);
    let place = checksum::place(&frame).unwrap();
    checksum::prepare(&mut frame, place);
    let header = Header { flags: HDR_F_NEEDS_CSUM, gso_type: 1, gso_size: 1448.into(), ..Header::default() };
    let mut packet = [header.as_bytes(), &frame].concat();
    let messages = Received::new(&mut packet, true).unwrap().messages(1600);
    let mut got = Vec::new();
    for (number, (head, pieces)) in messages.iter().enumerate() {
        assert!(head.len() + pieces.concat().len() <= 1600);
        let told = &head[HEADER_SIZE + 36..];
        let known = if number == 0 { fact(info::CHECKSUM, fact::TCP_SUCCEEDED) } else { Vec::new() };
        let which = part::V1 | part::IS_PART | [part::FIRST, 0, part::LAST][number];
        assert_eq!(told, [known, fact(info::PART, which)].concat());
        got.extend(pieces.concat());
    }
    assert!(is_right(&got) && got.len() == frame.len());
    // One that is not to be cut is never in parts.
    let mut jumbo = [[0; HEADER_BYTES].as_slice(), &frame].concat();
    assert_eq!(Received::new(&mut jumbo, true).unwrap().messages(1600).len(), 1);
}

#[test]
fn tag_goes_into_the_frame_and_out_of_it() {
    let plain = frame(TCP, 40);
    let (_, tagged) = sent(&message(&plain, &fact(info::VLAN, 5 | 8 | 0x123 << 4))).unwrap();
    assert_eq!(tagged[12..16], [0x81, 0, 0xb1, 0x23]);
    assert_eq!([&tagged[..12], &tagged[16..]].concat(), plain);
    let mut packet = [[0; HEADER_BYTES].as_slice(), &tagged].concat();
    let (head, got) = wrap(&mut packet, false);
    assert_eq!(got, plain);
    assert_eq!(head[HEADER_SIZE + 36..], fact(info::VLAN, 5 | 8 | 0x123 << 4));
}

#[test]
fn received_checksums_are_called_right_only_when_they_are() {
    let mut frame = frame(TCP, 40);
    let place = checksum::place(&frame).unwrap();
    checksum::prepare(&mut frame, place);
    let header = Header { flags: HDR_F_NEEDS_CSUM, ..Header::default() };
    let mut blank = [header.as_bytes(), &frame].concat();
    let (head, right) = wrap(&mut blank, true);
    assert_eq!(head[HEADER_SIZE + 36..], fact(info::CHECKSUM, fact::TCP_SUCCEEDED));
    assert!(is_right(&right));
    for (frame, trusts, told) in [(&right, true, true), (&right, false, false), (&frame, true, false)] {
        let mut packet = [[0; HEADER_BYTES].as_slice(), frame].concat();
        let (head, _) = wrap(&mut packet, trusts);
        assert_eq!(head.len() > HEADER_SIZE + 36, told);
    }
}

#[test]
fn offsets_that_lie_are_no_packet() {
    let good = message(&frame(TCP, 40), &fact(info::CHECKSUM, 0));
    assert!(sent(&good).is_some());
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
        assert!(sent(lie).is_none(), "{lie:x?}");
    }
    for length in 0..good.len() {
        assert!(sent(&good[..length]).is_none(), "cut after {length}");
    }
    let header = rndis::Header::read_from_prefix(&good).unwrap().0;
    assert_eq!(header.length.get() as usize, good.len());
}

#[test]
fn frames_that_are_not_what_is_said_of_them_are_refused() {
    let mut arp = frame(TCP, 40);
    arp[12..14].copy_from_slice(&[8, 6]);
    for facts in [fact(info::CHECKSUM, fact::IPV4 | fact::TCP), fact(info::LSO, 1448 | lso::V2)] {
        assert!(sent(&message(&arp, &facts)).is_none());
    }
    let mut long = frame(TCP, 40);
    long[16..18].copy_from_slice(&[0xff, 0xff]);
    assert!(sent(&message(&long, &fact(info::CHECKSUM, fact::IPV4 | fact::TCP))).is_none(), "a packet longer than its frame");
}
