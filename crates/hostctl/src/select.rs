//! Which store is meant, and how it is opened.
//!
//! `-f` names a device, an interface or fw_cfg. Without it, it is the first interface on the bus that has a store, by OpenBSD's order of minor
//! numbers, and fw_cfg when none has. A `/dev/pvbusN` that is really there is used, otherwise N means the N-th interface and this
//! program speaks with the host itself. For the first store, and for VMware's, only the first few places of interfaces are looked at, and all
//! of them when it is not there. VMware's backdoor is touched only where CPUID shows VMware, or `-f vmware` asks for it.

use alloc::borrow::ToOwned;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;

use pvbus::{Detection, Interface, Kind, detect};

use crate::error::Error;
use crate::machine::{MACHINE, NEAR};
use crate::sys::file;
use crate::transport::device::Device;
use crate::transport::fw_cfg::{self, Files};
use crate::transport::hyperv::{self, Pools};
use crate::transport::vmware::Vmware;
use crate::transport::{Opened, xen};

/// What the devices' names begin with.
pub const DEVICE_PREFIX: &str = "/dev/pvbus";
/// What `-f` calls the interfaces.
const NAMES: [(&str, Kind); 6] = [
    ("kvm", Kind::Kvm),
    ("hyperv", Kind::HyperV),
    ("vmware", Kind::Vmware),
    ("xen", Kind::Xen),
    ("bhyve", Kind::Bhyve),
    ("openbsd", Kind::OpenBsd),
];
/// What `-f` calls QEMU's files.
const FW_CFG: &str = "fw_cfg";

/// A store, and how it came to be chosen.
pub struct Selection {
    /// The store.
    pub store: Box<dyn Opened>,
    /// Whose it is, for people.
    pub name: String,
    /// How the host is reached.
    pub way: String,
    /// Why this one.
    pub why: String,
}

/// The store that `device` names.
///
/// # Errors
/// [`Error`].
pub fn open(device: Option<&str>, patience: Duration) -> Result<Selection, Error> {
    let Some(device) = device else { return first(patience) };
    let why = format!("-f {device}");
    if device == FW_CFG {
        return files(why);
    }
    if let Some((_, kind)) = NAMES.iter().find(|(name, _)| *name == device) {
        // Xen and Hyper-V need nothing of CPUID.
        let interface = if *kind == Kind::Vmware { find(*kind) } else { None };
        return in_process(*kind, interface.as_ref(), why, patience);
    }
    if is_device(device) {
        return by_device(device, why);
    }
    let (minor, interface) = numbered(device)?;
    let why = format!("{why} is not a device here, so it is interface {minor}");
    in_process(interface.kind, Some(&interface), why, patience)
}

/// The type of what `device` names, and the name that goes before it.
///
/// # Errors
/// [`Error`].
pub fn type_of(device: Option<&str>) -> Result<(String, String), Error> {
    let default = format!("{DEVICE_PREFIX}0");
    let device = device.unwrap_or(&default);
    let type_name = if device == FW_CFG {
        fw_cfg::KIND.name().into()
    } else if let Some((_, kind)) = NAMES.iter().find(|(name, _)| *name == device) {
        let absent = || Error::NoInterface(format!("{device}: this machine has no such interface{}", present(&detect(&MACHINE))));
        detect(&MACHINE).find(*kind).ok_or_else(absent)?.kind.name().into()
    } else if is_device(device) {
        Device::open(device)?.type_name().into()
    } else {
        numbered(device)?.1.kind.name().into()
    };
    Ok((device.into(), type_name))
}

/// Opens the store of an interface in this process.
///
/// # Errors
/// [`Error::NoStore`] for kinds that have none, and what the transport says.
pub fn store_of(kind: Kind, interface: Option<&Interface>, patience: Duration) -> Result<(Box<dyn Opened>, String), Error> {
    Ok(match kind {
        Kind::Vmware => {
            let vmware = Vmware::open(interface, patience)?;
            let way = vmware.way();
            (Box::new(vmware), way)
        }
        Kind::Xen => (Box::new(xen::open(patience)?), xen::device().into()),
        Kind::HyperV => {
            (Box::new(Pools::open(hyperv::DIRECTORY, patience)?), format!("pool files of hv_kvp_daemon in {}", hyperv::DIRECTORY))
        }
        kind => return Err(Error::NoStore(format!("{kind} has no information store"))),
    })
}

/// The interface of a kind.
fn find(kind: Kind) -> Option<Interface> {
    detect(&NEAR).find(kind).cloned().or_else(|| detect(&MACHINE).find(kind).cloned())
}

/// The first store there is.
fn first(patience: Duration) -> Result<Selection, Error> {
    match first_among(&detect(&NEAR), patience) {
        Err(Error::NoStore(_)) => {}
        opened => return opened,
    }
    let detection = detect(&MACHINE);
    match first_among(&detection, patience) {
        Err(Error::NoStore(without)) => {
            let why = if without.is_empty() { String::new() } else { format!("; {without}") };
            files(format!("no interface has a store{why}")).map_err(|error| {
                if detection.interfaces.is_empty() {
                    return Error::NoInterface(format!("this machine shows no hypervisor interface, and {error}"));
                }
                Error::NoStore(format!("{without}; {error}"))
            })
        }
        opened => opened,
    }
}

/// The first store among those of `detection`; [`Error::NoStore`] tells why each has none.
fn first_among(detection: &Detection, patience: Duration) -> Result<Selection, Error> {
    let mut without = Vec::new();
    for (minor, interface) in detection.on_bus().into_iter().enumerate() {
        let device = format!("{DEVICE_PREFIX}{minor}");
        let has_store = matches!(interface.kind, Kind::Vmware | Kind::Xen | Kind::HyperV);
        let why = ["the first interface with a store"].into_iter().chain(without.iter().map(String::as_str)).collect::<Vec<_>>().join("; ");
        let opened = match has_store && is_device(&device) {
            true => by_device(&device, why),
            false => in_process(interface.kind, Some(interface), why, patience),
        };
        match opened {
            Err(Error::NoStore(reason)) => without.push(reason),
            opened => return opened,
        }
    }
    Err(Error::NoStore(without.join("; ")))
}

fn in_process(kind: Kind, interface: Option<&Interface>, why: String, patience: Duration) -> Result<Selection, Error> {
    let (store, way) = store_of(kind, interface, patience)?;
    let at = interface.map(|interface| format!(", interface at CPUID leaf {:#x}", interface.base)).unwrap_or_default();
    Ok(Selection { store, name: format!("{kind}{at}"), way, why })
}

fn by_device(path: &str, why: String) -> Result<Selection, Error> {
    let device = Device::open(path)?;
    let name = device.type_name().to_owned();
    Ok(Selection { store: Box::new(device), name, way: format!("ioctl on the device {path}"), why })
}

fn files(why: String) -> Result<Selection, Error> {
    let files = Files::open(fw_cfg::DIRECTORY)?;
    Ok(Selection { store: Box::new(files), name: fw_cfg::KIND.name().into(), way: format!("files in {}", fw_cfg::DIRECTORY), why })
}

/// The interface that a device's name stands for.
fn numbered(device: &str) -> Result<(usize, Interface), Error> {
    let detection = detect(&MACHINE);
    let minor = device.strip_prefix(DEVICE_PREFIX).and_then(|digits| digits.parse::<usize>().ok());
    let interface = minor.and_then(|minor| detection.on_bus().get(minor).map(|&interface| (minor, interface.clone())));
    interface.ok_or_else(|| {
        let names = NAMES.map(|(name, _)| name).join(", ");
        match minor {
            Some(_) => Error::NoInterface(format!("{device}: no such interface{}", present(&detection))),
            None => Error::NoInterface(format!("{device}: neither a device nor one of {names}, {FW_CFG}")),
        }
    })
}

fn is_device(path: &str) -> bool {
    file::kind(path.as_bytes()) == Ok(file::Kind::CharacterDevice)
}

/// What there is, to go behind what there is not.
fn present(detection: &Detection) -> String {
    let on_bus = detection.on_bus();
    if on_bus.is_empty() {
        return ", this machine shows none".into();
    }
    let list: Vec<String> =
        on_bus.iter().enumerate().map(|(minor, interface)| format!("{} ({DEVICE_PREFIX}{minor})", interface.kind)).collect();
    format!(", there is {}", list.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_for_a_device_is_told_with_the_names_there_are() {
        let error = open(Some("vmwear"), Duration::ZERO).err().unwrap();
        assert_eq!(error.status(), 4);
        assert!(error.to_string().contains("vmware, xen"), "{error}");
        assert!(open(Some("/dev/pvbus9999"), Duration::ZERO).err().unwrap().to_string().contains("/dev/pvbus9999: no such interface"));
    }

    #[test]
    fn interfaces_without_a_store_say_so() {
        for name in ["kvm", "openbsd", "bhyve"] {
            assert!(matches!(open(Some(name), Duration::ZERO), Err(Error::NoStore(_))), "{name}");
        }
    }
}
