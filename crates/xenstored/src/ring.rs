//! Domains' rings in the event loop: each is a page and a bell, and the bell is a descriptor.
//!
//! Where page and bell are from is the caller's: a real Xen's devices, or the memory of a machine in this process. A ring is served when its guest rang
//! or something became of its connection, and in each turn of the loop only so far: a guest that never stops has the others wait for one turn of its.

use std::collections::HashMap;
use std::sync::Arc;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fd::{BorrowedFd, OwnedFd};
use xenstore::ring::{Page, StoreRing};
use xenstore::{ClientId, DomId, Server};

/// A guest at the other end.
pub trait Line: Page + Send + Sync {
    /// Becomes readable each time that the guest rings, even if it is so already.
    fn bell(&self) -> BorrowedFd<'_>;
    /// The guest was heard, and may ring again.
    fn hear(&self);
    /// Tells the guest that something has changed in the page.
    fn ring(&self);
}

/// A ring that is to be served.
pub struct Introduced {
    /// Whose.
    pub domain: DomId,
    /// Its connection.
    pub client: ClientId,
    /// Its page and bells.
    pub line: Arc<dyn Line>,
}

struct Ring {
    domain: DomId,
    client: ClientId,
    page: StoreRing<Arc<dyn Line>>,
}

/// All rings of a loop.
pub(crate) struct Rings {
    /// Names the client of each that rings.
    epoll: Arc<OwnedFd>,
    rings: HashMap<u64, Ring>,
    /// Those to be served in the next turn.
    due: Vec<ClientId>,
}

impl Rings {
    /// None yet.
    pub(crate) fn new(epoll: Arc<OwnedFd>) -> Rings {
        Rings { epoll, rings: HashMap::new(), due: Vec::new() }
    }

    /// Serves a ring from now on.
    pub(crate) fn add(&mut self, introduced: Introduced, server: &mut Server) {
        let Introduced { domain, client, line } = introduced;
        // Told once of each ring, the line need not take what it was told of.
        let edges = EventFlags::IN | EventFlags::ET;
        if let Err(error) = epoll::add(&self.epoll, line.bell(), EventData::new_u64(client.number()), edges) {
            return tracing::error!(%error, %domain, "a domain's ring cannot be served");
        }
        let page = StoreRing::new(line, server.store().features(domain));
        // A guest that was there first waits to hear from the server, as Linux' dom0 does.
        page.page().ring();
        self.rings.insert(client.number(), Ring { domain, client, page });
        self.call(client);
    }

    /// The guest of this client rang, unless it has none.
    pub(crate) fn hear(&mut self, number: u64) {
        if let Some(ring) = self.rings.get(&number) {
            ring.page.page().hear();
            let client = ring.client;
            self.call(client);
        }
    }

    /// Something became of a connection; if it is a ring's, that is served in the next turn.
    pub(crate) fn call(&mut self, client: ClientId) {
        if self.rings.contains_key(&client.number()) && !self.due.contains(&client) {
            self.due.push(client);
        }
    }

    /// Whether a ring is to be served.
    pub(crate) fn is_due(&self) -> bool {
        !self.due.is_empty()
    }

    /// Serves each ring that is to be served, once.
    pub(crate) fn serve(&mut self, server: &mut Server) {
        for client in std::mem::take(&mut self.due) {
            let Some(ring) = self.rings.get_mut(&client.number()) else { continue };
            if server.ring(ring.domain) != Some(client) {
                // It was released. The bell may outlive this, and nobody would hear it.
                let _ = epoll::delete(&self.epoll, ring.page.page().bell());
                self.rings.remove(&client.number());
                continue;
            }
            let served = ring.page.serve(server, client);
            server.attended(client);
            if served.notify {
                ring.page.page().ring();
            }
            if served.again {
                self.due.push(client);
            }
        }
    }

    /// The connections.
    pub(crate) fn clients(&self) -> impl Iterator<Item = ClientId> {
        self.rings.values().map(|ring| ring.client)
    }
}
