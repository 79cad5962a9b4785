//! Network cards for netfront: [`Netback`] on a network of the host, in a thread of its own.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::net::{Mac, NetBackend};
use dialects::network::Worked;
use dialects::xen::net::Netback;
use dialects::xen::xenbus::Backend;

use super::domain::{Device, Domain, StoreKeys};
use crate::link::Link;

/// Adds a card to the domain.
///
/// # Errors
/// When the host has no thread or descriptor left.
pub fn add(domain: &Domain, index: u32, mac: Mac, network: Box<dyn NetBackend>) -> io::Result<()> {
    let keys = [("mac", mac.to_string()), ("handle", index.to_string())];
    let mut backend = keys.to_vec();
    backend.push(("hotplug-status", "connected".to_owned()));
    domain.add("vif", index, &keys, &backend, move |device| serve(device, Link::new(network)))
}

fn serve(device: Device, mut link: Link) {
    let Device { xen, host, backend, frontend, bell } = device;
    let changed = Arc::new(AtomicBool::new(false));
    let ring = bell.clone();
    let driver = Netback::new(xen, link.has_offloads(), Arc::new(move || ring.ring()));
    let state = format!("{frontend}/state");
    let mut backend = Backend::new(driver, Arc::new(StoreKeys(Arc::clone(&host))), backend, frontend);
    let (flag, ring) = (Arc::clone(&changed), bell.clone());
    let watching = host.watch(&state, move |_| {
        flag.store(true, Ordering::Release);
        ring.ring();
    });
    let mut worked = Worked::default();
    while !bell.is_stopped() && link.wait(&bell, worked) {
        if changed.swap(false, Ordering::AcqRel) {
            backend.frontend_changed();
        }
        if let Err(error) = link.set_offloads(backend.driver().guest_offloads()) {
            backend.fail(&format!("the network cannot do what the guest expects: {error}"));
        }
        worked = link.turn(|network| backend.driver().work(network)).unwrap_or_else(|error| {
            backend.fail(&error.to_string());
            Worked::default()
        });
    }
    drop(watching);
    backend.end();
}
