//! Watches of the store's clients, and what fires them.

use std::sync::Arc;

use abi::xen::xenstore::{ABS_PATH_MAX, PAYLOAD_MAX};

use super::clients::{watch_key, watch_memory};
use super::{ClientId, Store};
use crate::domid::DomId;
use crate::edit::Change;
use crate::error::Error;
use crate::path::{Path, Special, Watched};
use crate::perms::{Access, Entry, Perms};
use crate::quota::{Quota, Usage};
use crate::tree::Tree;
use crate::watch::{Event, Happening, Watch};

impl Store {
    /// WATCH. Gives back the event that every watch begins with; nothing need exist at its path.
    ///
    /// # Errors
    /// [`Error::WatchExists`], [`Error::Quota`]; [`Error::TooLong`] for a token that would not fit into an event with the longest path;
    /// [`Error::BadRequest`] for a depth that a special path does not take.
    pub fn watch(&mut self, client: ClientId, watched: &Watched, token: &[u8], depth: Option<u32>) -> Result<Event, Error> {
        if ABS_PATH_MAX + token.len() + 2 > PAYLOAD_MAX {
            return Err(Error::TooLong);
        }
        let hidden = match watched {
            Watched::Node(_, hidden) => *hidden,
            Watched::Special(text) if depth.is_some() => match (Special::of(text.as_bytes()), depth) {
                (Some(Special::IntroduceDomain | Special::ReleaseDomain), Some(1)) => 0,
                _ => return Err(Error::BadRequest),
            },
            Watched::Special(_) => 0,
        };
        let known = self.client(client)?;
        let (domain, privileged, count) = (known.domain, known.privileged, known.watches.len());
        if self.has_watch(client, watched.text(), token) {
            return Err(Error::WatchExists);
        }
        let watch = Watch { id: self.next_watch(), client, path: watched.text().clone(), token: token.into(), hidden, depth };
        let memory = self.usages.of(domain).memory + Usage::of_memory(watch_memory(&watch)).memory;
        self.allow(domain, privileged, Quota::Watches, count + 1)?;
        self.allow(domain, privileged, Quota::Memory, usize::try_from(memory).unwrap_or(0))?;
        self.add_watch(watch).map(|watch| watch.here())
    }

    /// Whether the client has this watch.
    pub(crate) fn has_watch(&self, client: ClientId, path: &str, token: &[u8]) -> bool {
        self.client(client).is_ok_and(|client| client.watches.contains_key(&watch_key(path, token)))
    }

    /// Adds a watch, which has [`Store::next_watch`]'s number.
    pub(crate) fn add_watch(&mut self, watch: Watch) -> Result<Arc<Watch>, Error> {
        let watch = Arc::new(watch);
        let known = self.client_mut(watch.client)?;
        let domain = known.domain;
        known.watches.insert(watch_key(&watch.path, &watch.token), watch.clone());
        self.usages.charge(domain, Usage::of_memory(watch_memory(&watch)));
        self.last_watch = watch.id;
        self.watches.add(watch.clone());
        Ok(watch)
    }

    /// UNWATCH.
    ///
    /// # Errors
    /// [`Error::NoWatch`].
    pub fn unwatch(&mut self, client: ClientId, watched: &Watched, token: &[u8]) -> Result<(), Error> {
        self.unwatch_text(client, watched.text(), token)
    }

    /// Ends a watch of a client that may have gone.
    pub(crate) fn unwatch_one(&mut self, watch: &Watch) {
        let _gone = self.unwatch_text(watch.client, &watch.path, &watch.token);
    }

    /// Number of the next watch.
    pub(crate) fn next_watch(&self) -> u64 {
        self.last_watch + 1
    }

    fn unwatch_text(&mut self, client: ClientId, path: &str, token: &[u8]) -> Result<(), Error> {
        let known = self.client_mut(client)?;
        let domain = known.domain;
        let watch = known.watches.remove(&watch_key(path, token)).ok_or(Error::NoWatch)?;
        self.usages.refund(domain, Usage::of_memory(watch_memory(&watch)));
        self.watches.remove(&watch);
        Ok(())
    }

    /// GET_PERMS of a special path.
    ///
    /// # Errors
    /// [`Error::Denied`].
    pub fn special_perms(&self, client: ClientId, special: Special) -> Result<Arc<Perms>, Error> {
        let perms = self.perms_of_special(special);
        if perms.access(&self.caller(client)?).read() { Ok(perms) } else { Err(Error::Denied) }
    }

    /// SET_PERMS of a special path: who gets its events. Privileged clients always do.
    ///
    /// # Errors
    /// [`Error::Denied`].
    pub fn set_special_perms(&mut self, client: ClientId, special: Special, perms: Perms) -> Result<(), Error> {
        if !self.caller(client)?.privileged {
            return Err(Error::Denied);
        }
        self.special_perms.insert(special, Arc::new(perms));
        Ok(())
    }

    pub(super) fn fire_change(&mut self, path: &Path, change: &Change) {
        let parent;
        let (visible, removed): (&[&Perms], _) = match change {
            Change::None => return,
            Change::Created(perms) | Change::Written(perms) => (&[perms], None),
            Change::Permitted(before, after) => (&[before, after], None),
            Change::Removed(node) => {
                parent = self.tree.root().nearest(path.as_str()).0.perms().clone();
                (&[node.perms(), &parent], Some((node.as_ref(), None)))
            }
        };
        self.fire(&Happening { path, visible, removed });
        self.note_change(path);
    }

    /// Fires what a commit did at `path`, given the tree before it.
    pub(super) fn fire_commit(&mut self, before: &Tree, path: &Path, removed: bool) {
        self.note_change(path);
        let after = self.tree.clone();
        let (was, is) = (before.get(path), after.get(path));
        if was.is_none() && is.is_none() {
            return;
        }
        let near = if is.is_none() { Some(after.root().nearest(path.as_str()).0) } else { None };
        let visible: Vec<&Perms> = [was, is, near].into_iter().flatten().map(|node| node.perms().as_ref()).collect();
        let removed = was.filter(|_| removed).map(|was| (was, is));
        self.fire(&Happening { path, visible: &visible, removed });
    }

    fn fire(&mut self, happening: &Happening) {
        if self.watches.is_empty() {
            return;
        }
        let (clients, domains, events) = (&self.clients, &self.domains, &mut self.events);
        let may_read = |client, perms: &Perms| {
            let caller = clients.get(&client).map(|client| domains.caller(client.domain, client.privileged));
            caller.is_some_and(|caller| perms.access(&caller).read())
        };
        self.watches.fire(happening, may_read, |event| events.push(event));
    }

    /// Fires a special path about `domain`.
    pub(super) fn fire_special(&mut self, special: Special, domain: DomId) {
        let perms = self.perms_of_special(special);
        let text = special.path();
        let told: Arc<str> = format!("{text}/{domain}").into();
        for watch in self.watches.at(&text) {
            if self.caller(watch.client).is_ok_and(|caller| perms.access(&caller).read()) {
                let path = if watch.depth.is_some() { told.clone() } else { text.clone() };
                self.events.push(Event { watch: watch.clone(), path });
            }
        }
    }

    fn perms_of_special(&self, special: Special) -> Arc<Perms> {
        let set = self.special_perms.get(&special);
        match special {
            _ if let Some(perms) = set => perms.clone(),
            Special::ReleaseOne(_) => self.perms_of_special(Special::ReleaseDomain),
            Special::IntroduceDomain => Arc::new(Perms::private(DomId::HOST)),
            Special::ReleaseDomain => {
                let all = Entry { domain: DomId::ANY, access: Access::Read };
                Arc::new(Perms { others: vec![all], ..Perms::private(DomId::HOST) })
            }
        }
    }
}
