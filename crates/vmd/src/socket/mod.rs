//! The control socket of a running machine, `vmctl run --control SOCKET`, for `vmctl kv`, `stop`, `status` and `sync`.
//!
//! ```text
//!   vmctl kv, stop ... ── Connection ══ Unix socket ══ Server (one thread) ──> Store, Control
//!                                                        ^
//!                        observers of watches ── Mailbox +      never wait, never call back
//! ```
//!
//! [`protocol`] has the messages, one line of JSON each. [`server`] is a poll loop over all clients: what a client costs is bounded, and one
//! that does not read what it watches is dropped, so that neither it nor a hostile one holds up the machine. [`xenstored::address`] makes, finds
//! and removes the socket; [`connection`] is the client's end. [`crate::store::server`] offers the same keys to XenStore's own clients.

mod client;
pub mod connection;
mod mailbox;
pub mod protocol;
pub mod server;
#[cfg(test)]
mod tests;

pub use connection::Connection;
pub use server::Server;
