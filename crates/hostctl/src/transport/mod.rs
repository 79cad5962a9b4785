//! The ways to the stores, each in a file of its own, all with the same face: pvbus' [`Store`], and a way to wait for changes.
//!
//! ```text
//!   vmware.rs   guestinfo, by the backdoor: one instruction that traps to VMware
//!   xen.rs      XenStore, by the kernel's /dev/xen/xenbus
//!   hyperv.rs   key/value pairs, by the pool files of hv_kvp_daemon
//!   fw_cfg.rs   QEMU's firmware configuration files, by sysfs
//!   device.rs   whatever a real /dev/pvbusN answers
//! ```

pub mod device;
pub mod fw_cfg;
pub mod hyperv;
pub mod vmware;
pub mod xen;

use alloc::vec::Vec;
use core::time::Duration;

use pvbus::{Nanos, Store, StoreError};

use crate::sys::time;

/// Time between two looks at a store that does not tell of changes.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// A store as this program uses it.
pub trait Opened: Store {
    /// What keys and values the store takes, to be told with a refusal. Half a sentence.
    fn rules(&self) -> &'static str;

    /// Why keys may be missing that the host has, to be told with a key that is not there. Half a sentence, or nothing.
    fn absence(&self) -> &'static str {
        ""
    }

    /// Asks the host to tell of changes at or below `key`, where hosts do that.
    ///
    /// # Errors
    /// [`StoreError::Unsupported`] for stores that never change.
    fn subscribe(&mut self, key: &[u8]) -> Result<(), StoreError> {
        let _ = key;
        Ok(())
    }

    /// Waits for changes at or below the watched keys. The default lets some time pass.
    ///
    /// # Errors
    /// [`StoreError`].
    fn wait(&mut self, deadline: Option<Nanos>) -> Result<Event, StoreError> {
        let until = time::after(LOOK_AGAIN);
        let over = deadline.is_some_and(|deadline| deadline < until);
        time::sleep_until(deadline.map_or(until, |deadline| deadline.min(until)));
        Ok(if over { Event::TimeOver } else { Event::Perhaps })
    }
}

/// What waiting brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// This path changed.
    Changed(Vec<u8>),
    /// Any watched key may have changed.
    Perhaps,
    /// The deadline came.
    TimeOver,
}
