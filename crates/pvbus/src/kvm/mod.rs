//! KVM: its clock, which OpenBSD's vmm has too.

mod pvclock;

pub use pvclock::{ClockError, Pvclock, WallTime};
pub(crate) use pvclock::PvclockDevice;
