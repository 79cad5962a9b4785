//! Completion of checksums that were left blank: TCP and UDP over IP (RFC 1071; RFC 9293 section 3.1, RFC 768, RFC 8200 section 8.1).
//!
//! Who leaves a checksum blank has put the sum of the pseudo header into its field, so that the sum of everything from the transport header on is
//! all that is missing. Other protocols, further headers of IPv6 and fragments are left as they are.

use super::{ETHERNET_HEADER, VLAN_TAG};

const TYPE_IPV4: u16 = 0x0800;
const TYPE_IPV6: u16 = 0x86dd;
const TYPE_VLAN: u16 = 0x8100;
const TCP: u8 = 6;
const UDP: u8 = 17;
const IPV6_HEADER: usize = 40;
/// Where the checksum is in a TCP and in a UDP header.
pub(crate) const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;

/// Completes the blank checksum of `frame`, if it has a place for one.
pub fn complete(frame: &mut [u8]) {
    let Some((start, offset, end)) = place(frame) else { return };
    let Some(covered) = frame.get(start..end) else { return };
    let (pairs, rest) = covered.as_chunks();
    let mut sum: u64 = pairs.iter().map(|pair| u64::from(u16::from_be_bytes(*pair))).sum();
    sum += rest.first().map_or(0, |byte| u64::from(*byte) << 8);
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    let [.., high, low] = (!sum).to_be_bytes();
    // UDP's zero says that there is none; its other form is as right.
    let bytes = if offset == UDP_CHECKSUM && [high, low] == [0, 0] { [0xff; 2] } else { [high, low] };
    if let Some(field) = frame.get_mut(start + offset..).and_then(|rest| rest.first_chunk_mut()) {
        *field = bytes;
    }
}

/// Where the transport header begins, where in it the checksum is, and where the packet ends: short frames are padded.
pub(crate) fn place(frame: &[u8]) -> Option<(usize, usize, usize)> {
    let word = |at: usize| Some(u16::from_be_bytes(*frame.get(at..)?.first_chunk()?));
    let mut ip = ETHERNET_HEADER;
    let mut kind = word(ip - 2)?;
    if kind == TYPE_VLAN {
        ip += VLAN_TAG;
        kind = word(ip - 2)?;
    }
    let (protocol, start, end) = match kind {
        TYPE_IPV4 => (*frame.get(ip + 9)?, ip + usize::from(frame.get(ip)? & 0xf) * 4, ip + usize::from(word(ip + 2)?)),
        TYPE_IPV6 => (*frame.get(ip + 6)?, ip + IPV6_HEADER, ip + IPV6_HEADER + usize::from(word(ip + 4)?)),
        _ => return None,
    };
    let offset = match protocol {
        TCP => TCP_CHECKSUM,
        UDP => UDP_CHECKSUM,
        _ => return None,
    };
    (start + offset + 2 <= end && end <= frame.len()).then_some((start, offset, end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    /// UDP over IPv4 with an odd payload and padding behind it; the field holds the sum of the pseudo header.
    fn frame() -> Vec<u8> {
        let mut frame = Vec::from([0; 12]);
        frame.extend([8, 0, 0x45, 0, 0, 31, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let pseudo: u16 = 0x0a00 + 1 + 0x0a00 + 2 + 17 + 11;
        frame.extend([0, 7, 0, 9, 0, 11, (pseudo >> 8) as u8, pseudo as u8, b'a', b'b', b'c']);
        frame.resize(60, 0xee);
        frame
    }

    #[test]
    fn blank_checksum_becomes_that_of_the_packet_without_padding() {
        let mut frame = frame();
        complete(&mut frame);
        // 0x1400 + 3 + 17 + 11 of the pseudo header, 7 + 9 + 11 of the header, "ab" and "c".
        let sum: u32 = 0x1400 + 3 + 17 + 11 + 7 + 9 + 11 + 0x6162 + 0x6300;
        let wanted = !((sum >> 16) + (sum & 0xffff)) as u16;
        assert_eq!(frame[40..42], wanted.to_be_bytes());
    }

    #[test]
    fn frames_cut_anywhere_and_lengths_that_lie_are_left_alone() {
        for length in 0..45 {
            let mut cut = frame()[..length].to_vec();
            let before = cut.clone();
            complete(&mut cut);
            assert_eq!(cut, before, "{length}");
        }
        for ip_length in [0, 19, 27, 47, 0xffff_u16] {
            let mut frame = frame();
            frame[16..18].copy_from_slice(&ip_length.to_be_bytes());
            let before = frame.clone();
            complete(&mut frame);
            assert_eq!(frame, before, "{ip_length}");
        }
    }
}
