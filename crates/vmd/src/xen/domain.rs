//! The machine as a domain in XenStore: the nodes that Xen's toolstack would write, the thread that serves the guest's ring, and the backends.
//!
//! Paths are those of `docs/misc/xenstore-paths.pandoc`; which nodes are the guest's to write is what libxl does
//! (`tools/libs/light/libxl_create.c`, `libxl_device.c`).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use abi::xen::hvm::{CONSOLE_PAGE, STORE_PAGE};
use abi::xen::io::xenbus::state;
use devices::virtio::worker::{Bell, Worker};
use dialects::xen::xenbus::Keys;
use dialects::xen::xenstore::{Connection, StoreRing};
use dialects::xen::{BACKEND_DOMAIN, DOMAIN, Xen};
use vmm::memory::PAGE_SIZE;
use xenstore::{ClientId, DomId, Error, Ring, Server, Session, SharedStore, View};

use crate::power::{PowerError, Wish};
use crate::store::{HOME, make_home, perms};

const BACKENDS: &str = "/local/domain/0/backend";
/// Nodes below the guest's home that it owns, beside those of every machine.
const GUESTS_OWN: [&str; 4] = ["drivers", "feature", "error", "control/shutdown"];
/// And below `control`: what it obeys.
const FEATURES: [&str; 5] = ["poweroff", "reboot", "suspend", "s3", "s4"];
/// Requests for the guest's ends.
const SHUTDOWN: &str = "/local/domain/1/control/shutdown";

/// A domain with power on.
pub struct Domain {
    xen: Arc<Xen>,
    store: SharedStore,
    host: Arc<Session>,
    workers: Mutex<Vec<Worker<()>>>,
}

impl Domain {
    /// Makes the domain's nodes in `store`, in place of what an earlier power-on left there, and serves its ring.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    pub fn new(xen: Arc<Xen>, store: SharedStore, uuid: &str, vcpus: u32, has_console: bool) -> std::io::Result<Domain> {
        let host = Arc::new(store.host());
        host.update(|view| write_home(view, uuid, vcpus)).map_err(std::io::Error::other)?;
        let domain = Domain { xen, store, host, workers: Mutex::default() };
        domain.serve_store()?;
        if has_console {
            domain.host.update(write_console).map_err(std::io::Error::other)?;
        }
        Ok(domain)
    }

    /// Adds a device: its nodes on both sides, in Initialising, and what `serve` makes of it in a thread of its own.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    pub fn add(
        &self,
        kind: &str,
        number: u32,
        frontend: &[(&str, String)],
        backend: &[(&str, String)],
        serve: impl FnOnce(Device) + Send + 'static,
    ) -> std::io::Result<()> {
        let ends = (format!("{BACKENDS}/{kind}/{DOMAIN}/{number}"), format!("{HOME}/device/{kind}/{number}"));
        self.host.update(|view| write_device(view, &ends, frontend, backend)).map_err(std::io::Error::other)?;
        let (xen, host) = (Arc::clone(&self.xen), Arc::clone(&self.host));
        let name = format!("xen-{kind}{number}");
        let (backend, frontend) = ends;
        self.workers().push(Worker::spawn(&name, move |bell| serve(Device { xen, host, backend, frontend, bell }))?);
        Ok(())
    }

    /// Asks the guest, if it obeys (`docs/misc/xenstore-paths.pandoc`, `control/shutdown`).
    ///
    /// # Errors
    /// [`PowerError`] when it does not, or when there is no word for the wish.
    pub fn ask(&self, wish: Wish) -> Result<(), PowerError> {
        let word = match wish {
            Wish::Shutdown => "poweroff",
            Wish::Reboot => "reboot",
            _ => return Err(PowerError::NoWord(wish)),
        };
        let obeys = self.host.read(&format!("{HOME}/control/feature-{word}")).is_ok_and(|value| value == b"1");
        if !obeys {
            return Err(PowerError::NoXenDriver);
        }
        self.host.write(SHUTDOWN, word.as_bytes()).map_err(|_| PowerError::NoXenDriver)
    }

    /// Ends all threads.
    pub fn shut_down(&self) {
        let workers = std::mem::take(&mut *self.workers());
        workers.iter().for_each(Worker::end_soon);
        // They are waited for.
        drop(workers);
        self.store.with(|server| {
            if let Some(client) = server.ring(DomId(DOMAIN)) {
                server.disconnect(client);
            }
        });
    }

    fn workers(&self) -> MutexGuard<'_, Vec<Worker<()>>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve_store(&self) -> std::io::Result<()> {
        let (xen, store) = (Arc::clone(&self.xen), self.store.clone());
        self.workers().push(Worker::spawn("xenstored", move |bell| serve_ring(&xen, &store, &bell))?);
        Ok(())
    }
}

/// A device's backend, as its thread has it.
pub struct Device {
    /// The dialect.
    pub xen: Arc<Xen>,
    /// The host's access to the store.
    pub host: Arc<Session>,
    /// Path of the backend's directory.
    pub backend: String,
    /// Path of the frontend's directory.
    pub frontend: String,
    /// What wakes the thread.
    pub bell: Bell,
}

/// Keys of the store for backends.
pub struct StoreKeys(pub Arc<Session>);

impl Keys for StoreKeys {
    fn read(&self, path: &str) -> Option<String> {
        String::from_utf8(self.0.read(path).ok()?).ok()
    }

    fn write(&self, keys: &[(String, String)]) {
        // The host's writes fail only for paths that cannot be, and these can.
        let _ = self.0.update(|view| keys.iter().try_for_each(|(path, value)| view.write(path, value.as_bytes())));
    }
}

/// The guest's connection.
struct Client<'a> {
    server: &'a mut Server,
    id: ClientId,
}

impl Connection for Client<'_> {
    fn wants_input(&self) -> bool {
        self.server.wants_input(self.id)
    }

    fn receive(&mut self, bytes: &[u8]) {
        self.server.receive(self.id, bytes);
    }

    fn output(&self) -> &[u8] {
        self.server.output(self.id)
    }

    fn sent(&mut self, count: usize) {
        self.server.sent(self.id, count);
    }

    fn is_broken(&self) -> bool {
        self.server.is_broken(self.id)
    }

    fn reconnect(&mut self) {
        self.server.reconnect(self.id);
    }
}

fn serve_ring(xen: &Arc<Xen>, store: &SharedStore, bell: &Bell) {
    let ring = bell.clone();
    let Some(port) = xen.open_store(Arc::new(move || ring.ring())) else { return };
    let waker = bell.clone();
    let domain = DomId(DOMAIN);
    let introduced = store.with(|server| {
        let client = server.introduce(domain, Ring { gfn: STORE_PAGE / PAGE_SIZE, port })?;
        server.set_waker(client, Arc::new(move || waker.ring()));
        Ok::<_, Error>((client, server.store().features(domain)))
    });
    let Ok((id, features)) = introduced else { return };
    let mut page = StoreRing::new(xen.memory().clone(), features);
    let mut again = false;
    while !bell.is_stopped() && (again || bell.wait()) {
        let served = store.with(|server| {
            let served = page.serve(&mut Client { server, id });
            server.attended(id);
            served
        });
        if served.notify {
            xen.notify(port);
        }
        again = served.again;
    }
}

fn write_home(view: &mut View<'_>, uuid: &str, vcpus: u32) -> Result<(), Error> {
    let readable = format!("n{BACKEND_DOMAIN},r{DOMAIN}");
    for old in [format!("{HOME}/device"), format!("{BACKENDS}/vbd/{DOMAIN}"), format!("{BACKENDS}/vif/{DOMAIN}")] {
        // Where nothing is, nothing has to go.
        let _ = view.remove(&old);
    }
    make_home(view)?;
    let mut keys = vec![
        ("name".to_owned(), "machine".to_owned()),
        ("domid".to_owned(), DOMAIN.to_string()),
        ("vm".to_owned(), format!("/vm/{uuid}")),
        ("device".to_owned(), String::new()),
        ("control/platform-feature-xs_reset_watches".to_owned(), "1".to_owned()),
    ];
    keys.extend((0..vcpus).map(|vcpu| (format!("cpu/{vcpu}/availability"), "online".to_owned())));
    for (name, value) in keys {
        view.write(&format!("{HOME}/{name}"), value.as_bytes())?;
    }
    let own = GUESTS_OWN.iter().map(|name| (*name).to_owned()).chain(FEATURES.iter().map(|name| format!("control/feature-{name}")));
    for name in own {
        let path = format!("{HOME}/{name}");
        view.write(&path, b"")?;
        view.set_perms(&path, perms(&format!("n{DOMAIN}")))?;
    }
    let vm = format!("/vm/{uuid}");
    view.write(&format!("{vm}/uuid"), uuid.as_bytes())?;
    view.write(&format!("{vm}/name"), b"machine")?;
    view.set_perms(&vm, perms(&readable))
}

fn write_console(view: &mut View<'_>) -> Result<(), Error> {
    for (name, value) in [("type", "xenconsoled".to_owned()), ("ring-ref", (CONSOLE_PAGE / PAGE_SIZE).to_string())] {
        view.write(&format!("{HOME}/console/{name}"), value.as_bytes())?;
    }
    Ok(())
}

fn write_device(
    view: &mut View<'_>,
    (backend, frontend): &(String, String),
    front_keys: &[(&str, String)],
    back_keys: &[(&str, String)],
) -> Result<(), Error> {
    let ends = [
        (frontend, format!("n{DOMAIN},r{BACKEND_DOMAIN}"), front_keys, [("backend", backend), ("backend-id", &BACKEND_DOMAIN.to_string())]),
        (backend, format!("n{BACKEND_DOMAIN},r{DOMAIN}"), back_keys, [("frontend", frontend), ("frontend-id", &DOMAIN.to_string())]),
    ];
    for (path, rights, keys, links) in ends {
        view.mkdir(path)?;
        // Before the keys, which take them over.
        view.set_perms(path, perms(&rights))?;
        for (name, value) in links.into_iter().chain(keys.iter().map(|(name, value)| (*name, value))) {
            view.write(&format!("{path}/{name}"), value.as_bytes())?;
        }
    }
    view.write(&format!("{backend}/online"), b"1")?;
    for path in [backend, frontend] {
        view.write(&format!("{path}/state"), state::INITIALISING.to_string().as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use dialects::kvm::clock::PvClock;
    use vmm::time::{StepClock, Timers};
    use xenstore::Config;

    use super::*;

    fn domain(store: &SharedStore) -> Domain {
        let memory = vmm::memory::map(&super::super::memory(0)).unwrap();
        let timers = Timers::new(Arc::new(StepClock::new(Duration::ZERO)));
        let clock = Arc::new(PvClock::new(memory.clone(), Arc::clone(timers.clock()), 1_000_000_000, 1));
        Domain::new(Xen::new(memory, clock, timers, [0; 16], 1), store.clone(), "uuid", 1, true).unwrap()
    }

    #[test]
    fn nodes_are_whose_they_should_be() {
        let store = SharedStore::new(Config::default());
        let domain = domain(&store);
        domain.add("vbd", 51712, &[("device-type", "disk".into())], &[("mode", "w".into())], |_| {}).unwrap();
        let guest = store.guest(DomId(DOMAIN));
        assert_eq!(guest.read("name"), Ok(b"machine".to_vec()));
        assert_eq!(guest.write("name", b"mine"), Err(Error::Denied));
        for own in ["data/x", "control/feature-poweroff", "device/vbd/51712/ring-ref"] {
            assert_eq!(guest.write(own, b"1"), Ok(()), "{own}");
        }
        let backend = String::from_utf8(guest.read("device/vbd/51712/backend").unwrap()).unwrap();
        assert_eq!(guest.read(&format!("{backend}/mode")), Ok(b"w".to_vec()));
        assert_eq!(guest.write(&format!("{backend}/state"), b"4"), Err(Error::Denied));
        domain.shut_down();
    }

    #[test]
    fn guest_is_asked_only_for_what_it_said_it_obeys() {
        let store = SharedStore::new(Config::default());
        let domain = domain(&store);
        assert_eq!(domain.ask(Wish::Shutdown), Err(PowerError::NoXenDriver));
        store.guest(DomId(DOMAIN)).write("control/feature-poweroff", b"1").unwrap();
        assert_eq!(domain.ask(Wish::Shutdown), Ok(()));
        assert_eq!(store.host().read(SHUTDOWN), Ok(b"poweroff".to_vec()));
        assert_eq!(domain.ask(Wish::Reboot), Err(PowerError::NoXenDriver));
        assert_eq!(domain.ask(Wish::SetClock), Err(PowerError::NoWord(Wish::SetClock)));
        domain.shut_down();
    }

    #[test]
    fn power_comes_on_again_in_the_same_store() {
        let store = SharedStore::new(Config::default());
        for _ in 0..2 {
            let domain = domain(&store);
            domain.add("vif", 0, &[], &[], |_| {}).unwrap();
            domain.shut_down();
            assert_eq!(store.host().read("/local/domain/1/device/vif/0/state"), Ok(b"1".to_vec()));
        }
    }
}
