//! `vmctl`: runs and controls virtual machines from the command line.
//!
//! ```text
//!   vmctl                          a small guest that shows what it finds
//!   vmctl run  --kernel FILE ...   one machine in the foreground, serial on this terminal
//!   vmctl host                     what this machine can do
//!   vmctl kv, disk, nic, stop, status, sync, freeze, thaw   a running machine, through its control socket
//! ```
//!
//! Everything said to people goes to standard error; standard output belongs to the guest's serial port.

mod allocator;
mod args;
mod demo;
mod device;
mod host;
mod kv;
mod power;
mod run;
mod signals;
mod terminal;

use std::process::ExitCode;

use clap::Parser;

/// Status of a run that ended by our own error.
const STATUS_ERROR: u8 = 1;
/// Status when the store has no such key, or the machine no such device.
const STATUS_NOT_FOUND: u8 = 2;
/// Status when time ran out before what was waited for.
const STATUS_TIME_OUT: u8 = 4;

fn main() -> ExitCode {
    allocator::give_back_large_blocks();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_env("VMCTL_LOG").unwrap_or_else(|_| "error".into()))
        .with_writer(std::io::stderr)
        .init();
    let command = match args::Arguments::try_parse() {
        Ok(arguments) => arguments.command,
        Err(error) => {
            // Help and version come as errors too; printing fails only when nobody reads.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(STATUS_ERROR) } else { ExitCode::SUCCESS };
        }
    };
    let done = match command {
        None => run::run(args::RunArguments::defaults()),
        Some(args::Command::Run(arguments)) => run::run(arguments),
        Some(args::Command::Host(arguments)) => host::host(&arguments),
        Some(args::Command::Kv(command)) => kv::kv(command),
        Some(args::Command::Disk(command)) => device::disk(command),
        Some(args::Command::Nic(command)) => device::nic(command),
        Some(args::Command::Stop(arguments)) => power::stop(&arguments),
        Some(args::Command::Status(arguments)) => power::show(&arguments),
        Some(args::Command::Sync(arguments)) => power::sync(&arguments),
        Some(args::Command::Freeze(arguments)) => power::freeze(&arguments),
        Some(args::Command::Thaw(arguments)) => power::thaw(&arguments),
    };
    terminal::restore();
    match done {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("vmctl: {error:#}");
            ExitCode::from(STATUS_ERROR)
        }
    }
}
