//! Accesses to guest physical addresses without RAM: the local APIC's page, and the machine's devices.

use vmm::Exit;

use super::{PAGE, PAGE_MASK};
use crate::cpu::Cpu;
use crate::op::Trap;

impl Cpu {
    pub(super) fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> Result<(), Trap> {
        self.stats.mmio += 1;
        if let Some(lapic) = &self.lapic
            && lapic.mmio_page() == Some(gpa & PAGE_MASK)
        {
            lapic.mmio_read(gpa & (PAGE - 1), data);
            return Ok(());
        }
        let mut done = 0;
        while done < data.len() {
            let piece = piece(gpa, done, data.len());
            if !self.bus().mmio_read(self.id, gpa + done as u64, &mut data[done..done + piece]) {
                return Err(self.exit(Exit::Mmio { gpa, size: data.len() as u8, write: None }));
            }
            done += piece;
        }
        Ok(())
    }

    pub(super) fn mmio_write(&mut self, gpa: u64, data: &[u8]) -> Result<(), Trap> {
        self.stats.mmio += 1;
        if let Some(lapic) = &self.lapic
            && lapic.mmio_page() == Some(gpa & PAGE_MASK)
        {
            if let Some(vector) = lapic.mmio_write(gpa & (PAGE - 1), data) {
                self.bus().end_of_interrupt(vector);
            }
            return Ok(());
        }
        let mut done = 0;
        while done < data.len() {
            let piece = piece(gpa, done, data.len());
            if !self.bus().mmio_write(self.id, gpa + done as u64, &data[done..done + piece]) {
                let mut value = [0; 8];
                let n = data.len().min(8);
                value[..n].copy_from_slice(&data[..n]);
                return Err(self.exit(Exit::Mmio { gpa, size: data.len() as u8, write: Some(u64::from_le_bytes(value)) }));
            }
            done += piece;
        }
        Ok(())
    }
}

/// Bytes of the next bus access when `done` of `len` have been accessed: all of a word, aligned pieces of what is longer.
fn piece(gpa: u64, done: usize, len: usize) -> usize {
    if len <= 8 { len } else { (8 - (gpa as usize + done) % 8).min(len - done) }
}
