//! The demonstration: what a newcomer sees of pvbus, done with the commands of the prompt.

use alloc::format;
use alloc::vec::Vec;

use pvbus::Kind;
use pvbus::hal::MILLISECOND;

use crate::bus::Bus;
use crate::prompt::demonstrate;
use crate::time;

/// Keys of the host's in a store, some of which `vmctl` sets for the demonstration, and the key that is written for it.
const fn keys(kind: Kind) -> ([&'static str; 2], &'static str) {
    match kind {
        Kind::Xen => (["name", "vm"], "data/said"),
        Kind::HyperV => (["Guest/Parameters/VirtualMachineName", "External/greeting"], "Guest/said"),
        _ => (["guestinfo.hostname", "guestinfo.greeting"], "guestinfo.guest.said"),
    }
}

/// Shows the tree, and exchanges keys with the host through every store.
pub fn run(bus: &mut Bus) {
    demonstrate(bus, "pvbus");
    let kinds: Vec<Kind> = bus.tree.stores().kinds().collect();
    for (minor, kind) in kinds.into_iter().enumerate() {
        if bus.tree.stores().store(kind).is_none() {
            continue;
        }
        let (host_keys, guest_key) = keys(kind);
        for key in host_keys {
            demonstrate(bus, &format!("hostctl -f /dev/pvbus{minor} {key}"));
        }
        let said = format!("hello through {kind} after {} ms", time::now() / MILLISECOND);
        demonstrate(bus, &format!("hostctl -f /dev/pvbus{minor} {guest_key} \"{said}\""));
    }
}
