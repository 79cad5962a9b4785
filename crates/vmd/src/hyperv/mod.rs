//! What a machine with the Hyper-V dialect has besides.

mod components;
mod devices;
mod disk;
mod nic;

use std::fmt::Write;
use std::sync::Arc;

use ::devices::MachineEvents;
use ::devices::interrupts::InterruptRouter;
use dialects::hyperv::{Crash, Machine};

use crate::kv::printable;
use crate::machine::{Event, EventSender};

pub use components::{AskError, Components};
pub use devices::Devices;

/// Why the dialect needs the software CPU.
pub const NOT_ON_KVM: &str =
    "on KVM the guest's TSC is not the clock from which Hyper-V's time is told, and its local APIC is out of reach of Hyper-V's MSRs";

/// The machine as the dialect ends it.
pub struct Ending {
    events: Arc<dyn MachineEvents>,
    sender: EventSender,
    interrupts: Arc<InterruptRouter>,
}

impl Ending {
    /// A machine that ends by `events`; what its guest says goes to `sender`.
    pub fn new(events: Arc<dyn MachineEvents>, sender: EventSender, interrupts: Arc<InterruptRouter>) -> Ending {
        Ending { events, sender, interrupts }
    }
}

impl Machine for Ending {
    fn reset(&self) {
        self.events.reset();
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.interrupts.end_of_interrupt(vector);
    }

    fn crashed(&self, crash: &Crash) {
        // A machine that has ended no longer listens.
        let _ = self.sender.send(Event::Said(describe(crash)));
    }
}

/// A crash for people: what the guest means by its parameters only it knows.
fn describe(crash: &Crash) -> String {
    let mut text = String::from("the guest says that it has crashed:");
    for parameter in crash.parameters {
        // Writing to a string does not fail.
        let _ = write!(text, " {parameter:#x}");
    }
    for line in crash.message.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
        let _ = write!(text, "\n    {}", printable(line));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_of_a_crash_cannot_touch_the_terminal() {
        let crash = Crash { parameters: [1, 2, 0, 0x1000, 9], message: b"panic\n\x1b[2Jend\n".to_vec() };
        let text = describe(&crash);
        assert!(text.starts_with("the guest says that it has crashed: 0x1 0x2 0x0 0x1000 0x9\n    panic\n"), "{text}");
        assert!(text.contains("end") && !text.contains('\x1b'), "{text}");
    }
}
