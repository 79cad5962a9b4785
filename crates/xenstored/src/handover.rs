//! Live upgrade: the program is replaced in the same process, and its clients do not notice.
//!
//! ```text
//!   this program                       the new one
//!   state ──> memfd ── --resume N --check ──> a child reads it and says ACCEPTED, or why not
//!             memfd ── --resume N, exec ────> goes on with the same descriptors, process number and pid file
//! ```
//!
//! What a child of the new program has not accepted is not executed, so that a program that is none, or cannot make sense of the state,
//! leaves this one running. Descriptors of connections pass by staying open; all others close on the way. The state is the server's
//! [`State`] and the numbers of the descriptors, as JSON.
#![allow(unsafe_code)] // Descriptors that another program left open are named by numbers.

use std::collections::{BTreeMap, HashSet};
use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;
use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use serde::{Deserialize, Serialize};
use xenstore::{ClientId, Config, DomId, NoHost, Server, State};
use xenstored::ring::Line;
use xenstored::{Listener, Service};

use crate::process::PidFile;
use crate::xen::{Bound, Xen};

/// Version of [`Handover`].
const VERSION: u32 = 1;
/// What a child that was asked to check says, and nothing else.
pub const ACCEPTED: &str = "xenstored: state accepted\n";
/// How long it may take for that.
const CHECK: Duration = Duration::from_secs(30);
/// Most bytes of what else it says that are reported.
const REPORTED: usize = 1000;

/// What is handed over.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Handover {
    version: u32,
    state: State,
    listener: Named,
    /// Device and inode of the listener's name.
    identity: (u64, u64),
    pid_file: Option<Named>,
    connections: BTreeMap<u64, RawFd>,
    /// Rings that are served. Older programs have none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    rings: BTreeMap<DomId, Bound>,
}

/// A descriptor that has a name in the file system.
#[derive(Serialize, Deserialize)]
struct Named {
    descriptor: RawFd,
    path: PathBuf,
}

/// What the new program goes on with.
pub struct Resumed {
    /// Of the server.
    pub state: State,
    /// Where connections come from.
    pub listener: Listener,
    /// With this process' number in it.
    pub pid_file: Option<PidFile>,
    /// Each client of the state, and its connection.
    pub connections: Vec<(ClientId, OwnedFd)>,
    /// Each ring that was served: its client, and its event channel with this side's port.
    pub rings: Vec<(DomId, ClientId, OwnedFd, u32)>,
}

/// The program to go on as.
pub struct Successor {
    /// Where it is.
    pub program: PathBuf,
    /// Its command line, to which what this module needs is added.
    pub arguments: Vec<String>,
    /// Where this program was started, which relative paths there mean.
    pub directory: PathBuf,
}

/// Replaces this program. Comes back only when that failed, with the reason.
pub fn hand_over(to: &Successor, service: &Service, xen: Option<&Xen>, pid_file: Option<&PidFile>, server: &Server) -> anyhow::Error {
    match try_to(to, service, xen, pid_file, server) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn try_to(to: &Successor, service: &Service, xen: Option<&Xen>, pid_file: Option<&PidFile>, server: &Server) -> anyhow::Result<Infallible> {
    let listener = service.listener().context("there is no socket to hand over")?;
    let named = |file: &PidFile| Named { descriptor: file.as_fd().as_raw_fd(), path: file.path().into() };
    let lines = xen.map(Xen::served).unwrap_or_default();
    let handover = Handover {
        version: VERSION,
        state: server.state(),
        listener: Named { descriptor: listener.socket().as_raw_fd(), path: listener.path().into() },
        identity: listener.identity(),
        pid_file: pid_file.map(named),
        connections: service.connections().map(|(client, descriptor)| (client.number(), descriptor.as_raw_fd())).collect(),
        rings: lines.iter().map(|(domain, line)| (*domain, line.bound())).collect(),
    };
    let mut state = File::from(rustix::fs::memfd_create("xenstored", MemfdFlags::CLOEXEC)?);
    serde_json::to_writer(io::BufWriter::new(&state), &handover)?;
    state.rewind()?;
    inherit(&state, true)?;
    check(to, &state)?;
    state.rewind()?;
    let mut descriptors = vec![listener.socket().as_fd()];
    descriptors.extend(lines.iter().map(|(_, line)| line.bell()));
    descriptors.extend(pid_file.map(AsFd::as_fd));
    descriptors.extend(service.connections().map(|(_, descriptor)| descriptor));
    let error = match descriptors.iter().try_for_each(|descriptor| inherit(descriptor, true)) {
        Ok(()) => to.command(&state).exec(),
        Err(error) => error,
    };
    // Nothing is to be done about one that stays open in children.
    descriptors.iter().for_each(|descriptor| drop(inherit(descriptor, false)));
    Err(error).with_context(|| to.program.display().to_string())
}

/// Whether a descriptor stays open in the program that is executed.
fn inherit(descriptor: impl AsFd, is_kept: bool) -> io::Result<()> {
    Ok(fcntl_setfd(descriptor, if is_kept { FdFlags::empty() } else { FdFlags::CLOEXEC })?)
}

impl Successor {
    fn command(&self, state: &File) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).arg("--resume").arg(state.as_raw_fd().to_string()).current_dir(&self.directory);
        command
    }
}

/// Lets a child of the new program read the state.
fn check(to: &Successor, state: &File) -> anyhow::Result<()> {
    let program = || to.program.display().to_string();
    let (mut from, into) = io::pipe()?;
    let mut command = to.command(state);
    command.arg("--check").stdin(Stdio::null()).stdout(into.try_clone()?).stderr(into);
    let mut child = command.spawn().with_context(program)?;
    // It has the only ends of the pipe to write to.
    drop(command);
    let said = read_until(&mut from, Instant::now() + CHECK);
    // It has ended, or has had its time.
    let _ = child.kill();
    child.wait()?;
    let said = said.with_context(program)?;
    if said == ACCEPTED.as_bytes() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&said);
    let why = if said.is_empty() { "it said nothing" } else { said.trim_end() };
    bail!("{} does not take over: {why}", program());
}

/// The beginning of what is said until the end, which comes in time.
fn read_until(from: &mut io::PipeReader, end: Instant) -> io::Result<Vec<u8>> {
    let (mut said, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let left = Timespec::try_from(end.saturating_duration_since(Instant::now())).map_err(io::Error::other)?;
        let ready = poll(&mut [PollFd::new(&*from, PollFlags::IN)], Some(&left))?;
        if ready == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match from.read(&mut buffer)? {
            0 => return Ok(said),
            count => said.extend(buffer.iter().take(count.min(REPORTED - said.len()))),
        }
    }
}

/// Says whether this program can go on from the state in descriptor `number`, as [`check`] asks.
///
/// # Errors
/// Why not.
pub fn accept(number: RawFd) -> anyhow::Result<()> {
    let handover = read(number)?;
    clients(&handover)?;
    Server::restored(handover.state, Config::default(), Box::new(NoHost))?;
    io::stdout().write_all(ACCEPTED.as_bytes())?;
    Ok(())
}

/// Takes over what is in descriptor `number`. To be called before this program opens anything.
///
/// # Errors
/// When it is no state, or descriptors are not what it says.
pub fn resume(number: RawFd) -> anyhow::Result<Resumed> {
    let handover = read(number)?;
    let clients = clients(&handover)?;
    let mut taken = HashSet::from([number]);
    let mut take = |number: RawFd| {
        ensure!(taken.insert(number), "descriptor {number} is handed over twice");
        take(number)
    };
    let connections = clients.into_iter().map(|(client, descriptor)| {
        let descriptor = take(descriptor)?;
        rustix::net::sockopt::socket_type(&descriptor).context("a connection is no socket")?;
        Ok((client, descriptor))
    });
    let connections = connections.collect::<anyhow::Result<_>>()?;
    let rings = handover.state.connections.iter().filter(|connection| connection.ring).filter_map(|connection| {
        let bound = handover.rings.get(&connection.domain)?;
        Some(take(bound.descriptor).map(|device| (connection.domain, connection.client, device, bound.port)))
    });
    let rings = rings.collect::<anyhow::Result<_>>()?;
    let Named { descriptor, path } = handover.listener;
    let listener = Listener::adopt(take(descriptor)?, path, handover.identity).context("the listening socket")?;
    let pid_file = handover.pid_file.map(|Named { descriptor, path }| anyhow::Ok(PidFile::adopt(take(descriptor)?, path))).transpose()?;
    Ok(Resumed { state: handover.state, listener, pid_file, connections, rings })
}

fn read(number: RawFd) -> anyhow::Result<Handover> {
    let file = File::from(take(number)?);
    let handover: Handover = serde_json::from_reader(io::BufReader::new(file)).context("no state of xenstored")?;
    ensure!(handover.version == VERSION, "the state has version {}, this program knows {VERSION}", handover.version);
    Ok(handover)
}

/// Who of the state has which connection. Each socket's client has one, and nobody else.
fn clients(handover: &Handover) -> anyhow::Result<Vec<(ClientId, RawFd)>> {
    let mut left = handover.connections.clone();
    let mut clients = Vec::new();
    for connection in handover.state.connections.iter().filter(|connection| !connection.ring) {
        let number = connection.client.number();
        clients.push((connection.client, left.remove(&number).with_context(|| format!("client {number} has no connection"))?));
    }
    ensure!(left.is_empty(), "connections of nobody: {left:?}");
    Ok(clients)
}

/// A descriptor that this program was started with. Standard input, output and error are none of those.
fn take(number: RawFd) -> anyhow::Result<OwnedFd> {
    ensure!(number > libc::STDERR_FILENO, "descriptor {number} cannot be handed over");
    // SAFETY: the borrow ends before anything else is done with the number; if it is not open, the call says so.
    let flags = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) });
    flags.with_context(|| format!("descriptor {number} was not handed over"))?;
    // SAFETY: it is open, nothing in this program has opened it, and callers take each number once.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    inherit(&descriptor, false)?;
    Ok(descriptor)
}
