//! Packets in RNDIS messages, from and to the packets of the host's networks.
//!
//! [`unwrap`] makes a packet of the guest's message where it lies: what a network takes, a virtio header and a frame, is shorter than what RNDIS puts
//! before a frame. [`Received`] is a packet from the network, of which it makes messages.

use std::ops::Range;

use abi::hyperv::rndis::{HEADER_SIZE, Header, PACKET_INFO_SIZE, Packet, PacketInfo, checksum as fact, info, lso, message, part};
use abi::virtio::net::{self, GSO_NONE, GSO_TCPV4, GSO_TCPV6, HDR_F_DATA_VALID, HDR_F_NEEDS_CSUM, HEADER_BYTES};
use frames::checksum::{self, Place, TYPE_VLAN};
use frames::{MAX_FRAME, MIN_FRAME};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes of both Ethernet addresses, behind which a VLAN's tag is.
const ADDRESSES: usize = 12;
/// Bytes of a VLAN's tag.
const TAG: usize = 4;
/// Bytes of a fact with its value.
const FACT: usize = PACKET_INFO_SIZE + 4;
/// Most bytes before a frame in a message to the guest: checksum, VLAN and part are told.
pub(super) const MAX_WRAPPING: usize = HEADER_SIZE + size_of::<Packet>() + 3 * FACT;

/// What the guest says of a packet.
#[derive(Debug, Default)]
struct Facts {
    checksum: u32,
    lso: Option<u32>,
    vlan: Option<u32>,
}

/// Where in `buffer` the packet of the message at `message` is, ready for a network; `None` when it makes no sense.
pub(super) fn unwrap(buffer: &mut [u8], message: Range<usize>) -> Option<Range<usize>> {
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
    let header = describe(buffer.get_mut(start..end)?, &facts)?;
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

/// The virtio header of a frame.
fn describe(frame: &mut [u8], facts: &Facts) -> Option<net::Header> {
    let mut header = net::Header::default();
    if let Some(word) = facts.lso {
        // Version 1 was never offered.
        if word & lso::V2 == 0 {
            return None;
        }
        let size = u16::try_from(word & lso::MSS).ok().filter(|size| *size > 0)?;
        // Guests leave the length of the whole to who cuts it.
        checksum::set_length(frame)?;
        let place = checksum::place(frame).filter(|place| place.is_tcp())?;
        header.hdr_len = u16::try_from(checksum::tcp_data(frame, place.start.into())?).ok()?.into();
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
        blank(frame, place, &mut header)?;
    }
    Some(header)
}

/// Leaves a checksum to the network.
fn blank(frame: &mut [u8], place: Place, header: &mut net::Header) -> Option<()> {
    checksum::prepare(frame, place)?;
    place.leave_blank(header);
    Some(())
}

/// A packet for the guest: facts about it, and its frame without a VLAN's tag, in two pieces.
pub(super) struct Received<'a> {
    facts: Vec<u8>,
    addresses: &'a [u8],
    rest: &'a [u8],
    /// Whether it may be given to the guest in parts.
    is_long: bool,
}

impl<'a> Received<'a> {
    /// Looks at a packet of a network. A blank checksum is completed; one that is right is called right when the guest `trusts` that.
    pub fn new(packet: &'a mut [u8], trusts: bool) -> Option<Received<'a>> {
        let (head, frame) = packet.split_at_mut_checked(HEADER_BYTES)?;
        let (header, _) = net::Header::read_from_prefix(head).ok()?;
        if !(MIN_FRAME..=MAX_FRAME).contains(&frame.len()) {
            return None;
        }
        let place = checksum::place(frame);
        let mut is_valid = header.flags & HDR_F_DATA_VALID != 0;
        if header.flags & HDR_F_NEEDS_CSUM != 0 {
            checksum::complete(frame, place?);
            is_valid = true;
            // The packet may come here again.
            *head.first_mut()? = HDR_F_DATA_VALID;
        }
        let frame: &'a [u8] = frame;
        let mut facts = Vec::with_capacity(2 * FACT);
        if let Some(place) = place.filter(|place| trusts && (is_valid || checksum::is_right(frame, *place))) {
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
        Some(Received { facts, addresses, rest, is_long: header.gso_type != GSO_NONE })
    }

    /// Its messages: one; or one for each part of a long packet, when a message has no more than `room` bytes. Each in three pieces: what precedes the
    /// frame, and the frame.
    pub fn messages(&self, room: usize) -> Vec<(Vec<u8>, [&'a [u8]; 2])> {
        let room = room.saturating_sub(MAX_WRAPPING + self.addresses.len());
        if !self.is_long || self.rest.len() <= room || room == 0 {
            return vec![(wrapping(&self.facts, self.addresses.len() + self.rest.len()), [self.addresses, self.rest])];
        }
        let parts = self.rest.chunks(room);
        let last = parts.len() - 1;
        let message = |(number, part): (usize, &'a [u8])| {
            let mut bits = part::V1 | part::IS_PART;
            if number == last {
                bits |= part::LAST;
            }
            let mut facts = Vec::with_capacity(3 * FACT);
            let mut addresses = [].as_slice();
            // What is said of the packet, is said of its first part.
            if number == 0 {
                bits |= part::FIRST;
                facts.extend_from_slice(&self.facts);
                addresses = self.addresses;
            }
            push_fact(&mut facts, info::PART, bits);
            (wrapping(&facts, addresses.len() + part.len()), [addresses, part])
        };
        parts.enumerate().map(message).collect()
    }
}

/// What precedes `length` bytes of a frame in a message to the guest.
fn wrapping(facts: &[u8], length: usize) -> Vec<u8> {
    let packet = Packet {
        data_offset: ((size_of::<Packet>() + facts.len()) as u32).into(),
        data_length: (length as u32).into(),
        info_offset: (if facts.is_empty() { 0 } else { size_of::<Packet>() as u32 }).into(),
        info_length: (facts.len() as u32).into(),
        ..Packet::default()
    };
    let whole = HEADER_SIZE + size_of::<Packet>() + facts.len() + length;
    let header = Header { kind: message::PACKET.into(), length: (whole as u32).into() };
    [header.as_bytes(), packet.as_bytes(), facts].concat()
}

fn push_fact(facts: &mut Vec<u8>, kind: u32, value: u32) {
    let fact = PacketInfo { size: (FACT as u32).into(), kind: kind.into(), offset: (PACKET_INFO_SIZE as u32).into() };
    facts.extend(fact.as_bytes());
    facts.extend(value.to_le_bytes());
}
