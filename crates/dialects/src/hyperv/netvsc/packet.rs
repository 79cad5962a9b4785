//! Packets in RNDIS messages, from and to the packets of the host's networks.
//!
//! [`unwrap`] makes a packet of the guest's message where it lies: what a network takes, a virtio header and a frame, is shorter than what RNDIS puts
//! before a frame. [`wrap`] makes the header of a message for a packet from the network.

use std::ops::Range;

use abi::hyperv::rndis::{HEADER_SIZE, Header, PACKET_INFO_SIZE, Packet, PacketInfo, checksum as fact, info, lso, message};
use abi::virtio::net::{self, HDR_F_NEEDS_CSUM, HEADER_BYTES};
use zerocopy::{FromBytes, IntoBytes};

use crate::network::checksum::{self, Place, TYPE_VLAN};
use crate::network::{Abilities, GSO_TCPV4, GSO_TCPV6, MAX_FRAME, MIN_FRAME};

/// Bytes of both Ethernet addresses, behind which a VLAN's tag is.
const ADDRESSES: usize = 12;
/// Bytes of a VLAN's tag.
const TAG: usize = 4;
/// Bytes of a fact with its value.
const FACT: usize = PACKET_INFO_SIZE + 4;
/// Most bytes before a frame in a message to the guest: checksum and VLAN are told.
pub(super) const MAX_WRAPPING: usize = HEADER_SIZE + size_of::<Packet>() + 2 * FACT;

/// What the guest says of a packet.
#[derive(Debug, Default)]
struct Facts {
    checksum: u32,
    lso: Option<u32>,
    vlan: Option<u32>,
}

/// Where in `buffer` the packet of the message at `message` is, ready for a network; `None` when it makes no sense. What a network is able
/// to do is left to it.
pub(super) fn unwrap(buffer: &mut [u8], message: Range<usize>, network: Abilities) -> Option<Range<usize>> {
    let bytes = buffer.get(message.clone())?;
    let body = bytes.get(HEADER_SIZE..)?;
    let (packet, _) = Packet::read_from_prefix(body).ok()?;
    let (offset, length) = (packet.data_offset.get() as usize, packet.data_length.get() as usize);
    // Behind the structure, so that there is room for a virtio header and a VLAN's tag before it.
    if offset < size_of::<Packet>() || !(MIN_FRAME..=MAX_FRAME - TAG).contains(&length) || length > body.len().checked_sub(offset)? {
        return None;
    }
    let facts = facts(body, &packet)?;
    let mut start = message.start + HEADER_SIZE + offset;
    let end = start + length;
    if let Some(vlan) = facts.vlan {
        buffer.copy_within(start..start + ADDRESSES, start - TAG);
        start -= TAG;
        let tag = (vlan & 7) << 13 | (vlan & 8) << 9 | vlan >> 4 & 0xfff;
        let [high, low] = (tag as u16).to_be_bytes();
        let [kind_high, kind_low] = TYPE_VLAN.to_be_bytes();
        *buffer.get_mut(start + ADDRESSES..)?.first_chunk_mut()? = [kind_high, kind_low, high, low];
    }
    let header = describe(buffer.get_mut(start..end)?, &facts, network)?;
    start -= HEADER_BYTES;
    *buffer.get_mut(start..)?.first_chunk_mut::<HEADER_BYTES>()? = zerocopy::transmute!(header);
    Some(start..end)
}

/// Reads the facts about a packet.
fn facts(body: &[u8], packet: &Packet) -> Option<Facts> {
    let mut facts = Facts::default();
    let (at, length) = (packet.info_offset.get() as usize, packet.info_length.get() as usize);
    let mut rest = if length == 0 { &[] } else { body.get(at..)?.get(..length)? };
    while !rest.is_empty() {
        let (fact, _) = PacketInfo::read_from_prefix(rest).ok()?;
        let size = fact.size.get() as usize;
        if size < PACKET_INFO_SIZE {
            return None;
        }
        let (this, later) = rest.split_at_checked(size)?;
        rest = later;
        let value = this.get(fact.offset.get() as usize..).and_then(|value| value.first_chunk()).map(|bytes| u32::from_le_bytes(*bytes));
        match fact.kind.get() {
            info::CHECKSUM => facts.checksum = value?,
            info::LSO => facts.lso = Some(value?),
            info::VLAN => facts.vlan = Some(value?),
            _ => {}
        }
    }
    Some(facts)
}

/// The virtio header of a frame. What the network does not do is done here.
fn describe(frame: &mut [u8], facts: &Facts, network: Abilities) -> Option<net::Header> {
    let mut header = net::Header::default();
    if let Some(word) = facts.lso {
        // Version 1 was never offered.
        if !(network.offloads || network.long_packets) || word & lso::V2 == 0 {
            return None;
        }
        let size = u16::try_from(word & lso::MSS).ok().filter(|size| *size > 0)?;
        // Guests leave the length of the whole to who cuts it.
        checksum::set_length(frame)?;
        let place = checksum::place(frame).filter(|place| place.is_tcp())?;
        if !network.offloads {
            complete(frame, place)?;
            return Some(header);
        }
        let tcp = usize::from(place.start);
        // TCP's header length is in the upper half of its byte 12, in words.
        let words = frame.get(tcp + 12)? >> 4;
        header.hdr_len = u16::try_from(tcp + usize::from(words) * 4).ok()?.into();
        header.gso_type = if word & lso::IPV6 == 0 { GSO_TCPV4 } else { GSO_TCPV6 };
        header.gso_size = size.into();
        blank(frame, place, &mut header)?;
        return Some(header);
    }
    if facts.checksum & fact::IP_HEADER != 0 && facts.checksum & fact::IPV4 != 0 {
        checksum::complete_header(frame)?;
    }
    if facts.checksum & (fact::TCP | fact::UDP) != 0 {
        let place = checksum::place(frame)?;
        if network.offloads {
            blank(frame, place, &mut header)?;
        } else {
            complete(frame, place)?;
        }
    }
    Some(header)
}

/// Leaves a checksum to the network.
fn blank(frame: &mut [u8], place: Place, header: &mut net::Header) -> Option<()> {
    checksum::prepare(frame, place)?;
    header.flags = HDR_F_NEEDS_CSUM;
    header.csum_start = place.start.into();
    header.csum_offset = place.offset.into();
    Some(())
}

/// Makes a checksum.
fn complete(frame: &mut [u8], place: Place) -> Option<()> {
    checksum::prepare(frame, place)?;
    checksum::complete(frame, place);
    Some(())
}

/// What precedes a frame in a message to the guest; and the frame, without its VLAN's tag, in two pieces. Blank checksums are completed; those that
/// are right are called right when the guest `trusts` that.
pub(super) fn wrap<'a>(packet: &'a mut [u8], trusts: bool) -> Option<(Vec<u8>, [&'a [u8]; 2])> {
    let (head, frame) = packet.split_at_mut_checked(HEADER_BYTES)?;
    let (header, _) = net::Header::read_from_prefix(head).ok()?;
    if !(MIN_FRAME..=MAX_FRAME).contains(&frame.len()) {
        return None;
    }
    let place = checksum::place(frame);
    if header.flags & HDR_F_NEEDS_CSUM != 0 {
        checksum::complete(frame, place?);
        // The packet may come here again.
        *head.first_mut()? &= !HDR_F_NEEDS_CSUM;
    }
    let frame: &'a [u8] = frame;
    let mut facts = Vec::with_capacity(2 * FACT);
    if let Some(place) = place.filter(|place| trusts && checksum::is_right(frame, *place)) {
        push_fact(&mut facts, info::CHECKSUM, if place.is_tcp() { fact::TCP_SUCCEEDED } else { fact::UDP_SUCCEEDED });
    }
    let (addresses, rest) = frame.split_at_checked(ADDRESSES)?;
    let rest = match rest.split_first_chunk() {
        Some(([a, b, c, d], inner)) if u16::from_be_bytes([*a, *b]) == TYPE_VLAN => {
            let tag = u32::from(u16::from_be_bytes([*c, *d]));
            push_fact(&mut facts, info::VLAN, tag >> 13 | tag >> 9 & 8 | (tag & 0xfff) << 4);
            inner
        }
        _ => rest,
    };
    let length = (addresses.len() + rest.len()) as u32;
    let packet = Packet {
        data_offset: ((size_of::<Packet>() + facts.len()) as u32).into(),
        data_length: length.into(),
        info_offset: (if facts.is_empty() { 0 } else { size_of::<Packet>() as u32 }).into(),
        info_length: (facts.len() as u32).into(),
        ..Packet::default()
    };
    let whole = (HEADER_SIZE + size_of::<Packet>() + facts.len()) as u32 + length;
    let header = Header { kind: message::PACKET.into(), length: whole.into() };
    Some(([header.as_bytes(), packet.as_bytes(), &facts].concat(), [addresses, rest]))
}

fn push_fact(facts: &mut Vec<u8>, kind: u32, value: u32) {
    let fact = PacketInfo { size: (FACT as u32).into(), kind: kind.into(), offset: (PACKET_INFO_SIZE as u32).into() };
    facts.extend(fact.as_bytes());
    facts.extend(value.to_le_bytes());
}
