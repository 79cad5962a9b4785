//! A real `/dev/pvbusN`: OpenBSD's, or one of `hostctl serve`.
//!
//! The three ioctls of pvbus(4), with buffers that grow: a value that does not fit is asked for again with twice the room. They know strings
//! only, and neither list nor remove; XenStore's directories and Hyper-V's pools are listed by reading them.
// ioctl(2) with pointers in its argument.
#![allow(unsafe_code)]

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use abi::pvbus::{KVOP_MAXSIZE, KVREAD, KVTYPE, KVWRITE, PvbusReq};
use pvbus::{Kind, Store, StoreError};

use super::Opened;
use crate::error::Error;
use crate::sys::file::Access;
use crate::sys::{Errno, File};

/// Size of the buffers at first.
const FIRST_SIZE: usize = 4096;
/// The kinds that a device can be of, in OpenBSD's order.
const KINDS: [Kind; 6] = [Kind::Kvm, Kind::HyperV, Kind::Vmware, Kind::Xen, Kind::Bhyve, Kind::OpenBsd];

/// The device.
#[derive(Debug)]
pub struct Device {
    path: String,
    file: File,
    type_name: String,
}

impl Device {
    /// Opens `path` for reading and asks for its type.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn open(path: &str) -> Result<Device, Error> {
        let file = File::open(path.as_bytes(), Access::Read).map_err(Error::system(format!("open: {path}")))?;
        let mut device = Device { path: path.into(), file, type_name: String::new() };
        let mut key = vec![0; FIRST_SIZE];
        device.ioctl(KVTYPE, &mut key, &mut [0]).map_err(Error::system("ioctl"))?;
        device.type_name = String::from_utf8_lossy(string(&key)).into_owned();
        Ok(device)
    }

    /// What the device says it is.
    #[must_use]
    pub fn type_name(&self) -> &str {
        &self.type_name
    }

    fn ioctl(&self, command: u32, key: &mut [u8], value: &mut [u8]) -> Result<(), Errno> {
        let mut request = PvbusReq {
            keylen: (key.len() as u64).into(),
            key: (key.as_mut_ptr().expose_provenance() as u64).into(),
            valuelen: (value.len() as u64).into(),
            value: (value.as_mut_ptr().expose_provenance() as u64).into(),
        };
        // SAFETY: the request is what these commands take; the driver writes to the two buffers, within their lengths, and nowhere else.
        unsafe { self.file.ioctl(command, &mut request) }
    }
}

impl Store for Device {
    fn kind(&self) -> Kind {
        KINDS.into_iter().find(|kind| kind.name() == self.type_name).unwrap_or(Kind::Unknown([0; 12]))
    }

    fn read(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        let mut key = terminated(key)?;
        let mut size = FIRST_SIZE;
        loop {
            let mut value = vec![0; size];
            match self.ioctl(KVREAD, &mut key, &mut value) {
                Ok(()) => return Ok(string(&value).to_vec()),
                Err(Errno::ERANGE) if size < KVOP_MAXSIZE => size *= 2,
                Err(errno) => return Err(refusal(errno)),
            }
        }
    }

    fn write(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        let (mut key, mut value) = (terminated(key)?, terminated(value)?);
        self.file = File::open(self.path.as_bytes(), Access::ReadWrite).map_err(|errno| match errno {
            Errno::EACCES | Errno::EPERM => StoreError::Denied,
            _ => StoreError::Transport("the device cannot be opened for writing"),
        })?;
        self.ioctl(KVWRITE, &mut key, &mut value).map_err(refusal)
    }

    fn list(&mut self, key: &[u8]) -> Result<Vec<Vec<u8>>, StoreError> {
        let names = match self.kind() {
            Kind::Xen => self.read(key)?,
            Kind::HyperV => self.read(&[key.strip_suffix(b"/").unwrap_or(key), b"/"].concat())?,
            _ => return Err(StoreError::Unsupported),
        };
        Ok(names.split(|&byte| byte == b'\n').filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect())
    }
}

impl Opened for Device {
    fn rules(&self) -> &'static str {
        "pvbus devices take strings of less than 64 KiB, without zero bytes, and cannot remove"
    }
}

/// `text` with the zero byte at its end that makes it a string, in a buffer with some room as OpenBSD's hostctl has.
fn terminated(text: &[u8]) -> Result<Vec<u8>, StoreError> {
    if text.contains(&0) {
        return Err(StoreError::BadKey);
    }
    if text.len() >= KVOP_MAXSIZE {
        return Err(StoreError::TooLong);
    }
    let mut buffer = text.to_vec();
    buffer.resize((text.len() + 1).max(FIRST_SIZE), 0);
    Ok(buffer)
}

/// The bytes before the first zero.
fn string(buffer: &[u8]) -> &[u8] {
    buffer.split(|&byte| byte == 0).next().unwrap_or_default()
}

fn refusal(errno: Errno) -> StoreError {
    match errno {
        Errno::ENOENT => StoreError::NotFound,
        Errno::EINVAL => StoreError::BadKey,
        Errno::EEXIST => StoreError::Exists,
        Errno::EACCES | Errno::EPERM => StoreError::Denied,
        Errno::EMSGSIZE | Errno::ENAMETOOLONG | Errno::ERANGE => StoreError::TooLong,
        Errno::EOPNOTSUPP => StoreError::Unsupported,
        Errno::ENOSPC => StoreError::Full,
        Errno::ETIMEDOUT => StoreError::Timeout,
        Errno::ENOMEM => StoreError::NoMemory,
        other => StoreError::Refused(other.to_string()),
    }
}
