//! Keys that outlive the server: which they are, and what has become of them since they were written down.
//!
//! Changes are not recorded as they are made. The [`Journal`] holds the tree as it was last written down, which costs one reference, and compares
//! it with the tree of now; subtrees that no change has touched are the same memory in both and are passed over. So a transaction is never seen half
//! done, a write that failed is made up for by the next one, and a store without a journal pays nothing.
//!
//! Whoever has the file calls [`Server::unkept`], writes the records all at once, and says how that went by [`Server::settle`]. Until
//! then nothing leaves the server that was queued after the first of these changes.

use crate::error::Error;
use crate::path::Path;
use crate::server::Server;
use crate::state::{NodeState, StateError};
use crate::store::Store;
use crate::tree::{Node, Tree};

/// Names below the root of what belongs to domains and ends with them: xen-project/xen `docs/misc/xenstore-paths.pandoc`.
const OF_DOMAINS: [&str; 3] = ["libxl", "local", "vm"];

/// Something to be written down.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// The node is this now, and may be new.
    Node(NodeState),
    /// The node at this path is gone, and all below it.
    Removed(String),
}

/// What is written down of a store.
pub(crate) struct Journal {
    /// The tree as it was then; none before the first time.
    kept: Option<Tree>,
    /// How often keys have changed that are to be written down.
    changes: u64,
    /// Writing failed.
    is_stuck: bool,
}

impl Path {
    /// Whether the node outlives the server.
    fn is_lasting(&self) -> bool {
        self.names().next().is_none_or(is_lasting)
    }
}

fn is_lasting(first: &str) -> bool {
    !OF_DOMAINS.contains(&first)
}

impl Store {
    /// Whether nothing may leave the server before it is written down what has changed.
    pub(crate) fn holds_back(&self) -> bool {
        self.journal.as_ref().is_some_and(|journal| journal.changes > 0 && !journal.is_stuck)
    }

    /// How often keys have changed that are to be written down.
    pub(crate) fn changes(&self) -> u64 {
        self.journal.as_ref().map_or(0, |journal| journal.changes)
    }

    /// Holds back changes that could not be written down.
    pub(crate) fn may_change(&self, path: &Path) -> Result<(), Error> {
        let is_stuck = self.journal.as_ref().is_some_and(|journal| journal.is_stuck);
        if is_stuck && path.is_lasting() { Err(Error::ReadOnly) } else { Ok(()) }
    }

    /// The node at `path`, or something below it, has changed.
    pub(crate) fn note_change(&mut self, path: &Path) {
        if let Some(journal) = self.journal.as_mut().filter(|_| path.is_lasting()) {
            journal.changes += 1;
        }
    }
}

impl Server {
    /// Begins to tell what is to be written down. `kept` is what the file has, parents first; what the store has and the file has not is
    /// told first.
    ///
    /// # Errors
    /// [`StateError::Impossible`] when `kept` is no tree.
    pub fn keep(&mut self, kept: &[NodeState]) -> Result<(), StateError> {
        let kept = if kept.is_empty() { None } else { Some(Tree::of_nodes(kept)?) };
        self.store.journal = Some(Journal { kept, changes: 1, is_stuck: false });
        Ok(())
    }

    /// What is to be written down all at once; none if nothing has changed since that was last done.
    pub fn unkept(&self) -> Option<Vec<Record>> {
        let journal = self.store.journal.as_ref().filter(|journal| journal.changes > 0)?;
        Some(differences(journal.kept.as_ref(), &self.store.tree))
    }

    /// [`Server::unkept`] was written down, or could not be. In the latter case the requests that made these changes get [`Error::NotKept`],
    /// and [`Error::ReadOnly`] those that would make more, until it can be.
    pub fn settle(&mut self, is_kept: bool) {
        let Some(journal) = &mut self.store.journal else { return };
        journal.is_stuck = !is_kept;
        if is_kept {
            journal.kept = Some(self.store.tree.clone());
            journal.changes = 0;
        }
        self.release(is_kept);
    }
}

/// What is to be done to the lasting nodes of `before` so that they become those of `now`.
fn differences(before: Option<&Tree>, now: &Tree) -> Vec<Record> {
    let mut records = Vec::new();
    let mut open = vec![(String::new(), before.map(Tree::root), now.root())];
    while let Some((path, before, now)) = open.pop() {
        let shown = if path.is_empty() { "/" } else { &path };
        if before.is_none_or(|before| before.value() != now.value() || before.perms() != now.perms()) {
            records.push(Record::Node(NodeState::of(shown, now)));
        }
        let (mut old, mut new) = (children(before).peekable(), children(Some(now)).peekable());
        let below = |node: &Node| {
            let name = String::from_utf8_lossy(node.name().as_bytes());
            let is_told = !path.is_empty() || is_lasting(&name);
            is_told.then(|| format!("{path}/{name}"))
        };
        loop {
            let gone = old.next_if(|old| new.peek().is_none_or(|new| old.name().as_bytes() < new.name().as_bytes()));
            if let Some(gone) = gone {
                records.extend(below(gone).map(Record::Removed));
                continue;
            }
            let Some(node) = new.next() else { break };
            let same = old.next_if(|old| old.name() == node.name());
            if same.is_none_or(|same| !std::ptr::eq(same, node))
                && let Some(path) = below(node)
            {
                open.push((path, same, node));
            }
        }
    }
    records
}

fn children(node: Option<&Node>) -> impl Iterator<Item = &Node> {
    node.and_then(Node::dir).into_iter().flat_map(|dir| dir.iter()).map(AsRef::as_ref)
}
