//! Builds the kernel of `guest/` with a cargo of its own.
//!
//! It has a target directory under `OUT_DIR`, so that it neither waits for the lock of the outer build nor mixes with it. Of the
//! outer build's settings nothing goes in: flags of rustc, wrappers such as clippy's, profiles and target directories are for
//! programs, not for this kernel. Settings of the network do go in, and the job server, which keeps to `-j`.

use std::error::Error;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The kernel's target: the ordinary one, for which `core` and `alloc` are installed everywhere.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// What the kernel is made from, below the root of the repository.
const SOURCES: [&str; 8] =
    ["Cargo.toml", "guest/Cargo.toml", "guest/Cargo.lock", "guest/build.rs", "guest/kernel.ld", "guest/src", "crates/abi", "crates/pvbus"];
/// Variables that are no settings of the outer build, by their names or prefixes, and the compiler, which is to be the same.
const KEPT: [&str; 7] = ["RUSTC", "CARGO_HOME", "CARGO_MAKEFLAGS", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTRIES_", "RUSTUP_"];

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
    let output = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    for source in SOURCES {
        println!("cargo::rerun-if-changed={}", root.join(source).display());
    }

    let target_directory = output.join("target");
    let mut cargo = Command::new(std::env::var_os("CARGO").ok_or("cargo sets CARGO")?);
    cargo.args(["build", "--release", "--locked", "--bin", "guest", "--target", TARGET]);
    cargo.arg("--manifest-path").arg(root.join("guest/Cargo.toml")).arg("--target-dir").arg(&target_directory);
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_outer(name)) {
        cargo.env_remove(name);
    }
    // Set and empty, it also keeps out the flags that a person's configuration files have for programs.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", "");
    let status = cargo.status()?;
    if !status.success() {
        return Err(format!("the guest kernel in {} cannot be built: {status}", root.join("guest").display()).into());
    }
    std::fs::copy(target_directory.join(TARGET).join("release/guest"), output.join("guest.elf"))?;
    Ok(())
}

/// Whether a variable is the outer build's.
fn is_outer(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    let is_kept = |kept: &&str| if kept.ends_with('_') { name.starts_with(*kept) } else { name == *kept };
    (name.starts_with("CARGO") || name.starts_with("RUST")) && !KEPT.iter().any(is_kept)
}
