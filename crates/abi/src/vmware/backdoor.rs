//! The backdoor: a port access that carries all registers both ways.
//!
//! EAX holds [`MAGIC`], DX the port, the low half of ECX the command, the high half a subcommand, EBX an argument; ESI, EDI and EBP more. The
//! answer is in EAX, EBX, ECX, EDX, ESI and EDI. IN and OUT do the same. By VMCALL or VMMCALL DX holds flags in place of the port.
//! (open-vm-tools `lib/include/backdoor_def.h`.)

/// EAX of every call: `VMXh`.
pub const MAGIC: u32 = 0x564d_5868;
/// Low-bandwidth port: IN or OUT of EAX.
pub const PORT: u16 = 0x5658;
/// High-bandwidth port: REP INSB and REP OUTSB.
pub const PORT_HB: u16 = 0x5659;
/// EDX of a hypercall: high bandwidth.
pub const HYPERCALL_HB: u16 = 1 << 0;
/// EDX of a hypercall: high bandwidth towards the host.
pub const HYPERCALL_OUT: u16 = 1 << 1;
/// EAX of a command that does not exist; also what a port without a backdoor reads as.
pub const UNKNOWN: u32 = u32::MAX;

/// EAX: processor speed in MHz (never [`MAGIC`]).
pub const GETMHZ: u16 = 1;
/// EAX: [`VERSION`]; EBX: [`MAGIC`]; ECX: product.
pub const GETVERSION: u16 = 10;
/// EAX: version of the virtual hardware.
pub const GETHWVERSION: u16 = 17;
/// EAX, EBX, ECX, EDX: the machine's UUID as 16 bytes, little-endian words.
pub const GETUUID: u16 = 19;
/// EAX: memory in MiB.
pub const GETMEMSIZE: u16 = 20;
/// EAX: seconds since 1970 (all ones: error); EBX: microseconds; ECX: most lag in microseconds; EDX: time zone in minutes.
pub const GETTIME: u16 = 23;
/// Stops catching up with lost timer ticks.
pub const STOPCATCHUP: u16 = 24;
/// GuestRPC, see [`super::message`].
pub const MESSAGE: u16 = 30;
/// EBX and EAX: TSC frequency in Hz (high, low); ECX: APIC bus frequency in Hz. EBX all ones: not supported.
pub const GETHZ: u16 = 45;
/// EAX: [`MAGIC`]; ESI (high) and EDX (low): seconds since 1970; EBX: microseconds; ECX: most lag in microseconds.
pub const GETTIMEFULL: u16 = 46;
/// As [`GETTIMEFULL`]; EDI: lag of interrupts in microseconds.
pub const GETTIMEFULL_WITH_LAG: u16 = 55;
/// High half of ECX: 0 restrict, 1 open, 2 query nesting; all ones: not supported.
pub const NESTING_CONTROL: u16 = 63;
/// EAX: [`vcpu_info`] bits.
pub const GET_VCPU_INFO: u16 = 68;
/// ESI and EDI: guest physical address of the stolen-time record; EAX all ones: not supported.
pub const STEALCLOCK: u16 = 91;

/// EAX of [`GETVERSION`]: the only version there is.
pub const VERSION: u32 = 6;
/// ECX of [`GETVERSION`]: ESX.
pub const PRODUCT_ESX: u32 = 2;
/// ECX of [`GETVERSION`]: Workstation.
pub const PRODUCT_WORKSTATION: u32 = 4;

/// Bits of [`GET_VCPU_INFO`].
pub mod vcpu_info {
    /// TSCs of all processors agree.
    pub const SYNC_VTSCS: u32 = 1 << 1;
    /// x2APIC works without interrupt remapping.
    pub const LEGACY_X2APIC: u32 = 1 << 3;
    /// Must be clear in an answer.
    pub const RESERVED: u32 = 1 << 31;
}
