//! The network: smoltcp on each of the machine's network cards, with an address by DHCP, or a person's. It answers pings by itself; the rest is for
//! commands, which use the first.
//!
//! ```text
//!   commands.rs --sockets--> Network --frames--> Wire --> pvbus' NetDevice
//! ```
//!
//! Nothing runs by itself: the bus polls the network whenever it is polled, and is told when to do so next.

pub mod commands;
mod wire;

use alloc::sync::Arc;
use core::fmt;
use core::net::IpAddr;

use pvbus::Nanos;
use pvbus::net::{Address, NetDevice, Nic};
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::socket::dhcpv4;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address, Ipv4Cidr};

use crate::{dmesg, time};
use wire::Wire;

/// Nanoseconds of a microsecond, which smoltcp counts.
const MICROSECOND: u64 = 1000;

/// The network on one card.
pub struct Network {
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    /// Until a person gives an address.
    dhcp: Option<SocketHandle>,
    lease: Option<Lease>,
    /// The lease is another than when it was last asked for.
    has_new_lease: bool,
}

/// An address in the network.
#[derive(Clone, Copy)]
pub struct Lease {
    /// Our address.
    pub address: Ipv4Cidr,
    /// The way to others.
    pub router: Option<Ipv4Address>,
}

impl Network {
    /// Begins to ask for an address.
    pub fn new(card: Arc<dyn NetDevice>) -> Network {
        let mut config = Config::new(EthernetAddress(card.mac()).into());
        // Tells apart what this run asks from what an earlier one did.
        config.random_seed = time::now() ^ u64::from_le_bytes([0, 0, 0, 0, 1, 2, 3, 4]);
        let mut wire = Wire::new(card);
        let interface = Interface::new(config, &mut wire, instant());
        let mut sockets = SocketSet::new(alloc::vec::Vec::new());
        let dhcp = Some(sockets.add(dhcpv4::Socket::new()));
        Network { wire, interface, sockets, dhcp, lease: None, has_new_lease: false }
    }

    /// The card's name.
    pub fn name(&self) -> &str {
        self.wire.card().name()
    }

    /// Moves what can be moved. Whether anything changed for a socket, and when to poll again, unless a frame comes sooner.
    pub fn poll(&mut self) -> (bool, Option<Nanos>) {
        let changed = self.interface.poll(instant(), &mut self.wire, &mut self.sockets) == PollResult::SocketStateChanged;
        if changed {
            self.follow_dhcp();
        }
        let next = self.interface.poll_at(instant(), &self.sockets);
        (changed, next.map(|next| next.total_micros().max(0).cast_unsigned().saturating_mul(MICROSECOND)))
    }

    /// Whether the address is another than when this was last asked.
    pub fn take_news(&mut self) -> bool {
        core::mem::take(&mut self.has_new_lease)
    }

    /// The card as hosts want to know it.
    pub fn nic(&self) -> Nic {
        let address = |lease: Lease| Address { ip: IpAddr::V4(lease.address.address()), prefix: lease.address.prefix_len() };
        Nic { mac: self.wire.card().mac(), addresses: self.lease.map(address).into_iter().collect() }
    }

    /// Takes an address that a person gives, and asks for none any more.
    pub fn set(&mut self, lease: Lease) {
        if let Some(dhcp) = self.dhcp.take() {
            self.sockets.remove(dhcp);
        }
        self.take(Some(lease), "");
    }

    fn follow_dhcp(&mut self) {
        let Some(dhcp) = self.dhcp else { return };
        let lease = match self.sockets.get_mut::<dhcpv4::Socket>(dhcp).poll() {
            Some(dhcpv4::Event::Configured(config)) => Some(Lease { address: config.address, router: config.router }),
            Some(dhcpv4::Event::Deconfigured) if self.lease.is_some() => None,
            _ => return,
        };
        self.take(lease, " by DHCP");
    }

    fn take(&mut self, lease: Option<Lease>, from: &str) {
        self.interface.update_ip_addrs(|addresses| {
            addresses.clear();
            // There is room for one in an empty list.
            let _ = lease.map(|lease| addresses.push(IpCidr::Ipv4(lease.address)));
        });
        self.interface.routes_mut().remove_default_ipv4_route();
        if let Some(router) = lease.and_then(|lease| lease.router) {
            let _ = self.interface.routes_mut().add_default_ipv4_route(router);
        }
        match lease {
            Some(lease) => dmesg!("{}: {lease}{from}", self.name()),
            None => dmesg!("{}: its address is not ours any more", self.name()),
        }
        self.lease = lease;
        self.has_new_lease = true;
    }
}

impl fmt::Display for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.address)?;
        self.router.map_or(Ok(()), |router| write!(f, ", gateway {router}"))
    }
}

/// Now, as smoltcp has it.
fn instant() -> Instant {
    Instant::from_micros((time::now() / MICROSECOND).cast_signed())
}
