//! Hyper-V: what can be told before there is a driver for it.
//!
//! KVM, Xen, bhyve and VirtualBox imitate Hyper-V's leaves and clocks for Windows' sake, without VMBus behind them.

use abi::hypervisor::hyperv as words;

use crate::hal::Cpuid;

/// Whether the features of an interface are enough for VMBus: hypercalls and the synthetic interrupt controller (what OpenBSD's hyperv(4)
/// asks for), and the right to post messages and to signal events.
#[must_use]
pub fn has_vmbus(features: &Cpuid) -> bool {
    let eax = words::HYPERCALL | words::SYNIC;
    let ebx = words::POST_MESSAGES | words::SIGNAL_EVENTS;
    features.eax & eax == eax && features.ebx & ebx == ebx
}
