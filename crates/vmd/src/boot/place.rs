//! Placing things into guest memory: inside usable RAM, never over each other.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use abi::boot::E820_RAM;
use vm_memory::{Bytes, GuestAddress};
use vmm::GuestMemory;
use vmm::memory::PAGE_SIZE;

use super::memory_map::{E820Range, EXTENDED_START};
use super::{BootError, Contents, Module, elf, open};

/// The machine's usable RAM, and what is in it already.
pub(super) struct Ram<'a> {
    memory: &'a GuestMemory,
    map: &'a [E820Range],
    taken: Vec<(Range<u64>, String)>,
}

impl<'a> Ram<'a> {
    pub(super) fn new(memory: &'a GuestMemory, map: &'a [E820Range]) -> Ram<'a> {
        Ram { memory, map, taken: Vec::new() }
    }

    /// Takes `size` bytes at `start` for `what`.
    pub(super) fn reserve(&mut self, what: &str, start: u64, size: u64) -> Result<(), BootError> {
        let no_room = |end| BootError::NoRoom { what: what.into(), start, end, ram: self.describe() };
        let end = start.checked_add(size).ok_or_else(|| no_room(u64::MAX))?;
        if size == 0 {
            return Ok(());
        }
        if !self.usable().any(|r| r.start <= start && end <= r.end) {
            return Err(no_room(end));
        }
        if let Some((_, other)) = self.taken.iter().find(|(r, _)| r.start < end && start < r.end) {
            return Err(BootError::Overlap { what: what.into(), start, end, other: other.clone() });
        }
        self.taken.push((start..end, what.into()));
        Ok(())
    }

    /// Takes memory for `what` and writes `bytes` there.
    pub(super) fn put(&mut self, what: &str, start: u64, bytes: &[u8]) -> Result<(), BootError> {
        self.reserve(what, start, bytes.len() as u64)?;
        self.write(what, start, bytes)
    }

    /// Writes into memory that was reserved.
    pub(super) fn write(&self, what: &str, start: u64, bytes: &[u8]) -> Result<(), BootError> {
        self.memory.write_slice(bytes, GuestAddress(start)).map_err(|_| BootError::NoRoom {
            what: what.into(),
            start,
            end: start.saturating_add(bytes.len() as u64),
            ram: self.describe(),
        })
    }

    /// Zeroes memory that was reserved. Pages that are zero are left alone: they need no host memory.
    pub(super) fn zero(&self, what: &str, range: Range<u64>) -> Result<(), BootError> {
        let mut page = [0; PAGE_SIZE as usize];
        let mut at = range.start;
        while at < range.end {
            let step = (PAGE_SIZE - at % PAGE_SIZE).min(range.end - at);
            let chunk = &mut page[..usize::try_from(step).unwrap_or(0)];
            if self.memory.read_slice(chunk, GuestAddress(at)).is_err() || chunk.iter().any(|&b| b != 0) {
                chunk.fill(0);
                self.write(what, at, chunk)?;
            }
            at += step;
        }
        Ok(())
    }

    /// Loads the segments of an ELF file at their physical addresses. Returns the address after the last.
    pub(super) fn put_segments(&mut self, file: &Contents, elf: &elf::Elf) -> Result<u64, BootError> {
        let mut end = 0;
        for segment in &elf.segments {
            self.put_zero_extended("the kernel", segment.physical, segment.bytes(&file.data), segment.memory_size)?;
            end = end.max(segment.physical.saturating_add(segment.memory_size));
        }
        Ok(end)
    }

    /// Writes `bytes` at `start` and zeroes what is left of `size`.
    pub(super) fn put_zero_extended(&mut self, what: &str, start: u64, bytes: &[u8], size: u64) -> Result<(), BootError> {
        self.reserve(what, start, size)?;
        self.write(what, start, bytes)?;
        self.zero(what, start + bytes.len() as u64..start + size)
    }

    /// Loads modules one after the other, page aligned, above `after`. Returns their addresses.
    pub(super) fn put_modules(&mut self, modules: &[Module], after: u64) -> Result<Vec<Range<u64>>, BootError> {
        let mut next = after.max(EXTENDED_START);
        let mut placed = Vec::with_capacity(modules.len());
        for module in modules {
            let (file, size) = open(&module.path)?;
            let start = next.checked_next_multiple_of(PAGE_SIZE).unwrap_or(u64::MAX);
            let what = format!("module {}", module.path.display());
            self.reserve(&what, start, size)?;
            self.read_file(&module.path, file, start, size)?;
            next = start + size;
            placed.push(start..next);
        }
        Ok(placed)
    }

    /// Reads `size` bytes of a file into memory that was reserved.
    pub(super) fn read_file(&self, path: &Path, mut file: File, start: u64, size: u64) -> Result<(), BootError> {
        let count = usize::try_from(size).unwrap_or(usize::MAX);
        if count == 0 {
            return Ok(());
        }
        self.memory
            .read_exact_volatile_from(GuestAddress(start), &mut file, count)
            .map_err(|e| BootError::Read { path: path.to_owned(), source: std::io::Error::other(e) })
    }

    /// End of the usable RAM that holds `address`.
    pub(super) fn end_of_ram(&self, address: u64) -> Option<u64> {
        self.usable().find(|r| r.contains(&address)).map(|r| r.end)
    }

    fn usable(&self) -> impl Iterator<Item = Range<u64>> {
        self.map.iter().filter(|r| r.kind == E820_RAM).map(|r| r.start..r.start.saturating_add(r.size))
    }

    fn describe(&self) -> String {
        let ranges: Vec<String> = self.usable().map(|r| format!("{:#x} to {:#x}", r.start, r.end)).collect();
        if ranges.is_empty() { "none".into() } else { ranges.join(", ") }
    }
}
