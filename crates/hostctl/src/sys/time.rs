//! A clock that never goes back, and waiting for it.
#![allow(unsafe_code)] // System calls with pointers.

use core::time::Duration;

use linux_raw_sys::general::{__NR_clock_gettime, __NR_clock_nanosleep, CLOCK_MONOTONIC, TIMER_ABSTIME, timespec};
use pvbus::Nanos;

use super::syscall::syscall;

const SECOND: Nanos = 1_000_000_000;

/// Now.
#[must_use]
pub fn now() -> Nanos {
    let mut time = timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call fills `time`. It cannot fail with this clock.
    let _ = unsafe { syscall(__NR_clock_gettime, [CLOCK_MONOTONIC as usize, (&raw mut time).addr()]) };
    Nanos::try_from(time.tv_sec).unwrap_or(0) * SECOND + Nanos::try_from(time.tv_nsec).unwrap_or(0)
}

/// The point in time that is `duration` from now.
#[must_use]
pub fn after(duration: Duration) -> Nanos {
    now().saturating_add(nanos(duration))
}

/// A duration as a number.
#[must_use]
pub fn nanos(duration: Duration) -> Nanos {
    Nanos::try_from(duration.as_nanos()).unwrap_or(Nanos::MAX)
}

/// Sleeps until `deadline`.
pub fn sleep_until(deadline: Nanos) {
    let until = in_parts(deadline);
    while now() < deadline {
        // SAFETY: the call reads `until`. A signal ends it early, therefore the loop.
        let _ = unsafe { syscall(__NR_clock_nanosleep, [CLOCK_MONOTONIC as usize, TIMER_ABSTIME as usize, (&raw const until).addr(), 0]) };
    }
}

/// The time from now until `deadline`, nothing when it is over.
pub(super) fn left_until(deadline: Nanos) -> timespec {
    in_parts(deadline.saturating_sub(now()))
}

fn in_parts(time: Nanos) -> timespec {
    timespec { tv_sec: i64::try_from(time / SECOND).unwrap_or(i64::MAX), tv_nsec: i64::try_from(time % SECOND).unwrap_or(0) }
}
