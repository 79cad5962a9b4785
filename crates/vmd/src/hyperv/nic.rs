//! Network cards for Hyper-V's network driver: [`Netvsc`] on a network of the host, in a thread of its own.

use std::io;
use std::sync::Arc;

use abi::hyperv::vmbus::Guid;
use devices::net::{Mac, NetBackend};
use devices::virtio::worker::{Bell, Worker};
use dialects::hyperv::netvsc::Netvsc;
use dialects::hyperv::vmbus::{BrokenRing, Channel, Device, Offer, VmBus};
use dialects::network::Worked;

use crate::link::Link;

/// A card's name on the bus but for its last 48 bits, which are the address: as Hyper-V names them.
const INSTANCE: u128 = 0xf8615163_0000_1000_2000_000000000000;

/// A card with its link.
struct Nic {
    card: Netvsc,
    link: Link,
}

impl Device for Nic {
    type Error = BrokenRing;

    fn offer(&self) -> Offer {
        self.card.offer()
    }

    fn opened(&mut self, channel: Channel) {
        self.card.opened(channel);
    }

    fn closed(&mut self, index: u16) {
        self.card.closed(index);
    }

    fn work(&mut self) -> Result<Worked, BrokenRing> {
        if let Err(error) = self.link.set_offloads(self.card.guest_offloads()) {
            eprintln!("vmctl: a network cannot do what its card expects: {error}");
        }
        let worked = self.link.turn(|network| self.card.work(network));
        self.card.set_link(self.link.is_up());
        worked
    }
}

/// Puts a card on `bus`; its thread.
///
/// # Errors
/// When the host has no thread or descriptor left.
pub fn add(bus: Arc<VmBus>, index: u32, mac: Mac, network: Box<dyn NetBackend>) -> io::Result<Worker<()>> {
    Worker::spawn(&format!("hyperv-net{index}"), move |bell| serve(&bus, mac, Link::new(network), &bell))
}

fn serve(bus: &Arc<VmBus>, mac: Mac, link: Link, bell: &Bell) {
    let Mac([a, b, c, d, e, f]) = mac;
    let instance = Guid::from_u128(INSTANCE | u128::from(u64::from_be_bytes([0, 0, a, b, c, d, e, f])));
    let ring = bell.clone();
    let card = Netvsc::new(instance, mac.0, link.has_offloads());
    let mut nic = bus.attach(Nic { card, link }, Arc::new(move || ring.ring()));
    let mut worked = Worked::default();
    while !bell.is_stopped() && nic.device().link.wait(bell, worked) {
        worked = nic.work();
    }
}
