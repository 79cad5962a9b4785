//! Network cards for netfront: [`Netback`] on a network of the host, in a thread of its own.

use devices::net::{Mac, NetBackend};
use dialects::network::Worked;
use dialects::xen::net::Netback;

use super::device::{DeviceKeys, Names, Slot};
use crate::link::Link;

/// Most cards.
const MOST: u32 = 256;

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
pub(super) fn serve(slot: Slot, network: Box<dyn NetBackend>) {
    let mut link = Link::new(network);
    let bell = slot.bell();
    let driver = Netback::new(slot.xen(), slot.peer());
    let mut served = slot.begin(driver);
    let mut worked = Worked::default();
    while link.wait(&bell, worked) && served.goes_on() {
        if let Err(error) = link.set_offloads(served.backend.driver().guest_offloads()) {
            served.backend.fail(&format!("the network cannot do what the guest expects: {error}"));
        }
        worked = link.turn(|network| served.backend.driver().work(network)).unwrap_or_else(|error| {
            served.backend.fail(&error.to_string());
            Worked::default()
        });
    }
    served.end();
}
