//! QEMU's firmware configuration device: named files from the monitor to firmware and guests.
//!
//! QEMU `docs/specs/fw_cfg.rst`. Selector at port 0x510, data at 0x511, DMA address at 0x514 (big endian, upper half first; the
//! write of the lower half starts the transfer). Items are read only. Lengths and addresses come from the guest and are checked;
//! reads beyond an item give zeros, as they do in QEMU.

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use vmm::GuestMemory;

use crate::ports::read_bytes;
use crate::snapshot::{RestoreError, Saved, Snapshot};
use crate::{DeviceMap, PortDevice};

/// Name and version in a [`Saved`] state.
const STATE: (&str, u32) = ("fw_cfg", 1);

pub use abi::fw_cfg::SELECTOR;
use abi::fw_cfg::*;

const PORTS: RangeInclusive<u16> = SELECTOR..=DMA_ADDRESS_LOW + 3;
/// Zeros are written to the guest in pieces of this size.
const PIECE: usize = 4096;

/// One range of the guest's memory map, as the file `etc/e820` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct E820Entry {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// 1 for RAM, 2 for reserved.
    pub kind: u32,
}

/// What is in the device: items by key, files by name.
#[derive(Default)]
pub struct FwCfgItems {
    items: Vec<(u16, Vec<u8>)>,
    files: Vec<(String, Vec<u8>)>,
}

impl FwCfgItems {
    /// The items that every machine has.
    pub fn new(ram: u64, processors: u16) -> FwCfgItems {
        let mut items = FwCfgItems::default();
        items.set(KEY_SIGNATURE, b"QEMU".to_vec());
        items.set(KEY_ID, (ID_TRADITIONAL | ID_DMA).to_le_bytes().to_vec());
        items.set(KEY_RAM_SIZE, ram.to_le_bytes().to_vec());
        items.set(KEY_NO_GRAPHIC, 1u16.to_le_bytes().to_vec());
        items.set(KEY_PROCESSORS, processors.to_le_bytes().to_vec());
        items.set(KEY_MOST_PROCESSORS, processors.to_le_bytes().to_vec());
        items.set(KEY_BOOT_MENU, 0u16.to_le_bytes().to_vec());
        items.set(KEY_IRQ0_OVERRIDE, vec![1]);
        items
    }

    /// Sets the item `key`.
    pub fn set(&mut self, key: u16, bytes: Vec<u8>) {
        self.items.retain(|(other, _)| *other != key);
        self.items.push((key, bytes));
    }

    /// Adds the file `name`, or replaces it. Names longer than 55 bytes do not fit into the directory and are cut.
    pub fn add_file(&mut self, name: &str, bytes: Vec<u8>) {
        self.files.retain(|(other, _)| other != name);
        self.files.push((name.into(), bytes));
    }

    /// Adds the file `etc/e820`.
    pub fn add_e820(&mut self, entries: &[E820Entry]) {
        let bytes = entries
            .iter()
            .flat_map(|entry| [&entry.base.to_le_bytes()[..], &entry.size.to_le_bytes(), &entry.kind.to_le_bytes()].concat())
            .collect();
        self.add_file("etc/e820", bytes);
    }

    /// Adds the file `bootorder`: Open Firmware paths, the first to boot first.
    pub fn add_boot_order(&mut self, devices: &[&str]) {
        let mut text = devices.join("\n");
        text.push('\0');
        self.add_file("bootorder", text.into_bytes());
    }

    /// Keys of the files follow their names' order, as newer QEMUs have it.
    fn into_items(mut self) -> Vec<(u16, Arc<[u8]>)> {
        self.files.sort();
        let mut directory = (self.files.len() as u32).to_be_bytes().to_vec();
        for (key, (name, bytes)) in (KEY_FIRST_FILE..).zip(self.files) {
            let mut padded = [0; FILE_NAME_SIZE];
            let length = name.len().min(FILE_NAME_SIZE - 1);
            padded[..length].copy_from_slice(&name.as_bytes()[..length]);
            directory.extend((bytes.len() as u32).to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0; 2]);
            directory.extend(padded);
            self.items.push((key, bytes));
        }
        self.items.push((KEY_DIRECTORY, directory));
        self.items.into_iter().map(|(key, bytes)| (key, bytes.into())).collect()
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Position {
    key: u16,
    offset: u32,
    dma_high: u32,
}

/// The device.
pub struct FwCfg {
    memory: GuestMemory,
    items: Vec<(u16, Arc<[u8]>)>,
    position: Mutex<Position>,
}

impl FwCfg {
    /// A device with `items` that transfers to and from `memory`.
    pub fn new(memory: GuestMemory, items: FwCfgItems) -> Arc<FwCfg> {
        Arc::new(FwCfg { memory, items: items.into_items(), position: Mutex::default() })
    }

    /// Puts the ports into `map`.
    pub fn map(self: &Arc<Self>, map: &mut DeviceMap) {
        map.add_ports(PORTS, self.clone());
    }

    /// Power-on state.
    pub fn reset(&self) {
        *self.lock() = Position::default();
    }

    fn item(&self, key: u16) -> Option<&Arc<[u8]>> {
        self.items.iter().find(|(own, _)| *own == key).map(|(_, bytes)| bytes)
    }

    fn next_byte(&self, position: &mut Position) -> u8 {
        let byte = self.item(position.key).and_then(|item| item.get(position.offset as usize)).copied();
        position.offset = position.offset.saturating_add(1);
        byte.unwrap_or(0)
    }

    /// Executes the command at `address`: control, length, address, all big endian. The control word is the answer.
    fn transfer(&self, address: u64) {
        let mut command = [0; 16];
        if self.memory.read_slice(&mut command, GuestAddress(address)).is_err() {
            tracing::debug!(address, "fw_cfg command outside memory");
            return;
        }
        let word = |at: usize| u32::from_be_bytes([command[at], command[at + 1], command[at + 2], command[at + 3]]);
        let (control, length) = (word(0), word(4));
        let target = u64::from(word(8)) << 32 | u64::from(word(12));
        let mut position = self.lock();
        if control & DMA_SELECT != 0 {
            position.key = (control >> 16) as u16;
            position.offset = 0;
        }
        let done = if control & DMA_READ != 0 {
            self.copy_out(&position, target, length)
        } else {
            // Items are read only.
            control & DMA_WRITE == 0
        };
        if control & (DMA_READ | DMA_SKIP) != 0 {
            position.offset = position.offset.saturating_add(length);
        }
        drop(position);
        let answer = if done { 0 } else { DMA_ERROR };
        let _ = self.memory.write_slice(&answer.to_be_bytes(), GuestAddress(address));
    }

    /// Writes `length` bytes of the selected item to `target`; zeros beyond its end. Says whether all of it was memory.
    fn copy_out(&self, position: &Position, target: u64, length: u32) -> bool {
        let item = self.item(position.key).map_or(&[][..], |item| item);
        let start = item.len().min(position.offset as usize);
        let bytes = &item[start..item.len().min(start + length as usize)];
        if self.memory.write_slice(bytes, GuestAddress(target)).is_err() {
            return false;
        }
        let mut at = target + bytes.len() as u64;
        let mut left = length as usize - bytes.len();
        while left > 0 {
            let piece = left.min(PIECE);
            if self.memory.write_slice(&[0; PIECE][..piece], GuestAddress(at)).is_err() {
                return false;
            }
            // Memory ends below the last address, so this does not overflow.
            at += piece as u64;
            left -= piece;
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, Position> {
        self.position.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PortDevice for FwCfg {
    fn port_in(&self, port: u16, size: u8) -> u32 {
        let mut position = self.lock();
        match port {
            SELECTOR => u32::from(position.key),
            DATA => read_bytes(port, size, |_| self.next_byte(&mut position)),
            DMA_ADDRESS_HIGH.. => read_bytes(port, size, |port| {
                let at = usize::from(port.wrapping_sub(DMA_ADDRESS_HIGH));
                DMA_SIGNATURE.get(at).copied().unwrap_or(0xff)
            }),
            _ => u32::MAX,
        }
    }

    fn port_out(&self, port: u16, size: u8, value: u32) {
        match (port, size) {
            (SELECTOR, 2..) => {
                let mut position = self.lock();
                position.key = value as u16;
                position.offset = 0;
            }
            (DMA_ADDRESS_HIGH, 4) => self.lock().dma_high = value.swap_bytes(),
            (DMA_ADDRESS_LOW, 4) => {
                let high = std::mem::take(&mut self.lock().dma_high);
                self.transfer(u64::from(high) << 32 | u64::from(value.swap_bytes()));
            }
            _ => {}
        }
    }
}

impl Snapshot for FwCfg {
    fn state(&self) -> Saved {
        Saved::new(STATE.0, STATE.1, &*self.lock())
    }

    fn restore(&self, state: &Saved) -> Result<(), RestoreError> {
        *self.lock() = state.open(STATE.0, STATE.1)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fw_cfg() -> Arc<FwCfg> {
        let memory = vmm::memory::map(&[(0, 0x4000)]).unwrap();
        let mut items = FwCfgItems::new(0x4000, 2);
        items.add_file("etc/b", b"second".to_vec());
        items.add_file("etc/a", b"first".to_vec());
        items.add_e820(&[E820Entry { base: 0, size: 0x4000, kind: 1 }]);
        FwCfg::new(memory, items)
    }

    fn select(device: &FwCfg, key: u16) {
        device.port_out(SELECTOR, 2, key.into());
    }

    fn read(device: &FwCfg, n: usize) -> Vec<u8> {
        (0..n).map(|_| device.port_in(DATA, 1) as u8).collect()
    }

    fn dma(device: &FwCfg, control: u32, length: u32, target: u64) -> u32 {
        let command = [control.to_be_bytes(), length.to_be_bytes(), ((target >> 32) as u32).to_be_bytes(), (target as u32).to_be_bytes()];
        device.memory.write_slice(&command.concat(), GuestAddress(0x100)).unwrap();
        device.port_out(DMA_ADDRESS_HIGH, 4, 0);
        device.port_out(DMA_ADDRESS_LOW, 4, 0x100u32.swap_bytes());
        let mut answer = [0; 4];
        device.memory.read_slice(&mut answer, GuestAddress(0x100)).unwrap();
        u32::from_be_bytes(answer)
    }

    #[test]
    fn signature_and_features_are_where_guests_look() {
        let device = fw_cfg();
        select(&device, KEY_SIGNATURE);
        assert_eq!(read(&device, 6), b"QEMU\0\0");
        select(&device, KEY_ID);
        assert_eq!(read(&device, 4), [3, 0, 0, 0]);
        assert_eq!(device.port_in(DMA_ADDRESS_HIGH, 4).swap_bytes(), 0x5145_4d55);
        assert_eq!(device.port_in(DMA_ADDRESS_LOW, 4).swap_bytes(), 0x2043_4647);
    }

    #[test]
    fn directory_lists_files_by_name() {
        let device = fw_cfg();
        select(&device, KEY_DIRECTORY);
        assert_eq!(read(&device, 4), [0, 0, 0, 3]);
        let entry = read(&device, 64);
        assert_eq!(entry[..8], [0, 0, 0, 5, 0, 0x20, 0, 0]);
        assert!(entry[8..].starts_with(b"etc/a\0"));
        select(&device, 0x21);
        assert_eq!(read(&device, 6), b"second");
    }

    #[test]
    fn dma_reads_select_skip_and_read() {
        let device = fw_cfg();
        assert_eq!(dma(&device, 0x21 << 16 | DMA_SELECT | DMA_SKIP, 2, 0), 0);
        assert_eq!(dma(&device, DMA_READ, 6, 0x200), 0);
        let mut bytes = [0xff; 7];
        device.memory.read_slice(&mut bytes[..6], GuestAddress(0x200)).unwrap();
        assert_eq!(&bytes, b"cond\0\0\xff");
    }

    #[test]
    fn dma_outside_memory_and_writes_are_errors() {
        let device = fw_cfg();
        assert_eq!(dma(&device, 0x21 << 16 | DMA_SELECT | DMA_READ, 6, 0x3fff), DMA_ERROR);
        assert_eq!(dma(&device, DMA_READ, u32::MAX, 0x200), DMA_ERROR);
        assert_eq!(dma(&device, DMA_READ, 8, u64::MAX - 3), DMA_ERROR);
        assert_eq!(dma(&device, DMA_WRITE, 1, 0x200), DMA_ERROR);
        device.port_out(DMA_ADDRESS_LOW, 4, 0xffff_ffff);
    }

    #[test]
    fn state_survives_a_restore() {
        let device = fw_cfg();
        select(&device, 0x21);
        read(&device, 2);
        let other = fw_cfg();
        other.restore(&device.state()).unwrap();
        assert_eq!(read(&other, 4), b"cond");
    }

    proptest! {
        #[test]
        fn no_guest_input_panics(steps in prop::collection::vec((0u16..13, any::<u32>(), 0usize..3, any::<bool>()), 0..200), command: [u8; 16]) {
            let device = fw_cfg();
            device.memory.write_slice(&command, GuestAddress(0)).unwrap();
            for (port, value, size, write) in steps {
                let (port, size) = (SELECTOR + port, [1, 2, 4][size]);
                if write { device.port_out(port, size, value & 0xff00_001f) } else { device.port_in(port, size); }
            }
        }
    }
}
