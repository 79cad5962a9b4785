//! One character device: requests of the kernel in, answers out, without I/O.
//!
//! An ioctl's argument points to a request that points to buffers, and the kernel copies the caller's memory only where it is told to. So the
//! server asks in rounds: run pvbus' ioctl on the memory that is there; when it wants more, answer RETRY with the list of
//! all pieces so far and that one; the kernel asks again, with their contents in the order of the list.
//!
//! ```text
//!   ioctl(fd, KVREAD, arg)  ->  nothing is there            ->  RETRY in: [arg, 32]
//!                           ->  the request                 ->  RETRY in: [arg, 32] [key, to the page's end]  out: [value]
//!                           ->  the request, some key       ->  one piece more, until the key's NUL is there
//!                           ->  all of it                   ->  the store is read: the value to copy out
//! ```
//!
//! Nothing is kept between rounds: pvbus asks for the same pieces in the same order, so what is there tells which they are. A caller that
//! changes its memory meanwhile gets another key or another error, as on OpenBSD.

use alloc::format;
use alloc::vec::Vec;

use abi::pvbus::{KVOP_MAXSIZE, KVREAD, KVTYPE, KVWRITE, PvbusReq};
use pvbus::Errno;
use pvbus::ioctl::{BadAddress, Stores, UserMemory};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::fuse::{
    CUSE_INIT, CUSE_UNRESTRICTED_IOCTL, CuseInitIn, CuseInitOut, FOPEN_NONSEEKABLE, INTERRUPT, IOCTL, IOCTL_MAX_IOV, IOCTL_RETRY, InHeader,
    IoctlIn, IoctlIovec, IoctlOut, MINOR_VERSION, OPEN, OpenIn, OpenOut, OutHeader, READ, RELEASE, VERSION, WRITE,
};

/// `fh` of a file that was opened for writing.
const WRITABLE: u64 = 1;
/// `O_ACCMODE` and `O_RDONLY` (Linux `include/uapi/asm-generic/fcntl.h`).
const ACCESS_MODE: u32 = 3;
const READ_ONLY: u32 = 0;
/// Linux' number for an operation that a device does not have at all.
const ENOSYS: i32 = 38;

/// The device of one interface.
#[derive(Debug, Clone, Copy)]
pub struct Device {
    minor: u32,
    /// 0 for one that the kernel has free.
    major: u32,
}

impl Device {
    /// The device of the interface number `minor`.
    #[must_use]
    pub const fn new(minor: u32, major: u32) -> Device {
        Device { minor, major }
    }

    /// The answer to a request of the kernel; `None` where there is none to give.
    pub fn on(&self, request: &[u8], stores: &mut Stores<'_>) -> Option<Vec<u8>> {
        let (header, body) = InHeader::read_from_prefix(request).ok()?;
        let result = match header.opcode.get() {
            CUSE_INIT => self.init(body),
            OPEN => self.open(body, stores),
            IOCTL => self.ioctl(body, stores),
            RELEASE => Ok(Vec::new()),
            INTERRUPT => return None,
            READ | WRITE => Err(Errno::ENODEV.linux()),
            _ => Err(ENOSYS),
        };
        let (error, body) = match result {
            Ok(body) => (0, body),
            Err(errno) => (-errno, Vec::new()),
        };
        let len = u32::try_from(size_of::<OutHeader>() + body.len()).ok()?;
        let header = OutHeader { len: len.into(), error: error.into(), unique: header.unique };
        Some([header.as_bytes(), &body].concat())
    }

    fn init(&self, body: &[u8]) -> Result<Vec<u8>, i32> {
        let (kernel, _) = CuseInitIn::read_from_prefix(body).map_err(|_| Errno::EINVAL.linux())?;
        if kernel.major.get() != VERSION || kernel.flags.get() & CUSE_UNRESTRICTED_IOCTL == 0 {
            return Err(Errno::EOPNOTSUPP.linux());
        }
        let answer = CuseInitOut {
            major: VERSION.into(),
            minor: MINOR_VERSION.into(),
            flags: CUSE_UNRESTRICTED_IOCTL.into(),
            max_read: 4096.into(),
            max_write: 4096.into(),
            dev_major: self.major.into(),
            dev_minor: self.minor.into(),
            ..CuseInitOut::new_zeroed()
        };
        Ok([answer.as_bytes(), format!("DEVNAME=pvbus{}\0", self.minor).as_bytes()].concat())
    }

    fn open(&self, body: &[u8], stores: &Stores<'_>) -> Result<Vec<u8>, i32> {
        let (open, _) = OpenIn::read_from_prefix(body).map_err(|_| Errno::EINVAL.linux())?;
        stores.open(self.minor as usize).map_err(Errno::linux)?;
        let writable = open.flags.get() & ACCESS_MODE != READ_ONLY;
        let answer = OpenOut { fh: u64::from(writable).into(), open_flags: FOPEN_NONSEEKABLE.into(), padding: 0.into() };
        Ok(answer.as_bytes().to_vec())
    }

    fn ioctl(&self, body: &[u8], stores: &mut Stores<'_>) -> Result<Vec<u8>, i32> {
        let (ioctl, copied) = IoctlIn::read_from_prefix(body).map_err(|_| Errno::EINVAL.linux())?;
        let command = ioctl.cmd.get();
        let mut memory = Copied { rest: copied, room: ioctl.out_size.get() as usize, pieces: Vec::new(), lacks: false, out: Vec::new() };
        let mut request = PvbusReq::new_zeroed();
        let known = [KVREAD, KVWRITE, KVTYPE].contains(&command);
        let result = match known {
            true => memory.read(ioctl.arg.get(), request.as_mut_bytes()).map_err(Errno::from),
            false => Ok(()),
        };
        let writable = ioctl.fh.get() & WRITABLE != 0;
        let result = result.and_then(|()| stores.ioctl(self.minor as usize, command, writable, &request, &mut memory));
        match result {
            Ok(()) => Ok([IoctlOut::new_zeroed().as_bytes(), &memory.out].concat()),
            Err(Errno::EFAULT) if memory.lacks && memory.pieces.len() < IOCTL_MAX_IOV => Ok(retry(&memory.pieces, room(command, &request))),
            Err(errno) => Err(errno.linux()),
        }
    }
}

/// The caller's memory, as far as the kernel has copied it.
struct Copied<'a> {
    /// Contents of the pieces that nobody has asked for yet in this round.
    rest: &'a [u8],
    /// How much can be copied out.
    room: usize,
    /// Pieces that have been asked for in this round.
    pieces: Vec<IoctlIovec>,
    /// Whether the last of them, or room, is not there.
    lacks: bool,
    /// What shall be copied out.
    out: Vec<u8>,
}

impl UserMemory for Copied<'_> {
    fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), BadAddress> {
        self.pieces.push(IoctlIovec { base: address.into(), len: (bytes.len() as u64).into() });
        match self.rest.split_at_checked(bytes.len()) {
            Some((piece, rest)) => {
                bytes.copy_from_slice(piece);
                self.rest = rest;
                Ok(())
            }
            None => {
                self.lacks = true;
                Err(BadAddress)
            }
        }
    }

    fn write(&mut self, _: u64, bytes: &[u8]) -> Result<(), BadAddress> {
        if bytes.len() > self.room {
            self.lacks = true;
            return Err(BadAddress);
        }
        self.out = bytes.to_vec();
        Ok(())
    }
}

/// Where a command's answer goes: the one buffer that it copies out to. Only as much of it is touched as there is to copy.
fn room(command: u32, request: &PvbusReq) -> Option<IoctlIovec> {
    let (base, len) = match command {
        KVREAD => (request.value, request.valuelen.get()),
        KVTYPE => (request.key, request.keylen.get()),
        // The NUL.
        _ => (request.value, request.valuelen.get().min(1)),
    };
    let len = len.min(KVOP_MAXSIZE as u64);
    (len > 0).then_some(IoctlIovec { base, len: len.into() })
}

/// The answer that asks for another round.
fn retry(pieces: &[IoctlIovec], room: Option<IoctlIovec>) -> Vec<u8> {
    let out_iovs = u32::from(room.is_some());
    let in_iovs = u32::try_from(pieces.len()).unwrap_or(u32::MAX);
    let answer = IoctlOut { result: 0.into(), flags: IOCTL_RETRY.into(), in_iovs: in_iovs.into(), out_iovs: out_iovs.into() };
    [answer.as_bytes(), pieces.as_bytes(), room.as_slice().as_bytes()].concat()
}

#[cfg(test)]
mod tests;
