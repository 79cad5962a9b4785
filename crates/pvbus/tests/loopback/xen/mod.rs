//! Xen: the domain against `dialects::xen` and `xenstore`, as `vmd` puts these together, with the host's threads taking turns with the guest.

mod disk;
mod negotiation;
mod net;
mod store;

use std::sync::Arc;

use abi::hypervisor::FIRST_BASE;
use abi::xen::hvm::STORE_PAGE;
use dialects::kvm::clock::PvClock;
use dialects::xen::xenbus::Keys;
use dialects::xen::xenstore::StorePage;
use dialects::xen::{SetLine, Shutdown, Wire, Xen};
use pvbus::{Event, Hal, Tree};
use vm_memory::{Bytes, GuestAddress};
use xenstore::ring::StoreRing;
use xenstore::{Config, DomId, Perms, Ring, Session, SharedStore};

use crate::machine::{Interrupts, Machine};

const HZ: u64 = 1_000_000_000;
const SECOND: u64 = 1_000_000_000;
const GUEST: DomId = DomId(1);
const HOME: &str = "/local/domain/1";
/// Nodes that the guest may write.
const GUESTS_OWN: [&str; 6] = ["data", "error", "device", "control/shutdown", "control/feature-poweroff", "control/feature-reboot"];

/// A domain, its hypervisor, and its host's store.
struct Rig {
    machine: Machine,
    xen: Arc<Xen>,
    store: SharedStore,
    host: Session,
}

impl dialects::xen::Machine for Interrupts {
    fn shut_down(&self, _reason: Shutdown) {}
    fn unplug_disks(&self, _with_first: bool) {}
    fn line(&self, _wire: Wire) -> Option<SetLine> {
        None
    }
}

/// The store as backends use it.
struct HostKeys(Session);

impl Keys for HostKeys {
    fn read(&self, path: &str) -> Option<String> {
        String::from_utf8(self.0.read(path).ok()?).ok()
    }
    fn write(&self, keys: &[(String, String)]) {
        self.0.update(|view| keys.iter().try_for_each(|(path, value)| view.write(path, value.as_bytes()))).unwrap();
    }
}

/// A device's two directories.
#[derive(Debug, Clone, Copy)]
struct Place {
    front: &'static str,
    back: &'static str,
}

/// A backend that writes anything, the same in each run (xorshift: Marsaglia, "Xorshift RNGs").
struct Noise(u64);

impl Noise {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }

    /// Writes small and large numbers to a ring, to its indices more often than elsewhere.
    fn write(&mut self, xen: &Xen, page: u64) {
        for _ in 0..self.below(8) {
            let at = if self.below(2) == 0 { self.below(4) } else { self.below(200) };
            let value = if self.below(4) == 0 { self.below(1 << 32) } else { self.below(4) };
            xen.memory().write_obj(value as u32, GuestAddress(page + at as u64 * 4)).unwrap();
        }
    }
}

impl Rig {
    /// With a store that is served, and the nodes of a domain.
    fn new() -> Rig {
        let rig = Rig::silent();
        let (xen, store) = (Arc::clone(&rig.xen), rig.store.clone());
        let client = store.with(|server| server.introduce(GUEST, Ring { gfn: STORE_PAGE / 4096, port: 1 })).unwrap();
        let mut ring = StoreRing::new(StorePage::new(rig.machine.memory.clone()), 0);
        rig.machine.spawn(move || {
            let served = store.with(|server| {
                let served = ring.serve(server, client);
                server.take_active();
                served
            });
            if served.notify {
                xen.notify(1);
            }
        });
        rig
    }

    /// With a store that says nothing.
    fn silent() -> Rig {
        let rig = Rig::storeless();
        assert_eq!(rig.xen.open_store(Arc::new(|| {})), Some(1));
        for name in ["name", "device", "control/platform-feature-xs_reset_watches"] {
            rig.host.write(&format!("{HOME}/{name}"), b"1").unwrap();
            rig.allow(&format!("{HOME}/{name}"), "n0,r1");
        }
        rig.allow(HOME, "n0,r1");
        for name in GUESTS_OWN {
            rig.host.write(&format!("{HOME}/{name}"), b"").unwrap();
            rig.allow(&format!("{HOME}/{name}"), "n1");
        }
        rig
    }

    /// Without a store.
    fn storeless() -> Rig {
        let machine = Machine::new();
        let clock = Arc::new(PvClock::new(machine.memory.clone(), machine.clock.clone(), HZ, 1));
        let xen = Xen::new(machine.memory.clone(), clock, machine.timers.clone(), None, [7; 16], 1);
        let store = SharedStore::new(Config::default());
        let host = store.host();
        Rig { machine: machine.with(FIRST_BASE, xen.clone()), xen, store, host }
    }

    /// Both directories of a device, in Initialising, with what the toolstack writes to the frontend's.
    fn plug(&self, Place { front, back }: Place, own: &[(&str, &str)]) {
        for (path, perms) in [(front, "n1,r0"), (back, "n0,r1")] {
            self.host.mkdir(path).unwrap();
            self.allow(path, perms);
        }
        for (key, value) in own {
            self.host.write(&format!("{front}/{key}"), value.as_bytes()).unwrap();
        }
        for (path, key, value) in
            [(front, "backend", back), (front, "backend-id", "0"), (back, "frontend", front), (back, "state", "1"), (front, "state", "1")]
        {
            self.host.write(&format!("{path}/{key}"), value.as_bytes()).unwrap();
        }
    }

    fn unplug(&self, place: Place) {
        self.host.remove(place.front).unwrap();
        self.host.remove(place.back).unwrap();
    }

    /// The backend says something.
    fn back(&self, place: Place, key: &str, value: &str) {
        self.host.write(&format!("{}/{key}", place.back), value.as_bytes()).unwrap();
    }

    /// What the frontend said.
    fn front(&self, place: Place, key: &str) -> String {
        String::from_utf8(self.host.read(&format!("{}/{key}", place.front)).unwrap_or_default()).unwrap()
    }

    fn allow(&self, path: &str, perms: &str) {
        self.host.set_perms(path, Perms::parse(perms.split(',').map(str::as_bytes)).unwrap()).unwrap();
    }

    /// What the devices want when everybody has had enough turns.
    fn poll(&self, tree: &mut Tree<'_>) -> Vec<Event> {
        let mut events = Vec::new();
        for _ in 0..8 {
            self.machine.wait_until(self.machine.now() + SECOND);
            events.extend(tree.poll(self.machine.now()).events);
        }
        events
    }

    /// The lines for the message buffer among them.
    fn lines(&self, tree: &mut Tree<'_>) -> Vec<String> {
        let line = |event| match event {
            Event::Message(line) => Some(line),
            _ => None,
        };
        self.poll(tree).into_iter().filter_map(line).collect()
    }
}
