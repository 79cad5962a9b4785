//! OpenBSD vmm(4): its control device. Its clock is KVM's ([`crate::kvm`]).

mod vmmci;

pub use vmmci::{Vmmci, VmmciError, find};
