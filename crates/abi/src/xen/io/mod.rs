//! Split drivers: what a frontend in the guest and a backend beside it share. `io/`.

pub mod blkif;
pub mod console;
pub mod netif;
pub mod ring;
pub mod xenbus;
