//! Directed tests of the software CPU's privileged behaviour, by name. The user-mode instructions are compared with the host's
//! processor in `tests/differential`; what is here the host cannot be asked.
//!
//! Everything is tested twice: interpreted, and with every block of 64-bit code translated before its first execution.
#![allow(clippy::duplicate_mod)] // See `suite`.
#![allow(clippy::unwrap_used)] // A test's helpers are not tests in clippy's eyes.
#![allow(clippy::precedence, clippy::unusual_byte_groupings)] // Masks and shifts as manuals write them.

/// The whole suite for processors that translate a block after so many executions.
macro_rules! suite {
    ($name:ident, $translate_after:expr) => {
        #[path = "."]
        mod $name {
            const TRANSLATE_AFTER: u32 = $translate_after;

            mod blocks;
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
        }
    };
}

suite!(interpreted, u32::MAX);
suite!(translated, 0);
