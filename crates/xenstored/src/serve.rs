//! The event loop: one thread, all connections, and only those touched that something became of.
//!
//! The kernel names the sockets that are ready (epoll(7)), the server names the connections that a request of somebody else concerns, so idle
//! connections cost nothing. Each turn first reads from all that are ready, once each, and then sends. A connection is not read while the server
//! does not want more of it, and it is waited for to send only while something is left.
//!
//! Nothing is sent while the store has changes that are not in the file of [`Persistence`]: what a client was told stays true.

use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};
use xenstore::{ClientId, DomId, Server, SharedStore};

use crate::address::Listener;
use crate::persist::{PersistError, Persistence};

/// Bytes read at a time.
const READ: usize = 16 << 10;
/// Sockets looked at before the clock is.
const ROUND: usize = 64;
/// How long domains wait at most for a transaction of a client that lost too often.
const HOLD: Duration = Duration::from_secs(1);
/// How long nobody is accepted after the host refused: it has run out of descriptors or memory.
const RELIEF: Duration = Duration::from_millis(100);
/// How long a pause waits for transactions to end.
const PAUSE: Duration = Duration::from_secs(1);

/// What epoll says of descriptors that are no connections. Connections are named by their clients' numbers, which begin at 1 and never get there.
const LISTENER: u64 = u64::MAX;
const WAKE: u64 = u64::MAX - 1;
const STOP: u64 = u64::MAX - 2;
const PAUSED: u64 = u64::MAX - 3;

/// Why serving ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The host has no descriptor or memory left.
    #[error(transparent)]
    Host(#[from] io::Error),
    /// What clients did cannot be kept, so none is told that it is done.
    #[error("persistent keys: {0}")]
    Persist(#[from] PersistError),
}

impl From<Errno> for ServeError {
    fn from(error: Errno) -> ServeError {
        ServeError::Host(error.into())
    }
}

/// A store, who it is served to, and where its keys are kept. Between two runs nothing is lost: it can go to another process.
pub struct Service {
    /// Where clients connect.
    pub listener: Listener,
    /// What they get. Its [`SharedStore::set_waker`] is the loop's, so a store has one loop. Rings that other threads serve go on beside it, see
    /// [`Server::set_waker`].
    pub store: SharedStore,
    /// Where keys are kept, if anywhere.
    pub persistence: Option<Persistence>,
    /// Who is connected.
    pub connections: Vec<(ClientId, OwnedFd)>,
}

/// How a run ended well.
pub enum End {
    /// The first descriptor was readable. All connections are closed, and the socket is removed.
    Stopped,
    /// The second one was, and nobody has a transaction open, or some had one for too long.
    Paused(Service),
}

/// Serves `store` to who connects to `listener`, until `stop` is readable.
///
/// # Errors
/// When the host has no descriptor or memory left at the start.
pub fn serve(listener: Listener, store: &SharedStore, stop: impl AsFd) -> Result<(), ServeError> {
    let service = Service { listener, store: store.clone(), persistence: None, connections: Vec::new() };
    service.run(stop.as_fd(), None).map(drop)
}

impl Service {
    /// Serves until `stop` is readable, or `pause` if there is one.
    ///
    /// # Errors
    /// As [`ServeError`] says.
    pub fn run(self, stop: BorrowedFd, pause: Option<BorrowedFd>) -> Result<End, ServeError> {
        let Service { listener, store, persistence, connections } = self;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let watched = [(listener.socket().as_fd(), LISTENER), (wake.as_fd(), WAKE), (stop, STOP)];
        for (descriptor, name) in watched.into_iter().chain(pause.map(|pause| (pause, PAUSED))) {
            epoll::add(&epoll, descriptor, EventData::new_u64(name), EventFlags::IN)?;
        }
        let waker = Arc::clone(&wake);
        store.set_waker(move || {
            // It fails only when the counter is full, and then the loop is woken anyway.
            let _ = rustix::io::write(&*waker, &1u64.to_ne_bytes());
        });
        let mut sockets = HashMap::new();
        for (client, descriptor) in connections {
            epoll::add(&epoll, &descriptor, EventData::new_u64(client.number()), EventFlags::IN)?;
            sockets.insert(client.number(), Socket { descriptor, client, interest: EventFlags::IN });
        }
        let mut service = Loop {
            epoll,
            wake,
            listener,
            persistence,
            sockets,
            buffer: vec![0; READ],
            touched: Vec::new(),
            hold_ends: None,
            listens_again: None,
            pauses: None,
        };
        let done = service.run(&store, pause);
        store.set_waker(|| {});
        let Loop { listener, persistence, sockets, .. } = service;
        if done? == Wish::Pause {
            let connections = sockets.into_values().map(|socket| (socket.client, socket.descriptor)).collect();
            return Ok(End::Paused(Service { listener, store, persistence, connections }));
        }
        store.with(|server| sockets.values().for_each(|socket| server.disconnect(socket.client)));
        Ok(End::Stopped)
    }
}

/// A connection.
struct Socket {
    descriptor: OwnedFd,
    client: ClientId,
    /// What epoll waits for.
    interest: EventFlags,
}

/// What becomes of the loop after a turn.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wish {
    GoOn,
    Stop,
    Pause,
}

struct Loop {
    epoll: OwnedFd,
    wake: Arc<OwnedFd>,
    listener: Listener,
    persistence: Option<Persistence>,
    sockets: HashMap<u64, Socket>,
    buffer: Vec<u8>,
    /// Connections that this turn read from.
    touched: Vec<ClientId>,
    hold_ends: Option<Instant>,
    listens_again: Option<Instant>,
    /// When a pause that was asked for comes at the latest.
    pauses: Option<Instant>,
}

impl Loop {
    fn run(&mut self, store: &SharedStore, pause: Option<BorrowedFd>) -> Result<Wish, ServeError> {
        let mut ready = Vec::with_capacity(ROUND);
        loop {
            let wish = store.with(|server| self.turn(server, &mut ready))?;
            if wish != Wish::GoOn {
                return Ok(wish);
            }
            if let (Some(_), Some(pause)) = (self.pauses, pause) {
                // It stays readable, which is no news any more. A second deletion fails and does not matter.
                let _ = epoll::delete(&self.epoll, pause);
            }
            let timeout = self.timeout();
            match epoll::wait(&self.epoll, spare_capacity(&mut ready), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn turn(&mut self, server: &mut Server, ready: &mut Vec<epoll::Event>) -> Result<Wish, ServeError> {
        for event in ready.drain(..) {
            match event.data.u64() {
                STOP => return Ok(Wish::Stop),
                PAUSED => self.pauses = Some(Instant::now() + PAUSE),
                LISTENER => self.accept(server),
                // Only the readiness is to go; the count says nothing.
                WAKE => drop(rustix::io::read(&*self.wake, &mut [0; 8])),
                number => self.receive(server, number, event.flags),
            }
        }
        self.attend(server)?;
        self.look_at_the_clock(server)?;
        self.keep(server)?;
        let pauses = self.pauses.is_some_and(|latest| !server.store().has_open_transactions() || latest <= Instant::now());
        Ok(if pauses { Wish::Pause } else { Wish::GoOn })
    }

    fn timeout(&self) -> Option<Timespec> {
        let next = self.hold_ends.into_iter().chain(self.listens_again).chain(self.pauses).min()?;
        Timespec::try_from(next.saturating_duration_since(Instant::now())).ok()
    }

    fn look_at_the_clock(&mut self, server: &mut Server) -> Result<(), ServeError> {
        if !server.is_holding() {
            self.hold_ends = None;
        } else if self.hold_ends.is_none() {
            self.hold_ends = Some(Instant::now() + HOLD);
        }
        let is_over = |time: &mut Instant| *time <= Instant::now();
        if self.hold_ends.take_if(is_over).is_some() {
            tracing::warn!("a transaction that domains waited for did not end in time");
            server.end_hold();
            self.attend(server)?;
        }
        if self.listens_again.take_if(is_over).is_some() {
            epoll::add(&self.epoll, self.listener.socket(), EventData::new_u64(LISTENER), EventFlags::IN)?;
        }
        Ok(())
    }

    /// Admits who waits, but not so many that those inside would have to wait.
    fn accept(&mut self, server: &mut Server) {
        for _ in 0..ROUND {
            match rustix::net::accept_with(self.listener.socket(), SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(descriptor) => self.admit(server, descriptor),
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    tracing::warn!(%error, connections = self.sockets.len(), "cannot accept connections");
                    // Without this the loop would spin, as somebody still waits.
                    let _ = epoll::delete(&self.epoll, self.listener.socket());
                    self.listens_again = Some(Instant::now() + RELIEF);
                    return;
                }
            }
        }
    }

    fn admit(&mut self, server: &mut Server, descriptor: OwnedFd) {
        let client = server.connect(DomId::HOST, true);
        let interest = EventFlags::IN;
        if let Err(error) = epoll::add(&self.epoll, &descriptor, EventData::new_u64(client.number()), interest) {
            tracing::warn!(%error, "cannot serve a connection");
            server.disconnect(client);
            return;
        }
        self.sockets.insert(client.number(), Socket { descriptor, client, interest });
    }

    fn receive(&mut self, server: &mut Server, number: u64, flags: EventFlags) {
        // An earlier event of the same turn may have closed it.
        let Some(socket) = self.sockets.get(&number) else { return };
        let client = socket.client;
        if flags.contains(EventFlags::IN) {
            match rustix::net::recv(&socket.descriptor, self.buffer.as_mut_slice(), RecvFlags::DONTWAIT) {
                Ok((count @ 1.., _)) => server.receive(client, self.buffer.get(..count).unwrap_or_default()),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Ok((0, _)) | Err(_) => return self.close(server, client),
            }
        } else if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            return self.close(server, client);
        }
        self.touched.push(client);
    }

    fn close(&mut self, server: &mut Server, client: ClientId) {
        self.sockets.remove(&client.number());
        // Who waited for its transaction goes on.
        server.disconnect(client);
    }

    /// Attends to the connections that were read from, and to all that something became of.
    fn attend(&mut self, server: &mut Server) -> Result<(), ServeError> {
        loop {
            server.deliver();
            let mut active = server.take_active();
            for client in self.touched.drain(..) {
                if !active.contains(&client) {
                    active.push(client);
                }
            }
            if active.is_empty() {
                return Ok(());
            }
            // Sending makes room for requests that waited, which concern others and may change the store.
            for client in active {
                self.keep(server)?;
                let Some(socket) = self.sockets.get_mut(&client.number()) else { continue };
                if socket.attend(server, &self.epoll).is_err() {
                    self.close(server, client);
                }
            }
        }
    }

    /// Makes what was done durable, if it is to be.
    fn keep(&self, server: &mut Server) -> Result<(), ServeError> {
        match &self.persistence {
            Some(persistence) if server.store().has_changed() => Ok(persistence.commit(server.store())?),
            _ => Ok(()),
        }
    }
}

impl Socket {
    /// Sends what can be sent now, and tells epoll what to wait for. What requests that waited for room are answered with is left for the next time:
    /// the server names this connection again.
    ///
    /// # Errors
    /// When the connection is to be closed: its client has gone, broke the protocol, or was released with its domain.
    fn attend(&mut self, server: &mut Server, epoll: &OwnedFd) -> Result<(), Errno> {
        let mut is_full = false;
        let mut left = server.output(self.client).len();
        while left > 0 && !is_full {
            let pending = server.output(self.client);
            match rustix::net::send(&self.descriptor, pending.get(..left).unwrap_or(pending), SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => {
                    server.sent(self.client, count);
                    left = left.saturating_sub(count);
                }
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
