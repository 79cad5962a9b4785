//! `hostctl` in real guests: Xen's dom0 under QEMU, Debian's kernel on our machine and on QEMU's.
//!
//! The program is built without shared libraries and put into an initial RAM disk with a script; what the script says on the console is
//! compared line by line. `tests/common/xen/make` makes the Xen, `tests/common/guest/make` the rest.

// Helpers of tests are outside of what clippy takes for one.
#![allow(clippy::unwrap_used)]

#[path = "common/mod.rs"]
mod common;
#[allow(dead_code)]
#[path = "rig/initrd.rs"]
mod initrd;
#[path = "common/program.rs"]
mod program;

#[path = "hostctl/linux.rs"]
mod linux;
#[path = "hostctl/xen.rs"]
mod xen;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Run, run};

/// `hostctl`, to be put into a guest.
fn hostctl() -> PathBuf {
    program::build_static(program::HOSTCTL).join("small/hostctl")
}

/// The C program that knows pvbus(4), compiled against our header.
fn c_program(directory: &Path) -> PathBuf {
    let program = directory.join("pvbus");
    let root = program::workspace();
    let mut gcc = Command::new("gcc");
    gcc.args(["-static", "-Wall", "-Wextra", "-Werror", "-o"]).arg(&program);
    gcc.arg("-I").arg(root.join("include")).arg(root.join("tests/hostctl/pvbus.c"));
    assert!(gcc.status().unwrap().success(), "{gcc:?}");
    program
}

/// What [`script`] prints before and after the output of a command, each on a line of its own; the status follows the second.
const BEGIN: &str = "@begin";
const END: &str = "@end ";

/// What each command of a [`script`] printed, and how it ended.
fn results(run: &Run) -> Vec<(String, i32)> {
    let mut results = Vec::new();
    for part in run.output.replace('\r', "").split(&format!("\n{BEGIN}\n")).skip(1) {
        let Some((text, rest)) = part.split_once(&format!("\n{END}")) else { continue };
        let status = rest.lines().next().unwrap_or_default().trim();
        results.push((text.to_owned(), status.parse().unwrap_or_else(|_| panic!("status «{status}»"))));
    }
    results
}

/// A shell script that runs `commands`, and marks where the output of each begins and how it ended.
fn script(commands: &[&str]) -> String {
    let marked =
        commands.iter().map(|command| format!("echo; echo {BEGIN}; {{ {command}\n}} 2>&1; status=$?; echo; echo \"{END}$status\"\n"));
    marked.collect()
}

/// Compares what `commands` print and their status with what is wanted.
#[track_caller]
fn expect(run: &Run, wanted: &[(&str, &str, i32)]) {
    let results = results(run);
    assert_eq!(results.len(), wanted.len(), "not all commands have run:\n{run}");
    for ((command, text, status), (said, ended)) in wanted.iter().zip(results) {
        assert_eq!((said.trim_end(), ended), (*text, *status), "{command}\n\n{run}");
    }
}
