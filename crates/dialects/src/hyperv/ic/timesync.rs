//! Time: the host's time of day for the guest, once when it is ready to take it and whenever the host wants, and in between as samples that the guest may
//! steer its clock by (`/dev/ptp_hyperv` of Linux).

use std::sync::{Arc, Mutex};

use abi::hyperv::ic::{EPOCH_DELTA, TimeSync as Body, TimeSync3, Version, kind, timesync, version};
use abi::hyperv::vmbus::guid;
use vmm::time::Timers;
use zerocopy::IntoBytes;

use super::{Component, Identity, Next, Peer, Service, lock};

/// Nanoseconds between samples. Linux believes one for ten minutes (`HOST_TIMESYNC_DELAY_THRESH` of `drivers/hv/hv_util.c`).
const PERIOD: u64 = 30_000_000_000;
/// Units of 100 ns.
const UNIT: u64 = 100;

/// The time component of a guest.
#[derive(Clone)]
pub struct TimeSync {
    state: Arc<Mutex<State>>,
    timers: Arc<Timers>,
    bell: Peer,
}

#[derive(Default)]
struct State {
    version: Option<Version>,
    /// The guest shall set its clock.
    wanted: bool,
    next: u64,
}

impl TimeSync {
    /// A component whose thread wakes by `bell`.
    pub fn new(timers: &Arc<Timers>, bell: Peer) -> TimeSync {
        TimeSync { state: Arc::default(), timers: Arc::clone(timers), bell }
    }

    /// The device.
    pub fn device(&self) -> Component<TimeSync> {
        Component::new(self.clone(), &self.timers, Arc::clone(&self.bell))
    }

    /// Tells the guest to set its clock; whether it has a driver for that.
    pub fn request(&self) -> bool {
        let has_driver = {
            let mut state = lock(&self.state);
            state.wanted |= state.version.is_some();
            state.wanted
        };
        (self.bell)();
        has_driver
    }

    fn body(&self, version: Version, flags: u8, now: u64) -> Vec<u8> {
        let wall = u64::try_from(self.timers.clock().wall().as_nanos()).unwrap_or(u64::MAX) / UNIT;
        let host_time = wall.saturating_add(EPOCH_DELTA).into();
        if version == version::TIMESYNC_4 {
            // The partition's reference counter is the machine's clock.
            let reference_time = (now / UNIT).into();
            return Body { host_time, reference_time, flags, leap_flags: 0, stratum: 0, reserved: [0; 5] }.as_bytes().to_vec();
        }
        TimeSync3 { host_time, guest_time: 0.into(), round_trip_time: 0.into(), flags }.as_bytes().to_vec()
    }
}

impl Service for TimeSync {
    const IDENTITY: Identity =
        Identity { class: guid::TIMESYNC, instance: guid::TIMESYNC_INSTANCE, kind: kind::TIMESYNC, versions: &version::TIMESYNC };

    fn ready(&mut self, version: Version, _now: u64) {
        *lock(&self.state) = State { version: Some(version), wanted: true, next: 0 };
    }

    fn next(&mut self, now: u64) -> Next {
        let mut state = lock(&self.state);
        let Some(version) = state.version else { return Next::Wait(None) };
        let flags = match std::mem::take(&mut state.wanted) {
            true => timesync::SYNC,
            false if state.next <= now => timesync::SAMPLE,
            false => return Next::Wait(Some(state.next)),
        };
        state.next = now + PERIOD;
        Next::Ask(self.body(version, flags, now))
    }

    fn answered(&mut self, _status: u32, _body: &[u8], _now: u64) {}

    fn gone(&mut self) {
        *lock(&self.state) = State::default();
    }
}
