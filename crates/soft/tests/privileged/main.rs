//! Directed tests of the software CPU's privileged behaviour, by name. The user-mode instructions are compared with the host's
//! processor in `tests/differential`; what is here the host cannot be asked.
#![allow(clippy::unwrap_used)] // A test's helpers are not tests in clippy's eyes.
#![allow(clippy::precedence, clippy::unusual_byte_groupings)] // Masks and shifts as manuals write them.

mod code;
mod debug;
mod events;
mod garbage;
mod legacy;
mod machine;
mod modes;
mod paging;
mod register_ports;
mod registers;
mod system;
