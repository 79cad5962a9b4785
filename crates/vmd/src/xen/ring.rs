//! The guest's ring of XenStore while power is on: its page and its event channel, as the store's event loop takes them.
//!
//! ```text
//!   guest ── event channel ── Bell, an eventfd ──> the loop of StoreServer ── Xen::notify ──> guest
//!         └─ page at STORE_PAGE ─────────────────────────┘
//! ```

#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::io;
use std::ops::Deref;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Once};

use abi::xen::hvm::STORE_PAGE;
use devices::virtio::worker::{Call, Doorbell};
use dialects::xen::xenstore::StorePage;
use dialects::xen::{DOMAIN, Xen};
use rustix::fd::{AsFd, BorrowedFd};
use vmm::memory::PAGE_SIZE;
use xenstore::ring::StoreRing;
use xenstore::{DomId, Ring, SharedStore};
use xenstored::ring::Line;

use crate::store::StoreServer;

/// The ring as the loop has it. It is its page.
struct GuestLine {
    page: StorePage,
    bell: Arc<Doorbell>,
    xen: Arc<Xen>,
    port: u32,
    /// Says by its end that this is gone; the last field, so that the others have gone before.
    _held: Sender<Infallible>,
}

impl Deref for GuestLine {
    type Target = StorePage;

    fn deref(&self) -> &StorePage {
        &self.page
    }
}

impl Line for GuestLine {
    fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// The channel has nothing to be told.
    fn hear(&self) {}

    fn ring(&self) {
        self.xen.notify(self.port);
    }
}

/// A ring that is served. Dropped, it is not any more, and nobody here holds the guest's memory for its sake.
pub(super) struct ServedRing {
    store: SharedStore,
    bell: Arc<Doorbell>,
    call: Call,
    held: Receiver<Infallible>,
}

impl ServedRing {
    /// Has `server` serve the ring of `xen` when the guest uses it.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(xen: &Arc<Xen>, server: &StoreServer) -> io::Result<ServedRing> {
        let bell = Arc::new(Doorbell::new()?);
        let (kick, call, is_used) = (Arc::clone(&bell), server.caller(), Once::new());
        let rung = move || {
            kick.ring();
            is_used.call_once(|| call.ring());
        };
        let port = xen.open_store(Arc::new(rung)).ok_or_else(|| io::Error::other("no event channel is free"))?;
        let page = || StorePage::new(xen.memory().clone());
        // The guest looks for these before it uses the ring.
        StoreRing::new(page(), server.store().with(|server| server.store().features(DomId(DOMAIN))));
        let (holds, held) = channel();
        let line = GuestLine { page: page(), bell: Arc::clone(&bell), xen: Arc::clone(xen), port, _held: holds };
        server.introduce(DomId(DOMAIN), Ring { gfn: STORE_PAGE / PAGE_SIZE, port }, Arc::new(line))?;
        Ok(ServedRing { store: server.store().clone(), bell, call: server.caller(), held })
    }
}

impl Drop for ServedRing {
    fn drop(&mut self) {
        self.store.with(|server| {
            if let Some(client) = server.ring(DomId(DOMAIN)) {
                server.disconnect(client);
            }
        });
        // The loop finds the connection closed.
        self.bell.ring();
        self.call.ring();
        if self.call.has_begun() {
            let _ = self.held.recv();
        }
    }
}
