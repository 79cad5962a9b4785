//! The board's interrupt wiring: from device lines to the 8259 pair and the I/O APIC, and from there to the processors.
//!
//! ```text
//!   ISA IRQ n ----+--> 8259 pair input n --INTR--> LINT0 of the processors
//!                 +--> I/O APIC pin n (IRQ 0: pin 2, as the MADT says) --message--> local APICs
//!   PCI INTx -----+--> 8259 pair input 10 or 11, for guests that know no APIC
//!                 +--> I/O APIC pin 16 to 23
//! ```
//!
//! Each [`InterruptLine`] from here is one source; a line with several sources is up while any of them is.
//! A guest uses one controller and masks the other, so that a line may go to both.

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use abi::apic::IOAPIC_BASE;
use serde::{Deserialize, Serialize};
use vmm::backend::IoapicRoute;

use crate::ioapic::{IoApic, PINS};
use crate::pic::{self, PicPair};
use crate::snapshot::{RestoreError, Saved, Snapshot};
use crate::{DeviceMap, InterruptLine, MmioDevice, MsiSink, PortDevice};

/// Name and version in a [`Saved`] state.
const STATE: (&str, u32) = ("interrupts", 1);
/// Number of 8259 inputs.
const IRQS: usize = 16;
/// I/O APIC pin of ISA IRQ 0; the MADT has an override for it.
pub const TIMER_PIN: u8 = 2;
/// GSI of ACPI's system control interrupt; level triggered, the MADT says so.
pub const SCI_IRQ: u8 = 9;
/// First I/O APIC pin of PCI interrupts.
pub const PCI_GSI: u8 = 16;
/// Number of I/O APIC pins of PCI interrupts.
pub const PCI_GSIS: u8 = 8;
/// 8259 inputs of PCI interrupts, by the wire as SeaBIOS swizzles it.
pub const PCI_IRQS: [u8; 4] = [10, 10, 11, 11];
/// Addresses of the I/O APIC's registers.
pub const IOAPIC_RANGE: RangeInclusive<u64> = IOAPIC_BASE..=IOAPIC_BASE + 0xfff;

/// Where the board's interrupts leave it: the processors.
pub trait InterruptSink: MsiSink {
    /// Level of INTR, see [`vmm::BackendVm::set_extint`].
    fn set_extint(&self, asserted: bool);
    /// See [`vmm::BackendVm::set_ioapic_routes`].
    fn set_ioapic_routes(&self, routes: &[Option<IoapicRoute>]);
}

impl InterruptSink for Arc<dyn vmm::BackendVm> {
    fn set_extint(&self, asserted: bool) {
        vmm::BackendVm::set_extint(self.as_ref(), asserted);
    }

    fn set_ioapic_routes(&self, routes: &[Option<IoapicRoute>]) {
        vmm::BackendVm::set_ioapic_routes(self.as_ref(), routes);
    }
}

/// GSI of PCI interrupt pin `pin` (0 for INTA) of the device in `slot`.
pub fn pci_gsi(slot: u8, pin: u8) -> u8 {
    PCI_GSI + slot.wrapping_add(pin) % PCI_GSIS
}

/// 8259 input of the same; SeaBIOS writes this number to the device's interrupt line register.
pub fn pci_irq(slot: u8, pin: u8) -> u8 {
    PCI_IRQS[usize::from(slot.wrapping_add(pin).wrapping_sub(1) & 3)]
}

/// Both controllers and the wires to them.
pub struct InterruptRouter {
    sink: Arc<dyn InterruptSink>,
    board: Mutex<Board>,
}

#[derive(Clone, Default, Serialize, Deserialize)]
struct Board {
    pic: PicPair,
    ioapic: IoApic,
    /// How many sources hold each 8259 input up.
    irq_sources: [u32; IRQS],
    /// How many sources hold each I/O APIC pin up.
    pin_sources: [u32; PINS],
    intr: bool,
}

impl InterruptRouter {
    /// Both controllers in power-on state.
    pub fn new(sink: Arc<dyn InterruptSink>) -> Arc<InterruptRouter> {
        let router = InterruptRouter { sink, board: Mutex::default() };
        router.reset();
        Arc::new(router)
    }

    /// Puts the router's ports and registers into `map`.
    pub fn map(self: &Arc<Self>, map: &mut DeviceMap) {
        for base in [pic::MASTER, pic::SLAVE, pic::ELCR] {
            map.add_ports(base..=base + 1, self.clone());
        }
        map.add_mmio(IOAPIC_RANGE, self.clone());
    }

    /// A new source on ISA interrupt `irq`, 0 to 15.
    pub fn isa_line(self: &Arc<Self>, irq: u8) -> Arc<dyn InterruptLine> {
        self.source(Some(irq), Some(if irq == 0 { TIMER_PIN } else { irq }))
    }

    /// A new source on PCI interrupt pin `pin` (0 for INTA) of the device in `slot`.
    pub fn pci_line(self: &Arc<Self>, slot: u8, pin: u8) -> Arc<dyn InterruptLine> {
        self.source(Some(pci_irq(slot, pin)), Some(pci_gsi(slot, pin)))
    }

    /// A new source on I/O APIC pin `gsi` alone.
    pub fn gsi_line(self: &Arc<Self>, gsi: u8) -> Arc<dyn InterruptLine> {
        self.source(None, Some(gsi))
    }

    /// See [`vmm::Bus::end_of_interrupt`].
    pub fn end_of_interrupt(&self, vector: u8) {
        self.lock().ioapic.end_of_interrupt(vector, &mut |route| self.send(route));
    }

    /// See [`vmm::Bus::acknowledge_extint`].
    pub fn acknowledge_extint(&self) -> u8 {
        let mut board = self.lock();
        let vector = board.pic.acknowledge();
        self.update_intr(&mut board);
        vector
    }

    /// Power-on state of both controllers. Lines stay as their devices hold them.
    pub fn reset(&self) {
        let mut board = self.lock();
        board.pic.reset();
        board.ioapic.reset();
        for irq in PCI_IRQS.into_iter().chain([SCI_IRQ]) {
            board.pic.set_level_triggered(irq);
        }
        self.update_intr(&mut board);
        self.sink.set_ioapic_routes(&board.ioapic.routes());
    }

    fn source(self: &Arc<Self>, irq: Option<u8>, pin: Option<u8>) -> Arc<dyn InterruptLine> {
        let irq = irq.filter(|&irq| usize::from(irq) < IRQS);
        let pin = pin.filter(|&pin| usize::from(pin) < PINS);
        Arc::new(Source { router: self.clone(), irq, pin, asserted: Mutex::new(false) })
    }

    fn set(&self, irq: Option<u8>, pin: Option<u8>, asserted: bool) {
        let mut board = self.lock();
        let board = &mut *board;
        if let Some(irq) = irq
            && let Some(level) = count(&mut board.irq_sources[usize::from(irq)], asserted)
        {
            board.pic.set_irq(irq, level);
            self.update_intr(board);
        }
        if let Some(pin) = pin
            && let Some(level) = count(&mut board.pin_sources[usize::from(pin)], asserted)
        {
            board.ioapic.set_pin(pin, level, &mut |route| self.send(route));
        }
    }

    /// Messages are sent with the board locked, so that their order is that of the lines.
    fn send(&self, route: IoapicRoute) {
        self.sink.signal_msi(route.address, route.data);
    }

    fn update_intr(&self, board: &mut Board) {
        let intr = board.pic.output();
        if intr != board.intr {
            board.intr = intr;
            self.sink.set_extint(intr);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts one source more or less; the new level if it changed.
fn count(sources: &mut u32, asserted: bool) -> Option<bool> {
    let before = *sources != 0;
    *sources = if asserted { sources.saturating_add(1) } else { sources.saturating_sub(1) };
    let now = *sources != 0;
    (before != now).then_some(now)
}

struct Source {
    router: Arc<InterruptRouter>,
    irq: Option<u8>,
    pin: Option<u8>,
    asserted: Mutex<bool>,
}

impl InterruptLine for Source {
    fn set(&self, asserted: bool) {
        // Held over the change, so that the last call decides the level.
        let mut level = self.asserted.lock().unwrap_or_else(PoisonError::into_inner);
        if *level != asserted {
            *level = asserted;
            self.router.set(self.irq, self.pin, asserted);
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.set(false);
    }
}

impl PortDevice for InterruptRouter {
    fn port_in(&self, port: u16, size: u8) -> u32 {
        let mut board = self.lock();
        let value = (0..u16::from(size.min(4))).fold(0, |value, n| {
            let byte = if (port & 1) + n <= 1 { board.pic.read(port.wrapping_add(n)) } else { 0xff };
            value | u32::from(byte) << (8 * n)
        });
        self.update_intr(&mut board);
        value
    }

    fn port_out(&self, port: u16, size: u8, value: u32) {
        let mut board = self.lock();
        for (n, byte) in (0u16..).zip(value.to_le_bytes()).take(usize::from(size)) {
            if (port & 1) + n <= 1 {
                board.pic.write(port.wrapping_add(n), byte);
            }
        }
        self.update_intr(&mut board);
    }
}

impl MmioDevice for InterruptRouter {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let value = self.lock().ioapic.read(offset & !3).to_le_bytes();
        for (n, byte) in data.iter_mut().enumerate() {
            *byte = value.get((offset & 3) as usize + n).copied().unwrap_or(0);
        }
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        let Some(value) = data.first_chunk::<4>() else { return };
        let mut board = self.lock();
        if board.ioapic.write(offset, u32::from_le_bytes(*value), &mut |route| self.send(route)) {
            self.sink.set_ioapic_routes(&board.ioapic.routes());
        }
    }
}

impl Snapshot for InterruptRouter {
    fn state(&self) -> Saved {
        Saved::new(STATE.0, STATE.1, &*self.lock())
    }

    /// The controllers take the saved state; how many sources hold a line up is counted anew as the devices are restored.
    fn restore(&self, state: &Saved) -> Result<(), RestoreError> {
        let new: Board = state.open(STATE.0, STATE.1)?;
        let mut board = self.lock();
        let (irq_sources, pin_sources, intr) = (board.irq_sources, board.pin_sources, board.intr);
        *board = Board { irq_sources, pin_sources, intr, ..new };
        self.update_intr(&mut board);
        self.sink.set_ioapic_routes(&board.ioapic.routes());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder {
        messages: Mutex<Vec<u32>>,
        intr: Mutex<Vec<bool>>,
    }

    impl MsiSink for Recorder {
        fn signal_msi(&self, _address: u64, data: u32) {
            self.messages.lock().unwrap().push(data);
        }
    }

    impl InterruptSink for Recorder {
        fn set_extint(&self, asserted: bool) {
            self.intr.lock().unwrap().push(asserted);
        }
        fn set_ioapic_routes(&self, _routes: &[Option<IoapicRoute>]) {}
    }

    fn board() -> (Arc<Recorder>, Arc<InterruptRouter>) {
        let recorder = Arc::new(Recorder::default());
        let router = InterruptRouter::new(recorder.clone());
        (recorder, router)
    }

    fn program(router: &InterruptRouter, pin: u8, low: u32) {
        router.mmio_write(0, &u32::from(0x10 + 2 * pin).to_le_bytes());
        router.mmio_write(0x10, &low.to_le_bytes());
    }

    #[test]
    fn timer_interrupt_arrives_at_pin_two() {
        let (recorder, router) = board();
        program(&router, 2, 0x30);
        let line = router.isa_line(0);
        line.set(true);
        assert_eq!(*recorder.messages.lock().unwrap(), [0x30]);
    }

    #[test]
    fn shared_level_line_stays_up_until_the_last_source_lets_go() {
        let (recorder, router) = board();
        program(&router, pci_gsi(1, 0), 0x8050);
        let (one, two) = (router.pci_line(1, 0), router.pci_line(9, 0));
        one.set(true);
        two.set(true);
        one.set(false);
        router.end_of_interrupt(0x50);
        assert_eq!(recorder.messages.lock().unwrap().len(), 2);
        drop(two);
        router.end_of_interrupt(0x50);
        assert_eq!(recorder.messages.lock().unwrap().len(), 2);
    }

    #[test]
    fn intr_follows_the_master() {
        let (recorder, router) = board();
        for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0)] {
            router.port_out(port, 1, value);
        }
        let line = router.isa_line(4);
        line.set(true);
        assert_eq!(router.acknowledge_extint(), 0x24);
        assert_eq!(*recorder.intr.lock().unwrap(), [true, false]);
    }

    #[test]
    fn pci_interrupts_reach_the_pic_where_seabios_expects_them() {
        assert_eq!([1, 2, 3, 4, 5].map(|slot| pci_irq(slot, 0)), [10, 10, 11, 11, 10]);
        let (recorder, router) = board();
        for (port, value) in
            [(0x20, 0x11), (0x21, 8), (0x21, 4), (0x21, 1), (0xa0, 0x11), (0xa1, 0x70), (0xa1, 2), (0xa1, 1), (0x21, 0), (0xa1, 0)]
        {
            router.port_out(port, 1, value);
        }
        router.pci_line(3, 0).set(true);
        assert_eq!(*recorder.intr.lock().unwrap(), [true, false], "the dropped source let go of its level-triggered line");
    }

    #[test]
    fn state_survives_a_restore() {
        let (_, router) = board();
        program(&router, 4, 0x41);
        router.port_out(0x21, 1, 0x55);
        let (recorder, other) = board();
        other.restore(&router.state()).unwrap();
        other.isa_line(4).set(true);
        assert_eq!(*recorder.messages.lock().unwrap(), [0x41]);
        assert_eq!(other.port_in(0x21, 1), 0x55);
    }
}
