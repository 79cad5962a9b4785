//! A client of any XenStore server: over its Unix socket, or over the device by which a guest's kernel passes requests on.
//!
//! ```text
//!   Client ── one request, one reply ──> /run/xenstored/socket, /dev/xen/xenbus
//!      ^ └─ Requests: the same calls inside a transaction, which is begun again when it conflicts
//!      └─ events, in the order they came: next_event waits for one
//! ```
//!
//! Where the server is found is what `xs_open` of xen-project/xen `tools/libs/store/xs.c` does. Calls block; [`AsFd`] is for programs that wait for
//! several things.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path as FilePath, PathBuf};

use abi::xen::xenstore::{Header, NO_TRANSACTION, PAYLOAD_MAX, error as name, op};
use zerocopy::IntoBytes;

use crate::domid::{DomId, decimal};
use crate::perms::Perms;
use crate::store::TxId;
use crate::wire::{self, Next};

/// The device of guests, and of hosts that have no socket.
const DEVICE: &str = "/dev/xen/xenbus";
/// Directory of the socket where XENSTORED_RUNDIR does not say another.
const RUN_DIRECTORY: &str = "/var/run/xenstored";
/// How often a transaction is tried. Servers that let somebody starve have no better end.
const ATTEMPTS: u32 = 1000;
/// Bytes read at a time.
const READ: usize = 16 << 10;

/// Where a server's socket is: XENSTORED_PATH, or `socket` in XENSTORED_RUNDIR, or in Xen's own directory.
pub fn socket_path() -> PathBuf {
    let of_directory = || PathBuf::from(std::env::var_os("XENSTORED_RUNDIR").unwrap_or_else(|| RUN_DIRECTORY.into())).join("socket");
    std::env::var_os("XENSTORED_PATH").map_or_else(of_directory, PathBuf::from)
}

/// Why a call did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection failed or ended.
    #[error("the store's server cannot be reached: {0}")]
    Connection(#[from] io::Error),
    /// The server's answer.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Longer than a message.
    #[error("a request has at most {PAYLOAD_MAX} bytes; this one has {0}")]
    TooLong(usize),
    /// A zero byte in a path or token.
    #[error("paths and tokens have no zero byte")]
    ZeroByte,
    /// No XenStore server says this.
    #[error("the server's answer is not XenStore's: {0}")]
    Foreign(&'static str),
}

/// The server's reasons (`io/xs_wire.h`, `xsd_errors`).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// EINVAL.
    #[error("malformed path or request")]
    Invalid,
    /// ENOENT.
    #[error("no such node, watch, transaction or domain")]
    Missing,
    /// EACCES.
    #[error("permission denied")]
    Denied,
    /// EPERM.
    #[error("the owner cannot be changed")]
    NotPermitted,
    /// EEXIST.
    #[error("exists already")]
    Exists,
    /// ENOSPC.
    #[error("a quota is used up")]
    NoSpace,
    /// E2BIG.
    #[error("too long for a message")]
    TooLong,
    /// EAGAIN.
    #[error("the transaction conflicts with other changes")]
    Conflict,
    /// ENOMEM.
    #[error("out of memory, or a quota ran out inside the transaction")]
    NoMemory,
    /// EBUSY.
    #[error("not possible now")]
    Busy,
    /// EIO.
    #[error("done, but the server could not write it to disk")]
    NotKept,
    /// EROFS.
    #[error("the server cannot write to its disk; nothing was changed")]
    ReadOnly,
    /// ENOSYS.
    #[error("the server has no such operation")]
    NoOperation,
    /// Another name.
    #[error("the server says {0:?}")]
    Other(String),
}

impl Refusal {
    fn of_name(text: &str) -> Refusal {
        match text {
            name::EINVAL => Refusal::Invalid,
            name::ENOENT => Refusal::Missing,
            name::EACCES => Refusal::Denied,
            name::EPERM => Refusal::NotPermitted,
            name::EEXIST => Refusal::Exists,
            name::ENOSPC => Refusal::NoSpace,
            name::E2BIG => Refusal::TooLong,
            name::EAGAIN => Refusal::Conflict,
            name::ENOMEM => Refusal::NoMemory,
            name::EBUSY => Refusal::Busy,
            name::EIO => Refusal::NotKept,
            name::EROFS => Refusal::ReadOnly,
            name::ENOSYS => Refusal::NoOperation,
            other => Refusal::Other(other.into()),
        }
    }
}

impl ClientError {
    fn is_conflict(&self) -> bool {
        matches!(self, ClientError::Refused(Refusal::Conflict))
    }
}

/// What a watch told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchEvent {
    /// What changed, written like the watch's own path.
    pub path: String,
    /// The watch's token.
    pub token: String,
}

/// A connection to a server.
pub struct Client {
    stream: File,
    /// What has arrived of the next messages.
    input: Vec<u8>,
    last_request: u32,
    events: VecDeque<WatchEvent>,
}

impl Client {
    /// Connects to the server that this machine has: its socket (see [`socket_path`]), or else a kernel's device.
    ///
    /// # Errors
    /// When there is neither, or it refuses.
    pub fn open() -> io::Result<Client> {
        match Client::connect(&socket_path()) {
            Err(error) if error.kind() == ErrorKind::NotFound && FilePath::new(DEVICE).exists() => Client::connect(FilePath::new(DEVICE)),
            done => done,
        }
    }

    /// Connects to a socket or a device.
    ///
    /// # Errors
    /// When it is not there or refuses.
    pub fn connect(path: &FilePath) -> io::Result<Client> {
        let stream = if path.metadata()?.file_type().is_socket() {
            File::from(OwnedFd::from(UnixStream::connect(path)?))
        } else {
            OpenOptions::new().read(true).write(true).open(path)?
        };
        Ok(Client { stream, input: Vec::new(), last_request: 0, events: VecDeque::new() })
    }

    /// Does `work` in a transaction, and again from the beginning for as long as that conflicts with what others do.
    ///
    /// # Errors
    /// Those of `work`, after which nothing has happened; those of the commit; [`Refusal::Conflict`] after very many attempts.
    pub fn transaction<T>(&mut self, mut work: impl FnMut(&mut Requests) -> Result<T, ClientError>) -> Result<T, ClientError> {
        for _ in 0..ATTEMPTS {
            let id = self.call(op::TRANSACTION_START, NO_TRANSACTION, &[b"\0"])?;
            let id = id.strip_suffix(b"\0").and_then(decimal).ok_or(ClientError::Foreign("a transaction without a number"))?;
            let result = work(&mut Requests { client: self, tx: id });
            let end: &[u8] = if result.is_ok() { b"T\0" } else { b"F\0" };
            let ended = self.call(op::TRANSACTION_END, id, &[end]);
            match result.and_then(|result| ended.map(|_| result)) {
                Err(error) if error.is_conflict() => {}
                done => return done,
            }
        }
        Err(Refusal::Conflict.into())
    }

    /// Calls outside of transactions.
    fn now(&mut self) -> Requests<'_> {
        Requests { client: self, tx: NO_TRANSACTION }
    }

    /// See [`Requests::read`].
    pub fn read(&mut self, path: &str) -> Result<Vec<u8>, ClientError> {
        self.now().read(path)
    }

    /// See [`Requests::list`].
    pub fn list(&mut self, path: &str) -> Result<Vec<String>, ClientError> {
        self.now().list(path)
    }

    /// See [`Requests::exists`].
    pub fn exists(&mut self, path: &str) -> Result<bool, ClientError> {
        self.now().exists(path)
    }

    /// See [`Requests::perms`].
    pub fn perms(&mut self, path: &str) -> Result<Perms, ClientError> {
        self.now().perms(path)
    }

    /// See [`Requests::write`].
    pub fn write(&mut self, path: &str, value: &[u8]) -> Result<(), ClientError> {
        self.now().write(path, value)
    }

    /// See [`Requests::mkdir`].
    pub fn mkdir(&mut self, path: &str) -> Result<(), ClientError> {
        self.now().mkdir(path)
    }

    /// See [`Requests::remove`].
    pub fn remove(&mut self, path: &str) -> Result<(), ClientError> {
        self.now().remove(path)
    }

    /// See [`Requests::set_perms`].
    pub fn set_perms(&mut self, path: &str, perms: &Perms) -> Result<(), ClientError> {
        self.now().set_perms(path, perms)
    }

    /// Has changes at and below `path` told from now on, each with `token`; the first event comes at once.
    ///
    /// # Errors
    /// [`Refusal::Exists`] for a second watch with the same path and token.
    pub fn watch(&mut self, path: &str, token: &str) -> Result<(), ClientError> {
        self.call(op::WATCH, NO_TRANSACTION, &[string(path)?, b"\0", string(token)?, b"\0"]).map(drop)
    }

    /// Ends a watch. Events that have been sent already still come.
    ///
    /// # Errors
    /// [`Refusal::Missing`].
    pub fn unwatch(&mut self, path: &str, token: &str) -> Result<(), ClientError> {
        self.call(op::UNWATCH, NO_TRANSACTION, &[string(path)?, b"\0", string(token)?, b"\0"]).map(drop)
    }

    /// The next event, waited for.
    ///
    /// # Errors
    /// [`ClientError::Connection`], [`ClientError::Foreign`].
    pub fn next_event(&mut self) -> Result<WatchEvent, ClientError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            self.receive()?;
        }
    }

    /// An event that has arrived during other calls.
    pub fn take_event(&mut self) -> Option<WatchEvent> {
        self.events.pop_front()
    }

    /// The directory of a domain's nodes.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn domain_path(&mut self, domain: DomId) -> Result<String, ClientError> {
        let path = self.call(op::GET_DOMAIN_PATH, NO_TRANSACTION, &[domain.to_string().as_bytes(), b"\0"])?;
        strings(&path)?.pop().ok_or(ClientError::Foreign("no path"))
    }

    /// Asks the server itself: CONTROL, whose commands are each server's own.
    ///
    /// # Errors
    /// [`Refusal::Invalid`] for a command that it does not know.
    pub fn control(&mut self, arguments: &[&str]) -> Result<String, ClientError> {
        let arguments = arguments.iter().map(|argument| string(argument)).collect::<Result<Vec<_>, _>>()?;
        let parts: Vec<&[u8]> = arguments.into_iter().flat_map(|argument| [argument, b"\0"]).collect();
        let answer = self.call(op::CONTROL, NO_TRANSACTION, &parts)?;
        text(answer.strip_suffix(b"\0").unwrap_or(&answer))
    }

    /// Sends a request whose payload is `parts`, and waits for what answers it.
    fn call(&mut self, operation: u32, tx: TxId, parts: &[&[u8]]) -> Result<Vec<u8>, ClientError> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let Some(len) = u32::try_from(length).ok().filter(|_| length <= PAYLOAD_MAX) else { return Err(ClientError::TooLong(length)) };
        self.last_request = self.last_request.wrapping_add(1);
        let header = Header { op: operation.into(), req_id: self.last_request.into(), tx_id: tx.into(), len: len.into() };
        let mut message = header.as_bytes().to_vec();
        parts.iter().for_each(|part| message.extend_from_slice(part));
        self.stream.write_all(&message)?;
        loop {
            let Some((header, payload)) = self.receive()? else { continue };
            // A ring that was taken over may still hold what was meant for somebody else.
            if header.req_id.get() != self.last_request {
                continue;
            }
            return match header.op.get() {
                op::ERROR => {
                    let name = text(payload.strip_suffix(b"\0").unwrap_or(&payload))?;
                    Err(Refusal::of_name(&name).into())
                }
                answered if answered == operation => Ok(payload),
                _ => Err(ClientError::Foreign("a reply to something else")),
            };
        }
    }

    /// Waits for a message. Events are kept; a reply is returned.
    fn receive(&mut self) -> Result<Option<(Header, Vec<u8>)>, ClientError> {
        loop {
            match wire::next(&self.input) {
                Next::Message(header, payload, rest) => {
                    let payload = payload.to_vec();
                    let done = self.input.len() - rest.len();
                    self.input.drain(..done);
                    if header.op.get() != op::WATCH_EVENT {
                        return Ok(Some((header, payload)));
                    }
                    let [path, token] =
                        <[String; 2]>::try_from(strings(&payload)?).map_err(|_| ClientError::Foreign("a malformed event"))?;
                    self.events.push_back(WatchEvent { path, token });
                    return Ok(None);
                }
                Next::Broken => return Err(ClientError::Foreign("a message that is too long")),
                Next::Incomplete => {}
            }
            let before = self.input.len();
            self.input.resize(before + READ, 0);
            let count = self.stream.read(self.input.get_mut(before..).unwrap_or_default());
            self.input.truncate(before + *count.as_ref().unwrap_or(&0));
            match count {
                Ok(0) => return Err(io::Error::from(ErrorKind::UnexpectedEof).into()),
                Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error.into()),
                _ => {}
            }
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The store, as it is now or as a transaction sees it.
pub struct Requests<'a> {
    client: &'a mut Client,
    tx: TxId,
}

impl Requests<'_> {
    /// The value at `path`.
    ///
    /// # Errors
    /// [`ClientError`], here and below.
    pub fn read(&mut self, path: &str) -> Result<Vec<u8>, ClientError> {
        self.ask(op::READ, path)
    }

    /// The names of the nodes directly below `path`. More than a message holds are read in parts, and again if they change meanwhile.
    pub fn list(&mut self, path: &str) -> Result<Vec<String>, ClientError> {
        match self.ask(op::DIRECTORY, path) {
            Ok(names) => strings(&names),
            Err(ClientError::Refused(Refusal::TooLong)) => self.list_in_parts(path),
            Err(error) => Err(error),
        }
    }

    /// Whether there is a node at `path`. What may not be known of is not there.
    pub fn exists(&mut self, path: &str) -> Result<bool, ClientError> {
        match self.ask(op::READ, path) {
            // There is something, and it is long.
            Ok(_) | Err(ClientError::Refused(Refusal::TooLong)) => Ok(true),
            Err(ClientError::Refused(Refusal::Missing | Refusal::Denied)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Who may read and write the node at `path`.
    pub fn perms(&mut self, path: &str) -> Result<Perms, ClientError> {
        let entries = strings(&self.ask(op::GET_PERMS, path)?)?;
        Perms::parse(entries.iter().map(|entry| entry.as_bytes())).map_err(|_| ClientError::Foreign("malformed permissions"))
    }

    /// Sets the value at `path`, and creates the nodes on the way.
    pub fn write(&mut self, path: &str, value: &[u8]) -> Result<(), ClientError> {
        self.client.call(op::WRITE, self.tx, &[string(path)?, b"\0", value]).map(drop)
    }

    /// Creates a node without a value, unless it exists.
    pub fn mkdir(&mut self, path: &str) -> Result<(), ClientError> {
        self.ask(op::MKDIR, path).map(drop)
    }

    /// Removes the node at `path` and all below it.
    pub fn remove(&mut self, path: &str) -> Result<(), ClientError> {
        self.ask(op::RM, path).map(drop)
    }

    /// Changes who may read and write the node at `path`.
    pub fn set_perms(&mut self, path: &str, perms: &Perms) -> Result<(), ClientError> {
        let entries: String = perms.entries().map(|entry| format!("{entry}\0")).collect();
        self.client.call(op::SET_PERMS, self.tx, &[string(path)?, b"\0", entries.as_bytes()]).map(drop)
    }

    fn ask(&mut self, operation: u32, path: &str) -> Result<Vec<u8>, ClientError> {
        self.client.call(operation, self.tx, &[string(path)?, b"\0"])
    }

    /// DIRECTORY_PART: each reply is the list's generation and whole names; an empty name ends the list (`docs/misc/xenstore.txt`).
    fn list_in_parts(&mut self, path: &str) -> Result<Vec<String>, ClientError> {
        let (mut all, mut generation) = (Vec::new(), None);
        loop {
            let offset = all.len().to_string();
            let part = self.client.call(op::DIRECTORY_PART, self.tx, &[string(path)?, b"\0", offset.as_bytes(), b"\0"])?;
            let end = part.iter().position(|byte| *byte == 0).ok_or(ClientError::Foreign("a list without generation"))?;
            let (now, names) = part.split_at(end + 1);
            if generation.as_deref().is_some_and(|before| before != now) {
                all.clear();
                generation = None;
                continue;
            }
            generation = Some(now.to_vec());
            match names {
                [] => return Err(ClientError::Foreign("a list without an end")),
                [names @ .., 0] if matches!(names, [] | [.., 0]) => {
                    all.extend_from_slice(names);
                    return strings(&all);
                }
                names => all.extend_from_slice(names),
            }
        }
    }
}

/// A path, token or argument as it goes before a zero byte.
fn string(text: &str) -> Result<&[u8], ClientError> {
    if text.as_bytes().contains(&0) { Err(ClientError::ZeroByte) } else { Ok(text.as_bytes()) }
}

fn text(bytes: &[u8]) -> Result<String, ClientError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| ClientError::Foreign("names that are no text"))
}

/// Strings, each with its zero byte.
fn strings(bytes: &[u8]) -> Result<Vec<String>, ClientError> {
    match bytes.strip_suffix(b"\0") {
        Some(strings) => strings.split(|byte| *byte == 0).map(text).collect(),
        None if bytes.is_empty() => Ok(Vec::new()),
        None => Err(ClientError::Foreign("a string without end")),
    }
}
