//! One client of the control socket, as the server sees it.
//!
//! What it costs is bounded: one unfinished request of [`MAX_REQUEST`], the reply to one request, and a [`Mailbox`]. Its next request is read
//! when its last reply has been taken, and what it watches is written only then too; changes meanwhile wait in the mailbox, and a client
//! whose mailbox overflows is told so and dropped.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use dialects::store::{Client as Who, Observer, Store as _, StoreError, WatchId};
use rustix::event::PollFlags;
use rustix::fd::{AsFd, BorrowedFd};

use super::mailbox::{Mailbox, Waker};
use super::protocol::{MAX_REQUEST, MAX_WATCHES, Refusal, Reply, Request};
use crate::control::Control;
use crate::hotplug::PlugError;
use crate::kv::{self, JsonValue};

/// Bytes that are read at a time.
const PIECE: usize = 64 << 10;

/// A connected client.
pub(super) struct Client {
    stream: UnixStream,
    control: Arc<Control>,
    /// The beginning of a request.
    input: Vec<u8>,
    /// What the client has not taken yet.
    output: Vec<u8>,
    mailbox: Arc<Mailbox>,
    watches: Vec<WatchId>,
    last_heard: Instant,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Requests are read.
    Open,
    /// The client will send nothing more.
    Listening,
    /// Gone once the output is taken.
    Leaving,
    /// To be dropped.
    Gone,
}

impl Client {
    /// A client that is being greeted. `stream` does not block.
    pub fn new(stream: UnixStream, control: Arc<Control>, waker: Arc<Waker>) -> Client {
        Client {
            stream,
            control,
            input: Vec::new(),
            output: Reply::hello().to_line(),
            mailbox: Arc::new(Mailbox::new(waker)),
            watches: Vec::new(),
            last_heard: Instant::now(),
            state: State::Open,
        }
    }

    /// What to poll for.
    pub fn interest(&self) -> PollFlags {
        match self.state {
            _ if !self.output.is_empty() => PollFlags::OUT,
            State::Open => PollFlags::IN,
            // A hang-up is told in any case.
            _ => PollFlags::empty(),
        }
    }

    /// Takes note of what poll found.
    pub fn on_poll(&mut self, found: PollFlags) {
        if found.intersects(PollFlags::ERR | PollFlags::NVAL) || found.contains(PollFlags::HUP) && !found.contains(PollFlags::IN) {
            self.state = State::Gone;
        } else if found.contains(PollFlags::IN) {
            self.read();
        }
    }

    /// Goes on as far as the client lets us.
    pub fn advance(&mut self) {
        while self.state != State::Gone {
            self.write();
            if !self.output.is_empty() {
                return;
            }
            if self.state == State::Leaving {
                self.state = State::Gone;
            } else if self.mailbox.has_overflowed() {
                self.dismiss(Refusal::Limit, "the watched keys change faster than they are read");
            } else if let Some(path) = self.mailbox.take() {
                self.output = self.changed(path).to_line();
            } else if let Some(line) = self.take_line() {
                self.output = self.answer(&line).to_line();
            } else if self.state == State::Listening && self.watches.is_empty() {
                self.state = State::Gone;
            } else {
                return;
            }
        }
    }

    /// Whether it is to be dropped.
    pub fn is_gone(&self) -> bool {
        self.state == State::Gone
    }

    /// Since when nothing was heard of a client that waits for nothing.
    pub fn idle_since(&self) -> Option<Instant> {
        self.watches.is_empty().then_some(self.last_heard)
    }

    fn read(&mut self) {
        let mut piece = [0; PIECE];
        match self.stream.read(&mut piece) {
            Ok(0) => self.state = State::Listening,
            Ok(n) => {
                self.last_heard = Instant::now();
                self.input.extend_from_slice(&piece[..n]);
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.state = State::Gone,
        }
    }

    fn write(&mut self) {
        while !self.output.is_empty() && self.state != State::Gone {
            match self.stream.write(&self.output) {
                Ok(n) => drop(self.output.drain(..n)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.state = State::Gone,
            }
        }
    }

    /// The next whole request.
    fn take_line(&mut self) -> Option<Vec<u8>> {
        match self.input.iter().position(|&byte| byte == b'\n') {
            Some(end) if end <= MAX_REQUEST => {
                let rest = self.input.split_off(end + 1);
                Some(std::mem::replace(&mut self.input, rest))
            }
            None if self.input.len() <= MAX_REQUEST => None,
            _ => {
                self.dismiss(Refusal::BadRequest, format!("a request has at most {MAX_REQUEST} bytes"));
                None
            }
        }
    }

    fn answer(&mut self, line: &[u8]) -> Reply {
        let request = match serde_json::from_slice(line) {
            Ok(request) => request,
            Err(error) => {
                self.state = State::Leaving;
                return Reply::refused(Refusal::BadRequest, format!("not a request: {error}"));
            }
        };
        let store = self.control.store();
        let done = |result: Result<(), StoreError>| result.map_or_else(Reply::from, |()| Reply::Done);
        match request {
            Request::KvGet { path } => store.read(Who::Host, &path).map_or_else(Reply::from, |bytes| Reply::Value(JsonValue(bytes))),
            Request::KvSet { path, value } => done(store.write(Who::Host, &path, &value.0)),
            Request::KvList { path } => store.list(Who::Host, &path).map_or_else(Reply::from, Reply::Names),
            Request::KvTree { path } => kv::tree(store.as_ref(), &path).map_or_else(Reply::from, Reply::Tree),
            Request::KvRemove { path } => done(store.remove(Who::Host, &path)),
            Request::KvWatch { .. } if self.watches.len() >= MAX_WATCHES => {
                Reply::refused(Refusal::Limit, format!("a connection watches at most {MAX_WATCHES} paths"))
            }
            Request::KvWatch { path } => {
                let mailbox = Arc::clone(&self.mailbox);
                let observer: Observer = Arc::new(move |path| mailbox.put(path));
                match store.watch(&path, observer) {
                    Ok(watch) => {
                        self.watches.push(watch);
                        Reply::Done
                    }
                    Err(error) => error.into(),
                }
            }
            Request::Status => match self.control.status() {
                Some(status) => Reply::Status(Box::new(status)),
                None => Reply::refused(Refusal::NotReady, "the machine is still being made"),
            },
            Request::Ask { wish, via } => self.control.ask(wish, via).map_or_else(Reply::from, Reply::Asked),
            Request::Force { reboot: false } => {
                self.control.stop();
                Reply::Done
            }
            Request::Force { reboot: true } => self.control.reset().map_or_else(Reply::from, |()| Reply::Done),
            Request::Devices => Reply::Devices(self.control.inventory().list()),
            Request::DiskAdd { disk } => {
                let added = disk.parse().map_err(PlugError::Syntax).and_then(|spec| self.control.add_disk(&spec));
                added.map_or_else(Reply::from, Reply::Added)
            }
            Request::NicAdd { nic } => {
                let added = nic.parse().map_err(PlugError::Syntax).and_then(|spec| self.control.add_nic(&spec));
                added.map_or_else(Reply::from, Reply::Added)
            }
            Request::DeviceRemove { device, force } => {
                self.control.remove_device(&device, force).map_or_else(Reply::from, |()| Reply::Done)
            }
        }
    }

    /// The key as it is now.
    fn changed(&self, path: String) -> Reply {
        let value = self.control.store().read(Who::Host, &path).ok().map(JsonValue);
        Reply::Changed { path, value }
    }

    fn dismiss(&mut self, kind: Refusal, text: impl Into<String>) {
        self.forget_watches();
        self.input = Vec::new();
        self.output = Reply::refused(kind, text).to_line();
        self.state = State::Leaving;
    }

    fn forget_watches(&mut self) {
        for watch in self.watches.drain(..) {
            self.control.store().unwatch(watch);
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.forget_watches();
    }
}
