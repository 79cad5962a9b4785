//! The instructions themselves, and coming back from those that fault.
//!
//! Each instruction that may fault stands in a function of its own, between labels. When the processor refuses it, the kernel sends SIGSEGV
//! (#GP) or SIGILL (#UD); the handler finds the instruction's address in the context, and lets the program go on behind it with
//! a failure as the result. A fault anywhere else ends the program.
// Machine instructions, and a way back from their faults.
#![allow(unsafe_code)]

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, Ordering};

use linux_raw_sys::general::{SIGILL, SIGSEGV};
use pvbus::HalError;
use pvbus::hal::{Cpuid, Gate, Registers, Transfer};

use crate::sys::process;

// fn NAME(registers: *mut [u64; 7]) -> u64
//
// Loads RAX, RBX, RCX, RDX, RSI, RDI, RBP, executes the instruction, stores them back and returns 0; 1 when it faulted, and nothing is
// stored then. R12 holds the pointer meanwhile.
global_asm!(
    ".macro hostctl_gate name, instruction:vararg",
    ".globl hostctl_gate_\\name",
    ".globl hostctl_gate_\\name\\()_fault",
    "hostctl_gate_\\name:",
    "push rbx",
    "push rbp",
    "push r12",
    "mov r12, rdi",
    "mov rax, [r12]",
    "mov rbx, [r12 + 8]",
    "mov rcx, [r12 + 16]",
    "mov rdx, [r12 + 24]",
    "mov rsi, [r12 + 32]",
    "mov rbp, [r12 + 48]",
    "mov rdi, [r12 + 40]",
    "hostctl_gate_\\name\\()_at:",
    ".globl hostctl_gate_\\name\\()_at",
    "\\instruction",
    "mov [r12], rax",
    "mov [r12 + 8], rbx",
    "mov [r12 + 16], rcx",
    "mov [r12 + 24], rdx",
    "mov [r12 + 32], rsi",
    "mov [r12 + 40], rdi",
    "mov [r12 + 48], rbp",
    "xor eax, eax",
    "jmp 2f",
    "hostctl_gate_\\name\\()_fault:",
    "mov eax, 1",
    "2:",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".endm",
    ".text",
    "hostctl_gate in, in eax, dx",
    "hostctl_gate out, out dx, eax",
    "hostctl_gate insb, rep insb",
    "hostctl_gate outsb, rep outsb",
    "hostctl_gate vmcall, vmcall",
    "hostctl_gate vmmcall, vmmcall",
);

/// RAX, RBX, RCX, RDX, RSI, RDI, RBP.
type Loaded = [u64; 7];

macro_rules! gates {
    ($($constant:ident $function:ident $at:ident $fault:ident),* $(,)?) => {
        unsafe extern "C" {
            $(
                fn $function(registers: *mut Loaded) -> u64;
                static $at: u8;
                static $fault: u8;
            )*
        }

        $(
            static $constant: Instruction = Instruction {
                function: $function,
                at: &raw const $at,
                fault: &raw const $fault,
            };
        )*

        /// All of them.
        static ALL: &[&Instruction] = &[$(&$constant),*];
    };
}

gates! {
    IN hostctl_gate_in hostctl_gate_in_at hostctl_gate_in_fault,
    OUT hostctl_gate_out hostctl_gate_out_at hostctl_gate_out_fault,
    INSB hostctl_gate_insb hostctl_gate_insb_at hostctl_gate_insb_fault,
    OUTSB hostctl_gate_outsb hostctl_gate_outsb_at hostctl_gate_outsb_fault,
    VMCALL hostctl_gate_vmcall hostctl_gate_vmcall_at hostctl_gate_vmcall_fault,
    VMMCALL hostctl_gate_vmmcall hostctl_gate_vmmcall_at hostctl_gate_vmmcall_fault,
}

/// An instruction in its function.
struct Instruction {
    function: unsafe extern "C" fn(*mut Loaded) -> u64,
    /// Where it stands.
    at: *const u8,
    /// Where the program goes on when it faults.
    fault: *const u8,
}

// SAFETY: the pointers are addresses of code, only compared and jumped to.
unsafe impl Sync for Instruction {}

/// Executes the instruction of `gate` with `registers`.
pub(super) fn execute(gate: Gate, registers: &mut Registers, transfer: &mut Transfer<'_>) -> Result<(), HalError> {
    static CATCHING: AtomicBool = AtomicBool::new(false);
    if !CATCHING.swap(true, Ordering::Relaxed) {
        catch_faults()?;
    }

    let Registers { rax, rbx, rcx, rdx, rsi, rdi, rbp } = *registers;
    let mut loaded: Loaded = [rax, rbx, rcx, rdx, rsi, rdi, rbp];
    match transfer {
        // Programs are not let through to what exchanges memory: hypercalls of kernels.
        Transfer::Exchange(_) => return Err(HalError::Unavailable),
        Transfer::None => {}
        Transfer::Out(bytes) => {
            loaded[2] = bytes.len() as u64;
            loaded[4] = bytes.as_ptr().expose_provenance() as u64;
        }
        Transfer::In(bytes) => {
            loaded[2] = bytes.len() as u64;
            loaded[5] = bytes.as_mut_ptr().expose_provenance() as u64;
        }
    }
    let instruction = match (gate, transfer) {
        (Gate::Vmcall, _) => &VMCALL,
        (Gate::Vmmcall, _) => &VMMCALL,
        (Gate::In, Transfer::None) => &IN,
        (Gate::Out, Transfer::None) => &OUT,
        (_, Transfer::In(_)) => &INSB,
        (_, Transfer::Out(_) | Transfer::Exchange(_)) => &OUTSB,
    };
    // SAFETY: the function stores to `loaded` alone and keeps the ABI's registers. What the instruction does beside is the host's affair: it
    // writes to memory only by `rep insb`, RCX bytes from RDI on, which are those of `transfer`; a hypercall writes as much, there, when asked
    // for a transfer to the guest.
    let fault = unsafe { (instruction.function)(&raw mut loaded) };
    if fault != 0 {
        return Err(HalError::Fault);
    }
    let [rax, rbx, rcx, rdx, rsi, rdi, rbp] = loaded;
    *registers = Registers { rax, rbx, rcx, rdx, rsi, rdi, rbp };
    Ok(())
}

/// CPUID.
pub(super) fn cpuid(leaf: u32, subleaf: u32) -> Cpuid {
    let core::arch::x86_64::CpuidResult { eax, ebx, ecx, edx } = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    Cpuid { eax, ebx, ecx, edx }
}

/// CPUID as Xen shows it to a paravirtualized domain: with a prefix that Xen knows and no processor executes (Xen
/// `xen/include/public/arch-x86/xen.h`, `XEN_CPUID`).
pub(super) fn xen_cpuid(leaf: u32, subleaf: u32) -> Cpuid {
    let (eax, ebx, ecx, edx): (u32, u64, u32, u32);
    // SAFETY: the caller has seen that this is such a domain, where Xen emulates the sequence as CPUID. RBX, which cannot be named, is restored.
    unsafe {
        asm!(
            "mov {kept}, rbx",
            ".byte 0x0f, 0x0b, 0x78, 0x65, 0x6e",
            "cpuid",
            "xchg {kept}, rbx",
            kept = out(reg) ebx,
            inout("eax") leaf => eax,
            inout("ecx") subleaf => ecx,
            out("edx") edx,
            options(nostack, preserves_flags),
        );
    }
    // CPUID clears the upper half.
    Cpuid { eax, ebx: ebx as u32, ecx, edx }
}

/// Lets the program go on behind an instruction that faulted.
fn catch_faults() -> Result<(), HalError> {
    for signal in [SIGSEGV, SIGILL] {
        // SAFETY: the code behind a fault keeps R12 and the stack as the instruction found them; the table is constant.
        unsafe { process::catch(signal, behind) }.map_err(|_| HalError::Unavailable)?;
    }
    Ok(())
}

/// Where the program goes on when the instruction at `address` has faulted.
fn behind(address: usize) -> Option<usize> {
    ALL.iter().find(|instruction| instruction.at.addr() == address).map(|instruction| instruction.fault.addr())
}

#[cfg(test)]
mod tests {
    use abi::vmware::backdoor::{MAGIC, PORT};

    use super::*;

    #[test]
    fn faulting_instruction_is_an_error_and_the_program_goes_on() {
        // On this machine at least one of the two makers' hypercalls does not exist, or both are answered; neither may end the program.
        for gate in [Gate::Vmcall, Gate::Vmmcall] {
            let mut registers = Registers { rax: u64::MAX, ..Registers::default() };
            let _ = execute(gate, &mut registers, &mut Transfer::None);
        }
    }

    #[test]
    fn port_without_permission_faults_and_leaves_the_registers() {
        let before = Registers { rax: MAGIC.into(), rdx: PORT.into(), rbp: 7, ..Registers::default() };
        let mut registers = before;
        // A host with a backdoor for everybody lets it through.
        if let Err(error) = execute(Gate::In, &mut registers, &mut Transfer::None) {
            assert_eq!((error, registers), (HalError::Fault, before));
        }
    }

    #[test]
    fn transfer_without_permission_faults() {
        let mut registers = Registers { rax: MAGIC.into(), rdx: u64::from(PORT) + 1, ..Registers::default() };
        let mut buffer = [7; 4];
        if execute(Gate::In, &mut registers, &mut Transfer::In(&mut buffer)).is_err() {
            assert_eq!(buffer, [7; 4]);
        }
    }
}
