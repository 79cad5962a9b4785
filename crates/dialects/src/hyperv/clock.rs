//! Reference time: 100 ns since the machine was made, by an MSR and by a page from which the guest computes it (TLFS 12.7).
//!
//! Both are the TSC times one scale, so that they never contradict each other. The TSC is stable and equal on all processors: the page is written once.

use std::sync::Arc;

use abi::hyperv::synic::ReferenceTsc;
use vmm::Frequencies;
use vmm::time::Clock;

use crate::kvm::clock::ticks;

/// Units a second.
const HZ: u128 = 10_000_000;
/// Nanoseconds of a unit.
pub(super) const UNIT: u64 = 100;

/// The machine's reference clock.
pub(super) struct ReferenceClock {
    clock: Arc<dyn Clock>,
    tsc_hz: u64,
    /// Fraction of 2^64.
    scale: u64,
}

impl ReferenceClock {
    pub fn new(clock: Arc<dyn Clock>, frequencies: Frequencies) -> ReferenceClock {
        let tsc_hz = frequencies.tsc_hz;
        let scale = u64::try_from((HZ << 64) / u128::from(tsc_hz.max(1))).unwrap_or(u64::MAX);
        ReferenceClock { clock, tsc_hz, scale }
    }

    /// Reference time.
    pub fn now(&self) -> u64 {
        self.at(self.clock.now())
    }

    /// What the reference TSC page holds.
    pub fn page(&self) -> ReferenceTsc {
        ReferenceTsc { sequence: 1.into(), reserved: 0.into(), scale: self.scale.into(), offset: 0.into() }
    }

    /// Nanoseconds of the machine's clock by when reference time is at least `time`.
    pub fn deadline(&self, time: u64) -> u64 {
        // The scale is rounded down, and so is what comes of it.
        time.saturating_add(1).saturating_mul(UNIT)
    }

    fn at(&self, nanoseconds: u64) -> u64 {
        let tsc = ticks(nanoseconds, self.tsc_hz);
        ((u128::from(tsc) * u128::from(self.scale)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use vmm::time::StepClock;

    use super::*;

    fn clock(tsc_hz: u64) -> ReferenceClock {
        ReferenceClock::new(Arc::new(StepClock::new(Duration::ZERO)), Frequencies { tsc_hz, apic_hz: 1 })
    }

    #[test]
    fn absurd_frequencies_have_a_scale() {
        for hz in [0, 1, u64::MAX] {
            clock(hz).now();
        }
    }

    proptest! {
        #[test]
        fn reference_time_is_the_machines_in_tenths_of_microseconds(hz in 20_000_000_u64..10_000_000_000, ns in 0..1_u64 << 55) {
            // A year may lose a unit by the rounding of the scale, and one by that of ticks.
            prop_assert!(clock(hz).at(ns).abs_diff(ns / UNIT) <= 2, "{}", clock(hz).at(ns));
        }

        #[test]
        fn deadline_has_come_when_it_is_due(hz in 1_000_000_000_u64..10_000_000_000, time in 0..1_u64 << 50) {
            let clock = clock(hz);
            prop_assert!(clock.at(clock.deadline(time)) >= time);
        }
    }
}
