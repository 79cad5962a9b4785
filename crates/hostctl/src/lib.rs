//! Reads and writes the keys that a virtual machine shares with its host, from inside a Linux guest.
//!
//! OpenBSD's hostctl(8) for every hypervisor with a store, without its kernel: the host is reached from here. `serve` makes the devices of
//! pvbus(4) for programs that want those.
//!
//! ```text
//!   args.rs       command line            commands.rs   what each command does
//!   select.rs     which store is meant    output.rs     how results are printed     vis.rs, json.rs   in which form
//!   transport/    the ways to the stores  detection.rs  every interface there is
//!   machine/      CPUID and the instructions that trap to the host, for crates/pvbus
//!   serve/        /dev/pvbusN by CUSE     sys/          Linux' system calls: there is no C library, and why
//! ```
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod args;
pub mod commands;
pub mod detection;
pub mod error;
pub mod json;
pub mod machine;
pub mod output;
pub mod select;
pub mod serve;
pub mod sys;
pub mod transport;
pub mod vis;
