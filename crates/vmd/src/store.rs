//! The store that a machine runs on: its part of the XenStore tree, as dialects and the host's tools see it.
//!
//! ```text
//!   vmctl kv, --kv, guestinfo, fw_cfg ── dialects::store::Store ── MachineStore ─┐
//!   Xen's backends ──────────────────────────────────────────────────────────────┼── xenstore::SharedStore
//!   Xen's ring, --xenstore SOCKET ── StoreServer (server.rs), one event loop ────┘
//! ```
//!
//! Relative paths are below the machine's home, `/local/domain/1`; absolute ones are the whole tree's. One store serves the machine over all its
//! reboots. What a guest says through any dialect has the rights and quotas of its domain.
//!
//! The directories of [`make_home`] follow XenServer (xapi-project/xen-api `ocaml/xenopsd/xc/domain.ml`) and libxl
//! (`tools/libs/light/libxl_create.c`).

pub mod server;

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use dialects::store::{Client, Observer, Store, StoreError, VM_DATA, WatchId};
use dialects::xen::{BACKEND_DOMAIN, DOMAIN};
use xenstore::{Config, DomId, Error, Host, Perms, Quota, Server, Session, SharedStore, View, Watching};

pub use server::StoreServer;

/// The machine's home. [`DOMAIN`] is its number in the store whether it has Xen's dialect or not.
pub const HOME: &str = "/local/domain/1";
/// Longest value that a guest may write: as long as a message of GuestRPC may be. Xen's own limit, 2048, is that of messages on the ring.
const GUEST_VALUE: u32 = 64 << 10;

/// Directories that each machine has, and whether the guest owns them. What the host writes into its own is not charged to the guest.
const DIRECTORIES: [(&str, bool); 4] = [(VM_DATA, false), ("control", false), ("data", true), ("attr", true)];

/// The store of one machine.
pub struct MachineStore {
    shared: SharedStore,
    host: Session,
    watches: Mutex<Watches>,
}

#[derive(Default)]
struct Watches {
    by_id: HashMap<WatchId, Watching>,
    last: WatchId,
}

impl MachineStore {
    /// A store with nothing in it but the machine's home.
    ///
    /// # Errors
    /// None in practice: the host has no quotas, and the paths are good.
    pub fn new() -> Result<MachineStore, Error> {
        let mut config = Config::default();
        config.quotas.set(Quota::NodeSize, GUEST_VALUE);
        let shared = SharedStore::of(Server::new(xenstore::Store::new(config), Box::new(OneMachine)));
        let host = shared.host();
        host.update(make_home)?;
        Ok(MachineStore { shared, host, watches: Mutex::default() })
    }

    /// The whole tree.
    pub fn shared(&self) -> &SharedStore {
        &self.shared
    }

    /// Does `work` as `client`. A guest's session lives no longer than that, so that none outlives the domain.
    fn with<T>(&self, client: Client, work: impl FnOnce(&Session) -> Result<T, Error>) -> Result<T, Error> {
        match client {
            Client::Host => work(&self.host),
            Client::Guest => work(&self.shared.guest(DomId(DOMAIN))),
        }
    }

    fn watches(&self) -> MutexGuard<'_, Watches> {
        self.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the store knows of domains: there is one.
struct OneMachine;

impl Host for OneMachine {
    fn exists(&self, domain: DomId) -> bool {
        domain == DomId(DOMAIN)
    }
}

impl Store for MachineStore {
    fn read(&self, client: Client, path: &str) -> Result<Vec<u8>, StoreError> {
        self.with(client, |session| session.read(&absolute(path))).map_err(|error| explain(error, path, 0))
    }

    fn write(&self, client: Client, path: &str, value: &[u8]) -> Result<(), StoreError> {
        self.with(client, |session| session.write(&absolute(path), value)).map_err(|error| explain(error, path, value.len()))
    }

    fn list(&self, client: Client, path: &str) -> Result<Vec<String>, StoreError> {
        self.with(client, |session| session.list(&absolute(path))).map_err(|error| explain(error, path, 0))
    }

    fn remove(&self, client: Client, path: &str) -> Result<(), StoreError> {
        let there = absolute(path);
        let removed = self.with(client, |session| {
            session.update(|view| {
                // XenStore is content to remove what is not there.
                view.read(&there)?;
                view.remove(&there)
            })
        });
        // A directory that each machine has is emptied by that, and stays.
        removed.and_then(|()| self.host.update(make_home)).map_err(|error| explain(error, path, 0))
    }

    fn watch(&self, path: &str, observer: Observer) -> Result<WatchId, StoreError> {
        let is_relative = !path.starts_with('/');
        let told = move |changed: &str| observer(if is_relative { relative(changed) } else { changed });
        let watching = self.host.watch_changes(&absolute(path), told).map_err(|error| explain(error, path, 0))?;
        let mut watches = self.watches();
        watches.last += 1;
        let id = watches.last;
        watches.by_id.insert(id, watching);
        Ok(id)
    }

    fn unwatch(&self, watch: WatchId) {
        let ended = self.watches().by_id.remove(&watch);
        drop(ended);
    }
}

/// Makes the machine's home and the directories in it, where they are not as they should be.
///
/// # Errors
/// Those of the store.
pub fn make_home(view: &mut View<'_>) -> Result<(), Error> {
    directory(view, HOME, &perms(&format!("n{BACKEND_DOMAIN},r{DOMAIN}")))?;
    DIRECTORIES.iter().try_for_each(|(name, is_guests)| {
        let rights = if *is_guests { format!("n{DOMAIN}") } else { format!("n{BACKEND_DOMAIN},b{DOMAIN}") };
        directory(view, &format!("{HOME}/{name}"), &perms(&rights))
    })
}

/// Whether the machine has a directory at this relative path without anybody's doing.
pub fn is_own_directory(path: &str) -> bool {
    DIRECTORIES.iter().any(|(name, _)| *name == path)
}

/// `n<owner>`, and the others' rights.
pub fn perms(text: &str) -> Perms {
    Perms::parse(text.split(',').map(str::as_bytes)).unwrap_or_else(|_| Perms::private(DomId::HOST))
}

fn directory(view: &mut View<'_>, path: &str, perms: &Perms) -> Result<(), Error> {
    match view.perms(path) {
        Ok(there) if there == *perms => return Ok(()),
        Ok(_) => {}
        Err(Error::NoNode) => view.mkdir(path)?,
        Err(error) => return Err(error),
    }
    view.set_perms(path, perms.clone())
}

fn absolute(path: &str) -> Cow<'_, str> {
    match path {
        "" => HOME.into(),
        _ if path.starts_with('/') => path.into(),
        _ => format!("{HOME}/{path}").into(),
    }
}

/// The relative form of a path of the machine.
fn relative(path: &str) -> &str {
    path.strip_prefix(HOME).map_or(path, |rest| rest.strip_prefix('/').unwrap_or(rest))
}

/// What a refusal means to those who speak of keys; `length` is that of the value, if there was one.
fn explain(error: Error, path: &str, length: usize) -> StoreError {
    match error {
        Error::NoNode => StoreError::NotFound(path.into()),
        Error::BadPath => StoreError::BadPath(path.into()),
        Error::TooLong => StoreError::TooLong(length),
        Error::Quota(_) | Error::TransactionFailed => StoreError::Full(path.into()),
        _ => StoreError::Denied(path.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use dialects::store::MAX_VALUE;

    use super::*;

    fn store() -> MachineStore {
        MachineStore::new().unwrap()
    }

    /// A watch that writes down what it is told.
    fn ear(store: &MachineStore, path: &str) -> (WatchId, Arc<Mutex<Vec<String>>>) {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&heard);
        let id = store.watch(path, Arc::new(move |path| notes.lock().unwrap().push(path.to_owned()))).unwrap();
        (id, heard)
    }

    fn heard(ear: &Arc<Mutex<Vec<String>>>) -> Vec<String> {
        std::mem::take(&mut ear.lock().unwrap())
    }

    #[test]
    fn what_one_client_writes_all_others_read() {
        let store = store();
        store.write(Client::Host, "vm-data/a/b", b"value \0 with anything").unwrap();
        assert_eq!(store.read(Client::Guest, "vm-data/a/b").unwrap(), b"value \0 with anything");
        assert_eq!(store.read(Client::Guest, "/local/domain/1/vm-data/a/b").unwrap(), b"value \0 with anything");
        assert_eq!(store.read(Client::Guest, "vm-data/a").unwrap(), b"", "parents appear with empty values");
        let xen = store.shared().guest(DomId(DOMAIN));
        assert_eq!(xen.read("vm-data/a/b").unwrap(), b"value \0 with anything");
        xen.write("vm-data/a", b"both").unwrap();
        assert_eq!(store.read(Client::Host, "vm-data/a").unwrap(), b"both");
        assert_eq!(store.list(Client::Guest, "vm-data").unwrap(), ["a"]);
    }

    #[test]
    fn host_has_the_whole_tree_and_the_guest_its_part() {
        let store = store();
        assert_eq!(store.list(Client::Host, "").unwrap(), ["attr", "control", "data", "vm-data"]);
        store.write(Client::Host, "/vm/x/name", b"machine").unwrap();
        assert_eq!(store.list(Client::Host, "/").unwrap(), ["local", "vm"]);
        for path in ["/vm/x/name", "/local/domain/2", "/"] {
            assert_eq!(store.read(Client::Guest, path), Err(StoreError::Denied(path.into())));
        }
        for path in ["", "name", "other/x"] {
            assert_eq!(store.write(Client::Guest, path, b""), Err(StoreError::Denied(path.into())));
        }
        for path in ["vm-data/x", "data/x", "attr/x", "control/x"] {
            assert_eq!(store.write(Client::Guest, path, b""), Ok(()), "{path}");
        }
    }

    #[test]
    fn what_is_no_path_and_no_value_is_refused() {
        let store = store();
        for path in ["a//b", "a/", "a.b", "a b", "ä", "/local/domain/1/", "//", &"x".repeat(2049)] {
            assert_eq!(store.write(Client::Host, path, b""), Err(StoreError::BadPath(path.into())), "{path}");
        }
        assert_eq!(store.write(Client::Host, "a", &vec![0; MAX_VALUE]), Ok(()));
        assert_eq!(store.write(Client::Host, "a", &vec![0; MAX_VALUE + 1]), Err(StoreError::TooLong(MAX_VALUE + 1)));
        assert_eq!(store.read(Client::Host, "b"), Err(StoreError::NotFound("b".into())));
        assert_eq!(store.remove(Client::Host, "b"), Err(StoreError::NotFound("b".into())));
    }

    #[test]
    fn guests_share_is_bounded_and_the_hosts_is_not() {
        let store = store();
        let value = vec![1; GUEST_VALUE as usize];
        let full = (0..).find(|n| store.write(Client::Guest, &format!("data/{n}"), &value).is_err()).unwrap();
        assert!((32..64).contains(&full), "{full}");
        assert_eq!(store.write(Client::Guest, "data/0", &[value.as_slice(), &[1]].concat()), Err(StoreError::Full("data/0".into())));
        store.write(Client::Host, "vm-data/large", &vec![1; MAX_VALUE]).unwrap();
        store.remove(Client::Guest, "data/0").unwrap();
        assert_eq!(store.write(Client::Guest, "data/again", &value), Ok(()), "what the host wrote is not the guest's");
    }

    #[test]
    fn removal_takes_everything_below_and_leaves_the_machines_directories() {
        let store = store();
        for path in ["vm-data/b/c", "vm-data/b-", "other/x"] {
            store.write(Client::Host, path, b"x").unwrap();
        }
        store.remove(Client::Host, "vm-data/b").unwrap();
        assert_eq!(store.list(Client::Host, "vm-data").unwrap(), ["b-"]);
        store.remove(Client::Guest, "vm-data").unwrap();
        assert_eq!(store.list(Client::Host, "").unwrap(), ["attr", "control", "data", "other", "vm-data"]);
        store.remove(Client::Host, "").unwrap();
        assert_eq!(store.list(Client::Host, "").unwrap(), ["attr", "control", "data", "vm-data"]);
        assert_eq!(store.write(Client::Guest, "vm-data/x", b""), Ok(()));
    }

    #[test]
    fn watch_hears_of_its_path_and_below_in_its_own_words() {
        let store = store();
        let (id, ear) = ear(&store, "vm-data/a");
        let (_, absolute) = self::ear(&store, "/local/domain/1/vm-data/a/b");
        store.write(Client::Guest, "vm-data/a", b"1").unwrap();
        store.write(Client::Host, "/local/domain/1/vm-data/a/b", b"2").unwrap();
        store.write(Client::Host, "vm-data/ab", b"3").unwrap();
        store.write(Client::Host, "vm-data", b"4").unwrap();
        store.remove(Client::Host, "vm-data/a/b").unwrap();
        assert_eq!(heard(&ear), ["vm-data/a", "vm-data/a/b", "vm-data/a/b"]);
        assert_eq!(heard(&absolute), ["/local/domain/1/vm-data/a/b"; 2]);
        store.remove(Client::Host, "vm-data").unwrap();
        assert_eq!(heard(&ear), ["vm-data/a"], "it went with its parent");
        store.unwatch(id);
        store.unwatch(id);
        store.write(Client::Guest, "vm-data/a", b"5").unwrap();
        assert_eq!(heard(&ear), [""; 0]);
    }
}
