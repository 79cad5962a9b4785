//! Heartbeat: whether the guest's kernel still answers.

use std::sync::{Arc, Mutex};

use abi::hyperv::ic::{Heartbeat as Body, Version, kind, version};
use abi::hyperv::vmbus::guid;
use vmm::time::Timers;
use zerocopy::IntoBytes;

use super::{Component, Identity, Next, Peer, Service, lock};

/// Nanoseconds from one beat to the next, as Hyper-V's hosts have it.
const PERIOD: u64 = 2_000_000_000;
/// A guest that has not answered for so long is not well.
const PATIENCE: u64 = 5 * PERIOD;

/// How the guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pulse {
    /// It has no driver for this.
    None,
    /// It answers.
    Beating,
    /// It has not answered for this many nanoseconds.
    Lost(u64),
}

/// The heartbeat of a guest.
#[derive(Clone, Default)]
pub struct Heartbeat(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// When the guest answered last, while it has a driver.
    last: Option<u64>,
    next: u64,
    sequence: u64,
}

impl Heartbeat {
    /// The device.
    pub fn device(&self, timers: &Arc<Timers>, bell: Peer) -> Component<Heartbeat> {
        Component::new(self.clone(), timers, bell)
    }

    /// How the guest is at this time of the machine's clock.
    pub fn pulse(&self, now: u64) -> Pulse {
        match lock(&self.0).last.map(|last| now.saturating_sub(last)) {
            None => Pulse::None,
            Some(age) if age > PATIENCE => Pulse::Lost(age),
            Some(_) => Pulse::Beating,
        }
    }
}

impl Service for Heartbeat {
    const IDENTITY: Identity =
        Identity { class: guid::HEARTBEAT, instance: guid::HEARTBEAT_INSTANCE, kind: kind::HEARTBEAT, versions: &version::HEARTBEAT };

    fn ready(&mut self, _version: Version, now: u64) {
        let mut state = lock(&self.0);
        state.last = Some(now);
        state.next = now;
    }

    fn next(&mut self, now: u64) -> Next {
        let mut state = lock(&self.0);
        if now < state.next {
            return Next::Wait(Some(state.next));
        }
        state.next = now + PERIOD;
        state.sequence += 1;
        Next::Ask(Body { sequence: state.sequence.into(), ..Body::default() }.as_bytes().to_vec())
    }

    fn answered(&mut self, _status: u32, _body: &[u8], now: u64) {
        lock(&self.0).last = Some(now);
    }

    fn gone(&mut self) {
        lock(&self.0).last = None;
    }
}
