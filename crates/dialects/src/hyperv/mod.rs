//! Host half of the Hyper-V dialect. Specification: the Hypervisor Top-Level Functional Specification (TLFS) 6.0b.

pub mod connections;
pub mod netvsc;
pub mod storvsc;
