//! A store for tests of dialects: one map, without rights, of which the guest may fill [`GUEST_KEYS`]. Machines have the real one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Client, Observer, Store, StoreError, WatchId};

/// Most keys when the guest adds one.
pub const GUEST_KEYS: usize = 100;

/// The store.
#[derive(Default)]
pub struct MapStore {
    values: Mutex<BTreeMap<String, Vec<u8>>>,
    watches: Mutex<BTreeMap<WatchId, (String, Observer)>>,
}

impl MapStore {
    fn values(&self) -> MutexGuard<'_, BTreeMap<String, Vec<u8>>> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watches(&self) -> MutexGuard<'_, BTreeMap<WatchId, (String, Observer)>> {
        self.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, changed: &str) {
        self.watches().values().filter(|(path, _)| changed.starts_with(path.as_str())).for_each(|(_, observer)| observer(changed));
    }
}

impl Store for MapStore {
    fn read(&self, _client: Client, path: &str) -> Result<Vec<u8>, StoreError> {
        self.values().get(path).cloned().ok_or_else(|| StoreError::NotFound(path.into()))
    }

    fn write(&self, client: Client, path: &str, value: &[u8]) -> Result<(), StoreError> {
        {
            let mut values = self.values();
            if client == Client::Guest && values.len() >= GUEST_KEYS && !values.contains_key(path) {
                return Err(StoreError::Full(path.into()));
            }
            values.insert(path.into(), value.into());
        }
        self.tell(path);
        Ok(())
    }

    fn list(&self, _client: Client, path: &str) -> Result<Vec<String>, StoreError> {
        let below = format!("{path}/");
        let values = self.values();
        let names: BTreeSet<&str> = values.keys().filter_map(|key| key.strip_prefix(&below)?.split('/').next()).collect();
        Ok(names.into_iter().map(str::to_owned).collect())
    }

    fn remove(&self, _client: Client, path: &str) -> Result<(), StoreError> {
        let below = format!("{path}/");
        self.values().retain(|key, _| key != path && !key.starts_with(&below));
        self.tell(path);
        Ok(())
    }

    fn watch(&self, path: &str, observer: Observer) -> Result<WatchId, StoreError> {
        let mut watches = self.watches();
        let id = watches.last_key_value().map_or(0, |(last, _)| last + 1);
        watches.insert(id, (path.into(), observer));
        Ok(id)
    }

    fn unwatch(&self, watch: WatchId) {
        self.watches().remove(&watch);
    }
}
