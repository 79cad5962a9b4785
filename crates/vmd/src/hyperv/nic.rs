//! Network cards for Hyper-V's network driver: [`Netvsc`] on a network of the host, in a thread of its own.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use abi::hyperv::vmbus::Guid;
use devices::net::{Mac, NetBackend};
use devices::virtio::worker::{Bell, Worker};
use dialects::hyperv::netvsc::Netvsc;
use dialects::hyperv::vmbus::{BrokenRing, Channel, Device, Offer, VmBus};
use dialects::network::Worked;

use crate::hotplug::{Condition, Gone, Plugged, Stage};
use crate::link::Link;

/// A card's name on the bus but for its last 48 bits, which are the address: as Hyper-V names them.
const INSTANCE: u128 = 0xf8615163_0000_1000_2000_000000000000;

/// A card that is plugged in.
pub(super) struct HypervNic {
    mac: Mac,
    state: Arc<State>,
    /// `None` once it was ended.
    worker: Mutex<Option<Worker<()>>>,
}

/// What is known of a card outside of its thread.
#[derive(Default)]
struct State {
    is_in_use: AtomicBool,
    /// The guest is to let go of it.
    is_leaving: AtomicBool,
    /// And has no network any more.
    is_cut: AtomicBool,
}

impl HypervNic {
    /// Puts a card on `bus`.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    pub fn new(bus: Arc<VmBus>, mac: Mac, network: Box<dyn NetBackend>, gone: Gone) -> io::Result<HypervNic> {
        let state = Arc::new(State::default());
        let theirs = Arc::clone(&state);
        let worker = Worker::spawn("hyperv-net", move |bell| {
            if serve(&bus, mac, Link::new(network), &theirs, &bell) {
                gone();
            }
        })?;
        Ok(HypervNic { mac, state, worker: Mutex::new(Some(worker)) })
    }

    /// Whether its thread has nothing more to do.
    pub fn is_finished(&self) -> bool {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_none_or(Worker::is_finished)
    }

    /// Tells its thread to end.
    pub fn end_soon(&self) {
        if let Some(worker) = self.worker.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            worker.end_soon();
        }
    }

    fn ring(&self) {
        if let Some(worker) = self.worker.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            worker.ring();
        }
    }

    /// Ends its thread and waits for it.
    pub fn end(&self) {
        let worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(worker);
    }
}

impl Plugged for HypervNic {
    fn place(&self) -> String {
        self.mac.to_string()
    }

    fn condition(&self) -> Condition {
        let stage = match () {
            () if self.state.is_leaving.load(Ordering::Acquire) => Stage::Leaving,
            () if self.state.is_in_use.load(Ordering::Acquire) => Stage::InUse,
            () => Stage::Offered,
        };
        Condition { stage, said: None }
    }

    fn ask_back(&self) {
        self.state.is_leaving.store(true, Ordering::Release);
        self.ring();
    }

    fn pull(&self) {
        self.state.is_cut.store(true, Ordering::Release);
        self.ask_back();
    }
}

/// A card with its link.
struct Card {
    card: Netvsc,
    link: Link,
}

impl Device for Card {
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

/// The card's thread; `true` when the guest has let go of the card.
fn serve(bus: &Arc<VmBus>, mac: Mac, link: Link, state: &State, bell: &Bell) -> bool {
    let Mac([a, b, c, d, e, f]) = mac;
    let instance = Guid::from_u128(INSTANCE | u128::from(u64::from_be_bytes([0, 0, a, b, c, d, e, f])));
    let ring = bell.clone();
    let card = Netvsc::new(instance, mac.0);
    let mut card = bus.attach(Card { card, link }, Arc::new(move || ring.ring()));
    let mut is_rescinded = false;
    let mut worked = Worked::default();
    while !bell.is_stopped() && card.device().link.wait(bell, worked) {
        if state.is_cut.load(Ordering::Acquire) {
            card.device().link.cut();
        }
        if state.is_leaving.load(Ordering::Acquire) && !is_rescinded {
            is_rescinded = true;
            card.rescind();
        }
        worked = card.work();
        state.is_in_use.store(card.device().card.is_in_use(), Ordering::Release);
        if is_rescinded && card.is_let_go() {
            return true;
        }
    }
    false
}
