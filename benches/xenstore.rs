//! `xenstored` beside Debian's two servers, C's `xenstored` and `oxenstored`, in one run.
//!
//! ```text
//! tests/common/xenstore/make target/guest
//! cargo bench -p xenstored --bench xenstore [-- ROUNDS] [apart]
//! ```
//!
//! `benches/xenstore/peers.c` stands in for the hypervisor that the two want. What counts is the processor time that the server takes for an
//! operation (`/proc/PID/schedstat`), as round trips depend on the scheduler's mood; servers take turns in each round, and the median of the rounds
//! is printed. Client and server share a processor: to wake another one costs whoever does it several times what XenStore's work costs, above all
//! in a virtual machine, and that is no server's doing. With `apart` they run where the scheduler puts them, and that cost is in the figures. Then
//! each bar is held against the medians, and the status is 1 if one is missed.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use abi::xen::xenstore::{HEADER_SIZE, Header, op};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use zerocopy::{FromBytes, IntoBytes};

#[path = "../tests/common/xenstore/mod.rs"]
mod clients;

/// Rounds, where the command line has no number.
const ROUNDS: usize = 7;
/// Operations of a workload in a round; fewer where the peers need milliseconds for one.
const MANY: u32 = 2000;
const FEW: u32 = 200;
/// Requests that are under way at once where they are pipelined.
const PIPELINED: u32 = 16;
/// Connections that do nothing, and watches on what does not change.
const IDLE: usize = 1000;
const FOREIGN_WATCHES: usize = 5000;
/// Nodes whose memory is measured, in directories of this many.
const NODES: usize = 100_000;
const DIRECTORY: usize = 100;

/// Most of C's processor time that an operation may take, and of C's memory that a node may.
const TIME_BAR: f64 = 0.5;
const MEMORY_BAR: f64 = 1.0;
/// Most of the quiet case's time that an operation may take beside idle connections or foreign watches.
const QUIET_BAR: f64 = 1.2;

type Workload = fn(&mut Connection, u32);
/// What is measured in each round, and how often. The last two are compared with the first two.
const WORKLOADS: [(&str, Workload, u32); 6] = [
    ("read", read, MANY),
    ("write", write, MANY),
    ("pipelined reads", read_pipelined, MANY),
    ("transaction", transaction, MANY / 4),
    ("read, 1,000 idle connections", read, FEW),
    ("write, 5,000 foreign watches", write, FEW),
];

fn main() -> ExitCode {
    let rounds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(ROUNDS);
    if !std::env::args().any(|argument| argument == "apart") {
        share_one_processor();
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let servers = [ours(directory.path()), c(directory.path()), ocaml(directory.path())];
    let mut times = [const { [const { Vec::new() }; WORKLOADS.len()] }; 3];
    for _ in 0..rounds {
        for (server, times) in servers.iter().zip(&mut times) {
            for ((name, workload, operations), times) in WORKLOADS.iter().zip(times) {
                times.push(server.measure(name, *workload, *operations));
            }
        }
    }
    let times = times.map(|workloads| workloads.map(median));
    let memory = servers.each_ref().map(Server::memory_of_a_node);

    println!("{:<30}{:>12}{:>12}{:>12}{:>10}{:>8}", "server µs per operation", "xenstored", "C", "oxenstored", "of C's", "bar");
    let mut held = true;
    for (row, (name, ..)) in WORKLOADS.iter().enumerate() {
        let of_row = times.map(|server| server[row]);
        held &= print(name, of_row, (row < 4).then_some(TIME_BAR));
    }
    held &= print("bytes of memory per node", memory, Some(MEMORY_BAR));
    println!("\n{:<30}{:>12}{:>12}{:>12}{:>18}", "compared with the quiet case", "xenstored", "C", "oxenstored", "bar");
    for (row, quiet) in [(4, 0), (5, 1)] {
        let [ours, c, ocaml] = times.map(|server| server[row] / server[quiet]);
        let verdict = verdict(ours, QUIET_BAR, &mut held);
        println!("{:<30}{ours:>12.2}{c:>12.2}{ocaml:>12.2}{verdict:>18}", WORKLOADS[row].0);
    }
    if held { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print(name: &str, [ours, c, ocaml]: [f64; 3], bar: Option<f64>) -> bool {
    let mut held = true;
    let verdict = bar.map_or(String::new(), |bar| verdict(ours / c, bar, &mut held));
    println!("{name:<30}{ours:>12.2}{c:>12.2}{ocaml:>12.2}{:>10.2}{verdict:>8}", ours / c);
    held
}

fn verdict(value: f64, bar: f64, held: &mut bool) -> String {
    *held &= value <= bar;
    format!("{bar} {}", if value <= bar { "✓" } else { "✗" })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A running server; it ends with this.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ours(directory: &Path) -> Server {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xenstored"));
    let socket = directory.join("socket");
    command.arg("--socket").arg(&socket);
    Server::start(command, socket)
}

fn c(directory: &Path) -> Server {
    let (directory, mut command) = peer(directory, "c", "xenstored");
    let socket = directory.join("socket");
    command.args(["-N", "-F"]).arg(directory.join("pid")).env("XENSTORED_RUNDIR", &directory).env("XENSTORED_PATH", &socket);
    Server::start(command, socket)
}

fn ocaml(directory: &Path) -> Server {
    let (directory, mut command) = peer(directory, "o", "oxenstored");
    let socket = directory.join("socket");
    let configuration = directory.join("oxenstored.conf");
    let at = |name: &str| directory.join(name).display().to_string();
    let text = format!(
        "pid-file = {}\nquota-activate = false\npersistent = false\nxenstored-log-file = /dev/null\nxenstored-kva = {}\nxenstored-port = {}\n",
        at("pid"),
        at("ring"),
        at("port")
    );
    std::fs::write(&configuration, text).expect("a file");
    command.args(["--no-fork", "--no-access-log", "--config-file"]).arg(configuration).env("PEER_SOCKET", &socket);
    Server::start(command, socket)
}

/// A directory for one of Debian's servers, and how it is started without Xen.
fn peer(directory: &Path, name: &str, program: &str) -> (PathBuf, Command) {
    let shim = directory.join("peers.so");
    let mut cc = Command::new("cc");
    cc.args(["-O2", "-shared", "-fPIC", "-o"]).arg(&shim);
    cc.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../benches/xenstore/peers.c"));
    assert!(cc.status().expect("cc").success(), "{cc:?}");
    let directory = directory.join(name);
    std::fs::create_dir(&directory).expect("a directory");
    std::fs::write(directory.join("ring"), [0; 8192]).expect("a file");
    std::fs::write(directory.join("port"), "1").expect("a file");
    let mut command = clients::program(&format!("usr/lib/xen-4.17/bin/{program}"));
    command.env("LD_PRELOAD", shim).env("PEER_DIR", &directory);
    (directory, command)
}

impl Server {
    fn start(mut command: Command, socket: PathBuf) -> Server {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("a server");
        let start = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            assert!(start.elapsed() < Duration::from_secs(30), "{command:?} has no socket");
            std::thread::sleep(Duration::from_millis(10));
        }
        Server { child, socket }
    }

    /// Microseconds of the server's processor time for an operation.
    fn measure(&self, name: &str, workload: Workload, operations: u32) -> f64 {
        let mut connection = self.connect();
        connection.ask(&message(op::WRITE, 0, b"/bench/key\0value"));
        let idle = if name.contains("idle") { IDLE } else { 0 };
        let _idle: Vec<Connection> = (0..idle).map(|_| self.connect()).collect();
        let watches = if name.contains("watches") { FOREIGN_WATCHES } else { 0 };
        let mut watcher = self.connect();
        for number in 0..watches {
            watcher.ask(&message(op::WATCH, 0, format!("/foreign/{number}\0token\0").as_bytes()));
        }
        // Whoever connected has been accepted, and caches are warm.
        workload(&mut connection, operations);
        let before = self.time();
        workload(&mut connection, operations);
        (self.time() - before).as_secs_f64() * 1e6 / f64::from(operations)
    }

    /// Bytes of resident memory that a node takes.
    fn memory_of_a_node(&self) -> f64 {
        let mut connection = self.connect();
        let before = self.resident();
        for first in (0..NODES).step_by(DIRECTORY) {
            let request = |number| format!("/memory/{first}/key-{number}\0value-{number}");
            let requests = (0..DIRECTORY).flat_map(|number| message(op::WRITE, 0, request(number).as_bytes()));
            connection.0.write_all(&requests.collect::<Vec<u8>>()).expect("a server that reads");
            (0..DIRECTORY).for_each(|_| drop(connection.reply()));
        }
        (self.resident() - before) / (NODES + NODES / DIRECTORY) as f64
    }

    /// The first number of schedstat: nanoseconds on a processor (Linux `Documentation/scheduler/sched-stats.rst`).
    fn time(&self) -> Duration {
        Duration::from_nanos(number_after(&self.process("schedstat"), ""))
    }

    /// VmRSS, in KiB (proc_pid_status(5)).
    fn resident(&self) -> f64 {
        number_after(&self.process("status"), "VmRSS:") as f64 * 1024.0
    }

    fn process(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).expect("a running server")
    }

    fn connect(&self) -> Connection {
        Connection(UnixStream::connect(&self.socket).expect("a connection"))
    }
}

fn number_after(text: &str, name: &str) -> u64 {
    let rest = text.split_once(name).map(|(_, rest)| rest.trim_start());
    rest.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).expect("a number of the kernel's")
}

/// Keeps this process and all that it starts on one processor.
fn share_one_processor() {
    let allowed = sched_getaffinity(None).expect("an affinity");
    let last = (0..CpuSet::MAX_CPU).rfind(|processor| allowed.is_set(*processor)).expect("a processor");
    let mut only = CpuSet::new();
    only.set(last);
    sched_setaffinity(None, &only).expect("an affinity");
}

/// A client that does nothing but what is measured.
struct Connection(UnixStream);

impl Connection {
    fn ask(&mut self, request: &[u8]) -> Vec<u8> {
        self.0.write_all(request).expect("a server that reads");
        self.reply()
    }

    /// The next reply. Events between replies are passed over.
    fn reply(&mut self) -> Vec<u8> {
        loop {
            let mut header = [0; HEADER_SIZE];
            self.0.read_exact(&mut header).expect("a server that answers");
            let header = Header::read_from_bytes(&header).expect("a header");
            let mut payload = vec![0; header.len.get() as usize];
            self.0.read_exact(&mut payload).expect("a server that answers");
            assert_ne!(header.op.get(), op::ERROR, "{}", payload.escape_ascii());
            if header.op.get() != op::WATCH_EVENT {
                return payload;
            }
        }
    }
}

fn message(operation: u32, tx: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).expect("a short message");
    let header = Header { op: operation.into(), req_id: 1.into(), tx_id: tx.into(), len: len.into() };
    [header.as_bytes(), payload].concat()
}

fn read(connection: &mut Connection, operations: u32) {
    let request = message(op::READ, 0, b"/bench/key\0");
    (0..operations).for_each(|_| drop(connection.ask(&request)));
}

fn write(connection: &mut Connection, operations: u32) {
    let request = message(op::WRITE, 0, b"/bench/key\0value");
    (0..operations).for_each(|_| drop(connection.ask(&request)));
}

fn read_pipelined(connection: &mut Connection, operations: u32) {
    let requests = message(op::READ, 0, b"/bench/key\0").repeat(PIPELINED as usize);
    let mut replies = vec![0; (HEADER_SIZE + b"value".len()) * PIPELINED as usize];
    for _ in 0..operations / PIPELINED {
        connection.0.write_all(&requests).expect("a server that reads");
        connection.0.read_exact(&mut replies).expect("a server that answers");
    }
}

/// Read, modify, write.
fn transaction(connection: &mut Connection, operations: u32) {
    for _ in 0..operations {
        let tx = connection.ask(&message(op::TRANSACTION_START, 0, b"\0"));
        let tx = std::str::from_utf8(&tx).ok().and_then(|text| text.trim_end_matches('\0').parse().ok()).expect("a number");
        connection.ask(&message(op::READ, tx, b"/bench/key\0"));
        connection.ask(&message(op::WRITE, tx, b"/bench/key\0value"));
        connection.ask(&message(op::TRANSACTION_END, tx, b"T\0"));
    }
}
