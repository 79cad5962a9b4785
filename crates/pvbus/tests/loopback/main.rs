//! Both halves of each dialect back to back, in one process: our drivers against our hosts, through the doors that a machine has.
#![allow(clippy::unwrap_used)]

mod clock;
mod hyperv;
mod machine;
mod together;
mod vmmci;
mod vmware;
mod xen;
