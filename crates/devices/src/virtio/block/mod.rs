//! The virtio block device (virtio 1.2 section 5.2): one queue, one worker thread.
//!
//! `device` is the device, `request` reads requests off the ring and does them on a [`crate::block::Disk`].

mod device;
mod request;
#[cfg(test)]
mod tests;

pub use device::Block;
