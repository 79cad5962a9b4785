//! xnf: a network card, by the backend's netif (`io/netif.h`).
//!
//! One queue: frames are copied by the processor that asks, so that a second queue would only divide the same work. Receiving by copy into pages of the
//! driver's own, an event channel for each direction where the backend has two, frames of several slots, checksums left blank in both directions. Large
//! frames that are to be cut are not asked for.
//!
//! ```text
//!   NetDevice::send    --frame--> transmit.rs --tx ring--> netback
//!   NetDevice::receive <--frame-- receive.rs  <--rx ring-- netback
//! ```
//!
//! OpenBSD `sys/dev/pv/if_xnf.c` is the model, which leaves checksums alone.

mod receive;
mod transmit;

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;

use abi::xen::io::xenbus::state;
use spin::Mutex;

use super::Domain;
use super::hypercall::{PAGE, XenError, offset};
use super::ring::BrokenRing;
use super::xenbus::{Frontend, Keys, Published, XenbusError};
use crate::hal::HalError;
use crate::net::{Checksum, ETHERNET_HEADER, NetDevice, NetError, Received, VLAN_TAG};
use receive::Receiver;
use transmit::Transmitter;

const PAGE_BYTES: usize = offset(PAGE);
/// Where the toolstack says nothing else (`docs/misc/xenstore-paths.pandoc`).
const MTU: usize = 1500;
/// Smallest and largest MTU that is believed: IPv4's (RFC 791), and that of the longest frame a slot can tell the length of.
const MTU_RANGE: core::ops::RangeInclusive<usize> = 68..=65535 - ETHERNET_HEADER - VLAN_TAG;

/// A network card. All clones are the same card.
#[derive(Clone)]
pub(super) struct Card<'h> {
    name: Arc<str>,
    xnf: Arc<Mutex<Xnf<'h>>>,
}

impl<'h> Card<'h> {
    pub fn new(name: &str, domain: &Arc<Domain<'h>>, backend_domain: u16) -> Card<'h> {
        let xnf = Xnf { domain: Arc::clone(domain), backend_domain, mac: [0; 6], mtu: MTU, link: None, is_up: false, takes_blank: false };
        Card { name: name.into(), xnf: Arc::new(Mutex::new(xnf)) }
    }
}

/// The driver.
struct Xnf<'h> {
    domain: Arc<Domain<'h>>,
    backend_domain: u16,
    mac: [u8; 6],
    mtu: usize,
    link: Option<Link<'h>>,
    /// It is connected, and the backend has not lied.
    is_up: bool,
    /// The backend completes checksums.
    takes_blank: bool,
}

/// What the backend is connected by.
struct Link<'h> {
    transmitter: Transmitter<'h>,
    receiver: Receiver<'h>,
    /// One or two.
    ports: Vec<u32>,
}

impl<'h> Xnf<'h> {
    /// Does something with a card that works. A backend that lies has no card any more.
    fn with<T>(&mut self, work: impl FnOnce(&mut Link<'h>) -> Result<T, NetError>) -> Result<T, NetError> {
        let link = self.link.as_mut().filter(|_| self.is_up).ok_or(NetError::Gone)?;
        let done = work(link);
        if matches!(done, Err(NetError::Broken)) {
            self.is_up = false;
        }
        done
    }

    /// Longest frame.
    fn max_frame(&self) -> usize {
        self.mtu + ETHERNET_HEADER + VLAN_TAG
    }

    /// Makes rings, buffers and ports.
    fn open(&self, is_split: bool, has_scatter: bool) -> Result<Link<'h>, XenError> {
        let mut ports = Vec::new();
        let opened = self.open_with(&mut ports, is_split, has_scatter);
        opened.map(|(transmitter, receiver)| Link { transmitter, receiver, ports: ports.clone() }).inspect_err(|_| {
            ports.iter().for_each(|port| self.domain.platform.close(*port));
        })
    }

    fn open_with(&self, ports: &mut Vec<u32>, is_split: bool, has_scatter: bool) -> Result<(Transmitter<'h>, Receiver<'h>), XenError> {
        for _ in 0..1 + u32::from(is_split) {
            ports.push(self.domain.platform.open(self.backend_domain)?);
        }
        let (tx_port, rx_port) = match ports.as_slice() {
            [tx, rx, ..] => (*tx, *rx),
            [one] => (*one, *one),
            [] => (0, 0),
        };
        let transmitter = Transmitter::new(&self.domain, self.backend_domain, tx_port, has_scatter)?;
        let receiver = Receiver::new(&self.domain, self.backend_domain, rx_port)?;
        Ok((transmitter, receiver))
    }
}

impl NetDevice for Card<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    fn mac(&self) -> [u8; 6] {
        self.xnf.lock().mac
    }

    fn mtu(&self) -> usize {
        self.xnf.lock().mtu
    }

    fn takes_blank_checksums(&self) -> bool {
        self.xnf.lock().takes_blank
    }

    fn send(&self, frame: &[u8], checksum: Checksum) -> Result<bool, NetError> {
        let mut xnf = self.xnf.lock();
        if !(ETHERNET_HEADER..=xnf.max_frame()).contains(&frame.len()) {
            return Err(NetError::Length);
        }
        xnf.with(|link| link.transmitter.send(frame, checksum))
    }

    fn receive(&self, buffer: &mut [u8]) -> Result<Option<Received>, NetError> {
        self.xnf.lock().with(|link| link.receiver.receive(buffer))
    }
}

impl Frontend for Card<'_> {
    fn publish(&mut self, keys: &mut Keys<'_, '_>) -> Result<Published, XenbusError> {
        let mut xnf = self.xnf.lock();
        // The other way, giving whole pages away, is long gone from backends.
        if !keys.has("feature-rx-copy")? {
            return Err(XenbusError::Missing("feature-rx-copy"));
        }
        let mac = keys.own("mac")?.ok_or(XenbusError::OwnKey("mac"))?;
        xnf.mac = parse_mac(&mac).ok_or(XenbusError::OwnKey("mac"))?;
        let has_scatter = keys.has("feature-sg")?;
        xnf.mtu = match keys.own("mtu")? {
            Some(mtu) => mtu.trim().parse().ok().filter(|mtu| MTU_RANGE.contains(mtu)).ok_or(XenbusError::OwnKey("mtu"))?,
            None => MTU,
        };
        if !has_scatter {
            xnf.mtu = xnf.mtu.min(PAGE_BYTES - ETHERNET_HEADER - VLAN_TAG);
        }
        // Offered for IPv4 by saying nothing, for IPv6 by saying so; what is sent may be either.
        xnf.takes_blank = !keys.has("feature-no-csum-offload")? && keys.has("feature-ipv6-csum-offload")?;
        let is_split = keys.has("feature-split-event-channels")?;
        let link = xnf.open(is_split, has_scatter)?;
        let mut published = Vec::from(
            ["request-rx-copy", "feature-rx-notify", "feature-sg", "feature-ipv6-csum-offload"].map(|name| (name, "1".to_string())),
        );
        let names: &[&str] = if is_split { &["event-channel-tx", "event-channel-rx"] } else { &["event-channel"] };
        published.extend(names.iter().copied().zip(link.ports.iter().map(u32::to_string)));
        published.push(("tx-ring-ref", link.transmitter.ring_ref().to_string()));
        published.push(("rx-ring-ref", link.receiver.ring_ref().to_string()));
        xnf.link = Some(link);
        Ok(Published { keys: published, state: state::CONNECTED })
    }

    fn connect(&mut self, _keys: &mut Keys<'_, '_>) -> Result<String, XenbusError> {
        let mut xnf = self.xnf.lock();
        xnf.is_up = true;
        xnf.domain.cards.lock().push(Arc::new(self.clone()));
        let [a, b, c, d, e, f] = xnf.mac;
        Ok(format!("address {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"))
    }

    fn disconnect(&mut self) {
        let mut xnf = self.xnf.lock();
        xnf.is_up = false;
        xnf.domain.cards.lock().retain(|card| card.name() != &*self.name);
        if let Some(Link { ports, .. }) = xnf.link.take() {
            ports.into_iter().for_each(|port| xnf.domain.platform.close(port));
        }
    }
}

impl From<BrokenRing> for NetError {
    fn from(_: BrokenRing) -> NetError {
        NetError::Broken
    }
}

impl From<XenError> for NetError {
    fn from(_: XenError) -> NetError {
        NetError::Refused
    }
}

impl From<HalError> for NetError {
    fn from(_: HalError) -> NetError {
        NetError::Refused
    }
}

/// Six bytes as hexadecimal numbers with colons in between.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut parts = text.trim().split(':');
    for byte in &mut bytes {
        let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(bytes)
}
