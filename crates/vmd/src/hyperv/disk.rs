//! Disks for Hyper-V's storage driver: one SCSI controller, [`Storvsc`], in a thread of its own, with a unit for each image.

use std::io;
use std::sync::Arc;

use abi::hyperv::vmbus::Guid;
use devices::block::Disk;
use devices::virtio::worker::{Bell, Worker};
use dialects::hyperv::storvsc::scsi::{Kind, Unit};
use dialects::hyperv::storvsc::{Full, Storvsc, Units};
use dialects::hyperv::vmbus::VmBus;

use crate::config::Uuid;
use crate::image::Image;

/// The controller's name on the bus, always the same, so that guests know it again.
const INSTANCE: Guid = Guid::from_u128(0x7a11c9d2_5f0e_4c61_9a5e_0d6f3c1b8e42);

/// The controller, and what wakes it.
pub struct Controller {
    units: Arc<Units>,
    /// Number of the first unit that units have their names from.
    seed: u64,
    worker: Worker<()>,
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
        Ok(Controller { units, seed: u64::from_be_bytes([a, b, c, d, e, f, g, h]), worker })
    }

    /// Adds a disk, also while the guest runs; the number of its unit.
    ///
    /// # Errors
    /// [`Full`].
    pub fn add(&self, disk: Arc<dyn Disk>, kind: Kind) -> Result<u8, Full> {
        let lun = self.units.add(|lun| Unit::new(Arc::new(Image(disk)), kind, self.seed.wrapping_add(lun.into())))?;
        self.worker.ring();
        Ok(lun)
    }

    /// Removes a disk; `false` when there is none of this number.
    pub fn remove(&self, lun: u8) -> bool {
        let was_there = self.units.remove(lun);
        self.worker.ring();
        was_there
    }

    /// Tells the thread to end, without waiting for it.
    pub fn end_soon(&self) {
        self.worker.end_soon();
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
