//! The virtio console (virtio 1.2 section 5.3) with one port: what Linux calls `hvc0`.

mod device;
#[cfg(test)]
mod tests;

pub use device::{Console, ConsoleInput};
