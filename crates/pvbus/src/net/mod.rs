//! Network cards, whichever driver they have, and their addresses as far as hosts want to know them.
//!
//! [`NetDevice`] is what a driver offers to the kernel's network stack: Ethernet frames, from the destination's address on and without their check
//! sequence. Nothing waits: the stack asks for frames until there is none, then the next upcall of the hypervisor
//! ([`crate::Hal::upcall_vector`]) says that there may be more; a kernel without upcalls asks now and then. Frames are copied from and to memory of the driver's
//! own, so that a caller's memory is never the host's.

pub mod checksum;

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::net::IpAddr;

/// Bytes of an Ethernet header.
pub const ETHERNET_HEADER: usize = 14;
/// Bytes that a VLAN's tag adds to it.
pub const VLAN_TAG: usize = 4;

/// A network card's driver.
pub trait NetDevice: Send + Sync {
    /// Its name: `xnf0`, `xnf1` and so on.
    fn name(&self) -> &str;

    /// Its address.
    fn mac(&self) -> [u8; 6];

    /// Most bytes of a packet, which is a frame without its header.
    fn mtu(&self) -> usize;

    /// Whether frames may be sent whose checksum is [`Checksum::Blank`].
    fn takes_blank_checksums(&self) -> bool;

    /// Sends a frame; `false` when there is no room for it now. It may get lost, as on any wire.
    ///
    /// # Errors
    /// [`NetError`]; here and below.
    fn send(&self, frame: &[u8], checksum: Checksum) -> Result<bool, NetError>;

    /// Copies the next frame that has come to the beginning of `buffer`; `None` when there is none. One that is longer than `buffer` is lost.
    ///
    /// # Errors
    /// As above.
    fn receive(&self, buffer: &mut [u8]) -> Result<Option<Received>, NetError>;
}

/// What is known of the TCP or UDP checksum in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksum {
    /// It is there, whether right or not.
    Complete,
    /// The host has found it right.
    Verified,
    /// Its field holds no more than the sum of the pseudo header: the frame has not been on a wire yet. [`checksum::complete`] makes it whole.
    Blank,
}

/// A frame that was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Its bytes.
    pub length: usize,
    /// Its checksum.
    pub checksum: Checksum,
}

/// Why a card did not do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetError {
    /// It is not connected, or not any more.
    Gone,
    /// Not a frame, by its length.
    Length,
    /// The host answers what was not asked.
    Broken,
    /// The hypervisor refused, or there is no memory.
    Refused,
}

impl fmt::Display for NetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NetError::Gone => "the network card is gone",
            NetError::Length => "too short or too long for a frame of this network",
            NetError::Broken => "the host answers what was not asked; the network card is not used any more",
            NetError::Refused => "the hypervisor refused, or there is no memory",
        })
    }
}

impl core::error::Error for NetError {}

/// A network card, for the host to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// MAC address.
    pub mac: [u8; 6],
    /// Its addresses.
    pub addresses: Vec<Address>,
}

/// An address with the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Bits of the prefix.
    pub prefix: u8,
}

impl Nic {
    /// The MAC address as text.
    #[must_use]
    pub fn mac_text(&self) -> String {
        let [a, b, c, d, e, f] = self.mac;
        alloc::format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}
