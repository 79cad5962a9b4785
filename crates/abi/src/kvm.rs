//! Words of the KVM dialect: CPUID leaf, MSRs, hypercalls, and what the host writes to guest memory.
//!
//! From Linux `Documentation/virt/kvm/x86/{cpuid,msr,hypercalls}.rst`, `arch/x86/include/uapi/asm/kvm_para.h`,
//! `include/uapi/linux/kvm_para.h` and `arch/x86/include/asm/pvclock-abi.h`.

use zerocopy::little_endian::{I64, U32, U64};
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
    /// [`super::MSR_STEAL_TIME`].
    pub const STEAL_TIME: u32 = 1 << 5;
    /// [`super::MSR_PV_EOI`].
    pub const PV_EOI: u32 = 1 << 6;
    /// [`super::HC_KICK_CPU`].
    pub const PV_UNHALT: u32 = 1 << 7;
    /// [`super::HC_SEND_IPI`].
    pub const PV_SEND_IPI: u32 = 1 << 11;
    /// [`super::HC_SCHED_YIELD`].
    pub const PV_SCHED_YIELD: u32 = 1 << 13;
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
/// Guest physical address of a [`StealTime`], with bit 0 as enable.
pub const MSR_STEAL_TIME: u32 = 0x4b56_4d03;
/// Guest physical address of 4 bytes, with bit 0 as enable. The host sets [`PV_EOI_PENDING`] there when it delivers an interrupt whose end
/// it need not see; a guest that finds it set clears it instead of writing its local APIC's EOI register.
pub const MSR_PV_EOI: u32 = 0x4b56_4d04;

/// Enable bit of the system-time MSR.
pub const SYSTEM_TIME_ENABLE: u64 = 1;
/// Enable bit of [`MSR_STEAL_TIME`].
pub const STEAL_TIME_ENABLE: u64 = 1;
/// Bits of [`MSR_STEAL_TIME`] that must be zero: the structure is 64-byte aligned.
pub const STEAL_TIME_RESERVED: u64 = 0x3e;
/// Enable bit of [`MSR_PV_EOI`].
pub const PV_EOI_ENABLE: u64 = 1;
/// Bits of [`MSR_PV_EOI`] that must be zero: the word is 4-byte aligned.
pub const PV_EOI_RESERVED: u64 = 2;
/// Bit of the word at [`MSR_PV_EOI`].
pub const PV_EOI_PENDING: u8 = 1;

/// Hypercall: lets the host deliver what waits for the caller.
pub const HC_VAPIC_POLL_IRQ: u64 = 1;
/// Hypercall (flags, APIC id): wakes a halted processor, whether its interrupts are on or off.
pub const HC_KICK_CPU: u64 = 5;
/// Hypercall (guest physical address, clock type): writes a [`ClockPairing`].
pub const HC_CLOCK_PAIRING: u64 = 9;
/// Hypercall (low half and high half of a bitmap, APIC id of bit 0, ICR): sends an interrupt to many processors; answers to how many.
pub const HC_SEND_IPI: u64 = 10;
/// Hypercall (APIC id): gives the caller's time to that processor.
pub const HC_SCHED_YIELD: u64 = 11;

/// Clock type of [`HC_CLOCK_PAIRING`]: the host's time of day.
pub const CLOCK_PAIRING_WALLCLOCK: u64 = 0;

/// Answer of a hypercall that nobody knows (`-KVM_ENOSYS`).
pub const ENOSYS: i64 = -1000;
/// Answer of a hypercall from outside ring 0 (`-KVM_EPERM`).
pub const EPERM: i64 = -1;
/// Answer to an address that cannot be written (`-KVM_EFAULT`).
pub const EFAULT: i64 = -14;
/// Answer to arguments that make no sense (`-KVM_EINVAL`).
pub const EINVAL: i64 = -22;
/// Answer to a clock type that is not there (`-KVM_EOPNOTSUPP`).
pub const EOPNOTSUPP: i64 = -95;

/// `flags` of [`PvclockVcpuTimeInfo`]: clocks of all processors agree.
pub const PVCLOCK_TSC_STABLE: u8 = 1;
/// `flags` of [`PvclockVcpuTimeInfo`]: the host has stopped the machine for a while (`KVM_KVMCLOCK_CTRL`). The guest clears it.
pub const PVCLOCK_GUEST_STOPPED: u8 = 1 << 1;

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

/// How long a processor was kept from running.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct StealTime {
    /// Nanoseconds in which the processor wanted to run and the host ran something else. Halted time does not count.
    pub steal: U64,
    /// Odd while the host writes.
    pub version: U32,
    /// Always zero.
    pub flags: U32,
    /// Not zero while the host runs something else; always zero where the host cannot tell.
    pub preempted: u8,
    /// Unused.
    pub pad: [u8; 47],
}

const _: () = assert!(size_of::<StealTime>() == 64);

/// Host's time of day and guest's TSC at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ClockPairing {
    /// Seconds since 1970.
    pub sec: I64,
    /// Nanoseconds.
    pub nsec: I64,
    /// The guest's TSC.
    pub tsc: U64,
    /// Always zero.
    pub flags: U32,
    /// Unused.
    pub pad: [U32; 9],
}

const _: () = assert!(size_of::<ClockPairing>() == 64);
