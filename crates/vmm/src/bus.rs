//! The doors by which a virtual processor reaches the rest of its machine.
//!
//! A backend calls these while a guest instruction is under way, on the processor's own thread. Every method may decline
//! (`None` or `false`); then the access ends [`crate::Vcpu::run`] with the matching [`crate::Exit`], or, for MSRs and
//! hypercalls, has the architecture's own answer (#GP, #UD). Guest memory is the fifth door; it needs no method.

use crate::paging::Paging;

/// Number of a processor within its machine, from 0; also its initial APIC id.
pub type VcpuId = u32;

/// Answer to an MSR access that has to end in #GP(0).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsrFault;

/// What an acknowledge cycle reads when no 8259 answers: the bus floats high.
const SPURIOUS: u8 = 0xff;

/// Devices and dialects as a processor sees them. Shared by all processors of a machine. What an implementation leaves out is
/// declined.
pub trait Bus: Send + Sync {
    /// IN of `size` bytes (1, 2 or 4) from `port`. Ports nobody owns read as all ones; only a bus that wants the exit says `None`.
    fn port_in(&self, vcpu: VcpuId, port: u16, size: u8) -> Option<u32> {
        let _ = (vcpu, port, size);
        None
    }

    /// OUT of `size` bytes to `port`. `false` asks for the exit.
    fn port_out(&self, vcpu: VcpuId, port: u16, size: u8, value: u32) -> bool {
        let _ = (vcpu, port, size, value);
        false
    }

    /// Whether accesses to `port` go to [`Bus::port_call`], with the registers of the instruction. Such a port is open to every privilege level,
    /// whatever IOPL and the I/O permission bitmap say, as the VMware backdoor is. The answer never changes while the machine runs.
    fn takes_registers(&self, port: u16) -> bool {
        let _ = port;
        false
    }

    /// IN, OUT, or one element of INS or OUTS, at a port for which [`Bus::takes_registers`] is true.
    fn port_call(&self, vcpu: VcpuId, call: &mut PortCall) {
        let _ = (vcpu, call);
    }

    /// Read of `data.len()` bytes (1 to 8, not crossing an 8-byte boundary unless the guest did) at a guest physical address without memory.
    fn mmio_read(&self, vcpu: VcpuId, gpa: u64, data: &mut [u8]) -> bool {
        let _ = (vcpu, gpa, data);
        false
    }

    /// Write to a guest physical address without memory.
    fn mmio_write(&self, vcpu: VcpuId, gpa: u64, data: &[u8]) -> bool {
        let _ = (vcpu, gpa, data);
        false
    }

    /// RDMSR of an index that the processor itself does not have. `None`: nobody has it (#GP, logged once).
    fn read_msr(&self, vcpu: VcpuId, index: u32) -> Option<Result<u64, MsrFault>> {
        let _ = (vcpu, index);
        None
    }

    /// WRMSR of an index that the processor itself does not have. `None`: nobody has it (#GP, logged once).
    fn write_msr(&self, vcpu: VcpuId, index: u32, value: u64) -> Option<Result<(), MsrFault>> {
        let _ = (vcpu, index, value);
        None
    }

    /// VMCALL or VMMCALL. `false`: nobody answers (#UD).
    fn hypercall(&self, vcpu: VcpuId, call: &mut Hypercall) -> bool {
        let _ = (vcpu, call);
        false
    }

    /// The local APIC of some processor ended a level-triggered interrupt (EOI broadcast to the I/O APIC).
    fn end_of_interrupt(&self, vector: u8) {
        let _ = vector;
    }

    /// Interrupt acknowledge cycle: the vector of the 8259 pair's highest request (a spurious one if it went away).
    fn acknowledge_extint(&self) -> u8 {
        SPURIOUS
    }
}

/// A port access that may read and change the registers of the instruction; what the callee changes is written back.
///
/// For INS and OUTS there is one call an element. The index and count registers in `gpr` may stand before or behind the element, as the backend has
/// it, and what the callee does to them is lost; other registers count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PortCall {
    /// General registers in encoding order: RAX RCX RDX RBX RSP RBP RSI RDI R8 to R15. IN without `string` takes its answer from RAX.
    pub gpr: [u64; 16],
    /// Port number.
    pub port: u16,
    /// Access size in bytes: 1, 2 or 4.
    pub size: u8,
    /// `true` for OUT and OUTS.
    pub write: bool,
    /// One element of INS or OUTS.
    pub string: bool,
    /// The element: what the guest wrote, or what INS shall store.
    pub data: u32,
    /// Privilege level of the caller, 0 to 3.
    pub cpl: u8,
    /// Whether the caller is in 64-bit mode.
    pub long_mode: bool,
    /// How the caller's linear addresses become physical ones.
    pub paging: Paging,
    /// Set by the callee: the instruction is not this caller's to use, and ends in #UD where the backend can do that; else it did nothing.
    pub undefined: bool,
}

/// Registers of a hypercall; what the callee changes is written back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Hypercall {
    /// General registers in encoding order: RAX RCX RDX RBX RSP RBP RSI RDI R8 to R15.
    pub gpr: [u64; 16],
    /// Privilege level of the caller, 0 to 3.
    pub cpl: u8,
    /// Whether the caller is in 64-bit mode.
    pub long_mode: bool,
    /// `true` for VMMCALL (AMD's opcode), `false` for VMCALL.
    pub vmmcall: bool,
    /// How the caller's linear addresses become physical ones.
    pub paging: Paging,
}
