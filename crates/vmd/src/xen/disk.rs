//! Disks for blkfront: [`Blkback`] on an image of the host, in a thread of its own.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dialects::xen::block::Blkback;
use dialects::xen::xenbus::Backend;

use super::domain::{Device, Domain, StoreKeys};
use crate::image::Image;

/// Number of the disk with this place in the command line's order, as `io/blkif.h` gives them to `xvda` and its followers.
fn virtual_device(index: u32) -> u32 {
    /// Major number of `xvd` disks.
    const MAJOR: u32 = 202;
    if index < 16 { MAJOR << 8 | index << 4 } else { 1 << 28 | index << 8 }
}

/// Adds a disk to the domain.
///
/// # Errors
/// When the host has no thread or descriptor left.
pub fn add(domain: &Domain, index: u32, disk: Arc<dyn devices::block::Disk>) -> io::Result<()> {
    let number = virtual_device(index);
    let mode = if disk.read_only() { "r" } else { "w" };
    let frontend = [("virtual-device", number.to_string()), ("device-type", "disk".to_owned()), ("protocol", "x86_64-abi".to_owned())];
    let name =
        u8::try_from(index).ok().filter(|index| *index < 26).map_or_else(|| number.to_string(), |n| format!("xvd{}", char::from(b'a' + n)));
    let backend = [
        ("dev", name),
        ("mode", mode.to_owned()),
        ("type", "phy".to_owned()),
        ("device-type", "disk".to_owned()),
        ("removable", "0".to_owned()),
        ("bootable", u32::from(index == 0).to_string()),
    ];
    domain.add("vbd", number, &frontend, &backend, move |device| serve(device, disk))
}

fn serve(device: Device, disk: Arc<dyn devices::block::Disk>) {
    let Device { xen, host, backend, frontend, bell } = device;
    let changed = Arc::new(AtomicBool::new(false));
    let ring = bell.clone();
    let driver = Blkback::new(xen, Arc::new(Image(disk)), Arc::new(move || ring.ring()));
    let state = format!("{frontend}/state");
    let mut backend = Backend::new(driver, Arc::new(StoreKeys(Arc::clone(&host))), backend, frontend);
    let (flag, ring) = (Arc::clone(&changed), bell.clone());
    let watching = host.watch(&state, move |_| {
        flag.store(true, Ordering::Release);
        ring.ring();
    });
    let mut more = false;
    while !bell.is_stopped() && (more || bell.wait()) {
        if changed.swap(false, Ordering::AcqRel) {
            backend.frontend_changed();
        }
        more = backend.driver().work().unwrap_or_else(|error| {
            backend.fail(&error.to_string());
            false
        });
    }
    drop(watching);
    backend.end();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_numbered_as_xvd() {
        assert_eq!([0, 1, 15].map(virtual_device), [51712, 51728, 51952]);
        assert_eq!(virtual_device(16), 0x1000_1000);
    }
}
