//! What disks and network cards a machine has: those of the command line, and those that came and went since.
//!
//! It is kept over reboots: when power comes on, the board takes its devices from here. Names are given in order, `disk0`, `nic0` and so on, and
//! never twice, so that nobody takes a later device for an earlier one. An image that leaves is written back first.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::DeviceBus;
use devices::block::{self, Disk, DiskError, DiskSpec};
use devices::net::{self, Mac, Network, NicSpec};
use serde::{Deserialize, Serialize};

use crate::config::MachineConfig;
use crate::control::Running;
use crate::hotplug::{Condition, Device, Gone, PlugError, Plugged};

/// Kinds of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Disks.
    Disk,
    /// Network cards.
    Nic,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Kind::Disk => "disk",
            Kind::Nic => "nic",
        })
    }
}

/// A device, for people and programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Its name in the inventory.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// By which bus the guest finds it.
    pub bus: String,
    /// As it was asked for.
    pub spec: String,
    /// What the guest calls it, on a bus that says so.
    pub place: Option<String>,
    /// How it is, on a bus that says so.
    pub condition: Option<Condition>,
}

/// A disk for the board.
#[derive(Clone)]
pub struct InstalledDisk {
    /// Its name.
    pub name: String,
    /// By which bus the guest finds it.
    pub bus: DeviceBus,
    /// The guest finds a drive with a DVD in it.
    pub dvd: bool,
    /// See [`devices::block::DiskSpec::persistent_grants`].
    pub persistent_grants: bool,
    /// The image, open and locked.
    pub image: Arc<dyn Disk>,
}

impl InstalledDisk {
    /// The disk, to be plugged in.
    pub fn device(&self) -> Device {
        let image = Arc::clone(&self.image);
        if self.dvd { Device::Dvd(image) } else { Device::Disk { image, persistent_grants: self.persistent_grants } }
    }
}

/// A card for the board.
#[derive(Clone)]
pub struct InstalledNic {
    /// Its name.
    pub name: String,
    /// By which bus the guest finds it.
    pub bus: DeviceBus,
    /// Its address.
    pub mac: Mac,
    /// What it is to be connected to.
    pub network: Network,
}

enum Item {
    Disk(InstalledDisk),
    Nic(InstalledNic),
}

struct Entry {
    item: Item,
    spec: String,
    plugged: Option<Arc<dyn Plugged>>,
}

impl Entry {
    fn name(&self) -> &str {
        match &self.item {
            Item::Disk(disk) => &disk.name,
            Item::Nic(nic) => &nic.name,
        }
    }

    fn status(&self) -> DeviceStatus {
        let (kind, bus) = match &self.item {
            Item::Disk(disk) => (Kind::Disk, disk.bus),
            Item::Nic(nic) => (Kind::Nic, nic.bus),
        };
        DeviceStatus {
            name: self.name().into(),
            kind,
            bus: bus.to_string(),
            spec: self.spec.clone(),
            place: self.plugged.as_ref().map(|plugged| plugged.place()),
            condition: self.plugged.as_ref().map(|plugged| plugged.condition()),
        }
    }
}

/// The inventory.
#[derive(Default)]
pub struct Inventory(Mutex<Contents>);

#[derive(Default)]
struct Contents {
    entries: Vec<Entry>,
    /// Disks and cards that there ever were.
    disks: u32,
    nics: u32,
}

impl Inventory {
    /// Takes in what the command line asks for. Images stay open, and locked, over reboots.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn take(&self, config: &MachineConfig) -> Result<(), DiskError> {
        for spec in &config.disks {
            let disk = self.new_disk(spec, block::open(spec)?);
            self.insert(Item::Disk(disk), spec.to_string(), None);
        }
        for spec in &config.nics {
            let nic = self.new_nic(spec);
            self.insert(Item::Nic(nic), spec.to_string(), None);
        }
        Ok(())
    }

    /// The disks on `bus`, in order.
    pub fn disks(&self, bus: DeviceBus) -> Vec<InstalledDisk> {
        let wanted = |entry: &Entry| match &entry.item {
            Item::Disk(disk) if disk.bus == bus => Some(disk.clone()),
            _ => None,
        };
        self.lock().entries.iter().filter_map(wanted).collect()
    }

    /// The cards on `bus`, in order.
    pub fn nics(&self, bus: DeviceBus) -> Vec<InstalledNic> {
        let wanted = |entry: &Entry| match &entry.item {
            Item::Nic(nic) if nic.bus == bus => Some(nic.clone()),
            _ => None,
        };
        self.lock().entries.iter().filter_map(wanted).collect()
    }

    /// What is to be done when the guest has let go of the device.
    pub fn gone(self: &Arc<Inventory>, name: &str) -> Gone {
        let (inventory, name) = (Arc::downgrade(self), name.to_owned());
        Box::new(move || {
            if let Some(inventory) = inventory.upgrade() {
                inventory.forget(&name);
            }
        })
    }

    /// The device called `name` is in a slot.
    pub fn set_plugged(&self, name: &str, plugged: Arc<dyn Plugged>) {
        if let Some(entry) = self.lock().entries.iter_mut().find(|entry| entry.name() == name) {
            entry.plugged = Some(plugged);
        }
    }

    /// Power went, and all slots with it.
    pub fn power_off(&self) {
        self.lock().entries.iter_mut().for_each(|entry| entry.plugged = None);
    }

    /// Plugs a disk into the running machine.
    ///
    /// # Errors
    /// [`PlugError`].
    pub fn add_disk(self: &Arc<Inventory>, machine: &Running, spec: &DiskSpec) -> Result<DeviceStatus, PlugError> {
        let slots = machine.board.slots(spec.bus)?;
        let disk = self.new_disk(spec, block::open(spec)?);
        let plugged = slots.plug(disk.device(), self.gone(&disk.name))?;
        Ok(self.insert(Item::Disk(disk), spec.to_string(), Some(plugged)))
    }

    /// Plugs a network card into the running machine.
    ///
    /// # Errors
    /// [`PlugError`].
    pub fn add_nic(self: &Arc<Inventory>, machine: &Running, spec: &NicSpec) -> Result<DeviceStatus, PlugError> {
        let slots = machine.board.slots(spec.bus)?;
        let network = net::open(&spec.network)?.ok_or(PlugError::NoNetwork)?;
        let nic = self.new_nic(spec);
        let plugged = slots.plug(Device::Nic(nic.mac, network), self.gone(&nic.name))?;
        Ok(self.insert(Item::Nic(nic), spec.to_string(), Some(plugged)))
    }

    /// Asks the guest to let go of a device, which is gone once it has; or takes it at once.
    ///
    /// # Errors
    /// [`PlugError`].
    pub fn remove(&self, machine: &Running, name: &str, force: bool) -> Result<(), PlugError> {
        let (bus, plugged) = {
            let contents = self.lock();
            let entry = contents.entries.iter().find(|entry| entry.name() == name).ok_or_else(|| PlugError::NotFound(name.into()))?;
            let bus = match &entry.item {
                Item::Disk(disk) => disk.bus,
                Item::Nic(nic) => nic.bus,
            };
            (bus, entry.plugged.clone())
        };
        machine.board.slots(bus)?;
        let plugged = plugged.ok_or_else(|| PlugError::NotFound(name.into()))?;
        if force {
            plugged.pull();
            self.forget(name);
        } else {
            plugged.ask_back();
        }
        Ok(())
    }

    /// All devices.
    pub fn list(&self) -> Vec<DeviceStatus> {
        self.lock().entries.iter().map(Entry::status).collect()
    }

    /// Writes all images back.
    ///
    /// # Errors
    /// What the host says.
    pub fn flush(&self) -> std::io::Result<()> {
        let image = |entry: &Entry| match &entry.item {
            Item::Disk(disk) => Some(Arc::clone(&disk.image)),
            Item::Nic(_) => None,
        };
        let images: Vec<_> = self.lock().entries.iter().filter_map(image).collect();
        images.iter().try_for_each(|image| image.flush())
    }

    fn new_disk(&self, spec: &DiskSpec, image: Arc<dyn Disk>) -> InstalledDisk {
        let mut contents = self.lock();
        contents.disks += 1;
        InstalledDisk {
            name: format!("disk{}", contents.disks - 1),
            bus: spec.bus,
            dvd: spec.dvd,
            persistent_grants: spec.persistent_grants,
            image,
        }
    }

    fn new_nic(&self, spec: &NicSpec) -> InstalledNic {
        let mut contents = self.lock();
        let number = contents.nics;
        contents.nics += 1;
        let mac = spec.mac.unwrap_or_else(|| Mac::default_for(number as u8));
        InstalledNic { name: format!("nic{number}"), bus: spec.bus, mac, network: spec.network.clone() }
    }

    fn insert(&self, item: Item, spec: String, plugged: Option<Arc<dyn Plugged>>) -> DeviceStatus {
        let entry = Entry { item, spec, plugged };
        let status = entry.status();
        self.lock().entries.push(entry);
        status
    }

    fn forget(&self, name: &str) {
        let entry = {
            let mut contents = self.lock();
            let Some(at) = contents.entries.iter().position(|entry| entry.name() == name) else { return };
            contents.entries.remove(at)
        };
        if let Item::Disk(disk) = entry.item
            && let Err(error) = disk.image.flush()
        {
            eprintln!("vmctl: {} cannot be written back: {error}", entry.spec);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
