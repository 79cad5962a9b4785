//! What a Linux program may do of pvbus' [`Hal`]: CPUID, time, and the instructions that trap to VMware.
//!
//! CPUID is for everybody. In a paravirtualized Xen domain the plain instruction shows the hardware; there it is executed with Xen's prefix
//! ([`gate::xen_cpuid`]). The instructions of VMware's backdoor may fault instead of trapping (`IN` without I/O permission, a
//! hypercall of the other maker): [`gate`] recovers from that. A port that faults is tried again with the permission of ioperm(2), which wants
//! root and a kernel that is not locked down.

mod gate;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use abi::vmware::backdoor::PORT;
use pvbus::hal::{Cpuid, Gate, Registers, Transfer};
use pvbus::{Hal, HalError, Nanos};

/// The machine this program runs on.
pub static MACHINE: Machine = Machine { start: OnceLock::new(), xen_pv: OnceLock::new(), permitted: AtomicBool::new(false) };

/// Where Linux tells how it runs on Xen (`Documentation/ABI/stable/sysfs-hypervisor-xen`).
const XEN_GUEST_TYPE: &str = "/sys/hypervisor/guest_type";
/// Ports of the backdoor, counted as the processor's permission bitmap does: an access of four bytes wants four ports (Intel SDM volume 1,
/// 19.5.2), and the one of high bandwidth is among them.
const PORTS: u32 = 4;

/// See [`MACHINE`].
#[derive(Debug)]
pub struct Machine {
    start: OnceLock<Instant>,
    /// Whether this is a paravirtualized Xen domain.
    xen_pv: OnceLock<bool>,
    /// Whether ioperm(2) was needed, and given.
    permitted: AtomicBool,
}

impl Machine {
    /// Whether ioperm(2) had to open the ports.
    #[must_use]
    pub fn needed_permission(&self) -> bool {
        self.permitted.load(Ordering::Relaxed)
    }

    fn start(&self) -> Instant {
        *self.start.get_or_init(Instant::now)
    }

    /// Asks for the backdoor's ports.
    fn permit(&self) -> Result<(), HalError> {
        if self.needed_permission() {
            return Err(HalError::Fault);
        }
        gate::permit_ports(PORT, PORTS).map_err(|_| HalError::Denied)?;
        self.permitted.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl Hal for Machine {
    fn cpuid(&self, leaf: u32, subleaf: u32) -> Cpuid {
        let is_pv = || std::fs::read(XEN_GUEST_TYPE).is_ok_and(|kind| kind.starts_with(b"PV\n"));
        if *self.xen_pv.get_or_init(is_pv) { gate::xen_cpuid(leaf, subleaf) } else { gate::cpuid(leaf, subleaf) }
    }

    fn now(&self) -> Nanos {
        Instant::now().duration_since(self.start()).as_nanos().try_into().unwrap_or(Nanos::MAX)
    }

    fn wait_until(&self, deadline: Nanos) {
        std::thread::sleep(Duration::from_nanos(deadline.saturating_sub(self.now())));
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
