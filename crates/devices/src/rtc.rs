//! Real-time clock and CMOS memory: Motorola MC146818A data sheet, with the century register and the bytes of a PC's firmware.
//!
//! The clock is the machine's wall clock plus what the guest set it ahead, so it needs no ticking. Interrupts are: periodic (by a
//! timer of its own), alarm and update-ended (by a timer each second, only while one of them is wanted). Flags that nobody
//! waits for are worked out when register C is read.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmm::time::{Timer, TimerClient, Timers};

use crate::ports::{read_bytes, write_bytes};
use crate::snapshot::{RestoreError, Saved, Snapshot};
use crate::{DeviceMap, InterruptLine, PortDevice};

mod calendar;

use calendar::Calendar;

/// Name and version in a [`Saved`] state.
const STATE: (&str, u32) = ("rtc", 1);
/// Index port; the data port follows it.
pub const INDEX: u16 = 0x70;
const DATA: u16 = 0x71;
/// ISA interrupt of the clock.
pub const RTC_IRQ: u8 = 8;
/// CMOS byte of the century; the FADT names it.
pub const CENTURY: u8 = 0x32;

const SIZE: usize = 128;
const NANOS: u64 = 1_000_000_000;
const ALARM_SECONDS: u8 = 0x01;
const ALARM_MINUTES: u8 = 0x03;
const ALARM_HOURS: u8 = 0x05;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
/// Register A: an update is near. It says so this long before it.
const UPDATE_IN_PROGRESS: u8 = 0x80;
const UPDATE_NS: u32 = 244_000;
/// Register A after reset: 32768 Hz, 1024 Hz periodic.
const REGISTER_A_RESET: u8 = 0x26;
/// Register B: stop updates, to set the time.
const SET: u8 = 0x80;
const PERIODIC: u8 = 0x40;
const ALARM: u8 = 0x20;
const UPDATE: u8 = 0x10;
const BINARY: u8 = 0x04;
const HOURS_24: u8 = 0x02;
/// Register C: any enabled flag is up.
const INTERRUPT: u8 = 0x80;
/// Register D: the battery is good.
const VALID: u8 = 0x80;
/// Alarm bytes from here on match always.
const ANY: u8 = 0xc0;
/// Hours in 12-hour mode: afternoon.
const PM: u8 = 0x80;
/// Alarms are looked for in at most a day of seconds that passed unseen.
const DAY: i64 = 86_400;

const TOKEN_SECOND: u64 = 0;
const TOKEN_PERIODIC: u64 = 1;

/// What firmware finds in CMOS memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CmosConfig {
    /// RAM below 4 GiB, in bytes.
    pub low_memory: u64,
    /// RAM above 4 GiB, in bytes.
    pub high_memory: u64,
    /// Number of processors.
    pub processors: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    index: u8,
    cmos: Vec<u8>,
    flags: u8,
    /// Seconds that the guest's clock is ahead of the machine's wall clock.
    offset: i64,
    /// The time while updates are stopped.
    frozen: Option<Calendar>,
    /// Second and periodic tick up to which the flags are worked out.
    seen_second: i64,
    seen_tick: u64,
}

/// The clock chip.
pub struct Rtc {
    line: Arc<dyn InterruptLine>,
    timers: Arc<Timers>,
    armed: OnceLock<[Timer; 2]>,
    registers: Mutex<Registers>,
}

impl Rtc {
    /// A clock that shows the machine's wall time in UTC, and CMOS memory for `config`.
    pub fn new(timers: Arc<Timers>, line: Arc<dyn InterruptLine>, config: &CmosConfig) -> Arc<Rtc> {
        let registers = Registers {
            index: 0,
            cmos: cmos(config),
            flags: 0,
            offset: 0,
            frozen: None,
            seen_second: seconds(timers.clock().wall()),
            seen_tick: 0,
        };
        let rtc = Arc::new(Rtc { line, timers: timers.clone(), armed: OnceLock::new(), registers: Mutex::new(registers) });
        let client: Weak<dyn TimerClient> = Arc::<Rtc>::downgrade(&rtc);
        let _ = rtc.armed.set([TOKEN_SECOND, TOKEN_PERIODIC].map(|token| timers.timer(client.clone(), token)));
        rtc
    }

    /// Puts the ports into `map`.
    pub fn map(self: &Arc<Self>, map: &mut DeviceMap) {
        map.add_ports(INDEX..=DATA, self.clone());
    }

    /// What a reset of the machine does: interrupts off. Time and memory have a battery.
    pub fn reset(&self) {
        let mut registers = self.lock();
        registers.cmos[usize::from(REGISTER_B)] &= !(PERIODIC | ALARM | UPDATE);
        registers.flags = 0;
        self.update(&registers);
    }

    /// Makes line and timers agree with the registers.
    fn update(&self, registers: &Registers) {
        self.line.set(registers.interrupt());
        let Some(&[second, periodic]) = self.armed.get() else { return };
        let (now, wall) = (self.timers.clock().now(), self.timers.clock().wall());
        let wants_seconds = registers.b() & (ALARM | UPDATE) != 0;
        let next_second = now.saturating_add(NANOS - u64::from(wall.subsec_nanos()));
        self.timers.arm(second, wants_seconds.then_some(next_second));
        let period = registers.period().filter(|_| registers.b() & PERIODIC != 0);
        self.timers.arm(periodic, period.map(|period| (now / period).saturating_add(1).saturating_mul(period)));
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers {
    fn b(&self) -> u8 {
        self.cmos[usize::from(REGISTER_B)]
    }

    fn interrupt(&self) -> bool {
        self.flags & self.b() & (PERIODIC | ALARM | UPDATE) != 0
    }

    /// Nanoseconds between periodic ticks, by the rate in register A.
    fn period(&self) -> Option<u64> {
        let rate = match self.cmos[usize::from(REGISTER_A)] & 0xf {
            0 => return None,
            // The two fastest rates are taken by these two.
            rate @ 1..3 => rate + 7,
            rate => rate,
        };
        Some((NANOS << (rate - 1)) / 32_768)
    }

    /// The time that the guest sees.
    fn calendar(&self, wall: Duration) -> Calendar {
        self.frozen.unwrap_or_else(|| Calendar::from_seconds(seconds(wall).saturating_add(self.offset)))
    }

    /// Raises the flags of what happened since the last time.
    fn catch_up(&mut self, now: u64, wall: Duration) {
        let second = seconds(wall);
        if second > self.seen_second && self.b() & SET == 0 {
            self.flags |= UPDATE;
            let first = self.seen_second.max(second - DAY) + 1;
            if (first..=second).any(|second| self.alarm_matches(second)) {
                self.flags |= ALARM;
            }
        }
        self.seen_second = self.seen_second.max(second);
        let tick = self.period().map_or(0, |period| now / period);
        if tick > self.seen_tick {
            self.flags |= PERIODIC;
        }
        self.seen_tick = tick;
    }

    fn alarm_matches(&self, second: i64) -> bool {
        let time = Calendar::from_seconds(second.saturating_add(self.offset));
        let matches = |register: u8, value: u8| {
            let alarm = self.cmos[usize::from(register)];
            alarm >= ANY || alarm == value
        };
        matches(ALARM_SECONDS, self.encode(time.second))
            && matches(ALARM_MINUTES, self.encode(time.minute))
            && matches(ALARM_HOURS, self.encode_hour(time.hour))
    }

    fn encode(&self, value: u8) -> u8 {
        if self.b() & BINARY != 0 { value } else { (value / 10) << 4 | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.b() & BINARY != 0 { value } else { (value >> 4) * 10 + (value & 0xf) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.b() & HOURS_24 != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { PM } else { 0 };
        self.encode((hour + 11) % 12 + 1) | pm
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.b() & HOURS_24 != 0 {
            return self.decode(value);
        }
        self.decode(value & !PM) % 12 + if value & PM != 0 { 12 } else { 0 }
    }

    fn read(&mut self, now: u64, wall: Duration) -> u8 {
        let index = self.index;
        let time = self.calendar(wall);
        match index {
            0x00 => self.encode(time.second),
            0x02 => self.encode(time.minute),
            0x04 => self.encode_hour(time.hour),
            0x06 => self.encode(time.weekday()),
            0x07 => self.encode(time.day),
            0x08 => self.encode(time.month),
            0x09 => self.encode((time.year % 100) as u8),
            CENTURY => self.encode((time.year / 100) as u8),
            REGISTER_A => {
                let near = u64::from(wall.subsec_nanos()) >= NANOS - u64::from(UPDATE_NS) && self.b() & SET == 0;
                self.cmos[usize::from(index)] | if near { UPDATE_IN_PROGRESS } else { 0 }
            }
            REGISTER_C => {
                self.catch_up(now, wall);
                let interrupt = if self.interrupt() { INTERRUPT } else { 0 };
                std::mem::take(&mut self.flags) | interrupt
            }
            REGISTER_D => VALID,
            _ => self.cmos[usize::from(index)],
        }
    }

    fn write(&mut self, value: u8, now: u64, wall: Duration) {
        let index = self.index;
        match index {
            0x00 | 0x02 | 0x04 | 0x06..=0x09 | CENTURY => self.set_time(index, value, wall),
            REGISTER_A => {
                self.cmos[usize::from(index)] = value & !UPDATE_IN_PROGRESS;
                self.seen_tick = self.period().map_or(0, |period| now / period);
            }
            REGISTER_B => {
                // Things that happened before somebody wanted to know them do not count.
                self.catch_up(now, wall);
                self.flags &= self.b();
                let was_set = self.b() & SET != 0;
                self.cmos[usize::from(index)] = value;
                match (was_set, value & SET != 0) {
                    (false, true) => self.frozen = Some(self.calendar(wall)),
                    (true, false) => self.run_from_frozen(wall),
                    _ => {}
                }
            }
            REGISTER_C | REGISTER_D => {}
            _ => self.cmos[usize::from(index)] = value,
        }
    }

    fn set_time(&mut self, index: u8, value: u8, wall: Duration) {
        let mut time = self.calendar(wall);
        let plain = self.decode(value);
        match index {
            0x00 => time.second = plain,
            0x02 => time.minute = plain,
            0x04 => time.hour = self.decode_hour(value),
            0x07 => time.day = plain,
            0x08 => time.month = plain,
            0x09 => time.year = time.year / 100 * 100 + u16::from(plain % 100),
            CENTURY => time.year = u16::from(plain % 100) * 100 + time.year % 100,
            // The weekday follows from the date.
            _ => {}
        }
        let stopped = self.frozen.is_some();
        self.frozen = Some(time);
        if !stopped {
            self.run_from_frozen(wall);
        }
    }

    fn run_from_frozen(&mut self, wall: Duration) {
        if let Some(time) = self.frozen.take() {
            self.offset = time.to_seconds().saturating_sub(seconds(wall));
        }
    }
}

impl PortDevice for Rtc {
    fn port_in(&self, port: u16, size: u8) -> u32 {
        let (now, wall) = (self.timers.clock().now(), self.timers.clock().wall());
        let mut registers = self.lock();
        let value = read_bytes(port, size, |port| match port {
            DATA => registers.read(now, wall),
            _ => 0xff,
        });
        if registers.index == REGISTER_C {
            self.line.set(registers.interrupt());
        }
        value
    }

    fn port_out(&self, port: u16, size: u8, value: u32) {
        let (now, wall) = (self.timers.clock().now(), self.timers.clock().wall());
        let mut registers = self.lock();
        write_bytes(port, size, value, |port, byte| match port {
            // Bit 7 masks NMI, of which the board has none.
            INDEX => registers.index = byte & 0x7f,
            DATA => {
                registers.write(byte, now, wall);
                if matches!(registers.index, REGISTER_A | REGISTER_B) {
                    self.update(&registers);
                }
            }
            _ => {}
        });
    }
}

impl TimerClient for Rtc {
    fn timer_due(&self, _token: u64) {
        let (now, wall) = (self.timers.clock().now(), self.timers.clock().wall());
        let mut registers = self.lock();
        registers.catch_up(now, wall);
        self.update(&registers);
    }
}

impl Snapshot for Rtc {
    fn state(&self) -> Saved {
        Saved::new(STATE.0, STATE.1, &*self.lock())
    }

    fn restore(&self, state: &Saved) -> Result<(), RestoreError> {
        let new: Registers = state.open(STATE.0, STATE.1)?;
        if new.cmos.len() != SIZE || usize::from(new.index) >= SIZE {
            return Err(RestoreError::Impossible { device: STATE.0, what: "CMOS memory has 128 bytes" });
        }
        let mut registers = self.lock();
        *registers = new;
        self.update(&registers);
        Ok(())
    }
}

/// CMOS memory as SeaBIOS reads it (its `docs/` and `src/hw/rtc.h`), the same bytes as QEMU's.
fn cmos(config: &CmosConfig) -> Vec<u8> {
    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    let mut cmos = vec![0; SIZE];
    cmos[usize::from(REGISTER_A)] = REGISTER_A_RESET;
    cmos[usize::from(REGISTER_B)] = HOURS_24;
    let mut word = |at: usize, value: u64| {
        let value = u16::try_from(value).unwrap_or(u16::MAX);
        cmos[at..at + 2].copy_from_slice(&value.to_le_bytes());
    };
    // Conventional memory; above 1 MiB in KiB, twice; above 16 MiB in units of 64 KiB.
    word(0x15, 640);
    let extended = config.low_memory.saturating_sub(MIB) / KIB;
    word(0x17, extended);
    word(0x30, extended);
    word(0x34, config.low_memory.saturating_sub(16 * MIB) / (64 * KIB));
    let high = (config.high_memory / (64 * KIB)).to_le_bytes();
    cmos[0x5b..0x5e].copy_from_slice(&high[..3]);
    cmos[0x5f] = config.processors.saturating_sub(1);
    // Boot order: hard disk, CD; no floppy check.
    cmos[0x3d] = 0x32;
    cmos[0x38] = 0x01;
    // Equipment: FPU, no display adapter, no floppy.
    cmos[0x14] = 0x02;
    cmos
}

fn seconds(wall: Duration) -> i64 {
    i64::try_from(wall.as_secs()).unwrap_or(i64::MAX / 2)
}

#[cfg(test)]
mod tests;
