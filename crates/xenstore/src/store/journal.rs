//! What changed since somebody last asked, for a program that keeps the tree in a file as well.
//!
//! The journal has paths alone, in order; what is there now is read from the tree when the journal is taken. That is between requests, so it is the
//! state of one moment, and no half transaction. Who does not ask for a journal has none and pays nothing.

use super::Store;
use crate::edit::Change;
use crate::path::Path;
use crate::perms::Perms;

/// A change of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Changed {
    /// The node was set; the nodes on the way to it may have been created. A later entry tells if it is gone again.
    Set(Path),
    /// The node and all below it were removed.
    Removed(Path),
}

impl Store {
    /// Whether [`Store::take_journal`] has something to tell.
    pub fn has_changed(&self) -> bool {
        self.journal.as_ref().is_some_and(|journal| !journal.is_empty())
    }

    /// Changes since the last call, in order, if [`Config::journal`](super::Config::journal) says so.
    pub fn take_journal(&mut self) -> Vec<Changed> {
        self.journal.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The value and permissions of a node, whoever asks.
    pub fn node(&self, path: &Path) -> Option<(&[u8], &Perms)> {
        self.tree.get(path).map(|node| (node.value().as_bytes(), node.perms().as_ref()))
    }

    pub(super) fn note_change(&mut self, path: &Path, change: &Change) {
        let Some(journal) = &mut self.journal else { return };
        match change {
            Change::None => {}
            Change::Removed(_) => journal.push(Changed::Removed(path.clone())),
            _ => journal.push(Changed::Set(path.clone())),
        }
    }

    /// Notes what a commit changed, and whether it was removed at some time. What was removed first and set then is there; so is what was set
    /// below a node that was removed before.
    pub(super) fn note_commit(&mut self, changed: &[(Path, bool)]) {
        let Some(journal) = &mut self.journal else { return };
        let removed = changed.iter().filter(|(_, removed)| *removed);
        journal.extend(removed.map(|(path, _)| Changed::Removed(path.clone())));
        journal.extend(changed.iter().map(|(path, _)| Changed::Set(path.clone())));
    }
}
