//! What fires a watch, for whom, with which path.

mod common;

use abi::xen::xenstore::op;
use common::Rig;

#[test]
fn initial_event_comes_after_the_reply_with_the_path_as_written() {
    let mut rig = Rig::new();
    let guest = rig.guest(3);
    for path in ["missing/node", "/local/domain/0/secret", "@whatever"] {
        rig.server.receive(guest, &common::message(op::WATCH, 1, 0, format!("{path}\0t\0").as_bytes()));
        let messages = rig.messages(guest);
        assert_eq!(messages.iter().map(|message| message.op).collect::<Vec<_>>(), [op::WATCH, op::WATCH_EVENT]);
        assert_eq!(messages[1].payload, format!("{path}\0t\0").as_bytes());
    }
}

#[test]
fn own_event_comes_before_the_reply() {
    let mut rig = Rig::new();
    let host = rig.socket();
    rig.watch(host, "/a", "t");
    rig.server.receive(host, &common::message(op::WRITE, 1, 0, b"/a/b\0x"));
    assert_eq!(rig.messages(host).iter().map(|message| message.op).collect::<Vec<_>>(), [op::WATCH_EVENT, op::WRITE]);
}

#[test]
fn create_write_remove_and_permissions_fire_at_and_below() {
    let mut rig = Rig::new();
    let host = rig.socket();
    rig.watch(host, "/a", "t");
    for value in ["1", "1", "2"] {
        rig.write(host, 0, "/a/b/c", value).unwrap();
        assert_eq!(rig.heard(host), ["/a/b/c"], "the same value fires too, parents do not");
    }
    rig.ok(host, op::SET_PERMS, 0, &["/a/b", "r0", ""]);
    assert_eq!(rig.heard(host), ["/a/b"]);
    rig.ok(host, op::RM, 0, &["/a/b/x", ""]);
    rig.write(host, 0, "/ab", "").unwrap();
    rig.read(host, 0, "/a").unwrap();
    assert_eq!(rig.heard(host), [""; 0]);
    rig.ok(host, op::RM, 0, &["/a/b", ""]);
    assert_eq!(rig.heard(host), ["/a/b"]);
}

#[test]
fn watchers_below_a_removed_node_hear_their_own_path() {
    let mut rig = Rig::new();
    let host = rig.socket();
    for path in ["/a/b/c/d", "/a/b0"] {
        rig.write(host, 0, path, "").unwrap();
    }
    for path in ["/", "/a/b/c", "/a/b/c/d", "/a/b/x", "/a/b0"] {
        rig.watch(host, path, "t");
    }
    rig.ok(host, op::RM, 0, &["/a/b", ""]);
    assert_eq!(rig.heard(host), ["/a/b", "/a/b/c", "/a/b/c/d"]);
}

#[test]
fn depth_limits_how_far_below_counts() {
    let mut rig = Rig::new();
    let host = rig.socket();
    for depth in ["0", "1", "2"] {
        rig.ok(host, op::WATCH, 0, &["/a", depth, depth, ""]);
    }
    rig.ok(host, op::WATCH, 0, &["/", "root", "1", ""]);
    rig.events.clear();
    for (path, expected) in [("/a", &["root", "0", "1", "2"][..]), ("/a/b", &["1", "2"]), ("/a/b/c", &["2"]), ("/a/b/c/d", &[])] {
        rig.write(host, 0, path, "").unwrap();
        let tokens: Vec<_> = std::mem::take(&mut rig.events).into_iter().map(|(_, _, token)| token).collect();
        assert_eq!(tokens, expected, "{path}");
    }
    rig.ok(host, op::RM, 0, &["/a", ""]);
    assert_eq!(rig.events.len(), 4, "a removal above is an event at the watch itself or higher");
}

#[test]
fn relative_watches_report_relative_paths() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(3));
    rig.watch(guest, "data", "t");
    rig.watch(host, "data", "t");
    rig.write(host, 0, "/local/domain/3/data/x", "").unwrap();
    rig.write(host, 0, "/local/domain/0/data/y", "").unwrap();
    assert_eq!(rig.heard(guest), ["data/x"]);
    assert_eq!(rig.heard(host), ["data/y"]);
    rig.ok(host, op::RM, 0, &["/local/domain/3", ""]);
    assert_eq!(rig.heard(guest), ["data"]);
}

#[test]
fn guests_hear_only_of_what_they_may_read_or_could() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    rig.watch(guest, "/", "t");
    rig.write(host, 0, "/a/secret", "").unwrap();
    assert_eq!(rig.heard(guest), [""; 0]);
    let steps = [
        (op::SET_PERMS, ["/a/secret", "n0", "r1", ""].as_slice()),
        (op::WRITE, &["/a/secret", "x"]),
        (op::SET_PERMS, &["/a/secret", "n0", ""]),
    ];
    for (op, strings) in steps {
        rig.ok(host, op, 0, strings);
        assert_eq!(rig.heard(guest), ["/a/secret"], "gaining and losing the right are both told");
    }
    rig.ok(host, op::RM, 0, &["/a/secret", ""]);
    assert_eq!(rig.heard(guest), [""; 0]);
    rig.write(host, 0, "/a/other", "").unwrap();
    rig.ok(host, op::SET_PERMS, 0, &["/a", "r0", ""]);
    rig.ok(host, op::RM, 0, &["/a/other", ""]);
    assert_eq!(rig.heard(guest), ["/a", "/a/other"], "the parent's right counts for what is gone");
}

#[test]
fn watches_are_told_apart_by_path_and_token() {
    let mut rig = Rig::new();
    let (host, other) = (rig.socket(), rig.socket());
    for client in [host, other] {
        for token in ["", "a", "b"] {
            rig.watch(client, "/x", token);
        }
    }
    assert_eq!(rig.error(host, op::WATCH, 0, &["/x", "a", ""]), "EEXIST");
    assert_eq!(rig.error(host, op::UNWATCH, 0, &["/x", "c", ""]), "ENOENT");
    assert_eq!(rig.error(host, op::UNWATCH, 0, &["/y", "a", ""]), "ENOENT");
    rig.ok(host, op::UNWATCH, 0, &["/x", "a", ""]);
    rig.write(host, 0, "/x", "").unwrap();
    assert_eq!((rig.heard(host).len(), rig.heard(other).len()), (2, 3));
}

#[test]
fn tokens_come_back_verbatim_with_events_of_the_longest_path() {
    let mut rig = Rig::new();
    let host = rig.socket();
    let token = |length| "t".repeat(length);
    assert_eq!(rig.error(host, op::WATCH, 0, &["/a", &token(1023), ""]), "E2BIG");
    rig.watch(host, "/a", &token(1022));
    let longest = format!("/local/domain/12345/{}", "x".repeat(2048));
    rig.watch(host, &longest, &token(1022));
    rig.write(host, 0, &longest, "").unwrap();
    assert_eq!(rig.events.pop(), Some((host, longest, token(1022))));
}

#[test]
fn transaction_id_does_not_matter_to_watches() {
    let mut rig = Rig::new();
    let host = rig.socket();
    rig.ok(host, op::WATCH, 4711, &["/a", "t", ""]);
    rig.ok(host, op::UNWATCH, 4711, &["/a", "t", ""]);
}

#[test]
fn equal_events_that_wait_are_one() {
    let mut rig = Rig::new();
    let (host, slow) = (rig.socket(), rig.socket());
    rig.watch(slow, "/a", "t");
    rig.watch(slow, "@releaseDomain", "r");
    for value in ["1", "2", "3"] {
        rig.write(host, 0, "/a", value).unwrap();
        rig.write(host, 0, "/a/b", value).unwrap();
    }
    assert_eq!(rig.heard(slow), ["/a", "/a/b"]);
    rig.write(host, 0, "/a", "4").unwrap();
    // The first byte has left: an equal event is news now.
    rig.server.sent(slow, 1);
    rig.write(host, 0, "/a", "5").unwrap();
    rig.write(host, 0, "/a", "6").unwrap();
    assert_eq!(rig.server.output(slow).len(), 2 * (16 + 5) - 1);
}

#[test]
fn commit_fires_once_for_each_node_in_the_order_of_first_changes() {
    let mut rig = Rig::new();
    let host = rig.socket();
    rig.write(host, 0, "/old/below", "").unwrap();
    rig.watch(host, "/", "t");
    let tx = rig.start(host);
    rig.write(host, tx, "/b", "1").unwrap();
    rig.write(host, tx, "/a", "1").unwrap();
    rig.write(host, tx, "/b", "2").unwrap();
    rig.write(host, tx, "/gone", "").unwrap();
    rig.ok(host, op::RM, tx, &["/gone", ""]);
    rig.ok(host, op::RM, tx, &["/old", ""]);
    rig.ok(host, op::MKDIR, tx, &["/a", ""]);
    assert_eq!(rig.heard(host), [""; 0]);
    rig.commit(host, tx).unwrap();
    assert_eq!(rig.heard(host), ["/b", "/a", "/old"]);
    let tx = rig.start(host);
    rig.write(host, tx, "/never", "").unwrap();
    rig.ok(host, op::TRANSACTION_END, tx, &["F", ""]);
    assert_eq!(rig.heard(host), [""; 0]);
}
