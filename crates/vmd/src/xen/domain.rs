//! The machine as a domain in XenStore: the nodes that Xen's toolstack would write, the guest's ring, and its devices.
//!
//! Paths are those of `docs/misc/xenstore-paths.pandoc`; which nodes are the guest's to write is what libxl does
//! (`tools/libs/light/libxl_create.c`, `libxl_device.c`).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use abi::xen::hvm::CONSOLE_PAGE;
use dialects::xen::{BACKEND_DOMAIN, DOMAIN, Xen};
use vmm::memory::PAGE_SIZE;
use xenstore::{Error, Session, View, Watching};

use super::device::{Names, XenDevice};
use super::ring::ServedRing;
use super::{disk, nic};
use crate::hotplug::{Device, Gone, Plugged, Slots};
use crate::power::{PowerError, Wish};
use crate::store::{HOME, StoreServer, make_home, perms};

/// Where backends' directories are.
pub(super) const BACKENDS: &str = "/local/domain/0/backend";
/// Nodes below the guest's home that it owns, beside those of every machine.
const GUESTS_OWN: [&str; 4] = ["drivers", "feature", "error", "control/shutdown"];
/// And below `control`: what it obeys.
const FEATURES: [&str; 5] = ["poweroff", "reboot", "suspend", "s3", "s4"];
/// Requests for the guest's ends.
const SHUTDOWN: &str = "/local/domain/1/control/shutdown";
/// Why a request was not granted, where Linux' xenbus puts what it has to say of a node (`xenbus_va_dev_error`).
const SHUTDOWN_ERROR: &str = "/local/domain/1/error/control/shutdown/error";
/// Requests that end in a saved machine.
const SAVING: [&[u8]; 3] = [b"suspend", b"s3", b"s4"];
/// The answer to them, begun with a number as xenbus' errors are: EOPNOTSUPP.
const NOT_SAVED: &[u8] = b"95 this monitor cannot save a machine; there are poweroff and reboot";

/// A domain with power on.
pub struct Domain {
    xen: Arc<Xen>,
    host: Arc<Session>,
    /// Looks for requests of a toolstack that cannot be granted.
    _refusing: Watching,
    /// `None` when power is off.
    ring: Mutex<Option<ServedRing>>,
    /// `None` when power is off.
    devices: Mutex<Option<Vec<Arc<XenDevice>>>>,
}

impl Domain {
    /// Makes the domain's nodes in the store of `server`, in place of what an earlier power-on left there, and has its ring served.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    pub fn new(xen: Arc<Xen>, server: &StoreServer, uuid: &str, vcpus: u32, has_console: bool) -> std::io::Result<Domain> {
        let host = Arc::new(server.store().host());
        host.update(|view| write_home(view, uuid, vcpus)).map_err(std::io::Error::other)?;
        let toolstack = Arc::clone(&host);
        let refusing = host.watch_changes(SHUTDOWN, move |_| refuse_saving(&toolstack)).map_err(std::io::Error::other)?;
        let ring = Mutex::new(Some(ServedRing::new(&xen, server)?));
        if has_console {
            host.update(write_console).map_err(std::io::Error::other)?;
        }
        Ok(Domain { xen, host, _refusing: refusing, ring, devices: Mutex::new(Some(Vec::new())) })
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
        let asked = self.host.update(|view| {
            // There is none, or it is of an earlier request.
            let _ = view.remove(SHUTDOWN_ERROR);
            view.write(SHUTDOWN, word.as_bytes())
        });
        asked.map_err(|_| PowerError::NoXenDriver)
    }

    /// Ends all threads, and lets go of the guest's memory.
    pub fn shut_down(&self) {
        let devices = lock(&self.devices).take().unwrap_or_default();
        devices.iter().for_each(|device| device.end_soon());
        devices.iter().for_each(|device| device.end());
        drop(lock(&self.ring).take());
    }

    /// The first of `places` whose number no device has.
    fn free(&self, places: impl Iterator<Item = Names>) -> std::io::Result<Names> {
        let is_free = |names: &Names| matches!(self.host.exists(&names.backend()), Ok(false));
        places.into_iter().find(is_free).ok_or_else(|| std::io::Error::other("all numbers of such devices are taken"))
    }
}

impl Slots for Domain {
    fn plug(&self, device: Device, gone: Gone) -> std::io::Result<Arc<dyn Plugged>> {
        let mut devices = lock(&self.devices);
        let devices = devices.as_mut().ok_or_else(|| std::io::Error::other("power is off"))?;
        // They are kept until here, so that no thread drops, and waits for, itself.
        devices.retain(|device| !device.is_finished());
        let device = Arc::new(match device {
            Device::Disk { image, persistent_grants } => {
                let names = self.free(disk::places())?;
                let keys = disk::keys(&names, image.as_ref());
                XenDevice::new(&self.xen, &self.host, names, &keys, gone, move |slot| disk::serve(slot, image, persistent_grants))?
            }
            Device::Dvd(_) => return Err(std::io::Error::other("Xen's frontends have no DVD drives")),
            Device::Nic(mac, network) => {
                let names = self.free(nic::places())?;
                let keys = nic::keys(&names, mac);
                XenDevice::new(&self.xen, &self.host, names, &keys, gone, move |slot| nic::serve(slot, network))?
            }
        });
        devices.push(Arc::clone(&device));
        Ok(device)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes back a request to suspend, and says why. A guest that was faster asks the hypervisor, which refuses, and goes on.
fn refuse_saving(host: &Session) {
    let is_asked = |word: &[u8]| SAVING.contains(&word);
    if host.read(SHUTDOWN).is_ok_and(|word| is_asked(&word)) {
        // Both paths are as paths should be.
        let _ = host.update(|view| {
            view.write(SHUTDOWN, b"")?;
            view.write(SHUTDOWN_ERROR, NOT_SAVED)
        });
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::Receiver;
    use std::time::{Duration, Instant};

    use devices::block::DiskSpec;
    use dialects::kvm::clock::PvClock;
    use vmm::time::{StepClock, Timers};
    use xenstore::{Config, DomId, SharedStore};

    use super::*;
    use crate::hotplug::{Condition, Stage};

    fn server() -> StoreServer {
        StoreServer::new(SharedStore::new(Config::default()), None).unwrap()
    }

    fn domain(server: &StoreServer) -> Domain {
        let memory = vmm::memory::map(&super::super::memory(0)).unwrap();
        let timers = Timers::new(Arc::new(StepClock::new(Duration::ZERO)));
        let clock = Arc::new(PvClock::new(memory.clone(), Arc::clone(timers.clock()), 1_000_000_000, 1));
        Domain::new(Xen::new(memory, clock, timers, None, [0; 16], 1), server, "uuid", 1, true).unwrap()
    }

    /// A disk of nothing, and when it was let go.
    fn plug(domain: &Domain) -> (Arc<dyn Plugged>, Receiver<()>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let (gone, heard) = std::sync::mpsc::channel();
        let image = devices::block::open(&DiskSpec::new(file.path())).unwrap();
        (domain.plug(Device::Disk { image, persistent_grants: false }, Box::new(move || gone.send(()).unwrap())).unwrap(), heard)
    }

    fn wait(what: &str, mut is_so: impl FnMut() -> bool) {
        let until = Instant::now() + Duration::from_secs(20);
        while !is_so() {
            assert!(Instant::now() < until, "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn nodes_are_whose_they_should_be() {
        let server = server();
        let domain = domain(&server);
        plug(&domain);
        let guest = server.store().guest(DomId(DOMAIN));
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
    fn device_is_gone_once_the_guest_has_closed() {
        let server = server();
        let (domain, guest) = (domain(&server), server.store().guest(DomId(DOMAIN)));
        let (first, first_gone) = plug(&domain);
        let (second, _) = plug(&domain);
        assert_eq!((first.place(), second.place()), ("xvda".into(), "xvdb".into()));
        let backend = "/local/domain/0/backend/vbd/1/51712";
        wait("the backend offers itself", || guest.read(&format!("{backend}/state")) == Ok(b"2".to_vec()));
        assert_eq!(first.condition(), Condition { stage: Stage::Offered, said: None });
        // A guest that keeps it, and says why.
        guest.write("device/vbd/51712/state", b"5").unwrap();
        guest.write("error/device/vbd/51712/error", b"16 Device in use; refusing to close").unwrap();
        first.ask_back();
        assert_eq!(guest.read(&format!("{backend}/state")), Ok(b"5".to_vec()));
        let said = Some("16 Device in use; refusing to close".into());
        assert_eq!(first.condition(), Condition { stage: Stage::Leaving, said });
        assert!(first_gone.recv_timeout(Duration::from_millis(50)).is_err());
        guest.write("device/vbd/51712/state", b"6").unwrap();
        first_gone.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(guest.read("device/vbd/51712/state"), Err(Error::NoNode));
        assert_eq!(server.store().host().exists(backend), Ok(false));
        first.ask_back();
        assert_eq!(server.store().host().exists(backend), Ok(false), "what is gone does not come back");
        // Its number is free again, and what was said of it forgotten.
        let (third, _) = plug(&domain);
        assert_eq!((third.place(), third.condition().said), ("xvda".into(), None));
        domain.shut_down();
    }

    #[test]
    fn device_that_nobody_uses_goes_at_once_and_others_can_be_pulled() {
        let server = server();
        let domain = domain(&server);
        let ((first, first_gone), (second, second_gone)) = (plug(&domain), plug(&domain));
        first.ask_back();
        first_gone.recv_timeout(Duration::from_secs(20)).unwrap();
        server.store().guest(DomId(DOMAIN)).write("device/vbd/51728/state", b"4").unwrap();
        second.pull();
        assert!(second_gone.recv().is_err(), "nobody is told what he did himself");
        assert_eq!(server.store().host().list("/local/domain/1/device/vbd"), Ok(Vec::new()));
        domain.shut_down();
        let (gone, _) = std::sync::mpsc::channel::<()>();
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(512).unwrap();
        let image = devices::block::open(&DiskSpec::new(file.path())).unwrap();
        assert!(domain.plug(Device::Disk { image, persistent_grants: false }, Box::new(move || drop(gone))).is_err(), "power is off");
    }

    #[test]
    fn guest_is_asked_only_for_what_it_said_it_obeys() {
        let server = server();
        let domain = domain(&server);
        assert_eq!(domain.ask(Wish::Shutdown), Err(PowerError::NoXenDriver));
        server.store().guest(DomId(DOMAIN)).write("control/feature-poweroff", b"1").unwrap();
        assert_eq!(domain.ask(Wish::Shutdown), Ok(()));
        assert_eq!(server.store().host().read(SHUTDOWN), Ok(b"poweroff".to_vec()));
        assert_eq!(domain.ask(Wish::Reboot), Err(PowerError::NoXenDriver));
        assert_eq!(domain.ask(Wish::SetClock), Err(PowerError::NoWord(Wish::SetClock)));
        domain.shut_down();
    }

    #[test]
    fn suspend_is_taken_back_and_the_toolstack_is_told_why() {
        let server = server();
        let domain = domain(&server);
        let (host, guest) = (server.store().host(), server.store().guest(DomId(DOMAIN)));
        for word in SAVING {
            host.write(SHUTDOWN, word).unwrap();
            assert_eq!(guest.read("control/shutdown"), Ok(Vec::new()));
            assert_eq!(host.read(SHUTDOWN_ERROR), Ok(NOT_SAVED.to_vec()));
        }
        guest.write("control/feature-reboot", b"1").unwrap();
        assert_eq!(domain.ask(Wish::Reboot), Ok(()));
        assert_eq!((host.read(SHUTDOWN), host.read(SHUTDOWN_ERROR)), (Ok(b"reboot".to_vec()), Err(Error::NoNode)));
        domain.shut_down();
    }

    #[test]
    fn power_comes_on_again_in_the_same_store() {
        let server = server();
        for _ in 0..2 {
            let domain = domain(&server);
            let (device, _) = plug(&domain);
            assert_eq!(device.place(), "xvda");
            domain.shut_down();
            assert_eq!(server.store().host().read("/local/domain/1/device/vbd/51712/state"), Ok(b"1".to_vec()));
        }
    }
}
