//! Whole-machine tests: where the Debian guests are, and `vmctl run` on them.
//!
//! `tests/common/guest/make` makes the guests; `./test` calls it. Tests that miss them fail and say so.

// Each test program uses a part of this. Helpers of tests are outside of what clippy takes for one.
#![allow(dead_code, clippy::unwrap_used)]

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// A file of the Debian guests.
#[track_caller]
pub fn guest(name: &str) -> PathBuf {
    let directory = match std::env::var_os("PVBUS_GUEST") {
        Some(directory) => PathBuf::from(directory),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest"),
    };
    let path = directory.join(name);
    assert!(path.exists(), "{} is missing; make it with: tests/common/guest/make target/guest image", path.display());
    path
}

/// How a run ended.
#[derive(Debug)]
pub struct Run {
    /// Exit status; `None` when it was killed, for being too slow or by a signal.
    pub status: Option<i32>,
    /// The guest's serial port.
    pub output: String,
    /// What vmctl had to say.
    pub errors: String,
    /// How long it took.
    pub time: Duration,
}

impl Run {
    /// Fails with everything that is known unless the run ended well and printed `lines` in this order.
    #[track_caller]
    pub fn expect(&self, lines: &[&str]) {
        let mut rest = self.output.as_str();
        for line in lines {
            match rest.find(line) {
                Some(at) => rest = &rest[at + line.len()..],
                None => panic!("no «{line}» in its place in:\n{self}"),
            }
        }
        assert_eq!(self.status, Some(0), "{self}");
    }

    /// The rest of the line that begins with `prefix`.
    #[track_caller]
    pub fn value(&self, prefix: &str) -> &str {
        let found = self.output.lines().chain(self.errors.lines()).find_map(|line| line.split_once(prefix));
        found.map(|(_, rest)| rest.trim()).unwrap_or_else(|| panic!("no «{prefix}» in:\n{self}"))
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "status {:?} after {:.1?}\n--- output\n{}\n--- errors\n{}", self.status, self.time, self.output, self.errors)
    }
}

/// Runs `vmctl run` on the Debian kernel with `initrd`; it is killed after `patience`.
pub fn debian(initrd: &str, cmdline: &str, more: &[&str], patience: Duration) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    command.arg("run").arg("--kernel").arg(guest("vmlinuz")).arg("--initrd").arg(guest(initrd));
    command.arg("--cmdline").arg(format!("console=ttyS0 panic=-1 {cmdline}")).args(more);
    run(command, patience)
}

/// Runs a command to its end and collects what it prints.
pub fn run(mut command: Command, patience: Duration) -> Run {
    let start = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("vmctl starts");
    let output = collect(child.stdout.take().expect("a pipe"));
    let errors = collect(child.stderr.take().expect("a pipe"));
    let status = wait(&mut child, start + patience);
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Run { status, output: text(output.recv().unwrap()), errors: text(errors.recv().unwrap()), time: start.elapsed() }
}

fn collect(mut from: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).unwrap();
        sender.send(bytes).unwrap();
    });
    receiver
}

fn wait(child: &mut Child, until: Instant) -> Option<i32> {
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        if Instant::now() >= until {
            child.kill().unwrap();
            child.wait().unwrap();
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
