//! `--xenstore SOCKET`: the machine's store for ordinary XenStore clients, served by [`xenstored`]'s loop in a thread of its own.

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use xenstore::SharedStore;
use xenstored::Listener;

use super::mailbox::Waker;
use super::server::ServerError;

/// A store's socket that is being served, until this is dropped.
pub struct StoreServer {
    stop: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
}

impl StoreServer {
    /// Serves `store` at `path`. Whoever may connect there is the host and may do everything.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn start(path: &Path, store: SharedStore) -> Result<StoreServer, ServerError> {
        let listener = Listener::bind(path)?;
        let stop = Arc::new(Waker::new()?);
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("store".into()).spawn(move || {
            if let Err(error) = xenstored::serve(listener, &store, &*stopped) {
                eprintln!("vmctl: the store's socket is gone: {error}");
            }
        })?;
        Ok(StoreServer { stop, thread: Some(thread) })
    }
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        self.stop.wake();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}
