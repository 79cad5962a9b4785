//! `xenstored`: serves the store to ordinary XenStore clients, in place of Xen's own.
//!
//! Whatever can fail does so before the program goes to the background, where nobody would see why. The work is in the library's
//! [`Service`]; here is what it is started with, or what it takes over from an older program.

mod args;
mod handover;
mod host;
mod process;
mod update;
mod xen;

use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use anyhow::Context;
use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing_subscriber::EnvFilter;
use xenstore::{ClientId, Config, Server, SharedStore, Store};
use xenstored::keeper::Keeper;
use xenstored::ring::Introduced;
use xenstored::{Listener, Pause, Service};

use args::Arguments;
use handover::{Resumed, Successor};
use host::Machine;
use process::PidFile;
use update::{Order, Orders};
use xen::Xen;

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
    if let Some(state) = arguments.resume.filter(|_| arguments.check) {
        return handover::accept(state);
    }
    let resumed = arguments.resume.map(handover::resume).transpose()?;
    start_log(arguments.log.as_deref())?;
    let signals = Signals { end: process::ending_signals()?, upgrade: process::upgrade_signal()?, orders: Orders::new()? };
    allow_many_connections();
    // The background's working directory is another.
    let directory = std::env::current_dir().context("the working directory")?;
    let rings = Rings::of(arguments)?;
    let machine = Machine { orders: signals.orders.clone(), xen: rings.as_ref().map(|rings| Arc::clone(&rings.xen)) };
    let running = match resumed {
        Some(resumed) => take_over(arguments, resumed, machine)?,
        None => start(arguments, machine)?,
    };
    serve(running, rings, &signals, &directory)
}

/// The domains of a Xen, and their rings as they come.
struct Rings {
    xen: Arc<Xen>,
    introduced: Receiver<Introduced>,
}

impl Rings {
    fn of(arguments: &Arguments) -> anyhow::Result<Option<Rings>> {
        if arguments.no_domain_init || !Xen::is_here() {
            return Ok(None);
        }
        let (xen, introduced) = Xen::new().context("Xen's domains")?;
        Ok(Some(Rings { xen: Arc::new(xen), introduced }))
    }
}

/// A server that is ready.
struct Running {
    server: Server,
    keeper: Option<Keeper>,
    listener: Listener,
    connections: Vec<(ClientId, OwnedFd)>,
    pid_file: Option<PidFile>,
}

/// What interrupts the service.
struct Signals {
    end: OwnedFd,
    upgrade: OwnedFd,
    orders: Orders,
}

/// Begins with what the command line says.
fn start(arguments: &Arguments, machine: Machine) -> anyhow::Result<Running> {
    let mut config = Config::default();
    arguments.quotas.iter().for_each(|(quota, limit)| config.quotas.set(*quota, *limit));
    let mut pid_file = arguments.pid_file.as_ref().map(|path| PidFile::claim(&absolute(path)?)).transpose()?;
    let xen = machine.xen.clone();
    let domains = xen.is_some();
    let host = Box::new(machine);
    let (mut server, keeper) = match arguments.persist.as_ref().map(absolute).transpose()? {
        Some(file) => {
            let (mut keeper, nodes) = Keeper::open(&file).with_context(|| file.display().to_string())?;
            let mut server = Server::with_nodes(&nodes, config, host).with_context(|| file.display().to_string())?;
            server.keep(&nodes)?;
            keeper.keep(&mut server);
            (server, Some(keeper))
        }
        None => (Server::new(Store::new(config), host), None),
    };
    // Last, so that who finds the socket finds the keys.
    let socket = absolute(arguments.socket.as_ref().unwrap_or(&xenstore::client::socket_path()))?;
    make_directory_of(&socket)?;
    let listener = Listener::bind(&socket)?;
    if let Some(xen) = xen {
        xen.serve_kernel(&mut server)?;
    }
    if arguments.daemon {
        process::go_to_background().context("cannot go to the background")?;
    }
    if let Some(file) = &mut pid_file {
        file.write()?;
    }
    tracing::info!(socket = %socket.display(), domains, "serving");
    Ok(Running { server, keeper, listener, connections: Vec::new(), pid_file })
}

/// Goes on with what another program left. There is no way back any more, so a file of keys that cannot be used is only waited for.
fn take_over(arguments: &Arguments, resumed: Resumed, machine: Machine) -> anyhow::Result<Running> {
    let Resumed { state, listener, pid_file, connections, rings } = resumed;
    let xen = machine.xen.clone();
    let mut server = Server::restored(state, Config::default(), Box::new(machine))?;
    let keeper = arguments.persist.as_ref().map(|file| anyhow::Ok(Keeper::resume(&absolute(file)?, &mut server))).transpose()?;
    if let Some(xen) = xen {
        for (domain, client, device, port) in rings {
            if let Err(error) = xen.resume(domain, client, device, port) {
                tracing::error!(%error, %domain, "a domain's ring is lost");
            }
        }
    }
    if arguments.daemon {
        std::env::set_current_dir("/").context("/")?;
    }
    tracing::info!(connections = connections.len(), version = env!("CARGO_PKG_VERSION"), "took over");
    Ok(Running { server, keeper, listener, connections, pid_file })
}

/// Serves until a signal ends it. `directory` is where this program was started.
fn serve(running: Running, rings: Option<Rings>, signals: &Signals, directory: &Path) -> anyhow::Result<()> {
    let Running { server, keeper, listener, connections, pid_file } = running;
    let program = std::env::current_exe().context("this program's file")?;
    let store = SharedStore::of(server);
    let mut service = Service::new(&store, keeper)?;
    service.listen(listener)?;
    connections.into_iter().try_for_each(|(client, descriptor)| service.adopt(client, descriptor))?;
    let mut calls = vec![signals.end.as_fd(), signals.upgrade.as_fd(), signals.orders.as_fd()];
    let xen = rings.map(|Rings { xen, introduced }| {
        service.serve_rings(introduced);
        // Somebody may have died while one program took over from another.
        store.with(|server| xen.look(server));
        xen
    });
    calls.extend(xen.as_deref().map(AsFd::as_fd));
    let mut order: Option<Order> = None;
    loop {
        let why = match service.run(&calls, order.as_ref().map(|order| order.wait_until))? {
            Pause::Called(0) => break,
            Pause::Called(1) => {
                process::take_signal(&signals.upgrade);
                order.get_or_insert_with(Order::by_signal);
                continue;
            }
            Pause::Called(3) => {
                xen.iter().for_each(|xen| store.with(|server| xen.look(server)));
                continue;
            }
            Pause::Called(_) => {
                order = signals.orders.take().or(order);
                continue;
            }
            Pause::Late if order.as_ref().is_some_and(|order| !order.is_forced) => "BUSY".into(),
            Pause::Late | Pause::Quiet => {
                let Some(Order { program: named, arguments, .. }) = order.take() else { continue };
                let (program, directory) = (named.unwrap_or_else(|| program.clone()), directory.into());
                let to = Successor { program, arguments: arguments.unwrap_or_else(own_arguments), directory };
                format!("{:#}", store.with(|server| handover::hand_over(&to, &service, xen.as_deref(), pid_file.as_ref(), server)))
            }
        };
        order = None;
        tracing::error!(why, "no live upgrade");
        signals.orders.is_over();
        store.with(|server| server.stay(&why));
    }
    tracing::info!("ended by a signal");
    Ok(())
}

/// This program's command line, without what an upgrade has added.
fn own_arguments() -> Vec<String> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--resume") {
        arguments.truncate(at);
    }
    arguments
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

fn absolute(path: &PathBuf) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| path.display().to_string())
}

/// After a boot `/run` is empty, and nobody else makes the directory there.
fn make_directory_of(socket: &Path) -> anyhow::Result<()> {
    match socket.parent() {
        Some(directory) if !directory.exists() => std::fs::create_dir(directory).with_context(|| directory.display().to_string()),
        _ => Ok(()),
    }
}
