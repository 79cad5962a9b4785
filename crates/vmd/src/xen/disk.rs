//! Disks for blkfront: [`Blkback`] on an image of the host, in a thread of its own.

use std::sync::Arc;

use dialects::xen::block::Blkback;

use super::device::{DeviceKeys, Names, Slot};
use crate::image::Image;

/// Most disks; more than there are letters for.
const MOST: u32 = 256;

/// Number of the disk with this place in the command line's order, as `io/blkif.h` gives them to `xvda` and its followers.
fn virtual_device(index: u32) -> u32 {
    /// Major number of `xvd` disks.
    const MAJOR: u32 = 202;
    if index < 16 { MAJOR << 8 | index << 4 } else { 1 << 28 | index << 8 }
}

/// Names of disks, in the order in which they are given.
pub(super) fn places() -> impl Iterator<Item = Names> {
    (0..MOST).map(|index| {
        let number = virtual_device(index);
        let letter = u8::try_from(index).ok().filter(|index| *index < 26);
        let place = letter.map_or_else(|| number.to_string(), |letter| format!("xvd{}", char::from(b'a' + letter)));
        Names { kind: "vbd", number, place }
    })
}

/// What both directories have besides.
pub(super) fn keys(names: &Names, disk: &dyn devices::block::Disk) -> DeviceKeys {
    let mode = if disk.read_only() { "r" } else { "w" };
    DeviceKeys {
        frontend: vec![
            ("virtual-device", names.number.to_string()),
            ("device-type", "disk".to_owned()),
            ("protocol", "x86_64-abi".to_owned()),
        ],
        backend: vec![
            ("dev", names.place.clone()),
            ("mode", mode.to_owned()),
            ("type", "phy".to_owned()),
            ("device-type", "disk".to_owned()),
            ("removable", "0".to_owned()),
            ("bootable", u32::from(names.number == virtual_device(0)).to_string()),
        ],
    }
}

/// The backend's thread.
pub(super) fn serve(slot: Slot, disk: Arc<dyn devices::block::Disk>, persistent_grants: bool) {
    let bell = slot.bell();
    let driver = Blkback::new(slot.xen(), Arc::new(Image(disk)), slot.peer()).keeping_grants(persistent_grants);
    let mut served = slot.begin(driver);
    let mut more = false;
    while (more || bell.wait()) && served.goes_on() {
        more = served.backend.driver().work().unwrap_or_else(|error| {
            served.backend.fail(&error.to_string());
            false
        });
    }
    served.end();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_numbered_as_xvd() {
        assert_eq!([0, 1, 15].map(virtual_device), [51712, 51728, 51952]);
        assert_eq!(virtual_device(16), 0x1000_1000);
        assert_eq!(places().nth(1).unwrap().place, "xvdb");
    }
}
