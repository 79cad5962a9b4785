//! Network cards for netfront: [`Netback`] on a network of the host, in a thread of its own.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::net::{GuestOffloads, Mac, NetBackend};
use dialects::xen::net::{NetError, Netback, Network, Offloads, Worked};
use dialects::xen::xenbus::Backend;
use rustix::event::PollFlags;

use super::domain::{Device, Domain, StoreKeys};

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

/// Adds a card to the domain.
///
/// # Errors
/// When the host has no thread or descriptor left.
pub fn add(domain: &Domain, index: u32, mac: Mac, network: Box<dyn NetBackend>) -> io::Result<()> {
    let keys = [("mac", mac.to_string()), ("handle", index.to_string())];
    let mut backend = keys.to_vec();
    backend.push(("hotplug-status", "connected".to_owned()));
    domain.add("vif", index, &keys, &backend, move |device| serve(device, network))
}

fn serve(device: Device, mut network: Box<dyn NetBackend>) {
    let Device { xen, host, backend, frontend, bell } = device;
    let changed = Arc::new(AtomicBool::new(false));
    let ring = bell.clone();
    let driver = Netback::new(xen, network.has_offloads(), Arc::new(move || ring.ring()));
    let state = format!("{frontend}/state");
    let mut backend = Backend::new(driver, Arc::new(StoreKeys(Arc::clone(&host))), backend, frontend);
    let (flag, ring) = (Arc::clone(&changed), bell.clone());
    let watching = host.watch(&state, move |_| {
        flag.store(true, Ordering::Release);
        ring.ring();
    });
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
        if changed.swap(false, Ordering::AcqRel) {
            backend.frontend_changed();
        }
        let guest = backend.driver().guest_offloads();
        if guest != offloads {
            offloads = guest;
            let wanted = GuestOffloads { checksum: guest.checksum, tso4: guest.tso4, tso6: guest.tso6 };
            if let Err(error) = network.set_guest_offloads(wanted) {
                backend.fail(&format!("the network cannot do what the guest expects: {error}"));
            }
        }
        worked = turn(&mut backend, network.as_mut(), &mut is_up);
    }
    drop(watching);
    backend.end();
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
