//! `hostctl serve`: real `/dev/pvbusN`, made by CUSE, for programs that know pvbus(4)'s ioctls.
//!
//! One process serves all interfaces, each with a `/dev/cuse` of its own; the kernel removes the devices when the process ends. A device
//! has its interface's number for a minor number and OpenBSD's mode, 0640.
//!
//! ```text
//!   program --ioctl--> kernel --requests--> cuse.rs --> pvbus::ioctl --> transport/ --> host
//! ```

mod cuse;
mod fuse;

use alloc::boxed::Box;
use alloc::format;
use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;

use pvbus::ioctl::Stores;
use pvbus::{Store, detect};

use crate::args::Arguments;
use crate::error::Error;
use crate::machine::MACHINE;
use crate::select::{self, DEVICE_PREFIX};
use crate::sys::file::{self, Access};
use crate::sys::{self, Errno, File, process};
use cuse::Device;

/// The kernel's end.
const CUSE: &str = "/dev/cuse";
/// Room for a request: the kernel copies 32 pages of the caller's memory at most (Linux `FUSE_DEFAULT_MAX_PAGES_PER_REQ`).
const REQUEST_SIZE: usize = 256 << 10;
/// As OpenBSD's MAKEDEV has it.
const MODE: u32 = 0o640;

/// Makes the devices and serves them until the process is ended.
///
/// # Errors
/// [`Error::NoInterface`] without an interface, [`Error::System`] when there is no CUSE or no permission for it.
pub fn serve(arguments: &Arguments) -> Result<(), Error> {
    let detection = detect(&MACHINE);
    let interfaces = detection.on_bus();
    if interfaces.is_empty() {
        return Err(Error::NoInterface("this machine shows no hypervisor interface".into()));
    }
    let mut stores = Stores::new();
    let mut devices = Vec::new();
    for (minor, interface) in (0..).zip(interfaces) {
        let (store, what) = match select::store_of(interface.kind, Some(interface), arguments.patience()) {
            Ok((store, way)) => (Some(store), format!("{}, {way}", interface.kind)),
            // Its device tells its type.
            Err(error) => (None, error.to_string()),
        };
        stores.add(interface.kind, store.map(|store| store as Box<dyn Store>));
        let path = format!("{DEVICE_PREFIX}{minor}");
        devices.push(Served::make(Device::new(minor, 0), &path, &mut stores)?);
        sys::say(&format!("hostctl: {path}: {what}\n"));
    }
    if arguments.daemon {
        process::into_background().map_err(Error::system("fork"))?;
    }
    loop {
        let files: Vec<&File> = devices.iter().map(|device| &device.cuse).collect();
        let ready = file::wait(&files, None).map_err(Error::system(CUSE))?;
        for (device, _) in devices.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
            device.answer_one(&mut stores)?;
        }
    }
}

/// A device and its connection with the kernel.
struct Served {
    device: Device,
    cuse: File,
    buffer: Vec<u8>,
}

impl Served {
    /// Makes the device at `path`.
    fn make(device: Device, path: &str, stores: &mut Stores<'_>) -> Result<Served, Error> {
        if file::exists(path.as_bytes()) {
            return Err(Error::system(path)(Errno::EEXIST));
        }
        let cuse = File::open(CUSE.as_bytes(), Access::ReadWrite).map_err(|errno| match errno {
            Errno::ENOENT => Error::NoStore(format!("{CUSE} is not there (module cuse)")),
            Errno::EACCES | Errno::EPERM => Error::Denied(format!("{CUSE} is not for this user: devices are made by root")),
            errno => Error::system(CUSE)(errno),
        })?;
        let mut served = Served { device, cuse, buffer: vec![0; REQUEST_SIZE] };
        // The first request asks what device it shall be; it is there when the answer has been taken.
        served.answer_one(stores)?;
        file::set_mode(path.as_bytes(), MODE).map_err(Error::system(path))?;
        Ok(served)
    }

    /// Answers a request; waits for it, if there is none.
    fn answer_one(&mut self, stores: &mut Stores<'_>) -> Result<(), Error> {
        let count = match self.cuse.read(&mut self.buffer) {
            Ok(count) => count,
            // The caller has gone before the request could be read, or a signal came.
            Err(Errno::ENOENT | Errno::EINTR | Errno::EAGAIN) => return Ok(()),
            Err(errno) => return Err(Error::system(CUSE)(errno)),
        };
        let request = self.buffer.get(..count).unwrap_or_default();
        match self.device.on(request, stores).map(|answer| self.cuse.write_all(&answer)) {
            // The caller has gone meanwhile.
            None | Some(Ok(()) | Err(Errno::ENOENT)) => Ok(()),
            Some(Err(errno)) => Err(Error::system(CUSE)(errno)),
        }
    }
}
