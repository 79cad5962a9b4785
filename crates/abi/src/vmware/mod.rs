//! Words of the VMware dialect: CPUID leaves, backdoor, and GuestRPC over it.
//!
//! open-vm-tools `lib/include/{backdoor_def,backdoor_types,guest_msg_def,rpcin,rpcvmx}.h`, Linux `arch/x86/kernel/cpu/vmware.c` and
//! `arch/x86/include/asm/vmware.h`.
//!
//! ```text
//!   backdoor   one IN or OUT with all registers, or VMCALL/VMMCALL     [`backdoor`]
//!   message    channels of bytes over backdoor command 30             [`message`]
//!   RPCI, TCLO request and reply texts over a channel                 [`rpc`]
//! ```

pub mod backdoor;
pub mod message;
pub mod rpc;

/// EBX, ECX and EDX of the base leaf. EAX is at least base + 0x10.
pub const SIGNATURE: [u32; 3] = crate::hypervisor::registers(crate::hypervisor::VMWARE);

/// Offset from the base of the leaf with TSC frequency in kHz (EAX), APIC bus frequency in kHz (EBX) and the hypercall bits (ECX).
pub const LEAF_FREQUENCY: u32 = 0x10;
/// ECX of that leaf: the backdoor answers VMMCALL.
pub const CPUID_VMMCALL: u32 = 1 << 0;
/// ECX of that leaf: the backdoor answers VMCALL.
pub const CPUID_VMCALL: u32 = 1 << 1;
