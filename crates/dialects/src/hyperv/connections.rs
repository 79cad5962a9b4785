//! What VMBus and the platform know of each other.

use abi::hyperv::hypercall::Status;

/// The synthetic interrupt controllers of a machine, as VMBus reaches them.
pub trait Synic: Send + Sync {
    /// Queues a message for a synthetic interrupt source of a processor; it is delivered when the slot is free. False when that processor has no
    /// controller turned on or too many messages wait.
    fn post_message(&self, vp: u32, sint: u8, kind: u32, payload: &[u8]) -> bool;

    /// Sets an event flag and interrupts when it was clear.
    fn signal_event(&self, vp: u32, sint: u8, flag: u16) -> bool;
}

/// What answers at connections: VMBus.
pub trait Connections: Send + Sync {
    /// The guest sends a message.
    fn post_message(&self, connection: u32, kind: u32, payload: &[u8]) -> Status;

    /// The guest sets an event flag.
    fn signal_event(&self, connection: u32, flag: u16) -> Status;

    /// The machine was reset.
    fn reset(&self);
}
