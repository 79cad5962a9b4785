//! Packets between network cards and the host's networks.
//!
//! A packet is a virtio network header ([`abi::virtio::net::Header`]) and an Ethernet frame. The header says what the one side left to the other:
//! a blank checksum, a long TCP packet to be cut. Cards of every dialect speak it, and so does the kernel at a TAP interface; for networks that know
//! frames only, [`checksum`] completes what a guest left blank, and [`merge`] makes long packets for a guest that takes them.
//!
//! Pure: bytes in, bytes out, whatever a guest or a network puts there.

#![forbid(unsafe_code)]

pub mod checksum;
pub mod merge;

use abi::virtio::net::HEADER_BYTES;

/// Longest Ethernet frame: an IP packet of 65535 bytes and its header, with room for a VLAN tag.
pub const MAX_FRAME: usize = 65535 + 18;
/// Longest packet: virtio header and frame.
pub const MAX_PACKET: usize = HEADER_BYTES + MAX_FRAME;
/// Shortest frame that has an Ethernet header.
pub const MIN_FRAME: usize = 14;

/// What a guest can do itself with a received packet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Complete checksums, and believe that they are right.
    pub checksum: bool,
    /// Take TCP over IPv4 larger than the MTU.
    pub tso4: bool,
    /// Take TCP over IPv6 larger than the MTU.
    pub tso6: bool,
}
