//! Which keys of the store are which keys of the pools. Names are those of VMware's guestinfo, so that a key has one name in every dialect.

use std::collections::{BTreeMap, BTreeSet};

use abi::hyperv::kvp::pool;
use abi::vmware::rpc::GUESTINFO;

use crate::store::{Client, Store, VM_DATA};
use crate::vmware::guestinfo;

/// Where the store has what the guest's pools say, by the pools' names.
pub const REPORTS: &str = "data/hyperv";

/// The name of a pool of the guest's, as OpenBSD's hostctl(8) spells it.
fn name(pool: u8) -> Option<&'static str> {
    match pool {
        pool::GUEST => Some("Guest"),
        pool::AUTO => Some("Auto"),
        _ => None,
    }
}

/// All keys for guests that have a text.
pub(super) fn keys_for_guest(store: &dyn Store) -> BTreeMap<String, String> {
    let mut keys = BTreeMap::new();
    for path in below(store, VM_DATA) {
        let Some(key) = guestinfo::key(&path).and_then(|key| key.strip_prefix(GUESTINFO).map(str::to_owned)) else { continue };
        let Some(text) = store.read(Client::Guest, &path).ok().and_then(|value| String::from_utf8(value).ok()) else { continue };
        if !text.is_empty() {
            keys.insert(key, text);
        }
    }
    keys
}

/// Writes what the guest's pool says, if that is new; the path, if the pool is one that reports and the store takes it.
pub(super) fn report(store: &dyn Store, pool: u8, key: &str, value: &str) -> Option<String> {
    let below = guestinfo::path(&format!("{GUESTINFO}{key}"))?;
    let path = format!("{REPORTS}/{}{}", name(pool)?, below.strip_prefix(VM_DATA)?);
    if store.read(Client::Guest, &path).ok().as_deref() != Some(value.as_bytes()) {
        store.write(Client::Guest, &path, value.as_bytes()).ok()?;
    }
    Some(path)
}

/// Removes what is not in the pool any more: all paths with a value that are not among `seen`.
pub(super) fn forget_others(store: &dyn Store, pool: u8, seen: &BTreeSet<String>) {
    let Some(name) = name(pool) else { return };
    for path in below(store, &format!("{REPORTS}/{name}")) {
        let prefix = format!("{path}/");
        let is_needed = seen.contains(&path) || seen.range(prefix.clone()..).next().is_some_and(|next| next.starts_with(&prefix));
        if !is_needed {
            // Its parent may have gone with it before.
            let _ = store.remove(Client::Guest, &path);
        }
    }
}

/// All paths below `top`.
fn below(store: &dyn Store, top: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = vec![top.to_owned()];
    while let Some(path) = left.pop() {
        let names = store.list(Client::Guest, &path).unwrap_or_default();
        let children: Vec<String> = names.iter().map(|name| format!("{path}/{name}")).collect();
        found.extend(children.iter().cloned());
        left.extend(children);
    }
    found
}
