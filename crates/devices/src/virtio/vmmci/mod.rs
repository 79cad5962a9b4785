//! vmmci(4), OpenBSD's control device: by it the host asks a guest to shut down, to reboot or to read its real-time clock again, and shows
//! it the host's time of day.
//!
//! A virtio 0.9 (legacy) PCI function without queues: all of it is a command register, a time and a configuration interrupt, which is INTx.
//! [`device`] has the registers, [`conversation`] what is said through the command register and how long each side has to answer.
//!
//! ```text
//!   vmd --request()--> conversation --interrupt--> guest reads the command, writes it back
//!        <--MachineEvents-- overdue: nobody answered, or the guest did not get down
//! ```
//!
//! Specification: OpenBSD `usr.sbin/vmd/virtio.c` (`vmmci_ctl`, `vmmci_ack`, `vmmci_io`) and `sys/dev/pv/vmmci.c`; virtio 1.2 section 4.1.4.10
//! (legacy interface).

pub mod conversation;
pub mod device;
#[cfg(test)]
mod tests;

pub use conversation::{Conversation, Request};
pub use device::{RequestError, Vmmci};
