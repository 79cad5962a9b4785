//! XenStore, the client's side: a conversation in its wire protocol (xen-project/xen `docs/misc/xenstore.txt`) over whatever carries bytes.
//!
//! ```text
//!   Store, Transaction, watches --> Client --messages--> Peer: the guest's ring (ring.rs), or a program's /dev/xen/xenbus
//! ```
//!
//! Paths without a leading slash are below `/local/domain/<this domain>`. One request is outstanding at a time; events of watches come in between and
//! wait until they are asked for. What comes from the host is checked: a message that is longer than the protocol allows, or an answer to
//! another operation, is an error.

mod client;
mod ring;
#[cfg(test)]
mod tests;

pub use client::{Client, Transaction, WatchEvent};
pub use ring::RingPeer;

use crate::hal::Nanos;
use crate::store::StoreError;

/// The other end of a conversation: bytes both ways.
pub trait Peer {
    /// Until when the answer to a request is waited for that is made now.
    fn deadline(&self) -> Nanos;

    /// Whether answers carry the number of their request, so that late ones can be told from what is waited for. Kernels that pass messages on
    /// do not always give it back.
    fn is_numbered(&self) -> bool;

    /// Sends `bytes`, all of them, before `deadline`.
    ///
    /// # Errors
    /// [`StoreError::Timeout`], and [`StoreError::Transport`] when the way is broken; here and below.
    fn send(&mut self, bytes: &[u8], deadline: Nanos) -> Result<(), StoreError>;

    /// Receives some bytes, at least one, before `deadline`, which may have passed; `None` waits for ever.
    ///
    /// # Errors
    /// As [`Peer::send`].
    fn receive(&mut self, buffer: &mut [u8], deadline: Option<Nanos>) -> Result<usize, StoreError>;
}
