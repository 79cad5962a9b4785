//! The port of QEMU's `hyperv-testdev`, for test suites that bring no VMBus: kvm-unit-tests' `hyperv_synic` and `hyperv_connections`.
//!
//! QEMU `hw/hyperv/hyperv_testdev.c`: a 32-bit word written to port 0x3000 is, from its lowest byte, interrupt source, processor, [`command`] and
//! connection. A message that is posted to a connection of this device comes back to its source, a signal as the event flag with the connection's number.
//! Commands that make no sense do nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use abi::hyperv::hypercall::Status;

use super::connections::Synic;
use super::{Hyperv, lock};

/// The port, four bytes wide.
pub(super) const PORT: u16 = 0x3000;

/// Commands (`HV_TEST_DEV_*`).
mod command {
    /// The source may be raised.
    pub const ROUTE_CREATE: u8 = 1;
    /// And no more.
    pub const ROUTE_DESTROY: u8 = 2;
    /// Interrupt by the source.
    pub const RAISE: u8 = 3;
    /// A connection for messages.
    pub const MESSAGES_CREATE: u8 = 4;
    /// Its end.
    pub const MESSAGES_DESTROY: u8 = 5;
    /// A connection for events.
    pub const EVENTS_CREATE: u8 = 6;
    /// Its end.
    pub const EVENTS_DESTROY: u8 = 7;
}

/// An interrupt source of a processor.
type Route = (u8, u8);

/// The device.
#[derive(Default)]
pub(super) struct TestDevice(Mutex<State>);

#[derive(Default)]
struct State {
    routes: BTreeSet<Route>,
    messages: BTreeMap<u8, Route>,
    events: BTreeMap<u8, Route>,
}

impl TestDevice {
    /// A word was written to the port.
    pub fn command(&self, word: u32, hyperv: &Hyperv) {
        let [sint, vp, command, connection] = word.to_le_bytes();
        let route = (vp, sint);
        let mut state = lock(&self.0);
        match command {
            command::ROUTE_CREATE => drop(state.routes.insert(route)),
            command::ROUTE_DESTROY => drop(state.routes.remove(&route)),
            command::RAISE if state.routes.contains(&route) => hyperv.raise(vp.into(), sint),
            command::MESSAGES_CREATE => drop(state.messages.insert(connection, route)),
            command::MESSAGES_DESTROY => drop(state.messages.remove(&connection)),
            command::EVENTS_CREATE => drop(state.events.insert(connection, route)),
            command::EVENTS_DESTROY => drop(state.events.remove(&connection)),
            _ => {}
        }
    }

    /// A message at a connection; `None` when that is not the device's.
    pub fn post_message(&self, connection: u32, kind: u32, payload: &[u8], synic: &dyn Synic) -> Option<Status> {
        let (vp, sint) = *lock(&self.0).messages.get(&u8::try_from(connection).ok()?)?;
        Some(if synic.post_message(vp.into(), sint, kind, payload) { Status::SUCCESS } else { Status::INSUFFICIENT_BUFFERS })
    }

    /// An event at a connection; `None` when that is not the device's.
    pub fn signal_event(&self, connection: u32, synic: &dyn Synic) -> Option<Status> {
        let flag = u8::try_from(connection).ok()?;
        let (vp, sint) = *lock(&self.0).events.get(&flag)?;
        synic.signal_event(vp.into(), sint, flag.into());
        Some(Status::SUCCESS)
    }

    /// Forgets everything.
    pub fn reset(&self) {
        *lock(&self.0) = State::default();
    }
}
