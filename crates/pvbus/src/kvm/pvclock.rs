//! pvclock: KVM's clock page, and the time of day when the machine started.
//!
//! The host keeps a record in a page of ours: system time at some count of the time-stamp counter, and how long a tick is. A version guards
//! it, odd while the host writes. Time of day is written once each time it is asked for.
//!
//! ```text
//!   page:  0 PvclockVcpuTimeInfo (of the processor that attached)   64 PvclockWallClock
//! ```
//!
//! Linux `Documentation/virt/kvm/x86/msr.rst`, `arch/x86/include/asm/pvclock.h`; OpenBSD `sys/dev/pv/pvclock.c`, which wants both feature
//! bits. Here the old MSRs do as well, and without the bit that says so [`Pvclock::is_stable`] tells that the clock is for one processor.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::mem::offset_of;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use abi::kvm::{
    MSR_SYSTEM_TIME, MSR_SYSTEM_TIME_NEW, MSR_WALL_CLOCK, MSR_WALL_CLOCK_NEW, PVCLOCK_GUEST_STOPPED, PVCLOCK_TSC_STABLE,
    PvclockVcpuTimeInfo, PvclockWallClock, SYSTEM_TIME_ENABLE, feature,
};
use zerocopy::{FromZeros, IntoBytes};

use crate::detect::{Interface, Kind};
use crate::driver::{Driver, Event, News, TimeOfDay};
use crate::hal::{Dma, Hal, HalError, Nanos, SECOND};

/// How often a record is read that the host keeps changing. It does so in less than a microsecond.
const READINGS: usize = 100_000;
/// Where in the page the time of day is.
const WALL_CLOCK: usize = 64;
/// The word of the page with the record's flags, and how far they are shifted in it.
const FLAGS_WORD: usize = offset_of!(PvclockVcpuTimeInfo, flags) / 4;
const FLAGS_SHIFT: usize = offset_of!(PvclockVcpuTimeInfo, flags) % 4 * 8;
/// How often the device tells the time of day.
const PERIOD: Nanos = 15 * SECOND;

/// The clock.
pub struct Pvclock<'h> {
    hal: &'h dyn Hal,
    kind: Kind,
    system_time: u32,
    wall_clock: Option<u32>,
    stable: bool,
    /// `None` only while it is being given back.
    page: Option<Dma>,
    /// The latest time told, so that none is told that is earlier.
    last: AtomicU64,
}

impl<'h> Pvclock<'h> {
    /// Turns the clock of `interface` on.
    ///
    /// # Errors
    /// [`ClockError`] when the interface has no clock or the host does not keep it.
    pub fn attach(hal: &'h dyn Hal, interface: &Interface) -> Result<Pvclock<'h>, ClockError> {
        let features = interface.features.eax;
        let (system_time, wall_clock) = if features & feature::CLOCKSOURCE2 != 0 {
            (MSR_SYSTEM_TIME_NEW, MSR_WALL_CLOCK_NEW)
        } else if features & feature::CLOCKSOURCE != 0 {
            (MSR_SYSTEM_TIME, MSR_WALL_CLOCK)
        } else {
            return Err(ClockError::NoFeature);
        };
        hal.tsc()?;
        let page = hal.dma_alloc(1)?;
        if let Err(error) = hal.write_msr(system_time, page.gpa() | SYSTEM_TIME_ENABLE) {
            hal.dma_free(page);
            return Err(error.into());
        }
        let mut clock = Pvclock {
            hal,
            kind: interface.kind,
            system_time,
            wall_clock: Some(wall_clock),
            stable: features & feature::CLOCKSOURCE_STABLE != 0,
            page: Some(page),
            last: AtomicU64::new(0),
        };
        clock.now()?;
        // Releases of OpenBSD without KVM's second interface have no time of day: a write raises #GP or leaves the record empty.
        if clock.wall_clock().is_err() {
            clock.wall_clock = None;
        }
        Ok(clock)
    }

    /// Whose clock it is.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Nanoseconds since the machine started. Never less than what was told before.
    ///
    /// # Errors
    /// [`ClockError::Writing`] when the host does not finish the record.
    pub fn now(&self) -> Result<Nanos, ClockError> {
        let (record, tsc) = self.record()?;
        let now = nanoseconds(&record, tsc);
        Ok(self.last.fetch_max(now, Ordering::AcqRel).max(now))
    }

    /// Whether all processors may use the clock; otherwise it is for the one that attached it.
    ///
    /// # Errors
    /// As [`Pvclock::now`].
    pub fn is_stable(&self) -> Result<bool, ClockError> {
        Ok(self.stable && self.record()?.0.flags & PVCLOCK_TSC_STABLE != 0)
    }

    /// Ticks a second of the time-stamp counter, as the host scales it.
    ///
    /// # Errors
    /// As [`Pvclock::now`].
    pub fn tsc_hz(&self) -> Result<u64, ClockError> {
        Ok(frequency(&self.record()?.0))
    }

    /// Whether the host stopped the machine since this was last asked: what watched the clock for delays shall not blame the guest.
    ///
    /// # Errors
    /// [`ClockError::Hal`].
    pub fn take_stopped(&self) -> Result<bool, ClockError> {
        let stopped = u32::from(PVCLOCK_GUEST_STOPPED) << FLAGS_SHIFT;
        let word = self.page()?.words().get(FLAGS_WORD).ok_or(ClockError::Writing)?;
        // Asked first, so that a page which the host keeps is written to only when there is something to clear.
        Ok(word.load(Ordering::Relaxed) & stopped != 0 && word.fetch_and(!stopped, Ordering::AcqRel) & stopped != 0)
    }

    /// The time of day when [`Pvclock::now`] was zero.
    ///
    /// # Errors
    /// [`ClockError`]; [`ClockError::NoWallClock`] when the host has none.
    pub fn wall_clock(&self) -> Result<WallTime, ClockError> {
        let msr = self.wall_clock.ok_or(ClockError::NoWallClock)?;
        self.hal.write_msr(msr, self.page()?.gpa() + WALL_CLOCK as u64)?;
        let mut record = PvclockWallClock::new_zeroed();
        self.guarded(WALL_CLOCK, record.as_mut_bytes())?;
        match (record.sec.get(), record.nsec.get()) {
            (0, _) | (_, 1_000_000_000..) => Err(ClockError::NoWallClock),
            (seconds, nanoseconds) => Ok(WallTime { seconds: u64::from(seconds), nanoseconds }),
        }
    }

    /// The time of day.
    ///
    /// # Errors
    /// As [`Pvclock::wall_clock`] and [`Pvclock::now`].
    pub fn time_of_day(&self) -> Result<WallTime, ClockError> {
        let start = self.wall_clock()?;
        let nanoseconds = self.now()?.saturating_add(u64::from(start.nanoseconds));
        Ok(WallTime { seconds: start.seconds.saturating_add(nanoseconds / SECOND), nanoseconds: (nanoseconds % SECOND) as u32 })
    }

    /// Tells the host to leave the page alone.
    ///
    /// # Errors
    /// [`ClockError::Hal`].
    pub fn disable(&self) -> Result<(), ClockError> {
        Ok(self.hal.write_msr(self.system_time, 0)?)
    }

    /// The host's record, with the time-stamp counter of when it was read.
    fn record(&self) -> Result<(PvclockVcpuTimeInfo, u64), ClockError> {
        let mut record = PvclockVcpuTimeInfo::new_zeroed();
        let tsc = self.guarded(0, record.as_mut_bytes())?;
        // Zero, which no tick lasts, is what a page holds that the host has not written to.
        if record.tsc_to_system_mul.get() == 0 { Err(ClockError::Writing) } else { Ok((record, tsc)) }
    }

    /// Reads a record that begins with a version, so that all of it is of one version.
    fn guarded(&self, offset: usize, bytes: &mut [u8]) -> Result<u64, ClockError> {
        let words = self.page()?.words().get(offset / 4..).unwrap_or_default();
        let version = words.first().ok_or(ClockError::Writing)?;
        for _ in 0..READINGS {
            let before = version.load(Ordering::Acquire);
            copy(words, bytes);
            let tsc = self.hal.tsc()?;
            fence(Ordering::Acquire);
            if before & 1 == 0 && before == version.load(Ordering::Relaxed) {
                return Ok(tsc);
            }
            core::hint::spin_loop();
        }
        Err(ClockError::Writing)
    }

    fn page(&self) -> Result<&Dma, ClockError> {
        self.page.as_ref().ok_or(ClockError::Hal(HalError::Unavailable))
    }
}

impl Drop for Pvclock<'_> {
    fn drop(&mut self) {
        // A page that the host may still write to is lost rather than given back.
        if self.disable().is_ok()
            && let Some(page) = self.page.take()
        {
            self.hal.dma_free(page);
        }
    }
}

fn copy(words: &[AtomicU32], bytes: &mut [u8]) {
    for (piece, word) in bytes.chunks_exact_mut(4).zip(words) {
        piece.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
    }
}

/// System time by the formula of [`PvclockVcpuTimeInfo`]. A counter behind the record's counts as equal to it.
fn nanoseconds(record: &PvclockVcpuTimeInfo, tsc: u64) -> Nanos {
    let ticks = tsc.saturating_sub(record.tsc_timestamp.get());
    let shift = u32::from(record.tsc_shift.unsigned_abs());
    let shifted = if record.tsc_shift < 0 { ticks.checked_shr(shift) } else { ticks.checked_shl(shift) }.unwrap_or(0);
    let elapsed = (u128::from(shifted) * u128::from(record.tsc_to_system_mul.get())) >> 32;
    record.system_time.get().saturating_add(u64::try_from(elapsed).unwrap_or(u64::MAX))
}

/// How many ticks are a second by the same formula. A scale of zero is no record's that was read.
fn frequency(record: &PvclockVcpuTimeInfo) -> u64 {
    let shift = u32::from(record.tsc_shift.unsigned_abs());
    let unshifted = (u128::from(SECOND) << 32) / u128::from(record.tsc_to_system_mul.get().max(1));
    let factor = 1_u128.checked_shl(shift);
    let ticks = if record.tsc_shift < 0 { factor.and_then(|factor| unshifted.checked_mul(factor)) } else { unshifted.checked_shr(shift) };
    ticks.and_then(|ticks| u64::try_from(ticks).ok()).unwrap_or(u64::MAX)
}

/// A time of day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WallTime {
    /// Seconds since 1970.
    pub seconds: u64,
    /// Nanoseconds of that second.
    pub nanoseconds: u32,
}

/// Why there is no time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockError {
    /// The interface has no clock.
    NoFeature,
    /// The host has no time of day.
    NoWallClock,
    /// The host has not written the record, or does not finish writing it.
    Writing,
    /// This system lacks what a clock needs, or the host refused.
    Hal(HalError),
}

impl From<HalError> for ClockError {
    fn from(error: HalError) -> ClockError {
        ClockError::Hal(error)
    }
}

impl fmt::Display for ClockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClockError::NoFeature => f.write_str("the interface has no clock"),
            ClockError::NoWallClock => f.write_str("the host does not tell the time of day"),
            ClockError::Writing => f.write_str("the host does not finish the clock's record"),
            ClockError::Hal(error) => write!(f, "{error}"),
        }
    }
}

impl core::error::Error for ClockError {}

/// The clock as a device of the bus: tells the time of day, that the machine was stopped, and turns itself off when the machine goes down.
pub(crate) struct PvclockDevice<'h> {
    clock: Arc<Pvclock<'h>>,
    next: Option<Nanos>,
    set_time: bool,
}

impl<'h> PvclockDevice<'h> {
    pub(crate) const fn new(clock: Arc<Pvclock<'h>>) -> PvclockDevice<'h> {
        PvclockDevice { clock, next: Some(0), set_time: true }
    }
}

impl<'h> Driver<'h> for PvclockDevice<'h> {
    fn poll(&mut self, now: Nanos, events: &mut Vec<Event>) -> Option<Nanos> {
        if self.next? > now {
            return self.next;
        }
        self.next = Some(now.saturating_add(PERIOD));
        if self.clock.take_stopped() == Ok(true) {
            events.push(Event::Resume(self.clock.kind()));
            self.set_time = true;
        }
        if let Ok(WallTime { seconds, nanoseconds }) = self.clock.time_of_day() {
            let (source, set) = (self.clock.kind(), core::mem::take(&mut self.set_time));
            events.push(Event::Time(TimeOfDay { source, seconds, nanoseconds, read_at: self.clock.hal.now(), set }));
        }
        self.next
    }

    fn hear(&mut self, news: &News, _now: Nanos) {
        if let News::GoingDown { .. } = news {
            self.next = None;
            // The machine goes down in any case.
            let _ = self.clock.disable();
        }
    }
}
