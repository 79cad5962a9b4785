//! The store for those who speak XenStore's protocol: ordinary clients at `--xenstore SOCKET`, and the guest by its ring.
//!
//! All are served by one event loop, [`xenstored`]'s, on one thread. It begins when there is a socket, or when the guest rings for the first time, so a
//! machine that has no socket and does not use its ring has no such thread.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use devices::virtio::worker::{Bell, Call, Reserve};
use rustix::fd::AsFd;
use xenstore::{DomId, Ring, SharedStore};
use xenstored::ring::{Introduced, Line};
use xenstored::{Listener, Service};

use crate::socket::server::ServerError;

/// The server, until it is dropped.
pub struct StoreServer {
    store: SharedStore,
    introductions: Sender<Introduced>,
    call: Call,
    _event_loop: Reserve,
}

impl StoreServer {
    /// Serves `store`, where there is a `socket` to who connects there: he is the host and may do everything.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn new(store: SharedStore, socket: Option<&Path>) -> Result<StoreServer, ServerError> {
        let listener = socket.map(Listener::bind).transpose()?;
        let has_socket = listener.is_some();
        let (introductions, introduced) = channel();
        let (call, served) = (Call::new("store")?, store.clone());
        let event_loop = call.clone().reserve(move |bell| {
            if let Err(error) = serve(&served, listener, introduced, bell) {
                eprintln!("vmctl: the store is served to nobody any more: {error}");
            }
        });
        if has_socket {
            call.ring();
        }
        Ok(StoreServer { store, introductions, call, _event_loop: event_loop })
    }

    /// Introduces `domain`, whose ring is served from the first call of [`StoreServer::caller`] on, until its connection is closed. That is noticed
    /// when the bell rings.
    ///
    /// # Errors
    /// When the store does not take the domain.
    pub fn introduce(&self, domain: DomId, ring: Ring, line: Arc<dyn Line>) -> io::Result<()> {
        self.store.with(|server| {
            let client = server.introduce(domain, ring).map_err(io::Error::other)?;
            // A loop that has failed has said so.
            let _ = self.introductions.send(Introduced { domain, client, line });
            Ok(())
        })
    }

    /// Begins to serve, if nobody has called yet.
    pub fn caller(&self) -> Call {
        self.call.clone()
    }

    /// What is served.
    pub fn store(&self) -> &SharedStore {
        &self.store
    }
}

/// Serves until it is time to end.
fn serve(store: &SharedStore, listener: Option<Listener>, introduced: Receiver<Introduced>, bell: &Bell) -> io::Result<()> {
    let mut service = Service::new(store, None)?;
    listener.map_or(Ok(()), |listener| service.listen(listener))?;
    service.serve_rings(introduced);
    while bell.wait() {
        service.run(&[bell.as_fd()], None)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use xenstore::Config;

    use super::*;

    #[test]
    fn store_that_nobody_is_to_be_served_from_has_no_thread() {
        let server = StoreServer::new(SharedStore::new(Config::default()), None).unwrap();
        assert!(!server.call.has_begun());
    }
}
