//! A device of the domain: its two directories in XenStore, and the thread that is its backend.
//!
//! It comes and goes as libxl has it (`tools/libs/light/libxl_device.c`, `libxl__device_generic_add` and `libxl__initiate_device_generic_remove`):
//! both directories are written at once, in Initialising, and their watchers begin. To take it back, `online` becomes 0 and the backend's state
//! Closing; the frontend closes, the backend follows, and both directories go. The backend looks for `online` itself, so that a toolstack at
//! `--xenstore` can take a device back, too.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use abi::xen::io::xenbus::{ONLINE, STATE, state};
use devices::virtio::worker::{Bell, Worker};
use dialects::xen::xenbus::{Backend, Driver, Keys};
use dialects::xen::{BACKEND_DOMAIN, DOMAIN, Peer, Xen};
use xenstore::{Error, Session, View, Watching};

use super::domain::BACKENDS;
use crate::hotplug::{Condition, Gone, Plugged, Stage};
use crate::store::{HOME, perms};

/// What a device is called.
#[derive(Debug, Clone)]
pub(super) struct Names {
    /// Kind and number, as the directories have them.
    pub kind: &'static str,
    pub number: u32,
    /// As the guest calls it.
    pub place: String,
}

impl Names {
    /// The backend's directory.
    pub fn backend(&self) -> String {
        format!("{BACKENDS}/{}/{DOMAIN}/{}", self.kind, self.number)
    }

    fn frontend(&self) -> String {
        format!("{HOME}/device/{}/{}", self.kind, self.number)
    }

    /// Where Linux' frontends say what is wrong (`drivers/xen/xenbus/xenbus_client.c`, `xenbus_va_dev_error`).
    fn errors(&self) -> String {
        format!("{HOME}/error/device/{}/{}", self.kind, self.number)
    }
}

/// Keys of both directories besides those that every device has.
pub(super) struct DeviceKeys {
    pub frontend: Vec<(&'static str, String)>,
    pub backend: Vec<(&'static str, String)>,
}

/// A device whose thread runs.
pub(super) struct XenDevice {
    host: Arc<Session>,
    names: Names,
    /// `None` once it was ended.
    worker: Mutex<Option<Worker<()>>>,
}

impl XenDevice {
    /// Writes the device's directories and starts its thread, which does what `serve` says.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    pub fn new(
        xen: &Arc<Xen>,
        host: &Arc<Session>,
        names: Names,
        keys: &DeviceKeys,
        gone: Gone,
        serve: impl FnOnce(Slot) + Send + 'static,
    ) -> std::io::Result<XenDevice> {
        host.update(|view| write_device(view, &names, keys)).map_err(std::io::Error::other)?;
        let title = format!("xen-{}{}", names.kind, names.number);
        let (xen, session, own) = (Arc::clone(xen), Arc::clone(host), names.clone());
        let worker = Worker::spawn(&title, move |bell| serve(Slot { xen, host: session, names: own, bell, gone }));
        if worker.is_err() {
            remove_nodes(host, &names);
        }
        Ok(XenDevice { host: Arc::clone(host), names, worker: Mutex::new(Some(worker?)) })
    }

    /// Whether its thread has nothing more to do.
    pub fn is_finished(&self) -> bool {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_none_or(Worker::is_finished)
    }

    /// Tells its thread to end.
    pub fn end_soon(&self) {
        if let Some(worker) = self.worker.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            worker.end_soon();
        }
    }

    /// Ends its thread and waits for it.
    pub fn end(&self) {
        let worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(worker);
    }

    fn text(&self, path: &str) -> Option<String> {
        Some(String::from_utf8_lossy(&self.host.read(path).ok()?).into_owned())
    }
}

impl Plugged for XenDevice {
    fn place(&self) -> String {
        self.names.place.clone()
    }

    fn condition(&self) -> Condition {
        let number = |path: String| self.text(&path).and_then(|text| text.trim().parse::<u32>().ok());
        let (backend, frontend) = (self.names.backend(), self.names.frontend());
        let said = [&backend, &self.names.errors()].iter().find_map(|path| self.text(&format!("{path}/error")));
        let states = [&backend, &frontend].map(|path| number(format!("{path}/{STATE}")).unwrap_or(state::UNKNOWN));
        let stage = match states {
            _ if number(format!("{backend}/{ONLINE}")) == Some(0) => Stage::Leaving,
            [state::CONNECTED, state::CONNECTED] => Stage::InUse,
            [state::CLOSING | state::CLOSED, _] | [_, state::CLOSING | state::CLOSED] if said.is_some() => Stage::Failed,
            _ => Stage::Offered,
        };
        Condition { stage, said }
    }

    fn ask_back(&self) {
        let backend = self.names.backend();
        // The host's writes fail only for paths that cannot be; and a device that has gone meanwhile must not come back as two keys.
        let _ = self.host.update(|view| {
            if !view.exists(&backend)? {
                return Ok(());
            }
            view.write(&format!("{backend}/{ONLINE}"), b"0")?;
            view.write(&format!("{backend}/{STATE}"), state::CLOSING.to_string().as_bytes())
        });
    }

    fn pull(&self) {
        self.end();
        remove_nodes(&self.host, &self.names);
    }
}

/// What a backend's thread is given.
pub(super) struct Slot {
    xen: Arc<Xen>,
    host: Arc<Session>,
    names: Names,
    bell: Bell,
    gone: Gone,
}

impl Slot {
    /// The dialect.
    pub fn xen(&self) -> Arc<Xen> {
        Arc::clone(&self.xen)
    }

    /// What wakes the thread.
    pub fn bell(&self) -> Bell {
        self.bell.clone()
    }

    /// What the guest wakes the thread by.
    pub fn peer(&self) -> Peer {
        let bell = self.bell.clone();
        Arc::new(move || bell.ring())
    }

    /// Begins to follow the frontend.
    pub fn begin<D: Driver>(self, driver: D) -> Served<D> {
        let (backend, frontend) = (self.names.backend(), self.names.frontend());
        let changed = Arc::new(AtomicBool::new(false));
        let watching = [format!("{frontend}/{STATE}"), format!("{backend}/{ONLINE}")].map(|path| {
            let (changed, bell) = (Arc::clone(&changed), self.bell.clone());
            // Refused only for paths that cannot be.
            self.host.watch(&path, move |_| {
                changed.store(true, Ordering::Release);
                bell.ring();
            })
        });
        let keys = Arc::new(StoreKeys(Arc::clone(&self.host)));
        Served {
            backend: Backend::new(driver, keys, backend, frontend),
            watching: watching.into_iter().flatten().collect(),
            changed,
            slot: self,
        }
    }
}

/// A backend at work.
pub(super) struct Served<D> {
    slot: Slot,
    /// The negotiation, and the driver.
    pub backend: Backend<D>,
    watching: Vec<Watching>,
    changed: Arc<AtomicBool>,
}

impl<D: Driver> Served<D> {
    /// Follows the frontend if it has moved; `false` when there is nothing more to serve.
    pub fn goes_on(&mut self) -> bool {
        if self.changed.swap(false, Ordering::AcqRel) {
            self.backend.frontend_changed();
        }
        !self.backend.is_over() && !self.slot.bell.is_stopped()
    }

    /// Lets go of everything; a device that is over goes for good.
    pub fn end(mut self) {
        self.watching.clear();
        self.backend.end();
        if self.backend.is_over() {
            remove_nodes(&self.slot.host, &self.slot.names);
            drop(self.backend);
            (self.slot.gone)();
        }
    }
}

/// Keys of the store for backends.
struct StoreKeys(Arc<Session>);

impl Keys for StoreKeys {
    fn read(&self, path: &str) -> Option<String> {
        String::from_utf8(self.0.read(path).ok()?).ok()
    }

    fn write(&self, keys: &[(String, String)]) {
        // The host's writes fail only for paths that cannot be, and these can.
        let _ = self.0.update(|view| keys.iter().try_for_each(|(path, value)| view.write(path, value.as_bytes())));
    }
}

fn write_device(view: &mut View<'_>, names: &Names, keys: &DeviceKeys) -> Result<(), Error> {
    let (backend, frontend) = (names.backend(), names.frontend());
    // What the guest said of an earlier device of this number.
    let _ = view.remove(&names.errors());
    let ends = [
        (
            &frontend,
            format!("n{DOMAIN},r{BACKEND_DOMAIN}"),
            &keys.frontend,
            [("backend", &backend), ("backend-id", &BACKEND_DOMAIN.to_string())],
        ),
        (&backend, format!("n{BACKEND_DOMAIN},r{DOMAIN}"), &keys.backend, [("frontend", &frontend), ("frontend-id", &DOMAIN.to_string())]),
    ];
    for (path, rights, keys, links) in ends {
        view.mkdir(path)?;
        // Before the keys, which take them over.
        view.set_perms(path, perms(&rights))?;
        for (name, value) in links.into_iter().chain(keys.iter().map(|(name, value)| (*name, value))) {
            view.write(&format!("{path}/{name}"), value.as_bytes())?;
        }
    }
    view.write(&format!("{backend}/{ONLINE}"), b"1")?;
    for path in [&backend, &frontend] {
        view.write(&format!("{path}/{STATE}"), state::INITIALISING.to_string().as_bytes())?;
    }
    Ok(())
}

fn remove_nodes(host: &Session, names: &Names) {
    // A directory that is not there has gone already.
    let _ = host.update(|view| {
        let _ = view.remove(&names.frontend());
        let _ = view.remove(&names.errors());
        view.remove(&names.backend())
    });
}
