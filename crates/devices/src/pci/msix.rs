//! MSI-X: a table of messages and a bit for each that waits behind a mask. PCI 3.0 section 6.8.2.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use abi::pci::*;
use serde::{Deserialize, Serialize};

use crate::MsiSink;

/// Vectors a function can have.
const MOST_VECTORS: u16 = 2048;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

const POWER_ON: Entry = Entry { address: 0, data: 0, control: MSIX_VECTOR_MASKED, pending: false };

/// Table and pending bits of one function.
pub struct Msix {
    sink: Arc<dyn MsiSink>,
    /// A copy of the state's, for asking without the lock.
    enabled: AtomicBool,
    inner: Mutex<MsixState>,
    vectors: u16,
    /// BAR, table offset and pending bits' offset.
    place: OnceLock<(u8, u64, u64)>,
}

/// State of the table. Enable and mask of the function are in configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MsixState {
    entries: Vec<Entry>,
    #[serde(skip)]
    enabled: bool,
    #[serde(skip)]
    all_masked: bool,
}

impl Msix {
    /// A table of `vectors` (1 to 2048) that sends to `sink`.
    pub fn new(vectors: u16, sink: Arc<dyn MsiSink>) -> Arc<Msix> {
        let vectors = vectors.clamp(1, MOST_VECTORS);
        let inner = MsixState { entries: vec![POWER_ON; usize::from(vectors)], enabled: false, all_masked: false };
        Arc::new(Msix { sink, enabled: AtomicBool::new(false), inner: Mutex::new(inner), vectors, place: OnceLock::new() })
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// Bytes of the table.
    pub fn table_size(&self) -> u64 {
        u64::from(self.vectors) * MSIX_ENTRY_SIZE
    }

    /// Bytes of the pending bits, in whole 64-bit words.
    pub fn pba_size(&self) -> u64 {
        u64::from(self.vectors).div_ceil(64) * 8
    }

    /// Whether the guest uses MSI-X, and not INTx.
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// Sends `vector`, or remembers it while it is masked. Vectors that do not exist are dropped.
    pub fn trigger(&self, vector: u16) {
        let mut inner = self.lock();
        let blocked = inner.all_masked;
        if !inner.enabled {
            return;
        }
        let Some(entry) = inner.entries.get_mut(usize::from(vector)) else { return };
        if blocked || entry.control & MSIX_VECTOR_MASKED != 0 {
            entry.pending = true;
            return;
        }
        let (address, data) = (entry.address, entry.data);
        drop(inner);
        self.sink.signal_msi(address, data);
    }

    pub(super) fn place(&self, bar: u8, table: u64, pba: u64) {
        let _ = self.place.set((bar, table, pba));
    }

    /// Whether an access at `offset` of BAR `bar` is ours.
    pub(super) fn covers(&self, bar: u8, offset: u64) -> bool {
        self.place.get().is_some_and(|&(own, table, pba)| {
            own == bar && (offset.wrapping_sub(table) < self.table_size() || offset.wrapping_sub(pba) < self.pba_size())
        })
    }

    /// Read of the table or the pending bits.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let inner = self.lock();
        for (byte, at) in data.iter_mut().zip(offset..) {
            let word = self.word(&inner, at & !3);
            *byte = word.to_le_bytes()[(at & 3) as usize];
        }
    }

    /// Write to the table: aligned 32 or 64 bits, anything else is undefined and does nothing.
    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || offset & 3 != 0 {
            return;
        }
        let mut inner = self.lock();
        for (chunk, at) in data.chunks_exact(4).zip((offset..).step_by(4)) {
            let word = chunk.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
            self.write_word(&mut inner, at, word);
        }
        self.send_pending(inner);
    }

    /// The guest wrote the control word in configuration space.
    pub(super) fn set_control(&self, control: u16) {
        let mut inner = self.lock();
        inner.enabled = control & MSIX_ENABLE != 0;
        inner.all_masked = control & MSIX_MASK_ALL != 0;
        self.enabled.store(inner.enabled, Ordering::Release);
        self.send_pending(inner);
    }

    pub(super) fn reset(&self) {
        let mut inner = self.lock();
        inner.entries.fill(POWER_ON);
        inner.enabled = false;
        inner.all_masked = false;
        self.enabled.store(false, Ordering::Release);
    }

    pub(super) fn state(&self) -> MsixState {
        self.lock().clone()
    }

    pub(super) fn restore(&self, state: &MsixState, control: u16) {
        let mut inner = self.lock();
        for (entry, saved) in inner.entries.iter_mut().zip(&state.entries) {
            entry.clone_from(saved);
        }
        drop(inner);
        self.set_control(control);
    }

    fn word(&self, inner: &MsixState, offset: u64) -> u32 {
        let Some(&(_, table, pba)) = self.place.get() else { return 0 };
        let in_table = offset.wrapping_sub(table);
        if in_table < self.table_size() {
            let entry = &inner.entries[(in_table / MSIX_ENTRY_SIZE) as usize];
            return match in_table % MSIX_ENTRY_SIZE {
                0 => entry.address as u32,
                4 => (entry.address >> 32) as u32,
                8 => entry.data,
                _ => entry.control,
            };
        }
        let in_pba = offset.wrapping_sub(pba);
        if in_pba >= self.pba_size() {
            return 0;
        }
        let entries = inner.entries.iter().skip(in_pba as usize * 8).take(32);
        entries.enumerate().fold(0, |bits, (bit, entry)| bits | u32::from(entry.pending) << bit)
    }

    fn write_word(&self, inner: &mut MsixState, offset: u64, word: u32) {
        let Some(&(_, table, _)) = self.place.get() else { return };
        let in_table = offset.wrapping_sub(table);
        if in_table >= self.table_size() {
            return;
        }
        let entry = &mut inner.entries[(in_table / MSIX_ENTRY_SIZE) as usize];
        match in_table % MSIX_ENTRY_SIZE {
            0 => entry.address = entry.address & !0xffff_ffff | u64::from(word & !3),
            4 => entry.address = entry.address & 0xffff_ffff | u64::from(word) << 32,
            8 => entry.data = word,
            _ => entry.control = word & MSIX_VECTOR_MASKED,
        }
    }

    /// Sends what waits and is no longer masked.
    fn send_pending(&self, mut inner: MutexGuard<'_, MsixState>) {
        if !inner.enabled || inner.all_masked {
            return;
        }
        let mut messages = Vec::new();
        for entry in inner.entries.iter_mut().filter(|entry| entry.pending && entry.control & MSIX_VECTOR_MASKED == 0) {
            entry.pending = false;
            messages.push((entry.address, entry.data));
        }
        drop(inner);
        for (address, data) in messages {
            self.sink.signal_msi(address, data);
        }
    }

    fn lock(&self) -> MutexGuard<'_, MsixState> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, u32)>>);

    impl MsiSink for Recorder {
        fn signal_msi(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push((address, data));
        }
    }

    fn msix() -> (Arc<Recorder>, Arc<Msix>) {
        let recorder = Arc::new(Recorder::default());
        let msix = Msix::new(3, recorder.clone());
        msix.place(1, 0x1000, 0x1800);
        msix.write(0x1010, &0xfee0_1000u64.to_le_bytes());
        msix.write(0x1018, &0x41u32.to_le_bytes());
        (recorder, msix)
    }

    #[test]
    fn masked_vector_waits_and_is_sent_when_unmasked() {
        let (recorder, msix) = msix();
        msix.set_control(MSIX_ENABLE);
        msix.trigger(1);
        msix.trigger(1);
        assert!(recorder.0.lock().unwrap().is_empty());
        let mut pending = [0; 8];
        msix.read(0x1800, &mut pending);
        assert_eq!(pending, [2, 0, 0, 0, 0, 0, 0, 0]);
        msix.write(0x101c, &[0; 4]);
        assert_eq!(*recorder.0.lock().unwrap(), [(0xfee0_1000, 0x41)]);
        msix.read(0x1800, &mut pending);
        assert_eq!(pending, [0; 8]);
        msix.trigger(1);
        assert_eq!(recorder.0.lock().unwrap().len(), 2);
    }

    #[test]
    fn function_mask_holds_back_all_vectors() {
        let (recorder, msix) = msix();
        msix.write(0x101c, &[0; 4]);
        msix.set_control(MSIX_ENABLE | MSIX_MASK_ALL);
        msix.trigger(1);
        assert!(recorder.0.lock().unwrap().is_empty());
        msix.set_control(MSIX_ENABLE);
        assert_eq!(recorder.0.lock().unwrap().len(), 1);
    }

    #[test]
    fn nothing_is_sent_when_disabled_or_out_of_range() {
        let (recorder, msix) = msix();
        msix.write(0x101c, &[0; 4]);
        msix.trigger(1);
        msix.set_control(MSIX_ENABLE);
        msix.trigger(3);
        msix.trigger(u16::MAX);
        assert!(recorder.0.lock().unwrap().is_empty());
    }

    #[test]
    fn table_reads_back_and_starts_masked() {
        let (_, msix) = msix();
        let mut entry = [0; 16];
        msix.read(0x1010, &mut entry);
        assert_eq!(entry, [0, 0x10, 0xe0, 0xfe, 0, 0, 0, 0, 0x41, 0, 0, 0, 1, 0, 0, 0]);
        assert!(msix.covers(1, 0x102f) && !msix.covers(1, 0x1030) && !msix.covers(0, 0x1000) && msix.covers(1, 0x1807));
    }
}
