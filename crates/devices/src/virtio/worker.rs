//! Threads that work on rings, and the eventfd doorbells that wake them.

mod reserve;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

pub use reserve::{Call, Reserve};

/// Something to be woken by. Rings that nobody heard yet are one ring.
pub struct Doorbell(OwnedFd);

impl Doorbell {
    /// A silent doorbell.
    ///
    /// # Errors
    /// When the host has no file descriptor left.
    pub fn new() -> std::io::Result<Doorbell> {
        Ok(Doorbell(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Rings.
    pub fn ring(&self) {
        // The counter can be full only when it was rung 2^64 - 2 times unheard: it is awake then.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Forgets rings so far; the listener looks for work after this.
    pub fn hear(&self) {
        let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What a worker listens to.
#[derive(Clone)]
pub struct Bell {
    doorbell: Arc<Doorbell>,
    stop: Arc<AtomicBool>,
}

impl Bell {
    /// Sleeps until the doorbell rings. `false`: it is time to end.
    pub fn wait(&self) -> bool {
        self.wait_or(None).is_some()
    }

    /// Sleeps until the doorbell rings or `other` has one of the asked events; says which events `other` has. `None`: it is
    /// time to end.
    pub fn wait_or(&self, other: Option<(BorrowedFd<'_>, PollFlags)>) -> Option<PollFlags> {
        let (rung, events) = match other {
            Some((fd, flags)) => {
                let mut fds = [PollFd::new(&self.doorbell, PollFlags::IN), PollFd::from_borrowed_fd(fd, flags)];
                poll_until(&mut fds);
                (!fds[0].revents().is_empty(), fds[1].revents())
            }
            None => {
                poll_until(&mut [PollFd::new(&self.doorbell, PollFlags::IN)]);
                (true, PollFlags::empty())
            }
        };
        if rung {
            self.doorbell.hear();
        }
        (!self.stop.load(Ordering::Acquire)).then_some(events)
    }

    /// Rings the doorbell, for those who have the bell and not the worker.
    pub fn ring(&self) {
        self.doorbell.ring();
    }

    /// Whether it is time to end.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn end_soon(&self) {
        self.stop.store(true, Ordering::Release);
        self.ring();
    }
}

/// For a loop that waits for more than the bell.
impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.doorbell.as_fd()
    }
}

/// A thread with a doorbell, ended and joined before this is gone.
pub struct Worker<T> {
    bell: Bell,
    thread: Option<JoinHandle<T>>,
}

impl<T: Send + 'static> Worker<T> {
    /// Starts `work` on a thread called `name`.
    ///
    /// # Errors
    /// When the host refuses a file descriptor or a thread.
    pub fn spawn(name: &str, work: impl FnOnce(Bell) -> T + Send + 'static) -> std::io::Result<Worker<T>> {
        let bell = Bell { doorbell: Arc::new(Doorbell::new()?), stop: Arc::new(AtomicBool::new(false)) };
        let theirs = bell.clone();
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || work(theirs))?;
        Ok(Worker { bell, thread: Some(thread) })
    }

    /// Ends the worker and says what it returned; `None` if it panicked.
    pub fn stop(mut self) -> Option<T> {
        self.end()
    }
}

impl<T> Worker<T> {
    /// Tells the worker that it is time to end, without waiting for it.
    pub fn end_soon(&self) {
        self.bell.end_soon();
    }

    /// Whether it has nothing more to do.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Wakes the worker.
    pub fn ring(&self) {
        self.bell.doorbell.ring();
    }

    fn end(&mut self) -> Option<T> {
        self.end_soon();
        self.thread.take().and_then(|thread| thread.join().ok())
    }
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        self.end();
    }
}

fn poll_until(fds: &mut [PollFd<'_>]) {
    while poll(fds, None) == Err(Errno::INTR) {}
}
