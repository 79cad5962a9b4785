//! A network of the host, as the cards of every dialect see it.
//!
//! A packet is a virtio network header ([`abi::virtio::net::Header`]) and an Ethernet frame ([`frames`]). Every network completes checksums that a
//! guest left blank, and cuts long TCP packets or takes them as they are.

#[cfg(any(test, feature = "testing"))]
pub mod testing;

use std::io;

/// Packets moved in one direction before the other has its turn.
pub(crate) const BUDGET: usize = 64;
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
