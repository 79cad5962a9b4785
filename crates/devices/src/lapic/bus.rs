//! What connects the local APICs of a machine: inter-processor interrupts, messages from devices, the INTR and NMI wires.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use abi::apic::*;
use vmm::time::Timers;

use super::registers::ApicClock;
use super::{ApicClient, LocalApic};
use crate::MsiSink;

/// One interrupt on its way to local APICs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// APIC id or logical id; [`Message::BROADCAST`] for all.
    pub destination: u32,
    /// Whether the destination is a logical one.
    pub logical: bool,
    /// One of [`abi::apic::delivery`].
    pub mode: u8,
    /// Vector.
    pub vector: u8,
    /// Whether the end of the interrupt is to be broadcast.
    pub level_triggered: bool,
}

impl Message {
    /// Destination that means every processor.
    pub const BROADCAST: u32 = u32::MAX;

    /// A message as a device or the I/O APIC sends it, SDM 11.11. `None` when the address is not a local APIC's.
    pub fn from_msi(address: u64, data: u32) -> Option<Message> {
        if address & !0xf_ffff != MSI_ADDRESS_BASE {
            return None;
        }
        let destination = (address >> MSI_DESTINATION_SHIFT) as u8;
        Some(Message {
            destination: widen(destination),
            logical: address & MSI_ADDRESS_LOGICAL != 0,
            mode: (data >> 8 & 7) as u8,
            vector: data as u8,
            level_triggered: data & MSI_DATA_LEVEL != 0,
        })
    }
}

/// An 8-bit destination as a 32-bit one: only the broadcast differs.
pub(super) fn widen(destination: u8) -> u32 {
    if destination == u8::MAX { Message::BROADCAST } else { u32::from(destination) }
}

/// Who gets an inter-processor interrupt: ICR bits 19:18.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shorthand {
    None,
    Own,
    All,
    Others,
}

impl Shorthand {
    pub(super) fn of_icr(icr: u64) -> Shorthand {
        match icr >> 18 & 3 {
            0 => Shorthand::None,
            1 => Shorthand::Own,
            2 => Shorthand::All,
            _ => Shorthand::Others,
        }
    }
}

/// All local APICs of a machine.
pub struct ApicBus {
    apics: Vec<Arc<LocalApic>>,
    /// Where the search for the lowest priority starts, so that equal processors take turns.
    turn: AtomicU32,
}

impl ApicBus {
    /// Makes one local APIC for each client; its index is its APIC id.
    pub fn new(clients: Vec<Arc<dyn ApicClient>>, timers: &Arc<Timers>, clock: ApicClock) -> Arc<ApicBus> {
        Arc::new_cyclic(|bus| ApicBus {
            apics: (0u32..).zip(clients).map(|(id, client)| LocalApic::new(id, client, bus.clone(), Arc::clone(timers), clock)).collect(),
            turn: AtomicU32::new(0),
        })
    }

    /// The local APIC of processor `id`.
    pub fn apic(&self, id: u32) -> Option<&Arc<LocalApic>> {
        self.apics.get(usize::try_from(id).ok()?)
    }

    /// All of them, in the order of their ids.
    pub fn apics(&self) -> &[Arc<LocalApic>] {
        &self.apics
    }

    /// Delivers `message` to the processors it is addressed to.
    pub fn deliver(&self, message: &Message) {
        self.deliver_from(None, Shorthand::None, message);
    }

    /// Level of the 8259 pair's INTR, wired to LINT0 of every processor.
    pub fn set_extint(&self, asserted: bool) {
        for apic in &self.apics {
            apic.set_lint0(asserted);
        }
    }

    /// Level of the board's NMI wire, LINT1 of every processor.
    pub fn set_nmi(&self, asserted: bool) {
        for apic in &self.apics {
            apic.set_lint1(asserted);
        }
    }

    pub(super) fn deliver_from(&self, sender: Option<u32>, shorthand: Shorthand, message: &Message) {
        let addressed = |apic: &&Arc<LocalApic>| match shorthand {
            Shorthand::None => apic.is_addressed(message.destination, message.logical),
            Shorthand::Own => Some(apic.id()) == sender,
            Shorthand::All => true,
            Shorthand::Others => Some(apic.id()) != sender,
        };
        if message.mode != delivery::LOWEST_PRIORITY {
            self.apics.iter().filter(addressed).for_each(|apic| apic.accept(message));
            return;
        }
        let start = self.turn.fetch_add(1, Ordering::Relaxed) as usize % self.apics.len().max(1);
        let (after, before) = (&self.apics[start..], &self.apics[..start]);
        let candidates = after.iter().chain(before).filter(addressed).filter(|apic| apic.takes_fixed());
        if let Some(apic) = candidates.min_by_key(|apic| apic.ppr()) {
            apic.accept(message);
        }
    }
}

impl MsiSink for ApicBus {
    fn signal_msi(&self, address: u64, data: u32) {
        match Message::from_msi(address, data) {
            Some(message) => self.deliver(&message),
            None => tracing::debug!(address, data, "message to an address that is no local APIC's"),
        }
    }
}
