//! Disks, network cards and integration components on the machine's VMBus.
//!
//! Disks are units of one SCSI controller, which comes with the first of them; each card is a device of its own. A disk that is taken back is gone at once,
//! and the guest hears so; a card when the guest's driver has closed it.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dialects::hyperv::storvsc::scsi::Kind;
use dialects::hyperv::vmbus::VmBus;

use super::components::Components;
use super::disk::{Controller, HypervDisk};
use super::nic::HypervNic;
use crate::config::Uuid;
use crate::hotplug::{Device, Gone, Plugged, Slots};

/// What is on the bus.
pub struct Devices {
    bus: Arc<VmBus>,
    machine: Uuid,
    /// `None` when power is off.
    plugged: Mutex<Option<Contents>>,
    components: Components,
}

#[derive(Default)]
struct Contents {
    controller: Option<Arc<Controller>>,
    nics: Vec<Arc<HypervNic>>,
}

impl Devices {
    /// No disks and cards yet; disks are named after the machine.
    pub fn new(bus: Arc<VmBus>, machine: Uuid, components: Components) -> Devices {
        Devices { bus, machine, plugged: Mutex::new(Some(Contents::default())), components }
    }

    /// Integration components.
    pub fn components(&self) -> &Components {
        &self.components
    }

    /// Ends all threads.
    pub fn shut_down(&self) {
        let Contents { controller, nics } = lock(&self.plugged).take().unwrap_or_default();
        controller.iter().for_each(|controller| controller.end_soon());
        nics.iter().for_each(|nic| nic.end_soon());
        self.components.end_soon();
        controller.iter().for_each(|controller| controller.end());
        nics.iter().for_each(|nic| nic.end());
    }

    fn plug_disk(&self, contents: &mut Contents, image: Arc<dyn devices::block::Disk>, kind: Kind, gone: Gone) -> io::Result<HypervDisk> {
        let controller = match &contents.controller {
            Some(controller) => controller,
            None => contents.controller.insert(Arc::new(Controller::new(Arc::clone(&self.bus), self.machine)?)),
        };
        HypervDisk::new(controller, image, kind, gone)
    }
}

impl Slots for Devices {
    fn plug(&self, device: Device, gone: Gone) -> io::Result<Arc<dyn Plugged>> {
        let mut plugged = lock(&self.plugged);
        let contents = plugged.as_mut().ok_or_else(|| io::Error::other("power is off"))?;
        // They are kept until here, so that no thread drops, and waits for, itself.
        contents.nics.retain(|nic| !nic.is_finished());
        Ok(match device {
            Device::Disk { image, .. } => Arc::new(self.plug_disk(contents, image, Kind::Disk, gone)?),
            Device::Dvd(image) => Arc::new(self.plug_disk(contents, image, Kind::Dvd, gone)?),
            Device::Nic(mac, network) => {
                let nic = Arc::new(HypervNic::new(Arc::clone(&self.bus), mac, network, gone)?);
                contents.nics.push(Arc::clone(&nic));
                nic
            }
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
