//! Host half of the paravirtual dialects: what a guest finds when it looks for a hypervisor.
//!
//! A dialect is reached by five doors only: CPUID leaves, MSRs, I/O ports, the VMCALL/VMMCALL instruction, and guest memory.
//! It never knows which backend runs the processors. [`Dialect`] has one method for each door; what a dialect does to the processors goes
//! through [`Processors`].

#![forbid(unsafe_code)]

mod atomic;
pub mod disk;
pub mod hyperv;
pub mod kvm;
pub mod network;
pub mod openbsd;
pub mod store;
pub mod vmware;
pub mod xen;

use std::sync::Arc;

use vmm::backend::{BackendVm, EoiFlag};
use vmm::{CpuidTable, Hypercall, MsrFault, PortCall, VcpuId};

/// A machine's processors, as dialects reach them.
pub trait Processors: Send + Sync {
    /// Delivers a message-signalled interrupt: a write of `data` to `address`, Intel SDM vol. 3 section 11.11.
    fn signal_msi(&self, address: u64, data: u32);

    /// See [`BackendVm::wake`].
    fn wake(&self, id: VcpuId);

    /// See [`BackendVm::is_idle`].
    fn is_idle(&self) -> bool {
        false
    }

    /// See [`BackendVm::set_eoi_flag`].
    fn set_eoi_flag(&self, id: VcpuId, flag: Option<Arc<dyn EoiFlag>>);

    /// See [`BackendVm::set_auto_eoi`].
    fn set_auto_eoi(&self, id: VcpuId, vector: u8, ends_by_itself: bool) -> bool {
        let _ = (id, vector, ends_by_itself);
        false
    }

    /// See [`BackendVm::read_local_apic`].
    ///
    /// # Errors
    /// [`MsrFault`] as there.
    fn read_local_apic(&self, id: VcpuId, offset: u64) -> Result<u64, MsrFault> {
        let _ = (id, offset);
        Err(MsrFault)
    }

    /// See [`BackendVm::write_local_apic`].
    ///
    /// # Errors
    /// [`MsrFault`] as there.
    fn write_local_apic(&self, id: VcpuId, offset: u64, value: u64) -> Result<Option<u8>, MsrFault> {
        let _ = (id, offset, value);
        Err(MsrFault)
    }

    /// See [`BackendVm::flush_translations`].
    fn flush_translations(&self, caller: VcpuId, processors: u64, pages: Option<&[u64]>) {
        let _ = (caller, processors, pages);
    }
}

impl Processors for Arc<dyn BackendVm> {
    fn signal_msi(&self, address: u64, data: u32) {
        self.as_ref().signal_msi(address, data);
    }

    fn wake(&self, id: VcpuId) {
        self.as_ref().wake(id);
    }

    fn is_idle(&self) -> bool {
        self.as_ref().is_idle()
    }

    fn set_eoi_flag(&self, id: VcpuId, flag: Option<Arc<dyn EoiFlag>>) {
        self.as_ref().set_eoi_flag(id, flag);
    }

    fn set_auto_eoi(&self, id: VcpuId, vector: u8, ends_by_itself: bool) -> bool {
        self.as_ref().set_auto_eoi(id, vector, ends_by_itself)
    }

    fn read_local_apic(&self, id: VcpuId, offset: u64) -> Result<u64, MsrFault> {
        self.as_ref().read_local_apic(id, offset)
    }

    fn write_local_apic(&self, id: VcpuId, offset: u64, value: u64) -> Result<Option<u8>, MsrFault> {
        self.as_ref().write_local_apic(id, offset, value)
    }

    fn flush_translations(&self, caller: VcpuId, processors: u64, pages: Option<&[u64]>) {
        self.as_ref().flush_translations(caller, processors, pages);
    }
}

/// One hypervisor's paravirtual interface, host half. Shared by all processors of a machine.
pub trait Dialect: Send + Sync {
    /// Name as `--dialect` takes it.
    fn name(&self) -> &'static str;

    /// Adds the dialect's leaves at `base` (0x40000000 + n * 0x100) to what CPUID answers.
    fn add_cpuid(&self, base: u32, table: &mut CpuidTable);

    /// Whether guests shall take their time from a clock of this dialect. Then the TSC is not called invariant: Linux prefers such a TSC to the
    /// clock, and the clock is what holds on whatever host the machine comes to.
    fn has_clock(&self) -> bool {
        false
    }

    /// RDMSR. `None` when the index is not the dialect's.
    fn read_msr(&self, vcpu: VcpuId, index: u32) -> Option<Result<u64, MsrFault>> {
        let _ = (vcpu, index);
        None
    }

    /// WRMSR. `None` when the index is not the dialect's.
    fn write_msr(&self, vcpu: VcpuId, index: u32, value: u64) -> Option<Result<(), MsrFault>> {
        let _ = (vcpu, index, value);
        None
    }

    /// IN. `None` when the port is not the dialect's.
    fn port_in(&self, vcpu: VcpuId, port: u16, size: u8) -> Option<u32> {
        let _ = (vcpu, port, size);
        None
    }

    /// OUT. `false` when the port is not the dialect's.
    fn port_out(&self, vcpu: VcpuId, port: u16, size: u8, value: u32) -> bool {
        let _ = (vcpu, port, size, value);
        false
    }

    /// Whether `port` is the dialect's and wants the registers of the instruction ([`vmm::Bus::takes_registers`]).
    fn takes_registers(&self, port: u16) -> bool {
        let _ = port;
        false
    }

    /// An access to a port for which [`Dialect::takes_registers`] is true.
    fn port_call(&self, vcpu: VcpuId, call: &mut PortCall) {
        let _ = (vcpu, call);
    }

    /// VMCALL or VMMCALL. `false` when the call is not the dialect's.
    fn hypercall(&self, vcpu: VcpuId, call: &mut Hypercall) -> bool {
        let _ = (vcpu, call);
        false
    }

    /// A level-triggered interrupt ends: who holds a line up without cause is to let it go before it is looked at again.
    fn end_of_interrupt(&self) {}

    /// The machine was reset: forget what the guest registered.
    fn reset(&self);
}
