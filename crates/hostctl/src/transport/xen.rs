//! XenStore, by the character device that the kernel's xenbus driver gives to programs: `/dev/xen/xenbus`, formerly `/proc/xen/xenbus`.
//!
//! The device speaks XenStore's wire protocol (xen-project/xen `docs/misc/xenstore.txt`, `xen/include/public/io/xs_wire.h`); the kernel passes
//! the messages on to the host's ring (Linux `drivers/xen/xenbus/xenbus_dev_frontend.c`). Paths without a leading slash are below
//! `/local/domain/<this domain>`. One request is outstanding at a time, watch events come in between.
//!
//! ```text
//!   Store for Connection -> request -> Peer (the device, or a script in tests)
//! ```
//!
//! What comes from the host is checked: a message that is longer than the protocol allows, or an answer to another operation, ends
//! the conversation with an error.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::time::Duration;

use abi::xen::xenstore::{DOMAINS, HEADER_SIZE, Header, NO_TRANSACTION, PAYLOAD_MAX, error as name, op};
use pvbus::{Kind, Nanos, Store, StoreError};
use zerocopy::{FromBytes, IntoBytes};

use super::{Event, Opened};
use crate::error::Error;
use crate::sys::file::{self, Access};
use crate::sys::{Errno, File, time};

/// Where the device is, in the order of preference.
const DEVICES: [&str; 2] = ["/dev/xen/xenbus", "/proc/xen/xenbus"];
/// Events that wait to be asked for; further ones for paths that already wait add nothing, others push the oldest out.
const MAX_EVENTS: usize = 1024;
/// How often a directory that changes while it is being read in parts is begun anew.
const MAX_RESTARTS: usize = 16;
/// Bytes of names in a directory that is believed.
const MAX_DIRECTORY: usize = 16 << 20;

/// Opens this domain's XenStore; each request is given up after `patience`.
///
/// # Errors
/// [`Error::NoStore`] when the kernel has no such device, [`Error::Denied`] when it is not for this user.
pub fn open(patience: Duration) -> Result<Connection<Device>, Error> {
    for path in DEVICES {
        match File::open(path.as_bytes(), Access::ReadWrite) {
            Ok(file) => return Ok(Connection::new(Device(file), patience)),
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

/// The other end: bytes both ways.
pub trait Peer {
    /// Sends `bytes`.
    ///
    /// # Errors
    /// The system's.
    fn send(&mut self, bytes: &[u8]) -> Result<(), Errno>;

    /// Receives some bytes; 0 when there will be none any more. [`Errno::ETIMEDOUT`] at `deadline`.
    ///
    /// # Errors
    /// The system's.
    fn receive(&mut self, buffer: &mut [u8], deadline: Option<Nanos>) -> Result<usize, Errno>;
}

/// The kernel's device.
#[derive(Debug)]
pub struct Device(File);

impl Peer for Device {
    fn send(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        self.0.write_all(bytes)
    }

    fn receive(&mut self, buffer: &mut [u8], deadline: Option<Nanos>) -> Result<usize, Errno> {
        file::wait(&[&self.0], deadline)?;
        self.0.read(buffer)
    }
}

/// A conversation with XenStore.
#[derive(Debug)]
pub struct Connection<P> {
    peer: P,
    patience: Duration,
    /// Bytes that have come and are not a whole message yet.
    inbox: Vec<u8>,
    /// Paths of events that came while something else was wanted.
    events: VecDeque<Vec<u8>>,
}

impl<P: Peer> Connection<P> {
    /// A conversation with `peer`, each answer being awaited for `patience`.
    pub fn new(peer: P, patience: Duration) -> Connection<P> {
        Connection { peer, patience, inbox: Vec::new(), events: VecDeque::new() }
    }

    /// Sends operation `op` with the payload `parts`, and gives the payload of the answer.
    fn request(&mut self, op: u32, parts: &[&[u8]]) -> Result<Vec<u8>, Refusal> {
        let payload = parts.concat();
        let len = u32::try_from(payload.len()).ok().filter(|_| payload.len() <= PAYLOAD_MAX).ok_or(StoreError::TooLong)?;
        let header = Header { op: op.into(), req_id: 0.into(), tx_id: NO_TRANSACTION.into(), len: len.into() };
        let message = [header.as_bytes(), payload.as_slice()].concat();
        self.peer.send(&message).map_err(|_| StoreError::Transport("XenStore does not take requests"))?;
        let deadline = Some(time::after(self.patience));
        loop {
            let (answer, payload) = self.message(deadline)?;
            match answer {
                op::WATCH_EVENT => self.remember(&payload),
                op::ERROR => return Err(Refusal::of(&payload)),
                // The number of the request tells nothing more: there is one at a time, and old kernels do not give it back.
                _ if answer == op => return Ok(payload),
                _ => return Err(StoreError::Transport("XenStore answered another question").into()),
            }
        }
    }

    /// The next message.
    fn message(&mut self, deadline: Option<Nanos>) -> Result<(u32, Vec<u8>), StoreError> {
        loop {
            if let Ok((header, rest)) = Header::read_from_prefix(&self.inbox) {
                let len = usize::try_from(header.len.get()).unwrap_or(usize::MAX);
                if len > PAYLOAD_MAX {
                    return Err(StoreError::Transport("XenStore sent a message longer than its protocol allows"));
                }
                if let Some(payload) = rest.get(..len) {
                    let payload = payload.to_vec();
                    self.inbox.drain(..HEADER_SIZE + len);
                    return Ok((header.op.get(), payload));
                }
            }
            let mut piece = [0; HEADER_SIZE + PAYLOAD_MAX];
            match self.peer.receive(&mut piece, deadline) {
                Ok(0) => return Err(StoreError::Transport("XenStore closed the connection")),
                Ok(count) => self.inbox.extend_from_slice(&piece[..count]),
                Err(Errno::EINTR) => {}
                Err(Errno::ETIMEDOUT) => return Err(StoreError::Timeout),
                Err(_) => return Err(StoreError::Transport("XenStore cannot be read")),
            }
        }
    }

    /// Takes down the event that comes next.
    fn next_event(&mut self, deadline: Option<Nanos>) -> Result<(), StoreError> {
        match self.message(deadline)? {
            (op::WATCH_EVENT, payload) => self.remember(&payload),
            _ => return Err(StoreError::Transport("XenStore answered without a question")),
        }
        Ok(())
    }

    /// Takes down an event: `path|token|`.
    fn remember(&mut self, payload: &[u8]) {
        let path = payload.split(|&byte| byte == 0).next().unwrap_or_default();
        if !self.events.iter().any(|known| known == path) {
            if self.events.len() == MAX_EVENTS {
                self.events.pop_front();
            }
            self.events.push_back(path.to_vec());
        }
    }

    /// A directory of more than one message, in parts: each answer is the node's generation and as many names as fit, an
    /// empty name is the end.
    fn list_in_parts(&mut self, path: &[u8]) -> Result<Vec<Vec<u8>>, StoreError> {
        for _ in 0..MAX_RESTARTS {
            if let Some(names) = self.one_generation(path)? {
                return Ok(names);
            }
        }
        Err(StoreError::Transport("the directory changes faster than it can be listed"))
    }

    fn one_generation(&mut self, path: &[u8]) -> Result<Option<Vec<Vec<u8>>>, StoreError> {
        let mut names = Vec::new();
        let (mut generation, mut offset) = (None, 0);
        loop {
            let answer = self.request(op::DIRECTORY_PART, &[path, b"\0", offset.to_string().as_bytes(), b"\0"])?;
            let mut part = strings(&answer).into_iter();
            let now = part.next();
            if *generation.get_or_insert_with(|| now.clone()) != now {
                return Ok(None);
            }
            let before = offset;
            for name in part {
                if name.is_empty() {
                    return Ok(Some(names));
                }
                offset += name.len() + 1;
                names.push(name);
            }
            if offset == before || offset > MAX_DIRECTORY {
                return Err(StoreError::Transport("XenStore does not come to the end of the directory"));
            }
        }
    }
}

impl<P: Peer + Send> Store for Connection<P> {
    fn kind(&self) -> Kind {
        Kind::Xen
    }

    fn read(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        Ok(self.request(op::READ, &[path(key)?, b"\0"])?)
    }

    fn write(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.request(op::WRITE, &[path(key)?, b"\0", value])?;
        Ok(())
    }

    fn list(&mut self, key: &[u8]) -> Result<Vec<Vec<u8>>, StoreError> {
        let key = match path(key)? {
            // This domain's own directory has no relative name, and guests may not read the root.
            b"" => [DOMAINS.as_bytes(), b"/", &self.read(b"domid")?].concat(),
            key => key.to_vec(),
        };
        match self.request(op::DIRECTORY, &[&key, b"\0"]) {
            Ok(names) => Ok(strings(&names)),
            Err(Refusal::TooBig) => self.list_in_parts(&key),
            Err(Refusal::Other(error)) => Err(error),
        }
    }

    fn remove(&mut self, key: &[u8]) -> Result<(), StoreError> {
        // XenStore is content when there is nothing to remove.
        self.read(key)?;
        self.request(op::RM, &[path(key)?, b"\0"])?;
        Ok(())
    }
}

impl<P: Peer + Send> Opened for Connection<P> {
    fn rules(&self) -> &'static str {
        "XenStore's paths have letters, digits and - / _ @ alone, without a leading slash they are below /local/domain/<this one>; \
         path and value are 4096 bytes at most; what is the host's can only be read"
    }

    fn read_or_list(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        let value = self.read(key)?;
        if value.is_empty() { Ok(self.list(key)?.join(&b'\n')) } else { Ok(value) }
    }

    fn subscribe(&mut self, key: &[u8]) -> Result<(), StoreError> {
        let key = path(key)?;
        self.request(op::WATCH, &[key, b"\0hostctl\0"])?;
        let deadline = Some(time::after(self.patience));
        // XenStore tells of each new watch as if of a change, before or after it answers.
        loop {
            if let Some(at) = self.events.iter().position(|event| event == key) {
                self.events.remove(at);
                return Ok(());
            }
            self.next_event(deadline)?;
        }
    }

    fn wait(&mut self, deadline: Option<Nanos>) -> Result<Event, StoreError> {
        loop {
            if let Some(path) = self.events.pop_front() {
                return Ok(Event::Changed(path));
            }
            match self.next_event(deadline) {
                Err(StoreError::Timeout) => return Ok(Event::TimeOver),
                result => result?,
            }
        }
    }
}

/// Why XenStore refused.
#[derive(Debug)]
enum Refusal {
    /// E2BIG: the answer does not fit a message.
    TooBig,
    /// Anything else.
    Other(StoreError),
}

impl Refusal {
    /// An ERROR message's meaning.
    fn of(payload: &[u8]) -> Refusal {
        let text = String::from_utf8_lossy(payload.strip_suffix(b"\0").unwrap_or(payload)).into_owned();
        Refusal::Other(match text.as_str() {
            name::E2BIG => return Refusal::TooBig,
            name::ENOENT => StoreError::NotFound,
            name::EACCES | name::EPERM => StoreError::Denied,
            name::EINVAL => StoreError::BadKey,
            name::ENOSYS => StoreError::Unsupported,
            name::ENOSPC => StoreError::Full,
            name::ENOMEM => StoreError::NoMemory,
            name::EEXIST => StoreError::Exists,
            _ => StoreError::Refused(text),
        })
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Refusal {
        Refusal::Other(error)
    }
}

impl From<Refusal> for StoreError {
    fn from(refusal: Refusal) -> StoreError {
        match refusal {
            Refusal::TooBig => StoreError::TooLong,
            Refusal::Other(error) => error,
        }
    }
}

/// `key` as XenStore wants a path: without a slash at the end, without zero bytes.
fn path(key: &[u8]) -> Result<&[u8], StoreError> {
    let mut path = key;
    while let [shorter @ .., b'/'] = path {
        path = shorter;
    }
    match path {
        _ if key.contains(&0) => Err(StoreError::BadKey),
        b"" if !key.is_empty() => Ok(b"/"),
        _ => Ok(path),
    }
}

/// Strings that each end with a zero byte.
fn strings(payload: &[u8]) -> Vec<Vec<u8>> {
    match payload.strip_suffix(b"\0").unwrap_or(payload) {
        b"" => Vec::new(),
        payload => payload.split(|&byte| byte == 0).map(<[u8]>::to_vec).collect(),
    }
}

#[cfg(test)]
mod tests;
