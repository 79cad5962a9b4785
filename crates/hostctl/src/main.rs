//! `hostctl`: reads and writes the keys that this virtual machine shares with its host.

use std::process::ExitCode;

use hostctl::args::{self, USAGE, Wrong};
use hostctl::commands;

/// Status of a wrong command line that begins with a command.
const STATUS_USAGE: u8 = 2;

fn main() -> ExitCode {
    let arguments = match args::parse(std::env::args_os().skip(1)) {
        Ok(arguments) => arguments,
        Err(Wrong { text, openbsd }) => {
            if !text.is_empty() {
                eprintln!("hostctl: {text}");
            }
            eprint!("{USAGE}");
            return if openbsd { ExitCode::FAILURE } else { ExitCode::from(STATUS_USAGE) };
        }
    };
    match commands::run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if arguments.openbsd => {
            eprintln!("hostctl: {}", error.as_openbsd(arguments.device.as_deref()));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("hostctl: {error}");
            ExitCode::from(error.status())
        }
    }
}
