//! Xen: what can be told before there is a driver for it.

use crate::hal::Cpuid;

/// Whether the hypercall leaf offers what xen(4) needs: exactly one hypercall page, and a register to ask for it (OpenBSD
/// `sys/dev/pv/xen.c`, `xen_init_hypercall`).
#[must_use]
pub const fn has_hypercalls(leaf: &Cpuid) -> bool {
    leaf.eax == 1 && leaf.ebx != 0
}
