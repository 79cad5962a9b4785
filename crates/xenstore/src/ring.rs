//! A domain's ring: bytes between a page that a guest shares and its connection (`docs/misc/xenstore-ring.txt`).
//!
//! The page is the guest's, who may write anything to it at any time: indices are read once and judged, and bytes are copied before anybody looks at
//! them. Indices that cannot be right, or a message that cannot be, end this connection and no other, until the guest asks for a fresh start.
//!
//! Guests leave out kicks that they think unnecessary, so that after each step both directions are looked at again, until neither has more; but
//! only so often, then others have their turn.

use std::ops::Deref;

use abi::xen::xenstore::{Interface, RING_SIZE, connection, ring_error};

use crate::server::Server;
use crate::store::ClientId;

/// A page that is shared with a guest. Offsets are those of [`Interface`]'s fields, and what is at them is within it.
pub trait Page {
    /// The word at `at`, ordered with all accesses.
    fn load(&self, at: usize) -> u32;
    /// Sets the word at `at`, ordered with all accesses.
    fn store(&self, at: usize, value: u32);
    /// Copies bytes out.
    fn read(&self, at: usize, bytes: &mut [u8]);
    /// Copies bytes in.
    fn write(&self, at: usize, bytes: &[u8]);
}

impl<P: Page + ?Sized, D: Deref<Target = P>> Page for D {
    fn load(&self, at: usize) -> u32 {
        (**self).load(at)
    }
    fn store(&self, at: usize, value: u32) {
        (**self).store(at, value);
    }
    fn read(&self, at: usize, bytes: &mut [u8]) {
        (**self).read(at, bytes);
    }
    fn write(&self, at: usize, bytes: &[u8]) {
        (**self).write(at, bytes);
    }
}

/// What became of the ring.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Served {
    /// The guest is to be notified.
    pub notify: bool,
    /// There may be more to do.
    pub again: bool,
}

/// The server's side of a ring.
pub struct StoreRing<P> {
    page: P,
    broken: bool,
    /// How often it was.
    breaks: u32,
}

/// Steps before somebody else has a turn.
const STEPS: usize = 64;

const REQUESTS: usize = std::mem::offset_of!(Interface, req);
const RESPONSES: usize = std::mem::offset_of!(Interface, rsp);
const REQ_CONS: usize = std::mem::offset_of!(Interface, req_cons);
const REQ_PROD: usize = std::mem::offset_of!(Interface, req_prod);
const RSP_CONS: usize = std::mem::offset_of!(Interface, rsp_cons);
const RSP_PROD: usize = std::mem::offset_of!(Interface, rsp_prod);
const FEATURES: usize = std::mem::offset_of!(Interface, server_features);
const CONNECTION: usize = std::mem::offset_of!(Interface, connection);
const ERROR: usize = std::mem::offset_of!(Interface, error);

impl<P: Page> StoreRing<P> {
    /// The ring in `page`, from where its indices are, which shows the guest `features`. One that an earlier server gave up stays given up.
    pub fn new(page: P, features: u32) -> StoreRing<P> {
        page.store(FEATURES, features);
        StoreRing { broken: page.load(ERROR) != ring_error::NONE, breaks: 0, page }
    }

    /// The page.
    pub fn page(&self) -> &P {
        &self.page
    }

    /// Moves what can be moved between the page and the connection of `client`.
    pub fn serve(&mut self, server: &mut Server, client: ClientId) -> Served {
        let mut served = Served::default();
        if self.page.load(CONNECTION) == connection::RECONNECT {
            server.reconnect(client);
            for index in [REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD, ERROR] {
                self.page.store(index, 0);
            }
            self.broken = false;
            self.page.store(CONNECTION, connection::CONNECTED);
            served.notify = true;
        }
        for _ in 0..STEPS {
            if self.broken {
                return Served { again: false, ..served };
            }
            let moved = self.step(server, client).unwrap_or_else(|error| {
                self.breaks = self.breaks.saturating_add(1);
                // The guest can do it again and again.
                if self.breaks.is_power_of_two() {
                    tracing::warn!(error, client = client.number(), times = self.breaks, "a domain's ring is broken");
                }
                self.page.store(ERROR, error);
                self.broken = true;
                true
            });
            served.notify |= moved;
            if !moved {
                return served;
            }
        }
        Served { again: true, ..served }
    }

    /// One look at both directions; the error is for the guest.
    fn step(&self, server: &mut Server, client: ClientId) -> Result<bool, u32> {
        let (cons, requests) = self.filled(REQ_CONS, REQ_PROD)?;
        let mut moved = false;
        if requests > 0 && server.wants_input(client) {
            let mut bytes = [0; RING_SIZE];
            let bytes = bytes.get_mut(..requests).unwrap_or_default();
            let (first, wrapped) = bytes.split_at_mut(requests.min(RING_SIZE - slot(cons)));
            self.page.read(REQUESTS + slot(cons), first);
            self.page.read(REQUESTS, wrapped);
            self.page.store(REQ_CONS, cons.wrapping_add(requests as u32));
            server.receive(client, bytes);
            moved = true;
        }
        let (cons, waiting) = self.filled(RSP_CONS, RSP_PROD)?;
        let prod = cons.wrapping_add(waiting as u32);
        let output = server.output(client);
        let count = output.len().min(RING_SIZE - waiting);
        if count > 0 {
            let (first, wrapped) = output.split_at(count).0.split_at(count.min(RING_SIZE - slot(prod)));
            self.page.write(RESPONSES + slot(prod), first);
            self.page.write(RESPONSES, wrapped);
            self.page.store(RSP_PROD, prod.wrapping_add(count as u32));
            server.sent(client, count);
            moved = true;
        }
        if server.is_broken(client) { Err(ring_error::PROTOCOL) } else { Ok(moved) }
    }

    /// A consumer's index, and how many bytes are before it.
    fn filled(&self, cons: usize, prod: usize) -> Result<(u32, usize), u32> {
        let cons = self.page.load(cons);
        let filled = self.page.load(prod).wrapping_sub(cons) as usize;
        if filled > RING_SIZE { Err(ring_error::RING_INDEX) } else { Ok((cons, filled)) }
    }
}

/// Where in a ring the byte of this index is.
fn slot(index: u32) -> usize {
    index as usize % RING_SIZE
}
