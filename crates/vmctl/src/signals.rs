//! Signals that ask the program to end, taken by one thread so that the terminal is always restored.
#![allow(unsafe_code)] // sigset operations have no safe form in the standard library or rustix.

use std::mem::MaybeUninit;

const ENDING: [i32; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// Calls `on_signal` with the number of the first signal that asks us to end. To be called before any thread is started:
/// they inherit the blocked signals. (Programs we start do not: the standard library unblocks all for them.)
///
/// # Errors
/// When the host gives no thread.
pub fn watch(on_signal: impl FnOnce(i32) + Send + 'static) -> std::io::Result<()> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, which the other calls then read; all get valid pointers.
    let set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in ENDING {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        let set = set.assume_init();
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        set
    };
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let mut signal = 0;
        // SAFETY: both pointers are to live variables.
        if unsafe { libc::sigwait(&set, &mut signal) } == 0 {
            on_signal(signal);
        }
    })?;
    Ok(())
}
