//! Whole-machine tests: where the Debian guests are, and `vmctl run` on them.
//!
//! `tests/common/*/make target/guest` make the guests; `./test` calls them. Tests that miss them fail and say so.

// Each test program uses a part of this. Helpers of tests are outside of what clippy takes for one.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};

/// Programs of the host take moments.
const HOST_PATIENCE: Duration = Duration::from_secs(300);

/// A file of the Debian guests.
#[track_caller]
pub fn guest(name: &str) -> PathBuf {
    let directory = match std::env::var_os("PVBUS_GUEST") {
        Some(directory) => PathBuf::from(directory),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest"),
    };
    let path = directory.join(name);
    assert!(path.exists(), "{} is missing; tests/common/*/make DIRECTORY make it", path.display());
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

/// Copies only what is not a hole.
pub fn copy_sparse(from: &Path, to: &Path) {
    let (mut from, mut to) = (File::open(from).unwrap(), File::create(to).unwrap());
    to.set_len(from.metadata().unwrap().len()).unwrap();
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    loop {
        let n = from.read(&mut buffer).unwrap();
        if n == 0 {
            return;
        }
        if buffer[..n].iter().any(|&byte| byte != 0) {
            to.seek(SeekFrom::Start(at)).unwrap();
            to.write_all(&buffer[..n]).unwrap();
        }
        at += n as u64;
    }
}

/// The initial RAM disks `bases` of the guests and the archive `own` after them in one file, as Linux takes them; a file of a later archive takes
/// an earlier one's place.
pub fn initrd_with(directory: &Path, bases: &[&str], own: &[u8]) -> PathBuf {
    let mut bytes = Vec::new();
    for base in bases {
        bytes.extend(std::fs::read(guest(base)).unwrap());
        // An archive begins at a multiple of four.
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes.extend(own);
    let path = directory.join("initrd");
    std::fs::write(&path, bytes).unwrap();
    path
}

/// A program for guests, `guest/NAME.rs` in this directory, compiled without shared libraries.
pub fn guest_program(name: &str) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/common/guest").join(name).with_extension("rs");
    let mut rustc = Command::new("rustc");
    rustc.args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "strip=symbols", "-o"]).arg(&program).arg(source);
    assert!(rustc.status().unwrap().success(), "{rustc:?}");
    std::fs::read(program).unwrap()
}

/// A program that wants one host processor for itself until it is dropped.
pub struct Rival(Child);

impl Rival {
    /// Keeps that processor busy.
    pub fn on(processor: &str) -> Rival {
        let spin = ["-c", processor, "sh", "-c", "while :; do :; done"];
        Rival(Command::new("taskset").args(spin).spawn().unwrap())
    }
}

impl Drop for Rival {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Runs a machine of Debian's kernel on the host's processor 0.
pub fn pinned(cmdline: &str, more: &[&str]) -> Run {
    let mut command = Command::new("taskset");
    command.args(["-c", "0", env!("CARGO_BIN_EXE_vmctl"), "run", "--backend", "soft", "--cmdline", cmdline]);
    command.arg("--kernel").arg(guest("vmlinuz")).arg("--initrd").arg(guest("initrd-busybox.gz")).args(more);
    run(command, HOST_PATIENCE)
}

/// Runs a program of the host, from where administrators have theirs, too.
pub fn run_host(program: &str, arguments: &[&str]) -> Run {
    let mut command = Command::new(program);
    command.args(arguments).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    run(command, HOST_PATIENCE)
}

/// SHA-256 of a file.
pub fn sum(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().unwrap();
    String::from_utf8(output.stdout).unwrap()[..64].to_owned()
}

/// An HTTP server on the host's loopback that answers everything with `body`. It lives as long as the process.
pub fn serve(body: Vec<u8>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
        }
    });
    port
}

/// A run of the Debian image, which tells what it sees of its disk and its network (`guest/selftest`).
pub struct Selftest {
    work: tempfile::TempDir,
    port: u16,
}

impl Selftest {
    /// With a copy of the image, and a server for the guest to fetch from.
    pub fn new() -> Selftest {
        let work = tempfile::tempdir_in(guest("")).unwrap();
        let body: Vec<u8> = (0..300_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        std::fs::write(work.path().join("body"), &body).unwrap();
        let selftest = Selftest { work, port: serve(body) };
        copy_sparse(&guest("debian.raw"), &selftest.disk());
        selftest
    }

    /// The disk's image.
    pub fn disk(&self) -> PathBuf {
        self.work.path().join("disk.raw")
    }

    /// What the kernel is told; `root` is how the initial RAM disk is to find the disk.
    pub fn cmdline(&self, root: &str) -> String {
        format!("test={root} cloud-init=disabled selftest selftest_url=http://GATEWAY:{}/body", self.port)
    }

    /// Fails unless what the guest told in `run` is what the host finds in the image, after a check that the file system is whole.
    #[track_caller]
    pub fn check(&self, run: &Run) {
        let disk = self.disk();
        assert_ne!(run.value("SELFTEST ADDRESS"), "", "{run}");
        assert_eq!(run.value("SELFTEST HTTP"), sum(&self.work.path().join("body")), "{run}");
        let check = run_host("e2fsck", &["-fn", disk.to_str().unwrap()]);
        assert_eq!(check.status, Some(0), "{check}");
        let blob = self.work.path().join("blob");
        run_host("debugfs", &["-R", &format!("dump /root/blob {}", blob.display()), disk.to_str().unwrap()]);
        assert_eq!(run.value("SELFTEST BLOB"), sum(&blob), "{run}");
    }
}

/// A machine that runs beside the test, which reads and types on its serial port.
pub struct Machine {
    child: Child,
    stdin: ChildStdin,
    output: Arc<Stream>,
    errors: Arc<Stream>,
    start: Instant,
    /// How much of the output was waited for already.
    seen: usize,
}

/// What came out of a pipe so far.
#[derive(Default)]
struct Stream {
    text: Mutex<(String, bool)>,
    changed: Condvar,
}

impl Stream {
    fn collect(mut from: impl Read + Send + 'static) -> Arc<Stream> {
        let stream = Arc::new(Stream::default());
        let filled = Arc::clone(&stream);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            loop {
                let n = from.read(&mut bytes).unwrap_or(0);
                let mut text = filled.text.lock().unwrap();
                text.0.push_str(&String::from_utf8_lossy(&bytes[..n]));
                text.1 = n == 0;
                filled.changed.notify_all();
                if n == 0 {
                    return;
                }
            }
        });
        stream
    }

    fn so_far(&self) -> String {
        self.text.lock().unwrap().0.clone()
    }
}

impl Machine {
    /// Starts `command`, usually `vmctl run`.
    pub fn start(mut command: Command) -> Machine {
        let start = Instant::now();
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
        let stdin = child.stdin.take().expect("a pipe");
        let output = Stream::collect(child.stdout.take().expect("a pipe"));
        let errors = Stream::collect(child.stderr.take().expect("a pipe"));
        Machine { child, stdin, output, errors, start, seen: 0 }
    }

    /// Types `line` and the Enter key.
    pub fn type_line(&mut self, line: &str) {
        self.stdin.write_all(format!("{line}\r").as_bytes()).unwrap();
    }

    /// Waits until the output, after what was waited for before, holds `text`; gives everything up to and with it.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str, patience: Duration) -> String {
        let until = Instant::now() + patience;
        let mut output = self.output.text.lock().unwrap();
        loop {
            if let Some(at) = output.0[self.seen..].find(text) {
                let end = self.seen + at + text.len();
                let found = output.0[self.seen..end].to_owned();
                self.seen = end;
                return found;
            }
            let left = until.saturating_duration_since(Instant::now());
            if output.1 || left.is_zero() {
                panic!("no «{text}» after {:.1?} in:\n{}\n--- errors\n{}", self.start.elapsed(), output.0, self.errors.so_far());
            }
            output = self.output.changed.wait_timeout(output, left).unwrap().0;
        }
    }

    /// The process's number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Kills the process, as the host's lack of memory would.
    pub fn kill(mut self) -> Run {
        self.child.kill().unwrap();
        self.end(HOST_PATIENCE)
    }

    /// Waits for the end, or kills it when patience ends.
    pub fn end(mut self, patience: Duration) -> Run {
        let status = wait(&mut self.child, Instant::now() + patience);
        let until = Instant::now() + Duration::from_secs(5);
        // The pipes close soon after the process; a child that kept one open must not keep the test.
        while !(self.output.text.lock().unwrap().1 && self.errors.text.lock().unwrap().1) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        Run { status, output: self.output.so_far(), errors: self.errors.so_far(), time: self.start.elapsed() }
    }
}

impl Drop for Machine {
    /// A test that failed leaves no machine behind.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
