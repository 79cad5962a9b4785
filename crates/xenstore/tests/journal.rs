//! The journal: replayed on a copy of the paths, it leaves exactly those of the tree.

// Tests fail by panicking; the lint knows only functions marked as tests.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;

use abi::xen::xenstore::op;
use common::Rig;
use xenstore::{Changed, Config, DomId, NoHost, Path, Server, Store};

/// Who keeps a copy by the journal alone.
#[derive(Default)]
struct Copy(BTreeSet<String>);

impl Copy {
    fn follow(&mut self, rig: &mut Rig) {
        for change in rig.server.store().take_journal() {
            match change {
                Changed::Set(path) => {
                    let mut next = Some(path);
                    while let Some(path) = next.filter(|path| rig.server.store().node(path).is_some()) {
                        next = path.parent();
                        self.0.insert(path.to_string());
                    }
                }
                Changed::Removed(gone) => {
                    self.0.retain(|path| !Path::parse(path.as_bytes(), DomId::HOST, 0).unwrap().is_within(gone.as_str()))
                }
            }
        }
        let nodes: BTreeSet<String> = rig.server.state().nodes.into_iter().map(|node| node.path).collect();
        assert_eq!(self.0, nodes);
        assert!(!rig.server.store().has_changed());
    }
}

#[test]
fn copy_by_the_journal_has_what_the_tree_has() {
    let mut rig = Rig::of(Server::new(Store::new(Config { journal: true, ..Config::default() }), Box::new(NoHost)));
    let mut copy = Copy::default();
    let (host, guest) = (rig.socket(), rig.guest(1));
    rig.write(host, 0, "/a/b/c", "").unwrap();
    rig.write(guest, 0, "x/y", "").unwrap();
    copy.follow(&mut rig);
    let tx = rig.start(host);
    rig.write(host, tx, "/a/b/d", "").unwrap();
    rig.ok(host, op::RM, tx, &["/a", ""]);
    rig.write(host, tx, "/a/b/e", "").unwrap();
    rig.write(host, tx, "/brief", "").unwrap();
    rig.ok(host, op::RM, tx, &["/brief", ""]);
    rig.commit(host, tx).unwrap();
    copy.follow(&mut rig);
    rig.write(host, 0, "/a/b/f", "").unwrap();
    rig.ok(host, op::RM, 0, &["/a/b", ""]);
    rig.write(host, 0, "/a/b/g", "").unwrap();
    rig.ok(host, op::RELEASE, 0, &["1", ""]);
    copy.follow(&mut rig);
}

#[test]
fn what_was_not_done_is_not_in_the_journal() {
    let mut rig = Rig::of(Server::new(Store::new(Config { journal: true, ..Config::default() }), Box::new(NoHost)));
    let (host, guest) = (rig.socket(), rig.guest(1));
    rig.server.store().take_journal();
    rig.write(guest, 0, "/denied", "").unwrap_err();
    rig.ok(host, op::RM, 0, &["/missing", ""]);
    let tx = rig.start(host);
    rig.write(host, tx, "/aborted", "").unwrap();
    rig.ok(host, op::TRANSACTION_END, tx, &["F", ""]);
    rig.read(host, 0, "/").unwrap();
    assert!(!rig.server.store().has_changed());
}
