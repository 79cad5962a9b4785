//! Workers for what most guests never use: the thread begins when it is called for the first time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::{Bell, Doorbell};

type Work = Box<dyn FnOnce(&Bell) + Send>;

/// Calls a worker, which begins then if it has not. Copies call the same one.
#[derive(Clone)]
pub struct Call(Arc<Shared>);

/// A worker that may not have begun; ended and joined before this is gone.
pub struct Reserve(Call);

struct Shared {
    name: &'static str,
    bell: Bell,
    /// What to do, until a thread does it.
    work: Mutex<Option<Work>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    has_begun: AtomicBool,
}

impl Call {
    /// For a worker whose thread will be called `name`. Nobody hears calls before [`Call::reserve`].
    ///
    /// # Errors
    /// When the host has no file descriptor left.
    pub fn new(name: &'static str) -> std::io::Result<Call> {
        let bell = Bell { doorbell: Arc::new(Doorbell::new()?), stop: Arc::new(AtomicBool::new(false)) };
        let (work, thread) = (Mutex::default(), Mutex::default());
        Ok(Call(Arc::new(Shared { name, bell, work, thread, has_begun: AtomicBool::new(false) })))
    }

    /// Has `work` done from the first call on.
    pub fn reserve(self, work: impl FnOnce(&Bell) + Send + 'static) -> Reserve {
        *lock(&self.0.work) = Some(Box::new(work));
        Reserve(self)
    }

    /// Rings the worker's bell.
    pub fn ring(&self) {
        self.0.bell.ring();
        if !self.has_begun() {
            self.begin();
        }
    }

    /// Whether the worker has begun.
    pub fn has_begun(&self) -> bool {
        self.0.has_begun.load(Ordering::Acquire)
    }

    #[cold]
    fn begin(&self) {
        let mut thread = lock(&self.0.thread);
        if thread.is_some() || lock(&self.0.work).is_none() {
            return;
        }
        // The thread takes the work itself, so that it is still there for the next call when there is no thread to be had.
        let shared = Arc::clone(&self.0);
        let begun = std::thread::Builder::new().name(self.0.name.into()).spawn(move || {
            let work = lock(&shared.work).take();
            if let Some(work) = work {
                work(&shared.bell);
            }
        });
        match begun {
            Ok(handle) => {
                *thread = Some(handle);
                self.0.has_begun.store(true, Ordering::Release);
            }
            Err(error) => tracing::error!(name = self.0.name, %error, "cannot start a thread; its devices do nothing"),
        }
    }
}

impl Reserve {
    /// Tells the worker that it is time to end, without waiting for it.
    pub fn end_soon(&self) {
        self.0.0.bell.end_soon();
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        self.end_soon();
        let Shared { work, thread, .. } = &*self.0.0;
        // A worker that has not begun does not any more. Without the locks: what it would have worked on goes with it, and may call.
        let (thread, work) = (lock(thread).take(), lock(work).take());
        drop(work);
        // One that panicked has said so.
        let _ = thread.map(JoinHandle::join);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn work_begins_with_the_first_call_and_hears_all_later_ones() {
        let (said, heard) = mpsc::channel();
        let call = Call::new("reserve").unwrap();
        let reserve = call.clone().reserve(move |bell| {
            while bell.wait() {
                said.send(std::thread::current().name().map(str::to_owned)).unwrap();
            }
        });
        assert!(heard.recv_timeout(Duration::from_millis(50)).is_err(), "nobody has called");
        for _ in 0..3 {
            call.ring();
            assert_eq!(heard.recv_timeout(Duration::from_secs(20)).unwrap().as_deref(), Some("reserve"));
        }
        drop(reserve);
        assert!(heard.recv().is_err(), "it has ended");
        call.ring();
    }

    #[test]
    fn worker_that_was_never_called_has_no_thread_and_lets_go_of_its_work() {
        let (kept, gone) = mpsc::channel::<()>();
        let call = Call::new("reserve").unwrap();
        let reserve = call.clone().reserve(move |_| drop(kept));
        assert!(lock(&call.0.thread).is_none());
        drop(reserve);
        assert!(gone.recv().is_err());
        call.ring();
        assert!(lock(&call.0.thread).is_none(), "it is too late");
    }
}
