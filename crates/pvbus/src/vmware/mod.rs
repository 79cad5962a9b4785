//! VMware: the backdoor, GuestRPC over it, and vmt, the tools in the kernel.
//!
//! ```text
//!   vmt.rs         device vmt0: power requests, clock, what the host wants to know of the guest (nic.rs), backups (quiesce.rs)
//!   guestinfo.rs   the information store                       tclo.rs     requests by the host
//!   rpci.rs        requests by the guest: text in, text out
//!   channel.rs     messages of any length over the backdoor, low and high bandwidth
//!   backdoor.rs    one instruction with all registers: IN, OUT, VMCALL or VMMCALL
//! ```
//!
//! The model is OpenBSD's vmt(4), `sys/dev/pv/vmt.c`; the protocol open-vm-tools `lib/message/message.c` and `lib/rpcOut/rpcout.c`.

mod backdoor;
mod channel;
mod guestinfo;
mod nic;
mod quiesce;
mod rpci;
mod tclo;
#[cfg(test)]
mod tests;
mod vmt;
#[cfg(test)]
mod vmt_tests;

pub use backdoor::{Answer, Backdoor, BackdoorError, HostTime};
pub use channel::{Channel, ChannelError, MAX_REPLY};
pub use guestinfo::Guestinfo;
pub use rpci::{Call, RpcError, Rpci};
pub use vmt::{AttachError, Vmt};
