//! Why a request failed, and which of XenStore's error names says so to a client.
//!
//! The names are C xenstored's: Linux knows only those of `io/xs_wire.h` and turns all others into EINVAL, so quotas are ENOSPC and never EQUOTA.

use abi::xen::xenstore::error as name;

use crate::quota::Quota;

/// Why a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A path with a character that is not allowed, a doubled or trailing slash, nothing in it, or too much.
    #[error("malformed or overlong path; allowed are A-Z a-z 0-9 - / _ @")]
    BadPath,
    /// A payload that is not what the operation takes.
    #[error("malformed request")]
    BadRequest,
    /// Something that would destroy the store: removing the root, changing its permissions, releasing domain 0.
    #[error("refused: the root and domain 0 stay as they are")]
    Refused,
    /// The node does not exist.
    #[error("no such node")]
    NoNode,
    /// The client has no such watch.
    #[error("no watch with this path and token")]
    NoWatch,
    /// The client has no such transaction.
    #[error("no such transaction")]
    NoTransaction,
    /// The domain is not introduced or does not exist.
    #[error("no such domain")]
    NoDomain,
    /// The client has gone, with its domain or by itself.
    #[error("the client's domain was released")]
    NoClient,
    /// The node's permissions, or those of its nearest existing ancestor, forbid it.
    #[error("permission denied")]
    Denied,
    /// For privileged clients only.
    #[error("only privileged clients may do that")]
    NotPrivileged,
    /// A domain wanted to give a node away.
    #[error("only privileged clients may change a node's owner")]
    OwnerFixed,
    /// The client has a watch with the same path and token.
    #[error("this path and token are being watched already")]
    WatchExists,
    /// A quota of a domain is used up.
    #[error("quota `{}` is used up", .0.name())]
    Quota(Quota),
    /// The answer, or a watch's event, would not fit into a message; or a value is longer than this store takes.
    #[error("too long")]
    TooLong,
    /// The transaction read something that has changed since.
    #[error("the transaction conflicts with another change; begin again")]
    Conflict,
    /// A quota ran out in the transaction, so that it cannot be committed as it was meant.
    #[error("a quota ran out inside the transaction")]
    TransactionFailed,
    /// TRANSACTION_START inside a transaction.
    #[error("transactions do not nest")]
    Nested,
    /// SET_FEATURE of a domain that has seen its features.
    #[error("the domain is introduced already")]
    Introduced,
    /// It was done, but the file that outlives the server could not be written.
    #[error("done, but it could not be written to disk and may be lost when the server ends")]
    NotKept,
    /// The file that outlives the server cannot be written, so what belongs there is not changed.
    #[error("this key cannot be changed while the server's file cannot be written")]
    ReadOnly,
    /// An operation that is not XenStore's.
    #[error("no such operation")]
    NoOperation,
}

impl Error {
    /// The name that goes to the client (`io/xs_wire.h`, `xsd_errors`).
    pub fn wire_name(self) -> &'static str {
        match self {
            Error::BadPath | Error::BadRequest | Error::Refused => name::EINVAL,
            Error::NoNode | Error::NoWatch | Error::NoTransaction | Error::NoDomain | Error::NoClient => name::ENOENT,
            Error::Denied | Error::NotPrivileged => name::EACCES,
            Error::OwnerFixed => name::EPERM,
            Error::WatchExists => name::EEXIST,
            Error::Quota(_) => name::ENOSPC,
            Error::TooLong => name::E2BIG,
            Error::Conflict => name::EAGAIN,
            Error::TransactionFailed => name::ENOMEM,
            Error::Nested | Error::Introduced => name::EBUSY,
            Error::NotKept => name::EIO,
            Error::ReadOnly => name::EROFS,
            Error::NoOperation => name::ENOSYS,
        }
    }
}
