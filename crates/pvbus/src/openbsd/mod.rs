//! OpenBSD vmm(4): its control device. Its clock is KVM's ([`crate::kvm`]).

#[cfg(test)]
mod tests;
mod vmmci;

pub use vmmci::{Vmmci, VmmciError, find};
