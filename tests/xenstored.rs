//! `xenstored` before Debian's own clients, before our client library, and before clients that mean no good.

// Tests fail by panicking; the lint knows only functions marked as tests.
#![allow(clippy::unwrap_used)]

#[path = "common/xenstore/mod.rs"]
mod clients;
#[path = "common/xenstored.rs"]
mod common;

use std::io::{Read, Write};
use std::ops::{Deref, DerefMut};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, ExitStatus};

use abi::xen::xenstore::op;
use clients::Clients;
use common::{arguments, eventually, message};
use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use xenstore::client::{Client, ClientError, Refusal};
use xenstore::{Config, DomId, Perms, SharedStore};
use xenstored::{Listener, Pause, Service};

/// A running `xenstored` in a directory of its own.
struct Daemon(common::Daemon, TempDir);

impl Daemon {
    fn start(more: &[&str]) -> Daemon {
        let directory = tempfile::tempdir().unwrap();
        Daemon(common::Daemon::start(directory.path(), more), directory)
    }

    fn debian(&self) -> Clients {
        Clients { socket: self.socket() }
    }

    fn end(self, signal: Signal) -> ExitStatus {
        self.0.end(signal)
    }
}

impl Deref for Daemon {
    type Target = common::Daemon;

    fn deref(&self) -> &common::Daemon {
        &self.0
    }
}

impl DerefMut for Daemon {
    fn deref_mut(&mut self) -> &mut common::Daemon {
        &mut self.0
    }
}

fn program(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xenstored"));
    command.args(arguments(directory, &[]));
    command
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
    for byte in message(op::READ, 0, b"/slow\0") {
        stream.0.write_all(&[byte]).unwrap();
    }
    assert_eq!(stream.receive().1, b"value");
}

#[test]
fn message_that_is_too_long_ends_its_connection_after_what_came_before() {
    let daemon = Daemon::start(&[]);
    let mut other = daemon.client();
    other.write("/a", b"value").unwrap();
    let mut stream = daemon.raw();
    let mut bytes = message(op::READ, 0, b"/a\0");
    bytes.extend(message(op::WRITE, 0, &[b'/'; 4097]));
    stream.0.write_all(&bytes).unwrap();
    assert_eq!(stream.receive().1, b"value");
    let mut rest = Vec::new();
    // The server may close before it has read all that was sent, which resets the connection.
    let _ = stream.0.read_to_end(&mut rest);
    assert_eq!(rest, b"");
    assert_eq!(other.read("/a").unwrap(), b"value");
}

#[test]
fn client_that_does_not_read_stalls_itself_alone() {
    let daemon = Daemon::start(&[]);
    let mut other = daemon.client();
    other.write("/large", &[b'x'; 4000]).unwrap();
    let mut greedy = daemon.raw();
    greedy.send(op::WATCH, 0, b"/hot\0token\0");
    greedy.0.set_nonblocking(true).unwrap();
    let requests = message(op::READ, 0, b"/large\0").repeat(1000);
    while greedy.0.write(&requests).is_ok() {}
    for number in 0..2000 {
        other.write("/hot", number.to_string().as_bytes()).unwrap();
    }
    let report = other.control(&["memreport"]).unwrap();
    assert!(report.contains("clients: 2"), "{report}");
    // It gets all that it has asked for, once it reads.
    greedy.0.set_nonblocking(false).unwrap();
    assert_eq!(greedy.receive().1, b"OK\0");
    let replies = (0..200).map(|_| greedy.receive()).filter(|(operation, _)| *operation == op::READ);
    assert!(replies.map(|(_, payload)| assert_eq!(payload.len(), 4000)).count() > 150);
}

#[test]
fn client_that_goes_leaves_nothing() {
    let daemon = Daemon::start(&[]);
    let mut stream = daemon.raw();
    stream.send(op::WATCH, 0, b"/a\0token\0");
    stream.send(op::TRANSACTION_START, 0, b"\0");
    stream.receive();
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
        assert!(daemon.end(signal).success());
        assert!(!socket.exists() && !pid.exists());
        assert!(matches!(client.read("/"), Err(ClientError::Connection(_))));
    }
}

#[test]
fn second_server_is_refused_and_a_killed_ones_socket_replaced() {
    let mut daemon = Daemon::start(&[]);
    let second = program(daemon.1.path()).output().unwrap();
    assert!(!second.status.success());
    assert!(String::from_utf8(second.stderr).unwrap().contains("in use by a running program"));
    daemon.child.kill().unwrap();
    daemon.child.wait().unwrap();
    daemon.child = program(daemon.1.path()).spawn().unwrap();
    eventually(|| Client::connect(&daemon.socket()).is_ok());
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
        let service = scope.spawn(|| {
            let mut service = Service::new(&store, None)?;
            service.listen(listener)?;
            service.run(&[stop.as_fd()], None)
        });
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
        assert_eq!(service.join().unwrap().unwrap(), Pause::Called(0));
        assert!(matches!(client.read("/"), Err(ClientError::Connection(_))));
    });
    assert!(!path.exists());
}
