//! The conversation: requests and their answers, transactions, watches.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use abi::xen::xenstore::{DOMAINS, HEADER_SIZE, Header, NO_TRANSACTION, PAYLOAD_MAX, error as name, op};
use zerocopy::{FromBytes, IntoBytes};

use super::Peer;
use crate::detect::Kind;
use crate::hal::Nanos;
use crate::store::{Store, StoreError, Watch, found};

/// Events that wait to be asked for; the same path and token waits once, and further ones push the oldest out.
const MAX_EVENTS: usize = 1024;
/// How often a transaction that conflicts is begun anew, and a directory that changes while it is being read in parts.
const MAX_RESTARTS: usize = 16;
/// How the tokens begin of watches that have marks and no events.
const TOKEN: &[u8] = b"pvbus/";
/// Bytes of names in a directory that is believed.
const MAX_DIRECTORY: usize = 16 << 20;

/// A conversation with XenStore.
#[derive(Debug)]
pub struct Client<P> {
    peer: P,
    /// Number of the latest request.
    request: u32,
    /// Bytes that have come and are not a whole message yet.
    inbox: Vec<u8>,
    events: VecDeque<WatchEvent>,
    /// The watches of [`Store::watch`] by number, and whether something changed. They have no events, so that nobody has to take these out.
    marks: BTreeMap<u32, bool>,
    next_mark: u32,
}

/// Something changed at or below a watched path, or the watch is new.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchEvent {
    /// What changed, in the form in which the watch was set: relative or absolute.
    pub path: Vec<u8>,
    /// The watch's token.
    pub token: Vec<u8>,
}

impl<P: Peer> Client<P> {
    /// A conversation with `peer`. Requests are numbered from `first` on.
    #[must_use]
    pub const fn new(peer: P, first: u32) -> Client<P> {
        Client { peer, request: first, inbox: Vec::new(), events: VecDeque::new(), marks: BTreeMap::new(), next_mark: 0 }
    }

    /// The other end.
    pub const fn peer(&mut self) -> &mut P {
        &mut self.peer
    }

    /// Carries out `work` as one step that others see at once or not at all. It is repeated when others were in the way, and undone when it fails.
    ///
    /// # Errors
    /// Those of `work`; [`StoreError::Refused`] when others are always in the way.
    pub fn transaction<T>(&mut self, mut work: impl FnMut(&mut Transaction<'_, P>) -> Result<T, StoreError>) -> Result<T, StoreError> {
        for _ in 0..MAX_RESTARTS {
            let answer = self.request(NO_TRANSACTION, op::TRANSACTION_START, &[b"\0"])?;
            let id = number(&answer).ok_or(StoreError::Transport("XenStore's transaction has no number"))?;
            let done = work(&mut Transaction { client: self, id });
            let end: &[u8] = if done.is_ok() { b"T\0" } else { b"F\0" };
            match self.request(id, op::TRANSACTION_END, &[end]) {
                Err(Refusal::Again) if done.is_ok() => {}
                Err(error) if done.is_ok() => return Err(error.into()),
                _ => return done,
            }
        }
        Err(StoreError::Refused(name::EAGAIN.to_string()))
    }

    /// Asks for events of changes at or below `path`, each with `token`. The first comes at once.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn watch(&mut self, path: &[u8], token: &[u8]) -> Result<(), StoreError> {
        self.request(NO_TRANSACTION, op::WATCH, &[normal(path)?, b"\0", token, b"\0"])?;
        Ok(())
    }

    /// Ends a watch. Events that wait already stay.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] when there is no such watch, and others.
    pub fn unwatch(&mut self, path: &[u8], token: &[u8]) -> Result<(), StoreError> {
        self.request(NO_TRANSACTION, op::UNWATCH, &[normal(path)?, b"\0", token, b"\0"])?;
        Ok(())
    }

    /// Ends all watches and transactions of this domain, of an earlier kernel too. Xen before 4.2 crashes by it; a host that does not says so in
    /// `control/platform-feature-xs_reset_watches`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn reset_watches(&mut self) -> Result<(), StoreError> {
        self.request(NO_TRANSACTION, op::RESET_WATCHES, &[b"\0"])?;
        Ok(())
    }

    /// The next event, waiting for it until `deadline`, which may have passed, or for ever.
    ///
    /// # Errors
    /// [`StoreError::Timeout`] when there is none.
    pub fn next_event(&mut self, deadline: Option<Nanos>) -> Result<WatchEvent, StoreError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            self.receive_event(deadline)?;
        }
    }

    /// Waits for the event of this watch.
    ///
    /// # Errors
    /// As [`Client::next_event`].
    pub fn wait_for(&mut self, path: &[u8], token: &[u8]) -> Result<(), StoreError> {
        let (path, deadline) = (normal(path)?, self.peer.deadline());
        loop {
            if let Some(at) = self.events.iter().position(|event| event.path == path && event.token == token) {
                self.events.remove(at);
                return Ok(());
            }
            self.receive_event(Some(deadline))?;
        }
    }

    fn read_in(&mut self, transaction: u32, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        Ok(self.request(transaction, op::READ, &[normal(key)?, b"\0"])?)
    }

    fn write_in(&mut self, transaction: u32, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.request(transaction, op::WRITE, &[normal(key)?, b"\0", value])?;
        Ok(())
    }

    fn list_in(&mut self, transaction: u32, key: &[u8]) -> Result<Vec<Vec<u8>>, StoreError> {
        let key = match normal(key)? {
            // This domain's own directory has no relative name, and guests may not read the root.
            b"" => [DOMAINS.as_bytes(), b"/", &self.read_in(transaction, b"domid")?].concat(),
            key => key.to_vec(),
        };
        match self.request(transaction, op::DIRECTORY, &[&key, b"\0"]) {
            Ok(names) => Ok(strings(&names)),
            Err(Refusal::TooBig) => self.list_in_parts(transaction, &key),
            Err(error) => Err(error.into()),
        }
    }

    fn remove_in(&mut self, transaction: u32, key: &[u8]) -> Result<(), StoreError> {
        // XenStore is content when there is nothing to remove.
        self.read_in(transaction, key)?;
        self.request(transaction, op::RM, &[normal(key)?, b"\0"])?;
        Ok(())
    }

    /// A directory of more than one message, in parts: each answer is the node's generation and as many names as fit, an
    /// empty name is the end.
    fn list_in_parts(&mut self, transaction: u32, path: &[u8]) -> Result<Vec<Vec<u8>>, StoreError> {
        for _ in 0..MAX_RESTARTS {
            if let Some(names) = self.one_generation(transaction, path)? {
                return Ok(names);
            }
        }
        Err(StoreError::Transport("the directory changes faster than it can be listed"))
    }

    fn one_generation(&mut self, transaction: u32, path: &[u8]) -> Result<Option<Vec<Vec<u8>>>, StoreError> {
        let mut names = Vec::new();
        let (mut generation, mut offset) = (None, 0);
        loop {
            let answer = self.request(transaction, op::DIRECTORY_PART, &[path, b"\0", offset.to_string().as_bytes(), b"\0"])?;
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

    /// Sends operation `op` with the payload `parts`, and gives the payload of the answer.
    fn request(&mut self, transaction: u32, op: u32, parts: &[&[u8]]) -> Result<Vec<u8>, Refusal> {
        let payload = parts.concat();
        let len = u32::try_from(payload.len()).ok().filter(|_| payload.len() <= PAYLOAD_MAX).ok_or(StoreError::TooLong)?;
        self.request = self.request.wrapping_add(1);
        let header = Header { op: op.into(), req_id: self.request.into(), tx_id: transaction.into(), len: len.into() };
        let deadline = self.peer.deadline();
        self.peer.send(&[header.as_bytes(), payload.as_slice()].concat(), deadline)?;
        loop {
            let (header, payload) = self.message(Some(deadline))?;
            match header.op.get() {
                op::WATCH_EVENT => self.remember(&payload),
                // For a request that was given up, or an earlier kernel's.
                _ if self.peer.is_numbered() && header.req_id.get() != self.request => {}
                op::ERROR => return Err(Refusal::of(&payload)),
                answer if answer == op => return Ok(payload),
                _ => return Err(StoreError::Transport("XenStore answered another question").into()),
            }
        }
    }

    /// Takes down the event that comes next.
    fn receive_event(&mut self, deadline: Option<Nanos>) -> Result<(), StoreError> {
        match self.message(deadline)? {
            (header, payload) if header.op.get() == op::WATCH_EVENT => self.remember(&payload),
            // The late answer to a request that was given up.
            _ if self.peer.is_numbered() => {}
            _ => return Err(StoreError::Transport("XenStore answered without a question")),
        }
        Ok(())
    }

    /// The next message.
    fn message(&mut self, deadline: Option<Nanos>) -> Result<(Header, Vec<u8>), StoreError> {
        loop {
            if let Ok((header, rest)) = Header::read_from_prefix(&self.inbox) {
                let len = usize::try_from(header.len.get()).unwrap_or(usize::MAX);
                if len > PAYLOAD_MAX {
                    return Err(StoreError::Transport("XenStore sent a message longer than its protocol allows"));
                }
                if let Some(payload) = rest.get(..len) {
                    let payload = payload.to_vec();
                    self.inbox.drain(..HEADER_SIZE + len);
                    return Ok((header, payload));
                }
            }
            let mut piece = [0; HEADER_SIZE + PAYLOAD_MAX];
            let count = self.peer.receive(&mut piece, deadline)?;
            self.inbox.extend_from_slice(piece.get(..count).unwrap_or_default());
        }
    }

    /// Takes down an event: `path|token|`.
    fn remember(&mut self, payload: &[u8]) {
        let mut parts = payload.split(|&byte| byte == 0).map(<[u8]>::to_vec);
        let event = WatchEvent { path: parts.next().unwrap_or_default(), token: parts.next().unwrap_or_default() };
        if let Some(number) = number_of(&event.token) {
            // Of a watch that has ended already there is nothing to note.
            self.marks.entry(number).and_modify(|mark| *mark = true);
            return;
        }
        if !self.events.contains(&event) {
            if self.events.len() == MAX_EVENTS {
                self.events.pop_front();
            }
            self.events.push_back(event);
        }
    }
}

impl<P: Peer + Send> Store for Client<P> {
    fn kind(&self) -> Kind {
        Kind::Xen
    }

    fn read(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        self.read_in(NO_TRANSACTION, key)
    }

    fn write(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.write_in(NO_TRANSACTION, key, value)
    }

    fn list(&mut self, key: &[u8]) -> Result<Vec<Vec<u8>>, StoreError> {
        self.list_in(NO_TRANSACTION, key)
    }

    fn remove(&mut self, key: &[u8]) -> Result<(), StoreError> {
        self.remove_in(NO_TRANSACTION, key)
    }

    fn read_or_list(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        let value = self.read(key)?;
        if value.is_empty() { Ok(self.list(key)?.join(&b'\n')) } else { Ok(value) }
    }

    fn watch(&mut self, key: &[u8]) -> Result<Watch, StoreError> {
        let number = self.next_mark;
        self.next_mark = number.wrapping_add(1);
        self.marks.insert(number, false);
        let begun = self.watch(key, &token(number)).and_then(|()| found(self.read(key)));
        match begun {
            Ok(seen) => Ok(Watch { key: key.to_vec(), seen, number }),
            Err(error) => {
                self.marks.remove(&number);
                Err(error)
            }
        }
    }

    fn changed(&mut self, watch: &mut Watch) -> Result<Option<Option<Vec<u8>>>, StoreError> {
        for _ in 0..MAX_EVENTS {
            match self.receive_event(Some(0)) {
                Ok(()) => {}
                Err(StoreError::Timeout) => break,
                Err(error) => return Err(error),
            }
        }
        if !self.marks.get_mut(&watch.number).is_some_and(core::mem::take) {
            return Ok(None);
        }
        let now = found(self.read(&watch.key)).inspect_err(|_| {
            // It is to be asked for again.
            self.marks.insert(watch.number, true);
        })?;
        Ok(watch.see(now))
    }

    fn unwatch(&mut self, watch: Watch) -> Result<(), StoreError> {
        self.unwatch(&watch.key, &token(watch.number))?;
        self.marks.remove(&watch.number);
        Ok(())
    }
}

/// The token of a watch of [`Store::watch`].
fn token(number: u32) -> Vec<u8> {
    [TOKEN, number.to_string().as_bytes()].concat()
}

/// The number in such a token.
fn number_of(token: &[u8]) -> Option<u32> {
    core::str::from_utf8(token.strip_prefix(TOKEN)?).ok()?.parse().ok()
}

/// A transaction that is under way.
#[derive(Debug)]
pub struct Transaction<'c, P> {
    client: &'c mut Client<P>,
    id: u32,
}

impl<P: Peer> Transaction<'_, P> {
    /// As [`Store::read`].
    ///
    /// # Errors
    /// [`StoreError`], here and below.
    pub fn read(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        self.client.read_in(self.id, key)
    }

    /// As [`Store::write`].
    ///
    /// # Errors
    /// As above.
    pub fn write(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.client.write_in(self.id, key, value)
    }

    /// As [`Store::list`].
    ///
    /// # Errors
    /// As above.
    pub fn list(&mut self, key: &[u8]) -> Result<Vec<Vec<u8>>, StoreError> {
        self.client.list_in(self.id, key)
    }

    /// As [`Store::remove`].
    ///
    /// # Errors
    /// As above.
    pub fn remove(&mut self, key: &[u8]) -> Result<(), StoreError> {
        self.client.remove_in(self.id, key)
    }
}

/// Why XenStore refused.
#[derive(Debug)]
enum Refusal {
    /// E2BIG: the answer does not fit a message.
    TooBig,
    /// EAGAIN: another one was in the transaction's way.
    Again,
    /// Anything else.
    Other(StoreError),
}

impl Refusal {
    /// An ERROR message's meaning.
    fn of(payload: &[u8]) -> Refusal {
        let text = String::from_utf8_lossy(payload.strip_suffix(b"\0").unwrap_or(payload)).into_owned();
        Refusal::Other(match text.as_str() {
            name::E2BIG => return Refusal::TooBig,
            name::EAGAIN => return Refusal::Again,
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
            Refusal::Again => StoreError::Refused(name::EAGAIN.to_string()),
            Refusal::Other(error) => error,
        }
    }
}

/// `key` as XenStore wants a path: without a slash at the end, without zero bytes.
fn normal(key: &[u8]) -> Result<&[u8], StoreError> {
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

/// A decimal number that ends with a zero byte.
fn number(payload: &[u8]) -> Option<u32> {
    core::str::from_utf8(payload.strip_suffix(b"\0").unwrap_or(payload)).ok()?.parse().ok()
}
