//! Fakes that the unit tests of several devices share.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmm::time::{Clock, StepClock, Timers};

use crate::{InterruptLine, MachineEvents};

/// An interrupt line that remembers its level and how often it rose.
#[derive(Default)]
pub(crate) struct Level {
    level: AtomicBool,
    rises: AtomicUsize,
}

impl Level {
    pub(crate) fn get(&self) -> bool {
        self.level.load(Ordering::Relaxed)
    }

    pub(crate) fn rises(&self) -> usize {
        self.rises.load(Ordering::Relaxed)
    }
}

impl InterruptLine for Level {
    fn set(&self, asserted: bool) {
        if !self.level.swap(asserted, Ordering::Relaxed) && asserted {
            self.rises.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Machine events as words.
#[derive(Default)]
pub(crate) struct Events(pub(crate) Mutex<Vec<String>>);

impl Events {
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl MachineEvents for Events {
    fn power_off(&self) {
        self.0.lock().unwrap().push("power off".into());
    }
    fn reset(&self) {
        self.0.lock().unwrap().push("reset".into());
    }
    fn debug_exit(&self, value: u32) {
        self.0.lock().unwrap().push(format!("debug exit {value}"));
    }
}

/// A clock to step, and its timers.
pub(crate) struct Time {
    pub(crate) clock: Arc<StepClock>,
    pub(crate) timers: Arc<Timers>,
}

impl Time {
    /// Starts at `wall` since the epoch.
    pub(crate) fn new(wall: Duration) -> Time {
        let clock = Arc::new(StepClock::new(wall));
        Time { timers: Timers::new(clock.clone()), clock }
    }

    pub(crate) fn advance(&self, ns: u64) {
        self.clock.advance_to(self.clock.now().saturating_add(ns));
        self.timers.run_due();
    }
}
