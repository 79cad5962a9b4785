//! Hypercalls: `xen.h` (numbers), `errno.h`, `version.h`, `features.h`, `memory.h`, `vcpu.h`, `sched.h`.
//!
//! In 64-bit mode the number is in RAX and arguments are in RDI, RSI, RDX, R10, R8, R9; the answer in RAX is negative for errors.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Numbers (`__HYPERVISOR_*`).
pub mod number {
    /// [`memory`](super::memory).
    pub const MEMORY_OP: u64 = 12;
    /// Absolute system time at which the caller gets its timer's event; 0 stops it.
    pub const SET_TIMER_OP: u64 = 15;
    /// [`version`](super::version).
    pub const XEN_VERSION: u64 = 17;
    /// [`CONSOLE_WRITE`](super::CONSOLE_WRITE), count, text.
    pub const CONSOLE_IO: u64 = 18;
    /// [`grant_table::op`](crate::xen::grant_table::op), pointer, count.
    pub const GRANT_TABLE_OP: u64 = 20;
    /// [`VM_ASSIST_ENABLE`](super::VM_ASSIST_ENABLE), type.
    pub const VM_ASSIST: u64 = 21;
    /// [`vcpu`](super::vcpu), vCPU, pointer.
    pub const VCPU_OP: u64 = 24;
    /// [`sched`](super::sched), pointer.
    pub const SCHED_OP: u64 = 29;
    /// [`event_channel::op`](crate::xen::event_channel::op), pointer.
    pub const EVENT_CHANNEL_OP: u64 = 32;
    /// [`hvm::op`](crate::xen::hvm::op), pointer.
    pub const HVM_OP: u64 = 34;
}

/// Errors (`XEN_E*`), which answers hold negated.
pub mod errno {
    /// Not permitted.
    pub const EPERM: i64 = 1;
    /// No such thing.
    pub const ENOENT: i64 = 2;
    /// Bad address.
    pub const EFAULT: i64 = 14;
    /// Already there.
    pub const EEXIST: i64 = 17;
    /// Bad argument.
    pub const EINVAL: i64 = 22;
    /// No room.
    pub const ENOSPC: i64 = 28;
    /// No such call.
    pub const ENOSYS: i64 = 38;
    /// No data.
    pub const ENODATA: i64 = 61;
    /// Too late.
    pub const ETIME: i64 = 62;
}

/// A domain's word for itself.
pub const DOMID_SELF: u16 = 0x7ff0;

/// Operations of `HYPERVISOR_xen_version`.
pub mod version {
    /// Answers major and minor.
    pub const VERSION: u64 = 0;
    /// Text of [`EXTRA_VERSION_SIZE`].
    pub const EXTRA_VERSION: u64 = 1;
    /// Size of that text.
    pub const EXTRA_VERSION_SIZE: usize = 16;
    /// Compiler, who, domain and date: texts of 64, 16, 32 and 32 bytes.
    pub const COMPILE_INFO: u64 = 2;
    /// Their size.
    pub const COMPILE_INFO_SIZE: usize = 144;
    /// Text of [`CAPABILITIES_SIZE`]: kinds of guests.
    pub const CAPABILITIES: u64 = 3;
    /// Size of that text.
    pub const CAPABILITIES_SIZE: usize = 1024;
    /// Text of [`CHANGE_SET_SIZE`].
    pub const CHANGE_SET: u64 = 4;
    /// Size of that text.
    pub const CHANGE_SET_SIZE: usize = 64;
    /// Where the hypervisor begins in a paravirtualized guest: 64 bits.
    pub const PLATFORM_PARAMETERS: u64 = 5;
    /// [`Features`](super::Features).
    pub const GET_FEATURES: u64 = 6;
    /// Answers the size of a page.
    pub const PAGE_SIZE: u64 = 7;
    /// The domain's UUID: 16 bytes.
    pub const GUEST_HANDLE: u64 = 8;
    /// The hypervisor's build id.
    pub const BUILD_ID: u64 = 10;
}

/// `struct xen_feature_info`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Features {
    /// Which 32 features; there is word 0 only.
    pub submap: U32,
    /// Answer: [`feature`] bits.
    pub bits: U32,
}

/// Bits of [`Features`], word 0 (`XENFEAT_*`).
pub mod feature {
    /// Page numbers are the guest's own.
    pub const AUTO_TRANSLATED_PHYSMAP: u32 = 1 << 2;
    /// Supervisor mode is ring 0.
    pub const SUPERVISOR_MODE_KERNEL: u32 = 1 << 3;
    /// Events can be announced by a vector.
    pub const HVM_CALLBACK_VECTOR: u32 = 1 << 8;
    /// The clock can be used.
    pub const HVM_SAFE_PVCLOCK: u32 = 1 << 9;
}

/// First argument of `HYPERVISOR_console_io`: write.
pub const CONSOLE_WRITE: u64 = 0;
/// First argument of `HYPERVISOR_vm_assist`: enable.
pub const VM_ASSIST_ENABLE: u64 = 0;
/// Second argument of it: mark the runstate while it changes.
pub const VM_ASSIST_RUNSTATE_UPDATE: u64 = 5;

/// Operations of `HYPERVISOR_memory_op`.
pub mod memory {
    /// [`AddToPhysmap`](super::AddToPhysmap).
    pub const ADD_TO_PHYSMAP: u64 = 7;
    /// Space: the shared info.
    pub const SPACE_SHARED_INFO: u32 = 0;
    /// Space: frames of the grant table.
    pub const SPACE_GRANT_TABLE: u32 = 1;
}

/// `struct xen_add_to_physmap`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AddToPhysmap {
    /// Whose memory.
    pub domid: U16,
    /// Of no meaning here.
    pub size: U16,
    /// What to map.
    pub space: U32,
    /// Which page of it.
    pub idx: U64,
    /// Page number where.
    pub gpfn: U64,
}

const _: () = assert!(size_of::<AddToPhysmap>() == 24);

/// Operations of `HYPERVISOR_vcpu_op`.
pub mod vcpu {
    /// Answers 1 when it runs.
    pub const IS_UP: u64 = 3;
    /// Fills a [`Runstate`](crate::xen::shared_info::Runstate).
    pub const GET_RUNSTATE_INFO: u64 = 4;
    /// An address at which to keep one.
    pub const REGISTER_RUNSTATE: u64 = 5;
    /// Stops the periodic timer.
    pub const STOP_PERIODIC_TIMER: u64 = 7;
    /// [`SetSingleshot`](super::SetSingleshot).
    pub const SET_SINGLESHOT_TIMER: u64 = 8;
    /// Stops it.
    pub const STOP_SINGLESHOT_TIMER: u64 = 9;
    /// [`RegisterVcpuInfo`](super::RegisterVcpuInfo).
    pub const REGISTER_VCPU_INFO: u64 = 10;
    /// An address at which to keep the clock.
    pub const REGISTER_VCPU_TIME: u64 = 13;
    /// [`SetSingleshot::flags`](super::SetSingleshot::flags): a time that has passed is an error.
    pub const SINGLESHOT_FUTURE: u32 = 1;
}

/// `struct vcpu_set_singleshot_timer`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetSingleshot {
    /// Absolute system time in nanoseconds.
    pub timeout: U64,
    /// [`vcpu::SINGLESHOT_FUTURE`].
    pub flags: U32,
    /// Zero.
    pub pad: U32,
}

/// `struct vcpu_register_vcpu_info`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegisterVcpuInfo {
    /// Page number.
    pub mfn: U64,
    /// Offset in the page.
    pub offset: U32,
    /// Zero.
    pub reserved: U32,
}

/// Operations of `HYPERVISOR_sched_op`.
pub mod sched {
    /// Gives the processor away.
    pub const YIELD: u64 = 0;
    /// Waits for an event.
    pub const BLOCK: u64 = 1;
    /// A [`reason`](super::reason) of 32 bits.
    pub const SHUTDOWN: u64 = 2;
    /// Waits for certain events, or until some time.
    pub const POLL: u64 = 3;
}

/// Reasons of a shutdown (`SHUTDOWN_*`).
pub mod reason {
    /// Power off.
    pub const POWER_OFF: u32 = 0;
    /// Reboot.
    pub const REBOOT: u32 = 1;
    /// The kernel crashed.
    pub const CRASH: u32 = 3;
}
