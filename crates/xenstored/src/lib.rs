//! The store's event loop: XenStore for ordinary clients and for guests, as `xenstored` and inside a running machine.
//!
//! ```text
//!   xenstore-read, toolstacks ══ socket ══╗
//!   guests ════════════ page and bell ════╩═ Service (one thread, epoll) ── bytes ──> xenstore::Server
//!                                               ^                                          ^
//!   this process: monitor, dialects ────────────┴─── wakes ─── SharedStore ─── calls ──────┘
//! ```
//!
//! Every client of the socket is the host: the socket's mode is the only guard, as with Xen's own servers. What a client may do and how much waits
//! for it is decided by [`xenstore::Server`]; here are only the sockets and the rings' bells.

pub mod address;
pub mod keeper;
pub mod keys;
pub mod ring;
mod serve;

pub use address::Listener;
pub use serve::{Pause, Service};
