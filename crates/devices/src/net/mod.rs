//! Networks: what carries a network card's frames on the host, for the cards of every dialect.
//!
//! [`NetBackend`] is what a card sees: a descriptor to sleep on, and packets in and out. A packet is a virtio network header
//! ([`abi::virtio::net::Header`], 12 bytes) and an Ethernet frame; every backend does what the header of a packet leaves to it, so
//! that all cards offer checksums and segmentation to their guests. [`passt`] connects to the host's network as an ordinary user would, with NAT and DHCP in a
//! helper process; [`tap`] is a kernel interface that an administrator made.

mod passt;
mod tap;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::str::FromStr;

use frames::Offloads;

use crate::DeviceBus;
pub use passt::Passt;
pub use tap::Tap;

/// Something that carries frames. Used by one thread at a time; nothing here blocks.
pub trait NetBackend: Send {
    /// Sleeps on this: readable when [`NetBackend::receive`] may have something, writable when [`NetBackend::send`] may go on.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Sends a packet: header and frame. What its header leaves to the network is done. [`io::ErrorKind::WouldBlock`]: not now, and
    /// nothing of it was sent.
    ///
    /// # Errors
    /// What the host says; other errors than `WouldBlock` and `InvalidInput` are for ever.
    fn send(&mut self, packet: &[u8]) -> io::Result<()>;

    /// The next packet into `packet`, which has room for [`frames::MAX_PACKET`] bytes; `None` when there is none now.
    ///
    /// # Errors
    /// When nothing will come any more; the text says why.
    fn receive(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>>;

    /// Whether part of a packet waits until [`NetBackend::fd`] is writable.
    fn has_unsent(&self) -> bool {
        false
    }

    /// Goes on with that part.
    ///
    /// # Errors
    /// As [`NetBackend::send`].
    fn send_unsent(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// What of a received packet is left to the guest from now on.
    ///
    /// # Errors
    /// What the host says.
    fn set_guest_offloads(&mut self, offloads: Offloads) -> io::Result<()>;
}

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address of the machine's `index`th card when nobody chose one: locally administered, as QEMU's are.
    pub fn default_for(index: u8) -> Mac {
        Mac([0x52, 0x54, 0x00, 0x12, 0x34, 0x56u8.wrapping_add(index)])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Mac, String> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2)
                .ok_or_else(|| format!("'{text}' is not a MAC address like 52:54:00:12:34:56"))?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| format!("'{text}' is not a MAC address like 52:54:00:12:34:56"))?;
        }
        if parts.next().is_some() {
            return Err(format!("'{text}' is not a MAC address like 52:54:00:12:34:56"));
        }
        if bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(format!("'{text}' cannot be a card's MAC address: it is a group or zero"));
        }
        Ok(Mac(bytes))
    }
}

/// What a network card is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// The host's network through passt; with ports of the host that lead to the guest.
    User {
        /// Forwarded ports.
        forwards: Vec<Forward>,
    },
    /// The TAP interface of this name.
    Tap(String),
    /// There is no card.
    None,
}

/// A port of the host that leads to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// UDP instead of TCP.
    pub udp: bool,
    /// Port on the host.
    pub host: u16,
    /// Port on the guest.
    pub guest: u16,
}

/// A network card as asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicSpec {
    /// What it is connected to.
    pub network: Network,
    /// Its address; `None` for [`Mac::default_for`].
    pub mac: Option<Mac>,
    /// By which device the guest finds it.
    pub bus: DeviceBus,
}

impl FromStr for NicSpec {
    type Err = String;

    /// `user|tap:NAME|none[,mac=MAC][,bus=virtio|xen|hyperv][,forward=tcp|udp:HOSTPORT:GUESTPORT]...`
    fn from_str(text: &str) -> Result<NicSpec, String> {
        let mut words = text.split(',');
        let mut network = match words.next().unwrap_or_default() {
            "user" => Network::User { forwards: Vec::new() },
            "none" => Network::None,
            word => match word.strip_prefix("tap:") {
                Some(name) if !name.is_empty() => Network::Tap(name.into()),
                _ => return Err(format!("unknown network '{word}'; there are user, tap:NAME and none")),
            },
        };
        let (mut mac, mut bus) = (None, DeviceBus::default());
        for word in words {
            match (word.split_once('='), &mut network) {
                (Some(("mac", value)), _) => mac = Some(value.parse()?),
                (Some(("bus", value)), _) => bus = value.parse()?,
                (Some(("forward", value)), Network::User { forwards }) => forwards.push(value.parse()?),
                (Some(("forward", _)), _) => return Err("forward= goes with --nic user only".into()),
                _ => {
                    return Err(format!(
                        "unknown network option '{word}'; there are mac=MAC, bus=virtio|xen|hyperv and forward=tcp|udp:HOSTPORT:GUESTPORT"
                    ));
                }
            }
        }
        Ok(NicSpec { network, mac, bus })
    }
}

impl fmt::Display for NicSpec {
    /// As it is parsed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.network {
            Network::User { .. } => f.write_str("user")?,
            Network::Tap(name) => write!(f, "tap:{name}")?,
            Network::None => f.write_str("none")?,
        }
        if let Some(mac) = self.mac {
            write!(f, ",mac={mac}")?;
        }
        write!(f, ",bus={}", self.bus)?;
        if let Network::User { forwards } = &self.network {
            for Forward { udp, host, guest } in forwards {
                write!(f, ",forward={}:{host}:{guest}", if *udp { "udp" } else { "tcp" })?;
            }
        }
        Ok(())
    }
}

impl FromStr for Forward {
    type Err = String;

    fn from_str(text: &str) -> Result<Forward, String> {
        let error = || format!("'{text}' is not a forward like tcp:2222:22");
        let mut parts = text.split(':');
        let (Some(protocol), Some(host), Some(guest), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            return Err(error());
        };
        let udp = match protocol {
            "tcp" => false,
            "udp" => true,
            _ => return Err(error()),
        };
        Ok(Forward { udp, host: host.parse().map_err(|_| error())?, guest: guest.parse().map_err(|_| error())? })
    }
}

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// passt is not there.
    #[error("--nic user needs the program passt ({0}); install it (Debian: apt install passt) or use --nic none")]
    NoPasst(io::Error),
    /// passt ended at once.
    #[error("passt does not start: {0}")]
    Passt(String),
    /// A port to be forwarded is not free.
    #[error("port {port} of the host cannot lead to the guest: {source}")]
    Forward {
        /// The port.
        port: u16,
        /// The host's answer.
        source: io::Error,
    },
    /// There is no such interface.
    #[error("there is no network interface {0}; make it with: ip tuntap add {0} mode tap && ip link set {0} up")]
    NoTap(String),
    /// The interface cannot be used.
    #[error("network interface {name}: {what}: {source}")]
    Tap {
        /// Interface.
        name: String,
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// TAP interfaces are not to be had.
    #[error("{path}: {source}")]
    NoTun {
        /// The device node.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// The host has no sockets or processes left.
    #[error("network: {0}")]
    Host(#[from] io::Error),
}

/// Connects to `network`; `None` for [`Network::None`].
///
/// # Errors
/// [`NetError`] says what is missing and what can be done.
pub fn open(network: &Network) -> Result<Option<Box<dyn NetBackend>>, NetError> {
    Ok(match network {
        Network::User { forwards } => Some(Box::new(Passt::start(forwards)?)),
        Network::Tap(name) => Some(Box::new(Tap::open(name)?)),
        Network::None => None,
    })
}

#[cfg(test)]
mod tests;
