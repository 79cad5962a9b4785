//! The demonstration: what a newcomer sees of pvbus, done with the commands of the prompt.

use alloc::format;
use alloc::vec::Vec;

use pvbus::hal::{MILLISECOND, SECOND};
use pvbus::{Kind, Nanos};

use crate::bus::Bus;
use crate::prompt::demonstrate;
use crate::{interrupts, time};

/// Keys of the host's in a store, some of which `vmctl` sets for the demonstration, and the key that is written for it.
const fn keys(kind: Kind) -> ([&'static str; 2], &'static str) {
    match kind {
        Kind::Xen => (["name", "vm"], "data/said"),
        Kind::HyperV => (["Guest/Parameters/VirtualMachineName", "External/greeting"], "Guest/said"),
        _ => (["guestinfo.hostname", "guestinfo.greeting"], "guestinfo.guest.said"),
    }
}

/// How long a host may take to tell its keys, where it does that by itself.
const PATIENCE: Nanos = SECOND;

/// Waits until the host has told the keys, if it will.
fn wait_for(bus: &mut Bus, kind: Kind, keys: [&str; 2]) {
    let deadline = time::now() + PATIENCE;
    let is_told =
        |bus: &mut Bus| bus.tree.stores().store(kind).is_none_or(|store| keys.iter().all(|key| store.read(key.as_bytes()).is_ok()));
    while kind == Kind::HyperV && !is_told(bus) && time::now() < deadline {
        let next = bus.poll().unwrap_or(deadline);
        interrupts::wait(Some(next.min(deadline)));
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
        wait_for(bus, kind, host_keys);
        for key in host_keys {
            demonstrate(bus, &format!("hostctl -f /dev/pvbus{minor} {key}"));
        }
        let said = format!("hello through {kind} after {} ms", time::now() / MILLISECOND);
        demonstrate(bus, &format!("hostctl -f /dev/pvbus{minor} {guest_key} \"{said}\""));
    }
}
