//! Key/value pairs: the machine's store as Hyper-V's pools, see [`abi::hyperv::kvp`].
//!
//! ```text
//!   store                                   pool
//!   vm-data/a/b   (keys for guests)  -----> External       a.b, named as guestinfo's keys are
//!   facts about the machine          -----> AutoExternal   VirtualMachineName, ...
//!   data/hyperv/Guest/a/b            <----- Guest          what the guest has to say
//!   data/hyperv/Auto/OSName          <----- Auto           what its daemon tells about it
//! ```
//!
//! The guest cannot begin an exchange: its pools are enumerated every few seconds, and the pool Guest more often at first and after the guest was
//! told something, as it may have an answer. What is in its External pool from an earlier time, and not in the
//! store, is deleted when it connects. A pool holds text with less than 256 letters of key and 1024 of value (UTF-16): a key of the store that is
//! longer, or no text, is not there for the guest.

mod record;
mod view;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use abi::hyperv::ic::{Version, kind, status, version};
use abi::hyperv::kvp::pool;
use abi::hyperv::vmbus::guid;
use vmm::time::Timers;

use super::{Component, Identity, Next, Peer, Service};
use crate::store::{Store, VM_DATA, WatchId};
use record::Request;
pub use view::REPORTS;

/// Nanoseconds between two enumerations of the guest's pools.
const PERIOD: u64 = 5_000_000_000;
/// Nanoseconds until the pool Guest is enumerated when the guest was told something; from there on they double, up to [`PERIOD`].
const SOON: u64 = 100_000_000;
/// More keys of a pool are not asked for.
const MAX_KEYS: u32 = 1024;

/// What the host tells about the machine, in the pool AutoExternal.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts(pub Vec<(&'static str, String)>);

/// The key/value component of a guest.
pub struct Kvp {
    store: Arc<dyn Store>,
    watch: Option<WatchId>,
    /// The store has changed since it was compared with what the guest was told.
    is_changed: Arc<AtomicBool>,
    facts: Facts,
    /// What the guest was told: pool and key, value.
    told: BTreeMap<(u8, String), String>,
    /// It did not take something.
    has_refused: bool,
    /// What it is to be told.
    queue: VecDeque<Request>,
    /// The request that waits for its answer.
    asked: Option<Request>,
    walks: VecDeque<Walk>,
    next_walk: u64,
    /// Nanoseconds from the next walk to the one after it.
    pause: u64,
    /// When the pool Auto is due, which costs a daemon more than the others.
    next_auto: u64,
}

/// An enumeration of one of the guest's pools.
struct Walk {
    pool: u8,
    index: u32,
    seen: BTreeSet<String>,
}

impl Walk {
    fn of(pool: u8) -> Walk {
        Walk { pool, index: 0, seen: BTreeSet::new() }
    }
}

impl Kvp {
    /// A view on `store`, whose changes ring `bell`.
    pub fn new(store: Arc<dyn Store>, facts: Facts, bell: Peer) -> Kvp {
        let is_changed = Arc::new(AtomicBool::new(true));
        let flag = Arc::clone(&is_changed);
        let observer = move |_: &str| {
            flag.store(true, Ordering::Release);
            bell();
        };
        // The path is one; without a watch the guest would still learn of changes, only later.
        let watch = store.watch(VM_DATA, Arc::new(observer)).ok();
        let (told, queue, walks) = Default::default();
        let (next_walk, next_auto, pause) = (0, 0, SOON);
        Kvp { store, watch, is_changed, facts, told, has_refused: false, queue, asked: None, walks, next_walk, pause, next_auto }
    }

    /// The device.
    pub fn device(self, timers: &Arc<Timers>, bell: Peer) -> Component<Kvp> {
        Component::new(self, timers, bell)
    }

    /// What the guest should know.
    fn wanted(&self) -> BTreeMap<(u8, String), String> {
        let facts = self.facts.0.iter().map(|(key, value)| ((pool::AUTO_EXTERNAL, (*key).to_owned()), value.clone()));
        let keys = view::keys_for_guest(self.store.as_ref()).into_iter().map(|(key, value)| ((pool::EXTERNAL, key), value));
        facts.chain(keys).filter(|((_, key), value)| record::fits(key, value)).collect()
    }

    /// Fills the queue with the difference of what the guest should know and what it was told.
    fn compare(&mut self) {
        let wanted = self.wanted();
        for (pool, key) in self.told.keys().filter(|key| !wanted.contains_key(key)) {
            self.queue.push_back(Request::Delete { pool: *pool, key: key.clone() });
        }
        for ((pool, key), value) in wanted {
            if self.told.get(&(pool, key.clone())) != Some(&value) {
                self.queue.push_back(Request::Set { pool, key, value });
            }
        }
    }

    fn next_request(&mut self, now: u64) -> Option<Request> {
        if let Some(walk) = self.walks.front() {
            return Some(Request::Enumerate { pool: walk.pool, index: walk.index });
        }
        if self.queue.is_empty() && self.is_changed.swap(false, Ordering::AcqRel) {
            self.compare();
        }
        if let Some(request) = self.queue.pop_front() {
            return Some(request);
        }
        if now < self.next_walk {
            return None;
        }
        self.next_walk = now + self.pause;
        self.pause = PERIOD.min(2 * self.pause);
        // Its daemon may have been busy.
        self.is_changed.fetch_or(std::mem::take(&mut self.has_refused), Ordering::AcqRel);
        self.walks.push_back(Walk::of(pool::GUEST));
        if now >= self.next_auto {
            self.next_auto = now + PERIOD;
            self.walks.push_back(Walk::of(pool::AUTO));
        }
        Some(Request::Enumerate { pool: pool::GUEST, index: 0 })
    }

    /// The answer to an enumeration.
    fn walked(&mut self, verdict: u32, body: &[u8]) {
        let Some(walk) = self.walks.front_mut() else { return };
        let pair = if verdict == status::OK { record::enumerated(body) } else { None };
        if let Some((key, value)) = pair {
            walk.index += 1;
            let path = view::report(self.store.as_ref(), walk.pool, &key, &value);
            walk.seen.insert(path.unwrap_or(key));
            if walk.index < MAX_KEYS {
                return;
            }
        }
        let Some(walk) = self.walks.pop_front() else { return };
        match walk.pool {
            // What it knows from an earlier time has been told, too, and is compared as such.
            pool::EXTERNAL => self.told.extend(walk.seen.into_iter().map(|key| ((pool::EXTERNAL, key), String::new()))),
            pool if verdict == status::NO_MORE_ITEMS => view::forget_others(self.store.as_ref(), pool, &walk.seen),
            // The daemon is not there, or the pool is larger than we look: nothing is known to be gone.
            _ => {}
        }
    }
}

impl Service for Kvp {
    const IDENTITY: Identity = Identity { class: guid::KVP, instance: guid::KVP_INSTANCE, kind: kind::KVP, versions: &version::KVP };

    fn ready(&mut self, _version: Version, now: u64) {
        self.is_changed.store(true, Ordering::Release);
        self.walks = [Walk::of(pool::EXTERNAL)].into();
        (self.next_walk, self.next_auto, self.pause) = (now, now, SOON);
    }

    fn next(&mut self, now: u64) -> Next {
        let Some(request) = self.next_request(now) else { return Next::Wait(Some(self.next_walk)) };
        let body = request.to_bytes();
        self.asked = Some(request);
        Next::Ask(body)
    }

    fn answered(&mut self, status: u32, body: &[u8], now: u64) {
        let verdict = record::verdict(status, body);
        match (self.asked.take(), verdict) {
            (Some(Request::Enumerate { .. }), _) => self.walked(verdict, body),
            (Some(Request::Set { pool, key, value }), status::OK) => {
                self.told.insert((pool, key), value);
                (self.next_walk, self.pause) = (self.next_walk.min(now + SOON), SOON);
            }
            (Some(Request::Delete { pool, key }), _) => {
                self.told.remove(&(pool, key));
            }
            (Some(Request::Set { pool, key, .. }), status) => {
                tracing::debug!(pool, key, status, "hyperv: the guest does not take a key");
                self.has_refused = true;
            }
            (None, _) => {}
        }
    }

    fn gone(&mut self) {
        self.told.clear();
        self.queue.clear();
        self.walks.clear();
        self.asked = None;
    }
}

impl Drop for Kvp {
    fn drop(&mut self) {
        if let Some(watch) = self.watch {
            self.store.unwatch(watch);
        }
    }
}
