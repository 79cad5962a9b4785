//! Where the checksum of a TCP or UDP packet is, and its completion (RFC 1071; RFC 9293 section 3.1, RFC 768, RFC 8200 section 8.1).
//!
//! A frontend that leaves a checksum blank has put the sum of the pseudo header into its field, and says no more than that it has.

const ETHERNET: usize = 14;
const VLAN_TAG: usize = 4;
const TYPE_IPV4: u16 = 0x0800;
const TYPE_IPV6: u16 = 0x86dd;
const TYPE_VLAN: u16 = 0x8100;
const TCP: u8 = 6;
const UDP: u8 = 17;
const IPV6_HEADER: usize = 40;
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

/// Finds the place; `None` when the frame is neither TCP nor UDP over IP, or is cut short.
pub(crate) fn place(frame: &[u8]) -> Option<Place> {
    let word = |at: usize| Some(u16::from_be_bytes(*frame.get(at..)?.first_chunk()?));
    let mut ip = ETHERNET;
    let mut kind = word(ip - 2)?;
    if kind == TYPE_VLAN {
        ip += VLAN_TAG;
        kind = word(ip - 2)?;
    }
    let (protocol, start) = match kind {
        TYPE_IPV4 => (*frame.get(ip + 9)?, ip + usize::from(frame.get(ip)? & 0xf) * 4),
        TYPE_IPV6 => (*frame.get(ip + 6)?, ip + IPV6_HEADER),
        _ => return None,
    };
    let offset = match protocol {
        TCP => TCP_CHECKSUM,
        UDP => UDP_CHECKSUM,
        _ => return None,
    };
    frame.get(start + usize::from(offset)..)?.first_chunk::<2>()?;
    Some(Place { start: u16::try_from(start).ok()?, offset })
}

/// Completes a blank checksum.
pub(crate) fn complete(frame: &mut [u8], place: Place) {
    let Some(covered) = frame.get(usize::from(place.start)..) else { return };
    let mut sum = 0u64;
    for pair in covered.chunks(2) {
        sum += u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0));
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    let mut checksum = !(sum as u16);
    if place.offset == UDP_CHECKSUM && checksum == UDP_NONE {
        checksum = !UDP_NONE;
    }
    let at = usize::from(place.start) + usize::from(place.offset);
    if let Some(field) = frame.get_mut(at..at + 2) {
        field.copy_from_slice(&checksum.to_be_bytes());
    }
}
