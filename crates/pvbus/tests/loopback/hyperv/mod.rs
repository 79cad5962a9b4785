//! Hyper-V: the bus and its devices against `dialects::hyperv`, as `vmd` puts these together, with the host's threads taking turns with the guest.

mod bus;
mod card;
mod clock;
mod components;
mod disk;
mod hostile;
mod liar;

use std::sync::Arc;

use abi::hypervisor::FIRST_BASE;
use dialects::hyperv::vmbus::{Device, VmBus};
use dialects::hyperv::{Crash, Hyperv};
use pvbus::{Event, Hal, Nanos, Tree};
use vmm::Frequencies;

use crate::machine::{Interrupts, Machine};

const HZ: u64 = 1_000_000_000;
/// The processor that attaches the bus, of two.
const VP: u32 = 1;
const SECOND: Nanos = 1_000_000_000;
/// Polls after which a host that does its part has nothing more to say.
const TURNS: usize = 200;

/// A machine with its bus.
struct Rig {
    machine: Machine,
    hyperv: Arc<Hyperv>,
    bus: Arc<VmBus>,
    /// Vectors of interrupts that were sent.
    interrupts: Arc<Interrupts>,
}

impl dialects::hyperv::Machine for Interrupts {
    fn reset(&self) {}
    fn crashed(&self, _crash: &Crash) {}
    fn end_of_interrupt(&self, _vector: u8) {}
}

impl Rig {
    /// With a bus that has no devices yet.
    fn new() -> Rig {
        let rig = Rig::silent();
        rig.hyperv.serve(rig.bus.clone());
        rig
    }

    /// With a platform at whose connections nobody answers.
    fn silent() -> Rig {
        let mut machine = Machine::new();
        machine.processor = VP;
        let frequencies = Frequencies { tsc_hz: HZ, apic_hz: HZ as u32 };
        let hyperv = Hyperv::new(machine.memory.clone(), machine.timers.clone(), frequencies, None, VP + 1);
        let interrupts = Arc::<Interrupts>::default();
        hyperv.connect(interrupts.clone(), interrupts.clone());
        let bus = VmBus::new(machine.memory.clone(), hyperv.clone());
        Rig { machine: machine.with(FIRST_BASE, hyperv.clone()), hyperv, bus, interrupts }
    }

    /// Puts a device on the bus, whose thread works until it is the latest to be ended.
    fn plug<D: Device + 'static>(&self, device: D) {
        let mut attached = self.bus.attach(device, Arc::new(|| {}));
        self.machine.spawn(move || {
            attached.work();
        });
    }

    /// Polls until both sides have nothing more to say; what the devices want.
    fn poll(&self, tree: &mut Tree<'_>) -> Vec<Event> {
        let mut events = Vec::new();
        for _ in 0..TURNS {
            events.extend(tree.poll(self.machine.now()).events);
            self.machine.wait_until(self.machine.now() + 1000);
        }
        events
    }

    /// Lines that a poll adds to the message buffer.
    fn lines(&self, tree: &mut Tree<'_>) -> Vec<String> {
        let events = self.poll(tree).into_iter();
        events.map(|event| if let Event::Message(line) = event { line } else { panic!("{event:?}") }).collect()
    }
}
