//! What makes a program a daemon: its signals, its pid file, its way into the background.
#![allow(unsafe_code)] // sigset operations, signalfd(2) and daemon(3) have no safe form in the standard library or rustix.

use std::fs::File;
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// Signals that ask the program to end.
const ENDING: [i32; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// A descriptor that is readable once a signal has asked the program to end. See [`signals`].
///
/// # Errors
/// When the host has no descriptor left.
pub fn ending_signals() -> io::Result<OwnedFd> {
    signals(&ENDING)
}

/// A descriptor that is readable once SIGUSR2 has asked the program to replace itself. See [`signals`].
///
/// # Errors
/// When the host has no descriptor left.
pub fn upgrade_signal() -> io::Result<OwnedFd> {
    signals(&[libc::SIGUSR2])
}

/// A descriptor from which signals are read; they do nothing else from now on. To be called before any thread is started: they inherit that.
fn signals(signals: &[i32]) -> io::Result<OwnedFd> {
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

/// Takes the signal that has made `signals` readable.
pub fn take_signal(signals: &OwnedFd) {
    // It is at most one of each kind, and nothing is wanted but that it is gone.
    let _ = rustix::io::read(signals, &mut [0; size_of::<libc::signalfd_siginfo>()]);
}

/// Goes on in the background, away from the terminal: daemon(3). Standard input, output and error are gone afterwards.
///
/// # Errors
/// When the host has no process left.
pub fn go_to_background() -> io::Result<()> {
    // SAFETY: no other thread has been started, so the child has all that the parent had.
    if unsafe { libc::daemon(0, 0) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
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

    /// Goes on with a file that another program claimed for this process.
    pub fn adopt(file: OwnedFd, path: PathBuf) -> PidFile {
        PidFile { file: file.into(), path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
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

impl AsFd for PidFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // One that cannot be removed is not locked and so in nobody's way.
        let _ = std::fs::remove_file(&self.path);
    }
}
