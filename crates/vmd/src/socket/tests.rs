//! Server and client against each other, and the server against clients that are none.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dialects::store::{Client as Who, MAX_VALUE, Store};
use tempfile::TempDir;

use super::connection::ConnectionError;
use super::mailbox::CAPACITY;
use super::protocol::{MAX_REQUEST, MAX_WATCHES, Refusal, Reply, Request};
use super::server::MAX_CLIENTS;
use super::{Connection, Server};
use crate::control::Control;
use crate::kv::JsonValue;
use crate::power::{Via, Wish};
use crate::store::MachineStore;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

struct Machine {
    _directory: TempDir,
    path: PathBuf,
    store: Arc<MachineStore>,
    server: Option<Server>,
}

/// A machine that has a store and a socket and no power.
fn machine() -> Machine {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    let store = Arc::new(MachineStore::new().unwrap());
    let server = Server::start(&path, Arc::new(Control::new(Arc::clone(&store)))).unwrap();
    Machine { _directory: directory, path, store, server: Some(server) }
}

impl Machine {
    fn connect(&self) -> Connection {
        Connection::open(&self.path).unwrap()
    }

    /// A connection that need not keep to the protocol, after the greeting.
    fn raw(&self) -> BufReader<UnixStream> {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut stream = BufReader::new(stream);
        assert_eq!(line(&mut stream), "{\"hello\":{\"protocol\":\"pvbus-control\",\"version\":1}}\n");
        stream
    }
}

fn line(stream: &mut BufReader<UnixStream>) -> String {
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    line
}

fn ended(stream: &mut BufReader<UnixStream>) -> bool {
    match stream.read(&mut [0]) {
        Ok(n) => n == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

fn get(path: &str) -> Request {
    Request::KvGet { path: path.into() }
}

fn set(path: &str, value: &[u8]) -> Request {
    Request::KvSet { path: path.into(), value: JsonValue(value.into()) }
}

fn watch(path: &str) -> Request {
    Request::KvWatch { path: path.into() }
}

fn value(bytes: &[u8]) -> Reply {
    Reply::Value(JsonValue(bytes.into()))
}

fn refusal(reply: Reply) -> Refusal {
    match reply {
        Reply::Refused { kind, .. } => kind,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn keys_are_set_read_listed_and_removed() {
    let machine = machine();
    let mut connection = machine.connect();
    let mut call = |request| connection.call(&request).unwrap();
    assert_eq!(call(set("vm-data/a", b"one\ntwo")), Reply::Done);
    assert_eq!(call(set("vm-data/b/c", b"\0\xff")), Reply::Done);
    assert_eq!(call(get("vm-data/a")), value(b"one\ntwo"));
    assert_eq!(call(get("vm-data/b/c")), value(b"\0\xff"));
    assert_eq!(call(Request::KvList { path: "vm-data".into() }), Reply::Names(vec!["a".into(), "b".into()]));
    let Reply::Tree(tree) = call(Request::KvTree { path: String::new() }) else { panic!() };
    assert_eq!(tree.keys().collect::<Vec<_>>(), ["vm-data/a", "vm-data/b/c"]);
    assert_eq!(call(Request::KvRemove { path: "vm-data/b".into() }), Reply::Done);
    assert_eq!(refusal(call(get("vm-data/b/c"))), Refusal::NotFound);
    assert_eq!(refusal(call(get("vm-data//c"))), Refusal::Store);
    assert_eq!(machine.store.read(Who::Guest, "vm-data/a").unwrap(), b"one\ntwo");
}

#[test]
fn devices_are_refused_where_power_is_off_and_where_they_make_no_sense() {
    let machine = machine();
    let mut connection = machine.connect();
    let mut call = |request| connection.call(&request).unwrap();
    assert_eq!(call(Request::Devices), Reply::Devices(Vec::new()));
    let refused = [
        Request::DiskAdd { disk: "disk.raw,bus=xen".into() },
        Request::DiskAdd { disk: ",bus=xen".into() },
        Request::NicAdd { nic: "user,bus=isa".into() },
        Request::DeviceRemove { device: "disk0".into(), force: true },
    ];
    for request in refused {
        assert_eq!(refusal(call(request)), Refusal::Device);
    }
}

#[test]
fn largest_value_goes_through_however_json_writes_it() {
    let machine = machine();
    let mut connection = machine.connect();
    for byte in [b'x', b'"', 0, 0x1b, 0xff] {
        let bytes = vec![byte; MAX_VALUE];
        assert_eq!(connection.call(&set("vm-data/big", &bytes)).unwrap(), Reply::Done, "{byte:#x}");
        assert_eq!(connection.call(&get("vm-data/big")).unwrap(), value(&bytes));
    }
}

#[test]
fn watch_tells_of_changes_with_their_values() {
    let machine = machine();
    let mut connection = machine.connect();
    assert_eq!(connection.call(&watch("vm-data")).unwrap(), Reply::Done);
    machine.store.write(Who::Guest, "vm-data/said", b"hello").unwrap();
    let deadline = Some(Instant::now() + PATIENCE);
    let change = |path: &str, value: Option<&[u8]>| Some(Reply::Changed { path: path.into(), value: value.map(|v| JsonValue(v.into())) });
    assert_eq!(connection.next(deadline).unwrap(), change("vm-data/said", Some(b"hello")));
    machine.store.remove(Who::Host, "vm-data/said").unwrap();
    assert_eq!(connection.next(deadline).unwrap(), change("vm-data/said", None));
    machine.store.write(Who::Guest, "data/other", b"").unwrap();
    assert_eq!(connection.next(Some(Instant::now() + Duration::from_millis(50))).unwrap(), None);
}

#[test]
fn changes_told_before_a_reply_are_kept() {
    let machine = machine();
    let mut connection = machine.connect();
    connection.call(&watch("vm-data/a")).unwrap();
    connection.call(&set("vm-data/a", b"1")).unwrap();
    connection.call(&watch("vm-data/b")).unwrap();
    let told = connection.next(Some(Instant::now() + PATIENCE)).unwrap();
    assert!(matches!(told, Some(Reply::Changed { path, .. }) if path == "vm-data/a"));
}

#[test]
fn watcher_that_does_not_read_holds_nobody_up_and_is_dropped() {
    let machine = machine();
    let mut lazy = machine.raw();
    lazy.get_mut().write_all(b"{\"request\":\"kv-watch\",\"path\":\"vm-data\"}\n").unwrap();
    assert_eq!(line(&mut lazy), "\"done\"\n");
    let big = vec![b'x'; 64 << 10];
    for _ in 0..CAPACITY + 100 {
        machine.store.write(Who::Host, "vm-data/a", &big).unwrap();
    }
    assert_eq!(machine.connect().call(&get("vm-data/a")).unwrap(), value(&big), "others are served");
    let mut rest = String::new();
    let _ = lazy.read_to_string(&mut rest);
    assert!(rest.lines().count() < CAPACITY, "not all of it was kept for the client");
    assert!(rest.lines().last().unwrap().contains("faster than they are read"), "the last word");
}

#[test]
fn watches_of_one_connection_are_bounded() {
    let machine = machine();
    let mut connection = machine.connect();
    for _ in 0..MAX_WATCHES {
        assert_eq!(connection.call(&watch("vm-data")).unwrap(), Reply::Done);
    }
    assert_eq!(refusal(connection.call(&watch("vm-data")).unwrap()), Refusal::Limit);
    assert_eq!(refusal(machine.connect().call(&watch("a b")).unwrap()), Refusal::Store);
}

#[test]
fn what_is_no_request_is_refused_and_ends_the_connection() {
    let machine = machine();
    let cases: [&[u8]; 8] = [
        b"\n",
        b"GET / HTTP/1.1\r\n",
        b"{\"request\":\"fly\"}\n",
        b"{\"request\":\"kv-get\"}\n",
        b"{\"request\":\"kv-get\",\"path\":\"a\",\"color\":\"red\"}\n",
        b"{\"request\":\"kv-set\",\"path\":\"a\",\"value\":{\"base64\":\"?\"}}\n",
        b"\xff\xfe\0\n",
        &[&[b'['; 100_000][..], b"\n"].concat(),
    ];
    for case in cases {
        let mut stream = machine.raw();
        stream.get_mut().write_all(case).unwrap();
        assert!(line(&mut stream).contains("\"kind\":\"bad-request\""), "{}", String::from_utf8_lossy(case));
        assert!(ended(&mut stream));
    }
    assert_eq!(refusal(machine.connect().call(&get("vm-data/a")).unwrap()), Refusal::NotFound, "the server lives");
}

#[test]
fn request_without_end_is_cut_off() {
    let machine = machine();
    let mut stream = machine.raw();
    let piece = vec![b' '; 64 << 10];
    // The server closes somewhere in the middle.
    while stream.get_mut().write_all(&piece).is_ok() {}
    let mut said = Vec::new();
    let _ = stream.read_to_end(&mut said);
    assert!(String::from_utf8_lossy(&said).contains(&MAX_REQUEST.to_string()));
}

#[test]
fn request_may_come_in_pieces_and_several_at_once() {
    let machine = machine();
    machine.store.write(Who::Host, "a", b"1").unwrap();
    let mut stream = machine.raw();
    for byte in b"{\"request\":\"kv-get\",\"path\":\"a\"}\n" {
        stream.get_mut().write_all(&[*byte]).unwrap();
    }
    assert_eq!(line(&mut stream), "{\"value\":\"1\"}\n");
    stream.get_mut().write_all(&b"{\"request\":\"kv-get\",\"path\":\"a\"}\n".repeat(1000)).unwrap();
    stream.get_mut().shutdown(std::net::Shutdown::Write).unwrap();
    let lines = stream.lines().map_while(Result::ok).filter(|line| line == "{\"value\":\"1\"}").count();
    assert_eq!(lines, 1000, "all are answered after the client has said its last");
}

#[test]
fn silent_clients_make_room_for_new_ones_and_watchers_stay() {
    let machine = machine();
    let mut silent: Vec<_> = (0..MAX_CLIENTS).map(|_| machine.raw()).collect();
    let mut newcomer = machine.connect();
    assert_eq!(refusal(newcomer.call(&get("a")).unwrap()), Refusal::NotFound);
    assert!(ended(&mut silent[0]), "the one that was silent longest");
    drop((silent, newcomer));

    let watchers: Vec<_> = (0..MAX_CLIENTS)
        .map(|_| {
            let mut connection = machine.connect();
            connection.call(&watch("")).unwrap();
            connection
        })
        .collect();
    assert!(matches!(Connection::open(&machine.path), Err(ConnectionError::Refused(_))));
    drop(watchers);
}

#[test]
fn clients_do_not_get_each_others_replies() {
    let machine = machine();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let machine = &machine;
            scope.spawn(move || {
                let (mut connection, path) = (machine.connect(), format!("vm-data/{number}"));
                for round in 0..200 {
                    let text = format!("{number} {round}");
                    assert_eq!(connection.call(&set(&path, text.as_bytes())).unwrap(), Reply::Done);
                    assert_eq!(connection.call(&get(&path)).unwrap(), value(text.as_bytes()));
                }
            });
        }
    });
}

#[test]
fn machine_without_power_says_so() {
    let machine = machine();
    let mut connection = machine.connect();
    assert_eq!(refusal(connection.call(&Request::Status).unwrap()), Refusal::NotReady);
    for via in [Via::Auto, Via::Acpi, Via::Openbsd] {
        assert_eq!(refusal(connection.call(&Request::Ask { wish: Wish::Shutdown, via }).unwrap()), Refusal::NotReady);
    }
    assert_eq!(refusal(connection.call(&Request::Force { reboot: true }).unwrap()), Refusal::NotReady);
}

#[test]
fn end_of_the_machine_is_told_from_an_error() {
    let mut machine = machine();
    let mut connection = machine.connect();
    connection.call(&watch("")).unwrap();
    drop(machine.server.take());
    assert!(matches!(connection.next(None), Err(ConnectionError::Ended(_))));
    assert!(matches!(connection.call(&get("a")), Err(ConnectionError::Ended(_))));
    assert!(matches!(Connection::open(&machine.path), Err(ConnectionError::Address(_))));
}

#[test]
fn other_servers_are_not_mistaken_for_a_machine() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("other");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let other = std::thread::spawn(move || listener.accept().unwrap().0.write_all(b"220 mail ESMTP\n").unwrap());
    assert!(matches!(Connection::open(&path), Err(ConnectionError::Foreign { .. })));
    other.join().unwrap();
}
