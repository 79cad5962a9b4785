//! How a frontend finds together with its backend through XenStore (`io/xenbus.h`).
//!
//! Each half writes its state to its own directory and follows the other's by a watch. [`Negotiation`] is the frontend's side:
//!
//! ```text
//!   backend             frontend
//!   2 InitWait          reads what there is to choose from, publishes rings and ports  --> 3 Initialised
//!   4 Connected         reads what it is connected with                                --> 4 Connected
//!   5 Closing, 6, gone  lets go of everything                                          --> 6 Closed
//! ```
//!
//! Whatever else a backend says changes nothing, and after Closed there is no way back: a device that comes again is a new one.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use abi::xen::io::xenbus::{STATE, state};

use super::hypercall::XenError;
use super::xenstore::{Client, RingPeer};
use crate::hal::HalError;
use crate::store::{Store, StoreError};

/// The frontend's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Negotiation {
    /// It waits for the backend to offer.
    Initialising,
    /// It has published what the backend needs.
    Initialised,
    /// It works.
    Connected,
    /// It has ended.
    Closed,
}

/// What a frontend has to do because of the backend's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing.
    Stay,
    /// To publish rings and ports.
    Publish,
    /// To read what it is connected with.
    Connect,
    /// To let go of everything.
    Close,
}

impl Negotiation {
    /// The backend says `theirs`.
    pub fn on(&mut self, theirs: u32) -> Step {
        let (next, step) = match (*self, theirs) {
            (Negotiation::Initialising, state::INIT_WAIT) => (Negotiation::Initialised, Step::Publish),
            (Negotiation::Initialised, state::CONNECTED) => (Negotiation::Connected, Step::Connect),
            (Negotiation::Initialised | Negotiation::Connected, state::UNKNOWN | state::CLOSING | state::CLOSED)
            | (Negotiation::Initialising, state::CLOSING | state::CLOSED) => (Negotiation::Closed, Step::Close),
            (same, _) => (same, Step::Stay),
        };
        *self = next;
        step
    }

    /// As the store has it.
    const fn number(self) -> u32 {
        match self {
            Negotiation::Initialising => state::INITIALISING,
            Negotiation::Initialised => state::INITIALISED,
            Negotiation::Connected => state::CONNECTED,
            Negotiation::Closed => state::CLOSED,
        }
    }
}

/// What a kind of device does in the negotiation.
pub(super) trait Frontend: Send {
    /// Makes rings and ports, and tells the keys by which the backend finds them.
    fn publish(&mut self) -> Result<Vec<(&'static str, String)>, XenbusError>;

    /// Takes what the backend tells of itself, and begins to work; the rest of the line for the message buffer.
    fn connect(&mut self, backend: &mut Keys<'_, '_>) -> Result<String, XenbusError>;

    /// Stops and gives back all it had. May be called in every state.
    fn disconnect(&mut self);
}

/// A device of xenbus.
pub(super) struct Device<'h> {
    /// As the message buffer knows it.
    pub name: String,
    /// The directory, which is also the token of the watch.
    pub path: Vec<u8>,
    backend: Vec<u8>,
    state: Negotiation,
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
        let device = Device { name, path, backend, state: Negotiation::Initialising, frontend };
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
        let done = match self.state.on(theirs) {
            Step::Stay => return Ok(None),
            Step::Publish => self.frontend.publish().map(|keys| (keys, None)),
            Step::Connect => {
                let mut keys = Keys { store, path: &self.backend };
                self.frontend.connect(&mut keys).map(|line| (Vec::new(), Some(format!("{} at xen0: {line}", self.name))))
            }
            Step::Close => {
                self.frontend.disconnect();
                Ok((Vec::new(), Some(format!("{} at xen0: its backend closes", self.name))))
            }
        };
        match done {
            Ok((keys, line)) => {
                self.say(store, &keys, self.state.number())?;
                Ok(line)
            }
            Err(error) => {
                // As Linux' xenbus_dev_fatal: the backend sees Closing, a person finds the reason.
                self.frontend.disconnect();
                self.state = Negotiation::Closed;
                let reason = [b"error/", self.path.as_slice(), b"/error"].concat();
                let _ = store.write(&reason, error.to_string().as_bytes());
                self.say(store, &[], state::CLOSING)?;
                Ok(Some(format!("{} at xen0: {error}", self.name)))
            }
        }
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

/// The backend's directory.
pub(super) struct Keys<'a, 'h> {
    store: &'a mut Client<RingPeer<'h>>,
    path: &'a [u8],
}

impl Keys<'_, '_> {
    /// The number at `name`.
    pub fn number(&mut self, name: &'static str) -> Result<u64, XenbusError> {
        let text = self.store.read(&join(self.path, name))?;
        parse(&text).ok_or(XenbusError::Key(name))
    }

    /// Whether the backend says that it has the feature `name`.
    pub fn has(&mut self, name: &'static str) -> Result<bool, XenbusError> {
        match self.number(name) {
            Err(XenbusError::Store(StoreError::NotFound)) => Ok(false),
            number => Ok(number? != 0),
        }
    }
}

/// Why a frontend and its backend do not come together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum XenbusError {
    /// A key of the backend makes no sense.
    Key(&'static str),
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What a frontend does about a sequence of a backend's states.
    fn steps<const N: usize>(theirs: [u32; N]) -> [Step; N] {
        let mut negotiation = Negotiation::Initialising;
        theirs.map(|theirs| negotiation.on(theirs))
    }

    #[test]
    fn frontend_publishes_connects_and_closes() {
        use state::{CLOSED, CLOSING, CONNECTED, INIT_WAIT, INITIALISING};
        assert_eq!(
            steps([INITIALISING, INIT_WAIT, INIT_WAIT, CONNECTED, CONNECTED, CLOSING, CLOSED]),
            [Step::Stay, Step::Publish, Step::Stay, Step::Connect, Step::Stay, Step::Close, Step::Stay]
        );
    }

    #[test]
    fn states_that_jump_do_nothing_twice_and_nothing_out_of_order() {
        // All sequences of five states, with one that does not exist.
        for sequence in 0..10_u32.pow(5) {
            let mut negotiation = Negotiation::Initialising;
            let taken: Vec<Step> =
                (0..5).map(|at| negotiation.on(sequence / 10_u32.pow(at) % 10)).filter(|step| *step != Step::Stay).collect();
            let all = [Step::Publish, Step::Connect, Step::Close];
            assert!(all.starts_with(&taken) || taken == [Step::Close] || taken == [Step::Publish, Step::Close], "{sequence:05}: {taken:?}");
        }
    }
}
