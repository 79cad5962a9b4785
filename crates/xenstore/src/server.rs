//! The wire protocol without I/O: bytes of many connections in, bytes for each of them out.
//!
//! Whoever has the sockets or rings calls [`Server::receive`] with what arrived, sends what [`Server::output`] holds, says so by [`Server::sent`], and asks
//! [`Server::wants_input`] whether to read on. [`Server::take_active`] names the connections that something became of, so that a loop
//! need never look at the others. Messages may be cut at any byte. Requests of a connection are answered in order, events come before the reply to the request
//! that caused them, and no connection can hold up another: see [`output`] for what is bounded and how.
//!
//! What changes keys that outlive the server can be held back until it is written down, see [`journal`](crate::journal).
//!
//! One thing can: a privileged client whose transactions have conflicted [`CONFLICTS_BEFORE_HOLD`] times in a row gets its next one for itself.
//! Until it ends, requests of domains wait, so that no guest can starve the host by writing what the host reads.

mod control;
mod execute;
mod output;

use std::collections::{BTreeSet, HashMap};

use crate::domain::Ring;
use crate::domid::DomId;
use crate::error::Error;
use crate::quota::Quota;
use crate::store::{ClientId, Store};
use crate::watch::Event;
use crate::wire::{self, Next};
pub(crate) use output::Output;
use output::Unsure;

/// Conflicts of a privileged client after which its next transaction runs alone.
pub const CONFLICTS_BEFORE_HOLD: u32 = 4;

/// What the server needs to know from, and tell to, whoever runs the domains.
pub trait Host: Send {
    /// INTRODUCE: `client` is the domain's connection, to be served through the ring. Called again when the domain is introduced again.
    ///
    /// # Errors
    /// Any error refuses the introduction.
    fn introduce(&mut self, domain: DomId, ring: Ring, client: ClientId) -> Result<(), Error> {
        let _ = (domain, ring, client);
        Ok(())
    }

    /// The domain was released and `clients` are closed.
    fn release(&mut self, domain: DomId, clients: &[ClientId]) {
        let _ = (domain, clients);
    }

    /// Whether there is such a domain, introduced or not.
    fn exists(&self, domain: DomId) -> bool {
        let _ = domain;
        true
    }

    /// CONTROL commands that are not the store's own. `None` when it is not the host's either.
    fn control(&mut self, command: &[u8], arguments: &[&[u8]]) -> Option<Result<Answer, Error>> {
        let _ = (command, arguments);
        None
    }
}

/// What a CONTROL command is answered with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A text.
    Now(String),
    /// `OK`, by the process that takes over, or what [`Server::stay`] says.
    OnceTakenOver,
}

/// Nobody runs domains: rings are accepted and never served.
pub struct NoHost;

impl Host for NoHost {}

/// A connection's side of the protocol.
#[derive(Default)]
pub(crate) struct Connection {
    privileged: bool,
    pub(crate) input: Vec<u8>,
    pub(crate) output: Output,
    broken: bool,
    active: bool,
    conflicts: u32,
}

/// Connections that something became of.
#[derive(Default)]
struct Active(Vec<ClientId>);

impl Active {
    fn add(&mut self, client: ClientId, connection: &mut Connection) {
        if !std::mem::replace(&mut connection.active, true) {
            self.0.push(client);
        }
    }
}

/// The store and its connections.
pub struct Server {
    pub(crate) store: Store,
    host: Box<dyn Host>,
    pub(crate) connections: HashMap<ClientId, Connection>,
    rings: HashMap<DomId, ClientId>,
    active: Active,
    /// Privileged client that domains wait for.
    hold: Option<ClientId>,
    waiting: BTreeSet<ClientId>,
    /// Connections with output that is held back.
    held: Vec<ClientId>,
    local_events: Vec<Event>,
}

impl Server {
    /// Serves `store`.
    pub fn new(store: Store, host: Box<dyn Host>) -> Server {
        Server {
            store,
            host,
            connections: HashMap::new(),
            rings: HashMap::new(),
            active: Active::default(),
            hold: None,
            waiting: BTreeSet::new(),
            held: Vec::new(),
            local_events: Vec::new(),
        }
    }

    /// The store, for calls from this process. [`Server::deliver`] what they cause.
    pub fn store(&mut self) -> &mut Store {
        &mut self.store
    }

    /// A new connection: a socket's is the host's and privileged, a ring's is its domain's.
    pub fn connect(&mut self, domain: DomId, privileged: bool) -> ClientId {
        let client = self.store.open(domain, privileged);
        self.connections.insert(client, Connection { privileged, ..Connection::default() });
        client
    }

    /// Takes over a connection of another process.
    pub(crate) fn restore(&mut self, client: ClientId, privileged: bool, ring: Option<DomId>, input: &[u8], output: Output) {
        let connection = Connection { privileged, input: input.to_vec(), output, ..Connection::default() };
        self.connections.insert(client, connection);
        self.rings.extend(ring.map(|domain| (domain, client)));
        self.activate(client);
    }

    /// The connection is gone.
    pub fn disconnect(&mut self, client: ClientId) {
        self.store.close(client);
        self.connections.remove(&client);
        self.rings.retain(|_, ring| *ring != client);
        self.end_hold_of(client);
    }

    /// A guest asks for a fresh start of its ring (`docs/misc/xenstore-ring.txt`, "connection"): what was half sent either way is forgotten, and
    /// so are watches and transactions.
    pub fn reconnect(&mut self, client: ClientId) {
        self.store.reset(client);
        if let Some(connection) = self.connections.get_mut(&client) {
            *connection = Connection { privileged: connection.privileged, ..Connection::default() };
        }
        self.end_hold_of(client);
    }

    /// The connection of the host's own ring, which its kernel uses: as privileged as the host's sockets.
    pub fn introduce_host(&mut self) -> ClientId {
        let client = self.connect(DomId::HOST, true);
        self.rings.insert(DomId::HOST, client);
        client
    }

    /// The connection of an introduced domain's ring, or of the host's own.
    pub fn ring(&self, domain: DomId) -> Option<ClientId> {
        self.rings.get(&domain).copied()
    }

    /// Whether the connection is to be read from, as another request of it would be done at once. Otherwise it must read, or wait, first.
    pub fn wants_input(&self, client: ClientId) -> bool {
        let Some(connection) = self.connections.get(&client) else { return false };
        let held = !connection.privileged && self.hold.is_some();
        let most = if connection.privileged { 0 } else { self.outstanding(client) };
        !connection.broken && !held && connection.output.has_room(most)
    }

    /// Whether the client broke the protocol: its connection is to be closed, its ring to be marked.
    pub fn is_broken(&self, client: ClientId) -> bool {
        self.connections.get(&client).is_none_or(|connection| connection.broken)
    }

    /// Takes bytes that arrived, and does the requests that are complete. What cannot be done now is kept; callers do not read on unless
    /// [`Server::wants_input`], which bounds that to one read.
    pub fn receive(&mut self, client: ClientId, bytes: &[u8]) {
        let Some(connection) = self.connections.get_mut(&client).filter(|connection| !connection.broken) else { return };
        if !connection.input.is_empty() {
            connection.input.extend_from_slice(bytes);
            return self.proceed(client);
        }
        let done = self.process(client, bytes);
        if let (Some(connection), Some(rest)) = (self.connections.get_mut(&client), bytes.get(done..)) {
            connection.input.extend_from_slice(rest);
        }
    }

    /// What is to be sent on the connection.
    pub fn output(&self, client: ClientId) -> &[u8] {
        self.connections.get(&client).map_or(&[], |connection| connection.output.pending())
    }

    /// The first `count` bytes of [`Server::output`] were sent. Requests that waited for room are done.
    pub fn sent(&mut self, client: ClientId, count: usize) {
        let Some(connection) = self.connections.get_mut(&client) else { return };
        connection.output.sent(count);
        if !connection.input.is_empty() {
            self.proceed(client);
        }
    }

    /// Connections that something became of since the last call: there are bytes to send, or it is broken, or gone, or wants input again.
    pub fn take_active(&mut self) -> Vec<ClientId> {
        let clients = std::mem::take(&mut self.active.0);
        clients.iter().for_each(|client| self.rest(*client));
        clients
    }

    /// Whether [`Server::take_active`] would name any.
    pub fn has_active(&self) -> bool {
        !self.active.0.is_empty()
    }

    /// Who serves the connection has just looked at it, and need not be told what became of it so far.
    pub fn attended(&mut self, client: ClientId) {
        self.active.0.retain(|other| *other != client);
        self.rest(client);
    }

    /// Whether domains wait for a privileged client's transaction. Who loops gives it a time limit, and then calls [`Server::end_hold`].
    pub fn is_holding(&self) -> bool {
        self.hold.is_some()
    }

    /// Lets domains go on.
    pub fn end_hold(&mut self) {
        self.hold = None;
        for client in std::mem::take(&mut self.waiting) {
            self.proceed(client);
            self.activate(client);
        }
    }

    /// Puts events that calls to the store caused into the queues of those who watch.
    pub fn deliver(&mut self) {
        let holds_back = self.store.holds_back();
        for event in self.store.take_events() {
            let client = event.watch.client;
            match self.connections.get_mut(&client) {
                Some(connection) => {
                    if holds_back {
                        connection.output.hold();
                        note_held(&mut self.held, client);
                    }
                    connection.output.event(&event);
                    self.active.add(client, connection);
                }
                None => self.local_events.push(event),
            }
        }
    }

    /// What was held back may leave: it is written down, or the requests that made the changes are told that it is not.
    pub(crate) fn release(&mut self, is_kept: bool) {
        for client in std::mem::take(&mut self.held) {
            let Some(connection) = self.connections.get_mut(&client) else { continue };
            if is_kept {
                connection.output.confirm(Unsure::Kept);
            } else {
                connection.output.revoke(Unsure::Kept, |_| Err(Error::NotKept));
            }
            self.active.add(client, connection);
        }
    }

    /// No process takes over after all: tells those who wait for it why.
    pub fn stay(&mut self, why: &str) {
        for (client, connection) in self.connections.iter_mut().filter(|(_, connection)| connection.output.is_unsure(Unsure::TakenOver)) {
            connection.output.revoke(Unsure::TakenOver, |to| {
                to.extend_from_slice(why.as_bytes());
                to.push(0);
                Ok(())
            });
            self.active.add(*client, connection);
        }
    }

    /// Events for clients that are no connections.
    pub fn take_local_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.local_events)
    }

    /// Adds a domain, as INTRODUCE does. Something became of its connection then: the ring is to be served.
    ///
    /// # Errors
    /// [`Error::BadRequest`], and what the [`Host`] says.
    pub fn introduce(&mut self, domain: DomId, ring: Ring) -> Result<ClientId, Error> {
        if !domain.is_machine() || !self.host.exists(domain) {
            return Err(Error::BadRequest);
        }
        let known = self.ring(domain);
        let client = known.unwrap_or_else(|| self.connect(domain, false));
        let done = self.host.introduce(domain, ring, client).and_then(|()| self.store.introduce(domain, ring));
        match done {
            Ok(()) => {
                self.rings.insert(domain, client);
                self.activate(client);
                self.deliver();
                Ok(client)
            }
            Err(error) => {
                if known.is_none() {
                    self.disconnect(client);
                }
                Err(error)
            }
        }
    }

    /// Forgets a domain that is gone, introduced or not, with all that it owns.
    pub fn forget(&mut self, domain: DomId) {
        let closed = self.store.forget(domain);
        self.closed(domain, &closed);
    }

    /// A domain's clients were closed.
    fn closed(&mut self, domain: DomId, clients: &[ClientId]) {
        for client in clients {
            if let Some(mut connection) = self.connections.remove(client) {
                self.active.add(*client, &mut connection);
            }
        }
        self.rings.remove(&domain);
        self.host.release(domain, clients);
        self.deliver();
    }

    /// Does the requests that wait in a connection's input.
    pub(crate) fn proceed(&mut self, client: ClientId) {
        let Some(connection) = self.connections.get_mut(&client) else { return };
        let mut input = std::mem::take(&mut connection.input);
        let done = self.process(client, &input);
        if let Some(connection) = self.connections.get_mut(&client) {
            input.drain(..done);
            input.shrink_to(wire::MESSAGE_MAX);
            connection.input = input;
        }
    }

    /// Does the requests at the start of `bytes` and tells how many bytes they were.
    fn process(&mut self, client: ClientId, bytes: &[u8]) -> usize {
        let mut rest = bytes;
        loop {
            if !self.wants_input(client) {
                if self.hold.is_some() {
                    self.waiting.insert(client);
                }
                break;
            }
            match wire::next(rest) {
                Next::Incomplete => break,
                Next::Broken => {
                    if let Some(connection) = self.connections.get_mut(&client) {
                        connection.broken = true;
                    }
                    self.activate(client);
                    return bytes.len();
                }
                Next::Message(header, payload, behind) => {
                    self.answer(client, &header, payload);
                    rest = behind;
                }
            }
        }
        bytes.len() - rest.len()
    }

    /// How many replies a domain's client may leave unread.
    fn outstanding(&self, client: ClientId) -> usize {
        let domain = self.store.caller(client).map(|caller| caller.domain);
        domain.map_or(0, |domain| self.store.quotas(Some(domain)).get(Quota::Outstanding) as usize)
    }

    fn activate(&mut self, client: ClientId) {
        if let Some(connection) = self.connections.get_mut(&client) {
            self.active.add(client, connection);
        }
    }

    fn rest(&mut self, client: ClientId) {
        if let Some(connection) = self.connections.get_mut(&client) {
            connection.active = false;
        }
    }

    fn end_hold_of(&mut self, client: ClientId) {
        if self.hold == Some(client) {
            self.end_hold();
        }
    }
}

/// Requests of a client come in a row, so this keeps the list short.
fn note_held(held: &mut Vec<ClientId>, client: ClientId) {
    if held.last() != Some(&client) {
        held.push(client);
    }
}
