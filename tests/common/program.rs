//! Our programs without shared libraries, for initial RAM disks.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What selects `hostctl` as it is to be used; it is `small/hostctl` then.
#[allow(dead_code, reason = "each test program uses a part of this")]
pub const HOSTCTL: &[&str] = &["-p", "hostctl", "--profile", "small", "--features", "bare"];

/// One build at a time in this process; Cargo itself locks out the others.
static TURN: Mutex<()> = Mutex::new(());

/// Builds what Cargo's `arguments` select, and gives the directory in which the profiles' directories are.
pub fn build_static(arguments: &[&str]) -> PathBuf {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // Its own directory: the outer Cargo holds the lock of the usual one.
    let directory = workspace().join("target/rig");
    let status = Command::new(env!("CARGO"))
        .current_dir(workspace())
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .args(["build", "--quiet", "--target", TARGET, "--target-dir"])
        .arg(&directory)
        .args(arguments)
        .status()
        .expect("Cargo runs");
    assert!(status.success(), "the static build of {arguments:?} failed");
    directory.join(TARGET)
}

/// The root of the sources.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the workspace is two directories up")
}
