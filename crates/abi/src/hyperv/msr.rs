//! Model-specific registers: TLFS 6.0b, appendix F; Linux `arch/x86/include/asm/hyperv-tlfs.h`.

/// What system runs; the hypercall page is there only while it is not zero.
pub const GUEST_OS_ID: u32 = 0x4000_0000;
/// The hypercall page: [`PAGE_ENABLE`], [`HYPERCALL_LOCKED`], page number.
pub const HYPERCALL: u32 = 0x4000_0001;
/// The processor's number (read only).
pub const VP_INDEX: u32 = 0x4000_0002;
/// [`RESET_NOW`] resets the machine.
pub const RESET: u32 = 0x4000_0003;
/// How long the processor ran, in 100 ns (read only).
pub const VP_RUNTIME: u32 = 0x4000_0010;
/// The reference counter: 100 ns since the partition was made (read only).
pub const TIME_REF_COUNT: u32 = 0x4000_0020;
/// The reference TSC page: [`PAGE_ENABLE`], page number.
pub const REFERENCE_TSC: u32 = 0x4000_0021;
/// Ticks a second of the TSC (read only).
pub const TSC_FREQUENCY: u32 = 0x4000_0022;
/// Ticks a second of the local APIC's timer (read only).
pub const APIC_FREQUENCY: u32 = 0x4000_0023;
/// End of interrupt (write only).
pub const EOI: u32 = 0x4000_0070;
/// Interrupt command.
pub const ICR: u32 = 0x4000_0071;
/// Task priority.
pub const TPR: u32 = 0x4000_0072;
/// The processor's assist page: [`PAGE_ENABLE`], page number.
pub const VP_ASSIST_PAGE: u32 = 0x4000_0073;
/// [`SCONTROL_ENABLE`] turns the processor's synthetic interrupt controller on.
pub const SCONTROL: u32 = 0x4000_0080;
/// Its version, [`SVERSION_1`] (read only).
pub const SVERSION: u32 = 0x4000_0081;
/// Its page of event flags: [`PAGE_ENABLE`], page number.
pub const SIEFP: u32 = 0x4000_0082;
/// Its page of messages: [`PAGE_ENABLE`], page number.
pub const SIMP: u32 = 0x4000_0083;
/// End of message.
pub const EOM: u32 = 0x4000_0084;
/// First of the [`SINTS`] interrupt sources, [`sint`].
pub const SINT0: u32 = 0x4000_0090;
/// Number of interrupt sources.
pub const SINTS: u32 = 16;
/// [`stimer`] configuration of the first of [`STIMERS`] timers; its count follows, and then the next timer.
pub const STIMER0_CONFIG: u32 = 0x4000_00b0;
/// Number of timers of a processor.
pub const STIMERS: u32 = 4;
/// First of the [`CRASH_PARAMETERS`].
pub const CRASH_P0: u32 = 0x4000_0100;
/// Number of parameters of a crash. The fourth and fifth are address and length of the message where [`CRASH_MESSAGE`] says so.
pub const CRASH_PARAMETERS: u32 = 5;
/// Reading says what there is of [`CRASH_NOTIFY`] and [`CRASH_MESSAGE`], writing these reports a crash.
pub const CRASH_CTL: u32 = 0x4000_0105;

/// The page is there.
pub const PAGE_ENABLE: u64 = 1;
/// Where the page number begins.
pub const PAGE_SHIFT: u32 = 12;
/// [`HYPERCALL`] cannot be written any more.
pub const HYPERCALL_LOCKED: u64 = 2;
/// See [`RESET`].
pub const RESET_NOW: u64 = 1;
/// See [`SCONTROL`].
pub const SCONTROL_ENABLE: u64 = 1;
/// See [`SVERSION`].
pub const SVERSION_1: u64 = 1;
/// First byte of the assist page: the interrupt in service need not be ended. (TLFS 10.3.5.)
pub const ASSIST_NO_EOI: u8 = 1;
/// See [`CRASH_CTL`]: the system has crashed.
pub const CRASH_NOTIFY: u64 = 1 << 63;
/// See [`CRASH_CTL`]: it left a message.
pub const CRASH_MESSAGE: u64 = 1 << 62;

/// An interrupt source, TLFS 11.8.4. Bits 7:0 are the vector.
pub mod sint {
    /// No interrupts.
    pub const MASKED: u64 = 1 << 16;
    /// Interrupts end by themselves.
    pub const AUTO_EOI: u64 = 1 << 17;
    /// The guest looks by itself, without interrupts.
    pub const POLLING: u64 = 1 << 18;
    /// As the processor comes up.
    pub const RESET: u64 = MASKED;
}

/// Configuration of a synthetic timer, TLFS 12.3.1.
pub mod stimer {
    /// It runs.
    pub const ENABLE: u64 = 1;
    /// The count is a period, else the time at which it expires once.
    pub const PERIODIC: u64 = 1 << 1;
    /// It may be late when the processor sleeps.
    pub const LAZY: u64 = 1 << 2;
    /// Writing the count makes it run.
    pub const AUTO_ENABLE: u64 = 1 << 3;
    /// Where the local APIC's vector of direct mode is.
    pub const VECTOR_SHIFT: u32 = 4;
    /// It interrupts by the vector, else sends a message.
    pub const DIRECT: u64 = 1 << 12;
    /// Where the interrupt source of messages is.
    pub const SINT_SHIFT: u32 = 16;
    /// Bits that mean something.
    pub const DEFINED: u64 = ENABLE | PERIODIC | LAZY | AUTO_ENABLE | 0xff << VECTOR_SHIFT | DIRECT | 0xf << SINT_SHIFT;
}

/// What [`GUEST_OS_ID`] holds, TLFS 2.6.
pub mod os {
    /// Not Microsoft's.
    pub const OPEN_SOURCE: u64 = 1 << 63;
    /// Where the kind of an open-source system is.
    pub const KIND_SHIFT: u32 = 56;
    /// Where the version is.
    pub const VERSION_SHIFT: u32 = 16;
    /// Linux.
    pub const LINUX: u8 = 1;
    /// FreeBSD.
    pub const FREEBSD: u8 = 2;
}
