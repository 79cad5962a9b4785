//! Segments of one TCP connection that came one after another, as one long packet: what Linux calls generic receive offload
//! (`net/ipv4/tcp_offload.c`), done in the host, where it is cheap.
//!
//! A packet costs a guest about as much whether it is long or short. Only that is merged what comes out again, byte for byte, when the long packet is
//! cut as its header says (virtio 1.2 section 5.1.6.4.1): segments with data and no flags but ACK and, at the last, PSH; with equal headers but for
//! lengths, checksums and sequence numbers, these without a gap; all as long as the first, but for the last, which may be shorter; IPv4 without
//! options and fragments, IPv6 without further headers.

use std::ops::Range;

use abi::virtio::net::{GSO_TCPV4, GSO_TCPV6, Header};

use crate::Offloads;
use crate::checksum::{self, ETHERNET, IPV6_HEADER, Place, TCP, TCP_DATA_OFFSET, TYPE_IPV4, TYPE_IPV6, word};

/// Version 4, and a header without options.
const IPV4_PLAIN: u8 = 0x45;
const IPV4_HEADER: usize = 20;
/// Most that IP's length says.
const MAX_IP: usize = 65535;
/// Other places in a TCP header (RFC 9293 section 3.1), and its length without options.
const SEQUENCE: usize = 4;
const FLAGS: usize = 13;
const CHECKSUM: Range<usize> = 16..18;
const TCP_HEADER: usize = 20;
/// Flags.
const PSH: u8 = 8;
const ACK: u8 = 16;

/// A packet to which segments are added.
pub struct LongPacket<'a> {
    frame: &'a mut [u8],
    length: usize,
    shape: Shape,
    /// Bytes of data in each segment.
    size: usize,
    /// Which sequence number has the next.
    sequence: u32,
    /// What was added last ends the packet.
    is_ended: bool,
}

/// Where things are in a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    is_v6: bool,
    tcp: usize,
    data: usize,
}

impl<'a> LongPacket<'a> {
    /// Begins with the first `length` bytes of `frame`, which may have room for more; `None` when they are no segment of the kind that the guest takes
    /// long.
    pub fn begin(frame: &'a mut [u8], length: usize, offloads: Offloads) -> Option<LongPacket<'a>> {
        let first = frame.get(..length)?;
        let shape = Shape::of(first)?;
        let takes_long = if shape.is_v6 { offloads.tso6 } else { offloads.tso4 };
        if !offloads.checksum || !takes_long {
            return None;
        }
        let size = length - shape.data;
        let sequence = sequence(first, shape).wrapping_add(size as u32);
        let is_ended = has_push(first, shape);
        Some(LongPacket { frame, length, shape, size, sequence, is_ended })
    }

    /// Adds the segment in the frame `next`; `false` when it does not belong here.
    pub fn push(&mut self, next: &[u8]) -> bool {
        if self.is_ended || Shape::of(next) != Some(self.shape) || !self.has_header_of(next) {
            return false;
        }
        let data = &next[self.shape.data..];
        let end = self.length + data.len();
        let is_next = sequence(next, self.shape) == self.sequence && data.len() <= self.size && end - ETHERNET <= MAX_IP;
        let Some(room) = self.frame.get_mut(self.length..end).filter(|_| is_next) else { return false };
        room.copy_from_slice(data);
        self.length = end;
        self.sequence = self.sequence.wrapping_add(data.len() as u32);
        if has_push(next, self.shape) {
            self.frame[self.shape.tcp + FLAGS] |= PSH;
        }
        self.is_ended = data.len() < self.size || has_push(next, self.shape);
        true
    }

    /// Bytes of the frame.
    pub fn frame_length(&self) -> usize {
        self.length
    }

    /// Makes the headers those of the whole, its checksum blank; what the guest is told of it. `None`: there is only the first segment, as it came.
    pub fn finish(self) -> Option<Header> {
        let Shape { is_v6, tcp, data } = self.shape;
        let frame = self.frame.get_mut(..self.length).filter(|_| self.length > data + self.size)?;
        let place = Place::of_segment(tcp as u16, true);
        checksum::set_length(frame)?;
        checksum::prepare(frame, place)?;
        let mut header = Header {
            gso_type: if is_v6 { GSO_TCPV6 } else { GSO_TCPV4 },
            hdr_len: (data as u16).into(),
            gso_size: (self.size as u16).into(),
            ..Header::default()
        };
        place.leave_blank(&mut header);
        Some(header)
    }

    /// Whether the headers are equal where they have to be.
    fn has_header_of(&self, next: &[u8]) -> bool {
        let Shape { is_v6, tcp, data } = self.shape;
        // IP's length, and IPv4's checksum, are left out.
        let ip: [Range<usize>; 3] = if is_v6 { [0..18, 20..tcp, tcp..tcp] } else { [0..16, 18..24, 26..tcp] };
        let flags = tcp + FLAGS;
        // So are the sequence number, the flags, which `Shape::of` has looked at, and the checksum.
        let segment = [tcp..tcp + SEQUENCE, tcp + SEQUENCE + 4..flags, flags + 1..tcp + CHECKSUM.start, tcp + CHECKSUM.end..data];
        ip.into_iter().chain(segment).all(|range| self.frame[range.clone()] == next[range])
    }
}

impl Shape {
    /// Of a segment that can be part of a long packet.
    fn of(frame: &[u8]) -> Option<Shape> {
        let is_v6 = match word(frame, ETHERNET - 2)? {
            TYPE_IPV4 => false,
            TYPE_IPV6 => true,
            _ => return None,
        };
        let ip = &frame[ETHERNET..];
        let (header, is_plain) = if is_v6 {
            (IPV6_HEADER, *ip.first()? >> 4 == 6 && *ip.get(6)? == TCP && usize::from(word(ip, 4)?) + IPV6_HEADER == ip.len())
        } else {
            let is_whole = checksum::is_unfragmented(ip)? && usize::from(word(ip, 2)?) == ip.len();
            (IPV4_HEADER, is_whole && *ip.first()? == IPV4_PLAIN && *ip.get(9)? == TCP && checksum::is_right_header(ip.get(..IPV4_HEADER)?))
        };
        let tcp = ETHERNET + header;
        // The lower half is reserved.
        let is_plain = is_plain && frame.get(tcp + TCP_DATA_OFFSET)? & 0xf == 0;
        let flags = *frame.get(tcp + FLAGS)?;
        let shape = Shape { is_v6, tcp, data: checksum::tcp_data(frame, tcp)? };
        (is_plain && flags & !PSH == ACK && (tcp + TCP_HEADER..frame.len()).contains(&shape.data)).then_some(shape)
    }
}

fn sequence(frame: &[u8], shape: Shape) -> u32 {
    frame.get(shape.tcp + SEQUENCE..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

fn has_push(frame: &[u8], shape: Shape) -> bool {
    frame.get(shape.tcp + FLAGS).is_some_and(|flags| flags & PSH != 0)
}

#[cfg(test)]
mod tests;
