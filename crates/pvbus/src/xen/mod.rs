//! Xen: the domain's own side, for guests of HVM and PVH kind in 64-bit mode.
//!
//! ```text
//!   xen0.rs            the device of the tree: events, control/shutdown, which devices there are
//!   xenbus.rs          a device's directories in XenStore
//!   negotiation.rs     how frontend and backend find together, by their states
//!   block/             xbf, a disk
//!   net/               xnf, a network card
//!   xenstore/          the store: conversation, transactions, watches, the guest's ring
//!   ring.rs            rings of requests and responses in granted pages
//!   event_channel.rs   shared info, event channels
//!   grant_table.rs     grants
//!   hypercall.rs       VMCALL or VMMCALL by crate::Hal
//! ```
//!
//! OpenBSD `sys/dev/pv/xen.c`, `xenstore.c`, `xbf.c` are the models, xen-project/xen `xen/include/public` the specification; the words are in [`abi::xen`].
//! Unlike OpenBSD the guest says what it obeys (`control/feature-poweroff`, `-reboot`), and needs neither a hypercall page nor an interrupt.

mod block;
mod event_channel;
mod grant_table;
mod hypercall;
pub mod negotiation;
mod net;
mod ring;
mod xen0;
mod xenbus;
pub mod xenstore;

use alloc::sync::Arc;
use alloc::vec::Vec;

use spin::Mutex;

use event_channel::Platform;
use grant_table::{GrantTable, Granted};
pub use hypercall::XenError;
pub(crate) use xen0::Xen0;
use xenstore::{Client, RingPeer, Transaction};

use crate::block::BlockDevice;
use crate::detect::Kind;
use crate::hal::Cpuid;
use crate::net::NetDevice;
use crate::store::{Store, StoreError, Watch};

/// Whether the hypercall leaf offers what xen(4) needs: exactly one hypercall page, and a register to ask for it (OpenBSD
/// `sys/dev/pv/xen.c`, `xen_init_hypercall`).
#[must_use]
pub const fn has_hypercalls(leaf: &Cpuid) -> bool {
    leaf.eax == 1 && leaf.ebx != 0
}

/// What the devices of the domain share.
struct Domain<'h> {
    platform: Arc<Platform<'h>>,
    grants: Mutex<GrantTable<'h>>,
    store: Mutex<Client<RingPeer<'h>>>,
    /// What is connected now.
    disks: Mutex<Vec<Arc<dyn BlockDevice + 'h>>>,
    cards: Mutex<Vec<Arc<dyn NetDevice + 'h>>>,
}

impl Domain<'_> {
    /// `pages` pages that `domain` may read and write.
    fn share(&self, domain: u16, pages: usize) -> Result<Granted, XenError> {
        self.grants.lock().share(domain, pages)
    }

    /// Takes memory back, at once or when nobody uses it any more.
    fn take_back(&self, all: impl Iterator<Item = Granted>) {
        let mut grants = self.grants.lock();
        all.for_each(|granted| grants.take_back(granted));
    }
}

/// The domain, for a kernel that wants more than the tree's events and stores. Cheap to clone.
#[derive(Clone)]
pub struct Xen<'h>(Arc<Domain<'h>>);

impl<'h> Xen<'h> {
    /// The domain's XenStore.
    #[must_use]
    pub fn store(&self) -> XenStore<'h> {
        XenStore(Arc::clone(&self.0))
    }
}

/// XenStore by the guest's ring.
pub struct XenStore<'h>(Arc<Domain<'h>>);

impl<'h> XenStore<'h> {
    /// See [`Client::transaction`].
    ///
    /// # Errors
    /// As there.
    pub fn transaction<T>(
        &mut self,
        work: impl FnMut(&mut Transaction<'_, RingPeer<'h>>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.0.store.lock().transaction(work)
    }
}

impl Store for XenStore<'_> {
    fn kind(&self) -> Kind {
        Kind::Xen
    }

    fn read(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        self.0.store.lock().read(key)
    }

    fn read_or_list(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        self.0.store.lock().read_or_list(key)
    }

    fn write(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.0.store.lock().write(key, value)
    }

    fn list(&mut self, key: &[u8]) -> Result<Vec<Vec<u8>>, StoreError> {
        self.0.store.lock().list(key)
    }

    fn remove(&mut self, key: &[u8]) -> Result<(), StoreError> {
        self.0.store.lock().remove(key)
    }

    fn watch(&mut self, key: &[u8]) -> Result<Watch, StoreError> {
        Store::watch(&mut *self.0.store.lock(), key)
    }

    fn changed(&mut self, watch: &mut Watch) -> Result<Option<Option<Vec<u8>>>, StoreError> {
        self.0.store.lock().changed(watch)
    }

    fn unwatch(&mut self, watch: Watch) -> Result<(), StoreError> {
        Store::unwatch(&mut *self.0.store.lock(), watch)
    }
}
