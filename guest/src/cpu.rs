//! The processor's instructions that Rust has no words for.
//!
//! Model-specific registers may not exist. Reading one that does not raises #GP, and so every instruction that may fault has an
//! entry in the section `.fixups`: where it is, and where to go on. [`fixup`] finds it for the exception handler.
#![allow(unsafe_code)] // Assembly.

use core::arch::asm;
use core::arch::x86_64::{__cpuid_count, CpuidResult};

/// The instruction raised an exception.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault;

/// An instruction that may fault, and what to execute after it did.
#[repr(C)]
struct Fixup {
    at: u64,
    resume: u64,
}

unsafe extern "C" {
    static fixups_start: [Fixup; 0];
    static fixups_end: [Fixup; 0];
}

/// Where to go on after an exception at `rip`, when somebody is prepared for it.
pub fn fixup(rip: u64) -> Option<u64> {
    let (start, end) = (&raw const fixups_start as *const Fixup, &raw const fixups_end as *const Fixup);
    // SAFETY: the linker script collects the entries between the two symbols.
    let entries = unsafe { core::slice::from_raw_parts(start, (end.addr() - start.addr()) / size_of::<Fixup>()) };
    entries.iter().find(|entry| entry.at == rip).map(|entry| entry.resume)
}

/// CPUID.
pub fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    __cpuid_count(leaf, subleaf)
}

/// The time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// RDMSR.
///
/// # Errors
/// [`Fault`] when there is no such register.
pub fn rdmsr(register: u32) -> Result<u64, Fault> {
    let (low, high, fault): (u32, u32, u32);
    // SAFETY: reading a register changes nothing here; its fault is caught.
    unsafe {
        asm!(
            "mov {fault:e}, 1", "2: rdmsr", "xor {fault:e}, {fault:e}", "3:",
            ".pushsection .fixups, \"a\"", ".quad 2b, 3b", ".popsection",
            fault = out(reg) fault, in("ecx") register, out("eax") low, out("edx") high, options(nostack),
        );
    }
    if fault == 0 { Ok(u64::from(high) << 32 | u64::from(low)) } else { Err(Fault) }
}

/// WRMSR.
///
/// # Errors
/// [`Fault`] when there is no such register, or it does not take the value.
///
/// # Safety
/// What the register does must not break the kernel's memory: a page that it hands to a hypervisor must be for that.
pub unsafe fn wrmsr(register: u32, value: u64) -> Result<(), Fault> {
    let fault: u32;
    // SAFETY: the caller's promise; its fault is caught.
    unsafe {
        asm!(
            "mov {fault:e}, 1", "2: wrmsr", "xor {fault:e}, {fault:e}", "3:",
            ".pushsection .fixups, \"a\"", ".quad 2b, 3b", ".popsection",
            fault = out(reg) fault, in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack),
        );
    }
    if fault == 0 { Ok(()) } else { Err(Fault) }
}

/// Defines reads and writes of ports by their width.
macro_rules! ports {
    ($($input:ident $output:ident $type:ty, $register:tt;)*) => { $(
        #[doc = concat!("IN from `port` to ", $register, ".")]
        pub fn $input(port: u16) -> $type {
            let value: $type;
            // SAFETY: devices that this kernel drives write to no memory because a port is read.
            unsafe { asm!(concat!("in ", $register, ", dx"), in("dx") port, out($register) value, options(nomem, nostack, preserves_flags)) };
            value
        }

        #[doc = concat!("OUT of ", $register, " to `port`.")]
        ///
        /// # Safety
        /// The device must not be told to write where something else is.
        pub unsafe fn $output(port: u16, value: $type) {
            // SAFETY: the caller's promise.
            unsafe { asm!(concat!("out dx, ", $register), in("dx") port, in($register) value, options(nostack, preserves_flags)) };
        }
    )* };
}

ports! {
    inb outb u8, "al";
    inw outw u16, "ax";
    inl outl u32, "eax";
}

/// Lets interrupts in and sleeps until one comes. Interrupts are let in only after HLT has begun, so that none is missed.
pub fn enable_and_halt() {
    // SAFETY: handlers leave everything as it was.
    unsafe { asm!("sti", "hlt", options(nostack)) };
}

/// Lets interrupts in.
pub fn enable_interrupts() {
    // SAFETY: as above.
    unsafe { asm!("sti", options(nostack)) };
}

/// Keeps interrupts out.
pub fn disable_interrupts() {
    // SAFETY: they wait.
    unsafe { asm!("cli", options(nostack)) };
}

/// Sleeps for ever.
pub fn stop() -> ! {
    loop {
        // SAFETY: nothing happens any more, except to be looked at by an NMI.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// Faults until the processor gives up, which resets the machine or ends it.
pub fn triple_fault() -> ! {
    let nothing = [0u8; 10];
    // SAFETY: without a descriptor table the breakpoint cannot be handled, nor can the faults that follow.
    unsafe { asm!("lidt [{}]", "int3", in(reg) &nothing, options(noreturn)) };
}
