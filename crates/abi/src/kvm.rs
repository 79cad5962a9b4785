//! Words of the KVM dialect: CPUID leaf, MSRs, hypercalls and the two clock structures.
//!
//! From Linux `Documentation/virt/kvm/x86/{cpuid,msr,hypercalls}.rst` and `arch/x86/include/asm/pvclock-abi.h`.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// EBX, ECX and EDX of the dialect's base leaf: `KVMKVMKVM\0\0\0`.
pub const SIGNATURE: [u32; 3] = crate::hypervisor::registers(crate::hypervisor::KVM);

/// Feature bits, EAX of leaf base + 1.
pub mod feature {
    /// Clock MSRs 0x11 and 0x12.
    pub const CLOCKSOURCE: u32 = 1 << 0;
    /// Port accesses need no delay.
    pub const NOP_IO_DELAY: u32 = 1 << 1;
    /// Clock MSRs 0x4b564d00 and 0x4b564d01.
    pub const CLOCKSOURCE2: u32 = 1 << 3;
    /// Clocks of all processors agree.
    pub const CLOCKSOURCE_STABLE: u32 = 1 << 24;
}

/// Wall clock, old number: guest physical address, written once for each reading.
pub const MSR_WALL_CLOCK: u32 = 0x11;
/// System time, old number: guest physical address with bit 0 as enable.
pub const MSR_SYSTEM_TIME: u32 = 0x12;
/// Wall clock.
pub const MSR_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
/// System time.
pub const MSR_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;

/// Enable bit of the system-time MSR.
pub const SYSTEM_TIME_ENABLE: u64 = 1;

/// Answer of a hypercall that nobody knows (`-KVM_ENOSYS`).
pub const ENOSYS: i64 = -1000;
/// Answer of a hypercall from outside ring 0 (`-KVM_EPERM`).
pub const EPERM: i64 = -1;

/// `flags` of [`PvclockVcpuTimeInfo`]: clocks of all processors agree.
pub const PVCLOCK_TSC_STABLE: u8 = 1;

/// Per-processor clock page: `ns = system_time + ((shift(tsc - tsc_timestamp) * tsc_to_system_mul) >> 32)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PvclockVcpuTimeInfo {
    /// Odd while the host writes.
    pub version: U32,
    /// Unused.
    pub pad0: U32,
    /// Guest TSC at the time of writing.
    pub tsc_timestamp: U64,
    /// Nanoseconds since the machine started, at `tsc_timestamp`.
    pub system_time: U64,
    /// Nanoseconds per shifted TSC tick, as a 32-bit fraction.
    pub tsc_to_system_mul: U32,
    /// Left shift of the TSC difference before the multiplication; negative is a right shift.
    pub tsc_shift: i8,
    /// [`PVCLOCK_TSC_STABLE`].
    pub flags: u8,
    /// Unused.
    pub pad: [u8; 2],
}

const _: () = assert!(size_of::<PvclockVcpuTimeInfo>() == 32);

/// Time of day when system time was zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PvclockWallClock {
    /// Odd while the host writes.
    pub version: U32,
    /// Seconds since 1970.
    pub sec: U32,
    /// Nanoseconds.
    pub nsec: U32,
}

const _: () = assert!(size_of::<PvclockWallClock>() == 12);
