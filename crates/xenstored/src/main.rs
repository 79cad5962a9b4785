//! `xenstored`: serves the store to ordinary XenStore clients, in place of Xen's own.
//!
//! Whatever can fail does so before the program goes to the background, where nobody would see why. The work is in the library's
//! [`serve`](xenstored::serve).

mod args;
mod process;

use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing_subscriber::EnvFilter;
use xenstore::{Config, NoHost, Server, SharedStore, Store};
use xenstored::keeper::Keeper;
use xenstored::{Listener, Service};

use args::Arguments;
use process::PidFile;

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
    start_log(arguments.log.as_deref())?;
    let signals = process::ending_signals().context("signalfd")?;
    allow_many_connections();
    let mut config = Config::default();
    arguments.quotas.iter().for_each(|(quota, limit)| config.quotas.set(*quota, *limit));
    // The background's working directory is another.
    let absolute = |path: &PathBuf| std::path::absolute(path).with_context(|| path.display().to_string());
    let mut pid_file = arguments.pid_file.as_ref().map(|path| PidFile::claim(&absolute(path)?)).transpose()?;
    let socket = absolute(arguments.socket.as_ref().unwrap_or(&xenstore::client::socket_path()))?;
    make_directory_of(&socket)?;
    let listener = Listener::bind(&socket)?;
    let (server, keeper) = match arguments.persist.as_ref().map(absolute).transpose()? {
        Some(file) => kept(&file, config).with_context(|| file.display().to_string())?,
        None => (Server::new(Store::new(config), Box::new(NoHost)), None),
    };
    if arguments.daemon {
        process::go_to_background().context("cannot go to the background")?;
    }
    if let Some(file) = &mut pid_file {
        file.write()?;
    }
    tracing::info!(socket = %socket.display(), "serving");
    let store = SharedStore::of(server);
    Service::new(listener, &store, keeper)?.run(&[signals.as_fd()], None)?;
    tracing::info!("ended by a signal");
    Ok(())
}

/// A server with the keys of `file`, and who writes down what becomes of them.
fn kept(file: &Path, config: Config) -> anyhow::Result<(Server, Option<Keeper>)> {
    let (mut keeper, nodes) = Keeper::open(file)?;
    let mut server = Server::with_nodes(&nodes, config, Box::new(NoHost))?;
    server.keep(&nodes)?;
    keeper.keep(&mut server);
    Ok((server, Some(keeper)))
}

fn start_log(file: Option<&Path>) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_env("XENSTORED_LOG").unwrap_or_else(|_| "info".into());
    // A log that cannot be written must not end the program, as the complaint about it would if nobody reads that either.
    let log = tracing_subscriber::fmt().with_env_filter(filter).log_internal_errors(false);
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
