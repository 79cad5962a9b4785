//! `hostctl`: reads and writes the keys that this virtual machine shares with its host.
//!
//! With the feature `bare` it is a program without a C library ([`hostctl::sys`] says why), and `runtime.rs` is what the compiler and the kernel
//! expect of that. Without it, as tests and lints build it, it is an ordinary one around the same code.
#![cfg_attr(feature = "bare", no_std, no_main)]

extern crate alloc;

#[cfg(feature = "bare")]
mod runtime;

use alloc::format;
use alloc::vec::Vec;

use hostctl::args::{self, USAGE, Wrong};
use hostctl::{commands, sys};

/// Status of a failure where OpenBSD knows no other.
const STATUS_FAILED: u8 = 1;
/// Status of a wrong command line that begins with a command.
const STATUS_USAGE: u8 = 2;

#[cfg(not(feature = "bare"))]
fn main() -> std::process::ExitCode {
    use std::os::unix::ffi::OsStringExt;

    run(std::env::args_os().map(OsStringExt::into_vec).collect()).into()
}

/// Does what the arguments say; the exit status.
fn run(arguments: Vec<Vec<u8>>) -> u8 {
    let arguments = match args::parse(arguments.into_iter().skip(1)) {
        Ok(arguments) => arguments,
        Err(Wrong { text, openbsd }) => {
            if !text.is_empty() {
                sys::say(&format!("hostctl: {text}\n"));
            }
            sys::say(USAGE);
            return if openbsd { STATUS_FAILED } else { STATUS_USAGE };
        }
    };
    match commands::run(&arguments) {
        Ok(()) => 0,
        Err(error) if arguments.openbsd => {
            sys::say(&format!("hostctl: {}\n", error.as_openbsd(arguments.device.as_deref())));
            STATUS_FAILED
        }
        Err(error) => {
            sys::say(&format!("hostctl: {error}\n"));
            error.status()
        }
    }
}
