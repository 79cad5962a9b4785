//! Assembles and runs machines.

pub mod boot;
