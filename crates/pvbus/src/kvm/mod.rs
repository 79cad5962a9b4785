//! KVM: its clock, which OpenBSD's vmm has too.

mod pvclock;
#[cfg(test)]
mod tests;

pub(crate) use pvclock::PvclockDevice;
pub use pvclock::{ClockError, Pvclock, WallTime};
