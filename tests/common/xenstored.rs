//! A running `xenstored`, and a client that speaks the wire protocol byte by byte.
#![allow(dead_code, clippy::unwrap_used, reason = "for tests, each of which uses its own part")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use abi::xen::xenstore::{Header, op};
use rustix::process::{Pid, Signal, kill_process};
use xenstore::client::Client;
use zerocopy::{FromBytes, IntoBytes};

/// For what takes moments.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A running `xenstored` that writes its log to a file, with all it has in one directory.
pub struct Daemon {
    pub child: Child,
    directory: PathBuf,
}

impl Daemon {
    /// Starts it, and waits until it serves.
    pub fn start(directory: &Path, more: &[&str]) -> Daemon {
        Daemon::of(Command::new(env!("CARGO_BIN_EXE_xenstored")), directory, more)
    }

    /// As [`Daemon::start`], by a command that runs it.
    pub fn of(mut command: Command, directory: &Path, more: &[&str]) -> Daemon {
        let log = std::fs::File::options().create(true).append(true).open(directory.join("log")).unwrap();
        command.args(arguments(directory, more)).current_dir(directory).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut daemon = Daemon { child: command.spawn().unwrap(), directory: directory.into() };
        eventually(|| {
            let ended = daemon.child.try_wait().unwrap();
            assert_eq!(ended, None, "{}", daemon.log());
            Client::connect(&daemon.socket()).is_ok()
        });
        daemon
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.join("socket")
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.socket()).unwrap()
    }

    pub fn raw(&self) -> Raw {
        Raw::connect(&self.socket())
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Ends it by `signal`.
    pub fn end(mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        self.child.wait().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The command line of a daemon in `directory`.
pub fn arguments(directory: &Path, more: &[&str]) -> Vec<String> {
    let socket = directory.join("socket").to_str().unwrap().to_owned();
    ["--socket".to_owned(), socket].into_iter().chain(more.iter().map(|&argument| argument.to_owned())).collect()
}

/// A connection whose bytes a test chooses.
pub struct Raw(pub UnixStream);

impl Raw {
    pub fn connect(socket: &Path) -> Raw {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Raw(stream)
    }

    pub fn send(&mut self, operation: u32, tx: u32, payload: &[u8]) {
        self.0.write_all(&message(operation, tx, payload)).unwrap();
    }

    /// The next message: its operation and payload.
    pub fn receive(&mut self) -> (u32, Vec<u8>) {
        let mut header = [0; size_of::<Header>()];
        self.0.read_exact(&mut header).unwrap();
        let header = Header::read_from_bytes(&header).unwrap();
        let mut payload = vec![0; header.len.get() as usize];
        self.0.read_exact(&mut payload).unwrap();
        (header.op.get(), payload)
    }

    pub fn call(&mut self, operation: u32, tx: u32, payload: &[u8]) -> Result<Vec<u8>, String> {
        self.send(operation, tx, payload);
        match self.receive() {
            (op::ERROR, name) => Err(String::from_utf8(name).unwrap().trim_end_matches('\0').to_owned()),
            (answered, payload) => {
                assert_eq!(answered, operation);
                Ok(payload)
            }
        }
    }
}

pub fn message(operation: u32, tx: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    let header = Header { op: operation.into(), req_id: 7.into(), tx_id: tx.into(), len: len.into() };
    [header.as_bytes(), payload].concat()
}

#[track_caller]
pub fn eventually(mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "it did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}
