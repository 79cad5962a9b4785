//! `xenstored` before Debian's own clients, before our client library, and before clients that mean no good; over kills and upgrades.

// Tests fail by panicking; the lint knows only functions marked as tests.
#![allow(clippy::unwrap_used)]

#[path = "common/xenstore/mod.rs"]
mod clients;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use abi::xen::xenstore::{Header, op};
use clients::Clients;
use redb::StorageBackend;
use redb::backends::InMemoryBackend;
use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use xenstore::client::{Client, ClientError, Refusal};
use xenstore::{Config, DomId, NoHost, Perms, Server, SharedStore, Store};
use xenstored::{Listener, Persistence, Service};
use zerocopy::{FromBytes, IntoBytes};

/// For what takes moments.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running `xenstored`.
struct Daemon {
    directory: TempDir,
    child: Child,
}

impl Daemon {
    fn start(more: &[&str]) -> Daemon {
        let directory = tempfile::tempdir().unwrap();
        let child = program(directory.path()).args(more).stderr(Stdio::piped()).spawn().unwrap();
        let daemon = Daemon { directory, child };
        eventually(|| Client::connect(&daemon.socket()).is_ok());
        daemon
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn client(&self) -> Client {
        Client::connect(&self.socket()).unwrap()
    }

    /// A connection to speak the wire protocol on, or something else.
    fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn debian(&self) -> Clients {
        Clients { socket: self.socket() }
    }

    /// Ends it by `signal`; its status and log.
    fn end(mut self, signal: Signal) -> Output {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        let mut stderr = Vec::new();
        self.child.stderr.take().unwrap().read_to_end(&mut stderr).unwrap();
        Output { status: self.child.wait().unwrap(), stdout: Vec::new(), stderr }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn program(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xenstored"));
    command.arg("--socket").arg(directory.join("socket"));
    command
}

#[track_caller]
fn eventually(mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "it did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn message(operation: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    let header = Header { op: operation.into(), req_id: 7.into(), tx_id: 0.into(), len: len.into() };
    [header.as_bytes(), payload].concat()
}

fn reply(stream: &mut UnixStream) -> (Header, Vec<u8>) {
    let mut header = [0; size_of::<Header>()];
    stream.read_exact(&mut header).unwrap();
    let header = Header::read_from_bytes(&header).unwrap();
    let mut payload = vec![0; header.len.get() as usize];
    stream.read_exact(&mut payload).unwrap();
    (header, payload)
}

fn is_refused<T>(result: Result<T, ClientError>, refusal: Refusal) -> bool {
    matches!(result, Err(ClientError::Refused(said)) if said == refusal)
}

#[test]
fn debians_clients_write_read_list_and_remove() {
    let daemon = Daemon::start(&[]);
    daemon.debian().write_read_list_and_remove();
    daemon.debian().tool("write", &["relative", "home"]);
    assert_eq!(daemon.debian().tool("read", &["/local/domain/0/relative"]), "home\n");
}

#[test]
fn debians_client_lists_what_no_message_holds() {
    let daemon = Daemon::start(&[]);
    let mut client = daemon.client();
    let names: Vec<String> = (0..1000).map(|number| format!("child-{number:04}")).collect();
    names.iter().for_each(|name| client.mkdir(&format!("/wide/{name}")).unwrap());
    assert_eq!(daemon.debian().tool("list", &["/wide"]), names.join("\n") + "\n");
    assert_eq!(client.list("/wide").unwrap(), names);
}

#[test]
fn debians_client_watches() {
    Daemon::start(&[]).debian().watch();
}

#[test]
fn debians_test_suite_passes() {
    Daemon::start(&[]).debian().test_xenstore();
}

#[test]
fn pyxs_reads_writes_watches_and_commits() {
    Daemon::start(&[]).debian().pyxs();
}

#[test]
fn library_reads_writes_and_names_what_is_refused() {
    let daemon = Daemon::start(&[]);
    let mut client = daemon.client();
    client.write("/lib/value", &[0, 255, 10]).unwrap();
    assert_eq!(client.read("/lib/value").unwrap(), [0, 255, 10]);
    let perms = Perms::parse([&b"n5"[..], b"r6"].into_iter()).unwrap();
    client.set_perms("/lib/value", &perms).unwrap();
    assert_eq!(client.perms("/lib/value").unwrap(), perms);
    assert!(client.exists("/lib").unwrap() && !client.exists("/lib/other").unwrap());
    assert_eq!(client.domain_path(DomId(5)).unwrap(), "/local/domain/5");
    assert!(is_refused(client.read("/lib/other"), Refusal::Missing));
    assert!(is_refused(client.read("/lib//other"), Refusal::Invalid));
    assert!(is_refused(client.control(&["dance"]), Refusal::Invalid));
    assert!(matches!(client.read("/lib\0"), Err(ClientError::ZeroByte)));
    assert!(matches!(client.write("/lib", &[0; 4096]), Err(ClientError::TooLong(4101))));
    assert_eq!(client.control(&["check"]).unwrap(), "OK");
}

#[test]
fn transactions_that_conflict_are_done_again_and_none_is_lost() {
    let daemon = Daemon::start(&[]);
    daemon.client().write("/count", b"0").unwrap();
    let count = |mut client: Client| {
        for _ in 0..50 {
            client
                .transaction(|store| {
                    let value = String::from_utf8(store.read("/count")?).unwrap().parse::<u32>().unwrap();
                    store.write("/count", (value + 1).to_string().as_bytes())
                })
                .unwrap();
        }
    };
    std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(|| count(daemon.client())))));
    let mut client = daemon.client();
    assert_eq!(client.read("/count").unwrap(), b"200");
    let failed = client.transaction(|store| store.write("/count", b"x").and_then(|()| store.read("/nowhere")));
    assert!(is_refused(failed, Refusal::Missing));
    assert_eq!(client.read("/count").unwrap(), b"200");
}

#[test]
fn watches_tell_of_others_and_end() {
    let daemon = Daemon::start(&[]);
    let (mut client, mut other) = (daemon.client(), daemon.client());
    client.watch("/a", "token").unwrap();
    assert!(is_refused(client.watch("/a", "token"), Refusal::Exists));
    other.write("/a/b", b"1").unwrap();
    let told = [client.next_event().unwrap(), client.next_event().unwrap()];
    assert_eq!(told.map(|event| (event.path, event.token)), ["/a", "/a/b"].map(|path| (path.into(), "token".into())));
    client.unwatch("/a", "token").unwrap();
    other.write("/a/b", b"2").unwrap();
    client.read("/a/b").unwrap();
    assert_eq!(client.take_event(), None);
    assert!(is_refused(client.unwatch("/a", "token"), Refusal::Missing));
}

#[test]
fn message_may_come_byte_by_byte() {
    let daemon = Daemon::start(&[]);
    daemon.client().write("/slow", b"value").unwrap();
    let mut stream = daemon.raw();
    for byte in message(op::READ, b"/slow\0") {
        stream.write_all(&[byte]).unwrap();
    }
    assert_eq!(reply(&mut stream).1, b"value");
}

#[test]
fn message_that_is_too_long_ends_its_connection_after_what_came_before() {
    let daemon = Daemon::start(&[]);
    let mut other = daemon.client();
    other.write("/a", b"value").unwrap();
    let mut stream = daemon.raw();
    let mut bytes = message(op::READ, b"/a\0");
    bytes.extend(message(op::WRITE, &[b'/'; 4097]));
    stream.write_all(&bytes).unwrap();
    assert_eq!(reply(&mut stream).1, b"value");
    let mut rest = Vec::new();
    // The server may close before it has read all that was sent, which resets the connection.
    let _ = stream.read_to_end(&mut rest);
    assert_eq!(rest, b"");
    assert_eq!(other.read("/a").unwrap(), b"value");
}

#[test]
fn client_that_does_not_read_stalls_itself_alone() {
    let daemon = Daemon::start(&[]);
    let mut other = daemon.client();
    other.write("/large", &[b'x'; 4000]).unwrap();
    let mut greedy = daemon.raw();
    greedy.write_all(&message(op::WATCH, b"/hot\0token\0")).unwrap();
    greedy.set_nonblocking(true).unwrap();
    let requests = message(op::READ, b"/large\0").repeat(1000);
    while greedy.write(&requests).is_ok() {}
    for number in 0..2000 {
        other.write("/hot", number.to_string().as_bytes()).unwrap();
    }
    let report = other.control(&["memreport"]).unwrap();
    assert!(report.contains("clients: 2"), "{report}");
    // It gets all that it has asked for, once it reads.
    greedy.set_nonblocking(false).unwrap();
    assert_eq!(reply(&mut greedy).1, b"OK\0");
    let replies = (0..200).map(|_| reply(&mut greedy)).filter(|(header, _)| header.op.get() == op::READ);
    assert!(replies.map(|(_, payload)| assert_eq!(payload.len(), 4000)).count() > 150);
}

#[test]
fn client_that_goes_leaves_nothing() {
    let daemon = Daemon::start(&[]);
    let mut stream = daemon.raw();
    stream.write_all(&message(op::WATCH, b"/a\0token\0")).unwrap();
    stream.write_all(&message(op::TRANSACTION_START, b"\0")).unwrap();
    reply(&mut stream);
    drop(stream);
    let mut client = daemon.client();
    eventually(|| client.control(&["memreport"]).unwrap().contains("clients: 1"));
    assert_eq!(client.control(&["check"]).unwrap(), "OK");
}

#[test]
fn quotas_of_the_command_line_hold() {
    let daemon = Daemon::start(&["--quota", "nodes=7", "--quota", "watches=0"]);
    let quotas = daemon.client().control(&["quota"]).unwrap();
    assert!(quotas.contains("nodes: 7\n") && quotas.contains("watches: 0\n"), "{quotas}");
}

#[test]
fn signals_end_it_and_remove_its_files() {
    for signal in [Signal::TERM, Signal::INT] {
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let daemon = Daemon::start(&["--pid-file", pid.to_str().unwrap()]);
        assert_eq!(std::fs::read_to_string(&pid).unwrap(), format!("{}\n", daemon.child.id()));
        let (socket, mut client) = (daemon.socket(), daemon.client());
        let output = daemon.end(signal);
        assert!(output.status.success(), "{output:?}");
        assert!(!socket.exists() && !pid.exists());
        assert!(matches!(client.read("/"), Err(ClientError::Connection(_))));
    }
}

#[test]
fn second_server_is_refused_and_a_killed_ones_socket_replaced() {
    let mut daemon = Daemon::start(&[]);
    let second = program(daemon.directory.path()).output().unwrap();
    assert!(!second.status.success());
    assert!(String::from_utf8(second.stderr).unwrap().contains("in use by a running program"));
    daemon.child.kill().unwrap();
    daemon.child.wait().unwrap();
    daemon.child = program(daemon.directory.path()).spawn().unwrap();
    eventually(|| Client::connect(&daemon.socket()).is_ok());
}

/// What a live upgrade must not touch: a watch, half a request, a connection that is in the middle of nothing.
struct Witness {
    watcher: Client,
    half: UnixStream,
    other: Client,
}

impl Witness {
    fn new(daemon: &Daemon) -> Witness {
        let (mut watcher, mut half, mut other) = (daemon.client(), daemon.raw(), daemon.client());
        other.write("/kept", b"value").unwrap();
        watcher.watch("/kept", "token").unwrap();
        assert_eq!(watcher.next_event().unwrap().path, "/kept");
        let request = message(op::READ, b"/kept\0");
        half.write_all(&request[..19]).unwrap();
        Witness { watcher, half, other }
    }

    #[track_caller]
    fn goes_on(mut self) {
        self.half.write_all(&message(op::READ, b"/kept\0")[19..]).unwrap();
        assert_eq!(reply(&mut self.half).1, b"value");
        self.other.write("/kept/more", b"1").unwrap();
        let event = self.watcher.next_event().unwrap();
        assert_eq!((event.path.as_str(), event.token.as_str()), ("/kept/more", "token"));
        assert_eq!(self.other.control(&["check"]).unwrap(), "OK");
    }
}

/// When the process became the program that it is.
fn started(pid: u32) -> String {
    std::fs::read_link(format!("/proc/{pid}/exe")).unwrap().display().to_string()
}

#[test]
fn upgrade_keeps_connections_watches_and_half_requests() {
    let daemon = Daemon::start(&[]);
    let copy = daemon.directory.path().join("newer");
    std::fs::copy(env!("CARGO_BIN_EXE_xenstored"), &copy).unwrap();
    let (mut client, witness) = (daemon.client(), Witness::new(&daemon));
    assert_eq!(client.control(&["live-update", "-f", copy.to_str().unwrap()]).unwrap(), "OK");
    assert_eq!(client.control(&["live-update", "-s", "-t", "60"]).unwrap(), "OK");
    eventually(|| started(daemon.child.id()) == copy.display().to_string());
    witness.goes_on();
    client.write("/after", b"1").unwrap();
    assert_eq!(daemon.client().read("/after").unwrap(), b"1", "and new clients are let in");
    // Again, by the signal, and in the end it ends as ever.
    let witness = Witness::new(&daemon);
    kill_process(Pid::from_child(&daemon.child), Signal::USR2).unwrap();
    witness.goes_on();
    let socket = daemon.socket();
    let output = daemon.end(Signal::TERM);
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && !socket.exists());
    assert_eq!(log.matches("xenstored: going on connections=").count(), 2, "{log}");
}

#[test]
fn xens_own_tool_upgrades() {
    let daemon = Daemon::start(&[]);
    let witness = Witness::new(&daemon);
    let mut tool = clients::program("usr/lib/xen-4.17/bin/xenstore-control");
    tool.env("XENSTORED_PATH", daemon.socket()).args(["live-update", env!("CARGO_BIN_EXE_xenstored")]);
    let output = tool.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    witness.goes_on();
}

#[test]
fn upgrade_waits_for_transactions_but_not_for_ever() {
    let daemon = Daemon::start(&[]);
    let (mut quick, mut slow) = (daemon.client(), daemon.client());
    let signal = || kill_process(Pid::from_child(&daemon.child), Signal::USR2).unwrap();
    let mut attempts = 0;
    quick
        .transaction(|store| {
            attempts += 1;
            signal();
            store.write("/quick", b"1")
        })
        .unwrap();
    assert_eq!(attempts, 1);
    let mut attempts = 0;
    slow.transaction(|store| {
        attempts += 1;
        if attempts == 1 {
            signal();
            std::thread::sleep(Duration::from_secs(2));
        }
        store.write("/slow", b"1")
    })
    .unwrap();
    assert_eq!((attempts, daemon.client().read("/slow").unwrap()), (2, b"1".to_vec()));
}

#[test]
fn program_that_cannot_go_on_is_not_upgraded_to() {
    let daemon = Daemon::start(&[]);
    let mut client = daemon.client();
    for bad in ["/nonexistent", "/etc/passwd", "relative"] {
        assert!(is_refused(client.control(&["live-update", "-f", bad]), Refusal::Invalid), "{bad}");
    }
    for other in ["/bin/false", "/bin/true"] {
        let witness = Witness::new(&daemon);
        assert_eq!(client.control(&["live-update", "-f", other]).unwrap(), "OK");
        assert_eq!(client.control(&["live-update", "-s"]).unwrap(), "OK");
        witness.goes_on();
    }
    let log = String::from_utf8(daemon.end(Signal::TERM).stderr).unwrap();
    assert_eq!(log.matches("cannot go on as another program").count(), 2, "{log}");
}

#[test]
fn acknowledged_writes_outlive_kills_and_transactions_are_whole() {
    let mut daemon = Daemon::start(&[]);
    let file = daemon.directory.path().join("keys");
    daemon.child.kill().unwrap();
    daemon.child.wait().unwrap();
    let (mut acknowledged, mut pairs) = (vec![0u32; 3], 0u32);
    for round in 0..8u64 {
        daemon.child = program(daemon.directory.path()).arg("--persist").arg(&file).spawn().unwrap();
        eventually(|| Client::connect(&daemon.socket()).is_ok());
        let mut client = daemon.client();
        for (writer, last) in acknowledged.iter().enumerate() {
            let found = client.read(&format!("/writer/{writer}")).map_or(0, |value| String::from_utf8(value).unwrap().parse().unwrap());
            assert!(found == *last || found == last + 1, "round {round}: {found} after {last}");
        }
        let [one, two] = ["/pair/one", "/pair/two"].map(|path| client.read(path).ok());
        assert_eq!(one, two, "round {round}: half a transaction");
        let found = one.map_or(0, |value| String::from_utf8(value).unwrap().parse().unwrap());
        assert!(found == pairs || found == pairs + 1, "round {round}: pair {found} after {pairs}");

        let pid = Pid::from_child(&daemon.child);
        std::thread::scope(|scope| {
            for (writer, last) in acknowledged.iter_mut().enumerate() {
                let mut client = daemon.client();
                scope.spawn(move || {
                    while client.write(&format!("/writer/{writer}"), (*last + 1).to_string().as_bytes()).is_ok() {
                        *last += 1;
                    }
                });
            }
            scope.spawn(|| {
                let both = |value: u32| {
                    move |store: &mut xenstore::client::Requests| {
                        store.write("/pair/one", value.to_string().as_bytes())?;
                        store.write("/pair/two", value.to_string().as_bytes())
                    }
                };
                while client.transaction(both(pairs + 1)).is_ok() {
                    pairs += 1;
                }
            });
            std::thread::sleep(Duration::from_millis(30 + 17 * round));
            kill_process(pid, Signal::KILL).unwrap();
        });
        daemon.child.wait().unwrap();
    }
    assert!(acknowledged.iter().all(|count| *count > 0) && pairs > 0, "{acknowledged:?} {pairs}");
}

#[test]
fn persistent_keys_go_through_an_upgrade() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("keys");
    let daemon = Daemon::start(&["--persist", file.to_str().unwrap()]);
    let mut client = daemon.client();
    client.write("/before", b"1").unwrap();
    // It does not read, so that its last request is done by the next program only.
    client.write("/large", &[b'x'; 4000]).unwrap();
    let mut late = daemon.raw();
    late.write_all(&[message(op::READ, b"/large\0").repeat(150), message(op::WRITE, b"/late\0value")].concat()).unwrap();
    assert!(!client.exists("/late").unwrap());
    kill_process(Pid::from_child(&daemon.child), Signal::USR2).unwrap();
    client.write("/after", b"1").unwrap();
    client.remove("/before").unwrap();
    let last = (0..151).map(|_| reply(&mut late)).last();
    assert!(last.is_some_and(|(header, _)| header.op.get() == op::WRITE));
    drop(daemon);
    let daemon = Daemon::start(&["--persist", file.to_str().unwrap()]);
    let mut client = daemon.client();
    assert!(client.exists("/after").unwrap() && !client.exists("/before").unwrap());
    assert_eq!(client.read("/late").unwrap(), b"value");
}

#[test]
fn daemon_is_in_the_background_once_its_socket_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let mut command = program(directory.path());
    command.arg("--daemon").arg("--pid-file").arg(path("pid")).arg("--log").arg(path("log"));
    assert!(command.status().unwrap().success());
    let mut client = Client::connect(&path("socket")).unwrap();
    client.control(&["print", "hello"]).unwrap();
    let pid = std::fs::read_to_string(path("pid")).unwrap().trim().parse().unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    eventually(|| !path("socket").exists() && !path("pid").exists());
    assert!(std::fs::read_to_string(path("log")).unwrap().contains("hello"));
}

#[test]
fn places_come_from_xens_variables() {
    let directory = tempfile::tempdir().unwrap();
    let start = |name: &str, value: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xenstored"));
        command.env_remove("XENSTORED_PATH").env_remove("XENSTORED_RUNDIR").env(name, value).spawn().unwrap()
    };
    let (run, path) = (directory.path().join("run"), directory.path().join("path"));
    for (mut child, socket) in [(start("XENSTORED_RUNDIR", &run), run.join("socket")), (start("XENSTORED_PATH", &path), path)] {
        eventually(|| Client::connect(&socket).is_ok());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn store_of_this_process_is_served_and_a_domain_waits_no_longer_than_the_limit() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let (store, stop) = (SharedStore::new(Config::default()), eventfd(0, EventfdFlags::CLOEXEC).unwrap());
    let listener = Listener::bind(&path).unwrap();
    std::thread::scope(|scope| {
        let service = scope.spawn(|| xenstored::serve(listener, &store, &stop));
        let host = store.host();
        let mut client = Client::connect(&path).unwrap();
        client.watch("/here", "token").unwrap();
        client.next_event().unwrap();
        host.write("/here/now", b"0").unwrap();
        assert_eq!(client.next_event().unwrap().path, "/here/now");

        // Its commits fail until it is given the store for itself, and then it does not end its transaction.
        let mut losses = 0;
        let never = client.transaction(|view| {
            view.read("/here/now")?;
            view.write("/there", b"1")?;
            losses += 1;
            if store.with(|server| server.is_holding()) {
                eventually(|| !store.with(|server| server.is_holding()));
                return Err(Refusal::Busy.into());
            }
            host.write("/here/now", losses.to_string().as_bytes()).unwrap();
            Ok(())
        });
        assert!(is_refused(never, Refusal::Busy));
        rustix::io::write(&stop, &1u64.to_ne_bytes()).unwrap();
        service.join().unwrap().unwrap();
        assert!(matches!(client.read("/"), Err(ClientError::Connection(_))));
    });
    assert!(!path.exists());
}

/// A disk in memory that counts how often it was made durable, and takes its time for that.
#[derive(Debug, Default)]
struct SlowDisk {
    memory: InMemoryBackend,
    syncs: Arc<AtomicUsize>,
}

impl StorageBackend for SlowDisk {
    fn len(&self) -> std::io::Result<u64> {
        self.memory.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        self.memory.read(offset, out)
    }

    fn set_len(&self, length: u64) -> std::io::Result<()> {
        self.memory.set_len(length)
    }

    fn sync_data(&self) -> std::io::Result<()> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(5));
        self.memory.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.memory.write(offset, data)
    }
}

#[test]
fn writes_of_several_clients_share_a_commit() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let disk = SlowDisk::default();
    let syncs = disk.syncs.clone();
    let persistence = Persistence::on(disk).unwrap();
    let mut server = Server::new(Store::new(Config { journal: true, ..Config::default() }), Box::new(NoHost));
    persistence.restore(&mut server).unwrap();
    let listener = Listener::bind(&path).unwrap();
    let service = Service { listener, store: SharedStore::of(server), persistence: Some(persistence), connections: Vec::new() };
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let before = syncs.load(Ordering::Relaxed);
    std::thread::scope(|scope| {
        let service = scope.spawn(|| service.run(stop.as_fd(), None).map(drop));
        let writer = |number: u32| {
            let mut client = Client::connect(&path).unwrap();
            (0..20).for_each(|value: u32| client.write(&format!("/{number}"), value.to_string().as_bytes()).unwrap());
        };
        let writers: Vec<_> = (0..8).map(|number| scope.spawn(move || writer(number))).collect();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        rustix::io::write(&stop, &1u64.to_ne_bytes()).unwrap();
        service.join().unwrap().unwrap();
    });
    let syncs = syncs.load(Ordering::Relaxed) - before;
    assert!((20..80).contains(&syncs), "{syncs} times durable for 8 x 20 writes");
}
