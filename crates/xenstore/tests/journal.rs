//! Keys that outlive the server: what is told of them, when the requests that changed them are answered, and how.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::collections::BTreeMap;

use abi::xen::xenstore::op;
use common::{Message, Rig, answer, message};
use proptest::prelude::*;
use xenstore::{ClientId, Config, DomId, NoHost, NodeState, Record, Ring, Server, StateError};

/// What a file would have.
#[derive(Default)]
struct Kept(BTreeMap<String, NodeState>);

impl Kept {
    fn apply(&mut self, records: Vec<Record>) {
        for record in records {
            match record {
                Record::Node(node) => drop(self.0.insert(node.path.clone(), node)),
                Record::Removed(path) => self.0.retain(|key, _| *key != path && !key.starts_with(&format!("{path}/"))),
            }
        }
    }

    fn nodes(&self) -> Vec<NodeState> {
        self.0.values().cloned().collect()
    }

    fn keep(&mut self, rig: &mut Rig) {
        self.apply(rig.server.unkept().unwrap_or_default());
        rig.server.settle(true);
    }
}

/// A server that keeps its keys, and all its keys so far.
fn keeping() -> (Rig, Kept) {
    let (mut rig, mut kept) = (Rig::new(), Kept::default());
    rig.server.keep(&[]).unwrap();
    kept.keep(&mut rig);
    (rig, kept)
}

fn send(rig: &mut Rig, client: ClientId, op: u32, tx: u32, payload: &[u8]) {
    rig.server.receive(client, &message(op, 5, tx, payload));
}

fn lasting(server: &Server) -> Vec<NodeState> {
    let of_domains = |path: &str| ["/local", "/vm", "/libxl"].iter().any(|root| path == *root || path.starts_with(&format!("{root}/")));
    server.state().nodes.into_iter().filter(|node| !of_domains(&node.path)).collect()
}

fn said(messages: Vec<Message>) -> Vec<Result<String, String>> {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().trim_end_matches('\0').to_owned();
    messages.into_iter().map(|message| answer(message.op, message).map(text)).collect()
}

#[test]
fn change_is_confirmed_once_it_is_kept() {
    let (mut rig, mut kept) = keeping();
    let (writer, reader) = (rig.socket(), rig.socket());
    send(&mut rig, writer, op::WRITE, 0, b"/tool/a\0one");
    assert_eq!(rig.messages(writer), []);
    send(&mut rig, reader, op::READ, 0, b"/tool/a\0");
    assert_eq!(rig.messages(reader), [], "nobody sees what may yet be lost");
    kept.keep(&mut rig);
    assert_eq!(rig.server.take_active(), [writer, reader]);
    assert_eq!(said(rig.messages(writer)), [Ok("OK".into())]);
    assert_eq!(said(rig.messages(reader)), [Ok("one".into())]);
    assert_eq!(kept.0.keys().collect::<Vec<_>>(), ["/", "/tool", "/tool/a"]);
}

#[test]
fn what_belongs_to_domains_waits_for_nothing() {
    let (mut rig, _) = keeping();
    let host = rig.socket();
    for path in ["/local/domain/1/name", "/vm/a/name", "/libxl/1/device"] {
        assert!(rig.write(host, 0, path, "x").is_ok(), "{path}");
    }
    assert_eq!(rig.server.unkept(), None);
}

#[test]
fn transaction_is_kept_whole_when_it_commits() {
    let (mut rig, mut kept) = keeping();
    let host = rig.socket();
    let tx = rig.start(host);
    assert!(rig.write(host, tx, "/tool/a", "1").is_ok());
    assert!(rig.write(host, tx, "/tool/b", "2").is_ok());
    assert_eq!(rig.server.unkept(), None);
    send(&mut rig, host, op::TRANSACTION_END, tx, b"T\0");
    assert_eq!(rig.server.unkept().unwrap().len(), 3);
    kept.keep(&mut rig);
    assert_eq!(said(rig.messages(host)), [Ok("OK".into())]);
}

#[test]
fn change_that_cannot_be_kept_is_eio_and_the_next_ones_are_refused() {
    let (mut rig, mut kept) = keeping();
    let (host, watcher) = (rig.socket(), rig.socket());
    rig.watch(watcher, "/tool", "token");
    send(&mut rig, host, op::READ, 0, b"/\0");
    for payload in [b"/tool/a\0one", b"/local/b\0tw"] {
        send(&mut rig, host, op::WRITE, 0, payload);
    }
    send(&mut rig, host, op::READ, 0, b"/tool/a\0");
    rig.server.settle(false);
    assert_eq!(said(rig.messages(host)), [Ok("".into()), Err("EIO".into()), Ok("OK".into()), Ok("one".into())]);
    assert_eq!(rig.heard(watcher), ["/tool/a"]);
    assert_eq!(rig.write(host, 0, "/tool/c", "x"), Err("EROFS".into()));
    assert_eq!(rig.error(host, op::RM, 0, &["/tool/a", ""]), "EROFS");
    assert!(rig.write(host, 0, "/local/domain/1/x", "domains go on").is_ok());
    let tx = rig.start(host);
    assert!(rig.write(host, tx, "/local/domain/1/x", "1").is_ok());
    assert_eq!(rig.write(host, tx, "/tool/c", "x"), Ok(b"OK\0".to_vec()));
    assert_eq!(rig.commit(host, tx), Err("EROFS".into()));
    assert_eq!(rig.read(host, 0, "/local/domain/1/x"), Ok(b"domains go on".to_vec()));
    kept.keep(&mut rig);
    assert!(kept.0.contains_key("/tool/a"));
    send(&mut rig, host, op::WRITE, 0, b"/tool/c\0x");
    kept.keep(&mut rig);
    assert_eq!(said(rig.messages(host)), [Ok("OK".into())]);
}

#[test]
fn domains_of_an_earlier_server_have_left_nothing() {
    let (mut rig, mut kept) = keeping();
    let host = rig.socket();
    for (path, perms) in [("/tool/given", &["n7", ""][..]), ("/tool/shown", &["n0", "r7", "r9", "r32757", ""])] {
        send(&mut rig, host, op::WRITE, 0, format!("{path}/below\0x").as_bytes());
        send(&mut rig, host, op::SET_PERMS, 0, [&[path][..], perms].concat().join("\0").as_bytes());
    }
    kept.keep(&mut rig);
    let mut server = Server::with_nodes(&kept.nodes(), Config::default(), Box::new(NoHost)).unwrap();
    assert!(server.store().is_consistent());
    server.keep(&kept.nodes()).unwrap();
    let mut next = Rig::of(server);
    kept.keep(&mut next);
    assert_eq!(kept.0.keys().collect::<Vec<_>>(), ["/", "/tool", "/tool/shown", "/tool/shown/below"]);
    let host = next.socket();
    assert_eq!(next.ok(host, op::GET_PERMS, 0, &["/tool/shown", ""]), "n0\0r32757\0");
}

#[test]
fn nodes_without_parents_are_refused() {
    let (mut rig, mut kept) = keeping();
    let host = rig.socket();
    send(&mut rig, host, op::WRITE, 0, b"/tool/a\0one");
    kept.keep(&mut rig);
    kept.0.remove("/tool");
    assert!(matches!(rig.server.keep(&kept.nodes()), Err(StateError::Impossible { .. })));
}

#[derive(Debug, Clone)]
enum Step {
    Write(&'static str, u8),
    Remove(&'static str),
    Permit(&'static str, u16),
    Forget(u16),
    Keep(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let path =
        || prop::sample::select(vec!["/", "/a", "/a/b", "/a/b/c", "/a-b", "/a0", "/x/y/z", "/vm/u", "/local/domain/1", "/libxl", "/vmx"]);
    prop_oneof![
        4 => (path(), any::<u8>()).prop_map(|(path, value)| Step::Write(path, value)),
        2 => path().prop_map(Step::Remove),
        1 => (path(), 0u16..3).prop_map(|(path, domain)| Step::Permit(path, domain)),
        1 => (1u16..3).prop_map(Step::Forget),
        2 => any::<bool>().prop_map(Step::Keep),
    ]
}

proptest! {
    /// Whatever was done, in a transaction or not, and however often writing failed: once it succeeds, the file is the tree.
    #[test]
    fn records_make_the_file_equal_to_the_tree(steps in prop::collection::vec((step(), any::<bool>()), 1..60)) {
        let (mut rig, mut kept) = keeping();
        let host = rig.socket();
        for domain in 1..3 {
            rig.server.introduce(DomId(domain), Ring { gfn: 1, port: 1 }).unwrap();
        }
        let mut tx = 0;
        for (step, inside) in steps {
            if inside && tx == 0 {
                tx = rig.server.store().begin(host).unwrap();
            } else if !inside && tx != 0 {
                let _may_conflict = rig.server.store().commit(host, tx);
                tx = 0;
            }
            match step {
                Step::Write(path, value) => send(&mut rig, host, op::WRITE, tx, &[path.as_bytes(), &[0, value]].concat()),
                Step::Remove(path) => send(&mut rig, host, op::RM, tx, format!("{path}\0").as_bytes()),
                Step::Permit(path, domain) => send(&mut rig, host, op::SET_PERMS, tx, format!("{path}\0n{domain}\0").as_bytes()),
                Step::Forget(domain) => rig.server.forget(DomId(domain)),
                Step::Keep(false) => rig.server.settle(false),
                Step::Keep(true) => {
                    kept.keep(&mut rig);
                    prop_assert_eq!(kept.nodes(), sorted(lasting(&rig.server)));
                }
            }
            rig.messages(host);
        }
        kept.keep(&mut rig);
        prop_assert_eq!(kept.nodes(), sorted(lasting(&rig.server)));
        prop_assert_eq!(rig.server.unkept(), None);
    }
}

/// In the order of whole paths, as a file has them.
fn sorted(mut nodes: Vec<NodeState>) -> Vec<NodeState> {
    nodes.sort_by(|a, b| a.path.cmp(&b.path));
    nodes
}
