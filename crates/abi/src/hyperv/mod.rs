//! Words of the Hyper-V dialect. Sources: the Hypervisor Top-Level Functional Specification (TLFS), Linux `include/uapi/linux/hyperv.h`,
//! `include/asm-generic/hyperv-tlfs.h` and `tools/hv`, cited where they are used.

pub mod cpuid;
pub mod hypercall;
pub mod ic;
pub mod kvp;
pub mod msr;
pub mod netvsc;
pub mod ring;
pub mod rndis;
pub mod scsi;
pub mod storvsc;
pub mod synic;
pub mod vmbus;
