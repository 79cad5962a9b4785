//! Integration components on the machine's VMBus, all in one thread: they have little to do, and nothing before the guest has opened a channel, which is when
//! it begins.

use std::io;
use std::sync::Arc;

use ::devices::virtio::worker::{Call, Reserve};
use dialects::hyperv::ic::{Facts, FileSystems, Heartbeat, Kvp, Pulse, Shutdown, ShutdownError, TimeSync, Vss, VssError};
use dialects::hyperv::vmbus::VmBus;
use dialects::store::Store;
use vmm::time::Timers;

use crate::config::Uuid;
use crate::power::Wish;

/// Why the guest was not asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// The shutdown component says why.
    #[error(transparent)]
    Shutdown(#[from] ShutdownError),
    /// The snapshot component says why.
    #[error(transparent)]
    Vss(#[from] VssError),
    /// The time component is not used.
    #[error("the guest has no driver for Hyper-V's time component")]
    NoTimeDriver,
}

/// The components of a machine with power on.
pub struct Components {
    heartbeat: Heartbeat,
    shutdown: Shutdown,
    time: TimeSync,
    vss: Vss,
    timers: Arc<Timers>,
    worker: Reserve,
}

impl Components {
    /// Puts the components on `bus`.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(bus: Arc<VmBus>, timers: &Arc<Timers>, store: Arc<dyn Store>, machine: Uuid) -> io::Result<Components> {
        let call = Call::new("hyperv-ic")?;
        let bell = call.clone();
        let peer = Arc::new(move || bell.ring());
        let (heartbeat, shutdown) = (Heartbeat::default(), Shutdown::new(peer.clone()));
        let (time, vss) = (TimeSync::new(timers, peer.clone()), Vss::new(peer.clone()));
        let kvp = Kvp::new(store, facts(machine), peer.clone());
        let mut devices = (
            bus.attach(heartbeat.device(timers, peer.clone()), peer.clone()),
            bus.attach(shutdown.device(timers), peer.clone()),
            bus.attach(time.device(), peer.clone()),
            bus.attach(vss.device(timers), peer.clone()),
            bus.attach(kvp.device(timers, peer.clone()), peer),
        );
        let worker = call.reserve(move |bell| {
            let (heartbeat, shutdown, time, vss, kvp) = &mut devices;
            while bell.wait() {
                heartbeat.work();
                shutdown.work();
                time.work();
                vss.work();
                kvp.work();
            }
        });
        Ok(Components { heartbeat, shutdown, time, vss, timers: Arc::clone(timers), worker })
    }

    /// Asks the guest.
    ///
    /// # Errors
    /// [`AskError`] when nobody in the guest would do it.
    pub fn ask(&self, wish: Wish) -> Result<(), AskError> {
        match wish {
            Wish::Shutdown => self.shutdown.request(false)?,
            Wish::Reboot => self.shutdown.request(true)?,
            Wish::SetClock if self.time.request() => {}
            Wish::SetClock => return Err(AskError::NoTimeDriver),
            Wish::Freeze => self.vss.freeze()?,
            Wish::Thaw => self.vss.thaw()?,
        }
        Ok(())
    }

    /// Whether the guest answers.
    pub fn pulse(&self) -> Pulse {
        self.heartbeat.pulse(self.timers.clock().now())
    }

    /// How the guest's file systems are.
    pub fn file_systems(&self) -> FileSystems {
        self.vss.file_systems()
    }

    /// Tells the thread to end, without waiting for it.
    pub fn end_soon(&self) {
        self.worker.end_soon();
    }
}

/// What the guest finds in its pool AutoExternal (Hyper-V Data Exchange: names of the host's data items).
fn facts(machine: Uuid) -> Facts {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    Facts(vec![
        ("HostName", host.clone()),
        ("PhysicalHostName", host),
        ("VirtualMachineId", machine.to_string().to_uppercase()),
        ("VirtualMachineName", "machine".into()),
    ])
}
