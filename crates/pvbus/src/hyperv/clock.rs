//! Reference time: tenths of a microsecond since the machine was made (TLFS 6.0b, 12.7), by a register and by a page.
//!
//! The page says how the guest computes the same from its time-stamp counter, without an exit; a sequence guards it, which is zero while the
//! page cannot be relied on. Then, and where there is no page, the register is asked.
//!
//! ```text
//!   now():  page: (TSC * scale >> 64) + offset   -- sequence 0, or no page -->   register TIME_REF_COUNT
//! ```
//!
//! OpenBSD `sys/dev/pv/hyperv.c` has the register for a timecounter, Linux `drivers/clocksource/hyperv_timer.c` both.

use core::mem::offset_of;
use core::sync::atomic::{Ordering, fence};

use abi::hyperv::cpuid::{TIME_REF_COUNT, feature};
use abi::hyperv::msr;
use abi::hyperv::synic::ReferenceTsc;
use zerocopy::{FromZeros, IntoBytes};

use crate::hal::{Dma, Hal, HalError, Nanos};

/// Nanoseconds of the unit of reference time.
pub(super) const UNIT: Nanos = 100;
/// How often a page is read that the host keeps changing. It does so in less than a microsecond.
const READINGS: usize = 100_000;

/// The clock.
pub struct ReferenceClock<'h> {
    hal: &'h dyn Hal,
    /// `None` without a page, and while it is being given back.
    page: Option<Dma>,
}

impl<'h> ReferenceClock<'h> {
    /// The clock of an interface with these `features` (EAX), if it has one; with the page, if host and system have what that takes.
    pub(super) fn attach(hal: &'h dyn Hal, features: u32) -> Option<ReferenceClock<'h>> {
        if features & TIME_REF_COUNT == 0 || hal.read_msr(msr::TIME_REF_COUNT).is_err() {
            return None;
        }
        let has_page = features & feature::REFERENCE_TSC != 0 && hal.tsc().is_ok();
        let page = has_page.then(|| hal.dma_alloc(1).ok()).flatten();
        let page = page.and_then(|page| match hal.write_msr(msr::REFERENCE_TSC, page.gpa() | msr::PAGE_ENABLE) {
            Ok(()) => Some(page),
            Err(_) => {
                hal.dma_free(page);
                None
            }
        });
        Some(ReferenceClock { hal, page })
    }

    /// Nanoseconds since the machine was made.
    ///
    /// # Errors
    /// As [`ReferenceClock::by_counter`], where the page does not tell.
    pub fn now(&self) -> Result<Nanos, HalError> {
        self.by_page().map_or_else(|| self.by_counter(), Ok)
    }

    /// What the register says.
    ///
    /// # Errors
    /// [`HalError`].
    pub fn by_counter(&self) -> Result<Nanos, HalError> {
        Ok(self.hal.read_msr(msr::TIME_REF_COUNT)?.saturating_mul(UNIT))
    }

    /// What the page says; nothing while there is none that can be relied on.
    #[must_use]
    pub fn by_page(&self) -> Option<Nanos> {
        let page = self.page.as_ref()?;
        let sequence = page.word(offset_of!(ReferenceTsc, sequence)).ok()?;
        let mut record = ReferenceTsc::new_zeroed();
        for _ in 0..READINGS {
            let before = sequence.load(Ordering::Acquire);
            if before == 0 {
                return None;
            }
            page.read(0, record.as_mut_bytes()).ok()?;
            let tsc = self.hal.tsc().ok()?;
            fence(Ordering::Acquire);
            if before == sequence.load(Ordering::Relaxed) {
                return Some(reference_time(&record, tsc).saturating_mul(UNIT));
            }
            core::hint::spin_loop();
        }
        None
    }

    /// Tells the host to leave the page alone.
    ///
    /// # Errors
    /// [`HalError`].
    pub(super) fn disable(&self) -> Result<(), HalError> {
        if self.page.is_some() { self.hal.write_msr(msr::REFERENCE_TSC, 0) } else { Ok(()) }
    }
}

impl Drop for ReferenceClock<'_> {
    fn drop(&mut self) {
        // A page that the host may still write to is lost rather than given back.
        if self.disable().is_ok()
            && let Some(page) = self.page.take()
        {
            self.hal.dma_free(page);
        }
    }
}

/// The formula of [`ReferenceTsc`]. The offset is negative where the counter was running before the machine was.
#[allow(clippy::cast_possible_truncation, reason = "64 bits times 64 bits, less 64 bits")]
fn reference_time(record: &ReferenceTsc, tsc: u64) -> u64 {
    let scaled = (u128::from(tsc) * u128::from(record.scale.get())) >> 64;
    (scaled as u64).wrapping_add(record.offset.get())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeHal, Host, Memory};

    const BOTH: u32 = TIME_REF_COUNT | feature::REFERENCE_TSC;

    /// A host whose time-stamp counter has 20 MHz and was at 1000 when the machine was made.
    struct Reference {
        sequence: u32,
        /// The sequence changes with each reading.
        is_restless: bool,
        has_page_register: bool,
        has_counter: bool,
        page: u64,
        tsc: u64,
        counter: u64,
    }

    impl Default for Reference {
        fn default() -> Reference {
            Reference { sequence: 7, is_restless: false, has_page_register: true, has_counter: true, page: 0, tsc: 21_000, counter: 77 }
        }
    }

    impl Reference {
        fn write(&self, memory: &Memory) {
            // A half as a fraction of 2^64, and less 500.
            memory.store(self.page & !1, &[self.sequence, 0, 0, 1 << 31, 500_u32.wrapping_neg(), u32::MAX]);
        }
    }

    impl Host for Reference {
        fn read_msr(&mut self, index: u32) -> Result<u64, HalError> {
            if index == msr::TIME_REF_COUNT && self.has_counter { Ok(self.counter) } else { Err(HalError::Fault) }
        }

        fn write_msr(&mut self, memory: &Memory, index: u32, value: u64) -> Result<(), HalError> {
            if index != msr::REFERENCE_TSC || !self.has_page_register {
                return Err(HalError::Fault);
            }
            self.page = value;
            if value & msr::PAGE_ENABLE != 0 {
                self.write(memory);
            }
            Ok(())
        }

        fn tsc(&mut self, memory: &Memory) -> u64 {
            if self.is_restless && self.page != 0 {
                self.sequence += 1;
                self.write(memory);
            }
            self.tsc
        }
    }

    #[test]
    fn page_tells_the_time_by_its_scale_and_a_negative_offset() {
        let hal = FakeHal::new(Reference::default());
        let clock = ReferenceClock::attach(&hal, BOTH).unwrap();
        assert_eq!(clock.by_page(), Some(1_000_000), "20000 ticks are a millisecond");
        assert_eq!((clock.now(), clock.by_counter()), (Ok(1_000_000), Ok(7700)));
    }

    #[test]
    fn register_is_asked_while_the_page_cannot_be_relied_on() {
        let hal = FakeHal::new(Reference { sequence: 0, ..Reference::default() });
        let clock = ReferenceClock::attach(&hal, BOTH).unwrap();
        assert_eq!((clock.by_page(), clock.now()), (None, Ok(7700)));
        let page = hal.host().page & !1;
        hal.memory.store(page, &[8]);
        assert_eq!(clock.now(), Ok(1_000_000), "the host has written it since");
    }

    #[test]
    fn page_that_is_never_finished_is_no_hang() {
        let hal = FakeHal::new(Reference { is_restless: true, ..Reference::default() });
        let clock = ReferenceClock::attach(&hal, BOTH).unwrap();
        assert_eq!(clock.now(), Ok(7700));
    }

    #[test]
    fn without_a_page_there_is_the_register_and_without_both_no_clock() {
        let hal = FakeHal::new(Reference { has_page_register: false, ..Reference::default() });
        for features in [BOTH, TIME_REF_COUNT] {
            let clock = ReferenceClock::attach(&hal, features).unwrap();
            assert_eq!((clock.by_page(), clock.now()), (None, Ok(7700)));
        }
        assert_eq!(hal.memory.in_use(), 0);
        assert!(ReferenceClock::attach(&hal, feature::REFERENCE_TSC).is_none());
        let hal = FakeHal::new(Reference { has_counter: false, ..Reference::default() });
        assert!(ReferenceClock::attach(&hal, BOTH).is_none(), "the leaf has promised what is not there");
    }

    #[test]
    fn page_comes_back_when_the_host_has_let_go_of_it() {
        let hal = FakeHal::new(Reference::default());
        let clock = ReferenceClock::attach(&hal, BOTH).unwrap();
        assert_eq!(hal.memory.in_use(), 1);
        drop(clock);
        assert_eq!((hal.memory.in_use(), hal.host().page), (0, 0));
    }
}
