//! Checksums of TCP and UDP over IP, where they are and how they are made (RFC 1071; RFC 9293 section 3.1, RFC 768, RFC 8200 section 8.1).
//!
//! A guest that leaves a checksum blank has put the sum of the pseudo header into its field, or says where the segment is and has put there what it
//! liked: then [`prepare`] comes first. [`left_blank`] is for networks that cannot complete it: what is to be sent in its place.

use abi::virtio::net::{GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, HDR_F_NEEDS_CSUM, Header};

pub(crate) const ETHERNET: usize = 14;
const VLAN_TAG: usize = 4;
pub(crate) const TYPE_IPV4: u16 = 0x0800;
pub(crate) const TYPE_IPV6: u16 = 0x86dd;
/// Ethernet's type of a VLAN's tag.
pub const TYPE_VLAN: u16 = 0x8100;
pub(crate) const TCP: u8 = 6;
const UDP: u8 = 17;
pub(crate) const IPV6_HEADER: usize = 40;
/// Where in their headers addresses are, and the fields of IPv4 and IPv6 that say how long a packet is.
const IPV4_ADDRESSES: std::ops::Range<usize> = 12..20;
const IPV6_ADDRESSES: std::ops::Range<usize> = 8..40;
const IPV4_LENGTH: usize = 2;
const IPV6_LENGTH: usize = 4;
const IPV4_CHECKSUM: usize = 10;
/// IPv4: more fragments, or a place that is not the beginning.
const IPV4_FRAGMENT: usize = 6;
const FRAGMENT: u16 = 0x3fff;
/// Where the checksum is in a TCP and in a UDP header.
const TCP_CHECKSUM: u16 = 16;
const UDP_CHECKSUM: u16 = 6;
/// Where a TCP header says how long it is (RFC 9293 section 3.1).
pub(crate) const TCP_DATA_OFFSET: usize = 12;
/// UDP's word for "no checksum", which a checksum of zero must not look like.
const UDP_NONE: u16 = 0;

/// A checksum's place in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// First byte that it covers.
    pub start: u16,
    /// Where it is, from there.
    pub offset: u16,
}

impl Place {
    /// Of a segment of TCP, or of UDP, that begins at `start`.
    pub fn of_segment(start: u16, is_tcp: bool) -> Place {
        Place { start, offset: if is_tcp { TCP_CHECKSUM } else { UDP_CHECKSUM } }
    }

    /// Whether it is TCP's.
    pub fn is_tcp(self) -> bool {
        self.offset == TCP_CHECKSUM
    }

    /// Says in a packet's header that the checksum is left to who gets the packet.
    pub fn leave_blank(self, header: &mut Header) {
        header.flags = HDR_F_NEEDS_CSUM;
        header.csum_start = self.start.into();
        header.csum_offset = self.offset.into();
    }
}

/// Where the data of a TCP segment is whose header begins at `tcp`; `None` when it is cut short. What the header says need not be in the frame.
pub fn tcp_data(frame: &[u8], tcp: usize) -> Option<usize> {
    // The upper half says how long the header is, in words.
    Some(tcp + usize::from(frame.get(tcp + TCP_DATA_OFFSET)? >> 4) * 4)
}

/// Where a frame's IP header is, and whether it is IPv6.
fn ip(frame: &[u8]) -> Option<(usize, bool)> {
    let mut ip = ETHERNET;
    let mut kind = word(frame, ip - 2)?;
    if kind == TYPE_VLAN {
        ip += VLAN_TAG;
        kind = word(frame, ip - 2)?;
    }
    match kind {
        TYPE_IPV4 => Some((ip, false)),
        TYPE_IPV6 => Some((ip, true)),
        _ => None,
    }
}

pub(crate) fn word(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*frame.get(at..)?.first_chunk()?))
}

fn set_word(frame: &mut [u8], at: usize, value: u16) -> Option<()> {
    *frame.get_mut(at..)?.first_chunk_mut()? = value.to_be_bytes();
    Some(())
}

/// Finds the place; `None` when the frame is neither TCP nor UDP over IP, or is cut short.
pub fn place(frame: &[u8]) -> Option<Place> {
    let (ip, is_v6) = ip(frame)?;
    let (protocol, start) =
        if is_v6 { (*frame.get(ip + 6)?, ip + IPV6_HEADER) } else { (*frame.get(ip + 9)?, ip + usize::from(frame.get(ip)? & 0xf) * 4) };
    if !matches!(protocol, TCP | UDP) {
        return None;
    }
    let place = Place::of_segment(u16::try_from(start).ok()?, protocol == TCP);
    word(frame, start + usize::from(place.offset))?;
    Some(place)
}

/// Makes a checksum blank: the sum of the pseudo header. `None` when the frame is not what it says.
pub fn prepare(frame: &mut [u8], place: Place) -> Option<()> {
    let (sum, _) = pseudo_header(frame, place)?;
    set_word(frame, usize::from(place.start) + usize::from(place.offset), fold(sum))
}

/// Whether the checksum of a frame is right; `false` also when that cannot be told.
pub fn is_right(frame: &[u8], place: Place) -> bool {
    let is_none = !place.is_tcp() && word(frame, usize::from(place.start) + usize::from(place.offset)) == Some(UDP_NONE);
    let Some((pseudo, end)) = pseudo_header(frame, place).filter(|_| !is_none) else { return false };
    frame.get(place.start.into()..end).is_some_and(|covered| fold(pseudo + sum(covered)) == 0xffff)
}

/// The sum of the pseudo header, and where the segment ends. `None` for a fragment, which has not the whole segment.
fn pseudo_header(frame: &[u8], place: Place) -> Option<(u64, usize)> {
    let (ip, is_v6) = ip(frame)?;
    let (addresses, end) = if is_v6 {
        (IPV6_ADDRESSES, ip + IPV6_HEADER + usize::from(word(frame, ip + IPV6_LENGTH)?))
    } else if is_unfragmented(frame.get(ip..)?)? {
        (IPV4_ADDRESSES, ip + usize::from(word(frame, ip + IPV4_LENGTH)?))
    } else {
        return None;
    };
    let length = end.checked_sub(place.start.into()).filter(|_| end <= frame.len())?;
    let protocol = if place.is_tcp() { TCP } else { UDP };
    let addresses = frame.get(ip + addresses.start..ip + addresses.end)?;
    Some((sum(addresses) + length as u64 + u64::from(protocol), end))
}

/// Whether a packet of IPv4 is no fragment; `None` when it is cut short.
pub(crate) fn is_unfragmented(ip: &[u8]) -> Option<bool> {
    Some(word(ip, IPV4_FRAGMENT)? & FRAGMENT == 0)
}

/// Whether a header of IPv4 has its right checksum.
pub(crate) fn is_right_header(header: &[u8]) -> bool {
    fold(sum(header)) == 0xffff
}

/// Says in the IP header how long the packet is, and makes the header's checksum.
pub fn set_length(frame: &mut [u8]) -> Option<()> {
    let (ip, is_v6) = ip(frame)?;
    if is_v6 {
        let length = u16::try_from(frame.len().checked_sub(ip + IPV6_HEADER)?).ok()?;
        return set_word(frame, ip + IPV6_LENGTH, length);
    }
    let length = u16::try_from(frame.len() - ip).ok()?;
    set_word(frame, ip + IPV4_LENGTH, length)?;
    complete_header(frame)
}

/// Makes the checksum of an IPv4 header.
pub fn complete_header(frame: &mut [u8]) -> Option<()> {
    let (ip, is_v6) = ip(frame)?;
    if is_v6 {
        return None;
    }
    set_word(frame, ip + IPV4_CHECKSUM, 0)?;
    let header = frame.get(ip..ip + usize::from(frame.get(ip)? & 0xf) * 4)?;
    let checksum = !fold(sum(header));
    set_word(frame, ip + IPV4_CHECKSUM, checksum)
}

/// A header that leaves to the network what no network does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// The checksum that `header` leaves to the network: where in `frame` it belongs, and its bytes.
///
/// For networks that take long TCP packets as they are: then nothing more is to be done for one.
///
/// # Errors
/// [`Malformed`]: the place is outside of the frame, or the packet is to be cut in a way that nobody was offered.
pub fn left_blank(header: &Header, frame: &[u8]) -> Result<Option<(usize, [u8; 2])>, Malformed> {
    let is_blank = header.flags & HDR_F_NEEDS_CSUM != 0;
    match header.gso_type & !GSO_ECN {
        GSO_NONE => {}
        // What is cut has checksums to be made.
        GSO_TCPV4 | GSO_TCPV6 if is_blank => {}
        _ => return Err(Malformed),
    }
    if !is_blank {
        return Ok(None);
    }
    let start = usize::from(header.csum_start.get());
    let at = start + usize::from(header.csum_offset.get());
    word(frame, at).ok_or(Malformed)?;
    let checksum = !fold(sum(frame.get(start..).ok_or(Malformed)?));
    // Zero says "none" in UDP, and its other form is as right in every protocol (Linux' `skb_checksum_help`).
    Ok(Some((at, if checksum == UDP_NONE { [0xff; 2] } else { checksum.to_be_bytes() })))
}

/// Completes a blank checksum.
pub fn complete(frame: &mut [u8], place: Place) {
    let Some(covered) = frame.get(usize::from(place.start)..) else { return };
    let mut checksum = !fold(sum(covered));
    if !place.is_tcp() && checksum == UDP_NONE {
        checksum = !UDP_NONE;
    }
    // What has no room for a checksum has none.
    let _ = set_word(frame, usize::from(place.start) + usize::from(place.offset), checksum);
}

/// A sum of the 16-bit words, an odd byte as if a zero followed; [`fold`] makes one word of it. By words of twice the width, which come to the same
/// (RFC 1071 section 2 (C)).
fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks();
    let mut last = [0; 4];
    last.iter_mut().zip(rest).for_each(|(place, byte)| *place = *byte);
    words.iter().map(|word| u64::from(u32::from_be_bytes(*word))).sum::<u64>() + u64::from(u32::from_be_bytes(last))
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn blank(start: u16, offset: u16) -> Header {
        Header { flags: HDR_F_NEEDS_CSUM, csum_start: start.into(), csum_offset: offset.into(), ..Header::default() }
    }

    proptest! {
        #[test]
        fn sum_is_that_of_words(bytes in prop::collection::vec(any::<u8>(), 0..50)) {
            let words = bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0)));
            prop_assert_eq!(fold(sum(&bytes)), fold(words.sum()));
        }

        #[test]
        fn what_is_left_blank_is_completed_wherever_it_is(frame in prop::collection::vec(any::<u8>(), 0..80), start in 0..90u16, offset in 0..90u16) {
            match left_blank(&blank(start, offset), &frame) {
                Ok(Some((at, bytes))) => {
                    prop_assert_eq!(at, usize::from(start + offset));
                    let mut complete = frame.clone();
                    super::complete(&mut complete, Place { start, offset: UDP_CHECKSUM });
                    if offset == UDP_CHECKSUM {
                        prop_assert_eq!(&complete[at..at + 2], bytes);
                    }
                }
                Ok(None) => prop_assert!(false),
                Err(Malformed) => prop_assert!(usize::from(start + offset) + 2 > frame.len()),
            }
        }
    }

    #[test]
    fn only_what_was_offered_is_left_to_a_network() {
        let frame = [0; 100];
        let header = |gso_type, flags| Header { gso_type, ..Header { flags, ..blank(34, 16) } };
        for (gso_type, flags, is_taken) in [
            (GSO_NONE, 0, true),
            (GSO_TCPV4, HDR_F_NEEDS_CSUM, true),
            (GSO_TCPV6 | GSO_ECN, HDR_F_NEEDS_CSUM, true),
            (GSO_TCPV4, 0, false),
            // UDP's fragments and segments.
            (3, HDR_F_NEEDS_CSUM, false),
            (5, HDR_F_NEEDS_CSUM, false),
        ] {
            assert_eq!(left_blank(&header(gso_type, flags), &frame).is_ok(), is_taken, "{gso_type} {flags}");
        }
    }
}
