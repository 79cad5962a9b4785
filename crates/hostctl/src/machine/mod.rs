//! What a Linux program may do of pvbus' [`Hal`]: CPUID, time, and the instructions that trap to VMware.
//!
//! CPUID is for everybody. In a paravirtualized Xen domain the plain instruction shows the hardware; there it is executed with Xen's prefix
//! ([`gate::xen_cpuid`]). The instructions of VMware's backdoor may fault instead of trapping (`IN` without I/O permission, a
//! hypercall of the other maker): [`gate`] recovers from that. A port that faults is tried again with the permission of ioperm(2), which wants
//! root and a kernel that is not locked down.

mod gate;

use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use abi::hypervisor::{BASE_STEP, FIRST_BASE, RANGE_END};
use abi::vmware::backdoor::PORT;
use pvbus::hal::{Cpuid, Gate, Registers, Transfer};
use pvbus::{Hal, HalError, Nanos};

use crate::sys::{file, process, time};

/// The machine this program runs on.
pub static MACHINE: Machine = Machine { xen_pv: AtomicU8::new(UNKNOWN), permitted: AtomicBool::new(false) };

/// Where Linux tells how it runs on Xen (`Documentation/ABI/stable/sysfs-hypervisor-xen`).
const XEN_GUEST_TYPE: &[u8] = b"/sys/hypervisor/guest_type";
/// Ports of the backdoor, counted as the processor's permission bitmap does: an access of four bytes wants four ports (Intel SDM volume 1,
/// 19.5.2), and the one of high bandwidth is among them.
const PORTS: u32 = 4;

/// Values of [`Machine::xen_pv`].
const UNKNOWN: u8 = 0;
const NO: u8 = 1;
const YES: u8 = 2;

/// The same with a view of the first few interfaces only. CPUID traps, and a look at all 256 places takes longer than all else that
/// reading a key does; every hypervisor known has its interfaces in the first [`NEAR_BASES`].
pub static NEAR: Near = Near;

/// See [`NEAR`].
const NEAR_BASES: u32 = 4;

/// See [`NEAR`].
#[derive(Debug)]
pub struct Near;

impl Hal for Near {
    fn cpuid(&self, leaf: u32, subleaf: u32) -> Cpuid {
        let is_far = (FIRST_BASE + NEAR_BASES * BASE_STEP..RANGE_END).contains(&leaf);
        if is_far { Cpuid::default() } else { MACHINE.cpuid(leaf, subleaf) }
    }

    fn now(&self) -> Nanos {
        MACHINE.now()
    }
}

/// See [`MACHINE`].
#[derive(Debug)]
pub struct Machine {
    /// Whether this is a paravirtualized Xen domain.
    xen_pv: AtomicU8,
    /// Whether ioperm(2) was needed, and given.
    permitted: AtomicBool,
}

impl Machine {
    /// Whether ioperm(2) had to open the ports.
    #[must_use]
    pub fn needed_permission(&self) -> bool {
        self.permitted.load(Ordering::Relaxed)
    }

    fn is_xen_pv(&self) -> bool {
        match self.xen_pv.load(Ordering::Relaxed) {
            UNKNOWN => {
                let is_pv = file::read(XEN_GUEST_TYPE, 16).is_ok_and(|kind| kind == b"PV\n");
                self.xen_pv.store(if is_pv { YES } else { NO }, Ordering::Relaxed);
                is_pv
            }
            known => known == YES,
        }
    }

    /// Asks for the backdoor's ports.
    fn permit(&self) -> Result<(), HalError> {
        if self.needed_permission() {
            return Err(HalError::Fault);
        }
        process::permit_ports(PORT, PORTS).map_err(|_| HalError::Denied)?;
        self.permitted.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl Hal for Machine {
    fn cpuid(&self, leaf: u32, subleaf: u32) -> Cpuid {
        if self.is_xen_pv() { gate::xen_cpuid(leaf, subleaf) } else { gate::cpuid(leaf, subleaf) }
    }

    fn now(&self) -> Nanos {
        time::now()
    }

    fn wait_until(&self, deadline: Nanos) {
        time::sleep_until(deadline);
    }

    fn call(&self, gate: Gate, registers: &mut Registers, mut transfer: Transfer<'_>) -> Result<(), HalError> {
        match gate::execute(gate, registers, &mut transfer) {
            Err(HalError::Fault) if matches!(gate, Gate::In | Gate::Out) => {
                self.permit()?;
                gate::execute(gate, registers, &mut transfer)
            }
            result => result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_on_and_waiting_takes_as_long_as_it_says() {
        let before = MACHINE.now();
        MACHINE.wait_until(before + 3_000_000);
        assert!(MACHINE.now() >= before + 3_000_000);
    }

    #[test]
    fn cpuid_tells_the_maker() {
        let leaf = MACHINE.cpuid(0, 0);
        assert!(leaf.eax >= 1 && leaf.ebx != 0);
    }
}
