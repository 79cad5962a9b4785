//! The virtio entropy device (virtio 1.2 section 5.4): fills buffers with random bytes.

mod device;
#[cfg(test)]
mod tests;

pub use device::{Entropy, HostEntropy, Rng};
