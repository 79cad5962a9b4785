//! The event loop: one thread, all connections, and only those touched that something became of.
//!
//! The kernel names the sockets and the bells of rings that are ready (epoll(7)), the server names the connections that a request of somebody else
//! concerns, so idle connections cost nothing. A connection is read once and then the others have their turn; it is not read while the server does not want
//! more of it, and it is waited for to read only while something is left to send. What a turn of the loop has changed is written down at its end, once.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};
use xenstore::{ClientId, DomId, Server, SharedStore};

use crate::address::Listener;
use crate::keeper::Keeper;
use crate::ring::{Introduced, Rings};

/// Bytes read at a time: so many requests of a client that never stops do the others wait for.
const READ: usize = 4 << 10;
/// Sockets looked at before the clock is.
const ROUND: usize = 64;
/// How long domains wait at most for a transaction of a client that lost too often.
const HOLD: Duration = Duration::from_secs(1);
/// How long nobody is accepted after the host refused: it has run out of descriptors or memory.
const RELIEF: Duration = Duration::from_millis(100);

/// What epoll says of descriptors that are no connections. Connections are named by their clients' numbers, which begin at 1 and never get there.
const LISTENER: u64 = u64::MAX;
const WAKE: u64 = u64::MAX - 1;
/// The first of those that call the loop's owner; the others are below.
const CALL: u64 = u64::MAX - 2;

/// Why [`Service::run`] came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// This one of the descriptors is readable.
    Called(usize),
    /// No transaction is open.
    Quiet,
    /// The time is over, and transactions are open.
    Late,
}

/// A connection.
struct Socket {
    descriptor: OwnedFd,
    client: ClientId,
    /// What epoll waits for.
    interest: EventFlags,
}

/// The loop, for who pauses it and goes on, or hands it over. Dropped, it closes all connections and removes the socket.
pub struct Service<'a> {
    epoll: Arc<OwnedFd>,
    listener: Option<Listener>,
    store: &'a SharedStore,
    sockets: HashMap<u64, Socket>,
    rings: Rings,
    introductions: Option<Receiver<Introduced>>,
    buffer: Vec<u8>,
    keeper: Option<Keeper>,
    hold_ends: Option<Instant>,
    listens_again: Option<Instant>,
}

impl<'a> Service<'a> {
    /// Serves `store`, to nobody yet. What outlives the server is written down by `keeper`.
    ///
    /// Takes [`SharedStore::set_waker`] for itself, so a store has one such loop.
    ///
    /// # Errors
    /// When the host has no descriptor or memory left.
    pub fn new(store: &'a SharedStore, keeper: Option<Keeper>) -> io::Result<Service<'a>> {
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        // Told once of each writing, nobody has to read it.
        epoll::add(&epoll, &wake, EventData::new_u64(WAKE), EventFlags::IN | EventFlags::ET)?;
        store.set_waker(move || {
            // The counter is full after 2^64 of these.
            let _ = rustix::io::write(&wake, &1u64.to_ne_bytes());
        });
        let (sockets, rings, buffer) = (HashMap::new(), Rings::new(Arc::clone(&epoll)), vec![0; READ]);
        let (listener, introductions, hold_ends, listens_again) = (None, None, None, None);
        Ok(Service { epoll, listener, store, sockets, rings, introductions, buffer, keeper, hold_ends, listens_again })
    }

    /// Serves who connects to `listener`.
    ///
    /// # Errors
    /// When the host has no memory left.
    pub fn listen(&mut self, listener: Listener) -> io::Result<()> {
        epoll::add(&self.epoll, listener.socket(), EventData::new_u64(LISTENER), EventFlags::IN)?;
        self.listener = Some(listener);
        Ok(())
    }

    /// Serves the rings that come from `introductions`, until their domains are released. They are looked for when the server has done something:
    /// what is sent before [`SharedStore::with`] is over that introduced the domain is found.
    pub fn serve_rings(&mut self, introductions: Receiver<Introduced>) {
        self.introductions = Some(introductions);
    }

    /// Takes over a connection that the server knows already.
    ///
    /// # Errors
    /// When the host has no memory left.
    pub fn adopt(&mut self, client: ClientId, descriptor: OwnedFd) -> io::Result<()> {
        let interest = EventFlags::IN;
        epoll::add(&self.epoll, &descriptor, EventData::new_u64(client.number()), interest)?;
        self.sockets.insert(client.number(), Socket { descriptor, client, interest });
        Ok(())
    }

    /// Serves until one of `calls` is readable; with `quiet_by`, also until no transaction is open, but no longer than that. What was done is
    /// written down then.
    ///
    /// # Errors
    /// The host's, after which there is no going on.
    pub fn run(&mut self, calls: &[BorrowedFd], quiet_by: Option<Instant>) -> io::Result<Pause> {
        for (call, number) in calls.iter().zip(0..) {
            epoll::add(&self.epoll, call, EventData::new_u64(CALL - number), EventFlags::IN)?;
        }
        let pause = self.turn_until(calls.len(), quiet_by);
        calls.iter().try_for_each(|call| epoll::delete(&self.epoll, call))?;
        pause
    }

    /// The connections of sockets.
    pub fn connections(&self) -> impl Iterator<Item = (ClientId, BorrowedFd<'_>)> {
        self.sockets.values().map(|socket| (socket.client, socket.descriptor.as_fd()))
    }

    /// Where connections come from.
    pub fn listener(&self) -> Option<&Listener> {
        self.listener.as_ref()
    }

    fn turn_until(&mut self, calls: usize, quiet_by: Option<Instant>) -> io::Result<Pause> {
        let mut ready = Vec::with_capacity(ROUND);
        // What another process left undone.
        self.work(None, |_, _| {});
        loop {
            self.serve_due();
            self.keep();
            if let Some(end) = quiet_by {
                match self.store.with(|server| server.store().has_transactions()) {
                    false => return Ok(Pause::Quiet),
                    true if end <= Instant::now() => return Ok(Pause::Late),
                    true => {}
                }
            }
            let timeout = self.timeout(quiet_by);
            match epoll::wait(&self.epoll, spare_capacity(&mut ready), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let mut called = None;
            for event in ready.drain(..) {
                match event.data.u64() {
                    LISTENER => self.accept(),
                    // Somebody in this process changed something.
                    WAKE => self.work(None, |_, _| {}),
                    number => match usize::try_from(CALL - number) {
                        Ok(call) if call < calls => called = called.or(Some(call)),
                        _ => self.ready(number, event.flags),
                    },
                }
            }
            self.look_at_the_clock()?;
            if let Some(call) = called {
                self.keep();
                return Ok(Pause::Called(call));
            }
        }
    }

    fn timeout(&self, quiet_by: Option<Instant>) -> Option<Timespec> {
        if self.rings.is_due() {
            return Some(Timespec::default());
        }
        let due = self.keeper.as_ref().and_then(Keeper::due);
        let next = self.hold_ends.into_iter().chain(self.listens_again).chain(due).chain(quiet_by).min()?;
        Timespec::try_from(next.saturating_duration_since(Instant::now())).ok()
    }

    fn look_at_the_clock(&mut self) -> io::Result<()> {
        let is_over = |time: &mut Instant| *time <= Instant::now();
        if self.hold_ends.take_if(is_over).is_some() {
            tracing::warn!("a transaction that domains waited for did not end in time");
            self.work(None, |server, _| server.end_hold());
        }
        if self.listens_again.take_if(is_over).is_some()
            && let Some(listener) = &self.listener
        {
            epoll::add(&self.epoll, listener.socket(), EventData::new_u64(LISTENER), EventFlags::IN)?;
        }
        Ok(())
    }

    /// Serves rings, those included that were introduced meanwhile.
    fn serve_due(&mut self) {
        let introduced: Vec<Introduced> = self.introductions.iter().flat_map(Receiver::try_iter).collect();
        for introduced in introduced {
            self.work(None, |server, rings| rings.add(introduced, server));
        }
        if self.rings.is_due() {
            self.work(None, |server, rings| rings.serve(server));
        }
    }

    /// Writes down what has changed. That lets replies leave, which makes room for requests that change more.
    fn keep(&mut self) {
        let Some(mut keeper) = self.keeper.take() else { return };
        let mut did = true;
        while did {
            self.work(None, |server, _| did = keeper.keep(server));
        }
        self.keeper = Some(keeper);
    }

    /// Admits who waits, but not so many that those inside would have to wait.
    fn accept(&mut self) {
        for _ in 0..ROUND {
            let Some(listener) = &self.listener else { return };
            match rustix::net::accept_with(listener.socket(), SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(descriptor) => self.admit(descriptor),
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    tracing::warn!(%error, connections = self.sockets.len(), "cannot accept connections");
                    // Without this the loop would spin, as somebody still waits.
                    let _ = epoll::delete(&self.epoll, listener.socket());
                    self.listens_again = Some(Instant::now() + RELIEF);
                    return;
                }
            }
        }
    }

    fn admit(&mut self, descriptor: OwnedFd) {
        let client = self.store.with(|server| server.connect(DomId::HOST, true));
        let interest = EventFlags::IN;
        if let Err(error) = epoll::add(&self.epoll, &descriptor, EventData::new_u64(client.number()), interest) {
            tracing::warn!(%error, "cannot serve a connection");
            self.store.with(|server| server.disconnect(client));
            return;
        }
        self.sockets.insert(client.number(), Socket { descriptor, client, interest });
    }

    fn ready(&mut self, number: u64, flags: EventFlags) {
        // An earlier event of the same round may have closed it.
        let Some(socket) = self.sockets.get(&number) else { return self.rings.hear(number) };
        let client = socket.client;
        if flags.contains(EventFlags::IN) {
            match rustix::net::recv(&socket.descriptor, self.buffer.as_mut_slice(), RecvFlags::DONTWAIT) {
                Ok((count @ 1.., _)) => {
                    let buffer = std::mem::take(&mut self.buffer);
                    self.work(Some(client), |server, _| server.receive(client, buffer.get(..count).unwrap_or_default()));
                    self.buffer = buffer;
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Ok((0, _)) | Err(_) => self.close(client),
            }
        } else if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            self.close(client);
        } else {
            self.work(Some(client), |_, _| {});
        }
    }

    fn close(&mut self, client: ClientId) {
        self.sockets.remove(&client.number());
        // Who waited for its transaction goes on.
        self.work(None, |server, _| server.disconnect(client));
    }

    /// Works on the server, and attends to `client` and to every socket that something became of. Rings have their turn later.
    fn work(&mut self, client: Option<ClientId>, work: impl FnOnce(&mut Server, &mut Rings)) {
        let Service { epoll, sockets, rings, store, hold_ends, .. } = self;
        store.with(|server| {
            work(server, rings);
            let mut active = server.take_active();
            active.extend(client.filter(|client| !active.contains(client)));
            // Sending makes room for requests that waited, which concern others.
            while !active.is_empty() {
                for client in active {
                    let Some(socket) = sockets.get_mut(&client.number()) else {
                        rings.call(client);
                        continue;
                    };
                    if socket.attend(server, epoll).is_err() {
                        server.disconnect(client);
                        sockets.remove(&client.number());
                    }
                }
                active = server.take_active();
            }
            if !server.is_holding() {
                *hold_ends = None;
            } else if hold_ends.is_none() {
                *hold_ends = Some(Instant::now() + HOLD);
            }
        });
    }
}

impl Drop for Service<'_> {
    fn drop(&mut self) {
        self.store.set_waker(|| {});
        let clients = self.sockets.values().map(|socket| socket.client).chain(self.rings.clients());
        self.store.with(|server| clients.for_each(|client| server.disconnect(client)));
    }
}

impl Socket {
    /// Sends what can be sent, and tells epoll what to wait for.
    ///
    /// # Errors
    /// When the connection is to be closed: its client has gone, broke the protocol, or was released with its domain.
    fn attend(&mut self, server: &mut Server, epoll: &OwnedFd) -> Result<(), Errno> {
        let mut is_full = false;
        while !is_full && !server.output(self.client).is_empty() {
            match rustix::net::send(&self.descriptor, server.output(self.client), SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => server.sent(self.client, count),
                Err(Errno::AGAIN) => is_full = true,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        if server.is_broken(self.client) {
            return Err(Errno::PROTO);
        }
        let mut interest = EventFlags::empty();
        interest.set(EventFlags::IN, server.wants_input(self.client));
        interest.set(EventFlags::OUT, is_full);
        if interest != self.interest {
            epoll::modify(epoll, &self.descriptor, EventData::new_u64(self.client.number()), interest)?;
            self.interest = interest;
        }
        Ok(())
    }
}
