//! Xen's words: XenStore, and the interface of HVM and PVH guests in 64-bit mode.
//!
//! Sources are the public headers of xen-project/xen, cited by their path below `xen/include/public`. Numbers are little-endian, structures have the
//! layout of the x86-64 ABI.

pub mod cpuid;
pub mod event_channel;
pub mod grant_table;
pub mod hvm;
pub mod hypercall;
pub mod io;
pub mod shared_info;
pub mod xenstore;
