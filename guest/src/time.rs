//! Time since power-on, from the time-stamp counter.
//!
//! Its frequency is asked for: the processor's CPUID leaf 15H (Intel SDM vol. 2), then the hypervisors' timing leaf 4000_0010H
//! (VMware, and others after it; <https://lwn.net/Articles/301888>), Hyper-V's register (TLFS 6.0b, appendix F) and the scale of KVM's
//! clock. Only where none answers, or the local APIC's timer has no deadline mode and so a frequency of its own, it is measured against
//! the 8254 timer, for 10 milliseconds: where each access to a port takes long, as on KVM under load, that is wrong by a part that
//! matters.
#![allow(unsafe_code)] // Port I/O.

use core::sync::atomic::{AtomicU64, Ordering};

use abi::hyperv::cpuid::{feature, more};
use abi::hyperv::msr;
use pvbus::hal::Cpuid;
use pvbus::kvm::Pvclock;
use pvbus::{Interface, Kind};

use crate::cpu::{self, cpuid, inb, outb};
use crate::hal::KERNEL;
use crate::interrupts::{self, apic};

const NANOS_PER_SECOND: u64 = 1_000_000_000;
/// Fractional bits of the scales.
const FRACTION: u32 = 32;
/// Timing leaf, from the base on: kHz of the time-stamp counter in EAX.
const TIMING: u32 = 0x10;

static BOOT: AtomicU64 = AtomicU64::new(0);
static TSC_HZ: AtomicU64 = AtomicU64::new(NANOS_PER_SECOND);
static APIC_HZ: AtomicU64 = AtomicU64::new(0);
/// Nanoseconds of a tick, with [`FRACTION`].
static SCALE: AtomicU64 = AtomicU64::new(1 << FRACTION);

/// Begins to count.
pub fn start() {
    BOOT.store(cpu::tsc(), Ordering::Relaxed);
}

/// Finds the frequencies. The local APIC must be on.
pub fn init() {
    let mut hz = told();
    if hz.is_none() || !apic::has_deadline() {
        let (tsc, apic) = measure();
        hz = hz.or(Some(tsc));
        APIC_HZ.store(apic, Ordering::Relaxed);
    }
    let hz = hz.unwrap_or(NANOS_PER_SECOND).max(1);
    TSC_HZ.store(hz, Ordering::Relaxed);
    SCALE.store(((u128::from(NANOS_PER_SECOND) << FRACTION) / u128::from(hz)) as u64, Ordering::Relaxed);
}

/// Nanoseconds since [`start`].
pub fn now() -> u64 {
    let ticks = cpu::tsc().wrapping_sub(BOOT.load(Ordering::Relaxed));
    ((u128::from(ticks) * u128::from(SCALE.load(Ordering::Relaxed))) >> FRACTION) as u64
}

/// Does nothing for some nanoseconds.
pub fn sleep(nanos: u64) {
    let end = now().saturating_add(nanos);
    while now() < end {
        interrupts::doze(end);
    }
}

/// Frequency of the time-stamp counter.
pub fn tsc_hz() -> u64 {
    TSC_HZ.load(Ordering::Relaxed)
}

/// The time-stamp counter at a time of [`now`].
pub fn to_tsc(nanos: u64) -> u64 {
    BOOT.load(Ordering::Relaxed).wrapping_add(scale(nanos, tsc_hz()))
}

/// Ticks of the local APIC's timer in some nanoseconds, as many as it can count.
pub fn to_apic(nanos: u64) -> u32 {
    u32::try_from(scale(nanos, APIC_HZ.load(Ordering::Relaxed))).unwrap_or(u32::MAX)
}

fn scale(nanos: u64, hz: u64) -> u64 {
    (u128::from(nanos) * u128::from(hz) / u128::from(NANOS_PER_SECOND)) as u64
}

/// The time-stamp counter's frequency as processor or hypervisor tell it.
fn told() -> Option<u64> {
    const CRYSTAL: u32 = 0x15;
    if cpuid(0, 0).eax >= CRYSTAL {
        let leaf = cpuid(CRYSTAL, 0);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            return Some(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax));
        }
    }
    let found = pvbus::detect(&KERNEL);
    let interfaces = || found.interfaces.iter().filter(|interface| interface.trusted);
    let by_leaf = |interface: &Interface| {
        let khz = if interface.base + TIMING <= interface.max_leaf { cpuid(interface.base + TIMING, 0).eax } else { 0 };
        (khz != 0).then(|| u64::from(khz) * 1000)
    };
    interfaces().find_map(by_leaf).or_else(|| interfaces().find_map(told_by_hyperv)).or_else(|| interfaces().find_map(told_by_kvm))
}

/// Hyper-V has a register for it.
fn told_by_hyperv(interface: &Interface) -> Option<u64> {
    let Cpuid { eax, edx, .. } = interface.features;
    let has_register = interface.is_hyperv() && eax & feature::FREQUENCIES != 0 && edx & more::FREQUENCIES != 0;
    has_register.then(|| cpu::rdmsr(msr::TSC_FREQUENCY).ok()).flatten().filter(|hz| *hz != 0)
}

/// KVM tells how its clock is computed from the counter.
fn told_by_kvm(interface: &Interface) -> Option<u64> {
    let has_clock = matches!(interface.kind, Kind::Kvm | Kind::OpenBsd);
    has_clock.then(|| Pvclock::attach(&KERNEL, interface).and_then(|clock| clock.tsc_hz()).ok()).flatten()
}

/// Frequencies of the time-stamp counter and of the APIC's timer, by channel 2 of the 8254 (Intel data sheet, order 231164), whose gate
/// and output are in port 61H (IBM PS/2 Technical Reference, system control port B).
fn measure() -> (u64, u64) {
    const PIT_HZ: u64 = 1_193_182;
    const COUNT: u16 = (PIT_HZ / 100) as u16;
    /// More than can be made while it counts.
    const READINGS: u32 = 1_000_000;
    const CHANNEL_2: u16 = 0x42;
    const COMMAND: u16 = 0x43;
    const CONTROL_B: u16 = 0x61;
    const GATE: u8 = 1 << 0;
    const SPEAKER: u8 = 1 << 1;
    const OUTPUT: u8 = 1 << 5;
    /// Channel 2, both bytes, mode 0: the output rises at the end of the count.
    const ONE_COUNT: u8 = 0b1011_0000;

    let mut ticks = 0;
    let control = inb(CONTROL_B) & !(GATE | SPEAKER);
    let apic = apic::count(|| {
        let [low, high] = COUNT.to_le_bytes();
        for (port, value) in [(CONTROL_B, control | GATE), (COMMAND, ONE_COUNT), (CHANNEL_2, low), (CHANNEL_2, high)] {
            // SAFETY: neither timer nor speaker writes to memory.
            unsafe { outb(port, value) };
        }
        let start = cpu::tsc();
        // Without such a timer the output may stay down for ever.
        let _ = (0..READINGS).find(|_| inb(CONTROL_B) & OUTPUT != 0);
        ticks = cpu::tsc().wrapping_sub(start);
    });
    (ticks * PIT_HZ / u64::from(COUNT), u64::from(apic) * PIT_HZ / u64::from(COUNT))
}
