//! Registers of one local APIC and what they decide: priorities, acceptance, timer arithmetic. No locks and no other
//! processors in here; [`super::LocalApic`] adds both.

use abi::apic::*;
use serde::{Deserialize, Serialize};

use super::bus::Message;

/// A 256-bit register: one bit for each vector.
pub(super) type Vectors = [u32; 8];

/// Vectors below this one are exceptions and illegal in messages.
const FIRST_LEGAL_VECTOR: u8 = 16;
/// Version register: integrated APIC 0x14, six LVT entries, no EOI-broadcast suppression.
pub(super) const VERSION: u32 = 0x14 | (5 << 16);
/// A guest that asks for a faster periodic timer than this gets this, so that it cannot keep a host thread busy.
const SHORTEST_PERIOD_NS: u64 = 10_000;
const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// The LVT entries in the order of their registers from 0x320.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lvt {
    Timer,
    Thermal,
    Pmc,
    Lint0,
    Lint1,
    Error,
}

impl Lvt {
    pub(super) fn at(offset: u64) -> Option<Lvt> {
        Some(match offset {
            offset::LVT_TIMER => Lvt::Timer,
            offset::LVT_THERMAL => Lvt::Thermal,
            offset::LVT_PMC => Lvt::Pmc,
            offset::LVT_LINT0 => Lvt::Lint0,
            offset::LVT_LINT1 => Lvt::Lint1,
            offset::LVT_ERROR => Lvt::Error,
            _ => return None,
        })
    }

    /// Bits a write can change, SDM figure 11-8.
    pub(super) fn writable(self) -> u32 {
        const VECTOR: u32 = 0xff;
        const POLARITY: u32 = 1 << 13;
        VECTOR
            | LVT_MASKED
            | match self {
                Lvt::Timer => LVT_TIMER_PERIODIC | LVT_TIMER_DEADLINE,
                Lvt::Thermal | Lvt::Pmc => LVT_MODE,
                Lvt::Lint0 | Lvt::Lint1 => LVT_MODE | POLARITY | LVT_LEVEL,
                Lvt::Error => 0,
            }
    }

    /// Read-only status bits, which a write may hold without harm.
    pub(super) fn read_only(self) -> u32 {
        const DELIVERY_STATUS: u32 = 1 << 12;
        match self {
            Lvt::Lint0 | Lvt::Lint1 => DELIVERY_STATUS | LVT_REMOTE_IRR,
            _ => DELIVERY_STATUS,
        }
    }
}

/// Frequencies of a machine's processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApicClock {
    /// Frequency of the time-stamp counter.
    pub tsc_hz: u64,
    /// Frequency of the timer's input before its divider.
    pub timer_hz: u64,
}

/// State of one local APIC. Times are nanoseconds of the machine's clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    pub(super) id: u32,
    pub(super) base: u64,
    pub(super) tpr: u8,
    /// xAPIC logical id, bits 31:24 of LDR.
    pub(super) logical_id: u8,
    pub(super) dfr: u32,
    pub(super) svr: u32,
    pub(super) isr: Vectors,
    pub(super) tmr: Vectors,
    pub(super) irr: Vectors,
    pub(super) esr: u32,
    /// Errors since the last write to ESR.
    pub(super) errors: u32,
    pub(super) icr: u64,
    pub(super) lvt: [u32; 6],
    pub(super) initial_count: u32,
    pub(super) divide: u32,
    /// When the timer is due next.
    pub(super) deadline: Option<u64>,
    /// What the guest wrote to IA32_TSC_DEADLINE; 0 when disarmed.
    pub(super) tsc_deadline: u64,
    /// What this processor's TSC is ahead of the clock.
    pub(super) tsc_offset: u64,
    pub(super) lint0: bool,
    pub(super) lint1: bool,
    pub(super) nmi: bool,
    pub(super) init: bool,
    pub(super) sipi: Option<u8>,
    /// The guest may end what is in service by its flag.
    pub(super) eoi_offered: bool,
}

impl Registers {
    /// Power-on state of processor `id`.
    pub(super) fn new(id: u32) -> Registers {
        let bsp = if id == 0 { APIC_BASE_BSP } else { 0 };
        let mut registers = Registers {
            id,
            base: APIC_DEFAULT_BASE | APIC_BASE_ENABLE | bsp,
            tpr: 0,
            logical_id: 0,
            dfr: 0,
            svr: 0,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [0; 6],
            initial_count: 0,
            divide: 0,
            deadline: None,
            tsc_deadline: 0,
            tsc_offset: 0,
            lint0: false,
            lint1: false,
            nmi: false,
            init: false,
            sipi: None,
            eoi_offered: false,
        };
        registers.clear();
        registers
    }

    /// What power-on and INIT have in common, SDM 11.4.7.1: the id, IA32_APIC_BASE, the TSC and the level of the pins stay.
    pub(super) fn clear(&mut self) {
        self.tpr = 0;
        self.logical_id = 0;
        self.dfr = u32::MAX;
        self.svr = 0xff;
        self.isr = [0; 8];
        self.tmr = [0; 8];
        self.irr = [0; 8];
        self.esr = 0;
        self.errors = 0;
        self.icr = 0;
        self.lvt = [LVT_MASKED; 6];
        if self.base & APIC_BASE_BSP != 0 {
            // What every firmware does at once: the 8259 reaches the boot processor (virtual wire mode). Guests that start
            // without firmware find it so.
            self.lvt[Lvt::Lint0 as usize] = u32::from(delivery::EXTINT) << 8;
        }
        self.initial_count = 0;
        self.divide = 0;
        self.deadline = None;
        self.tsc_deadline = 0;
        self.nmi = false;
        self.sipi = None;
        self.eoi_offered = false;
    }

    pub(super) fn enabled(&self) -> bool {
        self.base & APIC_BASE_ENABLE != 0
    }

    pub(super) fn x2apic(&self) -> bool {
        self.base & (APIC_BASE_ENABLE | APIC_BASE_EXTD) == APIC_BASE_ENABLE | APIC_BASE_EXTD
    }

    pub(super) fn software_enabled(&self) -> bool {
        self.svr & SVR_ENABLE != 0
    }

    pub(super) fn lvt(&self, entry: Lvt) -> u32 {
        self.lvt[entry as usize]
    }

    /// Whether a message with this destination is for us, SDM 11.6.2.
    pub(super) fn is_addressed(&self, destination: u32, logical: bool) -> bool {
        if !self.enabled() {
            return false;
        }
        if !logical {
            return destination == Message::BROADCAST || destination == self.id;
        }
        if destination == Message::BROADCAST {
            return true;
        }
        if self.x2apic() {
            let own = self.x2apic_ldr();
            return destination >> 16 == own >> 16 && destination & own & 0xffff != 0;
        }
        const FLAT: u32 = 0xf;
        let Ok(destination) = u8::try_from(destination) else { return false };
        match self.dfr >> 28 {
            FLAT => destination & self.logical_id != 0,
            _ => destination >> 4 == self.logical_id >> 4 && destination & self.logical_id & 0xf != 0,
        }
    }

    /// Logical id in x2APIC mode, SDM 11.12.10.2.
    pub(super) fn x2apic_ldr(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 0xf)
    }

    /// Processor priority, SDM 11.8.3.1.
    pub(super) fn ppr(&self) -> u8 {
        let in_service = highest(&self.isr).unwrap_or(0);
        if self.tpr >> 4 >= in_service >> 4 { self.tpr } else { in_service & 0xf0 }
    }

    /// The vector to deliver now.
    pub(super) fn deliverable(&self) -> Option<u8> {
        let vector = highest(&self.irr)?;
        (self.enabled() && vector >> 4 > self.ppr() >> 4).then_some(vector)
    }

    /// Whether the 8259's request passes LINT0.
    pub(super) fn extint(&self) -> bool {
        let lint0 = self.lvt(Lvt::Lint0);
        let passes = lint0 & LVT_MASKED == 0 && lint0 & LVT_MODE == u32::from(delivery::EXTINT) << 8;
        self.lint0 && (passes || !self.enabled())
    }

    /// Records a request; an illegal vector is an error instead.
    pub(super) fn request(&mut self, vector: u8, level_triggered: bool) {
        if !self.software_enabled() {
            return;
        }
        if vector < FIRST_LEGAL_VECTOR {
            self.error(ESR_RECEIVE_ILLEGAL);
            return;
        }
        set(&mut self.irr, vector);
        if level_triggered { set(&mut self.tmr, vector) } else { clear(&mut self.tmr, vector) }
    }

    /// Records an error and requests the error interrupt.
    pub(super) fn error(&mut self, bit: u32) {
        if self.errors & bit != 0 {
            return;
        }
        self.errors |= bit;
        let vector = self.lvt(Lvt::Error) as u8;
        // An illegal vector in the error entry itself would come back here: `errors` has the bit by then, or gets one more.
        if self.lvt(Lvt::Error) & LVT_MASKED == 0 {
            self.request(vector, false);
        }
    }

    /// A local source asks for its interrupt.
    pub(super) fn fire(&mut self, entry: Lvt) {
        let lvt = self.lvt(entry);
        if lvt & LVT_MASKED != 0 || !self.enabled() {
            return;
        }
        let mode = if entry == Lvt::Timer || entry == Lvt::Error { delivery::FIXED } else { (lvt >> 8 & 7) as u8 };
        match mode {
            delivery::FIXED => {
                let level = matches!(entry, Lvt::Lint0 | Lvt::Lint1) && lvt & LVT_LEVEL != 0;
                self.request(lvt as u8, level);
            }
            delivery::NMI => self.nmi = true,
            delivery::INIT => self.init = true,
            // ExtINT follows the level of the pin, see `extint`; there is no system management mode.
            _ => {}
        }
    }

    /// A message arrived.
    pub(super) fn accept(&mut self, message: &Message) {
        match message.mode {
            delivery::FIXED | delivery::LOWEST_PRIORITY => self.request(message.vector, message.level_triggered),
            delivery::NMI => self.nmi = true,
            delivery::INIT => {
                self.init = true;
                self.sipi = None;
            }
            delivery::STARTUP => self.sipi = Some(message.vector),
            _ => {}
        }
    }

    /// The guest is done with the interrupt in service. The vector, when it was level triggered.
    pub(super) fn end_of_interrupt(&mut self) -> Option<u8> {
        let vector = highest(&self.isr)?;
        clear(&mut self.isr, vector);
        is_set(&self.tmr, vector).then_some(vector)
    }

    /// Whether the end of what was just taken into service matters to nobody: it was an edge, interrupts nothing else, and nothing waits.
    pub(super) fn ends_silently(&self) -> bool {
        let in_service: u32 = self.isr.iter().map(|word| word.count_ones()).sum();
        in_service == 1 && self.irr == [0; 8] && highest(&self.isr).is_some_and(|vector| !is_set(&self.tmr, vector))
    }

    /// Whether something is requested that may be deliverable if the guest has accepted the offer.
    pub(super) fn waits_for_offer(&self) -> bool {
        self.eoi_offered && self.enabled() && self.irr != [0; 8]
    }

    /// Time-stamp counter at clock time `now`.
    pub(super) fn tsc(&self, now: u64, clock: ApicClock) -> u64 {
        (scale(now, clock.tsc_hz, NANOS_PER_SECOND) as u64).wrapping_add(self.tsc_offset)
    }

    /// Nanoseconds that `ticks` of the divided timer input take.
    fn timer_ns(&self, ticks: u32, clock: ApicClock) -> u64 {
        let input = u64::from(ticks) * self.divisor();
        clamp(u128::from(input) * NANOS_PER_SECOND / u128::from(clock.timer_hz.max(1)))
    }

    /// SDM figure 11-10: bits 3, 1, 0 hold 2^(n+1), and 7 stands for 1.
    fn divisor(&self) -> u64 {
        let code = self.divide & 3 | (self.divide & 8) >> 1;
        1 << ((code + 1) & 7)
    }

    pub(super) fn is_periodic(&self) -> bool {
        self.lvt(Lvt::Timer) & (LVT_TIMER_PERIODIC | LVT_TIMER_DEADLINE) == LVT_TIMER_PERIODIC
    }

    pub(super) fn is_tsc_deadline(&self) -> bool {
        self.lvt(Lvt::Timer) & LVT_TIMER_DEADLINE != 0
    }

    fn period(&self, clock: ApicClock) -> u64 {
        self.timer_ns(self.initial_count, clock).max(SHORTEST_PERIOD_NS)
    }

    /// The guest wrote the initial count.
    pub(super) fn start_timer(&mut self, count: u32, now: u64, clock: ApicClock) {
        if self.is_tsc_deadline() {
            return;
        }
        self.initial_count = count;
        let ns = if self.is_periodic() { self.period(clock) } else { self.timer_ns(count, clock) };
        self.deadline = (count != 0).then(|| now.saturating_add(ns));
    }

    /// The divider changed while the timer may run: the remaining count goes on at the new speed.
    pub(super) fn set_divide(&mut self, value: u32, now: u64, clock: ApicClock) {
        let rest = self.current_count(now, clock);
        self.divide = value & 0xb;
        if self.deadline.is_some() && !self.is_tsc_deadline() {
            self.deadline = Some(now.saturating_add(self.timer_ns(rest, clock)));
        }
    }

    /// What the current count register reads.
    pub(super) fn current_count(&self, now: u64, clock: ApicClock) -> u32 {
        let Some(deadline) = self.deadline else { return 0 };
        if self.is_tsc_deadline() || self.initial_count == 0 {
            return 0;
        }
        let rest = match deadline.checked_sub(now) {
            Some(rest) => rest,
            None if self.is_periodic() => self.period(clock) - (now - deadline) % self.period(clock),
            None => 0,
        };
        let ticks = scale(rest, clock.timer_hz, NANOS_PER_SECOND * u128::from(self.divisor()));
        u32::try_from(ticks).unwrap_or(u32::MAX).min(self.initial_count)
    }

    /// The guest wrote IA32_TSC_DEADLINE. A deadline in the past fires at once.
    pub(super) fn set_tsc_deadline(&mut self, value: u64, now: u64, clock: ApicClock) {
        if !self.is_tsc_deadline() {
            return;
        }
        self.tsc_deadline = value;
        self.deadline = None;
        if value == 0 {
            return;
        }
        match value.checked_sub(self.tsc(now, clock)) {
            Some(ticks) if ticks > 0 => {
                let hz = u128::from(clock.tsc_hz.max(1));
                let ns = clamp((u128::from(ticks) * NANOS_PER_SECOND).div_ceil(hz));
                self.deadline = Some(now.saturating_add(ns));
            }
            _ => self.timer_expired(now, clock),
        }
    }

    /// The timer's deadline passed.
    pub(super) fn timer_expired(&mut self, now: u64, clock: ApicClock) {
        self.tsc_deadline = 0;
        self.deadline = match self.deadline {
            Some(deadline) if self.is_periodic() && self.initial_count != 0 => {
                let period = self.period(clock);
                let missed = now.saturating_sub(deadline) / period;
                Some(deadline.saturating_add(period.saturating_mul(missed + 1)))
            }
            _ => None,
        };
        self.fire(Lvt::Timer);
    }

    /// Level of LINT0 or LINT1.
    pub(super) fn set_pin(&mut self, entry: Lvt, asserted: bool) {
        let level = if entry == Lvt::Lint0 { &mut self.lint0 } else { &mut self.lint1 };
        let rises = asserted && !*level;
        *level = asserted;
        if rises {
            self.fire(entry);
        }
    }

    /// The guest wrote an LVT entry.
    pub(super) fn set_lvt(&mut self, entry: Lvt, value: u32) {
        let mut value = value & entry.writable();
        if !self.software_enabled() {
            value |= LVT_MASKED;
        }
        let old = std::mem::replace(&mut self.lvt[entry as usize], value);
        if entry == Lvt::Timer && (old ^ value) & LVT_TIMER_DEADLINE != 0 {
            self.deadline = None;
            self.tsc_deadline = 0;
            self.initial_count = 0;
        }
    }

    /// The guest wrote the spurious interrupt vector register.
    pub(super) fn set_svr(&mut self, value: u32) {
        self.svr = value & (0xff | SVR_ENABLE | SVR_NO_FOCUS);
        if !self.software_enabled() {
            for lvt in &mut self.lvt {
                *lvt |= LVT_MASKED;
            }
        }
    }
}

/// Highest vector in `vectors`.
pub(super) fn highest(vectors: &Vectors) -> Option<u8> {
    let (word, bits) = vectors.iter().enumerate().rev().find(|(_, bits)| **bits != 0)?;
    Some((word as u8) << 5 | (31 - bits.leading_zeros()) as u8)
}

pub(super) fn set(vectors: &mut Vectors, vector: u8) {
    vectors[usize::from(vector >> 5)] |= 1 << (vector & 31);
}

pub(super) fn clear(vectors: &mut Vectors, vector: u8) {
    vectors[usize::from(vector >> 5)] &= !(1 << (vector & 31));
}

pub(super) fn is_set(vectors: &Vectors, vector: u8) -> bool {
    vectors[usize::from(vector >> 5)] & 1 << (vector & 31) != 0
}

fn scale(value: u64, by: u64, divisor: u128) -> u128 {
    u128::from(value) * u128::from(by) / divisor
}

fn clamp(ns: u128) -> u64 {
    u64::try_from(ns).unwrap_or(u64::MAX)
}
