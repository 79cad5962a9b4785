//! The words both sides agree on: constants and wire structures of every interface, no logic.
#![cfg_attr(not(test), no_std)]

pub mod apic;
pub mod boot;
pub mod fw_cfg;
pub mod kvm;
pub mod multiboot;
pub mod pci;
pub mod virtio;
pub mod vmm;
pub mod xen;
