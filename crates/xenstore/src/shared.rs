//! The store for the rest of this process: the monitor, its dialects, `vmctl kv`.
//!
//! A [`SharedStore`] is one lock around a [`Server`], so that calls from here and requests on the wire take turns. Calls are made through a
//! [`Session`], which is the host or acts as a guest, with that guest's rights and quotas: what a guest says through VMware's or Hyper-V's interface is no
//! more than what it may say through Xen's.
//!
//! Callbacks of watches run after the lock is released, on the thread that made the change. They may use the store.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use abi::xen::xenstore::NO_TRANSACTION;

use crate::domid::DomId;
use crate::edit::Op;
use crate::error::Error;
use crate::perms::Perms;
use crate::server::{NoHost, Server};
use crate::store::{ClientId, Config, Store, TxId};
use crate::watch::Event;

type Callback = Arc<dyn Fn(&str) + Send + Sync>;
type Waker = Arc<dyn Fn() + Send + Sync>;

/// A store that threads share. Cheap to clone; all clones are the same store.
#[derive(Clone)]
pub struct SharedStore(Arc<Shared>);

struct Shared {
    server: Mutex<Server>,
    callbacks: Mutex<HashMap<u64, Callback>>,
    waker: Mutex<Option<Waker>>,
}

impl SharedStore {
    /// An empty store that nobody is connected to.
    pub fn new(config: Config) -> SharedStore {
        SharedStore::of(Server::new(Store::new(config), Box::new(NoHost)))
    }

    /// Shares `server`.
    pub fn of(server: Server) -> SharedStore {
        SharedStore(Arc::new(Shared { server: Mutex::new(server), callbacks: Mutex::default(), waker: Mutex::default() }))
    }

    /// Calls `waker` whenever a call from this process left something to do for the connections, as [`Server::take_active`] tells.
    pub fn set_waker(&self, waker: impl Fn() + Send + Sync + 'static) {
        *lock(&self.0.waker) = Some(Arc::new(waker));
    }

    /// A session of the host, which may do everything.
    pub fn host(&self) -> Session {
        self.session(DomId::HOST, true)
    }

    /// A session that acts as a guest.
    pub fn guest(&self, domain: DomId) -> Session {
        self.session(domain, false)
    }

    /// Works on the server, delivers the events of that, and wakes who serves the connections.
    pub fn with<T>(&self, work: impl FnOnce(&mut Server) -> T) -> T {
        let (result, events, active) = {
            let mut server = lock(&self.0.server);
            let result = work(&mut server);
            server.deliver();
            (result, server.take_local_events(), server.has_active())
        };
        events.iter().for_each(|event| self.call(event));
        let waker = if active { lock(&self.0.waker).clone() } else { None };
        if let Some(waker) = waker {
            waker();
        }
        result
    }

    fn session(&self, domain: DomId, privileged: bool) -> Session {
        let client = self.with(|server| server.store().open(domain, privileged));
        Session { shared: self.clone(), client }
    }

    fn call(&self, event: &Event) {
        let callback = lock(&self.0.callbacks).get(&event.watch.id).cloned();
        if let Some(callback) = callback {
            callback(event.reported_path());
        }
    }
}

/// Somebody's access to the store from this process. Paths may be relative to the session's domain. Closed when dropped; a guest's also when its
/// domain is forgotten, after which every call is [`Error::NoClient`].
pub struct Session {
    shared: SharedStore,
    client: ClientId,
}

impl Session {
    /// The value at `path`.
    ///
    /// # Errors
    /// [`Error::NoNode`], [`Error::Denied`], [`Error::BadPath`].
    pub fn read(&self, path: &str) -> Result<Vec<u8>, Error> {
        self.once(|view| view.read(path))
    }

    /// The names of the nodes directly below `path`, in order.
    ///
    /// # Errors
    /// As [`Session::read`].
    pub fn list(&self, path: &str) -> Result<Vec<String>, Error> {
        self.once(|view| view.list(path))
    }

    /// Whether there is a node at `path`. What the session may not know of is not there.
    ///
    /// # Errors
    /// [`Error::BadPath`].
    pub fn exists(&self, path: &str) -> Result<bool, Error> {
        self.once(|view| view.exists(path))
    }

    /// Who may read and write the node at `path`.
    ///
    /// # Errors
    /// As [`Session::read`].
    pub fn perms(&self, path: &str) -> Result<Perms, Error> {
        self.once(|view| view.perms(path))
    }

    /// Sets the value at `path`, and creates the nodes on the way.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::BadPath`], [`Error::Quota`]; [`Error::TooLong`] for more than [`Config::value_max`].
    pub fn write(&self, path: &str, value: &[u8]) -> Result<(), Error> {
        self.once(|view| view.write(path, value))
    }

    /// Creates a node without a value, unless it exists.
    ///
    /// # Errors
    /// As [`Session::write`].
    pub fn mkdir(&self, path: &str) -> Result<(), Error> {
        self.once(|view| view.mkdir(path))
    }

    /// Removes the node at `path` and all below it. It need not exist if the one above does.
    ///
    /// # Errors
    /// [`Error::NoNode`], [`Error::Denied`], [`Error::BadPath`], [`Error::Refused`].
    pub fn remove(&self, path: &str) -> Result<(), Error> {
        self.once(|view| view.remove(path))
    }

    /// Changes who may read and write the node at `path`.
    ///
    /// # Errors
    /// [`Error::NoNode`], [`Error::Denied`], [`Error::OwnerFixed`], [`Error::BadPath`], [`Error::Quota`].
    pub fn set_perms(&self, path: &str, perms: Perms) -> Result<(), Error> {
        self.once(|view| view.set_perms(path, perms))
    }

    /// Does all of `work` or, if it fails, nothing. Nobody else uses the store meanwhile, so it must be short and must not use the store but through
    /// its argument.
    ///
    /// # Errors
    /// Those of `work`, and of quotas.
    pub fn update<T>(&self, work: impl FnOnce(&mut View) -> Result<T, Error>) -> Result<T, Error> {
        self.shared.with(|server| {
            let store = server.store();
            let tx = store.begin(self.client)?;
            match work(&mut View { store, client: self.client, tx }) {
                Ok(result) => server.store().commit(self.client, tx).map(|()| result),
                Err(error) => server.store().abort(self.client, tx).and(Err(error)),
            }
        })
    }

    /// Calls `callback` with the path of each change at or below `path`, now once with `path` itself, until the result is dropped. Further calls may
    /// come while it is being dropped.
    ///
    /// # Errors
    /// [`Error::BadPath`], [`Error::Quota`].
    pub fn watch(&self, path: &str, callback: impl Fn(&str) + Send + Sync + 'static) -> Result<Watching, Error> {
        let watching = self.watch_changes(path, callback)?;
        self.shared.call(&watching.event);
        Ok(watching)
    }

    /// As [`Session::watch`], but only for changes from now on.
    ///
    /// # Errors
    /// As [`Session::watch`].
    pub fn watch_changes(&self, path: &str, callback: impl Fn(&str) + Send + Sync + 'static) -> Result<Watching, Error> {
        let event = self.shared.with(|server| {
            let store = server.store();
            let watched = store.watched(self.client, path.as_bytes())?;
            let token = store.next_watch().to_string();
            let first = store.watch(self.client, &watched, token.as_bytes(), None)?;
            lock(&self.shared.0.callbacks).insert(first.watch.id, Arc::new(callback));
            Ok(first)
        })?;
        Ok(Watching { shared: self.shared.clone(), event })
    }

    fn once<T>(&self, work: impl FnOnce(&mut View) -> Result<T, Error>) -> Result<T, Error> {
        self.shared.with(|server| work(&mut View { store: server.store(), client: self.client, tx: NO_TRANSACTION }))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.shared.with(|server| server.store().close(self.client));
    }
}

/// The store while it is locked for a [`Session`]. Methods are as the session's.
pub struct View<'a> {
    store: &'a mut Store,
    client: ClientId,
    tx: TxId,
}

impl View<'_> {
    /// See [`Session::read`].
    pub fn read(&mut self, path: &str) -> Result<Vec<u8>, Error> {
        let path = self.store.path(self.client, path.as_bytes())?;
        self.store.read(self.client, self.tx, &path).map(|value| value.as_bytes().to_vec())
    }

    /// See [`Session::list`].
    pub fn list(&mut self, path: &str) -> Result<Vec<String>, Error> {
        let path = self.store.path(self.client, path.as_bytes())?;
        let names = self.store.list(self.client, self.tx, &path)?;
        Ok(names.iter().map(|name| name.iter().copied().map(char::from).collect()).collect())
    }

    /// See [`Session::exists`].
    pub fn exists(&mut self, path: &str) -> Result<bool, Error> {
        match self.read(path) {
            Ok(_) => Ok(true),
            Err(Error::NoNode | Error::Denied) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// See [`Session::perms`].
    pub fn perms(&mut self, path: &str) -> Result<Perms, Error> {
        let path = self.store.path(self.client, path.as_bytes())?;
        self.store.perms(self.client, self.tx, &path).map(Arc::unwrap_or_clone)
    }

    /// See [`Session::write`].
    pub fn write(&mut self, path: &str, value: &[u8]) -> Result<(), Error> {
        let path = self.store.path(self.client, path.as_bytes())?;
        self.store.apply(self.client, self.tx, Op::Write(path, value.into()))
    }

    /// See [`Session::mkdir`].
    pub fn mkdir(&mut self, path: &str) -> Result<(), Error> {
        let path = self.store.path(self.client, path.as_bytes())?;
        self.store.apply(self.client, self.tx, Op::Mkdir(path))
    }

    /// See [`Session::remove`].
    pub fn remove(&mut self, path: &str) -> Result<(), Error> {
        let path = self.store.path(self.client, path.as_bytes())?;
        self.store.apply(self.client, self.tx, Op::Remove(path))
    }

    /// See [`Session::set_perms`].
    pub fn set_perms(&mut self, path: &str, perms: Perms) -> Result<(), Error> {
        let path = self.store.path(self.client, path.as_bytes())?;
        self.store.apply(self.client, self.tx, Op::SetPerms(path, Arc::new(perms)))
    }
}

/// A watch of a [`Session`]; dropped, it ends.
pub struct Watching {
    shared: SharedStore,
    event: Event,
}

impl Drop for Watching {
    fn drop(&mut self) {
        lock(&self.shared.0.callbacks).remove(&self.event.watch.id);
        self.shared.with(|server| server.store().unwatch_one(&self.event.watch));
    }
}

/// A panic elsewhere does not make the store unusable: no call leaves it half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ring;

    fn store() -> SharedStore {
        SharedStore::new(Config::default())
    }

    fn heard(session: &Session, path: &str) -> (Watching, Arc<Mutex<Vec<String>>>) {
        let heard: Arc<Mutex<Vec<String>>> = Arc::default();
        let sink = heard.clone();
        let watching = session.watch(path, move |path| sink.lock().unwrap().push(path.to_owned())).unwrap();
        (watching, heard)
    }

    #[test]
    fn values_are_bytes_and_parents_are_made() {
        let host = store().host();
        host.write("/a/b/c", &[0, 255, 10]).unwrap();
        assert_eq!(host.read("/a/b/c"), Ok(vec![0, 255, 10]));
        assert_eq!(host.read("/a/b"), Ok(vec![]));
        assert_eq!(host.list("/a"), Ok(vec!["b".to_owned()]));
        assert_eq!(host.exists("/a/x"), Ok(false));
        host.remove("/a").unwrap();
        assert_eq!(host.exists("/a/b/c"), Ok(false));
    }

    #[test]
    fn values_may_have_a_mebibyte_and_no_more() {
        let host = store().host();
        assert_eq!(host.write("/large", &vec![1; 1 << 20]), Ok(()));
        assert_eq!(host.read("/large").unwrap().len(), 1 << 20);
        assert_eq!(host.write("/large", &vec![1; (1 << 20) + 1]), Err(Error::TooLong));
    }

    #[test]
    fn callbacks_hear_of_changes_from_everywhere_and_may_use_the_store() {
        let store = store();
        let (host, other) = (store.host(), store.host());
        let (watching, paths) = heard(&host, "/data");
        let inner = store.host();
        let nested = host.watch("/data/copy-me", move |path| inner.write("/copied", path.as_bytes()).unwrap()).unwrap();
        other.write("/data/copy-me", b"x").unwrap();
        assert_eq!(*paths.lock().unwrap(), ["/data", "/data/copy-me"]);
        assert_eq!(other.read("/copied"), Ok(b"/data/copy-me".to_vec()));
        drop((watching, nested));
        other.write("/data/later", b"x").unwrap();
        assert_eq!(paths.lock().unwrap().len(), 2);
    }

    #[test]
    fn updates_happen_at_once_or_not_at_all() {
        let host = store().host();
        let (_watching, paths) = heard(&host, "/");
        let done = host.update(|view| {
            view.write("/front/state", b"1")?;
            view.write("/back/state", b"1")
        });
        assert_eq!(done, Ok(()));
        assert_eq!(*paths.lock().unwrap(), ["/", "/front/state", "/back/state"]);
        let failed: Result<(), Error> = host.update(|view| {
            view.remove("/front")?;
            view.read("/nowhere").map(drop)
        });
        assert_eq!(failed, Err(Error::NoNode));
        assert_eq!(host.read("/front/state"), Ok(b"1".to_vec()));
    }

    #[test]
    fn guest_session_has_a_guests_rights_home_and_end() {
        let store = store();
        let (host, guest) = (store.host(), store.guest(DomId(5)));
        host.mkdir("/local/domain/5/data").unwrap();
        host.set_perms("/local/domain/5/data", Perms::private(DomId(5))).unwrap();
        guest.write("data/key", b"value").unwrap();
        assert_eq!(host.read("/local/domain/5/data/key"), Ok(b"value".to_vec()));
        assert_eq!(guest.write("/local/domain/5/name", b"x"), Err(Error::Denied));
        assert_eq!(guest.write("data/key", &[0; 2049]), Err(Error::Quota(crate::Quota::NodeSize)));
        let (_watching, paths) = heard(&guest, "data");
        guest.write("data/key", b"again").unwrap();
        assert_eq!(*paths.lock().unwrap(), ["data", "data/key"]);
        store.with(|server| server.forget(DomId(5)));
        assert_eq!(guest.read("data/key"), Err(Error::NoClient));
        assert_eq!(host.exists("/local/domain/5/data"), Ok(false));
    }

    #[test]
    fn change_from_here_wakes_who_serves_the_connections() {
        fn is_shared(_: &(impl Send + Sync)) {}
        let store = store();
        is_shared(&store);
        let host = store.host();
        let socket = store.with(|server| {
            let socket = server.connect(DomId::HOST, true);
            let watched = server.store().watched(socket, b"/a").unwrap();
            server.store().watch(socket, &watched, b"token", None).unwrap();
            socket
        });
        let woken: Arc<Mutex<u32>> = Arc::default();
        let count = woken.clone();
        store.set_waker(move || *count.lock().unwrap() += 1);
        host.write("/b", b"x").unwrap();
        assert_eq!(*woken.lock().unwrap(), 0);
        host.write("/a", b"x").unwrap();
        assert_eq!(*woken.lock().unwrap(), 1);
        assert_eq!(store.with(Server::take_active), [socket]);
    }

    #[test]
    fn domain_that_is_introduced_from_here_wakes_who_serves_the_rings() {
        let store = store();
        let woken: Arc<Mutex<u32>> = Arc::default();
        let count = woken.clone();
        store.set_waker(move || *count.lock().unwrap() += 1);
        let ring = store.with(|server| server.introduce(DomId(5), Ring { gfn: 1, port: 1 })).unwrap();
        assert_eq!((*woken.lock().unwrap(), store.with(Server::take_active)), (1, vec![ring]));
    }

    #[test]
    fn session_that_ends_leaves_nothing() {
        let store = store();
        let guest = store.guest(DomId(5));
        let watching = guest.watch("x", |_| {}).unwrap();
        drop(guest);
        drop(watching);
        assert_eq!(store.with(|server| server.store().usage(DomId(5))), crate::Usage::default());
        assert!(store.with(|server| server.store().is_consistent()));
    }
}
