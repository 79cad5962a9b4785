//! The monitor: what every virtual machine here is made of, whatever executes its processors.
//!
//! [`backend`] is the seam between a machine and the thing that runs its processors (Linux KVM, our own software CPU).
//! [`bus`] is the seam in the other direction: the five doors by which a processor reaches devices and dialects.
//! [`monitor`] has the operations of vmm(4) as methods, [`ioctl`] as command words.
//! [`memory`], [`registers`], [`cpuid`] and [`time`] are the plain data both sides share.
//!
//! ```text
//!   Vcpu::run --access--> Bus --> devices, dialects
//!      ^                                |
//!      +---- BackendVm::signal_msi <----+
//! ```

pub mod attach;
pub mod backend;
pub mod bus;
pub mod cpuid;
pub mod exit;
mod fetch;
pub mod ioctl;
pub mod memory;
pub mod monitor;
pub mod paging;
pub mod registers;
mod resident;
pub mod snapshot;
pub mod time;

pub use backend::{Backend, BackendError, BackendVm, Entry, EoiFlag, Frequencies, Inject, Vcpu, VcpuStats, VmConfig};
pub use bus::{Bus, Hypercall, MsrFault, PortCall, VcpuId};
pub use cpuid::{CpuidEntry, CpuidTable};
pub use exit::Exit;
pub use ioctl::UserMemory;
pub use memory::{GuestMemory, Protection};
pub use monitor::{Vmm, VmmError};
pub use paging::Paging;
pub use registers::{DescriptorTable, RegisterMask, Registers, Segment};
