//! The client's end of the control socket: what `vmctl kv`, `stop`, `status` and `sync` speak through.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::protocol::{PROTOCOL, Reply, Request, VERSION};
use xenstored::address::{self, AddressError};

/// How long the server may take for a reply.
const PATIENCE: Duration = Duration::from_secs(10);
/// A socket's time limit cannot be zero.
const SHORTEST: Duration = Duration::from_millis(1);

/// Why there is no reply.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// No connection.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The server closed.
    #[error("{}: the machine has ended", .0.display())]
    Ended(PathBuf),
    /// It says nothing.
    #[error("{}: no answer within {} seconds", .0.display(), PATIENCE.as_secs())]
    Silent(PathBuf),
    /// It speaks something else.
    #[error("{}: not a machine's control socket, or one of another version ({text})", path.display())]
    Foreign {
        /// Where.
        path: PathBuf,
        /// What it said.
        text: String,
    },
    /// It does not want to.
    #[error("{0}")]
    Refused(String),
    /// The host's answer.
    #[error("{}: {source}", path.display())]
    Host {
        /// Where.
        path: PathBuf,
        /// What.
        source: std::io::Error,
    },
}

/// A connection that has been greeted.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<UnixStream>,
    path: PathBuf,
    /// What has been read of the next line.
    line: Vec<u8>,
    /// Changes that were told while a reply was waited for.
    early: VecDeque<Reply>,
}

impl Connection {
    /// Connects to the machine whose control socket is at `path`.
    ///
    /// # Errors
    /// [`ConnectionError`].
    pub fn open(path: &Path) -> Result<Connection, ConnectionError> {
        let stream = address::connect(path)?;
        let mut connection = Connection { stream: BufReader::new(stream), path: path.into(), line: Vec::new(), early: VecDeque::new() };
        connection.set_write_timeout()?;
        match connection.reply()? {
            Reply::Hello { protocol, version } if protocol == PROTOCOL && version == VERSION => Ok(connection),
            Reply::Refused { text, .. } => Err(ConnectionError::Refused(text)),
            other => Err(connection.foreign(format!("{other:?}"))),
        }
    }

    /// Sends a request; its reply. Refusals are replies.
    ///
    /// # Errors
    /// [`ConnectionError`].
    pub fn call(&mut self, request: &Request) -> Result<Reply, ConnectionError> {
        let mut line = serde_json::to_vec(request).map_err(|error| self.host(error.into()))?;
        line.push(b'\n');
        let sent = self.stream.get_mut().write_all(&line);
        match (sent, self.reply()) {
            (_, Ok(reply)) => Ok(reply),
            (Ok(()), Err(error)) => Err(error),
            // A server that has refused the rest of the request may have said why; that was read above.
            (Err(error), Err(_)) if error.kind() == ErrorKind::BrokenPipe => Err(ConnectionError::Ended(self.path.clone())),
            (Err(error), Err(_)) => Err(self.host(error)),
        }
    }

    /// The next line that the server sends by itself; `None` when `deadline` passes first.
    ///
    /// # Errors
    /// [`ConnectionError`].
    pub fn next(&mut self, deadline: Option<Instant>) -> Result<Option<Reply>, ConnectionError> {
        match self.early.pop_front() {
            Some(reply) => Ok(Some(reply)),
            None => self.read(deadline),
        }
    }

    fn read(&mut self, deadline: Option<Instant>) -> Result<Option<Reply>, ConnectionError> {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()).max(SHORTEST));
        self.stream.get_ref().set_read_timeout(left).map_err(|error| self.host(error))?;
        match self.stream.read_until(b'\n', &mut self.line) {
            Ok(_) if self.line.last() == Some(&b'\n') => {
                let line = std::mem::take(&mut self.line);
                serde_json::from_slice(&line).map(Some).map_err(|error| self.foreign(error.to_string()))
            }
            Ok(_) => Err(ConnectionError::Ended(self.path.clone())),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Err(ConnectionError::Ended(self.path.clone())),
            Err(error) => Err(self.host(error)),
        }
    }

    fn reply(&mut self) -> Result<Reply, ConnectionError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.read(Some(deadline))? {
                Some(change @ Reply::Changed { .. }) => self.early.push_back(change),
                Some(reply) => return Ok(reply),
                None => return Err(ConnectionError::Silent(self.path.clone())),
            }
        }
    }

    fn set_write_timeout(&self) -> Result<(), ConnectionError> {
        self.stream.get_ref().set_write_timeout(Some(PATIENCE)).map_err(|error| self.host(error))
    }

    fn host(&self, source: std::io::Error) -> ConnectionError {
        ConnectionError::Host { path: self.path.clone(), source }
    }

    fn foreign(&self, text: String) -> ConnectionError {
        ConnectionError::Foreign { path: self.path.clone(), text }
    }
}
