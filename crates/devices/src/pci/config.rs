//! Configuration space of one function: header type 0, PCI 3.0 section 6.1.
//!
//! Every byte has a mask of the bits that a guest can write. BARs size themselves: what is below their size reads as zero, so
//! that a write of all ones tells the guest the size.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use abi::pci::*;
use serde::{Deserialize, Serialize};

use super::Msix;
use crate::InterruptLine;

const SIZE: usize = 256;
const BARS: usize = 6;
/// Smallest memory and I/O BARs, PCI 3.0 section 6.2.5.1.
const SMALLEST_MEMORY: u64 = 16;
const SMALLEST_IO: u64 = 4;

/// Who a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciIdentity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Class, subclass and programming interface: 0x060000 is a host bridge.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// Address space and width of a BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes two BAR registers.
    Memory64,
}

#[derive(Debug, Clone, Copy)]
struct Bar {
    kind: BarKind,
    size: u64,
    flags: u32,
}

/// A function's configuration space.
pub struct PciConfig {
    inner: Mutex<Inner>,
    bars: [Option<Bar>; BARS],
    /// Power-on contents.
    initial: Box<[u8; SIZE]>,
    writable: Box<[u8; SIZE]>,
    /// Offset of the MSI-X capability, and its table.
    msix: Option<(u8, Arc<Msix>)>,
}

struct Inner {
    bytes: Box<[u8; SIZE]>,
    /// Where the next capability goes, and the byte that will point at it.
    next_capability: usize,
    last_pointer: usize,
    intx: bool,
    line: Option<Arc<dyn InterruptLine>>,
}

/// What of a configuration space is state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ConfigState {
    bytes: Vec<u8>,
    intx: bool,
    msix: Option<super::msix::MsixState>,
}

impl PciConfig {
    /// A configuration space without BARs and capabilities.
    pub fn new(identity: PciIdentity) -> PciConfig {
        let mut bytes = Box::new([0; SIZE]);
        put(&mut bytes, VENDOR_ID, &identity.vendor.to_le_bytes());
        put(&mut bytes, DEVICE_ID, &identity.device.to_le_bytes());
        put(&mut bytes, REVISION, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        put(&mut bytes, SUBSYSTEM_VENDOR_ID, &identity.subsystem_vendor.to_le_bytes());
        put(&mut bytes, SUBSYSTEM_VENDOR_ID + 2, &identity.subsystem.to_le_bytes());
        let mut writable = Box::new([0; SIZE]);
        let command = COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        put(&mut writable, COMMAND, &command.to_le_bytes());
        put(&mut writable, CACHE_LINE_SIZE, &[0xff]);
        put(&mut writable, LATENCY_TIMER, &[0xff]);
        put(&mut writable, INTERRUPT_LINE, &[0xff]);
        let inner = Inner {
            bytes: bytes.clone(),
            next_capability: usize::from(FIRST_CAPABILITY),
            last_pointer: usize::from(CAPABILITIES),
            intx: false,
            line: None,
        };
        PciConfig { inner: Mutex::new(inner), bars: [None; BARS], initial: bytes, writable, msix: None }
    }

    /// Gives the function BAR `index` of at least `size` bytes (made a power of two).
    ///
    /// # Panics
    /// When the BAR is taken or does not exist: a mistake in the device.
    #[must_use]
    pub fn with_bar(mut self, index: u8, kind: BarKind, size: u64) -> PciConfig {
        let (smallest, flags) = match kind {
            BarKind::Io => (SMALLEST_IO, BAR_IO),
            BarKind::Memory32 => (SMALLEST_MEMORY, 0),
            BarKind::Memory64 => (SMALLEST_MEMORY, BAR_MEMORY_64),
        };
        let size = size.max(smallest).next_power_of_two();
        let slot = usize::from(index);
        assert!(self.bars[slot].is_none() && (slot == 0 || self.bars[slot - 1].is_none_or(|b| b.kind != BarKind::Memory64)));
        assert!(kind != BarKind::Memory64 || slot + 1 < BARS && self.bars[slot + 1].is_none());
        self.bars[slot] = Some(Bar { kind, size, flags });
        let mask = !(size - 1);
        self.initialise(BAR0 + 4 * index, &flags.to_le_bytes(), &(mask as u32).to_le_bytes());
        if kind == BarKind::Memory64 {
            self.initialise(BAR0 + 4 * index + 4, &[0; 4], &((mask >> 32) as u32).to_le_bytes());
        }
        self
    }

    /// Gives the function INTA.
    #[must_use]
    pub fn with_intx(mut self) -> PciConfig {
        self.initialise(INTERRUPT_PIN, &[1], &[0]);
        self
    }

    /// Sets `bytes` at `offset`, of which the guest can write the bits in `writable`.
    ///
    /// # Panics
    /// When they do not fit: a mistake in the device.
    #[must_use]
    pub fn with_bytes(mut self, offset: u8, bytes: &[u8], writable: &[u8]) -> PciConfig {
        self.initialise(offset, bytes, writable);
        self
    }

    /// Adds a capability: `body` is what follows the id and the next pointer. The guest can write the bits in `writable` (as long
    /// as `body`, or empty). The offset of the capability in [`PciConfig::capability`] is in the order of adding.
    ///
    /// # Panics
    /// When 192 bytes are not enough: a mistake in the device.
    #[must_use]
    pub fn with_capability(mut self, id: u8, body: &[u8], writable: &[u8]) -> PciConfig {
        self.push_capability(id, body, writable);
        self
    }

    /// Adds the MSI-X capability: table at `table_offset` and pending bits at `pba_offset` in memory BAR `bar`.
    ///
    /// # Panics
    /// When there is one already: a mistake in the device.
    #[must_use]
    pub fn with_msix(mut self, msix: Arc<Msix>, bar: u8, table_offset: u32, pba_offset: u32) -> PciConfig {
        assert!(self.msix.is_none());
        msix.place(bar, u64::from(table_offset), u64::from(pba_offset));
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(msix.vectors() - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table_offset | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pba_offset | u32::from(bar)).to_le_bytes());
        let mut writable = [0; 10];
        writable[..2].copy_from_slice(&(MSIX_ENABLE | MSIX_MASK_ALL).to_le_bytes());
        let offset = self.push_capability(CAP_MSIX, &body, &writable);
        self.msix = Some((offset, msix));
        self
    }

    /// The MSI-X table, if the function has one.
    pub fn msix(&self) -> Option<&Arc<Msix>> {
        self.msix.as_ref().map(|(_, msix)| msix)
    }

    /// Offsets of the capabilities with this id, in the order in which they were added.
    pub fn capability(&self, id: u8) -> Vec<u8> {
        let mut found = Vec::new();
        let mut at = self.initial[usize::from(CAPABILITIES)];
        // The list is ours, and each element points behind itself.
        while at != 0 {
            if self.initial[usize::from(at)] == id {
                found.push(at);
            }
            at = self.initial[usize::from(at) + 1];
        }
        found
    }

    /// Sets the level of INTx. What the guest sees of it is also the command register's affair.
    pub fn set_intx(&self, asserted: bool) {
        let mut inner = self.lock();
        inner.intx = asserted;
        inner.update_intx();
    }

    /// Reads `data.len()` bytes at `offset`; what is beyond the end reads as ones.
    pub fn read(&self, offset: u8, data: &mut [u8]) {
        let inner = self.lock();
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = inner.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Reads 32 bits at `offset`, for devices that look at their own registers.
    pub fn read_u32(&self, offset: u8) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes as a guest does. Says whether the function may answer at other addresses now.
    pub fn write(&self, offset: u8, data: &[u8]) -> bool {
        let mut inner = self.lock();
        for (byte, at) in data.iter().zip(usize::from(offset)..SIZE) {
            let mask = self.writable[at];
            inner.bytes[at] = inner.bytes[at] & !mask | byte & mask;
        }
        let written = usize::from(offset)..usize::from(offset) + data.len();
        let touches = |register: u8, len: usize| written.start < usize::from(register) + len && usize::from(register) < written.end;
        if touches(COMMAND, 2) {
            inner.update_intx();
        }
        if let Some((at, msix)) = &self.msix
            && touches(at + 2, 2)
        {
            msix.set_control(inner.word(at + 2));
        }
        touches(COMMAND, 2) || touches(BAR0, 4 * BARS)
    }

    /// The BARs that the function answers at now: their number, whether in I/O space, and their addresses.
    pub fn active_bars(&self) -> Vec<(u8, bool, Range<u64>)> {
        let inner = self.lock();
        let command = inner.word(COMMAND);
        let mut active = Vec::new();
        for (index, bar) in (0u8..).zip(&self.bars) {
            let Some(bar) = bar else { continue };
            let io = bar.kind == BarKind::Io;
            let enabled = command & if io { COMMAND_IO } else { COMMAND_MEMORY } != 0;
            let base = inner.bar_base(index, bar);
            if let (true, Some(end)) = (enabled && base != 0, base.checked_add(bar.size)) {
                active.push((index, io, base..end));
            }
        }
        active
    }

    /// The BARs there are: number, kind, size.
    pub(super) fn bars(&self) -> impl Iterator<Item = (u8, BarKind, u64)> {
        (0u8..).zip(&self.bars).filter_map(|(index, bar)| bar.map(|bar| (index, bar.kind, bar.size)))
    }

    /// Programs BAR `index` as firmware does.
    pub(super) fn set_bar(&self, index: u8, base: u64) {
        let bytes = base.to_le_bytes();
        let wide = self.bars[usize::from(index)].is_some_and(|bar| bar.kind == BarKind::Memory64);
        self.write(BAR0 + 4 * index, if wide { &bytes } else { &bytes[..4] });
    }

    pub(super) fn connect(&self, line: Arc<dyn InterruptLine>) {
        self.lock().line = Some(line);
    }

    /// Whether the function has an interrupt pin.
    pub(super) fn has_intx(&self) -> bool {
        self.initial[usize::from(INTERRUPT_PIN)] != 0
    }

    pub(super) fn reset(&self) {
        let mut inner = self.lock();
        *inner.bytes = *self.initial;
        inner.intx = false;
        inner.update_intx();
        if let Some((_, msix)) = &self.msix {
            msix.reset();
        }
    }

    pub(super) fn state(&self) -> ConfigState {
        let inner = self.lock();
        let msix = self.msix.as_ref().map(|(_, msix)| msix.state());
        ConfigState { bytes: inner.bytes.to_vec(), intx: inner.intx, msix }
    }

    /// Takes the bits a guest could have written from `state`.
    pub(super) fn restore(&self, state: &ConfigState) {
        {
            let mut inner = self.lock();
            for (at, byte) in state.bytes.iter().enumerate().take(SIZE) {
                let mask = self.writable[at];
                inner.bytes[at] = self.initial[at] & !mask | byte & mask;
            }
            inner.intx = state.intx;
            inner.update_intx();
        }
        if let (Some((at, msix)), Some(state)) = (&self.msix, &state.msix) {
            let control = self.lock().word(at + 2);
            msix.restore(state, control);
        }
    }

    fn initialise(&mut self, offset: u8, bytes: &[u8], writable: &[u8]) {
        put(&mut self.initial, offset, bytes);
        put(&mut self.writable, offset, writable);
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        *inner.bytes = *self.initial;
    }

    fn push_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        let at = inner.next_capability;
        let pointer = std::mem::replace(&mut inner.last_pointer, at + 1);
        // Capabilities are dword aligned.
        inner.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        assert!(at + 2 + body.len() <= SIZE, "capabilities fit into configuration space");
        self.initial[pointer] = at as u8;
        let status = u16::from_le_bytes([self.initial[usize::from(STATUS)], self.initial[usize::from(STATUS) + 1]]);
        put(&mut self.initial, STATUS, &(status | STATUS_CAPABILITIES).to_le_bytes());
        self.initialise(at as u8, &[id, 0], &[]);
        self.initialise(at as u8 + 2, body, writable);
        at as u8
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn word(&self, offset: u8) -> u16 {
        u16::from_le_bytes([self.bytes[usize::from(offset)], self.bytes[usize::from(offset) + 1]])
    }

    fn dword(&self, offset: u8) -> u32 {
        u32::from(self.word(offset)) | u32::from(self.word(offset + 2)) << 16
    }

    fn bar_base(&self, index: u8, bar: &Bar) -> u64 {
        let low = u64::from(self.dword(BAR0 + 4 * index) & !bar.flags);
        let high = if bar.kind == BarKind::Memory64 { u64::from(self.dword(BAR0 + 4 * index + 4)) } else { 0 };
        high << 32 | low
    }

    /// Makes the status bit and the line agree with the device and the command register. The configuration space stays locked
    /// meanwhile, so that the last change decides.
    fn update_intx(&mut self) {
        let status = self.word(STATUS) & !STATUS_INTERRUPT | if self.intx { STATUS_INTERRUPT } else { 0 };
        put(&mut self.bytes, STATUS, &status.to_le_bytes());
        let level = self.intx && self.word(COMMAND) & COMMAND_INTX_DISABLE == 0;
        if let Some(line) = &self.line {
            line.set(level);
        }
    }
}

fn put(bytes: &mut [u8; SIZE], offset: u8, value: &[u8]) {
    let offset = usize::from(offset);
    bytes[offset..offset + value.len()].copy_from_slice(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> PciConfig {
        PciConfig::new(PciIdentity {
            vendor: 0x1af4,
            device: 0x1042,
            class: 0x01_80_00,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        })
    }

    #[test]
    fn identity_cannot_be_written() {
        let config = config();
        config.write(0, &[0; 16]);
        assert_eq!(config.read_u32(0), 0x1042_1af4);
        assert_eq!(config.read_u32(8), 0x0180_0001);
    }

    #[test]
    fn bars_tell_their_size_and_flags() {
        let config = config().with_bar(0, BarKind::Io, 20).with_bar(1, BarKind::Memory32, 0x1000).with_bar(4, BarKind::Memory64, 0x4000);
        for bar in [0u8, 1, 4, 5] {
            config.write(BAR0 + 4 * bar, &[0xff; 4]);
        }
        assert_eq!(config.read_u32(BAR0), 0xffff_ffe1);
        assert_eq!(config.read_u32(BAR0 + 4), 0xffff_f000);
        assert_eq!(config.read_u32(BAR0 + 8), 0);
        assert_eq!(config.read_u32(BAR0 + 16), 0xffff_c004);
        assert_eq!(config.read_u32(BAR0 + 20), 0xffff_ffff);
    }

    #[test]
    fn bars_answer_only_when_enabled() {
        let config = config().with_bar(0, BarKind::Io, 32).with_bar(2, BarKind::Memory64, 0x1000);
        config.set_bar(0, 0xc000);
        config.set_bar(2, 0x1_0000_0000);
        assert_eq!(config.active_bars(), []);
        assert!(config.write(COMMAND, &COMMAND_MEMORY.to_le_bytes()));
        assert_eq!(config.active_bars(), [(2, false, 0x1_0000_0000..0x1_0000_1000)]);
        config.write(COMMAND, &COMMAND_IO.to_le_bytes());
        assert_eq!(config.active_bars(), [(0, true, 0xc000..0xc020)]);
    }

    #[test]
    fn capabilities_form_a_list() {
        let config = config().with_capability(CAP_VENDOR, &[14, 1, 2, 3], &[]).with_capability(CAP_VENDOR, &[5, 6, 7], &[0xff]);
        assert_eq!(config.capability(CAP_VENDOR), [0x40, 0x48]);
        assert_ne!(config.read_u32(COMMAND) >> 16 & u32::from(STATUS_CAPABILITIES), 0);
        assert_eq!(config.read_u32(0x40), 0x010e_4809);
        config.write(0x48, &[0xff; 8]);
        assert_eq!(config.read_u32(0x48), 0x06ff_0009);
    }

    #[test]
    fn intx_follows_the_disable_bit() {
        struct Line(Mutex<bool>);
        impl InterruptLine for Line {
            fn set(&self, asserted: bool) {
                *self.0.lock().unwrap() = asserted;
            }
        }
        let line = Arc::new(Line(Mutex::new(false)));
        let config = config().with_intx();
        config.connect(line.clone());
        config.set_intx(true);
        assert!(*line.0.lock().unwrap());
        config.write(COMMAND, &COMMAND_INTX_DISABLE.to_le_bytes());
        assert!(!*line.0.lock().unwrap());
        assert_ne!(config.read_u32(COMMAND) >> 16 & u32::from(STATUS_INTERRUPT), 0, "the status tells nevertheless");
        config.reset();
        assert_eq!(config.read_u32(COMMAND) >> 16 & u32::from(STATUS_INTERRUPT), 0);
    }
}
