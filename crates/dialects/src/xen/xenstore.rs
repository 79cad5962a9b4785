//! The XenStore ring: bytes between the guest's page and a connection of the store's server (`docs/misc/xenstore-ring.txt`).
//!
//! Guests leave out kicks that they think unnecessary, so that after each step both indices are looked at again, until neither side has more.

use std::sync::atomic::{AtomicU32, Ordering};

use abi::xen::hvm::STORE_PAGE;
use abi::xen::xenstore::{Interface, RING_SIZE, connection, ring_error};
use vm_memory::{Bytes, GuestAddress};
use vmm::GuestMemory;

use crate::atomic;

/// The server's side of a connection.
pub trait Connection {
    /// Whether it takes bytes now.
    fn wants_input(&self) -> bool;
    /// Bytes of the guest.
    fn receive(&mut self, bytes: &[u8]);
    /// Bytes for the guest.
    fn output(&self) -> &[u8];
    /// The first `count` of them were sent.
    fn sent(&mut self, count: usize);
    /// Whether the guest broke the protocol.
    fn is_broken(&self) -> bool;
    /// The guest begins anew.
    fn reconnect(&mut self);
}

/// What became of the ring.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Served {
    /// The guest is to be notified.
    pub notify: bool,
    /// There may be more to do.
    pub again: bool,
}

/// The page, as the server uses it.
pub struct StoreRing {
    memory: GuestMemory,
    broken: bool,
}

/// Steps before somebody else has a turn.
const STEPS: usize = 64;

const REQUESTS: u64 = std::mem::offset_of!(Interface, req) as u64;
const RESPONSES: u64 = std::mem::offset_of!(Interface, rsp) as u64;
const REQ_CONS: u64 = std::mem::offset_of!(Interface, req_cons) as u64;
const REQ_PROD: u64 = std::mem::offset_of!(Interface, req_prod) as u64;
const RSP_CONS: u64 = std::mem::offset_of!(Interface, rsp_cons) as u64;
const RSP_PROD: u64 = std::mem::offset_of!(Interface, rsp_prod) as u64;
const FEATURES: u64 = std::mem::offset_of!(Interface, server_features) as u64;
const CONNECTION: u64 = std::mem::offset_of!(Interface, connection) as u64;
const ERROR: u64 = std::mem::offset_of!(Interface, error) as u64;

impl StoreRing {
    /// An empty ring that shows the guest `features`.
    pub fn new(memory: GuestMemory, features: u32) -> StoreRing {
        let ring = StoreRing { memory, broken: false };
        ring.set(FEATURES, features);
        ring
    }

    /// Moves what can be moved.
    pub fn serve(&mut self, client: &mut dyn Connection) -> Served {
        let mut served = Served::default();
        if self.get(CONNECTION) == connection::RECONNECT {
            client.reconnect();
            for index in [REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD, ERROR] {
                self.set(index, 0);
            }
            self.broken = false;
            self.set(CONNECTION, connection::CONNECTED);
            served.notify = true;
        }
        for _ in 0..STEPS {
            if self.broken {
                return Served { again: false, ..served };
            }
            let moved = match self.step(client) {
                Ok(moved) => moved,
                Err(error) => {
                    tracing::warn!(error, "xen: the guest's XenStore ring is broken");
                    self.set(ERROR, error);
                    self.broken = true;
                    true
                }
            };
            served.notify |= moved;
            if !moved {
                return served;
            }
        }
        Served { again: true, ..served }
    }

    /// One look at both directions; the error is for the guest.
    fn step(&self, client: &mut dyn Connection) -> Result<bool, u32> {
        let requests = self.filled(REQ_CONS, REQ_PROD)?;
        let mut moved = false;
        if requests > 0 && client.wants_input() {
            let cons = self.get(REQ_CONS);
            let mut bytes = [0; RING_SIZE];
            for (byte, at) in bytes.iter_mut().zip(0..requests) {
                *byte = self.memory.read_obj(slot(REQUESTS, cons.wrapping_add(at))).unwrap_or(0);
            }
            self.set(REQ_CONS, cons.wrapping_add(requests));
            client.receive(bytes.get(..requests as usize).unwrap_or_default());
            moved = true;
        }
        let room = RING_SIZE as u32 - self.filled(RSP_CONS, RSP_PROD)?;
        let output = client.output();
        let count = output.len().min(room as usize);
        if count > 0 {
            let prod = self.get(RSP_PROD);
            for (byte, at) in output.iter().take(count).zip(0..) {
                let _ = self.memory.write_obj(*byte, slot(RESPONSES, prod.wrapping_add(at)));
            }
            self.set(RSP_PROD, prod.wrapping_add(count as u32));
            client.sent(count);
            moved = true;
        }
        if client.is_broken() { Err(ring_error::PROTOCOL) } else { Ok(moved) }
    }

    fn filled(&self, cons: u64, prod: u64) -> Result<u32, u32> {
        let filled = self.get(prod).wrapping_sub(self.get(cons));
        if filled as usize > RING_SIZE { Err(ring_error::RING_INDEX) } else { Ok(filled) }
    }

    fn get(&self, at: u64) -> u32 {
        atomic::with(&self.memory, STORE_PAGE + at, |word: &AtomicU32| u32::from_le(word.load(Ordering::SeqCst))).unwrap_or(0)
    }

    fn set(&self, at: u64, value: u32) {
        atomic::with(&self.memory, STORE_PAGE + at, |word: &AtomicU32| word.store(value.to_le(), Ordering::SeqCst));
    }
}

fn slot(ring: u64, index: u32) -> GuestAddress {
    GuestAddress(STORE_PAGE + ring + u64::from(index) % RING_SIZE as u64)
}
