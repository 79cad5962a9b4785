//! Time: the host tells the time of day, now and then as a sample, and after a pause to be set.
//!
//! OpenBSD's driver never sets the clock; here the kernel hears which of the two it is.

use alloc::vec::Vec;

use abi::hyperv::ic::{self, EPOCH_DELTA, Version, kind, status, timesync, version};
use abi::hyperv::msr;
use zerocopy::FromBytes;

use super::{Answer, Request, Service};
use crate::detect::Kind;
use crate::driver::{Event, TimeOfDay};
use crate::hal::{Hal, Nanos, SECOND};

/// Nanoseconds of the unit of time.
const TICK: u64 = 100;
/// Units of a second.
const TICKS: u64 = SECOND / TICK;

/// The component.
pub(in super::super) struct TimeSync<'h> {
    hal: &'h dyn Hal,
}

impl<'h> TimeSync<'h> {
    pub const fn new(hal: &'h dyn Hal) -> TimeSync<'h> {
        TimeSync { hal }
    }

    /// How long ago the reference counter was `reference`.
    fn age(&self, reference: u64) -> Nanos {
        self.hal.read_msr(msr::TIME_REF_COUNT).map_or(0, |count| count.saturating_sub(reference).saturating_mul(TICK))
    }
}

impl Service for TimeSync<'_> {
    const NAME: &'static str = "timesync";
    const KIND: u16 = kind::TIMESYNC;
    const VERSIONS: &'static [Version] = &version::TIMESYNC;

    fn answer(&mut self, request: Request<'_>, events: &mut Vec<Event>) -> Answer {
        let told = if request.version == version::TIMESYNC_4 {
            ic::TimeSync::ref_from_prefix(request.body)
                .ok()
                .map(|(time, _)| (time.host_time, time.flags, self.age(time.reference_time.get())))
        } else {
            ic::TimeSync3::ref_from_prefix(request.body).ok().map(|(time, _)| (time.host_time, time.flags, 0))
        };
        let Some((host_time, flags, age)) = told else { return Answer::Now(status::FAIL) };
        let Some(ticks) = host_time.get().checked_sub(EPOCH_DELTA) else { return Answer::Now(status::FAIL) };
        let nanoseconds = u32::try_from(ticks % TICKS * TICK).unwrap_or_default();
        if flags & (timesync::SYNC | timesync::SAMPLE) != 0 {
            events.push(Event::Time(TimeOfDay {
                source: Kind::HyperV,
                seconds: ticks / TICKS,
                nanoseconds,
                read_at: request.now.saturating_sub(age),
                set: flags & timesync::SYNC != 0,
            }));
        }
        Answer::Now(status::OK)
    }
}
