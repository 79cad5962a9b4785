//! The store: a tree of keys and values that a host and its guests share.
//!
//! XenStore's data model and protocol (xen-project/xen `docs/misc/xenstore.txt`), as the one store of this project: VMware's guestinfo, Hyper-V's
//! KVP and fw_cfg are views on the same tree. Nothing here does I/O, keeps time or starts threads; bytes and calls go in, bytes and events come out.
//! The one exception is [`client`], the other end of the wire.
//!
//! ```text
//!   wire clients ── bytes ──> Server ─┐                      ┌─ Tree        nodes, snapshots by path copying (tree, dir, bytes)
//!                                     ├─ requests ─> Store ──┼─ Transaction what was seen and done (transaction, edit)
//!   this process ── calls ──> Session ┘                      ├─ Watches     who wants to know (watch)
//!                                                            └─ Domains     who there is, quotas (domain, quota)
//! ```
//!
//! `docs/xenstore.md` has the rules on one page.
#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::indexing_slicing))]

mod bytes;
pub mod client;
mod dir;
mod domain;
mod domid;
mod edit;
mod error;
mod journal;
mod path;
mod perms;
mod quota;
pub mod ring;
mod server;
mod shared;
mod state;
mod store;
mod transaction;
mod tree;
mod watch;
mod wire;

pub use bytes::Value;
pub use domain::{FEATURES, Ring};
pub use domid::DomId;
pub use edit::{Names, Op};
pub use error::Error;
pub use journal::Record;
pub use path::{Path, Special, Watched};
pub use perms::{Access, Caller, Entry, Perms};
pub use quota::{Quota, Quotas, Usage};
pub use server::{Answer, Host, NoHost, Server};
pub use shared::{Session, SharedStore, View, Watching};
pub use state::{Blob, ConnectionState, NodeState, State, StateError};
pub use store::{ClientId, Config, Store, TxId};
pub use watch::{Event, Watch};
