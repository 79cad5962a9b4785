//! Programmable interval timer, and the port that gates its third channel.
//!
//! Intel 8254 data sheet (order 231164) and IBM PC AT Technical Reference for port 0x61. Channel 0 is ISA interrupt 0, channel
//! 1 (memory refresh) counts and does nothing, channel 2 is gated and read back by port 0x61; no speaker hears it.
//!
//! Nothing ticks: count and output are computed from the time since the count was loaded. Only channel 0 has a timer.
//! Ticks that pass while the machine cannot run are lost, as on a machine whose interrupts are off.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use serde::{Deserialize, Serialize};
use vmm::time::{Timer, TimerClient, Timers};

use crate::ports::{read_bytes, write_bytes};
use crate::snapshot::{RestoreError, Saved, Snapshot};
use crate::{DeviceMap, InterruptLine, PortDevice};

/// Name and version in a [`Saved`] state.
const STATE: (&str, u32) = ("pit", 1);
const CHANNEL0: u16 = 0x40;
const CONTROL: u16 = 0x43;
const PORT_B: u16 = 0x61;
/// ISA interrupt of channel 0.
pub const TIMER_IRQ: u8 = 0;
/// Input clock.
const HZ: u128 = 1_193_182;
const NANOS: u128 = 1_000_000_000;
/// The refresh bit of port 0x61 changes this often.
const REFRESH_NS: u64 = 15_085;
/// A guest that asks for faster interrupts gets them this often, so that it cannot keep a host thread busy.
const SHORTEST_PERIOD_NS: u64 = 20_000;

const GATE2: u8 = 1;
const SPEAKER: u8 = 2;

/// Which bytes of a count are read or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Access {
    Low,
    High,
    Both,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Channel {
    mode: u8,
    bcd: bool,
    access: Access,
    gate: bool,
    /// 1 to 65536, or 10000 in BCD.
    count: u32,
    /// When counting began; `None` before a count is loaded, and before the trigger in modes 1 and 5.
    start: Option<u64>,
    /// Count loaded (the null count bit is clear).
    loaded: bool,
    /// When a low gate stopped the count, in modes 0 and 4.
    stopped: Option<u64>,
    /// Low byte of a count whose high byte is to come.
    write_low: Option<u8>,
    /// The next read gives the high byte.
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Channel {
    fn new(gate: bool) -> Channel {
        Channel {
            mode: 3,
            bcd: false,
            access: Access::Both,
            gate,
            count: 0x10000,
            start: None,
            loaded: false,
            stopped: None,
            write_low: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
        }
    }

    /// Input clocks since counting began.
    fn elapsed(&self, now: u64) -> Option<u64> {
        let ns = self.stopped.unwrap_or(now).saturating_sub(self.start?);
        Some((u128::from(ns) * HZ / NANOS) as u64)
    }

    fn value(&self, now: u64) -> u16 {
        let count = u64::from(self.count);
        let Some(elapsed) = self.elapsed(now) else { return self.encode(self.count) };
        let modulus = if self.bcd { 10_000 } else { 0x10000 };
        let value = match self.mode {
            2 => count - elapsed % count,
            // Two at a time, once for each half of the square.
            3 => count - 2 * elapsed % count,
            // Past zero they go on from the top.
            _ => (count + modulus - elapsed % modulus) % modulus,
        };
        self.encode(value as u32)
    }

    fn encode(&self, value: u32) -> u16 {
        if !self.bcd {
            return value as u16;
        }
        [1000, 100, 10, 1].iter().fold(0, |digits, unit| digits << 4 | (value / unit % 10) as u16)
    }

    fn output(&self, now: u64) -> bool {
        let count = u64::from(self.count);
        let Some(elapsed) = self.elapsed(now) else { return self.mode != 0 };
        match self.mode {
            0 | 1 => elapsed >= count,
            2 => elapsed % count != count - 1,
            3 => elapsed % count < count.div_ceil(2),
            _ => elapsed != count,
        }
    }

    /// When the output rises next after `now`, which is the interrupt on channel 0.
    fn next_rise(&self, now: u64) -> Option<u64> {
        let (start, elapsed) = (self.start?, self.elapsed(now)?);
        let count = u64::from(self.count);
        let ticks = match self.mode {
            2 | 3 => (elapsed / count + 1) * count,
            0 if elapsed < count => count,
            4 if elapsed <= count => count + 1,
            _ => return None,
        };
        let at = start.saturating_add((u128::from(ticks) * NANOS).div_ceil(HZ) as u64);
        Some(if matches!(self.mode, 2 | 3) { at.max(now.saturating_add(SHORTEST_PERIOD_NS)) } else { at })
    }

    fn control(&mut self, value: u8) {
        self.access = match value >> 4 & 3 {
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        // Modes 6 and 7 are 2 and 3.
        self.mode = match value >> 1 & 7 {
            mode @ 0..6 => mode,
            mode => mode - 4,
        };
        *self = Channel {
            mode: self.mode,
            access: self.access,
            bcd: value & 1 != 0,
            count: if value & 1 != 0 { 10_000 } else { 0x10000 },
            ..Channel::new(self.gate)
        };
    }

    fn status(&self, now: u64) -> u8 {
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::Both => 3,
        };
        u8::from(self.output(now)) << 7 | u8::from(!self.loaded) << 6 | access << 4 | self.mode << 1 | u8::from(self.bcd)
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let value = self.latched_count.unwrap_or_else(|| self.value(now));
        let (high, last) = match self.access {
            Access::Low => (false, true),
            Access::High => (true, true),
            Access::Both => {
                self.read_high = !self.read_high;
                (!self.read_high, !self.read_high)
            }
        };
        if last {
            self.latched_count = None;
        }
        if high { (value >> 8) as u8 } else { value as u8 }
    }

    fn write(&mut self, value: u8, now: u64) {
        let count = match (self.access, self.write_low) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::Both, None) => {
                self.write_low = Some(value);
                if self.mode == 0 {
                    // The first byte stops the count.
                    self.start = None;
                    self.loaded = false;
                }
                return;
            }
            (Access::Both, Some(low)) => u16::from_le_bytes([low, value]),
        };
        self.write_low = None;
        self.load(count, now);
    }

    fn load(&mut self, count: u16, now: u64) {
        self.count = if self.bcd {
            let digits = [12, 8, 4, 0].map(|shift| u32::from(count >> shift & 0xf).min(9));
            digits.iter().fold(0, |value, digit| value * 10 + digit)
        } else {
            u32::from(count)
        };
        if self.count == 0 {
            self.count = if self.bcd { 10_000 } else { 0x10000 };
        }
        self.loaded = true;
        // Modes 1 and 5 wait for their trigger.
        if !matches!(self.mode, 1 | 5) {
            self.start = Some(now);
            self.stopped = (!self.gate && matches!(self.mode, 0 | 4)).then_some(now);
        }
    }

    fn set_gate(&mut self, gate: bool, now: u64) {
        let rises = gate && !self.gate;
        let falls = !gate && self.gate;
        self.gate = gate;
        match self.mode {
            0 | 4 if falls && self.start.is_some() => self.stopped = Some(now),
            0 | 4 if rises => {
                if let (Some(start), Some(stopped)) = (self.start, self.stopped.take()) {
                    self.start = Some(start + now.saturating_sub(stopped));
                }
            }
            1 | 2 | 3 | 5 if rises && self.loaded => self.start = Some(now),
            _ => {}
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    channels: [Channel; 3],
    speaker: bool,
    /// When channel 0 interrupts next.
    deadline: Option<u64>,
}

/// The timer chip and port 0x61.
pub struct Pit {
    line: Arc<dyn InterruptLine>,
    timers: Arc<Timers>,
    timer: OnceLock<Timer>,
    registers: Mutex<Registers>,
}

impl Pit {
    /// Power-on state: no channel counts.
    pub fn new(timers: Arc<Timers>, line: Arc<dyn InterruptLine>) -> Arc<Pit> {
        let pit = Arc::new(Pit { line, timers: timers.clone(), timer: OnceLock::new(), registers: Mutex::new(Registers::new()) });
        let client: Weak<dyn TimerClient> = Arc::<Pit>::downgrade(&pit);
        let _ = pit.timer.set(timers.timer(client, 0));
        pit
    }

    /// Puts the ports into `map`.
    pub fn map(self: &Arc<Self>, map: &mut DeviceMap) {
        map.add_ports(CHANNEL0..=CONTROL, self.clone());
        map.add_ports(PORT_B..=PORT_B, self.clone());
    }

    /// Power-on state.
    pub fn reset(&self) {
        let mut registers = self.lock();
        *registers = Registers::new();
        self.arm(&registers);
    }

    fn arm(&self, registers: &Registers) {
        if let Some(&timer) = self.timer.get() {
            self.timers.arm(timer, registers.deadline);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers {
    fn new() -> Registers {
        Registers { channels: [Channel::new(true), Channel::new(true), Channel::new(false)], speaker: false, deadline: None }
    }

    fn read(&mut self, port: u16, now: u64) -> u8 {
        match port {
            PORT_B => {
                let channel = &self.channels[2];
                u8::from(channel.gate)
                    | u8::from(self.speaker) << 1
                    | u8::from(!(now / REFRESH_NS).is_multiple_of(2)) << 4
                    | u8::from(channel.output(now)) << 5
            }
            CHANNEL0..CONTROL => self.channels[usize::from(port - CHANNEL0)].read(now),
            _ => 0xff,
        }
    }

    fn write(&mut self, port: u16, value: u8, now: u64) {
        match port {
            PORT_B => {
                self.speaker = value & SPEAKER != 0;
                self.channels[2].set_gate(value & GATE2 != 0, now);
            }
            CHANNEL0..CONTROL => {
                self.channels[usize::from(port - CHANNEL0)].write(value, now);
                if port == CHANNEL0 {
                    self.deadline = self.channels[0].next_rise(now);
                }
            }
            CONTROL => self.write_control(value, now),
            _ => {}
        }
    }

    fn write_control(&mut self, value: u8, now: u64) {
        let select = usize::from(value >> 6);
        let Some(channel) = self.channels.get_mut(select) else { return self.read_back(value, now) };
        if value & 0x30 != 0 {
            channel.control(value);
            if select == 0 {
                self.deadline = None;
            }
        } else if channel.latched_count.is_none() {
            channel.latched_count = Some(channel.value(now));
        }
    }

    /// Read-back command: latches count (bit 5 clear) and status (bit 4 clear) of the channels in bits 1 to 3.
    fn read_back(&mut self, value: u8, now: u64) {
        for (bit, channel) in (1u8..).zip(&mut self.channels) {
            if value >> bit & 1 == 0 {
                continue;
            }
            if value & 0x20 == 0 && channel.latched_count.is_none() {
                channel.latched_count = Some(channel.value(now));
            }
            if value & 0x10 == 0 && channel.latched_status.is_none() {
                channel.latched_status = Some(channel.status(now));
            }
        }
    }
}

impl PortDevice for Pit {
    fn port_in(&self, port: u16, size: u8) -> u32 {
        let now = self.timers.clock().now();
        let mut registers = self.lock();
        read_bytes(port, size, |port| registers.read(port, now))
    }

    fn port_out(&self, port: u16, size: u8, value: u32) {
        let now = self.timers.clock().now();
        let mut registers = self.lock();
        let before = registers.deadline;
        write_bytes(port, size, value, |port, byte| registers.write(port, byte, now));
        if registers.deadline != before {
            self.arm(&registers);
        }
    }
}

impl TimerClient for Pit {
    fn timer_due(&self, _token: u64) {
        let now = self.timers.clock().now();
        let mut registers = self.lock();
        // The guest may have changed the channel between the deadline and this call.
        if registers.deadline.is_none_or(|deadline| deadline > now) {
            return;
        }
        self.line.set(true);
        self.line.set(false);
        registers.deadline = registers.channels[0].next_rise(now);
        self.arm(&registers);
    }
}

impl Snapshot for Pit {
    fn state(&self) -> Saved {
        Saved::new(STATE.0, STATE.1, &*self.lock())
    }

    fn restore(&self, state: &Saved) -> Result<(), RestoreError> {
        let new: Registers = state.open(STATE.0, STATE.1)?;
        if new.channels.iter().any(|channel| !(1..=0x10000).contains(&channel.count) || channel.mode > 5) {
            return Err(RestoreError::Impossible { device: STATE.0, what: "a channel has an impossible count or mode" });
        }
        let mut registers = self.lock();
        *registers = new;
        self.arm(&registers);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Level, Time};

    fn pit() -> (Arc<Pit>, Time, Arc<Level>) {
        let (time, line) = (Time::new(Duration::ZERO), Arc::new(Level::default()));
        (Pit::new(time.timers.clone(), line.clone()), time, line)
    }

    /// Nanoseconds of `ticks`, rounded up.
    fn ns(ticks: u64) -> u64 {
        (u128::from(ticks) * NANOS).div_ceil(HZ) as u64
    }

    fn load(pit: &Pit, channel: u16, control: u8, count: u16) {
        pit.port_out(CONTROL, 1, control.into());
        pit.port_out(CHANNEL0 + channel, 1, u32::from(count) & 0xff);
        pit.port_out(CHANNEL0 + channel, 1, u32::from(count) >> 8);
    }

    fn count(pit: &Pit, channel: u16) -> u32 {
        pit.port_in(CHANNEL0 + channel, 1) | pit.port_in(CHANNEL0 + channel, 1) << 8
    }

    #[test]
    fn rate_generator_interrupts_once_a_period() {
        let (pit, time, line) = pit();
        load(&pit, 0, 0x34, 11932);
        for n in 1..=5 {
            time.advance(ns(11932));
            assert_eq!(line.rises(), n);
        }
        assert_eq!(pit.port_in(CHANNEL0, 1) | pit.port_in(CHANNEL0, 1) << 8, 11932);
    }

    #[test]
    fn terminal_count_interrupts_once() {
        let (pit, time, line) = pit();
        load(&pit, 0, 0x30, 1000);
        time.advance(ns(999));
        assert_eq!(line.rises(), 0);
        time.advance(ns(2));
        time.advance(ns(100_000));
        assert_eq!(line.rises(), 1);
    }

    #[test]
    fn missed_ticks_are_lost() {
        let (pit, time, line) = pit();
        load(&pit, 0, 0x36, 1000);
        time.advance(ns(10_500));
        assert_eq!(line.rises(), 1);
        time.advance(ns(501));
        assert_eq!(line.rises(), 2);
    }

    #[test]
    fn channel_two_tells_the_end_of_its_count_as_calibration_loops_need() {
        let (pit, time, _) = pit();
        pit.port_out(PORT_B, 1, 1);
        load(&pit, 2, 0xb0, 5000);
        assert_eq!(pit.port_in(PORT_B, 1) & 0x21, 1);
        time.advance(ns(2500));
        assert_eq!(count(&pit, 2), 2500);
        time.advance(ns(2500));
        assert_eq!(pit.port_in(PORT_B, 1) & 0x20, 0x20);
    }

    #[test]
    fn low_gate_holds_the_count() {
        let (pit, time, _) = pit();
        pit.port_out(PORT_B, 1, 1);
        load(&pit, 2, 0xb0, 5000);
        time.advance(ns(1000));
        pit.port_out(PORT_B, 1, 0);
        time.advance(ns(50_000));
        assert_eq!(count(&pit, 2), 4000);
        pit.port_out(PORT_B, 1, 1);
        time.advance(ns(1000));
        assert!((2999..=3001).contains(&count(&pit, 2)));
    }

    #[test]
    fn latch_holds_the_count_until_it_is_read() {
        let (pit, time, _) = pit();
        load(&pit, 0, 0x34, 10_000);
        time.advance(ns(100));
        pit.port_out(CONTROL, 1, 0x00);
        time.advance(ns(100));
        assert_eq!(count(&pit, 0), 9900);
        assert_eq!(count(&pit, 0), 9800);
    }

    #[test]
    fn read_back_latches_status_then_count() {
        let (pit, time, _) = pit();
        load(&pit, 0, 0x34, 10_000);
        time.advance(ns(100));
        pit.port_out(CONTROL, 1, 0xc2);
        assert_eq!(pit.port_in(CHANNEL0, 1), 0xb4);
        assert_eq!(count(&pit, 0), 9900);
        pit.port_out(CONTROL, 1, 0x34);
        pit.port_out(CONTROL, 1, 0xe2);
        assert_eq!(pit.port_in(CHANNEL0, 1), 0xf4, "null count until one is loaded");
    }

    #[test]
    fn square_wave_is_high_for_the_first_half() {
        let (pit, time, _) = pit();
        pit.port_out(PORT_B, 1, 1);
        load(&pit, 2, 0xb6, 1000);
        assert_eq!(pit.port_in(PORT_B, 1) & 0x20, 0x20);
        time.advance(ns(501));
        assert_eq!(pit.port_in(PORT_B, 1) & 0x20, 0);
        time.advance(ns(500));
        assert_eq!(pit.port_in(PORT_B, 1) & 0x20, 0x20);
    }

    #[test]
    fn bcd_counts_in_decimal() {
        let (pit, time, _) = pit();
        load(&pit, 0, 0x35, 0x1000);
        time.advance(ns(1));
        assert_eq!(count(&pit, 0), 0x0999);
    }

    #[test]
    fn state_survives_a_restore_and_arms_the_timer() {
        let (pit, time, _) = pit();
        load(&pit, 0, 0x34, 1000);
        let (other, other_time, line) = self::pit();
        other.restore(&pit.state()).unwrap();
        assert_eq!(other.state(), pit.state());
        other_time.advance(ns(1000));
        assert_eq!(line.rises(), 1);
        drop(time);
    }

    proptest! {
        #[test]
        fn no_guest_input_panics(steps in prop::collection::vec((0u16..5, any::<u32>(), 0usize..3, any::<bool>(), any::<u32>()), 0..300)) {
            let (pit, time, _) = pit();
            for (port, value, size, write, wait) in steps {
                let port = if port == 4 { PORT_B } else { CHANNEL0 + port };
                let size = [1, 2, 4][size];
                if write { pit.port_out(port, size, value) } else { pit.port_in(port, size); }
                time.advance(u64::from(wait >> (value & 31)));
            }
            let saved = pit.state();
            pit.restore(&saved).unwrap();
        }
    }
}
