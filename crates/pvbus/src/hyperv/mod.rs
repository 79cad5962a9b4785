//! Hyper-V: VMBus and its devices, for guests in 64-bit mode.
//!
//! ```text
//!   hyperv0.rs      the device of the tree: contact with the host, which devices there are
//!   ic/             integration components: heartbeat, shutdown, time, key/value pairs, file systems at rest
//!   storvsc/        hvs, a SCSI controller with its disks
//!   netvsc/         hvn, a network card
//!   vmbus.rs        channels: offered, opened, closed, taken away
//!   channel.rs      packets of an open channel
//!   ring.rs         the two rings of a channel
//!   synic.rs        messages and events from the host
//!   hypercall.rs    messages and events to the host, by crate::Hal
//!   clock.rs        reference time
//! ```
//!
//! OpenBSD `sys/dev/pv/hyperv.c`, `hypervic.c`, `hvs.c`, `if_hvn.c` are the models, the Hypervisor Top-Level Functional Specification (TLFS) and Linux
//! `drivers/hv` the specification; the words are in [`abi::hyperv`]. Unlike OpenBSD's, devices come and go while the machine runs, on the processor that
//! attached the bus.
//!
//! KVM, Xen, bhyve and VirtualBox imitate Hyper-V's leaves and clocks for Windows' sake, without VMBus behind them.

mod channel;
mod clock;
mod hypercall;
mod hyperv0;
mod ic;
mod netvsc;
mod ring;
mod storvsc;
mod synic;
mod vmbus;

use abi::hypervisor::hyperv as words;

pub use clock::ReferenceClock;
pub use hypercall::HypervError;
pub(crate) use hyperv0::Hyperv0;
pub use ic::pools::{self, KvpStore};

use crate::hal::{Cpuid, Hal};
use hypercall::Hypercalls;
use synic::Synic;

/// Whether the features of an interface are enough for VMBus: hypercalls and the synthetic interrupt controller (what OpenBSD's hyperv(4)
/// asks for), and the right to post messages and to signal events.
#[must_use]
pub fn has_vmbus(features: &Cpuid) -> bool {
    let eax = words::HYPERCALL | words::SYNIC;
    let ebx = words::POST_MESSAGES | words::SIGNAL_EVENTS;
    features.eax & eax == eax && features.ebx & ebx == ebx
}

/// What the bus and its channels reach the hypervisor by.
struct Platform<'h> {
    hal: &'h dyn Hal,
    calls: Hypercalls<'h>,
    synic: Synic<'h>,
}

impl<'h> Platform<'h> {
    fn new(hal: &'h dyn Hal) -> Result<Platform<'h>, HypervError> {
        let calls = Hypercalls::new(hal)?;
        match Synic::new(hal) {
            Ok(synic) => Ok(Platform { hal, calls, synic }),
            Err(error) => {
                calls.end();
                Err(error.into())
            }
        }
    }

    /// Gives everything back. Nobody has channels any more.
    fn end(self) {
        self.synic.end();
        self.calls.end();
    }
}
