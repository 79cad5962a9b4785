//! `xenstored`: serves the store to ordinary XenStore clients, in place of Xen's own.
//!
//! Whatever can fail does so before the program goes to the background, where nobody would see why. The work is in the library's
//! [`Service`].

mod args;
mod process;
mod upgrade;

use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::{AsFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing_subscriber::EnvFilter;
use xenstore::{Config, Server, SharedStore, Store};
use xenstored::handover::{self, Handover};
use xenstored::{End, Listener, Persistence, Service};

use args::Arguments;
use process::PidFile;
use upgrade::{Next, Program};

/// Bytes of a `struct signalfd_siginfo` (signalfd(2)).
const SIGNAL_SIZE: usize = 128;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version come as errors too; printing fails only when nobody reads.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xenstored: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if arguments.check_state {
        Handover::read(std::io::stdin())?.check(Config::default())?;
        println!("{}", handover::ACCEPTED);
        return Ok(());
    }
    start_log(arguments.log.as_deref())?;
    let ending = process::signals(process::ENDING).context("signalfd")?;
    let upgrading = process::signals(process::UPGRADING).context("signalfd")?;
    allow_many_connections();
    let mut pid_file = arguments.pid_file.as_ref().map(|path| PidFile::claim(&absolute(path)?)).transpose()?;
    let next = Next::default();
    let mut service = match arguments.resume {
        Some(descriptor) => resume(arguments, descriptor, &next)?,
        None => begin(arguments, &next)?,
    };
    if let Some(file) = &mut pid_file {
        file.write()?;
    }
    loop {
        match service.run(ending.as_fd(), Some(upgrading.as_fd()))? {
            End::Stopped => break,
            End::Paused(paused) => {
                // However often it was asked for, it is done once.
                let _ = rustix::io::read(&upgrading, &mut [0; SIGNAL_SIZE]);
                upgrade::upgrade(&paused, &next);
                service = paused;
            }
        }
    }
    tracing::info!("ended by a signal");
    Ok(())
}

/// A service that nobody is connected to yet, in the background if it is to be there.
fn begin(arguments: &Arguments, next: &Next) -> anyhow::Result<Service> {
    let socket = absolute(arguments.socket.as_ref().unwrap_or(&xenstore::client::socket_path()))?;
    make_directory_of(&socket)?;
    let listener = Listener::bind(&socket)?;
    let mut server = Server::new(Store::new(config(arguments)), Box::new(Program(next.clone())));
    let persistence = persistence(arguments)?;
    if let Some(persistence) = &persistence {
        persistence.restore(&mut server).context("persistent keys")?;
    }
    if arguments.daemon {
        process::go_to_background().context("cannot go to the background")?;
    }
    tracing::info!(socket = %socket.display(), "serving");
    Ok(Service { listener, store: SharedStore::of(server), persistence, connections: Vec::new() })
}

/// The service of this process' earlier program.
fn resume(arguments: &Arguments, descriptor: RawFd, next: &Next) -> anyhow::Result<Service> {
    let handover = Handover::read(File::from(process::take_descriptor(descriptor)?))?;
    let host = Box::new(Program(next.clone()));
    let mut service = handover.into_service(config(arguments), host, process::take_descriptor)?;
    service.persistence = persistence(arguments)?;
    tracing::info!(connections = service.connections.len(), version = env!("CARGO_PKG_VERSION"), "going on");
    Ok(service)
}

fn config(arguments: &Arguments) -> Config {
    let mut config = Config { journal: arguments.persist.is_some(), ..Config::default() };
    arguments.quotas.iter().for_each(|(quota, limit)| config.quotas.set(*quota, *limit));
    config
}

fn persistence(arguments: &Arguments) -> anyhow::Result<Option<Persistence>> {
    let open = |path: &PathBuf| Persistence::open(&absolute(path)?).with_context(|| path.display().to_string());
    arguments.persist.as_ref().map(open).transpose()
}

/// The path with its directory.
fn absolute(path: &PathBuf) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| path.display().to_string())
}

fn start_log(file: Option<&Path>) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_env("XENSTORED_LOG").unwrap_or_else(|_| "info".into());
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    match file {
        Some(path) => {
            let file = File::options().create(true).append(true).open(path).with_context(|| path.display().to_string())?;
            log.with_ansi(false).with_writer(Arc::new(file)).init();
        }
        None => log.with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr).init(),
    }
    Ok(())
}

/// Each connection is a descriptor: as many as the host gives.
fn allow_many_connections() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, "the number of connections stays limited");
    }
}

/// After a boot `/run` is empty, and nobody else makes the directory there.
fn make_directory_of(socket: &Path) -> anyhow::Result<()> {
    match socket.parent() {
        Some(directory) if !directory.exists() => std::fs::create_dir(directory).with_context(|| directory.display().to_string()),
        _ => Ok(()),
    }
}
