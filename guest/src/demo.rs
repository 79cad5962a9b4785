//! The demonstration: what a newcomer sees of pvbus, done with the commands of the prompt.

use alloc::format;
use alloc::vec::Vec;

use pvbus::Kind;
use pvbus::hal::MILLISECOND;

use crate::bus::Bus;
use crate::prompt::demonstrate;
use crate::time;

/// Keys that `vmctl` sets for the demonstration.
const HOST_KEYS: [&str; 2] = ["guestinfo.hostname", "guestinfo.greeting"];
/// The key that is written for it.
const GUEST_KEY: &str = "guestinfo.guest.said";

/// Shows the tree, and exchanges keys with the host through every store.
pub fn run(bus: &mut Bus) {
    demonstrate(bus, "pvbus");
    let kinds: Vec<Kind> = bus.tree.stores().kinds().collect();
    for (minor, kind) in kinds.into_iter().enumerate() {
        if bus.tree.stores().store(kind).is_none() {
            continue;
        }
        for key in HOST_KEYS {
            demonstrate(bus, &format!("hostctl -f /dev/pvbus{minor} {key}"));
        }
        let said = format!("hello through {kind} after {} ms", time::now() / MILLISECOND);
        demonstrate(bus, &format!("hostctl -f /dev/pvbus{minor} {GUEST_KEY} \"{said}\""));
    }
}
