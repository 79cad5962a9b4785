//! Time: the host tells the time of day, now and then as a sample, and after a pause to be set.
//!
//! OpenBSD's driver never sets the clock; here the kernel hears which of the two it is.

use alloc::sync::Arc;
use alloc::vec::Vec;

use abi::hyperv::ic::{self, EPOCH_DELTA, Version, kind, status, timesync, version};
use zerocopy::FromBytes;

use super::super::clock::{ReferenceClock, UNIT};
use super::{Answer, Request, Service};
use crate::detect::Kind;
use crate::driver::{Event, TimeOfDay};
use crate::hal::{Nanos, SECOND};

/// Units of a second.
const UNITS: u64 = SECOND / UNIT;

/// The component.
pub(in super::super) struct TimeSync<'h> {
    /// By which the age of what the host tells is known.
    clock: Option<Arc<ReferenceClock<'h>>>,
}

impl<'h> TimeSync<'h> {
    pub const fn new(clock: Option<Arc<ReferenceClock<'h>>>) -> TimeSync<'h> {
        TimeSync { clock }
    }

    /// How long ago reference time was `reference`.
    fn age(&self, reference: u64) -> Nanos {
        let now = self.clock.as_ref().and_then(|clock| clock.now().ok());
        now.map_or(0, |now| now.saturating_sub(reference.saturating_mul(UNIT)))
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
        let nanoseconds = u32::try_from(ticks % UNITS * UNIT).unwrap_or_default();
        if flags & (timesync::SYNC | timesync::SAMPLE) != 0 {
            events.push(Event::Time(TimeOfDay {
                source: Kind::HyperV,
                seconds: ticks / UNITS,
                nanoseconds,
                read_at: request.now.saturating_sub(age),
                set: flags & timesync::SYNC != 0,
            }));
        }
        Answer::Now(status::OK)
    }
}
