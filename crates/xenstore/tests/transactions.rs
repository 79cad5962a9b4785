//! Isolation, conflicts, ends. The table of conflicts is that of C xenstored and oxenstored, with the answer that is right.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use abi::xen::xenstore::op;
use common::{Answer, Rig};
use xenstore::{ClientId, Quota};

type Step = (u32, &'static [&'static str]);

const READ_A: Step = (op::READ, &["/a", ""]);
const WRITE_A: Step = (op::WRITE, &["/a", "inside"]);
const WRITE_B: Step = (op::WRITE, &["/b", "inside"]);

/// Runs `inside` in a transaction and `outside` before its commit, on `/a` = "old" and `/dir/child` = "old".
fn commit_of(inside: &[Step], outside: &[Step]) -> (Answer, Rig, ClientId) {
    let mut rig = Rig::new();
    let (one, two) = (rig.socket(), rig.socket());
    for path in ["/a", "/dir/child"] {
        rig.write(one, 0, path, "old").unwrap();
    }
    let tx = rig.start(one);
    for (op, strings) in inside {
        let _ = rig.call(one, *op, tx, strings);
    }
    for (op, strings) in outside {
        rig.ok(two, *op, 0, strings);
    }
    let answer = rig.commit(one, tx);
    assert!(rig.server.store().is_consistent());
    (answer, rig, one)
}

fn commits(inside: &[Step], outside: &[Step]) -> (Rig, ClientId) {
    let (answer, rig, client) = commit_of(inside, outside);
    assert_eq!(answer, Ok(b"OK\0".to_vec()), "{inside:?} against {outside:?}");
    (rig, client)
}

fn conflicts(inside: &[Step], outside: &[Step]) {
    let (answer, mut rig, client) = commit_of(inside, outside);
    assert_eq!(answer, Err("EAGAIN".into()), "{inside:?} against {outside:?}");
    assert_eq!(rig.read(client, 0, "/b"), Err("ENOENT".into()), "a conflict leaves nothing");
}

#[test]
fn what_was_read_and_has_changed_conflicts() {
    conflicts(&[READ_A, WRITE_B], &[(op::WRITE, &["/a", "new"])]);
    conflicts(&[READ_A, WRITE_B], &[(op::RM, &["/a", ""])]);
    conflicts(&[(op::READ, &["/z", ""]), WRITE_B], &[(op::WRITE, &["/z", ""])]);
    conflicts(&[(op::GET_PERMS, &["/a", ""]), WRITE_B], &[(op::SET_PERMS, &["/a", "r0", ""])]);
    conflicts(&[(op::DIRECTORY, &["/dir", ""]), WRITE_B], &[(op::WRITE, &["/dir/new", ""])]);
    conflicts(&[(op::DIRECTORY, &["/dir", ""]), WRITE_B], &[(op::RM, &["/dir/child", ""])]);
    conflicts(&[(op::DIRECTORY_PART, &["/dir", "0", ""]), WRITE_B], &[(op::WRITE, &["/dir/new", ""])]);
    conflicts(&[(op::RM, &["/z/x", ""]), WRITE_B], &[(op::MKDIR, &["/z", ""])]);
}

#[test]
fn reading_alone_never_conflicts() {
    commits(&[READ_A], &[(op::WRITE, &["/a", "new"])]);
    commits(&[(op::DIRECTORY, &["/dir", ""])], &[(op::RM, &["/dir", ""])]);
}

#[test]
fn same_value_and_same_list_are_no_change() {
    commits(&[READ_A, WRITE_B], &[(op::WRITE, &["/a", "old"])]);
    commits(&[READ_A, WRITE_B], &[(op::WRITE, &["/a", "new"]), (op::WRITE, &["/a", "old"])]);
    commits(&[(op::DIRECTORY, &["/dir", ""]), WRITE_B], &[(op::WRITE, &["/dir/child", "new"])]);
    commits(&[(op::DIRECTORY, &["/dir", ""]), WRITE_B], &[(op::WRITE, &["/dir/x", ""]), (op::RM, &["/dir/x", ""])]);
}

#[test]
fn unrelated_changes_and_siblings_do_not_conflict() {
    commits(&[READ_A, WRITE_B], &[(op::WRITE, &["/c", "new"])]);
    let (mut rig, client) = commits(&[(op::WRITE, &["/dir/x", ""])], &[(op::WRITE, &["/dir/y", ""])]);
    assert_eq!(rig.ok(client, op::DIRECTORY, 0, &["/dir", ""]), "child\0x\0y\0");
}

#[test]
fn blind_writes_win() {
    let (mut rig, client) = commits(&[WRITE_A], &[(op::WRITE, &["/a", "new"])]);
    assert_eq!(rig.read(client, 0, "/a"), Ok(b"inside".to_vec()));
    let (mut rig, client) = commits(&[WRITE_A], &[(op::RM, &["/a", ""])]);
    assert_eq!(rig.read(client, 0, "/a"), Ok(b"inside".to_vec()));
    let (mut rig, client) = commits(&[WRITE_A], &[(op::SET_PERMS, &["/a", "r0", ""])]);
    assert_eq!(rig.ok(client, op::GET_PERMS, 0, &["/a", ""]), "r0\0");
    let (mut rig, client) = commits(&[(op::RM, &["/a", ""])], &[(op::WRITE, &["/a/sub", "new"])]);
    assert_eq!(rig.read(client, 0, "/a"), Err("ENOENT".into()));
}

#[test]
fn own_writes_are_read_back_and_depend_on_nothing() {
    let (mut rig, client) = commits(&[WRITE_A, READ_A, WRITE_B], &[(op::WRITE, &["/a", "new"])]);
    assert_eq!(rig.read(client, 0, "/a"), Ok(b"inside".to_vec()));
}

#[test]
fn rights_lost_before_the_commit_conflict() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    rig.write(host, 0, "/shared", "").unwrap();
    rig.ok(host, op::SET_PERMS, 0, &["/shared", "n0", "b1", ""]);
    let tx = rig.start(guest);
    rig.write(guest, tx, "/shared", "guest").unwrap();
    rig.ok(host, op::SET_PERMS, 0, &["/shared", "n0", ""]);
    assert_eq!(rig.commit(guest, tx), Err("EAGAIN".into()));
}

#[test]
fn transaction_sees_the_start_and_its_own_changes_only() {
    let mut rig = Rig::new();
    let (one, two) = (rig.socket(), rig.socket());
    rig.write(one, 0, "/a", "old").unwrap();
    let tx = rig.start(one);
    rig.write(two, 0, "/a", "new").unwrap();
    rig.write(one, tx, "/b", "inside").unwrap();
    assert_eq!(rig.read(one, tx, "/a"), Ok(b"old".to_vec()));
    assert_eq!(rig.read(one, 0, "/a"), Ok(b"new".to_vec()), "requests outside may come between");
    assert_eq!(rig.read(two, 0, "/b"), Err("ENOENT".into()));
    assert_eq!(rig.read(one, tx, "/b"), Ok(b"inside".to_vec()));
}

#[test]
fn ids_are_the_connections_own() {
    let mut rig = Rig::new();
    let (one, two) = (rig.socket(), rig.socket());
    assert_eq!((rig.start(one), rig.start(one), rig.start(two)), (1, 2, 1));
    assert_eq!(rig.read(two, 2, "/"), Err("ENOENT".into()));
    assert_eq!(rig.error(two, op::TRANSACTION_START, 1, &["", ""]), "EBUSY");
    assert_eq!(rig.error(two, op::TRANSACTION_START, 2, &["", ""]), "ENOENT");
    assert_eq!(rig.error(two, op::TRANSACTION_END, 0, &["T", ""]), "ENOENT");
    assert_eq!(rig.error(two, op::TRANSACTION_END, 2, &["T", ""]), "ENOENT");
    assert_eq!(rig.error(two, op::TRANSACTION_END, 1, &["X", ""]), "EINVAL");
    assert_eq!(rig.ok(two, op::TRANSACTION_END, 1, &["F", ""]), "OK\0");
    assert_eq!(rig.error(two, op::TRANSACTION_END, 1, &["F", ""]), "ENOENT");
}

#[test]
fn quota_failure_inside_spoils_the_commit() {
    let mut rig = Rig::new();
    let guest = rig.guest(1);
    rig.quota(1, Quota::Nodes, 2);
    let tx = rig.start(guest);
    rig.write(guest, tx, "a", "").unwrap();
    assert_eq!(rig.write(guest, tx, "b", ""), Err("ENOSPC".into()));
    assert_eq!(rig.commit(guest, tx), Err("ENOMEM".into()));
    assert_eq!(rig.read(guest, 0, "a"), Err("ENOENT".into()));
    assert!(rig.server.store().is_consistent());
}

#[test]
fn quota_used_up_meanwhile_is_a_conflict() {
    let mut rig = Rig::new();
    let guest = rig.guest(1);
    rig.quota(1, Quota::Nodes, 2);
    let tx = rig.start(guest);
    rig.write(guest, tx, "a", "").unwrap();
    rig.write(guest, 0, "b", "").unwrap();
    assert_eq!(rig.commit(guest, tx), Err("EAGAIN".into()));
}

#[test]
fn steps_are_limited_and_repeated_reads_are_none() {
    let mut rig = Rig::new();
    let guest = rig.guest(1);
    rig.quota(1, Quota::TransactionNodes, 3);
    let tx = rig.start(guest);
    for _ in 0..10 {
        rig.read(guest, tx, "/local/domain/1").unwrap();
    }
    rig.write(guest, tx, "a", "").unwrap();
    rig.write(guest, tx, "b", "").unwrap();
    assert_eq!(rig.write(guest, tx, "c", ""), Err("ENOSPC".into()));
    assert_eq!(rig.commit(guest, tx), Err("ENOMEM".into()));
}

#[test]
fn refused_requests_inside_are_part_of_what_was_seen() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    rig.write(host, 0, "/shared", "").unwrap();
    let tx = rig.start(guest);
    assert_eq!(rig.write(guest, tx, "/shared", "x"), Err("EACCES".into()));
    rig.write(guest, tx, "told", "no").unwrap();
    rig.ok(host, op::SET_PERMS, 0, &["/shared", "n0", "b1", ""]);
    assert_eq!(rig.commit(guest, tx), Err("EAGAIN".into()));
}
