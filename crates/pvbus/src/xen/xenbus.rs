//! Frontends in XenStore: a device's two directories, its backend's state as a watch tells it, and what the device's driver does at each step of
//! the [`negotiation`](super::negotiation).
//!
//! ```text
//!   xen0 --a watch tells--> Device --the backend's state--> negotiation::Frontend --a step--> trait Frontend: xbf, xnf
//!                             +--keys and state, in one transaction--> the frontend's directory
//! ```

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use abi::xen::io::xenbus::{STATE, state};

use super::hypercall::XenError;
use super::negotiation::{self, FrontendStep};
use super::xenstore::{Client, RingPeer};
use crate::hal::HalError;
use crate::store::{Store, StoreError};

/// What a kind of device does in the negotiation.
pub(super) trait Frontend: Send {
    /// Chooses of what the backend offers, makes rings and ports, and tells the keys by which the backend finds them.
    fn publish(&mut self, keys: &mut Keys<'_, '_>) -> Result<Published, XenbusError>;

    /// Takes what the backend tells of itself, and begins to work; the rest of the line for the message buffer.
    fn connect(&mut self, keys: &mut Keys<'_, '_>) -> Result<String, XenbusError>;

    /// What the backend tells of itself may have changed; the rest of the line for the message buffer, if it has.
    fn review(&mut self, keys: &mut Keys<'_, '_>) -> Result<Option<String>, XenbusError> {
        let _ = keys;
        Ok(None)
    }

    /// Stops and gives back all it had. May be called in every state.
    fn disconnect(&mut self);
}

/// What a frontend has published.
pub(super) struct Published {
    /// Names and values.
    pub keys: Vec<(&'static str, String)>,
    /// The state that makes the backend look at them: disks say Initialised, network cards Connected, as Linux' netback reads them in that
    /// state only (`drivers/net/xen-netback/xenbus.c`, `frontend_changed`).
    pub state: u32,
}

/// A device of xenbus.
pub(super) struct Device<'h> {
    /// As the message buffer knows it.
    pub name: String,
    /// The directory, which is also the token of the watch.
    pub path: Vec<u8>,
    backend: Vec<u8>,
    state: negotiation::Frontend,
    frontend: Box<dyn Frontend + 'h>,
}

impl<'h> Device<'h> {
    /// A device whose frontend says Initialising. The watch on its backend makes the beginning.
    pub fn new(
        name: String,
        path: Vec<u8>,
        backend: Vec<u8>,
        frontend: Box<dyn Frontend + 'h>,
        store: &mut Client<RingPeer<'h>>,
    ) -> Result<Device<'h>, StoreError> {
        let device = Device { name, path, backend, state: negotiation::Frontend::Initialising, frontend };
        store.watch(&device.state_of_backend(), &device.path)?;
        Ok(device)
    }

    /// The backend's state may have changed; what the message buffer should say of it.
    pub fn backend_changed(&mut self, store: &mut Client<RingPeer<'h>>) -> Result<Option<String>, StoreError> {
        let theirs = match store.read(&self.state_of_backend()) {
            Ok(text) => parse(&text).and_then(|number| u32::try_from(number).ok()).unwrap_or(state::UNKNOWN),
            Err(StoreError::NotFound) => state::UNKNOWN,
            Err(error) => return Err(error),
        };
        let has_failed = self.state == negotiation::Frontend::Closing;
        match self.step(theirs, store) {
            Ok(Some((Published { keys, state }, line))) => {
                self.say(store, &keys, state)?;
                Ok(line.filter(|_| !has_failed).map(|line| format!("{} at xen0: {line}", self.name)))
            }
            Ok(None) => Ok(None),
            Err(error) => {
                // As Linux' xenbus_dev_fatal: the backend sees Closing, a person finds the reason.
                self.frontend.disconnect();
                self.state.close();
                let reason = [b"error/", self.path.as_slice(), b"/error"].concat();
                let _ = store.write(&reason, error.to_string().as_bytes());
                self.say(store, &[], self.state.number())?;
                Ok(Some(format!("{} at xen0: {error}", self.name)))
            }
        }
    }

    /// Does what is to be done because the backend says `theirs`; what to write to the store then, and to say.
    fn step(&mut self, theirs: u32, store: &mut Client<RingPeer<'h>>) -> Result<Option<(Published, Option<String>)>, XenbusError> {
        let mut keys = Keys { store, own: &self.path, backend: &self.backend };
        let only = |state| Published { keys: Vec::new(), state };
        Ok(match self.state.on(theirs) {
            FrontendStep::Stay => None,
            FrontendStep::Publish => Some((self.frontend.publish(&mut keys)?, None)),
            FrontendStep::Connect => Some((only(state::CONNECTED), Some(self.frontend.connect(&mut keys)?))),
            FrontendStep::Review => self.frontend.review(&mut keys)?.map(|line| (only(state::CONNECTED), Some(line))),
            FrontendStep::Close => {
                self.frontend.disconnect();
                Some((only(state::CLOSED), Some("its backend closes".to_string())))
            }
        })
    }

    /// Whether it waits for its backend's first word.
    pub fn is_new(&self) -> bool {
        self.state == negotiation::Frontend::Initialising
    }

    /// The device is gone, or the kernel has no more use for it.
    pub fn detach(mut self, store: &mut Client<RingPeer<'h>>) {
        self.frontend.disconnect();
        // With a backend that is gone the watch may be, too.
        let _ = store.unwatch(&self.state_of_backend(), &self.path);
    }

    fn say(&self, store: &mut Client<RingPeer<'h>>, keys: &[(&'static str, String)], state: u32) -> Result<(), StoreError> {
        let state = (STATE, state.to_string());
        store.transaction(|transaction| {
            for (name, value) in keys.iter().chain([&state]) {
                transaction.write(&join(&self.path, name), value.as_bytes())?;
            }
            Ok(())
        })
    }

    fn state_of_backend(&self) -> Vec<u8> {
        join(&self.backend, STATE)
    }
}

/// Keys in a device's two directories.
pub(super) struct Keys<'a, 'h> {
    store: &'a mut Client<RingPeer<'h>>,
    own: &'a [u8],
    backend: &'a [u8],
}

impl Keys<'_, '_> {
    /// The text at `name` of the frontend, which the toolstack wrote, if there is one.
    pub fn own(&mut self, name: &'static str) -> Result<Option<String>, XenbusError> {
        let text = optional(self.store.read(&join(self.own, name)))?;
        text.map(|text| String::from_utf8(text).map_err(|_| XenbusError::OwnKey(name))).transpose()
    }

    /// The number at `name` of the backend.
    pub fn number(&mut self, name: &'static str) -> Result<u64, XenbusError> {
        let text = self.store.read(&join(self.backend, name))?;
        parse(&text).ok_or(XenbusError::Key(name))
    }

    /// The number at `name` of the backend, if there is one.
    pub fn optional(&mut self, name: &'static str) -> Result<Option<u64>, XenbusError> {
        let text = optional(self.store.read(&join(self.backend, name)))?;
        text.map(|text| parse(&text).ok_or(XenbusError::Key(name))).transpose()
    }

    /// Whether the backend says that it has the feature `name`.
    pub fn has(&mut self, name: &'static str) -> Result<bool, XenbusError> {
        Ok(self.optional(name)?.is_some_and(|number| number != 0))
    }
}

/// A key that need not be there.
fn optional(value: Result<Vec<u8>, StoreError>) -> Result<Option<Vec<u8>>, StoreError> {
    match value {
        Ok(value) => Ok(Some(value)),
        Err(StoreError::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Why a frontend and its backend do not come together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum XenbusError {
    /// A key of the backend makes no sense.
    Key(&'static str),
    /// A key of the frontend, which the toolstack wrote, makes no sense.
    OwnKey(&'static str),
    /// The backend cannot do what is needed.
    Missing(&'static str),
    /// XenStore.
    Store(StoreError),
    /// The hypervisor, or memory.
    Xen(XenError),
}

impl From<StoreError> for XenbusError {
    fn from(error: StoreError) -> XenbusError {
        XenbusError::Store(error)
    }
}

impl From<XenError> for XenbusError {
    fn from(error: XenError) -> XenbusError {
        XenbusError::Xen(error)
    }
}

impl From<HalError> for XenbusError {
    fn from(error: HalError) -> XenbusError {
        XenbusError::Xen(error.into())
    }
}

impl fmt::Display for XenbusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            XenbusError::Key(name) => write!(f, "the backend's {name} makes no sense"),
            XenbusError::OwnKey(name) => write!(f, "the device's {name} makes no sense"),
            XenbusError::Missing(name) => write!(f, "the backend has no {name}"),
            XenbusError::Store(error) => write!(f, "XenStore: {error}"),
            XenbusError::Xen(error) => write!(f, "{error}"),
        }
    }
}

/// `name` in the directory `path`.
pub(super) fn join(path: &[u8], name: &str) -> Vec<u8> {
    [path, b"/", name.as_bytes()].concat()
}

/// A decimal number.
pub(super) fn parse(text: &[u8]) -> Option<u64> {
    core::str::from_utf8(text).ok()?.trim().parse().ok()
}
