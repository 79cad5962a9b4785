//! A disk for tests, in memory.
#![allow(clippy::unwrap_used)]

use std::io;
use std::sync::Mutex;

use super::{Disk, GuestSlice, SECTOR};

/// What was asked of a [`MemoryDisk`] besides reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// A flush.
    Flush,
    /// A discard of these bytes: from, and how many.
    Discard(u64, u64),
}

/// A disk in memory; each sector is full of its number at first.
pub struct MemoryDisk {
    /// What is on it.
    pub bytes: Mutex<Vec<u8>>,
    /// What was asked of it.
    pub asked: Mutex<Vec<Asked>>,
    /// Whether everything fails.
    pub is_broken: bool,
    /// Whether it says that it is not to be written.
    pub read_only: bool,
}

impl MemoryDisk {
    /// A disk of `sectors`.
    pub fn new(sectors: usize, read_only: bool) -> MemoryDisk {
        let bytes = (0..sectors * SECTOR as usize).map(|at| (at / SECTOR as usize) as u8).collect();
        MemoryDisk { bytes: Mutex::new(bytes), asked: Mutex::default(), is_broken: false, read_only }
    }

    fn ask(&self, asked: Asked) -> io::Result<()> {
        self.asked.lock().unwrap().push(asked);
        self.check()
    }

    fn check(&self) -> io::Result<()> {
        if self.is_broken { Err(io::Error::other("a broken disk")) } else { Ok(()) }
    }
}

impl Disk for MemoryDisk {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset: u64, slices: &[GuestSlice<'_>]) -> io::Result<()> {
        let bytes = self.bytes.lock().unwrap();
        let mut at = offset as usize;
        for slice in slices {
            slice.copy_from(&bytes[at..at + slice.len()]);
            at += slice.len();
        }
        self.check()
    }

    fn write(&self, offset: u64, slices: &[GuestSlice<'_>]) -> io::Result<()> {
        let mut bytes = self.bytes.lock().unwrap();
        let mut at = offset as usize;
        for slice in slices {
            slice.copy_to(&mut bytes[at..at + slice.len()]);
            at += slice.len();
        }
        self.check()
    }

    fn flush(&self) -> io::Result<()> {
        self.ask(Asked::Flush)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.ask(Asked::Discard(offset, len))
    }
}
