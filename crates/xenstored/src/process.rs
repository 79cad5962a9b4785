//! What makes a program a daemon: its signals, its pid file, its way into the background, and into the next program.
#![allow(unsafe_code)] // sigset operations, signalfd(2), daemon(3), execv(3) and inherited descriptors have no safe form in the standard library or rustix.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// Signals that ask the program to end.
pub const ENDING: &[i32] = &[libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
/// Signals that ask the program to go on as another one, see [`upgrade`](crate::upgrade).
pub const UPGRADING: &[i32] = &[libc::SIGUSR2];

/// A descriptor that is readable once one of `signals` has come; the signals do nothing else from now on. To be called before any thread is
/// started: they inherit that.
///
/// # Errors
/// When the host has no descriptor left.
pub fn signals(signals: &[i32]) -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, which the other calls then read; all get valid pointers.
    let descriptor = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        let set = set.assume_init();
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just made this descriptor and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Becomes another program, with the signals that are blocked, as the standard library does not. Returns only when that fails.
pub fn become_program(program: &CStr, arguments: &[CString]) -> io::Error {
    let pointers: Vec<_> = arguments.iter().map(|argument| argument.as_ptr()).chain([std::ptr::null()]).collect();
    // SAFETY: the list ends with a null pointer, and all strings live until the call returns.
    unsafe { libc::execv(program.as_ptr(), pointers.as_ptr()) };
    io::Error::last_os_error()
}

/// Takes a descriptor that an earlier program of this process has left open. To be called once for each number.
///
/// # Errors
/// When there is none.
pub fn take_descriptor(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl(2) takes any number and tells if it is no descriptor.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and the caller's alone.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Goes on in the background, away from the terminal: daemon(3). Standard input, output and error are gone afterwards. The directory stays: the next
/// program of an upgrade reads the same command line.
///
/// # Errors
/// When the host has no process left.
pub fn go_to_background() -> io::Result<()> {
    // SAFETY: no other thread has been started, so the child has all that the parent had.
    if unsafe { libc::daemon(1, 0) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A file with the process number, locked and removed in the end.
pub struct PidFile {
    file: File,
    path: PathBuf,
}

impl PidFile {
    /// Claims the file at `path`. The number is written later, as it changes on the way into the background.
    ///
    /// # Errors
    /// When another process has claimed it, or it cannot be made.
    pub fn claim(path: &Path) -> anyhow::Result<PidFile> {
        let mut options = File::options();
        let file = options.create(true).truncate(false).write(true).open(path).with_context(|| path.display().to_string())?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => bail!("{}: another xenstored has claimed this file", path.display()),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        }
        Ok(PidFile { file, path: path.into() })
    }

    /// Writes this process' number.
    ///
    /// # Errors
    /// The host's.
    pub fn write(&mut self) -> anyhow::Result<()> {
        let written = self.file.set_len(0).and_then(|()| writeln!(self.file, "{}", std::process::id()));
        written.with_context(|| self.path.display().to_string())
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // One that cannot be removed is not locked and so in nobody's way.
        let _ = std::fs::remove_file(&self.path);
    }
}
