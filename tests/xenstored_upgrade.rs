//! Live upgrade of `xenstored`: what its clients notice (nothing), what becomes of an upgrade that fails, and states that no server has left.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "common/xenstored.rs"]
mod daemon;

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use abi::xen::xenstore::op;
use daemon::{Daemon, Raw, arguments, eventually, message};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use xenstore::client::WatchEvent;

const PROGRAM: &str = env!("CARGO_BIN_EXE_xenstored");

/// How often a program has taken over so far.
fn upgrades(daemon: &Daemon) -> usize {
    daemon.log().matches("took over").count()
}

#[track_caller]
fn upgrade_by_signal(daemon: &Daemon) {
    let before = upgrades(daemon);
    daemon.signal(Signal::USR2);
    eventually(|| upgrades(daemon) > before);
}

/// CONTROL live-update with these arguments.
fn live_update(client: &mut Raw, arguments: &[&str]) -> String {
    let strings: Vec<u8> = ["live-update"].iter().chain(arguments).flat_map(|text| [text.as_bytes(), b"\0"].concat()).collect();
    let said = client.call(op::CONTROL, 0, &strings).unwrap();
    String::from_utf8(said).unwrap().trim_end_matches('\0').to_owned()
}

/// A program that does what `script` says.
fn script(directory: &Path, script: &str) -> String {
    let path = directory.join("script");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn watches_half_requests_and_replies_that_nobody_read_go_on() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(directory.path(), &["--pid-file", "pid"]);
    let mut watcher = daemon.client();
    watcher.watch("/watched", "token").unwrap();
    watcher.next_event().unwrap();

    let (mut half, request) = (daemon.raw(), message(op::WRITE, 0, b"/half\0whole"));
    half.0.write_all(&request[..20]).unwrap();

    let mut slow = daemon.raw();
    let large = vec![b'x'; 4000];
    slow.call(op::WRITE, 0, &[&b"/large\0"[..], &large].concat()).unwrap();
    slow.0.set_nonblocking(true).unwrap();
    let mut asked = 0;
    while slow.0.write_all(&message(op::READ, 0, b"/large\0")).is_ok() {
        asked += 1;
    }
    slow.0.set_nonblocking(false).unwrap();
    assert!(asked > 100, "only {asked} requests went through");

    for _ in 0..3 {
        upgrade_by_signal(&daemon);
        let pid: u32 = std::fs::read_to_string(directory.path().join("pid")).unwrap().trim().parse().unwrap();
        assert_eq!(pid, daemon.child.id());
    }
    half.0.write_all(&request[20..]).unwrap();
    assert_eq!(half.receive(), (op::WRITE, b"OK\0".to_vec()));
    assert_eq!(daemon.client().read("/half").unwrap(), b"whole");
    daemon.client().write("/watched/x", b"1").unwrap();
    assert_eq!(watcher.next_event().unwrap(), WatchEvent { path: "/watched/x".into(), token: "token".into() });
    for _ in 0..asked {
        assert_eq!(slow.receive(), (op::READ, large.clone()));
    }
    assert!(daemon.end(Signal::TERM).success());
    assert!(!directory.path().join("socket").exists() && !directory.path().join("pid").exists());
}

#[test]
fn clients_that_never_stop_see_no_failure() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(directory.path(), &["--persist", "keys"]);
    let is_over = AtomicBool::new(false);
    let counts: Vec<u32> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..3)
            .map(|number| {
                let (mut client, is_over) = (daemon.client(), &is_over);
                scope.spawn(move || {
                    let (path, mut count) = (format!("/count/c{number}"), 0u32);
                    while !is_over.load(Ordering::Relaxed) {
                        count += 1;
                        client.write(&path, count.to_string().as_bytes()).unwrap();
                        assert_eq!(client.read(&path).unwrap(), count.to_string().as_bytes());
                    }
                    count
                })
            })
            .collect();
        for _ in 0..5 {
            upgrade_by_signal(&daemon);
            std::thread::sleep(Duration::from_millis(50));
        }
        is_over.store(true, Ordering::Relaxed);
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    assert_eq!(upgrades(&daemon), 5);
    daemon.end(Signal::KILL);
    let daemon = Daemon::start(directory.path(), &["--persist", "keys"]);
    for (count, number) in counts.iter().zip(0..) {
        assert_eq!(daemon.client().read(&format!("/count/c{number}")).unwrap(), count.to_string().as_bytes());
    }
}

#[test]
fn control_names_the_program_and_its_arguments_and_the_new_one_answers() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(directory.path(), &[]);
    let mut client = daemon.raw();
    let line = format!("--socket {} --persist keys", daemon.socket().display());
    let program = script(directory.path(), &format!("exec {PROGRAM} \"$@\""));
    client.call(op::WRITE, 0, b"/before\0x").unwrap();
    assert_eq!(live_update(&mut client, &["-f", &program]), "OK");
    assert_eq!(live_update(&mut client, &["-c", &line]), "OK");
    assert_eq!(live_update(&mut client, &["-s"]), "OK");
    assert_eq!(upgrades(&daemon), 1);
    drop(client);
    daemon.end(Signal::KILL);
    let daemon = Daemon::start(directory.path(), &["--persist", "keys"]);
    assert_eq!(daemon.client().read("/before").unwrap(), b"x", "the new program was told to keep keys");
}

#[test]
fn debians_xenstore_control_upgrades_it() {
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest/xenstore");
    assert!(tree.exists(), "{} is missing; make it with: tests/common/xenstore/make target/guest", tree.display());
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(directory.path(), &[]);
    let control = |arguments: &[&str]| {
        let mut command = Command::new(tree.join("usr/lib/xen-4.17/bin/xenstore-control"));
        command.env("XENSTORED_PATH", daemon.socket()).env("LD_LIBRARY_PATH", tree.join("usr/lib/x86_64-linux-gnu"));
        command.arg("live-update").args(arguments).output().unwrap()
    };
    assert!(control(&[PROGRAM]).status.success());
    let line = format!("--socket {}", daemon.socket().display());
    assert!(control(&["-c", &line, "-t", "5", "-F", PROGRAM]).status.success());
    assert_eq!(upgrades(&daemon), 2);
    let refused = control(&["/bin/true"]);
    assert!(!refused.status.success());
    assert!(String::from_utf8(refused.stderr).unwrap().contains("/bin/true does not take over"));
}

#[test]
fn open_transactions_are_waited_for_unless_that_is_not_wanted() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(directory.path(), &[]);
    let (mut holder, mut client) = (daemon.raw(), daemon.raw());
    let start = |holder: &mut Raw| {
        let id = holder.call(op::TRANSACTION_START, 0, b"\0").unwrap();
        String::from_utf8(id).unwrap().trim_end_matches('\0').parse::<u32>().unwrap()
    };
    let tx = start(&mut holder);
    holder.call(op::WRITE, tx, b"/tx\0x").unwrap();
    assert_eq!(live_update(&mut client, &["-s", "-t", "0"]), "BUSY");
    client.send(op::CONTROL, 0, b"live-update\0-s\0");
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(upgrades(&daemon), 0);
    assert_eq!(holder.call(op::TRANSACTION_END, tx, b"T\0"), Ok(b"OK\0".to_vec()));
    assert_eq!(client.receive(), (op::CONTROL, b"OK\0".to_vec()));
    assert_eq!(upgrades(&daemon), 1);

    let tx = start(&mut holder);
    holder.call(op::WRITE, tx, b"/tx\0y").unwrap();
    assert_eq!(live_update(&mut client, &["-s", "-t", "0", "-F"]), "OK");
    assert_eq!(holder.call(op::TRANSACTION_END, tx, b"T\0"), Err("EAGAIN".into()));
    assert_eq!(holder.call(op::READ, 0, b"/tx\0"), Ok(b"x".to_vec()));
}

#[test]
fn program_that_cannot_take_over_leaves_the_old_one_running() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(directory.path(), &["--persist", "keys"]);
    let mut client = daemon.raw();
    client.call(op::WRITE, 0, b"/a\0x").unwrap();
    assert!(live_update(&mut client, &["-f", "/nonexistent"]).contains("No such file"));
    let text = directory.path().join("text");
    std::fs::write(&text, "no program").unwrap();
    assert!(live_update(&mut client, &["-f", text.to_str().unwrap()]).contains("denied"));
    std::fs::set_permissions(&text, PermissionsExt::from_mode(0o755)).unwrap();
    let refuses = script(directory.path(), "echo not today; exit 1");
    for (program, line, why) in [
        (text.to_str().unwrap(), "", "Exec format error"),
        ("/bin/true", "", "/bin/true does not take over: it said nothing"),
        (&refuses, "", "does not take over: not today"),
        (PROGRAM, "--nonsense", "unexpected argument '--nonsense'"),
    ] {
        assert_eq!(live_update(&mut client, &["-f", program]), "OK");
        if !line.is_empty() {
            assert_eq!(live_update(&mut client, &["-c", line]), "OK");
        }
        let said = live_update(&mut client, &["-s"]);
        assert!(said.contains(why), "{program}: {said}");
        assert_eq!(client.call(op::READ, 0, b"/a\0"), Ok(b"x".to_vec()));
        assert!(daemon.client().write("/b", b"new clients too").is_ok());
    }
    assert_eq!(upgrades(&daemon), 0);
    assert_eq!(live_update(&mut client, &["-s"]), "OK");
    assert_eq!(upgrades(&daemon), 1);
}

#[test]
fn file_of_keys_that_fails_during_the_upgrade_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(directory.path(), &["--persist", "keys"]);
    let mut client = daemon.raw();
    client.call(op::WRITE, 0, b"/a\0x").unwrap();
    let (keys, away) = (directory.path().join("keys"), directory.path().join("away"));
    std::fs::rename(&keys, &away).unwrap();
    std::fs::create_dir(&keys).unwrap();
    assert_eq!(live_update(&mut client, &["-s"]), "OK");
    assert_eq!(client.call(op::WRITE, 0, b"/a\0y"), Err("EROFS".into()));
    assert_eq!(client.call(op::READ, 0, b"/a\0"), Ok(b"x".to_vec()));
    std::fs::remove_dir(&keys).unwrap();
    std::fs::rename(&away, &keys).unwrap();
    eventually(|| client.call(op::WRITE, 0, b"/a\0y").is_ok());
}

/// A program in the background, ended with the test.
struct Background(Pid);

impl Drop for Background {
    fn drop(&mut self) {
        // It may have ended.
        let _ = kill_process(self.0, Signal::KILL);
    }
}

#[test]
fn program_in_the_background_goes_on_with_relative_paths_and_its_locks() {
    let directory = tempfile::tempdir().unwrap();
    let more = ["--daemon", "--pid-file", "pid", "--persist", "keys", "--log", "log"];
    let run = || Command::new(PROGRAM).args(arguments(directory.path(), &more)).current_dir(directory.path()).output().unwrap();
    assert!(run().status.success());
    let pid = || std::fs::read_to_string(directory.path().join("pid")).unwrap().trim().parse().ok();
    eventually(|| pid().is_some());
    let number = pid().unwrap();
    let daemon = Background(Pid::from_raw(number).unwrap());
    let mut client = Raw::connect(&directory.path().join("socket"));
    client.call(op::WRITE, 0, b"/a\0x").unwrap();
    for _ in 0..2 {
        let keys = Command::new(PROGRAM).args(["--socket", "other", "--persist", "keys"]).current_dir(directory.path()).output().unwrap();
        assert!(String::from_utf8(keys.stderr).unwrap().contains("in use by another program"));
        assert!(String::from_utf8(run().stderr).unwrap().contains("another xenstored has claimed this file"));
        assert_eq!(live_update(&mut client, &["-s"]), "OK");
    }
    let directory_now = std::fs::read_link(format!("/proc/{number}/cwd")).unwrap();
    assert_eq!(directory_now, Path::new("/"));
    assert_eq!(client.call(op::READ, 0, b"/a\0"), Ok(b"x".to_vec()));
    drop(daemon);
}

/// The state of a server with a watch and a connection, as its successor gets it.
fn state(directory: &Path) -> Value {
    let daemon = Daemon::start(directory, &["--pid-file", "pid"]);
    let mut client = daemon.raw();
    client.call(op::WRITE, 0, b"/a/b\0x").unwrap();
    client.send(op::WATCH, 0, b"/a\0token\0");
    [op::WATCH, op::WATCH_EVENT].iter().for_each(|said| assert_eq!(client.receive().0, *said));
    let copy = script(directory, "while [ \"$1\" != --resume ]; do shift; done\ncat < /proc/self/fd/$2 > state\necho copied");
    assert_eq!(live_update(&mut client, &["-f", &copy]), "OK");
    assert!(live_update(&mut client, &["-s"]).ends_with("copied"));
    serde_json::from_slice(&std::fs::read(directory.join("state")).unwrap()).unwrap()
}

/// What the program makes of a state that it is started with.
fn resume(directory: &Path, state: &[u8], more: &str) -> Output {
    let path = directory.join("hostile");
    std::fs::write(&path, state).unwrap();
    let script = format!("exec {PROGRAM} --resume 9 {more} 9< {}", path.display());
    Command::new("sh").args(["-c", &script]).output().unwrap()
}

#[test]
fn states_that_no_server_left_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let good = state(directory.path());
    let accepted = resume(directory.path(), &serde_json::to_vec(&good).unwrap(), "--check");
    assert_eq!(String::from_utf8(accepted.stdout).unwrap(), "xenstored: state accepted\n");

    let refused = |state: &[u8], more: &str| {
        let output = resume(directory.path(), state, more);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.starts_with("xenstored: ") && output.stdout.is_empty(), "{said}");
        said
    };
    for text in [&b""[..], b"{}", b"[]", b"\xff\xfe", &[b'['; 100_000]] {
        refused(text, "--check");
    }
    let whole = serde_json::to_vec(&good).unwrap();
    for end in (0..whole.len()).step_by(97) {
        refused(&whole[..end], "--check");
    }
    let changes: &[(&str, Value, &str)] = &[
        ("/version", json!(2), "version 2"),
        ("/state/version", json!(2), "version 2"),
        ("/state/nodes/0/path", json!("/x"), "no root"),
        ("/state/nodes/2/path", json!("/x/y/z"), "parent missing"),
        ("/state/nodes/2/path", json!("/a"), "node twice"),
        ("/state/nodes/2/path", json!("relative"), "relative"),
        ("/state/nodes/2/perms", json!([]), "malformed"),
        ("/state/last_client", json!(0), "client"),
        ("/state/connections/0/watches/0/path", json!("a"), "watch"),
        ("/state/connections/0/watches/0/path", json!("//"), "watch"),
        ("/connections", json!({}), "has no connection"),
        ("/connections", json!({"1": 5, "2": 6, "77": 7}), "connection"),
    ];
    for (place, value, why) in changes {
        let mut state = good.clone();
        *state.pointer_mut(place).expect(place) = value.clone();
        let said = refused(&serde_json::to_vec(&state).unwrap(), "--check");
        assert!(said.contains(why), "{place}: {said}");
    }
    // Without a check it gets as far as the descriptors, which are not what the state says.
    let connection = good["connections"].as_object().unwrap().keys().next().unwrap().clone();
    for (number, why) in [(-1, "cannot be handed over"), (1, "cannot be handed over"), (9, "twice"), (1000, "was not handed over")] {
        let mut state = good.clone();
        state["connections"][&connection] = json!(number);
        let said = refused(&serde_json::to_vec(&state).unwrap(), "");
        assert!(said.contains(why), "{number}: {said}");
    }
    let mut state = good.clone();
    state["connections"][&connection] = json!(8);
    let said = refused(&serde_json::to_vec(&state).unwrap(), "8< /dev/null");
    assert!(said.contains("no socket"), "{said}");
}
