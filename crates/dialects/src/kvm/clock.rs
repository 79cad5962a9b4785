//! Arithmetic of the paravirtual clock.
//!
//! The scale is found by the algorithm that Linux documents with `kvm_get_time_scale`: shift the TSC frequency into
//! (10^9, 2 * 10^9], then express nanoseconds per tick as a 32-bit fraction.

use abi::kvm::PvclockWallClock;
use vmm::time::Clock;

const NANOSECONDS: u64 = 1_000_000_000;

/// How a TSC difference becomes nanoseconds: shift, multiply, take the upper half.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scale {
    /// 32-bit fraction.
    pub mul: u32,
    /// Left shift before the multiplication; negative is a right shift.
    pub shift: i8,
}

impl Scale {
    /// The scale of a TSC of `hz` ticks a second. A frequency of zero is taken as 1 Hz.
    pub fn from_hz(hz: u64) -> Scale {
        let mut ticks = hz.max(1);
        let mut shift = 0;
        while ticks > 2 * NANOSECONDS {
            ticks >>= 1;
            shift -= 1;
        }
        while ticks <= NANOSECONDS {
            ticks <<= 1;
            shift += 1;
        }
        // ticks is in (10^9, 2 * 10^9], so the quotient is below 2^32.
        Scale { mul: ((NANOSECONDS << 32) / ticks) as u32, shift }
    }

    /// What a guest computes: nanoseconds in `ticks`.
    pub fn nanoseconds(self, ticks: u64) -> u64 {
        let shifted = if self.shift >= 0 { ticks << self.shift } else { ticks >> -self.shift };
        ((u128::from(shifted) * u128::from(self.mul)) >> 32) as u64
    }
}

/// TSC of a machine that has run for `nanoseconds`.
pub fn ticks(nanoseconds: u64, hz: u64) -> u64 {
    (u128::from(nanoseconds) * u128::from(hz) / u128::from(NANOSECONDS)) as u64
}

/// Time of day when the clock stood at zero; the version is left to the caller.
pub fn wall_clock(clock: &dyn Clock) -> PvclockWallClock {
    let start = u64::try_from(clock.wall().as_nanos()).unwrap_or(u64::MAX).saturating_sub(clock.now());
    // Seconds wrap in 2106, as the structure's do.
    PvclockWallClock { version: 0.into(), sec: ((start / NANOSECONDS) as u32).into(), nsec: ((start % NANOSECONDS) as u32).into() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_gigahertz_is_the_identity() {
        let scale = Scale::from_hz(NANOSECONDS);
        assert_eq!(scale, Scale { mul: 1 << 31, shift: 1 });
        for ticks in [0, 1, 999, u64::from(u32::MAX) << 20] {
            assert_eq!(scale.nanoseconds(ticks), ticks);
        }
    }

    #[test]
    fn absurd_frequencies_have_a_scale() {
        for hz in [0, 1, u64::MAX] {
            assert_ne!(Scale::from_hz(hz).mul, 0);
        }
    }

    proptest! {
        #[test]
        fn an_hour_is_an_hour_at_any_frequency(hz in 1_000_000_u64..10_000_000_000) {
            let ticks = hz * 3600;
            let nanoseconds = Scale::from_hz(hz).nanoseconds(ticks);
            let hour = 3600 * NANOSECONDS;
            // The fraction has 31 significant bits.
            prop_assert!(nanoseconds.abs_diff(hour) < hour >> 29, "{nanoseconds}");
        }
    }
}
