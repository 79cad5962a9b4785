//! Disks for Hyper-V's storage driver: one SCSI controller, [`Storvsc`], in a thread of its own, with a unit for each image.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use abi::hyperv::vmbus::Guid;
use devices::virtio::worker::{Bell, Worker};
use dialects::hyperv::storvsc::scsi::{Kind, Unit};
use dialects::hyperv::storvsc::{Storvsc, UnitState, Units};
use dialects::hyperv::vmbus::VmBus;

use crate::config::Uuid;
use crate::hotplug::{Condition, Gone, Plugged, Stage};
use crate::image::Image;

/// The controller's name on the bus, always the same, so that guests know it again.
const INSTANCE: Guid = Guid::from_u128(0x7a11c9d2_5f0e_4c61_9a5e_0d6f3c1b8e42);

/// The controller, and what wakes it.
pub(super) struct Controller {
    units: Arc<Units>,
    /// Name of the first unit; the others are called after their numbers from there.
    first: u64,
    /// `None` once it was ended.
    worker: Mutex<Option<Worker<()>>>,
}

impl Controller {
    /// A controller without disks on `bus`; its units are named after the machine.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    pub fn new(bus: Arc<VmBus>, machine: Uuid) -> io::Result<Controller> {
        let units = Arc::new(Units::default());
        let theirs = Arc::clone(&units);
        let worker = Worker::spawn("hyperv-scsi", move |bell| serve(&bus, theirs, &bell))?;
        let [a, b, c, d, e, f, g, h, ..] = machine.0;
        Ok(Controller { units, first: u64::from_be_bytes([a, b, c, d, e, f, g, h]), worker: Mutex::new(Some(worker)) })
    }

    /// Tells its thread to end.
    pub fn end_soon(&self) {
        self.with_worker(Worker::end_soon);
    }

    /// Ends its thread and waits for it.
    pub fn end(&self) {
        let worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(worker);
    }

    fn with_worker(&self, act: impl FnOnce(&Worker<()>)) {
        if let Some(worker) = self.worker.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            act(worker);
        }
    }
}

fn serve(bus: &Arc<VmBus>, units: Arc<Units>, bell: &Bell) {
    let ring = bell.clone();
    let mut controller = bus.attach(Storvsc::new(INSTANCE, units), Arc::new(move || ring.ring()));
    let mut more = false;
    while !bell.is_stopped() && (more || bell.wait()) {
        more = controller.work().more;
    }
}

/// A disk at the controller.
pub(super) struct HypervDisk {
    controller: Arc<Controller>,
    lun: u8,
    /// `None` once it was called.
    gone: Mutex<Option<Gone>>,
}

impl HypervDisk {
    /// Adds a disk, also while the guest runs.
    ///
    /// # Errors
    /// When the controller has no room.
    pub fn new(controller: &Arc<Controller>, image: Arc<dyn devices::block::Disk>, kind: Kind, gone: Gone) -> io::Result<HypervDisk> {
        let unit = |lun: u8| Unit::new(Arc::new(Image(image)), kind, controller.first.wrapping_add(lun.into()));
        let lun = controller.units.add(unit).map_err(io::Error::other)?;
        controller.with_worker(Worker::ring);
        Ok(HypervDisk { controller: Arc::clone(controller), lun, gone: Mutex::new(Some(gone)) })
    }
}

impl Plugged for HypervDisk {
    fn place(&self) -> String {
        // As Linux' `/sys/bus/scsi` ends its name: bus, target, unit.
        format!("0:0:{}", self.lun)
    }

    fn condition(&self) -> Condition {
        let stage = match self.controller.units.state(self.lun) {
            None => Stage::Leaving,
            Some(UnitState::Unused) => Stage::Offered,
            Some(UnitState::Used) => Stage::InUse,
        };
        Condition { stage, said: None }
    }

    fn ask_back(&self) {
        self.pull();
        if let Some(gone) = self.gone.lock().unwrap_or_else(PoisonError::into_inner).take() {
            gone();
        }
    }

    fn pull(&self) {
        self.controller.units.remove(self.lun);
        self.controller.with_worker(Worker::ring);
    }
}
