//! A store that lives and dies with its machine: one sorted map of paths.
//!
//! It keeps the rules of XenStore that clients notice: parents appear by themselves and have empty values, the root always exists, a
//! removal takes everything below along, a watch hears of its path and of everything below. Path syntax and lengths are those of Xen's
//! `docs/misc/xenstore.txt` and `xen/include/public/io/xs_wire.h`.
//!
//! Whoever wrote a node last pays for it; what the guest pays for is bounded by [`GUEST_KEYS`] and [`GUEST_BYTES`].

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Client, MAX_VALUE, Observer, Store, StoreError, WatchId};

/// Most nodes the guest may have, those it made by writing below them included.
pub const GUEST_KEYS: usize = 1000;
/// Most bytes of the guest's paths and values together.
pub const GUEST_BYTES: usize = 4 << 20;
/// Longest relative path: `XENSTORE_REL_PATH_MAX`.
const MAX_PATH: usize = 2048;

/// The store of one machine, in memory.
pub struct MemoryStore {
    /// `/local/domain/<id>`, which absolute paths of this machine begin with.
    home: String,
    tree: Mutex<Tree>,
}

struct Tree {
    /// By relative path; the root's is empty. The parent of a node is always there too.
    nodes: BTreeMap<String, Node>,
    guest_keys: usize,
    guest_bytes: usize,
    watches: BTreeMap<WatchId, Watch>,
    next_watch: WatchId,
}

struct Node {
    value: Vec<u8>,
    payer: Client,
}

struct Watch {
    path: String,
    observer: Observer,
}

impl MemoryStore {
    /// An empty store for the machine with this domain number.
    pub fn new(domain: u32) -> MemoryStore {
        let root = Node { value: Vec::new(), payer: Client::Host };
        let nodes = BTreeMap::from([(String::new(), root)]);
        let tree = Tree { nodes, guest_keys: 0, guest_bytes: 0, watches: BTreeMap::new(), next_watch: 1 };
        MemoryStore { home: format!("/local/domain/{domain}"), tree: Mutex::new(tree) }
    }

    /// The relative form of a path, checked.
    fn relative<'a>(&self, client: Client, path: &'a str) -> Result<&'a str, StoreError> {
        let relative = if path.starts_with('/') {
            let Some(rest) = path.strip_prefix(&self.home).filter(|rest| rest.is_empty() || rest.starts_with('/')) else {
                check(path.get(1..).unwrap_or_default(), path)?;
                return Err(match client {
                    Client::Host => StoreError::NotFound(path.into()),
                    Client::Guest => StoreError::Denied(path.into()),
                });
            };
            match rest.strip_prefix('/') {
                Some("") => return Err(StoreError::BadPath(path.into())),
                Some(rest) => rest,
                None => rest,
            }
        } else {
            path
        };
        check(relative, path)?;
        Ok(relative)
    }

    fn lock(&self) -> MutexGuard<'_, Tree> {
        self.tree.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Refuses what is no relative path, under the name `shown`.
fn check(relative: &str, shown: &str) -> Result<(), StoreError> {
    let part = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_@".contains(&b));
    if relative.len() <= MAX_PATH && (relative.is_empty() || relative.split('/').all(part)) {
        Ok(())
    } else {
        Err(StoreError::BadPath(shown.into()))
    }
}

/// Whether `path` is `top` or lies below it.
fn is_within(path: &str, top: &str) -> bool {
    match path.strip_prefix(top) {
        Some(rest) => top.is_empty() || rest.is_empty() || rest.starts_with('/'),
        None => false,
    }
}

/// `path` and the paths above it, without the root.
fn lineage(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').filter_map(|(at, _)| path.get(..at)).chain((!path.is_empty()).then_some(path))
}

impl Tree {
    /// Nodes below `top`, not `top` itself.
    fn below(&self, top: &str) -> impl Iterator<Item = &str> {
        // "/" and its successor enclose everything below a node; siblings such as "top-" sort before or behind.
        let (first, last) = if top.is_empty() {
            (Bound::Excluded(String::new()), Bound::Unbounded)
        } else {
            (Bound::Included(format!("{top}/")), Bound::Excluded(format!("{top}0")))
        };
        self.nodes.range((first, last)).map(|(path, _)| path.as_str())
    }

    fn write(&mut self, client: Client, path: &str, value: &[u8]) -> Result<(), StoreError> {
        if client == Client::Guest {
            let (mut keys, mut bytes) = (self.guest_keys, self.guest_bytes);
            for part in lineage(path) {
                match self.nodes.get(part) {
                    // An intermediate node stays whose it is.
                    Some(_) if part != path => {}
                    Some(Node { payer: Client::Guest, value }) => bytes -= value.len(),
                    _ => (keys, bytes) = (keys + 1, bytes + part.len()),
                }
            }
            bytes += value.len();
            if keys > GUEST_KEYS || bytes > GUEST_BYTES {
                return Err(StoreError::Full(path.into()));
            }
        }
        for part in lineage(path) {
            if part != path && !self.nodes.contains_key(part) {
                self.insert(part, Node { value: Vec::new(), payer: client });
            }
        }
        // The root is always the host's: it costs nothing and never goes.
        let payer = if path.is_empty() { Client::Host } else { client };
        self.insert(path, Node { value: value.to_vec(), payer });
        Ok(())
    }

    fn insert(&mut self, path: &str, node: Node) {
        self.discard(path);
        if node.payer == Client::Guest {
            self.guest_keys += 1;
            self.guest_bytes += path.len() + node.value.len();
        }
        self.nodes.insert(path.into(), node);
    }

    fn discard(&mut self, path: &str) {
        if let Some(Node { payer: Client::Guest, value }) = self.nodes.remove(path) {
            self.guest_keys -= 1;
            self.guest_bytes -= path.len() + value.len();
        }
    }

    /// Observers of a change at `path`, which took everything in `gone` along, and what to tell each.
    fn observers(&self, path: &str, gone: &BTreeSet<String>) -> Vec<(Observer, String)> {
        let mut told = Vec::new();
        for watch in self.watches.values() {
            if is_within(path, &watch.path) {
                told.push((watch.observer.clone(), path.to_owned()));
            } else if gone.contains(&watch.path) {
                told.push((watch.observer.clone(), watch.path.clone()));
            }
        }
        told
    }
}

impl Store for MemoryStore {
    fn read(&self, client: Client, path: &str) -> Result<Vec<u8>, StoreError> {
        let relative = self.relative(client, path)?;
        self.lock().nodes.get(relative).map(|node| node.value.clone()).ok_or_else(|| StoreError::NotFound(path.into()))
    }

    fn write(&self, client: Client, path: &str, value: &[u8]) -> Result<(), StoreError> {
        let relative = self.relative(client, path)?;
        if value.len() > MAX_VALUE {
            return Err(StoreError::TooLong(value.len()));
        }
        if client == Client::Guest && relative.is_empty() {
            return Err(StoreError::Denied(path.into()));
        }
        let told = {
            let mut tree = self.lock();
            tree.write(client, relative, value)?;
            tree.observers(relative, &BTreeSet::new())
        };
        for (observer, path) in told {
            observer(&path);
        }
        Ok(())
    }

    fn list(&self, client: Client, path: &str) -> Result<Vec<String>, StoreError> {
        let relative = self.relative(client, path)?;
        let tree = self.lock();
        if !tree.nodes.contains_key(relative) {
            return Err(StoreError::NotFound(path.into()));
        }
        let skip = if relative.is_empty() { 0 } else { relative.len() + 1 };
        Ok(tree.below(relative).filter_map(|path| path.get(skip..)).filter(|name| !name.contains('/')).map(str::to_owned).collect())
    }

    fn remove(&self, client: Client, path: &str) -> Result<(), StoreError> {
        let relative = self.relative(client, path)?;
        if client == Client::Guest && relative.is_empty() {
            return Err(StoreError::Denied(path.into()));
        }
        let told = {
            let mut tree = self.lock();
            if !tree.nodes.contains_key(relative) {
                return Err(StoreError::NotFound(path.into()));
            }
            let gone: BTreeSet<String> = tree.below(relative).map(str::to_owned).collect();
            for path in &gone {
                tree.discard(path);
            }
            if !relative.is_empty() {
                tree.discard(relative);
            }
            tree.observers(relative, &gone)
        };
        for (observer, path) in told {
            observer(&path);
        }
        Ok(())
    }

    fn watch(&self, path: &str, observer: Observer) -> Result<WatchId, StoreError> {
        let path = self.relative(Client::Host, path)?.to_owned();
        let mut tree = self.lock();
        let id = tree.next_watch;
        tree.next_watch += 1;
        tree.watches.insert(id, Watch { path, observer });
        Ok(id)
    }

    fn unwatch(&self, watch: WatchId) {
        self.lock().watches.remove(&watch);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    fn store() -> MemoryStore {
        MemoryStore::new(7)
    }

    /// A watch that writes down what it is told.
    fn ear(store: &MemoryStore, path: &str) -> (WatchId, Arc<Mutex<Vec<String>>>) {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&heard);
        let id = store.watch(path, Arc::new(move |path| notes.lock().unwrap().push(path.to_owned()))).unwrap();
        (id, heard)
    }

    fn heard(ear: &Arc<Mutex<Vec<String>>>) -> Vec<String> {
        std::mem::take(&mut ear.lock().unwrap())
    }

    #[test]
    fn what_one_client_writes_the_other_reads() {
        let s = store();
        s.write(Client::Host, "vm-data/a/b", b"value \0 with anything").unwrap();
        assert_eq!(s.read(Client::Guest, "vm-data/a/b").unwrap(), b"value \0 with anything");
        assert_eq!(s.read(Client::Guest, "/local/domain/7/vm-data/a/b").unwrap(), b"value \0 with anything");
        assert_eq!(s.read(Client::Guest, "vm-data/a").unwrap(), b"", "parents appear with empty values");
        s.write(Client::Guest, "vm-data/a", b"both").unwrap();
        assert_eq!(s.read(Client::Host, "vm-data/a").unwrap(), b"both");
        assert_eq!(s.read(Client::Host, "vm-data/a/b").unwrap(), b"value \0 with anything");
    }

    #[test]
    fn children_are_listed_sorted_and_without_their_own() {
        let s = store();
        for path in ["vm-data/b/x", "vm-data/b-", "vm-data/b0/y", "vm-data/B", "vm-datas/z"] {
            s.write(Client::Host, path, b"").unwrap();
        }
        assert_eq!(s.list(Client::Guest, "vm-data").unwrap(), ["B", "b", "b-", "b0"]);
        assert_eq!(s.list(Client::Guest, "").unwrap(), ["vm-data", "vm-datas"]);
        assert_eq!(s.list(Client::Guest, "/local/domain/7").unwrap(), ["vm-data", "vm-datas"]);
        assert_eq!(s.list(Client::Guest, "vm-data/B").unwrap(), [""; 0]);
        assert_eq!(s.list(Client::Guest, "vm-data/c"), Err(StoreError::NotFound("vm-data/c".into())));
    }

    #[test]
    fn removal_takes_everything_below_and_nothing_beside() {
        let s = store();
        for path in ["a/b/c", "a/b/d", "a/b-", "a/b0"] {
            s.write(Client::Guest, path, b"x").unwrap();
        }
        s.remove(Client::Guest, "a/b").unwrap();
        assert_eq!(s.list(Client::Host, "a").unwrap(), ["b-", "b0"]);
        assert_eq!(s.remove(Client::Host, "a/b"), Err(StoreError::NotFound("a/b".into())));
        s.remove(Client::Host, "").unwrap();
        assert_eq!(s.list(Client::Host, "").unwrap(), [""; 0]);
        let tree = s.lock();
        assert_eq!((tree.guest_keys, tree.guest_bytes), (0, 0));
    }

    #[test]
    fn what_is_no_path_is_refused() {
        let s = store();
        let long = "x".repeat(MAX_PATH + 1);
        for path in ["a//b", "a/", "a.b", "a b", "ä", "/local/domain/7/", "//", &long] {
            assert_eq!(s.write(Client::Host, path, b""), Err(StoreError::BadPath(path.into())), "{path}");
        }
        s.write(Client::Host, &"x".repeat(MAX_PATH), b"").unwrap();
        assert_eq!(s.write(Client::Host, "a", &vec![0; MAX_VALUE + 1]), Err(StoreError::TooLong(MAX_VALUE + 1)));
    }

    #[test]
    fn other_machines_are_out_of_reach() {
        let s = store();
        for path in ["/local/domain/70/x", "/local/domain/8", "/vm", "/"] {
            assert!(matches!(s.read(Client::Guest, path), Err(StoreError::Denied(_) | StoreError::BadPath(_))), "{path}");
        }
        assert_eq!(s.read(Client::Host, "/vm"), Err(StoreError::NotFound("/vm".into())));
        assert!(matches!(s.write(Client::Guest, "", b""), Err(StoreError::Denied(_))));
        assert!(matches!(s.remove(Client::Guest, ""), Err(StoreError::Denied(_))));
    }

    #[test]
    fn guest_has_so_many_keys() {
        let s = store();
        // The parent is a key as well.
        for n in 0..GUEST_KEYS - 1 {
            s.write(Client::Guest, &format!("data/{n}"), b"").unwrap();
        }
        assert_eq!(s.write(Client::Guest, "data/more", b""), Err(StoreError::Full("data/more".into())));
        s.write(Client::Guest, "data/0", b"one that exists").unwrap();
        s.write(Client::Host, "data/more", b"the host is not bound").unwrap();
        s.remove(Client::Guest, "data/0").unwrap();
        s.write(Client::Guest, "data/again", b"").unwrap();
    }

    #[test]
    fn guest_has_so_many_bytes() {
        let s = store();
        let mebibyte = vec![1; MAX_VALUE];
        for name in ["a", "b", "c"] {
            s.write(Client::Guest, name, &mebibyte).unwrap();
        }
        assert!(matches!(s.write(Client::Guest, "d", &mebibyte), Err(StoreError::Full(_))));
        s.write(Client::Guest, "c", b"").unwrap();
        s.write(Client::Guest, "d", &mebibyte).unwrap();
        // A key of the host's that the guest overwrites is the guest's from then on, and the other way round.
        s.write(Client::Host, "e", b"").unwrap();
        assert!(matches!(s.write(Client::Guest, "e", &mebibyte), Err(StoreError::Full(_))));
        s.write(Client::Host, "d", &mebibyte).unwrap();
        s.write(Client::Guest, "e", &mebibyte).unwrap();
    }

    #[test]
    fn watch_hears_of_its_path_and_below() {
        let s = store();
        let (id, ear) = ear(&s, "vm-data/a");
        s.write(Client::Guest, "vm-data/a", b"1").unwrap();
        s.write(Client::Host, "/local/domain/7/vm-data/a/b", b"2").unwrap();
        s.write(Client::Host, "vm-data/ab", b"3").unwrap();
        s.write(Client::Host, "vm-data", b"4").unwrap();
        s.remove(Client::Host, "vm-data/a/b").unwrap();
        assert_eq!(heard(&ear), ["vm-data/a", "vm-data/a/b", "vm-data/a/b"]);
        s.remove(Client::Host, "vm-data").unwrap();
        assert_eq!(heard(&ear), ["vm-data/a"], "it went with its parent");
        s.unwatch(id);
        s.unwatch(id);
        s.write(Client::Guest, "vm-data/a", b"5").unwrap();
        assert_eq!(heard(&ear), [""; 0]);
    }

    #[test]
    fn refused_writes_are_not_told() {
        let s = store();
        let (_, ear) = ear(&s, "");
        let _ = s.write(Client::Guest, "a b", b"");
        let _ = s.remove(Client::Guest, "a");
        assert_eq!(heard(&ear), [""; 0]);
    }

    proptest! {
        #[test]
        fn what_the_guest_pays_for_is_what_it_has(steps in prop::collection::vec((0..4, "[ab](/[ab-]){0,3}", 0..100usize), 0..60)) {
            let s = store();
            for (step, path, length) in steps {
                let client = if step & 1 == 0 { Client::Guest } else { Client::Host };
                if step < 3 {
                    s.write(client, &path, &vec![0; length]).unwrap();
                } else {
                    let _ = s.remove(client, &path);
                }
            }
            let tree = s.lock();
            let guests = || tree.nodes.iter().filter(|(_, node)| node.payer == Client::Guest);
            prop_assert_eq!(tree.guest_keys, guests().count());
            prop_assert_eq!(tree.guest_bytes, guests().map(|(path, node)| path.len() + node.value.len()).sum::<usize>());
            for path in tree.nodes.keys() {
                prop_assert!(lineage(path).all(|above| tree.nodes.contains_key(above)));
            }
        }
    }
}
