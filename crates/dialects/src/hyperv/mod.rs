//! The Hyper-V dialect.

pub mod storvsc;
