//! The paravirtual clock: pages from which a guest computes nanoseconds out of its TSC, and the time of day.
//!
//! KVM's and OpenBSD's dialects have it by the same MSRs (Linux `Documentation/virt/kvm/x86/msr.rst`; OpenBSD
//! `sys/arch/amd64/amd64/vmm_machdep.c`, `vmm_update_pvclock`), so that a machine with both has one [`PvClock`] under them.
//!
//! ```text
//!   WRMSR system time (address | 1) --> clock page written once, valid until the machine is reset:
//!                                       the TSC is stable and equal on all processors
//!   WRMSR wall clock (address)      --> time of day at system time zero
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use abi::kvm::{self as words, PvclockVcpuTimeInfo, PvclockWallClock};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use vmm::snapshot::{RestoreError, Saved, Snapshot};
use vmm::time::Clock;
use vmm::{GuestMemory, MsrFault, VcpuId};
use zerocopy::IntoBytes;

use super::page::{holds, publish};

/// Name and version in a [`Saved`] state.
const STATE: (&str, u32) = ("pvclock", 1);
const NANOSECONDS: u64 = 1_000_000_000;
/// Most readings of the host's two clocks for one pair.
const MAX_READINGS: u32 = 8;
/// Two clocks read within this many nanoseconds are taken for one moment. A reading takes some tens.
const ONE_MOMENT: u64 = 200;

/// The clock of one machine.
pub struct PvClock {
    memory: GuestMemory,
    clock: Arc<dyn Clock>,
    tsc_hz: u64,
    scale: Scale,
    state: Mutex<State>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    /// Last value written to the wall-clock MSR.
    wall_clock: u64,
    /// Last value that each processor wrote to the system-time MSR.
    system_time: Vec<u64>,
}

impl PvClock {
    /// The clock for `vcpus` processors whose TSC is `clock` counted in ticks of `tsc_hz`.
    pub fn new(memory: GuestMemory, clock: Arc<dyn Clock>, tsc_hz: u64, vcpus: u32) -> PvClock {
        let state = Mutex::new(State { wall_clock: 0, system_time: vec![0; vcpus as usize] });
        PvClock { memory, clock, tsc_hz, scale: Scale::from_hz(tsc_hz), state }
    }

    /// RDMSR. `None` when the index is not the clock's.
    pub fn read_msr(&self, vcpu: VcpuId, index: u32) -> Option<Result<u64, MsrFault>> {
        match index {
            words::MSR_WALL_CLOCK | words::MSR_WALL_CLOCK_NEW => Some(Ok(self.lock().wall_clock)),
            words::MSR_SYSTEM_TIME | words::MSR_SYSTEM_TIME_NEW => {
                Some(self.lock().system_time.get(vcpu as usize).copied().ok_or(MsrFault))
            }
            _ => None,
        }
    }

    /// WRMSR. `None` when the index is not the clock's.
    pub fn write_msr(&self, vcpu: VcpuId, index: u32, value: u64) -> Option<Result<(), MsrFault>> {
        match index {
            words::MSR_WALL_CLOCK | words::MSR_WALL_CLOCK_NEW => Some(self.write_wall_clock(value)),
            words::MSR_SYSTEM_TIME | words::MSR_SYSTEM_TIME_NEW => Some(self.write_system_time(vcpu, value)),
            _ => None,
        }
    }

    /// Forgets what the guest registered.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.wall_clock = 0;
        state.system_time.fill(0);
    }

    /// Time of day and TSC at one moment: of several readings, the one in which the least time passed between the two clocks.
    pub fn pair(&self) -> (Duration, u64) {
        let read = || {
            let before = self.clock.now();
            let wall = self.clock.wall();
            (self.clock.now() - before, before, wall)
        };
        let mut best = read();
        for _ in 1..MAX_READINGS {
            if best.0 <= ONE_MOMENT {
                break;
            }
            best = best.min(read());
        }
        let (passed, before, wall) = best;
        (wall, ticks(before + passed / 2, self.tsc_hz))
    }

    /// What a clock page says when it is written now; the version is left to the caller. Xen's `struct vcpu_time_info` is the same.
    pub fn reading(&self) -> PvclockVcpuTimeInfo {
        let now = self.clock.now();
        PvclockVcpuTimeInfo {
            version: 0.into(),
            pad0: 0.into(),
            tsc_timestamp: ticks(now, self.tsc_hz).into(),
            system_time: now.into(),
            tsc_to_system_mul: self.scale.mul.into(),
            tsc_shift: self.scale.shift,
            flags: words::PVCLOCK_TSC_STABLE,
            pad: [0; 2],
        }
    }

    /// Time of day when the clock stood at zero; the version is left to the caller.
    pub fn started(&self) -> PvclockWallClock {
        wall_clock(self.clock.as_ref())
    }

    /// Nanoseconds of the clock.
    pub fn now(&self) -> u64 {
        self.clock.now()
    }

    /// Ticks a second of the TSC, and how they become nanoseconds.
    pub fn tsc(&self) -> (u64, Scale) {
        (self.tsc_hz, self.scale)
    }

    fn write_system_time(&self, vcpu: VcpuId, value: u64) -> Result<(), MsrFault> {
        let mut state = self.lock();
        let system_time = state.system_time.get_mut(vcpu as usize).ok_or(MsrFault)?;
        if value & words::SYSTEM_TIME_ENABLE == 0 {
            *system_time = value;
            return Ok(());
        }
        let gpa = value & !words::SYSTEM_TIME_ENABLE;
        if !holds(&self.memory, gpa, size_of::<PvclockVcpuTimeInfo>()) {
            return Err(MsrFault);
        }
        // Counts on from what the page holds, as Linux KVM does: a machine that moved here keeps its clock's version.
        let version = self.memory.read_obj::<u32>(GuestAddress(gpa)).map(u32::from_le).map_err(|_| MsrFault)?;
        publish(&self.memory, gpa, self.reading().as_bytes(), 0, version)?;
        *system_time = value;
        Ok(())
    }

    fn write_wall_clock(&self, gpa: u64) -> Result<(), MsrFault> {
        let mut state = self.lock();
        let page = self.started();
        if !holds(&self.memory, gpa, size_of::<PvclockWallClock>()) {
            return Err(MsrFault);
        }
        publish(&self.memory, gpa, page.as_bytes(), 0, 0)?;
        state.wall_clock = gpa;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Snapshot for PvClock {
    fn state(&self) -> Saved {
        Saved::new(STATE.0, STATE.1, &*self.lock())
    }

    /// Pages stay as the guest's memory has them: they hold as long as TSC and clock go on together.
    fn restore(&self, state: &Saved) -> Result<(), RestoreError> {
        let new: State = state.open(STATE.0, STATE.1)?;
        let mut state = self.lock();
        if new.system_time.len() != state.system_time.len() {
            return Err(RestoreError::Impossible { device: STATE.0, what: "the machine has another number of processors" });
        }
        *state = new;
        Ok(())
    }
}

/// How a TSC difference becomes nanoseconds: shift, multiply, take the upper half.
///
/// Found by the algorithm of Linux' `kvm_get_time_scale`: shift the TSC frequency into (10^9, 2 * 10^9], then express nanoseconds per tick as
/// a 32-bit fraction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scale {
    /// 32-bit fraction.
    pub mul: u32,
    /// Left shift before the multiplication; negative is a right shift.
    pub shift: i8,
}

impl Scale {
    /// The scale of a TSC of `hz` ticks a second. A frequency of zero is taken as 1 Hz.
    pub fn from_hz(hz: u64) -> Scale {
        let mut ticks = hz.max(1);
        let mut shift = 0;
        while ticks > 2 * NANOSECONDS {
            ticks >>= 1;
            shift -= 1;
        }
        while ticks <= NANOSECONDS {
            ticks <<= 1;
            shift += 1;
        }
        // ticks is in (10^9, 2 * 10^9], so the quotient is below 2^32.
        Scale { mul: ((NANOSECONDS << 32) / ticks) as u32, shift }
    }

    /// What a guest computes: nanoseconds in `ticks`.
    pub fn nanoseconds(self, ticks: u64) -> u64 {
        let shifted = if self.shift >= 0 { ticks << self.shift } else { ticks >> -self.shift };
        ((u128::from(shifted) * u128::from(self.mul)) >> 32) as u64
    }
}

/// TSC of a machine that has run for `nanoseconds`.
pub(crate) fn ticks(nanoseconds: u64, hz: u64) -> u64 {
    (u128::from(nanoseconds) * u128::from(hz) / u128::from(NANOSECONDS)) as u64
}

/// Time of day when the clock stood at zero.
fn wall_clock(clock: &dyn Clock) -> PvclockWallClock {
    let start = u64::try_from(clock.wall().as_nanos()).unwrap_or(u64::MAX).saturating_sub(clock.now());
    // Seconds wrap in 2106, as the structure's do.
    PvclockWallClock { version: 0.into(), sec: ((start / NANOSECONDS) as u32).into(), nsec: ((start % NANOSECONDS) as u32).into() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmm::time::StepClock;
    use zerocopy::FromBytes;

    use super::*;

    const RAM: u64 = 0x10000;

    fn machine(now: u64) -> (GuestMemory, PvClock) {
        let memory = vmm::memory::map(&[(0, RAM)]).unwrap();
        let clock = Arc::new(StepClock::new(Duration::from_secs(1_000_000)));
        clock.advance_to(now);
        (memory.clone(), PvClock::new(memory, clock, 1_000_000_000, 2))
    }

    fn page(memory: &GuestMemory, gpa: u64) -> PvclockVcpuTimeInfo {
        let mut bytes = [0; 32];
        memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        PvclockVcpuTimeInfo::read_from_bytes(&bytes).unwrap()
    }

    #[test]
    fn enabled_clock_page_gives_the_time() {
        let (memory, clock) = machine(5_000);
        clock.write_msr(1, words::MSR_SYSTEM_TIME_NEW, 0x2001).unwrap().unwrap();
        let page = page(&memory, 0x2000);
        assert_eq!((page.version.get(), page.system_time.get(), page.tsc_timestamp.get()), (2, 5_000, 5_000));
        assert_eq!(page.flags, words::PVCLOCK_TSC_STABLE);
        assert_eq!(clock.read_msr(1, words::MSR_SYSTEM_TIME).unwrap(), Ok(0x2001));
        assert_eq!(clock.read_msr(0, words::MSR_SYSTEM_TIME).unwrap(), Ok(0));
    }

    #[test]
    fn each_registration_changes_the_version() {
        let (memory, clock) = machine(0);
        for version in [2, 4, 6] {
            clock.write_msr(0, words::MSR_SYSTEM_TIME, 0x2001).unwrap().unwrap();
            assert_eq!(page(&memory, 0x2000).version.get(), version);
        }
    }

    #[test]
    fn version_counts_on_from_what_the_page_holds() {
        let (memory, clock) = machine(0);
        memory.write_obj(40u32.to_le(), GuestAddress(0x2000)).unwrap();
        clock.write_msr(0, words::MSR_SYSTEM_TIME, 0x2001).unwrap().unwrap();
        assert_eq!(page(&memory, 0x2000).version.get(), 42);
    }

    #[test]
    fn disabled_clock_page_is_not_written() {
        let (memory, clock) = machine(5_000);
        clock.write_msr(0, words::MSR_SYSTEM_TIME_NEW, 0x2000).unwrap().unwrap();
        assert_eq!(page(&memory, 0x2000).version.get(), 0);
    }

    #[test]
    fn wall_clock_is_the_time_of_day_at_system_time_zero() {
        let (memory, clock) = machine(7_000_000_000);
        clock.write_msr(0, words::MSR_WALL_CLOCK_NEW, 0x1000).unwrap().unwrap();
        let mut bytes = [0; 12];
        memory.read_slice(&mut bytes, GuestAddress(0x1000)).unwrap();
        let wall = PvclockWallClock::read_from_bytes(&bytes).unwrap();
        assert_eq!((wall.version.get(), wall.sec.get(), wall.nsec.get()), (2, 1_000_000, 0));
    }

    #[test]
    fn bad_addresses_fault_and_leave_memory_alone() {
        let (memory, clock) = machine(5_000);
        for gpa in [RAM, RAM - 8, 0x1ff0, 0x1002, !1] {
            assert_eq!(clock.write_msr(0, words::MSR_SYSTEM_TIME_NEW, gpa | 1).unwrap(), Err(MsrFault), "{gpa:#x}");
            assert_eq!(clock.write_msr(0, words::MSR_WALL_CLOCK_NEW, gpa | 1).unwrap(), Err(MsrFault), "{gpa:#x}");
        }
        let mut all = vec![0; RAM as usize];
        memory.read_slice(&mut all, GuestAddress(0)).unwrap();
        assert!(all.iter().all(|&b| b == 0));
        assert_eq!(clock.read_msr(0, words::MSR_SYSTEM_TIME_NEW).unwrap(), Ok(0));
    }

    #[test]
    fn pair_is_of_one_moment() {
        let (_, clock) = machine(3_000_000_007);
        assert_eq!(clock.pair(), (Duration::new(1_000_003, 7), 3_000_000_007));
    }

    #[test]
    fn state_survives_a_restore() {
        let (_, clock) = machine(0);
        clock.write_msr(1, words::MSR_SYSTEM_TIME, 0x2001).unwrap().unwrap();
        let (_, other) = machine(9);
        other.restore(&clock.state()).unwrap();
        assert_eq!(other.read_msr(1, words::MSR_SYSTEM_TIME), Some(Ok(0x2001)));
        assert_eq!(other.state(), clock.state());
        clock.reset();
        assert_eq!(clock.read_msr(1, words::MSR_SYSTEM_TIME), Some(Ok(0)));
    }

    #[test]
    fn one_gigahertz_is_the_identity() {
        let scale = Scale::from_hz(NANOSECONDS);
        assert_eq!(scale, Scale { mul: 1 << 31, shift: 1 });
        for ticks in [0, 1, 999, u64::from(u32::MAX) << 20] {
            assert_eq!(scale.nanoseconds(ticks), ticks);
        }
    }

    #[test]
    fn absurd_frequencies_have_a_scale() {
        for hz in [0, 1, u64::MAX] {
            assert_ne!(Scale::from_hz(hz).mul, 0);
        }
    }

    proptest! {
        #[test]
        fn an_hour_is_an_hour_at_any_frequency(hz in 1_000_000_u64..10_000_000_000) {
            let ticks = hz * 3600;
            let nanoseconds = Scale::from_hz(hz).nanoseconds(ticks);
            let hour = 3600 * NANOSECONDS;
            // The fraction has 31 significant bits.
            prop_assert!(nanoseconds.abs_diff(hour) < hour >> 29, "{nanoseconds}");
        }
    }
}
