//! A network of the host, as the cards of every dialect see it.
//!
//! A packet is a virtio network header ([`abi::virtio::net::Header`]) and an Ethernet frame, as the host's networks take it; [`checksum`] finds and
//! completes checksums that a guest left blank, for networks that cannot.

pub(crate) mod checksum;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

use std::io;

use abi::virtio::net::HEADER_BYTES;

/// Longest Ethernet frame: an IP packet of 65535 bytes and its header, with room for a VLAN tag.
pub(crate) const MAX_FRAME: usize = 65535 + 18;
/// Longest packet: virtio header and frame.
pub(crate) const MAX_PACKET: usize = HEADER_BYTES + MAX_FRAME;
/// Shortest frame that has an Ethernet header.
pub(crate) const MIN_FRAME: usize = 14;

/// Packets moved in one direction before the other has its turn.
pub(crate) const BUDGET: usize = 64;
/// `gso_type` of a packet's header: TCP over IPv4 (virtio 1.2 section 5.1.6).
pub(crate) const GSO_TCPV4: u8 = 1;
/// And TCP over IPv6.
pub(crate) const GSO_TCPV6: u8 = 4;
/// Addresses and ports of TCP and UDP over IPv4 without options, in the frame.
const FLOW: std::ops::Range<usize> = 26..38;

/// A network of the host.
pub trait Network {
    /// Sends a packet. [`io::ErrorKind::WouldBlock`]: not now, and nothing of it was sent.
    ///
    /// # Errors
    /// Others than `WouldBlock` and `InvalidInput` are for ever.
    fn send(&mut self, packet: &[u8]) -> io::Result<()>;

    /// The next packet; `None` when there is none now.
    ///
    /// # Errors
    /// When nothing will come any more.
    fn receive(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>>;
}

/// What a network does for a card.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Abilities {
    /// It makes checksums and cuts TCP packets, as their headers say.
    pub offloads: bool,
    /// It takes TCP packets that are longer than the MTU as they are.
    pub long_packets: bool,
}

/// What a guest can do itself with a received packet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Complete checksums.
    pub checksum: bool,
    /// Take TCP over IPv4 larger than the MTU.
    pub tso4: bool,
    /// Take TCP over IPv6 larger than the MTU.
    pub tso6: bool,
}

/// What ends the work on a card.
#[derive(Debug, thiserror::Error)]
pub enum NetError<Broken> {
    /// The guest's fault: its ring is broken.
    #[error(transparent)]
    Ring(#[from] Broken),
    /// The network is gone.
    #[error("{0}")]
    Network(io::Error),
}

/// What to wait for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Worked {
    /// There is more to do at once.
    pub more: bool,
    /// Until the network takes packets again.
    pub blocked: bool,
    /// For packets from the network: the guest has room for them.
    pub has_room: bool,
}

/// A number that is the same for all packets of a flow.
pub(crate) fn flow(frame: &[u8]) -> usize {
    let bytes = frame.get(FLOW).unwrap_or_default();
    bytes.iter().fold(0usize, |hash, byte| hash.wrapping_mul(31).wrapping_add(usize::from(*byte)))
}
