//! The Hyper-V dialect.

pub mod netvsc;
pub mod storvsc;
