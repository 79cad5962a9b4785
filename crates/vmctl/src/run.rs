//! `vmctl run`: one machine in the foreground.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::Context;
use vmd::config::SerialTarget;
use vmd::control::Control;
use vmd::kv::{self, Dump};
use vmd::machine::{self, Outcome};
use vmd::socket::Server;
use vmd::store::MachineStore;

use crate::args::RunArguments;
use crate::demo::Answers;
use crate::{STATUS_ERROR, demo, signals, terminal};

/// Status of a guest that died.
const STATUS_GUEST_DIED: u8 = 3;
/// What a shell adds to the number of the signal that ended a program.
const STATUS_SIGNAL: i32 = 128;

/// Runs the machine to its end; the exit status.
///
/// # Errors
/// What the machine could not be made from, in words for people.
pub fn run(mut arguments: Box<RunArguments>) -> anyhow::Result<u8> {
    let store = Arc::new(MachineStore::new()?);
    let assignments = std::mem::take(&mut arguments.kv);
    let dump =
        arguments.kv_out.as_deref().map(|file| Dump::new(file).with_context(|| format!("--kv-out {}", file.display()))).transpose()?;
    let socket = arguments.control.clone();
    let want_stats = arguments.stats;
    let dialects_given = arguments.dialect.is_some();
    let mut config = arguments.into_config();
    let is_demo = demo::is_wanted(&config);
    if is_demo {
        demo::complete(&mut config, dialects_given);
        demo::set_keys(store.as_ref())?;
    }
    config.check(machine::host_memory())?;
    kv::preset(store.as_ref(), &assignments)?;

    let control = Arc::new(Control::new(Arc::clone(&store)));
    let ended_by = Arc::new(AtomicI32::new(0));
    signals::watch({
        let (control, ended_by) = (Arc::clone(&control), Arc::clone(&ended_by));
        move |signal| {
            ended_by.store(signal, Ordering::SeqCst);
            terminal::restore();
            control.stop();
        }
    })
    .context("cannot watch for signals")?;

    let server = socket.map(|path| Server::start(&path, Arc::clone(&control))).transpose()?;
    if config.serial == SerialTarget::Stdio || config.console == Some(SerialTarget::Stdio) {
        let raw = terminal::make_raw().context("cannot set up the terminal")?;
        let control = Arc::clone(&control);
        std::thread::Builder::new()
            .name("stdin".into())
            .spawn(move || terminal::pump(raw, |bytes| control.terminal_input(bytes), || control.stop()))
            .context("cannot start a thread for the terminal")?;
    }

    let answers = is_demo.then(|| Answers::show(store.clone())).transpose()?;
    let report = machine::run(&config, &control, &terminal::say);
    drop(answers);
    terminal::restore();
    if let Some(dump) = dump {
        dump.write(store.as_ref()).context("--kv-out")?;
    }
    drop(server);
    // The message holds its causes already.
    let report = report.map_err(|error| anyhow::anyhow!("{error}"))?;
    if want_stats {
        eprint!("{}", report.stats);
    }
    Ok(match report.outcome {
        Outcome::PowerOff | Outcome::Reset => 0,
        Outcome::DebugExit(value) => (value << 1) as u8 | 1,
        Outcome::GuestDied { cpu, registers } => {
            eprintln!("vmctl: the guest died of a triple fault on processor {cpu}:\n{registers}");
            STATUS_GUEST_DIED
        }
        Outcome::Stopped => match ended_by.load(Ordering::SeqCst) {
            0 => 0,
            signal => u8::try_from(STATUS_SIGNAL + signal).unwrap_or(STATUS_ERROR),
        },
    })
}
