//! The store for those who speak XenStore's protocol: ordinary clients at `--xenstore SOCKET`, and the guest by its ring.
//!
//! All are served by one event loop, [`xenstored`]'s, on one thread. It begins with the first that is to be served, so a machine that has neither
//! socket nor ring has no such thread.

use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use devices::virtio::worker::{Bell, Worker};
use rustix::fd::AsFd;
use xenstore::{DomId, Ring, SharedStore};
use xenstored::ring::{Introduced, Line};
use xenstored::{Listener, Service};

use crate::socket::server::ServerError;

/// The server, until it is dropped.
pub struct StoreServer {
    store: SharedStore,
    /// `None` until somebody is to be served.
    event_loop: Mutex<Option<EventLoop>>,
}

struct EventLoop {
    introductions: Sender<Introduced>,
    _thread: Worker<()>,
}

impl StoreServer {
    /// Serves `store`, where there is a `socket` to who connects there: he is the host and may do everything.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn new(store: SharedStore, socket: Option<&Path>) -> Result<StoreServer, ServerError> {
        let listener = socket.map(Listener::bind).transpose()?;
        let event_loop = listener.map(|listener| EventLoop::start(&store, Some(listener))).transpose()?;
        Ok(StoreServer { store, event_loop: Mutex::new(event_loop) })
    }

    /// Introduces `domain` and serves its ring, until its connection is closed. That is noticed when the bell rings.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left, or the store does not take the domain.
    pub fn introduce(&self, domain: DomId, ring: Ring, line: Arc<dyn Line>) -> io::Result<()> {
        let mut event_loop = self.event_loop.lock().unwrap_or_else(PoisonError::into_inner);
        let event_loop = match &mut *event_loop {
            Some(running) => running,
            none => none.insert(EventLoop::start(&self.store, None)?),
        };
        self.store.with(|server| {
            let client = server.introduce(domain, ring).map_err(io::Error::other)?;
            // A loop that has failed has said so.
            let _ = event_loop.introductions.send(Introduced { domain, client, line });
            Ok(())
        })
    }

    /// What is served.
    pub fn store(&self) -> &SharedStore {
        &self.store
    }
}

impl EventLoop {
    fn start(store: &SharedStore, listener: Option<Listener>) -> io::Result<EventLoop> {
        let (introductions, introduced) = channel();
        let store = store.clone();
        let thread = Worker::spawn("store", move |end| {
            if let Err(error) = serve(&store, listener, introduced, &end) {
                eprintln!("vmctl: the store is served to nobody any more: {error}");
            }
        })?;
        Ok(EventLoop { introductions, _thread: thread })
    }
}

/// Serves until the bell rings.
fn serve(store: &SharedStore, listener: Option<Listener>, introduced: Receiver<Introduced>, end: &Bell) -> io::Result<()> {
    let mut service = Service::new(store, None)?;
    listener.map_or(Ok(()), |listener| service.listen(listener))?;
    service.serve_rings(introduced);
    service.run(&[end.as_fd()], None).map(drop)
}

#[cfg(test)]
mod tests {
    use xenstore::Config;

    use super::*;

    #[test]
    fn store_that_nobody_is_to_be_served_from_has_no_thread() {
        let server = StoreServer::new(SharedStore::new(Config::default()), None).unwrap();
        assert!(server.event_loop.lock().unwrap().is_none());
    }
}
