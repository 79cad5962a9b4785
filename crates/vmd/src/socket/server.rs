//! The server's thread: one poll loop over the listening socket and all clients.

use std::io::{ErrorKind, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::AsFd;
use xenstored::address::{AddressError, Listener};

use super::client::Client;
use super::mailbox::Waker;
use super::protocol::{Refusal, Reply};
use crate::control::Control;

/// Most clients at a time.
pub const MAX_CLIENTS: usize = 16;
/// How long nobody is accepted after the host refused: it has run out of descriptors or memory.
const RELIEF: Duration = Duration::from_millis(100);

/// Why a socket of the machine cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Its name.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The host has no thread or descriptor left.
    #[error("cannot serve the socket: {0}")]
    Host(#[from] std::io::Error),
}

/// A control socket that is being served, until this is dropped.
pub struct Server {
    stop: Arc<AtomicBool>,
    waker: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `control` at `path`.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn start(path: &Path, control: Arc<Control>) -> Result<Server, ServerError> {
        let listener = Listener::bind(path)?;
        let (stop, waker) = (Arc::new(AtomicBool::new(false)), Arc::new(Waker::new()?));
        let service = Service { listener, control, stop: Arc::clone(&stop), waker: Arc::clone(&waker), clients: Vec::new() };
        let thread = std::thread::Builder::new().name("control".into()).spawn(move || service.run())?;
        Ok(Server { stop, waker, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.waker.wake();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

struct Service {
    listener: Listener,
    control: Arc<Control>,
    stop: Arc<AtomicBool>,
    waker: Arc<Waker>,
    clients: Vec<Client>,
}

impl Service {
    fn run(mut self) {
        while !self.stop.load(Ordering::SeqCst) {
            let Ok((newcomer, found)) = self.wait() else { return };
            for (client, found) in self.clients.iter_mut().zip(found) {
                client.on_poll(found);
            }
            if newcomer {
                self.accept();
            }
            for client in &mut self.clients {
                client.advance();
            }
            self.clients.retain(|client| !client.is_gone());
        }
    }

    /// Waits for something to do: whether somebody wants to connect, and what there is of each client.
    fn wait(&self) -> std::io::Result<(bool, Vec<PollFlags>)> {
        let mut polled = vec![PollFd::new(self.waker.as_ref(), PollFlags::IN), PollFd::new(self.listener.socket(), PollFlags::IN)];
        polled.extend(self.clients.iter().map(|client| PollFd::from_borrowed_fd(client.as_fd(), client.interest())));
        match poll(&mut polled, None::<&Timespec>) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok((false, Vec::new())),
            Err(error) => return Err(error.into()),
        }
        let found: Vec<PollFlags> = polled.iter().map(PollFd::revents).collect();
        let (own, clients) = found.split_at(2);
        if own[0].contains(PollFlags::IN) {
            self.waker.rest();
        }
        Ok((own[1].contains(PollFlags::IN), clients.to_vec()))
    }

    fn accept(&mut self) {
        let mut stream = match self.listener.socket().accept() {
            Ok((stream, _)) => stream,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => return,
            Err(_) => return std::thread::sleep(RELIEF),
        };
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        if self.clients.len() >= MAX_CLIENTS && !self.drop_the_idlest() {
            // Best effort: the client learns at least that it is not served.
            let _ = stream.write_all(&Reply::refused(Refusal::Limit, format!("{MAX_CLIENTS} clients are watching already")).to_line());
            return;
        }
        self.clients.push(Client::new(stream, Arc::clone(&self.control), Arc::clone(&self.waker)));
    }

    /// Makes room. Those that watch something may be silent for good reason and stay.
    fn drop_the_idlest(&mut self) -> bool {
        let idle = self.clients.iter().enumerate().filter_map(|(index, client)| Some((client.idle_since()?, index)));
        match idle.min() {
            Some((_, index)) => {
                self.clients.swap_remove(index);
                true
            }
            None => false,
        }
    }
}
