//! `xenstored --persist`: what is there after a crash, at every write that the disk sees; after kills of the real program; and when the disk fails.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "common/xenstored.rs"]
mod daemon;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use daemon::{Daemon, arguments, eventually};
use redb::StorageBackend;
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use xenstore::client::{Client, ClientError, Refusal};
use xenstore::{Config, DomId, NoHost, NodeState, Op, Perms, Server};
use xenstored::keys::{Keys, KeysError};

/// A disk with a cache that a crash loses, and a time when it crashes.
#[derive(Debug, Clone, Default)]
struct Disk(Arc<Mutex<Contents>>);

#[derive(Debug, Default)]
struct Contents {
    /// What a crash leaves for sure.
    synced: Vec<u8>,
    /// Since then.
    unsynced: Vec<Change>,
    /// What reads see.
    cached: Vec<u8>,
    /// Changes and syncs until now, and at which of them it crashes.
    steps: usize,
    crashes_at: Option<usize>,
}

#[derive(Debug, Clone)]
enum Change {
    Length(usize),
    Write(usize, Vec<u8>),
}

impl Change {
    fn apply(&self, to: &mut Vec<u8>) {
        match self {
            Change::Length(length) => to.resize(*length, 0),
            Change::Write(at, bytes) => {
                to.resize(to.len().max(at + bytes.len()), 0);
                to[*at..at + bytes.len()].copy_from_slice(bytes);
            }
        }
    }
}

/// What of the cache reached the disk before the crash.
#[derive(Debug, Clone, Copy)]
enum Survives {
    Nothing,
    Everything,
    EverySecond,
    /// The last write is torn in the middle.
    HalfOfTheLast,
}

impl Disk {
    fn holding(bytes: Vec<u8>) -> Disk {
        Disk(Arc::new(Mutex::new(Contents { synced: bytes.clone(), cached: bytes, ..Contents::default() })))
    }

    /// With a file of keys that has none yet.
    fn new() -> Disk {
        let disk = Disk::default();
        drop(Keys::on(disk.clone()).unwrap());
        let bytes = disk.lock().cached.clone();
        Disk::holding(bytes)
    }

    fn crashing_at(step: usize) -> Disk {
        let disk = Disk::new();
        disk.lock().crashes_at = Some(step);
        disk
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap()
    }

    fn after_crash(&self, survives: Survives) -> Disk {
        let contents = self.lock();
        let mut bytes = contents.synced.clone();
        let count = contents.unsynced.len();
        for (change, number) in contents.unsynced.iter().zip(1..) {
            match (survives, change) {
                (Survives::Nothing, _) => {}
                (Survives::EverySecond, Change::Write(..)) if number % 2 == 0 => {}
                (Survives::HalfOfTheLast, Change::Write(at, written)) if number == count => {
                    Change::Write(*at, written[..written.len() / 2].to_vec()).apply(&mut bytes);
                }
                _ => change.apply(&mut bytes),
            }
        }
        Disk::holding(bytes)
    }

    fn step(&self) -> io::Result<MutexGuard<'_, Contents>> {
        let mut contents = self.lock();
        contents.steps += 1;
        match contents.crashes_at {
            Some(at) if contents.steps >= at => Err(io::Error::other("crashed")),
            _ => Ok(contents),
        }
    }

    fn change(&self, change: Change) -> io::Result<()> {
        // The write that the crash cuts may have arrived.
        let result = self.step().map(drop);
        let mut contents = self.lock();
        if contents.crashes_at.is_none_or(|at| contents.steps <= at) {
            change.apply(&mut contents.cached);
            contents.unsynced.push(change);
        }
        result
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.lock().cached.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let (contents, at) = (self.lock(), offset as usize);
        let bytes = contents.cached.get(at..at + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::Length(len as usize))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut contents = self.step()?;
        contents.synced = contents.cached.clone();
        contents.unsynced.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Change::Write(offset as usize, data.to_vec()))
    }
}

fn path(text: &str) -> xenstore::Path {
    xenstore::Path::parse(text.as_bytes(), DomId::HOST, 0).unwrap()
}

fn lasting(server: &Server) -> Vec<NodeState> {
    let mut nodes = server.state().nodes;
    nodes.retain(|node| !node.path.starts_with("/local"));
    nodes.sort_by(|a, b| a.path.cmp(&b.path));
    nodes
}

/// Changes of one turn after the other, of every kind, small and large.
fn turns() -> Vec<Vec<Op>> {
    let write = |text: &str, value: &[u8]| Op::Write(path(text), value.into());
    let many = |round: usize| (0..40).map(|number| write(&format!("/many/n{number}"), &[b'a'; 200][..100 + round])).collect();
    vec![
        vec![write("/tool/a", b"1"), write("/tool/b/c", b"2")],
        many(0),
        vec![Op::SetPerms(path("/tool/a"), Arc::new(Perms::private(DomId(0)))), write("/tool/a", b"changed")],
        vec![write("/large", &[b'x'; 20_000])],
        vec![Op::Remove(path("/tool/b")), write("/tool/b", b"again"), write("/local/domain/1/name", b"not kept")],
        many(1),
        vec![Op::Remove(path("/many")), Op::Mkdir(path("/last"))],
    ]
}

/// Does the turns until the disk fails. What was acknowledged by then, and what the turn that failed would have made of it.
fn run(disk: &Disk) -> (Vec<NodeState>, Vec<NodeState>) {
    let Ok((keys, nodes)) = Keys::on(disk.clone()) else { return (Vec::new(), Vec::new()) };
    let mut server = Server::with_nodes(&nodes, Config::default(), Box::new(NoHost)).unwrap();
    server.keep(&nodes).unwrap();
    let host = server.connect(DomId::HOST, true);
    let mut acknowledged = nodes;
    for turn in [Vec::new()].into_iter().chain(turns()) {
        let tx = server.store().begin(host).unwrap();
        turn.into_iter().for_each(|op| server.store().apply(host, tx, op).unwrap());
        server.store().commit(host, tx).unwrap();
        if keys.write(&server.unkept().unwrap()).is_err() {
            return (acknowledged, lasting(&server));
        }
        server.settle(true);
        acknowledged = lasting(&server);
    }
    (acknowledged.clone(), acknowledged)
}

#[test]
fn crash_at_any_write_loses_nothing_acknowledged_and_leaves_no_half_transaction() {
    let whole = Disk::new();
    run(&whole);
    let steps = whole.lock().steps;
    assert!(steps > 60, "{steps} steps are too few to be a test");
    for at in 1..=steps {
        let disk = Disk::crashing_at(at);
        let (acknowledged, attempted) = run(&disk);
        for survives in [Survives::Nothing, Survives::Everything, Survives::EverySecond, Survives::HalfOfTheLast] {
            let (_keys, found) = Keys::on(disk.after_crash(survives)).unwrap_or_else(|error| panic!("step {at}, {survives:?}: {error}"));
            assert!(found == acknowledged || found == attempted, "step {at} of {steps}, {survives:?}");
        }
    }
}

#[test]
fn file_that_is_something_else_or_was_changed_is_refused_and_not_touched() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("keys");
    let refusal = || match Keys::open(&file) {
        Ok(_) => panic!("opened"),
        Err(error) => error,
    };
    std::fs::write(&file, "precious".repeat(2000)).unwrap();
    assert!(matches!(refusal(), KeysError::Foreign(_)), "{}", refusal());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious".repeat(2000));
    std::fs::remove_file(&file).unwrap();

    let other = redb::TableDefinition::<&str, &str>::new("addresses");
    let database = redb::Database::create(&file).unwrap();
    let transaction = database.begin_write().unwrap();
    transaction.open_table(other).unwrap().insert("a", "b").unwrap();
    transaction.commit().unwrap();
    drop(database);
    assert!(matches!(refusal(), KeysError::Foreign(_)), "{}", refusal());
    std::fs::remove_file(&file).unwrap();

    drop(Keys::open(&file).unwrap());
    let database = redb::Database::open(&file).unwrap();
    let transaction = database.begin_write().unwrap();
    transaction.open_table(redb::TableDefinition::<&str, u64>::new("meta")).unwrap().insert("xenstored", 7).unwrap();
    transaction.commit().unwrap();
    drop(database);
    assert!(matches!(refusal(), KeysError::Version(7)), "{}", refusal());
}

#[test]
fn file_is_its_owners_alone_and_used_by_one_program() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("keys");
    let _open = Keys::open(&file).unwrap();
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert!(matches!(Keys::open(&file), Err(KeysError::InUse)));
}

#[test]
fn damage_is_found_or_does_not_matter() {
    let whole = Disk::new();
    let (acknowledged, _) = run(&whole);
    let bytes = whole.lock().synced.clone();
    for at in (0..bytes.len()).step_by(509) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        if let Ok((_keys, found)) = Keys::on(Disk::holding(damaged)) {
            assert!(found == acknowledged, "byte {at}");
        }
    }
}

const PERSIST: [&str; 2] = ["--persist", "keys"];

#[test]
fn keys_outlive_the_program_and_domains_do_not() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(directory.path(), &PERSIST);
    let mut client = daemon.client();
    client.write("/tool/a", b"one").unwrap();
    client.set_perms("/tool/a", &Perms::parse([&b"n0"[..], b"r5"].into_iter()).unwrap()).unwrap();
    client.write("/local/domain/5/name", b"guest").unwrap();
    client.transaction(|requests| requests.write("/tool/b", b"two")).unwrap();
    daemon.end(Signal::KILL);
    let daemon = Daemon::start(directory.path(), &PERSIST);
    let mut client = daemon.client();
    assert_eq!(client.read("/tool/a").unwrap(), b"one");
    assert_eq!(client.read("/tool/b").unwrap(), b"two");
    assert_eq!(client.perms("/tool/a").unwrap(), Perms::private(DomId::HOST));
    assert!(!client.exists("/local/domain/5").unwrap());
    assert!(daemon.end(Signal::TERM).success());
    let daemon = Daemon::start(directory.path(), &PERSIST);
    assert_eq!(daemon.client().read("/tool/b").unwrap(), b"two");
}

#[test]
fn second_program_and_foreign_file_are_explained() {
    let directory = tempfile::tempdir().unwrap();
    let _daemon = Daemon::start(directory.path(), &PERSIST);
    let refusal = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xenstored"));
        let other = directory.path().join("other");
        std::fs::create_dir_all(&other).unwrap();
        let output = command.args(arguments(&other, more)).current_dir(directory.path()).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let said = refusal(&PERSIST);
    assert!(said.starts_with("xenstored: ") && said.ends_with("keys: in use by another program\n"), "{said}");
    std::fs::write(directory.path().join("text"), "no database").unwrap();
    let said = refusal(&["--persist", "text"]);
    assert!(said.contains("text: is no file of xenstored's keys"), "{said}");
}

/// Writes to keys of its own until the server is gone. Each turn is a transaction on two keys, which must be equal ever after.
fn write_until_killed(socket: &Path, name: &str, from: u64) -> (u64, u64) {
    let (mut acknowledged, mut next) = (from, from + 1);
    let Ok(mut client) = Client::connect(socket) else { return (acknowledged, next) };
    loop {
        let value = next.to_string();
        let done = client.transaction(|requests| {
            requests.write(&format!("/clients/{name}/first"), value.as_bytes())?;
            requests.write(&format!("/clients/{name}/second"), value.as_bytes())
        });
        match done {
            Ok(()) => acknowledged = next,
            Err(_) => return (acknowledged, next),
        }
        next += 1;
    }
}

#[test]
fn killed_again_and_again_while_clients_write_it_has_every_acknowledged_write() {
    let directory = tempfile::tempdir().unwrap();
    let mut reached: BTreeMap<String, (u64, u64)> = (0..4).map(|number| (format!("c{number}"), (0, 0))).collect();
    for round in 0..15u64 {
        let daemon = Daemon::start(directory.path(), &PERSIST);
        let mut client = daemon.client();
        for (name, (acknowledged, attempted)) in &mut reached {
            let value = |key| match client.read(&format!("/clients/{name}/{key}")) {
                Ok(value) => String::from_utf8(value).unwrap().parse::<u64>().unwrap(),
                Err(ClientError::Refused(Refusal::Missing)) => 0,
                Err(error) => panic!("{error}"),
            };
            let mut value = value;
            let (first, second) = (value("first"), value("second"));
            assert_eq!(first, second, "{name} has half a transaction");
            assert!((*acknowledged..=*attempted).contains(&first), "{name}: {first} is not from {acknowledged} to {attempted}");
            (*acknowledged, *attempted) = (first, first);
        }
        let socket = daemon.socket();
        std::thread::scope(|scope| {
            for (name, (acknowledged, attempted)) in &mut reached {
                let socket = &socket;
                scope.spawn(move || (*acknowledged, *attempted) = write_until_killed(socket, name, *acknowledged));
            }
            std::thread::sleep(Duration::from_millis(40 + round * 7));
            daemon.end(Signal::KILL);
        });
    }
    assert!(reached.values().all(|(acknowledged, _)| *acknowledged > 0), "{reached:?}");
}

#[test]
fn disk_that_fails_is_eio_once_then_refusals_and_domains_go_on_until_it_works_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut shell = Command::new("sh");
    // The signal for too large a file would end the program; with it ignored, the write fails.
    shell.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_xenstored")]);
    let daemon = Daemon::of(shell, directory.path(), &PERSIST);
    let mut client = daemon.client();
    client.write("/tool/a", b"before").unwrap();
    let pid = Pid::from_child(&daemon.child);
    let limit = |bytes| prlimit(Some(pid), Resource::Fsize, Rlimit { current: bytes, maximum: None }).unwrap();
    // Behind that are the pages of the database; the log does not get there.
    limit(Some(8192));
    let refused = |result: Result<(), ClientError>| match result {
        Err(ClientError::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(client.write("/tool/a", b"unsure")), Refusal::NotKept);
    assert_eq!(refused(client.write("/tool/b", b"never")), Refusal::ReadOnly);
    assert_eq!(client.read("/tool/a").unwrap(), b"unsure");
    client.write("/local/domain/5/name", b"domains go on").unwrap();
    assert!(daemon.log().contains("keys cannot be written"), "{}", daemon.log());
    limit(None);
    eventually(|| client.write("/tool/c", b"after").is_ok());
    daemon.end(Signal::KILL);
    let daemon = Daemon::start(directory.path(), &PERSIST);
    let mut client = daemon.client();
    assert_eq!(client.read("/tool/a").unwrap(), b"unsure");
    assert_eq!(client.read("/tool/c").unwrap(), b"after");
    assert!(!client.exists("/tool/b").unwrap());
}

#[test]
fn clients_that_write_at_once_share_a_commit() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(directory.path(), &PERSIST);
    let time = |clients: u32| {
        let start = Instant::now();
        let mut raws: Vec<_> = (0..clients).map(|_| daemon.raw()).collect();
        daemon.signal(Signal::STOP);
        for (raw, number) in raws.iter_mut().zip(0..) {
            raw.send(abi::xen::xenstore::op::WRITE, 0, format!("/c{number}\0x").as_bytes());
        }
        daemon.signal(Signal::CONT);
        raws.iter_mut().for_each(|raw| assert_eq!(raw.receive().1, b"OK\0"));
        start.elapsed()
    };
    let writes = |daemon: &Daemon| {
        let io = std::fs::read_to_string(format!("/proc/{}/io", daemon.child.id())).unwrap();
        let line = io.lines().find_map(|line| line.strip_prefix("syscw: ")).unwrap();
        line.parse::<u64>().unwrap()
    };
    time(1);
    let before = writes(&daemon);
    time(1);
    let one = writes(&daemon) - before;
    time(60);
    let sixty = writes(&daemon) - before - one;
    assert!(sixty < 20 * one, "60 clients cost {sixty} writes of the file, one costs {one}");
}
