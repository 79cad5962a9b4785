//! Information stores: keys with values, shared by the host and this machine.
//!
//! Each hypervisor's store is a [`Store`]. pvbus(4)'s ioctls are [`crate::ioctl`] on top of it; whoever can call Rust has here what the
//! ioctls lack: values of any bytes, list, remove, watch, the length needed, and an error that says what was wrong. Not every store can do
//! everything: the rest is [`StoreError::Unsupported`].

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::detect::Kind;
use crate::errno::Errno;

/// One hypervisor's information store.
pub trait Store: Send {
    /// Whose store it is.
    fn kind(&self) -> Kind;

    /// The value of `key`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when there is none, and the others.
    fn read(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError>;

    /// What pvbus(4) reads at `key`: the value; where OpenBSD's driver lists a directory by reading it, its names, each on a line.
    ///
    /// # Errors
    /// As [`Store::read`].
    fn read_or_list(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        self.read(key)
    }

    /// Makes `value` the value of `key`.
    ///
    /// # Errors
    /// [`StoreError`].
    fn write(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError>;

    /// Names of the keys directly below `key`.
    ///
    /// # Errors
    /// [`StoreError`]; [`StoreError::Unsupported`] where keys have no order.
    fn list(&mut self, key: &[u8]) -> Result<Vec<Vec<u8>>, StoreError> {
        let _ = key;
        Err(StoreError::Unsupported)
    }

    /// Removes `key` and what is below it.
    ///
    /// # Errors
    /// [`StoreError`].
    fn remove(&mut self, key: &[u8]) -> Result<(), StoreError> {
        let _ = key;
        Err(StoreError::Unsupported)
    }

    /// Bytes that the value of `key` has.
    ///
    /// # Errors
    /// As [`Store::read`].
    fn length(&mut self, key: &[u8]) -> Result<usize, StoreError> {
        Ok(self.read(key)?.len())
    }

    /// Begins to watch `key`; [`Store::changed`] then tells of changes.
    ///
    /// # Errors
    /// As [`Store::read`], without [`StoreError::NotFound`]: a key that is not there can be watched.
    fn watch(&mut self, key: &[u8]) -> Result<Watch, StoreError> {
        Ok(Watch { key: key.to_vec(), seen: found(self.read(key))?, number: 0 })
    }

    /// The value, if it is another one than when last asked: `Some(None)` when the key is gone. Stores that cannot tell are read, so a value
    /// that changed and changed back in between goes unnoticed.
    ///
    /// # Errors
    /// As [`Store::watch`].
    fn changed(&mut self, watch: &mut Watch) -> Result<Option<Option<Vec<u8>>>, StoreError> {
        let now = found(self.read(&watch.key))?;
        Ok(watch.see(now))
    }

    /// Ends a watch.
    ///
    /// # Errors
    /// As [`Store::watch`].
    fn unwatch(&mut self, watch: Watch) -> Result<(), StoreError> {
        let _ = watch;
        Ok(())
    }
}

/// A key that is being watched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watch {
    pub(crate) key: Vec<u8>,
    pub(crate) seen: Option<Vec<u8>>,
    /// The store's own number of it, where the host tells of changes.
    pub(crate) number: u32,
}

impl Watch {
    /// Takes note of the value; gives it if it is another one than before.
    #[allow(clippy::option_option, reason = "as Store::changed")]
    pub(crate) fn see(&mut self, now: Option<Vec<u8>>) -> Option<Option<Vec<u8>>> {
        if now == self.seen {
            return None;
        }
        self.seen.clone_from(&now);
        Some(now)
    }

    /// The key.
    #[must_use]
    pub fn key(&self) -> &[u8] {
        &self.key
    }
}

/// Why a store refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreError {
    /// There is no such key.
    NotFound,
    /// The key is not one that this store can have.
    BadKey,
    /// There is such a key already, and this store does not change it.
    Exists,
    /// The host does not allow it.
    Denied,
    /// Key and value together are longer than the store's messages.
    TooLong,
    /// The store has no such operation.
    Unsupported,
    /// The host has no room left.
    Full,
    /// The host refused, with this reason.
    Refused(String),
    /// The host did not answer in time.
    Timeout,
    /// Out of memory.
    NoMemory,
    /// The way to the host failed.
    Transport(&'static str),
}

impl StoreError {
    /// The error number that pvbus(4) returns for it.
    #[must_use]
    pub const fn errno(&self) -> Errno {
        match self {
            StoreError::NotFound => Errno::ENOENT,
            StoreError::BadKey | StoreError::Refused(_) => Errno::EINVAL,
            StoreError::Exists => Errno::EEXIST,
            StoreError::Denied => Errno::EACCES,
            StoreError::TooLong => Errno::EMSGSIZE,
            StoreError::Unsupported => Errno::EOPNOTSUPP,
            StoreError::Full => Errno::ENOSPC,
            StoreError::Timeout => Errno::ETIMEDOUT,
            StoreError::NoMemory => Errno::ENOMEM,
            StoreError::Transport(_) => Errno::EIO,
        }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::NotFound => f.write_str("there is no such key"),
            StoreError::BadKey => f.write_str("not a key of this store"),
            StoreError::Exists => f.write_str("the key exists and cannot be changed"),
            StoreError::Denied => f.write_str("the host does not allow it"),
            StoreError::TooLong => f.write_str("key and value are longer than the store's messages"),
            StoreError::Unsupported => f.write_str("the store has no such operation"),
            StoreError::Full => f.write_str("the host has no room left"),
            StoreError::Refused(reason) => write!(f, "the host refused: {reason}"),
            StoreError::Timeout => f.write_str("the host did not answer in time"),
            StoreError::NoMemory => f.write_str("out of memory"),
            StoreError::Transport(what) => write!(f, "the way to the host failed: {what}"),
        }
    }
}

impl core::error::Error for StoreError {}

/// A key that is not there is no error for a watch.
pub(crate) fn found(value: Result<Vec<u8>, StoreError>) -> Result<Option<Vec<u8>>, StoreError> {
    match value {
        Ok(value) => Ok(Some(value)),
        Err(StoreError::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}
