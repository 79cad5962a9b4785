//! The ioctls of `/dev/pvbusN`, exactly as pvbus(4) has them.
//!
//! [`Stores`] is what the minor numbers stand for: the interfaces on the bus in OpenBSD's order, each with its store if there is one. The
//! memory of the caller is behind [`UserMemory`], so that a kernel and a CUSE server run the same code.
//!
//! Checks are made in the order of OpenBSD `sys/dev/pv/pvbus.c` (`pvbusioctl`, `pvbusgetstr`). Two of its weak points are mended: a string is
//! read up to its NUL only, and what is copied out never passes the end of the caller's buffer.

use alloc::boxed::Box;
use alloc::vec::Vec;

use abi::pvbus::{KVOP_MAXSIZE, KVREAD, KVTYPE, KVWRITE, PvbusReq};

use crate::detect::Kind;
use crate::errno::Errno;
use crate::store::Store;

/// Strings are read in pieces that end with a page, because the page behind a string need not be there.
const PAGE: usize = 4096;

/// Memory of the process that calls.
pub trait UserMemory {
    /// Fills `bytes` from `address`.
    ///
    /// # Errors
    /// [`BadAddress`] when not all of it can be read.
    fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), BadAddress>;

    /// Stores `bytes` at `address`.
    ///
    /// # Errors
    /// [`BadAddress`] when not all of it can be written.
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), BadAddress>;
}

/// There is no such memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadAddress;

impl From<BadAddress> for Errno {
    fn from(_: BadAddress) -> Errno {
        Errno::EFAULT
    }
}

/// The devices `/dev/pvbus0`, `/dev/pvbus1` and so on.
#[derive(Default)]
pub struct Stores<'h> {
    minors: Vec<(Kind, Option<Box<dyn Store + 'h>>)>,
}

impl<'h> Stores<'h> {
    /// No device.
    #[must_use]
    pub const fn new() -> Stores<'h> {
        Stores { minors: Vec::new() }
    }

    /// Adds an interface, which gets the next minor number. One without a store has a device too: it tells its type.
    pub fn add(&mut self, kind: Kind, store: Option<Box<dyn Store + 'h>>) {
        self.minors.push((kind, store));
    }

    /// Gives the store of an interface that is there. Without such an interface there is no device for it.
    pub fn set(&mut self, kind: Kind, store: Box<dyn Store + 'h>) {
        if let Some((_, slot)) = self.minors.iter_mut().find(|(other, _)| *other == kind) {
            *slot = Some(store);
        }
    }

    /// The interfaces by minor number.
    pub fn kinds(&self) -> impl Iterator<Item = Kind> + '_ {
        self.minors.iter().map(|(kind, _)| *kind)
    }

    /// The store of an interface.
    pub fn store(&mut self, kind: Kind) -> Option<&mut (dyn Store + 'h)> {
        self.minors.iter_mut().find(|(other, _)| *other == kind)?.1.as_deref_mut()
    }

    /// open(2).
    ///
    /// # Errors
    /// [`Errno::ENODEV`] without any interface, [`Errno::ENXIO`] when the number is that of none.
    pub fn open(&self, minor: usize) -> Result<(), Errno> {
        match self.minors.get(minor) {
            Some(_) => Ok(()),
            None if self.minors.is_empty() => Err(Errno::ENODEV),
            None => Err(Errno::ENXIO),
        }
    }

    /// ioctl(2) on a device that was opened for writing or not.
    ///
    /// # Errors
    /// The error number that the caller shall see.
    pub fn ioctl(
        &mut self,
        minor: usize,
        command: u32,
        writable: bool,
        request: &PvbusReq,
        user: &mut dyn UserMemory,
    ) -> Result<(), Errno> {
        self.open(minor)?;
        let (kind, store) = self.minors.get_mut(minor).ok_or(Errno::ENXIO)?;
        let (key, value) = (Buffer::new(request.key.get(), request.keylen.get()), Buffer::new(request.value.get(), request.valuelen.get()));
        match command {
            KVTYPE => return key.copy_out(kind.name().as_bytes(), user, Errno::ENOMEM),
            KVWRITE if !writable => return Err(Errno::EPERM),
            KVREAD | KVWRITE => {}
            _ => return Err(Errno::ENOTTY),
        }
        let store = store.as_deref_mut().ok_or(Errno::ENXIO)?;
        let key = key.copy_in(user)?;
        if command == KVWRITE {
            let new = value.copy_in(user)?;
            store.write(&key, &new).map_err(|error| error.errno())?;
            // What the stores leave in the buffer after writing.
            return value.copy_out(b"", user, Errno::ERANGE);
        }
        value.length()?;
        let found = store.read_or_list(&key).map_err(|error| error.errno())?;
        value.copy_out(string(&found), user, Errno::ERANGE)
    }
}

/// One of the two buffers of a request.
struct Buffer {
    address: u64,
    length: u64,
}

impl Buffer {
    const fn new(address: u64, length: u64) -> Buffer {
        Buffer { address, length }
    }

    /// Its length, if it is one that pvbus(4) takes.
    fn length(&self) -> Result<usize, Errno> {
        match usize::try_from(self.length) {
            Ok(0) => Err(Errno::EINVAL),
            Ok(length @ ..=KVOP_MAXSIZE) => Ok(length),
            _ => Err(Errno::ENAMETOOLONG),
        }
    }

    /// The string in it: up to its NUL, or all of it.
    fn copy_in(&self, user: &mut dyn UserMemory) -> Result<Vec<u8>, Errno> {
        let length = self.length()?;
        let mut bytes = Vec::new();
        let mut piece = [0; PAGE];
        while bytes.len() < length {
            let address = self.address.checked_add(bytes.len() as u64).ok_or(Errno::EFAULT)?;
            let to_page_end = PAGE - usize::try_from(address % PAGE as u64).unwrap_or_default();
            let piece = piece.get_mut(..to_page_end.min(length - bytes.len())).unwrap_or_default();
            user.read(address, piece)?;
            let text = string(piece);
            bytes.extend_from_slice(text);
            if text.len() < piece.len() {
                break;
            }
        }
        Ok(bytes)
    }

    /// Stores a string with its NUL; `short` when it does not fit.
    fn copy_out(&self, text: &[u8], user: &mut dyn UserMemory, short: Errno) -> Result<(), Errno> {
        if self.length <= text.len() as u64 {
            return Err(short);
        }
        let mut bytes = Vec::with_capacity(text.len() + 1);
        bytes.extend_from_slice(text);
        bytes.push(0);
        Ok(user.write(self.address, &bytes)?)
    }
}

/// What a C program takes for the string in `bytes`.
fn string(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}
