//! Event channels, two-level ABI: `event_channel.h`.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Ports there are in the two-level ABI of 64-bit guests (`EVTCHN_2L_NR_CHANNELS`); port 0 is none.
pub const PORTS: u32 = 4096;
/// Virtual interrupts: per-vCPU timer (`xen.h`, `VIRQ_TIMER`).
pub const VIRQ_TIMER: u32 = 0;
/// Numbers of virtual interrupts (`NR_VIRQS`).
pub const VIRQS: u32 = 24;

/// Operations of `HYPERVISOR_event_channel_op`.
pub mod op {
    /// [`BindVirq`](super::BindVirq).
    pub const BIND_VIRQ: u64 = 1;
    /// A port to close.
    pub const CLOSE: u64 = 3;
    /// A port to send on.
    pub const SEND: u64 = 4;
    /// [`Status`](super::Status).
    pub const STATUS: u64 = 5;
    /// [`AllocUnbound`](super::AllocUnbound).
    pub const ALLOC_UNBOUND: u64 = 6;
    /// [`BindIpi`](super::BindIpi).
    pub const BIND_IPI: u64 = 7;
    /// [`BindVcpu`](super::BindVcpu).
    pub const BIND_VCPU: u64 = 8;
    /// A port to unmask.
    pub const UNMASK: u64 = 9;
}

/// `struct evtchn_bind_virq`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BindVirq {
    /// Virtual interrupt.
    pub virq: U32,
    /// For which vCPU.
    pub vcpu: U32,
    /// Answer: the new port.
    pub port: U32,
}

/// `struct evtchn_alloc_unbound`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AllocUnbound {
    /// The domain that gets the port.
    pub dom: U16,
    /// The domain that may bind to it.
    pub remote_dom: U16,
    /// Answer: the new port.
    pub port: U32,
}

/// `struct evtchn_bind_ipi`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BindIpi {
    /// Whom the port interrupts.
    pub vcpu: U32,
    /// Answer: the new port.
    pub port: U32,
}

/// `struct evtchn_bind_vcpu`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BindVcpu {
    /// A port.
    pub port: U32,
    /// Whom it shall interrupt.
    pub vcpu: U32,
}

/// `struct evtchn_status`.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Status {
    /// Domain of the port.
    pub dom: U16,
    /// Zero.
    pub pad: U16,
    /// The port.
    pub port: U32,
    /// Answer: [`status`].
    pub status: U32,
    /// Answer: whom it interrupts.
    pub vcpu: U32,
    /// Answer: the other end's domain, or the virtual interrupt.
    pub first: U32,
    /// Answer: the other end's port.
    pub second: U32,
}

const _: () = assert!(size_of::<Status>() == 24);

/// Values of [`Status::status`] (`EVTCHNSTAT_*`).
pub mod status {
    /// Not in use.
    pub const CLOSED: u32 = 0;
    /// Waits for its other end.
    pub const UNBOUND: u32 = 1;
    /// Connected.
    pub const INTERDOMAIN: u32 = 2;
    /// A virtual interrupt.
    pub const VIRQ: u32 = 4;
    /// For the domain itself.
    pub const IPI: u32 = 5;
}
