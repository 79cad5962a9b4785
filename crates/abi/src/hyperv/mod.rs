//! Words of the Hyper-V dialect. Sources: Linux `include/uapi/linux/hyperv.h` and `tools/hv`, cited where they are used.

pub mod ic;
pub mod kvp;
pub mod ring;
pub mod vmbus;
