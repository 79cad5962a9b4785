//! The parts of the kernel that touch no hardware: bytes, keys and addresses in, answers out. They are tested on the host.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod acpi;
pub mod calendar;
pub mod http;
pub mod line;
pub mod pages;
pub mod words;
