//! The console's ring (`io/console.h`): bytes of the guest to the host's terminal, and back.
//!
//! Indices are the guest's: what is impossible breaks the console for good, and nothing else.

use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};

use abi::xen::hvm::CONSOLE_PAGE;
use abi::xen::io::console::{IN_CONS, IN_PROD, IN_SIZE, OUT, OUT_CONS, OUT_PROD, OUT_SIZE};
use vm_memory::{Bytes, GuestAddress};
use vmm::GuestMemory;

use crate::atomic;

pub(super) struct Console {
    memory: GuestMemory,
    output: Box<dyn Write + Send>,
    broken: bool,
}

impl Console {
    pub fn new(memory: GuestMemory, output: Box<dyn Write + Send>) -> Console {
        Console { memory, output, broken: false }
    }

    /// Takes what the guest has written; `true` when there was something.
    pub fn drain(&mut self) -> bool {
        let (cons, prod) = (self.index(OUT_CONS), self.index(OUT_PROD));
        let waiting = prod.wrapping_sub(cons);
        if self.is_broken(waiting, OUT_SIZE) || waiting == 0 {
            return false;
        }
        let mut bytes = [0; OUT_SIZE as usize];
        for (byte, at) in bytes.iter_mut().zip(0..waiting) {
            let place = CONSOLE_PAGE + OUT + u64::from(cons.wrapping_add(at) % OUT_SIZE);
            *byte = self.memory.read_obj(GuestAddress(place)).unwrap_or(0);
        }
        self.set_index(OUT_CONS, prod);
        // A terminal that is gone takes no output, and the guest goes on.
        let _ = self.output.write_all(&bytes[..waiting as usize]).and_then(|()| self.output.flush());
        true
    }

    /// Puts bytes into the ring; how many had room.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let (cons, prod) = (self.index(IN_CONS), self.index(IN_PROD));
        let filled = prod.wrapping_sub(cons);
        if self.is_broken(filled, IN_SIZE) {
            return 0;
        }
        let room = (IN_SIZE - filled) as usize;
        let mut at = prod;
        for byte in bytes.iter().take(room) {
            let place = CONSOLE_PAGE + u64::from(at % IN_SIZE);
            let _ = self.memory.write_obj(*byte, GuestAddress(place));
            at = at.wrapping_add(1);
        }
        self.set_index(IN_PROD, at);
        bytes.len().min(room)
    }

    fn is_broken(&mut self, filled: u32, size: u32) -> bool {
        if filled > size && !self.broken {
            tracing::warn!("xen: the guest's console ring is broken: {filled} bytes in {size}");
            self.broken = true;
        }
        self.broken
    }

    fn index(&self, at: u64) -> u32 {
        let load = |index: &AtomicU32| u32::from_le(index.load(Ordering::Acquire));
        atomic::with(&self.memory, CONSOLE_PAGE + at, load).unwrap_or(0)
    }

    fn set_index(&self, at: u64, value: u32) {
        atomic::with(&self.memory, CONSOLE_PAGE + at, |index: &AtomicU32| index.store(value.to_le(), Ordering::Release));
    }
}
