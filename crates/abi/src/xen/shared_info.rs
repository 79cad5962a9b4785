//! The page that a guest shares with the hypervisor: `xen.h`, `arch-x86/xen.h`, and `vcpu.h` for the runstate.
//!
//! Offsets and not structures, because both sides change single words of it atomically.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// vCPUs that have their [`vcpu_info`] in the page (`XEN_LEGACY_MAX_VCPUS`).
pub const VCPUS: u32 = 32;
/// Event channels that are pending: 64 words of 64 bits.
pub const EVTCHN_PENDING: u64 = 2048;
/// Event channels that are masked.
pub const EVTCHN_MASK: u64 = 2560;
/// Wall clock: version, seconds and nanoseconds as `struct pvclock_wall_clock`.
pub const WALL_CLOCK: u64 = 3072;
/// Wall clock: upper half of the seconds.
pub const WALL_CLOCK_SEC_HI: u64 = 3084;

/// `struct vcpu_info`.
pub mod vcpu_info {
    /// Its size.
    pub const SIZE: u64 = 64;
    /// Byte: an upcall is due.
    pub const UPCALL_PENDING: u64 = 0;
    /// Which words of [`EVTCHN_PENDING`](super::EVTCHN_PENDING) to look at: 64 bits.
    pub const PENDING_SEL: u64 = 8;
    /// The clock, as [`PvclockVcpuTimeInfo`](crate::kvm::PvclockVcpuTimeInfo).
    pub const TIME: u64 = 32;
}

/// A state: on a processor of the host (`RUNSTATE_running`).
pub const RUNNING: usize = 0;
/// A state: the host runs something else (`RUNSTATE_runnable`).
pub const RUNNABLE: usize = 1;
/// In [`Runstate::state_entry_time`], for guests that asked for it: the rest is being changed (`XEN_RUNSTATE_UPDATE`).
pub const RUNSTATE_UPDATE: u64 = 1 << 63;

/// `struct vcpu_runstate_info`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Runstate {
    /// [`RUNNING`], [`RUNNABLE`], 2 blocked, 3 offline.
    pub state: U32,
    /// Zero.
    pub pad: U32,
    /// System time at which it entered that state, and perhaps [`RUNSTATE_UPDATE`].
    pub state_entry_time: U64,
    /// Nanoseconds in each state.
    pub time: [U64; 4],
}

const _: () = assert!(size_of::<Runstate>() == 48);
