//! The board: all devices of one machine, wired to each other and to the bus.
//!
//! ```text
//!   ISA   serial (IRQ 4), PIT (0), keyboard controller (1), reset ports, ACPI power management (9)
//!   PCI   00 host bridge, 01 ISA bridge, then disks and network cards in the order of the command line
//! ```

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use devices::acpi_pm::AcpiPm;
use devices::debug_exit::DebugExit;
use devices::i8042::{I8042, KEYBOARD_IRQ};
use devices::interrupts::{InterruptRouter, SCI_IRQ};
use devices::pci::{PciAddress, PciBus, PciError, host_bridge, isa_bridge};
use devices::pit::{Pit, TIMER_IRQ};
use devices::reset::ResetPorts;
use devices::serial::{COM1, COM1_IRQ, Serial};
use devices::{DeviceMap, MachineEvents};
use dialects::Dialect;
use vmm::time::Timers;
use vmm::{BackendVm, GuestMemory};

use crate::bus::MachineBus;
use crate::config::{MachineConfig, SerialTarget};
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
    /// More devices than the bus has room for.
    #[error(transparent)]
    Pci(#[from] PciError),
}

/// The devices that somebody outside the processors talks to.
pub struct Board {
    serial: Arc<Serial>,
    power: Arc<AcpiPm>,
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
        let _ = memory;
        let events: Arc<dyn MachineEvents> = Arc::new(Events(events));
        let interrupts = InterruptRouter::new(Arc::new(Arc::clone(vm)));
        let mut map = DeviceMap::default();

        let mut pci = PciBus::new();
        pci.add(PciAddress { slot: 0, function: 0 }, host_bridge(), &interrupts)?;
        pci.add(PciAddress { slot: 1, function: 0 }, isa_bridge(), &interrupts)?;
        pci.assign()?;
        // The bus first: fixed ports among its own win.
        Arc::new(pci).map(&mut map);

        interrupts.map(&mut map);
        let serial = Serial::new(COM1, interrupts.isa_line(COM1_IRQ), serial_output(&config.serial)?);
        serial.map(&mut map);
        Pit::new(Arc::clone(timers), interrupts.isa_line(TIMER_IRQ)).map(&mut map);
        I8042::new(interrupts.isa_line(KEYBOARD_IRQ), Arc::clone(&events)).map(&mut map);
        ResetPorts::new(Arc::clone(&events)).map(&mut map);
        let power = AcpiPm::new(Arc::clone(timers.clock()), interrupts.isa_line(SCI_IRQ), Arc::clone(&events));
        power.map(&mut map);
        if config.debug_exit {
            DebugExit::new(events).map(&mut map);
        }
        Ok((Board { serial, power }, MachineBus::new(map, dialects, interrupts)))
    }

    /// Address of the ACPI RSDP.
    pub fn rsdp(&self) -> Option<u64> {
        None
    }

    /// Bytes typed at the first serial port; how many it took.
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        self.serial.input(bytes)
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.power.press_power_button();
    }

    /// Flushes what is under way and stops the devices' threads.
    pub fn shut_down(&self) {}
}

fn serial_output(target: &SerialTarget) -> Result<Box<dyn Write + Send>, BoardError> {
    Ok(match target {
        SerialTarget::Stdio => Box::new(std::io::stdout()),
        SerialTarget::Null => Box::new(std::io::sink()),
        SerialTarget::File(path) => match File::options().append(true).create(true).open(path) {
            Ok(file) => Box::new(file),
            Err(source) => return Err(BoardError::Host { what: format!("serial output to {}", path.display()), source }),
        },
    })
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
