//! Test guests: small programs of ours, assembled with nasm when a test wants one, and the running of `vmctl` on them.
//!
//! All but `bootsector` are flat or hand-made ELF images, so that no linker is needed. They print on COM1 and leave by
//! isa-debug-exit: status 33 when all is well, 35 when not.

// Each test program uses a part of this.
#![allow(dead_code)]

pub mod session;
pub mod vmlinux;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Status of a guest that found all well: (0x10 << 1) | 1.
pub const EXIT_OK: i32 = 33;
/// Status of a guest that found something wrong.
pub const EXIT_BAD: i32 = 35;
/// Status of `vmctl` when the guest died.
pub const EXIT_DIED: i32 = 3;
/// Status of `vmctl` for its own errors.
pub const EXIT_ERROR: i32 = 1;

/// Nothing here takes this long on a machine that is not overloaded: a boot of Debian's kernel is the longest.
const PATIENCE: Duration = Duration::from_secs(300);

/// Assembles `tests/guests/NAME.asm` into `directory`.
pub fn build(name: &str, directory: &Path) -> PathBuf {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/guests");
    let output = directory.join(name);
    let status = Command::new("nasm")
        .args(["-f", "bin", "-o"])
        .arg(&output)
        .arg("-I")
        .arg(format!("{}/", sources.display()))
        .arg(sources.join(format!("{name}.asm")))
        .status()
        .expect("nasm runs (Debian package nasm)");
    assert!(status.success(), "nasm refuses {name}.asm");
    output
}

/// A disk image of 1 MiB with the boot sector guest in it.
pub fn boot_disk(directory: &Path) -> PathBuf {
    let image = build("bootsector", directory);
    let file = std::fs::OpenOptions::new().write(true).open(&image).unwrap();
    file.set_len(1 << 20).unwrap();
    image
}

/// What a run of `vmctl` left.
#[derive(Debug)]
pub struct Run {
    /// Exit status; `None` when a signal ended it.
    pub status: Option<i32>,
    /// Standard output: the guest's serial port.
    pub output: String,
    /// Standard error: what vmctl has to say.
    pub errors: String,
}

impl Run {
    /// Fails with everything that is known unless the output has these lines.
    #[track_caller]
    pub fn expect(&self, status: i32, lines: &[&str]) {
        for line in lines {
            assert!(self.output.contains(line), "no «{line}» in:\n{self}");
        }
        assert_eq!(self.status, Some(status), "{self}");
        self.expect_no_panic();
    }

    /// Fails when vmctl panicked.
    #[track_caller]
    pub fn expect_no_panic(&self) {
        assert!(!self.errors.contains("panicked"), "{self}");
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "status {:?}\n--- output\n{}\n--- errors\n{}", self.status, self.output, self.errors)
    }
}

/// Runs `vmctl` with `arguments` to its end; fails when that takes too long.
#[track_caller]
pub fn vmctl<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Run {
    let mut child = start(arguments);
    let output = collect(child.stdout.take().unwrap());
    let errors = collect(child.stderr.take().unwrap());
    let status = wait(&mut child, PATIENCE);
    let timed_out = status.is_none();
    if timed_out {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let run = Run { status: status.and_then(|s| s.code()), output: output.join().unwrap(), errors: errors.join().unwrap() };
    assert!(!timed_out, "vmctl did not end within {PATIENCE:?}:\n{run}");
    run
}

/// Starts `vmctl` with nothing on its standard input.
pub fn start<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_vmctl"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("vmctl starts")
}

/// Runs a guest on the software CPU with isa-debug-exit, and `more` options.
#[track_caller]
pub fn run_soft(kernel: &Path, more: &[&str]) -> Run {
    let mut arguments = vec!["run", "--backend", "soft", "--debug-exit", "--no-reboot", "--kernel", kernel.to_str().unwrap()];
    arguments.extend_from_slice(more);
    vmctl(&arguments)
}

/// Waits for the end of `child`, at most so long.
pub fn wait(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Reads until `wanted` was seen or the stream ends.
pub fn read_until(stream: &mut impl Read, wanted: &str) -> String {
    let mut seen = Vec::new();
    let mut byte = [0];
    while !String::from_utf8_lossy(&seen).contains(wanted) && stream.read(&mut byte).unwrap_or(0) == 1 {
        seen.push(byte[0]);
    }
    String::from_utf8_lossy(&seen).into_owned()
}

/// Writes a file into `directory`.
pub fn write(directory: &Path, name: &str, contents: &[u8]) -> PathBuf {
    let path = directory.join(name);
    std::fs::File::create(&path).unwrap().write_all(contents).unwrap();
    path
}

/// Seconds of processor time of a process, from /proc (proc_pid_stat(5), fields 14 and 15, in hundredths).
pub fn processor_time(process: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11..=12].iter().map(|f| f.parse::<f64>().unwrap()).sum::<f64>() / 100.0
}

fn collect(mut stream: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // A stream that breaks off has said what it had to say.
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
