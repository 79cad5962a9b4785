//! How other threads reach a running or halted processor.
//!
//! One word of flags that the processor looks at before each block, and a way to sleep until it becomes non-zero.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// The local APIC has something: an interrupt, NMI, INIT or SIPI.
pub(crate) const APIC: u32 = 1;
/// Leave `Vcpu::run`.
pub(crate) const KICK: u32 = 2;
/// Empty the TLB (page protections changed).
pub(crate) const FLUSH: u32 = 4;
/// Pages that this processor may hold as writable got decoded instructions; they are listed in the machine.
pub(crate) const CODE_PAGES: u32 = 8;
/// The guest's RFLAGS.TF, a debug register or a single-step request wants every instruction looked at.
pub(crate) const STEP: u32 = 16;
/// The last instruction holds off interrupts for one more (STI, MOV SS, POP SS).
pub(crate) const SHADOW: u32 = 32;
/// Leave when an interrupt could be taken.
pub(crate) const WINDOW: u32 = 64;
/// [`Attention::wake`] was called.
pub(crate) const WAKE: u32 = 256;
/// Forget the translations of the pages that are listed in the machine.
pub(crate) const FLUSH_PAGES: u32 = 512;

/// The processor halted, waits for a start-up IPI, or has a pending exit.
pub(crate) const IDLE: u32 = 128;

/// See the module.
#[derive(Default)]
pub(crate) struct Attention {
    flags: AtomicU32,
    /// Whether the processor is executing guest code (and so may hold TLB entries that it uses).
    in_guest: AtomicBool,
    /// The HLT that is under way, or the next one, ends at once.
    woken: AtomicBool,
    sleep: Mutex<()>,
    wake: Condvar,
}

impl Attention {
    /// The flags now; 0 is the common case.
    #[inline(always)]
    pub fn flags(&self) -> u32 {
        self.flags.load(Ordering::Relaxed)
    }

    /// Where the flags are, for generated code.
    pub fn address(&self) -> *const AtomicU32 {
        &self.flags
    }

    /// Sets flags and wakes the processor if it sleeps.
    pub fn set(&self, flags: u32) {
        self.flags.fetch_or(flags, Ordering::SeqCst);
        // Taking the lock orders this with a sleeper between its check and its wait.
        drop(self.sleep.lock().unwrap_or_else(PoisonError::into_inner));
        self.wake.notify_all();
    }

    /// Sets flags from the processor's own thread, which is awake.
    #[inline(always)]
    pub fn set_own(&self, flags: u32) {
        self.flags.fetch_or(flags, Ordering::Relaxed);
    }

    /// Clears flags and returns the old ones.
    pub fn clear(&self, flags: u32) -> u32 {
        self.flags.fetch_and(!flags, Ordering::SeqCst)
    }

    /// Ends the processor's HLT, or its next one.
    pub fn wake(&self) {
        self.woken.store(true, Ordering::SeqCst);
        self.set(WAKE);
    }

    /// Whether [`Attention::wake`] was called since this was asked last.
    pub fn take_woken(&self) -> bool {
        self.clear(WAKE);
        self.woken.swap(false, Ordering::SeqCst)
    }

    /// Sleeps until some flag in `mask` is set.
    pub fn wait(&self, mask: u32) {
        let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        while self.flags.load(Ordering::SeqCst) & mask == 0 {
            // The time-out only guards against a lost wake-up; it is never needed for correctness.
            guard = self.wake.wait_timeout(guard, Duration::from_secs(1)).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Notes that the processor begins to execute guest code, or stops.
    pub fn set_in_guest(&self, inside: bool) {
        self.in_guest.store(inside, Ordering::SeqCst);
    }

    /// Whether the processor is executing guest code.
    pub fn in_guest(&self) -> bool {
        self.in_guest.load(Ordering::SeqCst)
    }
}

impl devices::lapic::ApicClient for Attention {
    fn attention(&self) {
        self.set(APIC);
    }
}
