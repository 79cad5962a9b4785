//! XenStore, by the character device that the kernel's xenbus driver gives to programs: `/dev/xen/xenbus`, formerly `/proc/xen/xenbus`.
//!
//! The device speaks XenStore's wire protocol (xen-project/xen `docs/misc/xenstore.txt`, `xen/include/public/io/xs_wire.h`); the kernel passes
//! the messages on to the host's ring (Linux `drivers/xen/xenbus/xenbus_dev_frontend.c`). Paths without a leading slash are below
//! `/local/domain/<this domain>`. The conversation is pvbus' ([`Client`]); here is what carries it.

use alloc::format;
use core::time::Duration;

use pvbus::xen::xenstore::{Client, Peer};
use pvbus::{Nanos, StoreError};

use super::{Event, Opened};
use crate::error::Error;
use crate::sys::file::{self, Access};
use crate::sys::{Errno, File, time};

/// Where the device is, in the order of preference.
const DEVICES: [&str; 2] = ["/dev/xen/xenbus", "/proc/xen/xenbus"];
/// The token of watches.
const TOKEN: &[u8] = b"hostctl";

/// Opens this domain's XenStore; each request is given up after `patience`.
///
/// # Errors
/// [`Error::NoStore`] when the kernel has no such device, [`Error::Denied`] when it is not for this user.
pub fn open(patience: Duration) -> Result<Client<Device>, Error> {
    for path in DEVICES {
        match File::open(path.as_bytes(), Access::ReadWrite) {
            Ok(file) => return Ok(Client::new(Device { file, patience }, 0)),
            Err(Errno::ENOENT) => {}
            Err(Errno::EACCES | Errno::EPERM) => return Err(Error::Denied(format!("{path} is not for this user: XenStore wants root"))),
            Err(errno) => return Err(Error::system(path)(errno)),
        }
    }
    Err(Error::NoStore(format!(
        "no XenStore: neither {} nor {} is there (kernel option CONFIG_XEN, file system xenfs)",
        DEVICES[0], DEVICES[1]
    )))
}

/// Which device [`open`] takes; the first when there is none.
#[must_use]
pub fn device() -> &'static str {
    DEVICES.into_iter().find(|path| file::exists(path.as_bytes())).unwrap_or(DEVICES[0])
}

/// The kernel's device.
#[derive(Debug)]
pub struct Device {
    file: File,
    patience: Duration,
}

impl Peer for Device {
    fn deadline(&self) -> Nanos {
        time::after(self.patience)
    }

    fn is_numbered(&self) -> bool {
        // There is one request at a time, and old kernels do not give its number back.
        false
    }

    fn send(&mut self, bytes: &[u8], _deadline: Nanos) -> Result<(), StoreError> {
        self.file.write_all(bytes).map_err(|_| StoreError::Transport("XenStore does not take requests"))
    }

    fn receive(&mut self, buffer: &mut [u8], deadline: Option<Nanos>) -> Result<usize, StoreError> {
        loop {
            match file::wait(&[&self.file], deadline).and_then(|_| self.file.read(buffer)) {
                Ok(0) => return Err(StoreError::Transport("XenStore closed the connection")),
                Ok(count) => return Ok(count),
                Err(Errno::EINTR) => {}
                Err(Errno::ETIMEDOUT) => return Err(StoreError::Timeout),
                Err(_) => return Err(StoreError::Transport("XenStore cannot be read")),
            }
        }
    }
}

impl<P: Peer + Send> Opened for Client<P> {
    fn rules(&self) -> &'static str {
        "XenStore's paths have letters, digits and - / _ @ alone, without a leading slash they are below /local/domain/<this one>; \
         path and value are 4096 bytes at most; what is the host's can only be read"
    }

    fn subscribe(&mut self, key: &[u8]) -> Result<(), StoreError> {
        self.watch(key, TOKEN)?;
        // XenStore tells of each new watch as if of a change, before or after it answers.
        self.wait_for(key, TOKEN)
    }

    fn wait(&mut self, deadline: Option<Nanos>) -> Result<Event, StoreError> {
        match self.next_event(deadline) {
            Ok(event) => Ok(Event::Changed(event.path)),
            Err(StoreError::Timeout) => Ok(Event::TimeOver),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests;
