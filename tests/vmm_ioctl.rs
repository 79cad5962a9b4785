//! vmm(4)'s command words on the software CPU, with real guests: what a program written for `/dev/vmm` would see here.
//!
//! The same cases run on KVM in the rig (`tests/rig.rs`).

#[path = "vmm_ioctl/cases.rs"]
mod cases;
#[path = "vmm_ioctl/layout.rs"]
mod layout;

use std::sync::Arc;

use dialects::kvm::clock::PvClock;
use vmm::{Bus, MsrFault, VcpuId, Vmm};

/// The software CPU's TSC counts nanoseconds.
const TSC_HZ: u64 = 1_000_000_000;

/// A monitor over the software CPU, with the KVM dialect's clock for its machines.
fn monitor() -> Vmm {
    Vmm::new(Arc::new(soft::Soft::new())).with_paravirtual(Box::new(|config| {
        Arc::new(Paravirtual(PvClock::new(Arc::clone(&config.memory), Arc::clone(config.timers.clock()), TSC_HZ, config.vcpus)))
    }))
}

#[test]
fn guest_runs_by_command_words() {
    cases::run_a_guest(monitor()).unwrap();
}

#[test]
fn protected_page_exits_on_write_and_lets_it_through_later() {
    cases::protect(monitor()).unwrap();
}

#[test]
fn pvclock_is_placed_by_writevmparams_and_ticks() {
    cases::pvclock(monitor()).unwrap();
}

/// The clock as the paravirtual half of a bus; OpenBSD has no hypercalls.
struct Paravirtual(PvClock);

impl Bus for Paravirtual {
    fn read_msr(&self, vcpu: VcpuId, index: u32) -> Option<Result<u64, MsrFault>> {
        self.0.read_msr(vcpu, index)
    }

    fn write_msr(&self, vcpu: VcpuId, index: u32, value: u64) -> Option<Result<(), MsrFault>> {
        self.0.write_msr(vcpu, index, value)
    }
}
