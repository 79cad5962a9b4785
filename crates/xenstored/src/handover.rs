//! A running service as plain data, for the next program in the same process: the server's state, and the numbers of the descriptors that stay open.
//!
//! ```text
//!   Service ── Handover::of ── JSON in a memfd ── execv(3) ── Handover::read ── into_service ──> Service
//! ```
//!
//! Connections, watches, half requests and unsent bytes go on; a transaction that is still open answers EAGAIN at its end ([`xenstore::State`]). The
//! file of persistent keys is not part of it: this program's is closed when it ends, and the next one opens it, but takes the tree from the state.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

use rustix::fs::MemfdFlags;
use rustix::io::FdFlags;
use serde::{Deserialize, Serialize};
use xenstore::{ClientId, Config, Host, NoHost, Server, SharedStore, State, StateError};

use crate::address::{AddressError, Listener};
use crate::serve::Service;

/// What a program prints that could take over a state.
pub const ACCEPTED: &str = "state accepted";

/// Why a service cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// It is no state of this program's.
    #[error("the state of the service cannot be read: {0}")]
    Format(#[from] serde_json::Error),
    /// The store's state.
    #[error(transparent)]
    State(#[from] StateError),
    /// A connection without a socket, or the other way round.
    #[error("the state's connections are not those that have sockets")]
    Connections,
    /// The listening socket.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The host's answer.
    #[error(transparent)]
    Host(#[from] io::Error),
}

/// What the next program gets.
#[derive(Serialize, Deserialize)]
pub struct Handover {
    socket: PathBuf,
    listener: RawFd,
    connections: Vec<(ClientId, RawFd)>,
    state: State,
}

impl Handover {
    /// What there is of `service`.
    pub fn of(service: &Service) -> Handover {
        Handover {
            socket: service.listener.path().into(),
            listener: service.listener.socket().as_raw_fd(),
            connections: service.connections.iter().map(|(client, socket)| (*client, socket.as_raw_fd())).collect(),
            state: service.store.with(|server| server.state()),
        }
    }

    /// Writes it into memory that has a descriptor.
    ///
    /// # Errors
    /// When the host has no memory or descriptor left.
    pub fn write(&self) -> Result<File, HandoverError> {
        let mut file = File::from(rustix::fs::memfd_create("xenstored", MemfdFlags::CLOEXEC).map_err(io::Error::from)?);
        let mut writer = io::BufWriter::new(&file);
        serde_json::to_writer(&mut writer, self)?;
        writer.flush()?;
        drop(writer);
        file.rewind()?;
        Ok(file)
    }

    /// Reads it, and checks all that can be checked.
    ///
    /// # Errors
    /// [`HandoverError`], above all for the state of a program that is too different.
    pub fn read(mut from: impl Read) -> Result<Handover, HandoverError> {
        let mut text = Vec::new();
        from.read_to_end(&mut text)?;
        let handover: Handover = serde_json::from_slice(&text)?;
        let mut named: Vec<u64> = handover.connections.iter().map(|(client, _)| client.number()).collect();
        named.sort_unstable();
        let known = handover.state.connections.iter().filter(|connection| !connection.ring).map(|connection| connection.client.number());
        if known.eq(named) { Ok(handover) } else { Err(HandoverError::Connections) }
    }

    /// Tells whether a service could go on from it.
    ///
    /// # Errors
    /// [`HandoverError`].
    pub fn check(self, config: Config) -> Result<(), HandoverError> {
        Ok(Server::restored(self.state, config, Box::new(NoHost)).map(drop)?)
    }

    /// The service that goes on. `take` gives the descriptors by their numbers.
    ///
    /// # Errors
    /// [`HandoverError`].
    pub fn into_service(
        self,
        config: Config,
        host: Box<dyn Host>,
        take: impl Fn(RawFd) -> io::Result<OwnedFd>,
    ) -> Result<Service, HandoverError> {
        let server = Server::restored(self.state, config, host)?;
        let connections = self.connections.into_iter().map(|(client, number)| Ok((client, take(number)?)));
        Ok(Service {
            connections: connections.collect::<io::Result<_>>()?,
            listener: Listener::resume(take(self.listener)?, self.socket)?,
            store: SharedStore::of(server),
            persistence: None,
        })
    }
}

/// Lets the descriptors of `service` stay open in the next program, or not.
///
/// # Errors
/// The host's.
pub fn keep_open(service: &Service, keep: bool) -> io::Result<()> {
    let sockets = service.connections.iter().map(|(_, socket)| socket.as_fd());
    sockets.chain([service.listener.socket().as_fd()]).try_for_each(|descriptor| keep_one_open(descriptor, keep))
}

/// Lets a descriptor stay open in the next program, or not.
///
/// # Errors
/// The host's.
pub fn keep_one_open(descriptor: BorrowedFd, keep: bool) -> io::Result<()> {
    let flags = if keep { FdFlags::empty() } else { FdFlags::CLOEXEC };
    Ok(rustix::io::fcntl_setfd(descriptor, flags)?)
}
