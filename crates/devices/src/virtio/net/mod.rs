//! The virtio network device (virtio 1.2 section 5.1): one pair of queues and a control queue, one worker thread.
//!
//! `device` is the device and its thread, `packet` moves packets between rings and a [`crate::net::NetBackend`], `control` answers
//! the control queue.

mod control;
mod device;
mod packet;
#[cfg(test)]
mod tests;

pub use device::Net;
