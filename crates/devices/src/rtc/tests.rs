//! The clock against its data sheet.

use proptest::prelude::*;

use super::*;
use crate::testing::{Level, Time};

/// 2024-02-29 13:45:58 UTC, a Thursday.
const START: Duration = Duration::from_secs(1_709_214_358);

fn rtc() -> (Arc<Rtc>, Time, Arc<Level>) {
    let (time, line) = (Time::new(START), Arc::new(Level::default()));
    let config = CmosConfig { low_memory: 512 << 20, high_memory: 3 << 30, processors: 2 };
    (Rtc::new(time.timers.clone(), line.clone(), &config), time, line)
}

fn read(rtc: &Rtc, index: u8) -> u8 {
    rtc.port_out(INDEX, 1, index.into());
    rtc.port_in(DATA, 1) as u8
}

fn write(rtc: &Rtc, index: u8, value: u8) {
    rtc.port_out(INDEX, 1, index.into());
    rtc.port_out(DATA, 1, value.into());
}

fn time_of(rtc: &Rtc) -> [u8; 8] {
    [CENTURY, 9, 8, 7, 6, 4, 2, 0].map(|index| read(rtc, index))
}

#[test]
fn clock_shows_wall_time_in_bcd() {
    let (rtc, time, _) = rtc();
    assert_eq!(time_of(&rtc), [0x20, 0x24, 0x02, 0x29, 5, 0x13, 0x45, 0x58]);
    time.advance(2 * NANOS);
    assert_eq!(time_of(&rtc), [0x20, 0x24, 0x02, 0x29, 5, 0x13, 0x46, 0x00]);
    assert_eq!(read(&rtc, REGISTER_D), VALID);
}

#[test]
fn binary_and_twelve_hour_modes_change_the_encoding() {
    let (rtc, _, _) = rtc();
    write(&rtc, REGISTER_B, BINARY);
    assert_eq!(time_of(&rtc), [20, 24, 2, 29, 5, 1 | PM, 45, 58]);
    write(&rtc, 4, 12);
    assert_eq!(read(&rtc, 4), 12);
    write(&rtc, REGISTER_B, BINARY | HOURS_24);
    assert_eq!(read(&rtc, 4), 0, "twelve in the morning is midnight");
}

#[test]
fn time_that_is_set_runs_on() {
    let (rtc, time, _) = rtc();
    write(&rtc, REGISTER_B, SET | HOURS_24);
    for (index, value) in [(CENTURY, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x59)] {
        write(&rtc, index, value);
    }
    time.advance(10 * NANOS);
    assert_eq!(read(&rtc, 0), 0x59, "stopped");
    write(&rtc, REGISTER_B, HOURS_24);
    time.advance(NANOS);
    assert_eq!(time_of(&rtc), [0x20, 0x00, 0x01, 0x01, 7, 0, 0, 0]);
}

#[test]
fn update_in_progress_precedes_the_second() {
    let (rtc, time, _) = rtc();
    assert_eq!(read(&rtc, REGISTER_A), REGISTER_A_RESET);
    time.advance(NANOS - 200_000);
    assert_eq!(read(&rtc, REGISTER_A), REGISTER_A_RESET | UPDATE_IN_PROGRESS);
    time.advance(200_000);
    assert_eq!(read(&rtc, REGISTER_A), REGISTER_A_RESET);
}

#[test]
fn update_interrupt_comes_each_second_and_goes_with_register_c() {
    let (rtc, time, line) = rtc();
    time.advance(5 * NANOS);
    write(&rtc, REGISTER_B, UPDATE | HOURS_24);
    assert!(!line.get());
    time.advance(NANOS);
    assert!(line.get());
    assert_eq!(read(&rtc, REGISTER_C) & (INTERRUPT | UPDATE), INTERRUPT | UPDATE);
    assert!(!line.get());
    time.advance(NANOS);
    assert!(line.get());
}

#[test]
fn alarm_matches_its_time_and_its_wildcards() {
    let (rtc, time, line) = rtc();
    for (index, value) in [(ALARM_HOURS, 0x13), (ALARM_MINUTES, 0xff), (ALARM_SECONDS, 0x03)] {
        write(&rtc, index, value);
    }
    write(&rtc, REGISTER_B, ALARM | HOURS_24);
    for _ in 0..4 {
        time.advance(NANOS);
        assert!(!line.get());
    }
    time.advance(NANOS);
    assert!(line.get());
    assert_eq!(read(&rtc, REGISTER_C) & ALARM, ALARM);
}

#[test]
fn periodic_interrupt_has_its_rate() {
    let (rtc, time, line) = rtc();
    write(&rtc, REGISTER_B, PERIODIC | HOURS_24);
    for _ in 0..1024 {
        time.advance(NANOS / 1024);
        if line.get() {
            assert_eq!(read(&rtc, REGISTER_C) & PERIODIC, PERIODIC);
        }
    }
    assert!((1000..=1024).contains(&line.rises()), "{}", line.rises());
}

#[test]
fn flags_rise_without_interrupts_for_those_who_poll() {
    let (rtc, time, line) = rtc();
    read(&rtc, REGISTER_C);
    time.advance(NANOS);
    assert_eq!(read(&rtc, REGISTER_C) & (UPDATE | PERIODIC | INTERRUPT), UPDATE | PERIODIC);
    assert_eq!(read(&rtc, REGISTER_C), 0);
    assert!(!line.get());
}

#[test]
fn firmware_finds_memory_and_processors() {
    let (rtc, _, _) = rtc();
    let word = |at| u32::from(read(&rtc, at)) | u32::from(read(&rtc, at + 1)) << 8;
    assert_eq!(word(0x34), (512 - 16) * 16);
    assert_eq!(word(0x5b) | u32::from(read(&rtc, 0x5d)) << 16, 3 << 14);
    assert_eq!(word(0x30), 0xffff);
    assert_eq!(read(&rtc, 0x5f), 1);
    write(&rtc, 0x0f, 0x0a);
    rtc.reset();
    assert_eq!(read(&rtc, 0x0f), 0x0a, "the shutdown byte is for after the reset");
}

#[test]
fn state_survives_a_restore() {
    let (rtc, _, _) = rtc();
    write(&rtc, 9, 0x30);
    write(&rtc, 0x40, 0x77);
    let (other, _, _) = self::rtc();
    other.restore(&rtc.state()).unwrap();
    assert_eq!(time_of(&other), time_of(&rtc));
    assert_eq!(other.state(), rtc.state());
}

proptest! {
    #[test]
    fn no_guest_input_panics(steps in prop::collection::vec((any::<bool>(), any::<bool>(), any::<u32>(), 0usize..3), 0..300)) {
        let (rtc, time, _) = rtc();
        for (data, is_write, value, size) in steps {
            let (port, size) = (if data { DATA } else { INDEX }, [1, 2, 4][size]);
            if is_write { rtc.port_out(port, size, value) } else { rtc.port_in(port, size); }
            time.advance(u64::from(value >> 3));
        }
        time_of(&rtc);
        let saved = rtc.state();
        rtc.restore(&saved).unwrap();
    }
}
