//! A synthetic timer as a state machine (TLFS 12.3): what is written to its registers, and what happens as time passes.
//!
//! ```text
//!   write --> Idle | Running(due) --time--> Expired(due) --delivered--> Running(next) (periodic) | Idle, no longer enabled (once)
//! ```
//!
//! An expired timer that sends a message stays so until the message has found its slot empty: there is never more than one message of a timer.

use abi::hyperv::msr::stimer;

/// Shortest period in 100 ns, as Linux KVM has for periodic timers of the local APIC (`min_timer_period_us`). A guest that asks for less gets this.
const MIN_PERIOD: u64 = 2_000;

/// One timer.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stimer {
    config: u64,
    count: u64,
    phase: Phase,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    /// Until this reference time.
    Running(u64),
    /// Since then, and the guest does not know.
    Expired(u64),
}

/// How a guest learns that a timer has expired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notice {
    /// By this vector of the local APIC.
    Vector(u8),
    /// By a message at this interrupt source.
    Message(u8),
}

impl Stimer {
    pub fn config(&self) -> u64 {
        self.config
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    /// STIMER_CONFIG.
    pub fn set_config(&mut self, config: u64, now: u64) {
        let mut config = config & stimer::DEFINED;
        if config & stimer::DIRECT == 0 && config >> stimer::SINT_SHIFT == 0 {
            // Source 0 takes no messages of timers.
            config &= !stimer::ENABLE;
        }
        self.config = config;
        self.start(now);
    }

    /// STIMER_COUNT.
    pub fn set_count(&mut self, count: u64, now: u64) {
        self.count = count;
        if count == 0 {
            self.config &= !stimer::ENABLE;
        } else if self.config & stimer::AUTO_ENABLE != 0 {
            self.set_config(self.config | stimer::ENABLE, now);
            return;
        }
        self.start(now);
    }

    /// When it expires.
    pub fn due(&self) -> Option<u64> {
        match self.phase {
            Phase::Running(due) => Some(due),
            Phase::Idle | Phase::Expired(_) => None,
        }
    }

    /// When it expired and how that is to be told, if it has and was not yet.
    pub fn expired(&mut self, now: u64) -> Option<(u64, Notice)> {
        if let Phase::Running(due) = self.phase
            && due <= now
        {
            self.phase = Phase::Expired(due);
        }
        let Phase::Expired(at) = self.phase else { return None };
        let notice = match self.config & stimer::DIRECT != 0 {
            true => Notice::Vector((self.config >> stimer::VECTOR_SHIFT) as u8),
            false => Notice::Message((self.config >> stimer::SINT_SHIFT & 0xf) as u8),
        };
        Some((at, notice))
    }

    /// The guest was told.
    pub fn delivered(&mut self, now: u64) {
        let Phase::Expired(at) = self.phase else { return };
        if self.config & stimer::PERIODIC == 0 {
            self.config &= !stimer::ENABLE;
            self.phase = Phase::Idle;
            return;
        }
        // Periods that passed meanwhile are left out.
        let period = self.period();
        let missed = now.saturating_sub(at) / period;
        self.phase = Phase::Running(at.saturating_add(period.saturating_mul(missed + 1)));
    }

    fn start(&mut self, now: u64) {
        self.phase = match (self.config & stimer::ENABLE != 0 && self.count != 0, self.config & stimer::PERIODIC != 0) {
            (false, _) => Phase::Idle,
            (true, true) => Phase::Running(now.saturating_add(self.period())),
            // One that is past expires at once.
            (true, false) => Phase::Running(self.count),
        };
    }

    fn period(&self) -> u64 {
        self.count.max(MIN_PERIOD)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DIRECT: u64 = stimer::DIRECT | 0xed << stimer::VECTOR_SHIFT;
    const SINT3: u64 = 3 << stimer::SINT_SHIFT;

    fn timer(config: u64, count: u64) -> Stimer {
        let mut timer = Stimer::default();
        timer.set_config(config, 0);
        timer.set_count(count, 0);
        timer
    }

    #[test]
    fn count_starts_a_timer_that_enables_itself_and_its_end_disables_it() {
        let mut timer = timer(DIRECT | stimer::AUTO_ENABLE, 5_000);
        assert_eq!(timer.due(), Some(5_000));
        assert_eq!(timer.expired(4_999), None);
        assert_eq!(timer.expired(5_000), Some((5_000, Notice::Vector(0xed))));
        timer.delivered(5_000);
        assert_eq!((timer.config() & stimer::ENABLE, timer.due(), timer.expired(u64::MAX)), (0, None, None));
        timer.set_count(9_000, 6_000);
        assert_eq!(timer.due(), Some(9_000));
    }

    #[test]
    fn past_deadline_expires_at_once() {
        assert_eq!(timer(SINT3 | stimer::AUTO_ENABLE, 1).expired(7), Some((1, Notice::Message(3))));
    }

    #[test]
    fn message_that_waits_holds_a_periodic_timer_and_lost_periods_are_left_out() {
        let mut timer = timer(SINT3 | stimer::PERIODIC | stimer::AUTO_ENABLE, 10_000);
        assert_eq!(timer.expired(10_500), Some((10_000, Notice::Message(3))));
        assert_eq!(timer.due(), None);
        assert_eq!(timer.expired(35_000), Some((10_000, Notice::Message(3))));
        timer.delivered(35_000);
        assert_eq!(timer.due(), Some(40_000));
    }

    #[test]
    fn count_of_zero_and_source_zero_stop_a_timer() {
        let mut running = timer(DIRECT | stimer::AUTO_ENABLE, 5);
        running.set_count(0, 0);
        assert_eq!((running.config() & stimer::ENABLE, running.due()), (0, None));
        assert_eq!(timer(stimer::ENABLE, 5).config(), 0);
        assert_eq!(timer(stimer::AUTO_ENABLE, 5).due(), None);
        assert_eq!(timer(DIRECT, 5).due(), None, "not enabled");
    }

    #[test]
    fn tiny_periods_are_stretched() {
        let mut timer = timer(DIRECT | stimer::PERIODIC | stimer::ENABLE, 1);
        let mut now = 0;
        for _ in 0..10 {
            now = timer.due().unwrap();
            timer.expired(now).unwrap();
            timer.delivered(now);
        }
        assert_eq!(now, 10 * MIN_PERIOD);
        assert_eq!(timer.count(), 1, "what the guest wrote is what it reads");
    }

    proptest! {
        #[test]
        fn no_registers_panic_and_the_next_expiry_is_in_the_future(steps in prop::collection::vec((any::<bool>(), any::<u64>(), any::<u64>()), 0..20)) {
            let mut timer = Stimer::default();
            for (config, value, now) in steps {
                if config { timer.set_config(value, now) } else { timer.set_count(value, now) }
                if timer.expired(now).is_some() {
                    timer.delivered(now);
                    prop_assert!(timer.due().is_none_or(|due| due > now || due == u64::MAX));
                }
            }
        }
    }
}
