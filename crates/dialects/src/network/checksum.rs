//! Checksums of TCP and UDP over IP, where they are and how they are made (RFC 1071; RFC 9293 section 3.1, RFC 768, RFC 8200 section 8.1).
//!
//! A guest that leaves a checksum blank has put the sum of the pseudo header into its field, or says where the segment is and has put there what it
//! liked: then [`prepare`] comes first.

const ETHERNET: usize = 14;
const VLAN_TAG: usize = 4;
const TYPE_IPV4: u16 = 0x0800;
const TYPE_IPV6: u16 = 0x86dd;
pub(crate) const TYPE_VLAN: u16 = 0x8100;
const TCP: u8 = 6;
const UDP: u8 = 17;
const IPV6_HEADER: usize = 40;
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
/// UDP's word for "no checksum", which a checksum of zero must not look like.
const UDP_NONE: u16 = 0;

/// A checksum's place in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
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

fn word(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*frame.get(at..)?.first_chunk()?))
}

fn set_word(frame: &mut [u8], at: usize, value: u16) -> Option<()> {
    *frame.get_mut(at..)?.first_chunk_mut()? = value.to_be_bytes();
    Some(())
}

/// Finds the place; `None` when the frame is neither TCP nor UDP over IP, or is cut short.
pub(crate) fn place(frame: &[u8]) -> Option<Place> {
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
pub(crate) fn prepare(frame: &mut [u8], place: Place) -> Option<()> {
    let (sum, _) = pseudo_header(frame, place)?;
    set_word(frame, usize::from(place.start) + usize::from(place.offset), fold(sum))
}

/// Whether the checksum of a frame is right; `false` also when that cannot be told.
pub(crate) fn is_right(frame: &[u8], place: Place) -> bool {
    let is_none = !place.is_tcp() && word(frame, usize::from(place.start) + usize::from(place.offset)) == Some(UDP_NONE);
    let Some((pseudo, end)) = pseudo_header(frame, place).filter(|_| !is_none) else { return false };
    frame.get(place.start.into()..end).is_some_and(|covered| fold(pseudo + sum(covered)) == 0xffff)
}

/// The sum of the pseudo header, and where the segment ends. `None` for a fragment, which has not the whole segment.
fn pseudo_header(frame: &[u8], place: Place) -> Option<(u64, usize)> {
    let (ip, is_v6) = ip(frame)?;
    let (addresses, end) = if is_v6 {
        (IPV6_ADDRESSES, ip + IPV6_HEADER + usize::from(word(frame, ip + IPV6_LENGTH)?))
    } else if word(frame, ip + IPV4_FRAGMENT)? & FRAGMENT == 0 {
        (IPV4_ADDRESSES, ip + usize::from(word(frame, ip + IPV4_LENGTH)?))
    } else {
        return None;
    };
    let length = end.checked_sub(place.start.into()).filter(|_| end <= frame.len())?;
    let protocol = if place.is_tcp() { TCP } else { UDP };
    let addresses = frame.get(ip + addresses.start..ip + addresses.end)?;
    Some((sum(addresses) + length as u64 + u64::from(protocol), end))
}

/// Says in the IP header how long the packet is, and makes the header's checksum.
pub(crate) fn set_length(frame: &mut [u8]) -> Option<()> {
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
pub(crate) fn complete_header(frame: &mut [u8]) -> Option<()> {
    let (ip, is_v6) = ip(frame)?;
    if is_v6 {
        return None;
    }
    set_word(frame, ip + IPV4_CHECKSUM, 0)?;
    let header = frame.get(ip..ip + usize::from(frame.get(ip)? & 0xf) * 4)?;
    let checksum = !fold(sum(header));
    set_word(frame, ip + IPV4_CHECKSUM, checksum)
}

/// Completes a blank checksum.
pub(crate) fn complete(frame: &mut [u8], place: Place) {
    let Some(covered) = frame.get(usize::from(place.start)..) else { return };
    let mut checksum = !fold(sum(covered));
    if !place.is_tcp() && checksum == UDP_NONE {
        checksum = !UDP_NONE;
    }
    // What has no room for a checksum has none.
    let _ = set_word(frame, usize::from(place.start) + usize::from(place.offset), checksum);
}

/// Sum of the 16-bit words, an odd byte as if a zero followed.
fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0))).sum()
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}
