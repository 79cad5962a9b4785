//! Disks, network cards and integration components on the machine's VMBus.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use devices::block::Disk;
use devices::net::{Mac, NetBackend};
use devices::virtio::worker::Worker;
use dialects::hyperv::storvsc::scsi::Kind;
use dialects::hyperv::vmbus::VmBus;

use super::components::Components;
use super::disk::Controller;
use super::nic;
use crate::config::Uuid;

/// What is on the bus.
pub struct Devices {
    bus: Arc<VmBus>,
    machine: Uuid,
    /// The SCSI controller, once there was a disk.
    controller: Mutex<Option<Controller>>,
    nics: Mutex<Vec<Worker<()>>>,
    components: Components,
}

impl Devices {
    /// No disks and cards yet; disks are named after the machine.
    pub fn new(bus: Arc<VmBus>, machine: Uuid, components: Components) -> Devices {
        Devices { bus, machine, controller: Mutex::default(), nics: Mutex::default(), components }
    }

    /// Integration components.
    pub fn components(&self) -> &Components {
        &self.components
    }

    /// Adds a disk, also while the guest runs; the number of its unit.
    ///
    /// # Errors
    /// When the controller has no room, or the host no thread or descriptor left.
    pub fn add_disk(&self, disk: Arc<dyn Disk>, kind: Kind) -> io::Result<u8> {
        let mut controller = self.controller.lock().unwrap_or_else(PoisonError::into_inner);
        let controller = match &mut *controller {
            Some(controller) => controller,
            none => none.insert(Controller::new(Arc::clone(&self.bus), self.machine)?),
        };
        controller.add(disk, kind).map_err(io::Error::other)
    }

    /// Removes a disk; `false` when there is none of this number.
    pub fn remove_disk(&self, lun: u8) -> bool {
        let controller = self.controller.lock().unwrap_or_else(PoisonError::into_inner);
        controller.as_ref().is_some_and(|controller| controller.remove(lun))
    }

    /// Adds a network card.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    pub fn add_nic(&self, index: u32, mac: Mac, network: Box<dyn NetBackend>) -> io::Result<()> {
        let worker = nic::add(Arc::clone(&self.bus), index, mac, network)?;
        self.nics.lock().unwrap_or_else(PoisonError::into_inner).push(worker);
        Ok(())
    }

    /// Ends all threads.
    pub fn shut_down(&self) {
        let controller = self.controller.lock().unwrap_or_else(PoisonError::into_inner).take();
        let nics = std::mem::take(&mut *self.nics.lock().unwrap_or_else(PoisonError::into_inner));
        controller.iter().for_each(Controller::end_soon);
        nics.iter().for_each(Worker::end_soon);
        self.components.end_soon();
        // They are waited for.
        drop((controller, nics));
    }
}
