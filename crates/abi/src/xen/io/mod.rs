//! Split drivers: what a frontend in the guest and a backend beside it share. `io/`.

pub mod console;
