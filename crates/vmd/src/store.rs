//! The store that a machine runs on: the one place that chooses it.

use std::sync::Arc;

use dialects::store::{MemoryStore, Store};

/// The machine's number in its store, `/local/domain/1`: the first after the host's own, 0.
const DOMAIN: u32 = 1;

/// A new store with nothing in it, to be used for one machine over all its reboots.
pub fn open() -> Arc<dyn Store> {
    Arc::new(MemoryStore::new(DOMAIN))
}
