//! Where the observers of a client's watches leave word for the server's thread.
//!
//! Observers run on processor threads, in the middle of a guest's write: they take one short lock and wake the poll loop. A mailbox that
//! nobody empties fills up and then only remembers that something was lost.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};

/// Most changes that wait for a client to read them.
pub const CAPACITY: usize = 1024;

/// Wakes a poll loop from any thread. (eventfd(2).)
pub struct Waker(OwnedFd);

impl Waker {
    /// A waker that has not been used.
    ///
    /// # Errors
    /// The host's answer.
    pub fn new() -> std::io::Result<Waker> {
        Ok(Waker(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Makes the descriptor readable.
    pub fn wake(&self) {
        // A counter that is full is readable already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Makes it unreadable again.
    pub fn rest(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// One client's mail.
pub struct Mailbox {
    mail: Mutex<Mail>,
    waker: Arc<Waker>,
}

#[derive(Default)]
struct Mail {
    paths: VecDeque<String>,
    overflowed: bool,
}

impl Mailbox {
    /// An empty one, which wakes by `waker`.
    pub fn new(waker: Arc<Waker>) -> Mailbox {
        Mailbox { mail: Mutex::default(), waker }
    }

    /// The key at `path` has changed.
    pub fn put(&self, path: &str) {
        let mut mail = self.lock();
        if mail.paths.len() < CAPACITY {
            mail.paths.push_back(path.into());
        } else {
            mail.overflowed = true;
        }
        drop(mail);
        self.waker.wake();
    }

    /// The oldest change.
    pub fn take(&self) -> Option<String> {
        self.lock().paths.pop_front()
    }

    /// Whether changes were lost.
    pub fn has_overflowed(&self) -> bool {
        self.lock().overflowed
    }

    fn lock(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
