//! The local APIC: timer, and the door of the 8259 pair and of message-signalled interrupts (Intel SDM vol. 3 chapter 11).
//!
//! In x2APIC mode where there is one, else by its registers in memory. The timer follows the time-stamp counter (deadline mode)
//! where it can, else it counts down once.
#![allow(unsafe_code)] // Registers in memory, and model-specific ones.

use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use abi::apic::*;

use crate::{cpu, time};

/// CPUID leaf 1.
const EDX_APIC: u32 = 1 << 9;
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
/// Divide configuration: by 1.
const DIVIDE_BY_1: u32 = 0b1011;

static IS_X2APIC: AtomicBool = AtomicBool::new(false);
static HAS_DEADLINE: AtomicBool = AtomicBool::new(false);
static TIMER: AtomicU8 = AtomicU8::new(0);

/// Turns it on; its timer gets the vector `timer`.
///
/// # Panics
/// When there is none. Nothing that starts kernels by PVH lacks it.
pub(super) fn init(timer: u8, spurious: u8) {
    let features = cpu::cpuid(1, 0);
    let base = cpu::rdmsr(MSR_APIC_BASE).unwrap_or(0);
    assert!(features.edx & EDX_APIC != 0 && base & !0xfff == APIC_DEFAULT_BASE, "there is no local APIC where it should be");
    let base = base | APIC_BASE_ENABLE;
    // SAFETY: turns the APIC on in its place.
    let is_x2apic = unsafe {
        let wants = features.ecx & ECX_X2APIC != 0;
        let _ = cpu::wrmsr(MSR_APIC_BASE, base);
        wants && (base & APIC_BASE_EXTD != 0 || cpu::wrmsr(MSR_APIC_BASE, base | APIC_BASE_EXTD).is_ok())
    };
    IS_X2APIC.store(is_x2apic, Ordering::Relaxed);
    HAS_DEADLINE.store(features.ecx & ECX_TSC_DEADLINE != 0, Ordering::Relaxed);
    TIMER.store(timer, Ordering::Relaxed);

    write(offset::SVR, SVR_ENABLE | u32::from(spurious));
    write(offset::TPR, 0);
    write(offset::LVT_LINT0, u32::from(delivery::EXTINT) << 8);
    write(offset::LVT_LINT1, u32::from(delivery::NMI) << 8);
    write(offset::DIVIDE, DIVIDE_BY_1);
    set_timer(None);
}

/// Whether it is in x2APIC mode.
pub fn is_x2apic() -> bool {
    IS_X2APIC.load(Ordering::Relaxed)
}

/// Whether the timer follows the time-stamp counter.
pub fn has_deadline() -> bool {
    HAS_DEADLINE.load(Ordering::Relaxed)
}

/// Its identification, for the destination of messages.
pub fn id() -> u32 {
    if is_x2apic() { read(offset::ID) } else { read(offset::ID) >> 24 }
}

/// Ends the interrupt in service.
pub(super) fn acknowledge() {
    write(offset::EOI, 0);
}

/// Sets the timer to go off at a time of [`time::now`], or never. It may go off earlier when that is far away.
pub(super) fn set_timer(deadline: Option<u64>) {
    let vector = u32::from(TIMER.load(Ordering::Relaxed));
    if has_deadline() {
        write(offset::LVT_TIMER, LVT_TIMER_DEADLINE | vector);
        // SAFETY: an interrupt comes, which is handled.
        let _ = unsafe { cpu::wrmsr(MSR_TSC_DEADLINE, deadline.map_or(0, |deadline| time::to_tsc(deadline).max(1))) };
        return;
    }
    write(offset::LVT_TIMER, vector);
    write(offset::INITIAL_COUNT, deadline.map_or(0, |deadline| time::to_apic(deadline.saturating_sub(time::now())).max(1)));
}

/// Lets the timer count down from the top without an interrupt; how far it has come by the end of `during`.
pub fn count(during: impl FnOnce()) -> u32 {
    write(offset::LVT_TIMER, LVT_MASKED);
    write(offset::INITIAL_COUNT, u32::MAX);
    during();
    let count = u32::MAX - read(offset::CURRENT_COUNT);
    set_timer(None);
    count
}

fn read(offset: u64) -> u32 {
    if is_x2apic() {
        return cpu::rdmsr(MSR_X2APIC_FIRST + (offset / 16) as u32).unwrap_or(0) as u32;
    }
    // SAFETY: the APIC is there, and nothing else.
    unsafe { register(offset).read_volatile() }
}

fn write(offset: u64, value: u32) {
    if is_x2apic() {
        // SAFETY: none of its registers names memory. One that does not exist is not needed.
        let _ = unsafe { cpu::wrmsr(MSR_X2APIC_FIRST + (offset / 16) as u32, value.into()) };
        return;
    }
    // SAFETY: as in `read`.
    unsafe { register(offset).write_volatile(value) };
}

fn register(offset: u64) -> *mut u32 {
    core::ptr::with_exposed_provenance_mut((APIC_DEFAULT_BASE + offset) as usize)
}
