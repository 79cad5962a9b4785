//! Volume snapshots: brings the guest's file systems to rest, so that its disks can be copied as they are, and lets them go on.

use std::sync::{Arc, Mutex};

use abi::hyperv::ic::{Version, Vss as Body, kind, status, version, vss};
use abi::hyperv::vmbus::guid;
use vmm::time::Timers;
use zerocopy::IntoBytes;

use super::{Component, Identity, Next, Peer, Service, lock};

/// How the guest's file systems are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystems {
    /// It has no driver for this.
    NoDriver,
    /// They work.
    Working,
    /// The guest is at it.
    Freezing,
    /// They are at rest: what is on the disks is all there is.
    Frozen,
    /// The guest is at it.
    Thawing,
    /// The guest could not bring them to rest, for this status. So it is, too, when its driver has no daemon (`hv_vss_daemon`).
    CannotFreeze(u32),
}

/// Why the guest was not asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VssError {
    /// `hv_utils` is not loaded.
    #[error("the guest has no driver for Hyper-V's snapshot component")]
    NoDriver,
    /// One at a time.
    #[error("the guest has not answered the request before this one")]
    Busy,
}

/// The snapshot component of a guest.
#[derive(Clone)]
pub struct Vss {
    state: Arc<Mutex<State>>,
    bell: Peer,
}

struct State {
    file_systems: FileSystems,
    /// [`Body::operation`] that is to be asked.
    wanted: Option<u8>,
}

impl Vss {
    /// A component whose thread wakes by `bell`.
    pub fn new(bell: Peer) -> Vss {
        let state = State { file_systems: FileSystems::NoDriver, wanted: None };
        Vss { state: Arc::new(Mutex::new(state)), bell }
    }

    /// The device.
    pub fn device(&self, timers: &Arc<Timers>) -> Component<Vss> {
        Component::new(self.clone(), timers, Arc::clone(&self.bell))
    }

    /// How the file systems are.
    pub fn file_systems(&self) -> FileSystems {
        lock(&self.state).file_systems
    }

    /// Asks the guest to bring its file systems to rest. How it goes is in [`Vss::file_systems`].
    ///
    /// # Errors
    /// [`VssError`].
    pub fn freeze(&self) -> Result<(), VssError> {
        self.request(vss::FREEZE, FileSystems::Freezing)
    }

    /// Asks the guest to let them go on.
    ///
    /// # Errors
    /// [`VssError`].
    pub fn thaw(&self) -> Result<(), VssError> {
        self.request(vss::THAW, FileSystems::Thawing)
    }

    fn request(&self, operation: u8, meanwhile: FileSystems) -> Result<(), VssError> {
        {
            let mut state = lock(&self.state);
            match state.file_systems {
                FileSystems::NoDriver => return Err(VssError::NoDriver),
                FileSystems::Freezing | FileSystems::Thawing => return Err(VssError::Busy),
                _ => {}
            }
            state.file_systems = meanwhile;
            state.wanted = Some(operation);
        }
        (self.bell)();
        Ok(())
    }
}

impl Service for Vss {
    const IDENTITY: Identity = Identity { class: guid::VSS, instance: guid::VSS_INSTANCE, kind: kind::VSS, versions: &version::VSS };

    fn ready(&mut self, _version: Version, _now: u64) {
        lock(&self.state).file_systems = FileSystems::Working;
    }

    fn next(&mut self, _now: u64) -> Next {
        match lock(&self.state).wanted.take() {
            Some(operation) => Next::Ask(Body { operation, ..Body::default() }.as_bytes().to_vec()),
            None => Next::Wait(None),
        }
    }

    fn answered(&mut self, status: u32, _body: &[u8], _now: u64) {
        let mut state = lock(&self.state);
        state.file_systems = match (state.file_systems, status) {
            (FileSystems::Freezing, status::OK) => FileSystems::Frozen,
            (FileSystems::Freezing, status) => FileSystems::CannotFreeze(status),
            // A guest that cannot thaw has nothing frozen (`drivers/hv/hv_snapshot.c` of Linux: its daemon is gone).
            _ => FileSystems::Working,
        };
    }

    fn gone(&mut self) {
        *lock(&self.state) = State { file_systems: FileSystems::NoDriver, wanted: None };
    }
}
