//! Watches and the events they fire.
//!
//! The index maps watched paths to watches: a change asks for each prefix of its own path, so watches elsewhere cost it nothing. Prefixes are
//! looked up by a hash that goes on from one to the next, so that a path of a thousand names costs no more than its length. A removal also
//! asks for the watches below it, which an ordered set of the same paths finds.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Bound;
use std::sync::Arc;

use crate::path::{Path, names};
use crate::perms::Perms;
use crate::store::ClientId;
use crate::tree::Node;

/// A client's watch.
#[derive(Debug)]
pub struct Watch {
    /// Number of the watch, never used again.
    pub id: u64,
    /// Whose.
    pub client: ClientId,
    /// Absolute path, or a special one.
    pub path: Arc<str>,
    /// What the client wants to see with each event.
    pub token: Box<[u8]>,
    /// Leading bytes of paths that the client does not see, because it watches relative to its home.
    pub hidden: usize,
    /// How many levels below the path count; all without a number.
    pub depth: Option<u32>,
}

impl Watch {
    /// An event at the watch's own path.
    pub fn here(self: &Arc<Watch>) -> Event {
        Event { watch: self.clone(), path: self.path.clone() }
    }
}

/// Something happened at `path`, which `watch` is interested in.
#[derive(Debug, Clone)]
pub struct Event {
    /// Who wants to know.
    pub watch: Arc<Watch>,
    /// Where, absolute.
    pub path: Arc<str>,
}

impl Event {
    /// The path as the client is told: relative where its watch is.
    pub fn reported_path(&self) -> &str {
        self.path.get(self.watch.hidden..).unwrap_or(&self.path)
    }
}

/// A change of the tree, as watches see it.
pub struct Happening<'a> {
    /// Where.
    pub path: &'a Path,
    /// Who may read one of these may know of it.
    pub visible: &'a [&'a Perms],
    /// What was there, if it was removed, and what is there now, if it was created again.
    pub removed: Option<(&'a Node, Option<&'a Node>)>,
}

/// All watches.
#[derive(Default)]
pub struct Watches {
    /// By the [`hash`](Watches::hash) of their path, in the order that they were added in.
    by_hash: HashMap<u64, Vec<Arc<Watch>>>,
    paths: BTreeSet<Arc<str>>,
    seed: RandomState,
}

impl Watches {
    /// Adds a watch.
    pub fn add(&mut self, watch: Arc<Watch>) {
        self.paths.insert(watch.path.clone());
        self.by_hash.entry(self.hash(&watch.path)).or_default().push(watch);
    }

    /// Removes a watch.
    pub fn remove(&mut self, watch: &Watch) {
        let hash = self.hash(&watch.path);
        let Some(same) = self.by_hash.get_mut(&hash) else { return };
        if let Ok(at) = same.binary_search_by_key(&watch.id, |other| other.id) {
            same.remove(at);
        }
        if same.is_empty() {
            self.by_hash.remove(&hash);
        }
        if self.at(&watch.path).next().is_none() {
            self.paths.remove(&watch.path);
        }
    }

    /// Whether nobody watches anything.
    pub fn is_empty(&self) -> bool {
        self.by_hash.is_empty()
    }

    /// The watches on exactly this path.
    pub fn at(&self, path: &str) -> impl Iterator<Item = &Arc<Watch>> {
        self.with_hash(self.hash(path), path)
    }

    fn with_hash(&self, hash: u64, path: &str) -> impl Iterator<Item = &Arc<Watch>> {
        self.by_hash.get(&hash).into_iter().flatten().filter(move |watch| *watch.path == *path)
    }

    fn hash(&self, path: &str) -> u64 {
        self.hashes(path).last().map_or(0, |(hash, _)| hash)
    }

    /// Hashes of the prefixes of a path: of `/`, `/a`, `/a/b` for `/a/b`.
    fn hashes<'p>(&self, path: &'p str) -> impl Iterator<Item = (u64, &'p str)> {
        let mut hasher = self.seed.build_hasher();
        let mut hashed = 0;
        prefixes(path).map(move |prefix| {
            hasher.write(prefix.get(hashed..).unwrap_or_default().as_bytes());
            // The slash of the root is the first of the others.
            hashed = prefix.len();
            (hasher.finish(), prefix)
        })
    }

    /// Calls `fire` with each event that `happening` causes and `may_read` allows; it tells whether a client may read what has permissions.
    pub fn fire(&self, happening: &Happening, may_read: impl Fn(ClientId, &Perms) -> bool, mut fire: impl FnMut(Event)) {
        let changed = happening.path.as_str();
        for (hash, prefix) in self.hashes(changed) {
            for watch in self.with_hash(hash, prefix) {
                let near = || watch.depth.is_none_or(|depth| levels_below(changed, prefix) <= depth);
                let visible = || happening.visible.iter().any(|perms| may_read(watch.client, perms));
                if near() && visible() {
                    fire(Event { watch: watch.clone(), path: happening.path.shared().clone() });
                }
            }
        }
        if let Some((before, after)) = happening.removed {
            self.fire_below(changed, before, after, may_read, fire);
        }
    }

    /// Watches below a removed node get their own path when their node went with it.
    fn fire_below(
        &self,
        removed: &str,
        before: &Node,
        after: Option<&Node>,
        may_read: impl Fn(ClientId, &Perms) -> bool,
        mut fire: impl FnMut(Event),
    ) {
        // '0' is the character after '/'.
        let (first, end) = (format!("{removed}/"), format!("{removed}0"));
        for path in self.paths.range::<str, _>((Bound::Included(first.as_str()), Bound::Excluded(end.as_str()))) {
            let below = path.get(removed.len()..).unwrap_or_default();
            let Some(gone) = before.get(below) else { continue };
            if after.is_some_and(|after| after.get(below).is_some()) {
                continue;
            }
            self.at(path).filter(|watch| may_read(watch.client, gone.perms())).for_each(|watch| fire(watch.here()));
        }
    }
}

/// `/`, `/a`, `/a/b` of `/a/b`; the whole of a special path.
fn prefixes(path: &str) -> impl Iterator<Item = &str> {
    let root = path.starts_with('/').then_some(1);
    let inner = path.match_indices('/').map(|(at, _)| at).filter(move |at| *at > 0 && root.is_some());
    let whole = (path != "/").then_some(path.len());
    root.into_iter().chain(inner).chain(whole).filter_map(|end| path.get(..end))
}

fn levels_below(path: &str, prefix: &str) -> u32 {
    let below = path.get(prefix.len()..).unwrap_or_default();
    u32::try_from(names(below).count()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_go_from_the_root_to_the_path() {
        assert_eq!(prefixes("/").collect::<Vec<_>>(), ["/"]);
        assert_eq!(prefixes("/a").collect::<Vec<_>>(), ["/", "/a"]);
        assert_eq!(prefixes("/a/bc/d").collect::<Vec<_>>(), ["/", "/a", "/a/bc", "/a/bc/d"]);
        assert_eq!(prefixes("@releaseDomain/5").collect::<Vec<_>>(), ["@releaseDomain/5"]);
    }

    #[test]
    fn levels_count_names() {
        assert_eq!(levels_below("/a/b/c", "/"), 3);
        assert_eq!(levels_below("/a/b/c", "/a"), 2);
        assert_eq!(levels_below("/a/b/c", "/a/b/c"), 0);
        assert_eq!(levels_below("/", "/"), 0);
    }
}
