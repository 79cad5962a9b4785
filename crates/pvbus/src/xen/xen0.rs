//! Device xen0: the domain. It follows XenStore by watches: `control/shutdown`, and `device`, where devices come and go.
//!
//! What a watch told is done in the next poll, with requests to XenStore that wait for their answers, at most five seconds; a store that does not
//! answer is not waited for a second time. Watches are `watch(path, token)` in the store, and here the token says whose an event is:
//!
//! ```text
//!   SHUTDOWN           the host's wish: acknowledged by emptying the key, then an Event
//!   DEVICES            a frontend's directory came or went
//!   device/vbd/51712   that device's backend has another state
//! ```
//!
//! OpenBSD `sys/dev/pv/xen.c`; keys of `docs/misc/xenstore-paths.pandoc`.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use abi::xen::hvm::param;
use abi::xen::hypercall::DOMID_SELF;
use abi::xen::io::xenbus::{STATE, state};
use spin::Mutex;

use super::block::Disk;
use super::event_channel::Platform;
use super::grant_table::GrantTable;
use super::hypercall::{PAGE, XenError};
use super::net::Card;
use super::xenbus::{Device, Frontend, join, parse};
use super::xenstore::{Client, RingPeer};
use super::{Domain, Xen};
use crate::block::BlockDevice;
use crate::detect::{Interface, Kind};
use crate::driver::{Driver, Event};
use crate::hal::{Hal, Nanos, SECOND};
use crate::net::NetDevice;
use crate::store::{Store, StoreError};

/// How often the ring is looked at, for a kernel that takes no upcalls.
const PERIOD: Nanos = SECOND;
/// Most events of watches in one poll.
const EVENTS: usize = 64;
/// The host's wish.
const SHUTDOWN: &[u8] = b"control/shutdown";
/// What this driver obeys there.
const FEATURES: [&[u8]; 2] = [b"control/feature-poweroff", b"control/feature-reboot"];
/// Whether a guest may end the watches that an earlier kernel left.
const MAY_RESET_WATCHES: &[u8] = b"control/platform-feature-xs_reset_watches";
/// Frontends, by type and number.
const DEVICES: &[u8] = b"device";
/// Types of devices there, and what they are called here.
const TYPES: [(&str, &str); 2] = [(DISK, "xbf"), (CARD, "xnf")];
const DISK: &str = "vbd";
const CARD: &str = "vif";

/// The device.
pub(crate) struct Xen0<'h> {
    domain: Arc<Domain<'h>>,
    devices: Vec<Device<'h>>,
    /// Devices of each of [`TYPES`] so far, for their names.
    counts: [usize; TYPES.len()],
    port: u32,
    features: u32,
    /// XenStore has failed for good.
    is_over: bool,
}

impl<'h> Xen0<'h> {
    /// Places the shared info and opens XenStore.
    pub fn attach(hal: &'h dyn Hal, interface: &Interface) -> Result<Xen0<'h>, XenError> {
        let platform = Arc::new(Platform::new(hal, interface)?);
        let features = platform.hypervisor.features()?;
        let (page, port) = (platform.hypervisor.parameter(param::STORE_PFN)?, platform.hypervisor.parameter(param::STORE_EVTCHN)?);
        let port = u32::try_from(port).ok().filter(|port| *port != 0).ok_or(XenError::NoStore)?;
        let page = page.checked_mul(PAGE).filter(|page| *page != 0).ok_or(XenError::NoStore)?;
        let ring = RingPeer::new(Arc::clone(&platform), hal.map(page, 1)?, port);
        platform.listen(port)?;
        // Requests do not have the numbers of an earlier kernel's, whose answers may still come. The lowest bits of the time differ most.
        let [a, b, c, d, ..] = hal.now().to_le_bytes();
        let domain = Domain {
            grants: Mutex::new(GrantTable::new(Arc::clone(&platform))),
            platform,
            store: Mutex::new(Client::new(ring, u32::from_le_bytes([a, b, c, d]))),
            disks: Mutex::default(),
            cards: Mutex::default(),
        };
        let mut xen0 = Xen0 { domain: Arc::new(domain), devices: Vec::new(), counts: [0; TYPES.len()], port, features, is_over: false };
        xen0.subscribe().map_err(|_| XenError::NoStore)?;
        Ok(xen0)
    }

    /// The rest of its line, as OpenBSD has it.
    pub fn about(&self) -> String {
        let frames = self.domain.grants.lock().max_frames();
        format!(": features {:#x}, {frames} grant table frames, event channel {}", self.features, self.port)
    }

    /// The event channel of its store.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// The domain, for others.
    pub fn xen(&self) -> Xen<'h> {
        Xen(Arc::clone(&self.domain))
    }

    /// Tells the host what is obeyed, and asks to be told of what happens.
    fn subscribe(&mut self) -> Result<(), StoreError> {
        let mut store = self.domain.store.lock();
        if store.read(MAY_RESET_WATCHES).is_ok_and(|value| value == b"1") {
            store.reset_watches()?;
        }
        for feature in FEATURES {
            // A host that does not let us say so does not ask either.
            if let Err(error @ (StoreError::Timeout | StoreError::Transport(_))) = store.write(feature, b"1") {
                return Err(error);
            }
        }
        store.watch(SHUTDOWN, SHUTDOWN)?;
        store.watch(DEVICES, DEVICES)
    }

    /// Does what watches told; `true` when there may be more.
    fn follow(&mut self, events: &mut Vec<Event>) -> Result<bool, StoreError> {
        let domain = Arc::clone(&self.domain);
        for _ in 0..EVENTS {
            let mut store = domain.store.lock();
            let event = match store.next_event(Some(0)) {
                Ok(event) => event,
                Err(StoreError::Timeout) => return Ok(false),
                Err(error) => return Err(error),
            };
            if event.token == SHUTDOWN {
                events.extend(shutdown(&mut store)?);
            } else if event.token == DEVICES {
                if tells_of_devices(&event.path) {
                    self.scan(&mut store, events)?;
                }
            } else if let Some(device) = self.devices.iter_mut().find(|device| device.path == event.token) {
                events.extend(device.backend_changed(&mut store)?.map(Event::Message));
            }
        }
        Ok(true)
    }

    /// Compares the devices there are with those that are known.
    fn scan(&mut self, store: &mut Client<RingPeer<'h>>, events: &mut Vec<Event>) -> Result<(), StoreError> {
        let mut present = Vec::new();
        for at in 0..TYPES.len() {
            let directory = join(DEVICES, TYPES.get(at).map_or("", |(name, _)| name));
            let names = match store.list(&directory) {
                Ok(names) => names,
                Err(StoreError::NotFound) => Vec::new(),
                Err(error) => return Err(error),
            };
            present.extend(names.iter().map(|name| (at, [directory.as_slice(), b"/", name].concat())));
        }
        while let Some(gone) = self.devices.iter().position(|device| present.iter().all(|(_, path)| *path != device.path)) {
            self.detach(gone, store, events);
        }
        for (kind, path) in present {
            // Only who says Initialising is waiting for a driver.
            if number(store, &join(&path, STATE))? != Some(u64::from(state::INITIALISING)) {
                continue;
            }
            match self.devices.iter().position(|device| device.path == path) {
                Some(known) if self.devices.get(known).is_some_and(Device::is_new) => continue,
                // Another device in the same place.
                Some(known) => self.detach(known, store, events),
                None => {}
            }
            self.add(kind, path, store)?;
        }
        Ok(())
    }

    /// Attaches the device in the directory `path`, if there is all that it takes.
    fn add(&mut self, kind: usize, path: Vec<u8>, store: &mut Client<RingPeer<'h>>) -> Result<(), StoreError> {
        let Ok(backend) = store.read(&join(&path, "backend")) else { return Ok(()) };
        let Some(id) = number(store, &join(&path, "backend-id"))?.and_then(|id| u16::try_from(id).ok().filter(|id| *id < DOMID_SELF))
        else {
            return Ok(());
        };
        let (Some((directory, prefix)), Some(count)) = (TYPES.get(kind), self.counts.get_mut(kind)) else { return Ok(()) };
        let name = format!("{prefix}{count}");
        let frontend: Box<dyn Frontend + 'h> = match *directory {
            DISK => Box::new(Disk::new(&name, &self.domain, id)),
            _ => Box::new(Card::new(&name, &self.domain, id)),
        };
        *count += 1;
        self.devices.push(Device::new(name, path, backend, frontend, store)?);
        Ok(())
    }

    fn detach(&mut self, at: usize, store: &mut Client<RingPeer<'h>>, events: &mut Vec<Event>) {
        let device = self.devices.remove(at);
        events.push(Event::Message(format!("{} detached", device.name)));
        device.detach(store);
    }
}

impl<'h> Driver<'h> for Xen0<'h> {
    fn poll(&mut self, now: Nanos, events: &mut Vec<Event>) -> Option<Nanos> {
        let is_swept = self.domain.grants.lock().sweep();
        if self.is_over {
            return (!is_swept).then(|| now.saturating_add(PERIOD));
        }
        match self.follow(events) {
            Ok(true) => Some(now),
            // A host that is only slow tells of it again by the next event.
            Ok(false) | Err(StoreError::Timeout) => Some(now.saturating_add(PERIOD)),
            Err(error) => {
                self.is_over = matches!(error, StoreError::Transport(_));
                events.push(Event::Message(format!("xen0: XenStore: {error}")));
                Some(now.saturating_add(PERIOD)).filter(|_| !self.is_over)
            }
        }
    }

    fn takes_upcalls(&self) -> bool {
        true
    }

    fn store(&self) -> Option<Box<dyn Store + 'h>> {
        Some(Box::new(self.xen().store()))
    }

    fn disks(&self) -> Vec<Arc<dyn BlockDevice + 'h>> {
        self.domain.disks.lock().clone()
    }

    fn cards(&self) -> Vec<Arc<dyn NetDevice + 'h>> {
        self.domain.cards.lock().clone()
    }
}

/// Takes the host's wish out of the store, which is its acknowledgement.
fn shutdown(store: &mut Client<RingPeer<'_>>) -> Result<Option<Event>, StoreError> {
    let taken = store.transaction(|transaction| {
        let wish = transaction.read(SHUTDOWN)?;
        if !wish.is_empty() {
            transaction.write(SHUTDOWN, b"")?;
        }
        Ok(wish)
    });
    Ok(match taken {
        Ok(wish) => match wish.as_slice() {
            b"" => None,
            b"poweroff" | b"halt" => Some(Event::Shutdown(Kind::Xen)),
            b"reboot" => Some(Event::Reboot(Kind::Xen)),
            other => Some(Event::Message(format!("xen0: the host asks for \"{}\", which is not obeyed", other.escape_ascii()))),
        },
        Err(StoreError::NotFound) => None,
        Err(error) => return Err(error),
    })
}

/// Whether an event at `path`, below [`DEVICES`], may be about a device that came or went: one of the directories, or a frontend's state.
fn tells_of_devices(path: &[u8]) -> bool {
    let depth = path.iter().filter(|byte| **byte == b'/').count();
    depth <= 2 || path.ends_with(STATE.as_bytes())
}

/// The number at `path`, if there is one.
fn number(store: &mut Client<RingPeer<'_>>, path: &[u8]) -> Result<Option<u64>, StoreError> {
    match store.read(path) {
        Ok(text) => Ok(parse(&text)),
        Err(StoreError::NotFound | StoreError::Denied) => Ok(None),
        Err(error) => Err(error),
    }
}
