//! Words of the Hyper-V dialect. Sources: Linux `include/uapi/linux/hyperv.h` and `tools/hv`, cited where they are used.

pub mod kvp;
pub mod netvsc;
pub mod rndis;
pub mod scsi;
pub mod storvsc;
