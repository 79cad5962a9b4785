//! The clock against hosts that keep it well and badly.

use alloc::vec::Vec;

use abi::hypervisor as words;
use abi::kvm::{
    MSR_SYSTEM_TIME, MSR_SYSTEM_TIME_NEW, MSR_WALL_CLOCK, MSR_WALL_CLOCK_NEW, PVCLOCK_GUEST_STOPPED, PVCLOCK_TSC_STABLE, feature,
};
use proptest::prelude::*;

use super::pvclock::*;
use crate::detect::{Interface, Kind, detect};
use crate::driver::{Driver, Event, News};
use crate::hal::{Hal, HalError, SECOND};
use crate::testing::{FakeHal, Host, Memory};

const BASE: u32 = words::FIRST_BASE;
const NEW: u32 = feature::CLOCKSOURCE2 | feature::CLOCKSOURCE_STABLE;

/// A host whose time-stamp counter has 2 GHz.
struct Clock {
    system_msr: u32,
    wall_msr: Option<u32>,
    enabled: u64,
    /// Version word written to the record, and whether it changes with each reading.
    version: u32,
    restless: bool,
    system_time: u64,
    flags: u8,
    tsc: u64,
    wall: [u32; 3],
}

impl Default for Clock {
    fn default() -> Clock {
        Clock {
            system_msr: MSR_SYSTEM_TIME_NEW,
            wall_msr: Some(MSR_WALL_CLOCK_NEW),
            enabled: 0,
            version: 2,
            restless: false,
            system_time: 5 * SECOND,
            flags: PVCLOCK_TSC_STABLE,
            tsc: 1000,
            wall: [2, 1_800_000_000, 750_000_000],
        }
    }
}

impl Clock {
    fn write(&self, memory: &Memory) {
        let system_time = [self.system_time as u32, (self.system_time >> 32) as u32];
        // Timestamp 1000; a tick is half a nanosecond: shift 0, 0.5 as a 32-bit fraction.
        memory.store(self.enabled & !1, &[self.version, 0, 1000, 0, system_time[0], system_time[1], 1 << 31, u32::from(self.flags) << 8]);
    }
}

impl Host for Clock {
    fn write_msr(&mut self, memory: &Memory, index: u32, value: u64) -> Result<(), HalError> {
        if index == self.system_msr {
            self.enabled = value;
            if value & 1 != 0 {
                self.write(memory);
            }
        } else if Some(index) == self.wall_msr {
            memory.store(value, &self.wall);
        } else {
            return Err(HalError::Fault);
        }
        Ok(())
    }

    fn tsc(&mut self, memory: &Memory) -> u64 {
        if self.restless && self.enabled & 1 != 0 {
            self.version = self.version.wrapping_add(2);
            self.write(memory);
        }
        self.tsc
    }
}

fn machine(clock: Clock, features: u32) -> (FakeHal<Clock>, Interface) {
    let hal = FakeHal::new(clock).base(BASE, BASE + 1, words::KVM).leaf(BASE + 1, features, 0, 0, 0);
    let interface = detect(&hal).interfaces.remove(0);
    (hal, interface)
}

#[test]
fn time_is_system_time_and_what_the_counter_has_run_since() {
    let (hal, interface) = machine(Clock::default(), NEW);
    let clock = Pvclock::attach(&hal, &interface).unwrap();
    assert_eq!(clock.now(), Ok(5 * SECOND));
    hal.host().tsc = 1000 + 4_000_000_000;
    assert_eq!(clock.now(), Ok(7 * SECOND));
    assert_eq!(clock.is_stable(), Ok(true));
}

#[test]
fn time_of_day_is_the_wall_clock_and_system_time() {
    let (hal, interface) = machine(Clock::default(), NEW);
    let clock = Pvclock::attach(&hal, &interface).unwrap();
    hal.host().tsc = 1000 + 1_000_000_000;
    assert_eq!(clock.time_of_day(), Ok(WallTime { seconds: 1_800_000_006, nanoseconds: 250_000_000 }));
}

#[test]
fn time_never_goes_back() {
    let (hal, interface) = machine(Clock { tsc: 2_000_001_000, ..Clock::default() }, NEW);
    let clock = Pvclock::attach(&hal, &interface).unwrap();
    assert_eq!(clock.now(), Ok(6 * SECOND));
    hal.host().tsc = 0;
    assert_eq!(clock.now(), Ok(6 * SECOND));
}

#[test]
fn frequency_of_the_counter_is_that_of_the_scale() {
    let (hal, interface) = machine(Clock::default(), NEW);
    let clock = Pvclock::attach(&hal, &interface).unwrap();
    assert_eq!(clock.tsc_hz(), Ok(2_000_000_000));
    // A shift in the byte before the flags: halves of ticks, double ticks, and what cannot be.
    for (shift, hz) in [(-1_i8, 4_000_000_000), (1, 1_000_000_000), (-128, u64::MAX), (127, 0)] {
        let page = hal.host().enabled & !1;
        hal.memory.store(page + 28, &[u32::from(shift.cast_unsigned())]);
        assert_eq!(clock.tsc_hz(), Ok(hz), "{shift}");
    }
}

#[test]
fn old_registers_do_as_well() {
    let host = Clock { system_msr: MSR_SYSTEM_TIME, wall_msr: Some(MSR_WALL_CLOCK), ..Clock::default() };
    let (hal, interface) = machine(host, feature::CLOCKSOURCE);
    let clock = Pvclock::attach(&hal, &interface).unwrap();
    assert!(clock.time_of_day().is_ok());
    assert_eq!(clock.is_stable(), Ok(false));
}

#[test]
fn clock_without_the_flag_in_its_record_is_for_one_processor() {
    let (hal, interface) = machine(Clock { flags: 0, ..Clock::default() }, NEW);
    assert_eq!(Pvclock::attach(&hal, &interface).unwrap().is_stable(), Ok(false));
}

#[test]
fn interface_without_a_clock_is_left_alone() {
    let (hal, interface) = machine(Clock::default(), feature::NOP_IO_DELAY);
    assert!(matches!(Pvclock::attach(&hal, &interface), Err(ClockError::NoFeature)));
    assert_eq!(hal.host().enabled, 0);
}

#[test]
fn host_that_refuses_the_register_is_an_error_and_no_page_is_lost() {
    let (hal, interface) = machine(Clock { system_msr: 0, ..Clock::default() }, NEW);
    assert!(matches!(Pvclock::attach(&hal, &interface), Err(ClockError::Hal(HalError::Fault))));
    assert_eq!(hal.memory.in_use(), 0);
}

#[test]
fn host_that_never_finishes_the_record_is_an_error() {
    for host in [Clock { version: 3, ..Clock::default() }, Clock { restless: true, ..Clock::default() }] {
        let (hal, interface) = machine(host, NEW);
        assert!(matches!(Pvclock::attach(&hal, &interface), Err(ClockError::Writing)));
    }
}

#[test]
fn record_that_was_never_written_is_an_error() {
    struct Deaf;
    impl Host for Deaf {
        fn write_msr(&mut self, _: &Memory, _: u32, _: u64) -> Result<(), HalError> {
            Ok(())
        }
    }
    let (_, interface) = machine(Clock::default(), NEW);
    assert!(matches!(Pvclock::attach(&FakeHal::new(Deaf), &interface), Err(ClockError::Writing)));
}

#[test]
fn host_without_a_time_of_day_still_has_a_clock() {
    for host in [Clock { wall_msr: None, ..Clock::default() }, Clock { wall: [0; 3], ..Clock::default() }] {
        let (hal, interface) = machine(host, NEW);
        let clock = Pvclock::attach(&hal, &interface).unwrap();
        assert_eq!(clock.now(), Ok(5 * SECOND));
        assert_eq!(clock.time_of_day(), Err(ClockError::NoWallClock));
    }
}

#[test]
fn page_is_given_back_after_the_host_was_told() {
    let (hal, interface) = machine(Clock::default(), NEW);
    let clock = Pvclock::attach(&hal, &interface).unwrap();
    assert_eq!(hal.memory.in_use(), 1);
    drop(clock);
    assert_eq!((hal.host().enabled, hal.memory.in_use()), (0, 0));
}

#[test]
fn device_tells_the_time_every_fifteen_seconds_and_ends_with_the_machine() {
    let (hal, interface) = machine(Clock::default(), NEW);
    let mut device = PvclockDevice::new(alloc::sync::Arc::new(Pvclock::attach(&hal, &interface).unwrap()));
    let mut events = Vec::new();
    assert_eq!(device.poll(0, &mut events), Some(15 * SECOND));
    assert_eq!(device.poll(SECOND, &mut events), Some(15 * SECOND));
    assert_eq!(device.poll(15 * SECOND, &mut events), Some(30 * SECOND));
    let set: Vec<bool> = events.iter().map(|event| matches!(event, Event::Time(time) if time.set && time.source == Kind::Kvm)).collect();
    assert_eq!(set, [true, false]);
    device.hear(&News::GoingDown { reboot: true }, 16 * SECOND);
    assert_eq!((device.poll(40 * SECOND, &mut events), hal.host().enabled), (None, 0));
}

#[test]
fn machine_that_was_stopped_hears_of_it_once() {
    let (hal, interface) = machine(Clock { flags: PVCLOCK_TSC_STABLE | PVCLOCK_GUEST_STOPPED, ..Clock::default() }, NEW);
    let clock = alloc::sync::Arc::new(Pvclock::attach(&hal, &interface).unwrap());
    let mut events = Vec::new();
    PvclockDevice::new(clock.clone()).poll(0, &mut events);
    assert_eq!(events[0], Event::Resume(Kind::Kvm));
    assert_eq!((clock.take_stopped(), clock.is_stable()), (Ok(false), Ok(true)));
}

proptest! {
    #[test]
    fn no_record_panics(record in any::<[u32; 8]>(), tsc in any::<u64>(), wall in any::<[u32; 3]>()) {
        struct Any([u32; 8], u64, [u32; 3]);
        impl Host for Any {
            fn write_msr(&mut self, memory: &Memory, index: u32, value: u64) -> Result<(), HalError> {
                let words: &[u32] = if index == MSR_SYSTEM_TIME_NEW { &self.0 } else { &self.2 };
                if value != 0 {
                    memory.store(value & !1, words);
                }
                Ok(())
            }
            fn tsc(&mut self, _: &Memory) -> u64 {
                self.1
            }
        }
        let (_, interface) = machine(Clock::default(), NEW);
        let mut record = record;
        record[0] &= !1;
        let hal = FakeHal::new(Any(record, tsc, wall));
        if let Ok(clock) = Pvclock::attach(&hal, &interface) {
            let _ = (clock.now(), clock.time_of_day(), clock.tsc_hz(), hal.now());
        }
    }
}
