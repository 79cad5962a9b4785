//! How other threads make a processor leave the guest, and how it is kept out of it.
//!
//! KVM_RUN returns with EINTR when a signal arrives, or at once when `immediate_exit` of the run page is set (kernel:
//! Documentation/virt/kvm/api.rst, section 5). A signal alone is lost when it comes just before KVM_RUN, the flag alone does
//! not wake a processor that is inside; so a caller does both. The order that makes it free of races:
//!
//! ```text
//!   processor: immediate_exit = 0; look at every request; KVM_RUN
//!   caller:    write the request; immediate_exit = 1; send the signal
//! ```
//!
//! A request that is written after the processor looked is followed by a flag that is set after it was cleared.

// The run page's flag is written from other threads, and the signal needs sigaction and pthread_kill.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

/// Where one processor can be reached while it runs, and what was asked of it.
#[derive(Default)]
pub(crate) struct Doorbell {
    kicked: AtomicBool,
    running: Mutex<Option<Running>>,
}

struct Running {
    thread: libc::pthread_t,
    immediate_exit: NonNull<u8>,
}

// SAFETY: the pointer leads into a run page that outlives its registration (see `Doorbell::enter`), and is only used for
// atomic stores of one byte.
unsafe impl Send for Running {}

impl Doorbell {
    /// Asks the processor to leave its run loop.
    pub(crate) fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.ring();
    }

    /// Makes the processor come out of the guest and look at its requests.
    pub(crate) fn ring(&self) {
        if let Some(running) = &*lock(&self.running) {
            // SAFETY: the pointer is registered, so the run page is mapped (`enter`); the kernel and we access this byte
            // with single stores and loads only.
            unsafe { AtomicU8::from_ptr(running.immediate_exit.as_ptr()) }.store(1, Ordering::SeqCst);
            // SAFETY: the thread is registered, so it has not ended: it removes itself under this lock before it does.
            unsafe { libc::pthread_kill(running.thread, signal()) };
        }
    }

    /// Whether somebody kicked and nobody has answered yet.
    pub(crate) fn is_kicked(&self) -> bool {
        self.kicked.load(Ordering::SeqCst)
    }

    /// Takes the kick away.
    pub(crate) fn answer_kick(&self) {
        self.kicked.store(false, Ordering::SeqCst);
    }

    /// Registers the calling thread as the one that runs the processor.
    ///
    /// # Safety
    /// `immediate_exit` must point into a run page that stays mapped until the guard is dropped, and the guard must be
    /// dropped on this thread.
    pub(crate) unsafe fn enter(&self, immediate_exit: NonNull<u8>) -> Entered<'_> {
        install_handler();
        // SAFETY: no arguments, always succeeds.
        let thread = unsafe { libc::pthread_self() };
        *lock(&self.running) = Some(Running { thread, immediate_exit });
        Entered { doorbell: self }
    }
}

/// While this lives, the doorbell rings at the thread that made it.
pub(crate) struct Entered<'a> {
    doorbell: &'a Doorbell,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        *lock(&self.doorbell.running) = None;
    }
}

/// Keeps processors out of the guest while memory slots are taken apart and put together again.
#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    closed: bool,
    inside: usize,
}

impl Gate {
    /// Waits until the gate is open and goes through.
    pub(crate) fn enter(&self) {
        let mut state = lock(&self.state);
        while state.closed {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.inside += 1;
    }

    /// Comes back out.
    pub(crate) fn leave(&self) {
        let mut state = lock(&self.state);
        state.inside -= 1;
        if state.closed {
            self.changed.notify_all();
        }
    }

    /// Closes the gate, calls everybody out with `ring`, and waits until the inside is empty. One closer at a time.
    pub(crate) fn close(&self, ring: impl FnOnce()) -> Closed<'_> {
        lock(&self.state).closed = true;
        ring();
        let mut state = lock(&self.state);
        while state.inside > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Closed { gate: self }
    }
}

/// The gate is closed while this lives.
pub(crate) struct Closed<'a> {
    gate: &'a Gate,
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        lock(&self.gate.state).closed = false;
        self.gate.changed.notify_all();
    }
}

/// The real-time signal that interrupts KVM_RUN. Its handler does nothing: only EINTR matters.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 2
}

fn install_handler() {
    static INSTALLED: OnceLock<()> = OnceLock::new();
    extern "C" fn nothing(_: libc::c_int) {}
    INSTALLED.get_or_init(|| {
        // SAFETY: all zeroes is a valid sigaction: no flags, empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        // For the calls of devices on a processor's thread. KVM_RUN returns EINTR all the same.
        action.sa_flags = libc::SA_RESTART;
        action.sa_sigaction = nothing as *const () as usize;
        // SAFETY: the handler touches nothing, and the structure is initialised.
        let result = unsafe { libc::sigaction(signal(), &action, std::ptr::null_mut()) };
        assert_eq!(result, 0, "SIGRTMIN+2 is a valid signal with a valid handler");
    });
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn closed_gate_waits_for_the_last_one_inside() {
        let gate = Arc::new(Gate::default());
        gate.enter();
        let inside = Arc::clone(&gate);
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            inside.leave();
            inside.enter();
            inside.leave();
        });
        let mut rung = false;
        let closed = gate.close(|| rung = true);
        assert!(rung);
        assert_eq!(lock(&gate.state).inside, 0);
        drop(closed);
        thread.join().unwrap();
    }

    #[test]
    fn kick_before_entering_is_kept() {
        let doorbell = Doorbell::default();
        doorbell.kick();
        assert!(doorbell.is_kicked());
        doorbell.answer_kick();
        assert!(!doorbell.is_kicked());
    }

    #[test]
    fn ring_sets_the_flag_of_the_running_thread() {
        let doorbell = Doorbell::default();
        let mut flag = 0u8;
        // SAFETY: the flag outlives the guard, which is dropped on this thread.
        let entered = unsafe { doorbell.enter(NonNull::from(&mut flag)) };
        doorbell.ring();
        drop(entered);
        assert_eq!(flag, 1);
    }
}
