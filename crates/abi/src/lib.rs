//! The words both sides agree on: constants and wire structures of every interface, no logic.
#![cfg_attr(not(test), no_std)]

pub mod apic;
pub mod boot;
pub mod fw_cfg;
pub mod hyperv;
pub mod hypervisor;
pub mod kvm;
pub mod multiboot;
pub mod openbsd;
pub mod pci;
pub mod pvbus;
pub mod virtio;
pub mod vmm;
pub mod vmware;
pub mod xen;
