//! How other threads reach a running or halted processor.
//!
//! One word of flags that the processor looks at before each block, and a way to sleep until it becomes non-zero.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

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

/// What ends the sleep of a processor that halted or waits for a start-up IPI.
pub(crate) const ROUSES: u32 = KICK | FLUSH | APIC | WINDOW | CODE_PAGES | WAKE;

/// Looks at the flags between two looks at the clock.
const LOOKS: u32 = 32;

/// How long a halted processor stays awake, by what it has seen: a device that answers soon is waited for without the detour by the host's
/// scheduler, as KVM does it (Linux, `Documentation/virt/kvm/halt-polling.rst`).
#[derive(Default)]
pub(crate) struct Patience(Duration);

impl Patience {
    const FIRST: Duration = Duration::from_micros(10);
    const MOST: Duration = Duration::from_micros(100);

    /// How long to stay awake now.
    pub fn now(&self) -> Duration {
        self.0
    }

    /// The last wait took so long.
    pub fn learn(&mut self, waited: Duration) {
        if waited > Self::MOST {
            self.0 = Duration::ZERO;
        } else if waited > self.0 {
            self.0 = (self.0 * 2).clamp(Self::FIRST, Self::MOST);
        }
    }
}

/// See the module.
#[derive(Default)]
pub(crate) struct Attention {
    flags: AtomicU32,
    /// Whether the processor is executing guest code (and so may hold TLB entries that it uses).
    in_guest: AtomicBool,
    /// The HLT that is under way, or the next one, ends at once.
    woken: AtomicBool,
    /// The processor sleeps, or is about to: whoever sets a flag has to wake it.
    sleeping: AtomicBool,
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
        // Either this sees the sleeper, or the sleeper sees the flags.
        if self.sleeping.load(Ordering::SeqCst) {
            // Taking the lock orders this with a sleeper between its check and its wait.
            drop(self.sleep.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
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

    /// Waits until some flag in `mask` is set: awake for as long as `patience`, then asleep.
    pub fn wait(&self, mask: u32, patience: Duration) {
        if !patience.is_zero() {
            let start = Instant::now();
            while start.elapsed() < patience {
                for _ in 0..LOOKS {
                    if self.flags.load(Ordering::SeqCst) & mask != 0 {
                        return;
                    }
                    std::hint::spin_loop();
                }
            }
        }
        let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleeping.store(true, Ordering::SeqCst);
        while self.flags.load(Ordering::SeqCst) & mask == 0 {
            // The time-out only guards against a lost wake-up; it is never needed for correctness.
            guard = self.wake.wait_timeout(guard, Duration::from_secs(1)).unwrap_or_else(PoisonError::into_inner).0;
        }
        self.sleeping.store(false, Ordering::SeqCst);
    }

    /// Notes that the processor begins to execute guest code, or stops.
    pub fn set_in_guest(&self, inside: bool) {
        self.in_guest.store(inside, Ordering::SeqCst);
    }

    /// Whether the processor is executing guest code.
    pub fn in_guest(&self) -> bool {
        self.in_guest.load(Ordering::SeqCst)
    }

    /// Whether the processor executes no guest code and nothing rouses it.
    pub fn is_idle(&self) -> bool {
        !self.in_guest() && self.flags() & ROUSES == 0
    }
}

impl devices::lapic::ApicClient for Attention {
    fn attention(&self) {
        self.set(APIC);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_grows_by_short_waits_and_ends_with_a_long_one() {
        let mut patience = Patience::default();
        for expected in [10, 20, 40, 80, 100, 100] {
            patience.learn(Duration::from_micros(100));
            assert_eq!(patience.now(), Duration::from_micros(expected));
        }
        patience.learn(Duration::from_micros(30));
        assert_eq!(patience.now(), Patience::MOST, "it was enough");
        patience.learn(Duration::from_millis(4));
        assert_eq!(patience.now(), Duration::ZERO);
    }

    #[test]
    fn processor_is_idle_until_it_runs_or_is_roused() {
        let attention = Attention::default();
        assert!(attention.is_idle(), "it has not begun");
        attention.set_in_guest(true);
        assert!(!attention.is_idle());
        attention.set_own(IDLE | STEP);
        attention.set_in_guest(false);
        assert!(attention.is_idle(), "it halted");
        attention.set(APIC);
        assert!(!attention.is_idle(), "it is about to run");
    }

    #[test]
    fn sleeper_and_waiter_are_reached() {
        for patience in [Duration::ZERO, Duration::from_secs(10)] {
            let attention = std::sync::Arc::new(Attention::default());
            let other = std::sync::Arc::clone(&attention);
            let waiting = std::thread::spawn(move || other.wait(KICK, patience));
            attention.set(APIC);
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waiting.is_finished(), "not the flag that was waited for");
            let start = Instant::now();
            attention.set(KICK);
            waiting.join().unwrap();
            assert!(start.elapsed() < Duration::from_secs(5));
        }
    }
}
