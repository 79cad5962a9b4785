//! Shutdown: asks the guest to power off or to reboot by itself.

use std::sync::{Arc, Mutex};

use abi::hyperv::ic::{SHUTDOWN_TEXT, Shutdown as Body, Version, kind, shutdown, status, version};
use abi::hyperv::vmbus::guid;
use vmm::time::Timers;
use zerocopy::IntoBytes;

use super::{Component, Identity, Next, Peer, Service, lock};

/// First version that can reboot (OpenVMM `vm/devices/hyperv_ic_protocol/src/shutdown.rs`).
const REBOOTS: Version = Version::new(3, 1);

/// Why the guest was not asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ShutdownError {
    /// `hv_utils` is not loaded.
    #[error("the guest has no driver for Hyper-V's shutdown component")]
    NoDriver,
    /// Its driver is too old for it.
    #[error("the guest's driver for Hyper-V's shutdown component cannot reboot")]
    CannotReboot,
    /// One at a time.
    #[error("the guest has not answered the request before this one")]
    Busy,
    /// It said no.
    #[error("the guest refused the request before this one, with status {0:#x}")]
    Refused(u32),
}

/// The shutdown component of a guest.
#[derive(Clone)]
pub struct Shutdown {
    state: Arc<Mutex<State>>,
    bell: Peer,
}

#[derive(Default)]
struct State {
    version: Option<Version>,
    /// What is to be asked: [`Body::flags`].
    wanted: Option<u32>,
    is_asked: bool,
    refusal: Option<u32>,
}

impl Shutdown {
    /// A component whose thread wakes by `bell`.
    pub fn new(bell: Peer) -> Shutdown {
        Shutdown { state: Arc::default(), bell }
    }

    /// The device.
    pub fn device(&self, timers: &Arc<Timers>) -> Component<Shutdown> {
        Component::new(self.clone(), timers, Arc::clone(&self.bell))
    }

    /// Asks the guest to power off, or to reboot.
    ///
    /// # Errors
    /// [`ShutdownError`]; a refusal is told once, by the request after it.
    pub fn request(&self, reboot: bool) -> Result<(), ShutdownError> {
        {
            let mut state = lock(&self.state);
            let version = state.version.ok_or(ShutdownError::NoDriver)?;
            let is_old = (version.major.get(), version.minor.get()) < (REBOOTS.major.get(), REBOOTS.minor.get());
            if reboot && is_old {
                return Err(ShutdownError::CannotReboot);
            }
            if state.is_asked || state.wanted.is_some() {
                return Err(ShutdownError::Busy);
            }
            if let Some(status) = state.refusal.take() {
                return Err(ShutdownError::Refused(status));
            }
            state.wanted = Some(if reboot { shutdown::REBOOT } else { shutdown::POWER_OFF });
        }
        (self.bell)();
        Ok(())
    }
}

impl Service for Shutdown {
    const IDENTITY: Identity =
        Identity { class: guid::SHUTDOWN, instance: guid::SHUTDOWN_INSTANCE, kind: kind::SHUTDOWN, versions: &version::SHUTDOWN };

    fn ready(&mut self, version: Version, _now: u64) {
        lock(&self.state).version = Some(version);
    }

    fn next(&mut self, _now: u64) -> Next {
        let mut state = lock(&self.state);
        let Some(flags) = state.wanted.take() else { return Next::Wait(None) };
        state.is_asked = true;
        let body = Body { reason: shutdown::REASON_PLANNED.into(), timeout: 0.into(), flags: flags.into(), message: [0; SHUTDOWN_TEXT] };
        Next::Ask(body.as_bytes().to_vec())
    }

    fn answered(&mut self, status: u32, _body: &[u8], _now: u64) {
        let mut state = lock(&self.state);
        state.is_asked = false;
        state.refusal = (status != status::OK).then_some(status);
    }

    fn gone(&mut self) {
        *lock(&self.state) = State::default();
    }
}
