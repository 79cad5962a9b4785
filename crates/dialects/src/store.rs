//! The machine's information store, as dialects and the host's tools see it.
//!
//! One tree of keys with values of any bytes, after XenStore's: paths are `/`-separated, relative ones belong to this machine
//! (`/local/domain/<id>/...`). A node may have both a value and children. Each dialect shows a part of the tree in its own words: VMware's
//! `guestinfo.a.b` is `vm-data/a/b`. What any client writes, all others see.
//!
//! ```text
//!   vmctl kv, --kv  --->            <--- vmware (guestinfo.*)
//!                         Store
//!   --kv-out        <---            <--- xen (XenStore ring), beside this trait
//! ```
//!
//! The trait keeps dialects apart from who implements it: machines have the XenStore tree, tests of dialects a map.

#[cfg(any(test, feature = "testing"))]
pub mod testing;

use std::sync::Arc;

/// Most bytes of a value. Clients with smaller messages have lower limits of their own.
pub const MAX_VALUE: usize = 1 << 20;
/// Where keys for guests are by XenServer's convention.
pub const VM_DATA: &str = "vm-data";

/// Why the store refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// ENOENT.
    #[error("there is no key {0}")]
    NotFound(String),
    /// EINVAL: characters, empty parts, or a length that no path can have.
    #[error("'{0}' is not a path: letters, digits and -_@ in parts between single slashes")]
    BadPath(String),
    /// E2BIG: the value is longer than [`MAX_VALUE`].
    #[error("a value of {0} bytes: the most is {MAX_VALUE}")]
    TooLong(usize),
    /// ENOSPC: the machine has used up its share.
    #[error("the machine's share of the store is full: {0}")]
    Full(String),
    /// EACCES: the guest may not do that.
    #[error("no permission for {0}")]
    Denied(String),
}

/// Who is told of changes: called with the path that changed, after the change. Must not block and not call the store.
pub type Observer = Arc<dyn Fn(&str) + Send + Sync>;

/// Number of a watch.
pub type WatchId = u64;

/// Who asks: the host may do everything, the guest only what its share and permissions allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// A tool of the host.
    Host,
    /// The guest, through some dialect.
    Guest,
}

/// The store of one machine.
pub trait Store: Send + Sync {
    /// The value at `path`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::BadPath`], [`StoreError::Denied`].
    fn read(&self, client: Client, path: &str) -> Result<Vec<u8>, StoreError>;

    /// Sets the value at `path`; parents that are missing appear with empty values.
    ///
    /// # Errors
    /// [`StoreError::BadPath`], [`StoreError::TooLong`], [`StoreError::Full`], [`StoreError::Denied`].
    fn write(&self, client: Client, path: &str, value: &[u8]) -> Result<(), StoreError>;

    /// Names of the children of `path`, sorted. The empty path is the machine's root.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::BadPath`], [`StoreError::Denied`].
    fn list(&self, client: Client, path: &str) -> Result<Vec<String>, StoreError>;

    /// Removes `path` and everything below it.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::BadPath`], [`StoreError::Denied`].
    fn remove(&self, client: Client, path: &str) -> Result<(), StoreError>;

    /// Calls `observer` for each change at or below `path`, from now on.
    ///
    /// # Errors
    /// [`StoreError::BadPath`].
    fn watch(&self, path: &str, observer: Observer) -> Result<WatchId, StoreError>;

    /// Ends a watch. A number that is not one is ignored.
    fn unwatch(&self, watch: WatchId);
}
