//! A machine's time and its timers, injected into everything that needs either.
//!
//! Guest-visible time is nanoseconds since the machine was made. [`HostClock`] takes it from the host's monotonic clock;
//! [`StepClock`] stands still until it is told to advance, which is how the deterministic mode and the unit tests work.
//! [`Timers`] calls back when a deadline has passed: on a thread of its own ([`Timers::spawn`]), or from
//! [`Timers::run_due`] when time is stepped.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

/// Source of guest time.
pub trait Clock: Send + Sync {
    /// Nanoseconds since the machine was made. Never goes back.
    fn now(&self) -> u64;
    /// Time of day, since 1970-01-01 00:00 UTC.
    fn wall(&self) -> Duration;
    /// Moves a stepped clock forward to `now`; clocks that move by themselves ignore it.
    fn advance_to(&self, now: u64) {
        let _ = now;
    }
}

/// The host's clocks.
#[derive(Debug)]
pub struct HostClock {
    start: Instant,
}

impl HostClock {
    /// A clock that starts at zero now.
    #[allow(clippy::new_without_default)]
    pub fn new() -> HostClock {
        HostClock { start: Instant::now() }
    }
}

impl Clock for HostClock {
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn wall(&self) -> Duration {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
    }
}

/// A clock that moves only by [`Clock::advance_to`].
#[derive(Debug)]
pub struct StepClock {
    now: AtomicU64,
    /// Time of day when `now` was zero.
    epoch: Duration,
}

impl StepClock {
    /// A clock at zero, when the time of day was `epoch`.
    pub fn new(epoch: Duration) -> StepClock {
        StepClock { now: AtomicU64::new(0), epoch }
    }
}

impl Clock for StepClock {
    fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    fn wall(&self) -> Duration {
        self.epoch + Duration::from_nanos(self.now())
    }

    fn advance_to(&self, now: u64) {
        self.now.fetch_max(now, Ordering::Relaxed);
    }
}

/// Who is called when a timer is due.
pub trait TimerClient: Send + Sync {
    /// The deadline armed for `token` has passed; the timer is disarmed. May arm timers, must not block.
    fn timer_due(&self, token: u64);
}

/// All armed timers of a machine.
pub struct Timers {
    clock: Arc<dyn Clock>,
    armed: Mutex<Armed>,
    changed: Condvar,
}

#[derive(Default)]
struct Armed {
    /// (deadline, timer id), earliest first.
    queue: BTreeSet<(u64, usize)>,
    timers: Vec<Slot>,
    /// Until when the thread sleeps; `None` while it does not.
    sleeps_until: Option<u64>,
    stopped: bool,
}

struct Slot {
    client: Weak<dyn TimerClient>,
    token: u64,
    deadline: Option<u64>,
}

/// One timer of [`Timers`]; a plain handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timer(usize);

impl Timers {
    /// No timers yet, on this clock.
    pub fn new(clock: Arc<dyn Clock>) -> Arc<Timers> {
        Arc::new(Timers { clock, armed: Mutex::default(), changed: Condvar::new() })
    }

    /// The clock deadlines are measured on.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// Makes a disarmed timer that will call `client` with `token`.
    pub fn timer(&self, client: Weak<dyn TimerClient>, token: u64) -> Timer {
        let mut armed = self.lock();
        armed.timers.push(Slot { client, token, deadline: None });
        Timer(armed.timers.len() - 1)
    }

    /// Arms `timer` for `deadline` (nanoseconds of the clock), or disarms it.
    pub fn arm(&self, timer: Timer, deadline: Option<u64>) {
        let mut armed = self.lock();
        if let Some(old) = armed.timers[timer.0].deadline.take() {
            armed.queue.remove(&(old, timer.0));
        }
        if let Some(deadline) = deadline {
            armed.timers[timer.0].deadline = Some(deadline);
            armed.queue.insert((deadline, timer.0));
            // Only an earlier deadline than it sleeps for needs the thread's attention; that there is a later one instead it finds out by itself. A
            // guest arms its timer whenever it goes to sleep, and most often for later.
            if armed.sleeps_until.is_some_and(|until| deadline < until) {
                armed.sleeps_until = None;
                drop(armed);
                self.changed.notify_all();
            }
        }
    }

    /// The earliest deadline, if any timer is armed.
    pub fn next_deadline(&self) -> Option<u64> {
        self.lock().queue.first().map(|&(deadline, _)| deadline)
    }

    /// Calls the clients of all timers whose deadline has passed.
    pub fn run_due(&self) {
        while let Some((client, token)) = self.take_due() {
            client.timer_due(token);
        }
    }

    /// Starts the thread that calls clients as the host's time passes. It ends after [`Timers::stop`].
    ///
    /// # Errors
    /// When the host gives no thread.
    pub fn spawn(self: &Arc<Timers>) -> std::io::Result<std::thread::JoinHandle<()>> {
        let timers = Arc::clone(self);
        std::thread::Builder::new().name("timers".into()).spawn(move || timers.run())
    }

    /// Ends the thread of [`Timers::spawn`].
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    fn run(&self) {
        loop {
            self.run_due();
            let mut armed = self.lock();
            if armed.stopped {
                return;
            }
            let until = armed.queue.first().map_or(u64::MAX, |&(deadline, _)| deadline);
            let Some(time) = until.checked_sub(self.clock.now()).filter(|time| *time > 0) else { continue };
            armed.sleeps_until = Some(until);
            let woken = self.changed.wait_timeout(armed, Duration::from_nanos(time));
            woken.unwrap_or_else(PoisonError::into_inner).0.sleeps_until = None;
        }
    }

    fn take_due(&self) -> Option<(Arc<dyn TimerClient>, u64)> {
        let mut armed = self.lock();
        let now = self.clock.now();
        loop {
            let &(deadline, id) = armed.queue.first()?;
            if deadline > now {
                return None;
            }
            armed.queue.remove(&(deadline, id));
            let slot = &mut armed.timers[id];
            slot.deadline = None;
            if let Some(client) = slot.client.upgrade() {
                return Some((client, slot.token));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Armed> {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<u64>>);

    impl TimerClient for Recorder {
        fn timer_due(&self, token: u64) {
            self.0.lock().unwrap().push(token);
        }
    }

    #[test]
    fn due_timers_fire_in_order_and_once() {
        let clock = Arc::new(StepClock::new(Duration::ZERO));
        let timers = Timers::new(clock.clone());
        let recorder = Arc::new(Recorder::default());
        let client: Arc<dyn TimerClient> = recorder.clone();
        let late = timers.timer(Arc::downgrade(&client), 1);
        let early = timers.timer(Arc::downgrade(&client), 2);
        timers.arm(late, Some(200));
        timers.arm(early, Some(300));
        timers.arm(early, Some(100));
        timers.run_due();
        assert!(recorder.0.lock().unwrap().is_empty());
        clock.advance_to(250);
        timers.run_due();
        timers.run_due();
        assert_eq!(*recorder.0.lock().unwrap(), [2, 1]);
        assert_eq!(timers.next_deadline(), None);
    }

    #[test]
    fn thread_that_sleeps_for_a_late_timer_hears_of_an_earlier_one() {
        let clock = Arc::new(HostClock::new());
        let timers = Timers::new(clock.clone());
        let recorder = Arc::new(Recorder::default());
        let client: Arc<dyn TimerClient> = recorder.clone();
        let [late, early] = [1, 2].map(|token| timers.timer(Arc::downgrade(&client), token));
        let thread = timers.spawn().unwrap();
        let hour = clock.now() + 3_600_000_000_000;
        timers.arm(late, Some(hour));
        for rounds in 1..=100 {
            timers.arm(early, Some(hour - 1));
            timers.arm(early, Some(clock.now() + 100_000));
            while recorder.0.lock().unwrap().len() < rounds {
                std::thread::yield_now();
            }
        }
        timers.stop();
        thread.join().unwrap();
        assert_eq!(*recorder.0.lock().unwrap(), [2; 100]);
    }
}
