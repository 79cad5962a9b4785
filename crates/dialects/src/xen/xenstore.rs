//! The page of the XenStore ring, where guests of this monitor have it. [`xenstore::ring`] has what is done with it.

use std::sync::atomic::{AtomicU32, Ordering};

use abi::xen::hvm::STORE_PAGE;
use vm_memory::{Bytes, GuestAddress};
use vmm::GuestMemory;
use xenstore::ring::Page;

use crate::atomic;

/// The page at [`STORE_PAGE`]. It is memory: every machine with this dialect has some there.
pub struct StorePage(GuestMemory);

impl StorePage {
    /// The page of the machine that has `memory`.
    pub fn new(memory: GuestMemory) -> StorePage {
        StorePage(memory)
    }
}

impl Page for StorePage {
    fn load(&self, at: usize) -> u32 {
        atomic::with(&self.0, STORE_PAGE + at as u64, |word: &AtomicU32| u32::from_le(word.load(Ordering::SeqCst))).unwrap_or(0)
    }

    fn store(&self, at: usize, value: u32) {
        atomic::with(&self.0, STORE_PAGE + at as u64, |word: &AtomicU32| word.store(value.to_le(), Ordering::SeqCst));
    }

    fn read(&self, at: usize, bytes: &mut [u8]) {
        // See above; bytes stay zero otherwise.
        let _ = self.0.read_slice(bytes, GuestAddress(STORE_PAGE + at as u64));
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        let _ = self.0.write_slice(bytes, GuestAddress(STORE_PAGE + at as u64));
    }
}
