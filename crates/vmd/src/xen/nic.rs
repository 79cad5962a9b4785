//! Network cards for netfront: [`Netback`] on a network of the host, in a thread of its own.

use std::io;

use devices::net::{GuestOffloads, Mac, NetBackend};
use dialects::xen::net::{NetError, Netback, Network, Offloads, Worked};
use dialects::xen::xenbus::Backend;
use rustix::event::PollFlags;

use super::device::{DeviceKeys, Names, Slot};

/// Most cards.
const MOST: u32 = 256;

/// A network as Netback sees it.
struct Link<'a>(&'a mut dyn NetBackend);

impl Network for Link<'_> {
    fn send(&mut self, packet: &[u8]) -> io::Result<()> {
        self.0.send(packet)
    }

    fn receive(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        self.0.receive(packet)
    }
}

/// Names of cards, in the order in which they are given.
pub(super) fn places() -> impl Iterator<Item = Names> {
    (0..MOST).map(|number| Names { kind: "vif", number, place: format!("vif-{number}") })
}

/// What both directories have besides.
pub(super) fn keys(names: &Names, mac: Mac) -> DeviceKeys {
    let frontend = vec![("mac", mac.to_string()), ("handle", names.number.to_string())];
    let mut backend = frontend.clone();
    backend.push(("hotplug-status", "connected".to_owned()));
    DeviceKeys { frontend, backend }
}

/// The backend's thread.
pub(super) fn serve(slot: Slot, mut network: Box<dyn NetBackend>) {
    let bell = slot.bell();
    let driver = Netback::new(slot.xen(), network.has_offloads(), slot.peer());
    let mut served = slot.begin(driver);
    let mut is_up = true;
    let mut offloads = Offloads::default();
    let mut worked = Worked::default();
    while !bell.is_stopped() {
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, worked.has_room);
        wanted.set(PollFlags::OUT, worked.blocked || network.has_unsent());
        let waits = !worked.more;
        if waits && bell.wait_or((is_up && !wanted.is_empty()).then(|| (network.fd(), wanted))).is_none() {
            break;
        }
        if !served.goes_on() {
            break;
        }
        let backend = &mut served.backend;
        let guest = backend.driver().guest_offloads();
        if guest != offloads {
            offloads = guest;
            let wanted = GuestOffloads { checksum: guest.checksum, tso4: guest.tso4, tso6: guest.tso6 };
            if let Err(error) = network.set_guest_offloads(wanted) {
                backend.fail(&format!("the network cannot do what the guest expects: {error}"));
            }
        }
        worked = turn(backend, network.as_mut(), &mut is_up);
    }
    served.end();
}

/// Moves what there is to move.
fn turn(backend: &mut Backend<Netback>, network: &mut dyn NetBackend, is_up: &mut bool) -> Worked {
    let unsent = if *is_up && network.has_unsent() { network.send_unsent() } else { Ok(()) };
    let worked = match unsent {
        Err(error) if !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Err(NetError::Network(error)),
        _ if *is_up => backend.driver().work(Some(&mut Link(network))),
        // Without a link, what is sent is lost.
        _ => backend.driver().work(None),
    };
    match worked {
        Ok(worked) => worked,
        Err(NetError::Ring(error)) => {
            backend.fail(&error.to_string());
            Worked::default()
        }
        Err(NetError::Network(error)) => {
            // Once: without a link the network is left alone.
            eprintln!("vmctl: a network is gone: {error}");
            *is_up = false;
            Worked { more: true, ..Worked::default() }
        }
    }
}
