//! Which store is meant, and how it is opened.
//!
//! `-f` names a device, an interface or fw_cfg. Without it, it is the first interface on the bus that has a store, by OpenBSD's order of minor
//! numbers, and fw_cfg when none has. A `/dev/pvbusN` that is really there is used, otherwise N means the N-th interface and this
//! program speaks with the host itself. VMware's backdoor is touched only where CPUID shows VMware, or `-f vmware` asks for it.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use pvbus::{Detection, Interface, Kind, detect};

use crate::error::Error;
use crate::machine::MACHINE;
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
        let interface = if *kind == Kind::Vmware { detect(&MACHINE).find(*kind).cloned() } else { None };
        return in_process(*kind, interface.as_ref(), why, patience);
    }
    if is_device(device) {
        return by_device(Path::new(device), why);
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
        Device::open(Path::new(device))?.type_name().into()
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
        Kind::HyperV => (
            Box::new(Pools::open(Path::new(hyperv::DIRECTORY), patience)?),
            format!("pool files of hv_kvp_daemon in {}", hyperv::DIRECTORY),
        ),
        kind => return Err(Error::NoStore(format!("{kind} has no information store"))),
    })
}

/// The first store there is.
fn first(patience: Duration) -> Result<Selection, Error> {
    let detection = detect(&MACHINE);
    let mut without = Vec::new();
    for (minor, interface) in detection.on_bus().into_iter().enumerate() {
        let device = format!("{DEVICE_PREFIX}{minor}");
        let has_store = matches!(interface.kind, Kind::Vmware | Kind::Xen | Kind::HyperV);
        let why = format!("the first interface with a store{}", because(&without));
        let opened = match has_store && is_device(&device) {
            true => by_device(Path::new(&device), why),
            false => in_process(interface.kind, Some(interface), why, patience),
        };
        match opened {
            Err(Error::NoStore(reason)) => without.push(reason),
            opened => return opened,
        }
    }
    files(format!("no interface has a store{}", because(&without))).map_err(|error| {
        if detection.interfaces.is_empty() {
            return Error::NoInterface(format!("this machine shows no hypervisor interface, and {error}"));
        }
        Error::NoStore(without.iter().map(|reason| format!("{reason}; ")).collect::<String>() + &error.to_string())
    })
}

fn in_process(kind: Kind, interface: Option<&Interface>, why: String, patience: Duration) -> Result<Selection, Error> {
    let (store, way) = store_of(kind, interface, patience)?;
    let at = interface.map(|interface| format!(", interface at CPUID leaf {:#x}", interface.base)).unwrap_or_default();
    Ok(Selection { store, name: format!("{kind}{at}"), way, why })
}

fn by_device(path: &Path, why: String) -> Result<Selection, Error> {
    let device = Device::open(path)?;
    let name = device.type_name().to_owned();
    Ok(Selection { store: Box::new(device), name, way: format!("ioctl on the device {}", path.display()), why })
}

fn files(why: String) -> Result<Selection, Error> {
    let files = Files::open(Path::new(fw_cfg::DIRECTORY))?;
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
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_char_device())
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

fn because(without: &[String]) -> String {
    if without.is_empty() { String::new() } else { format!("; {}", without.join("; ")) }
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
