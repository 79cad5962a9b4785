//! `hostctl` in real guests: Xen's dom0 under QEMU, Debian's kernel on our machine and on QEMU's.
//!
//! The program is built without shared libraries and put into an initial RAM disk with a script; what the script says on the console is
//! compared line by line. `tests/common/xen/make` makes the Xen, `tests/common/guest/make` the rest.

// Helpers of tests are outside of what clippy takes for one.
#![allow(clippy::unwrap_used)]

#[path = "common/mod.rs"]
mod common;
#[path = "common/dom0.rs"]
mod dom0;
#[allow(dead_code)]
#[path = "rig/initrd.rs"]
mod initrd;
#[path = "common/program.rs"]
mod program;
#[path = "common/script.rs"]
mod script;

#[path = "hostctl/linux.rs"]
mod linux;
#[path = "hostctl/xen.rs"]
mod xen;

use std::path::{Path, PathBuf};
use std::process::Command;

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
