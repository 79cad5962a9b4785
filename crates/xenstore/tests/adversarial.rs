//! What advisories for other XenStore servers were about, and what we add: each must hurt nobody but who tries it. Numbers are those of
//! Xen Security Advisories. What concerns rings alone is tested with the rings.

mod common;

use abi::xen::xenstore::op;
use common::{Rig, message, parse};
use xenstore::{Config, DomId, NoHost, Quota, Server, Store};

/// XSA-72.
#[test]
fn length_that_lies_ends_the_connection_and_a_partial_header_waits_for_ever() {
    let mut rig = Rig::new();
    let honest = rig.socket();
    for length in [4097u32, 0x8000_0000, u32::MAX] {
        let bad = rig.guest(1);
        let mut header = message(op::WRITE, 1, 0, b"");
        header[12..].copy_from_slice(&length.to_le_bytes());
        rig.server.receive(bad, &header);
        assert!(rig.server.is_broken(bad) && !rig.server.wants_input(bad));
        rig.server.receive(bad, &message(op::READ, 1, 0, b"/\0"));
        assert_eq!(rig.server.output(bad), b"");
        rig.server.forget(DomId(1));
    }
    let slow = rig.guest(2);
    rig.server.receive(slow, &[2, 0, 0]);
    rig.write(honest, 0, "/a", "x").unwrap();
    assert!(!rig.server.is_broken(slow));
    assert_eq!(rig.error(honest, op::WRITE, 0, &[&"x".repeat(4096)]), "EINVAL", "the longest payload is a request");
}

/// XSA-206.
#[test]
fn guest_that_writes_what_the_host_reads_cannot_starve_its_transactions() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    rig.write(guest, 0, "x", "0").unwrap();
    let mut attempts = 0;
    loop {
        attempts += 1;
        let tx = rig.start(host);
        rig.read(host, tx, "/local/domain/1/x").unwrap();
        rig.server.receive(guest, &message(op::WRITE, 1, 0, format!("x\0{attempts}").as_bytes()));
        rig.write(host, tx, "/done", "").unwrap();
        if rig.commit(host, tx).is_ok() {
            break;
        }
        rig.replies(guest);
        assert!(attempts < 10);
    }
    assert_eq!(attempts, 5);
    assert_eq!(rig.replies(guest).len(), 1, "the guest's write was done after the commit");
    assert_eq!(rig.read(host, 0, "/local/domain/1/x"), Ok(b"5".to_vec()));
}

#[test]
fn hold_for_a_host_that_never_ends_its_transaction_can_be_lifted() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    for _ in 0..4 {
        let tx = rig.start(host);
        rig.read(host, tx, "/local/domain/1/x").unwrap_err();
        rig.write(guest, 0, "x", "").unwrap();
        rig.write(host, tx, "/done", "").unwrap();
        rig.commit(host, tx).unwrap_err();
        rig.ok(guest, op::RM, 0, &["x", ""]);
    }
    for lift in [|rig: &mut Rig, _| rig.server.end_hold(), |rig: &mut Rig, host| rig.server.disconnect(host)] {
        rig.start(host);
        assert!(rig.server.is_holding() && !rig.server.wants_input(guest));
        rig.server.receive(guest, &message(op::READ, 1, 0, b"x\0"));
        assert_eq!(rig.server.output(guest), b"");
        lift(&mut rig, host);
        assert!(!rig.server.is_holding() && rig.server.wants_input(guest));
        assert_eq!(rig.replies(guest).len(), 1);
    }
}

/// XSA-233, XSA-425.
#[test]
fn stub_domain_and_its_target_may_go_in_either_order() {
    for order in [[1u16, 2], [2, 1]] {
        let mut rig = Rig::new();
        let (host, target, stub) = (rig.socket(), rig.guest(1), rig.guest(2));
        rig.ok(host, op::SET_TARGET, 0, &["2", "1", ""]);
        rig.write(target, 0, "x", "").unwrap();
        for client in [target, stub] {
            rig.watch(client, "/local/domain/1/x", "t");
            let tx = rig.start(client);
            rig.write(client, tx, "/local/domain/1/x", "y").unwrap();
        }
        for domain in order {
            rig.ok(host, op::RELEASE, 0, &[&domain.to_string(), ""]);
            rig.assert_nothing_left(domain);
        }
        assert_eq!(rig.ok(host, op::IS_DOMAIN_INTRODUCED, 0, &["1", ""]), "F\0");
    }
}

/// XSA-272, XSA-419, XSA-421, XSA-483.
#[test]
fn accounts_return_to_nothing_after_anything() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    for round in 0..3 {
        rig.write(guest, 0, "a/b/c", &"x".repeat(round * 100)).unwrap();
        rig.ok(host, op::SET_PERMS, 0, &["/local/domain/1/a/b", "n2", ""]);
        rig.ok(host, op::SET_PERMS, 0, &["/local/domain/1/a/b", "n1", ""]);
        for end in ["T", "F"] {
            let tx = rig.start(guest);
            rig.write(guest, tx, "new/one", "x").unwrap();
            rig.ok(guest, op::RM, tx, &["new", ""]);
            rig.ok(guest, op::RM, tx, &["a", ""]);
            rig.write(guest, tx, "a/b/c", "y").unwrap();
            rig.ok(guest, op::TRANSACTION_END, tx, &[end, ""]);
        }
        let open = rig.start(guest);
        rig.write(guest, open, "left/open", "x").unwrap();
        rig.ok(guest, op::WATCH, 0, &["a", &round.to_string(), ""]);
        assert!(rig.server.store().is_consistent());
    }
    assert_eq!(rig.server.store().usage(DomId(1)).nodes, 4);
    assert_eq!(rig.server.store().usage(DomId(2)).nodes, 0);
    rig.ok(host, op::RELEASE, 0, &["1", ""]);
    rig.assert_nothing_left(1);
}

/// XSA-115.
#[test]
fn guest_may_do_nothing_privileged() {
    let mut rig = Rig::new();
    let guest = rig.guest(1);
    let requests: [(u32, &[&str]); 11] = [
        (op::CONTROL, &["check", ""]),
        (op::INTRODUCE, &["2", "1", "1", ""]),
        (op::RELEASE, &["1", ""]),
        (op::IS_DOMAIN_INTRODUCED, &["1", ""]),
        (op::RESUME, &["1", ""]),
        (op::SET_TARGET, &["1", "0", ""]),
        (op::SET_FEATURE, &["2", "1", ""]),
        (op::GET_FEATURE, &["2", ""]),
        (op::GET_QUOTA, &["nodes", ""]),
        (op::SET_QUOTA, &["1", "nodes", "0", ""]),
        (op::RELEASE, &["malformed"]),
    ];
    for (op, strings) in requests.iter().take(10) {
        assert_eq!(rig.error(guest, *op, 0, strings), "EACCES", "{op}");
        assert_eq!(rig.error(guest, *op, 99, strings), if *op == op::GET_FEATURE { "ENOENT" } else { "EACCES" }, "{op}");
    }
    assert_eq!(rig.error(guest, requests[10].0, 0, requests[10].1), "EACCES", "the right is checked before the shape");
    rig.ok(guest, op::WATCH, 99, &["/", "bogus transaction", ""]);
    assert_eq!(rig.error(guest, op::GET_DOMAIN_PATH, 99, &["1", ""]), "ENOENT");
}

/// XSA-322, XSA-419.
#[test]
fn next_domain_of_the_same_number_inherits_nothing() {
    let mut rig = Rig::new();
    let (host, old) = (rig.socket(), rig.guest(5));
    rig.write(host, 0, "/granted", "secret").unwrap();
    rig.ok(host, op::SET_PERMS, 0, &["/granted", "n0", "r5", "b5", "r6", ""]);
    rig.write(host, 0, "/drop/box", "").unwrap();
    rig.ok(host, op::SET_PERMS, 0, &["/drop", "b0", ""]);
    rig.write(old, 0, "/drop/mine", "secret").unwrap();
    rig.ok(host, op::SET_PERMS, 0, &["@introduceDomain", "n0", "r5", ""]);
    rig.ok(host, op::SET_QUOTA, 0, &["5", "nodes", "7", ""]);
    let tx = rig.start(host);
    rig.ok(host, op::SET_PERMS, tx, &["/drop/box", "n0", "r5", ""]);
    rig.ok(host, op::RELEASE, 0, &["5", ""]);
    assert_eq!(rig.commit(host, tx), Err("EAGAIN".into()), "a commit brings no rights of the dead back");
    let new = rig.guest(5);
    assert_eq!(rig.error(new, op::READ, 0, &["/granted", ""]), "EACCES");
    assert_eq!(rig.error(new, op::READ, 0, &["/drop/mine", ""]), "ENOENT");
    assert_eq!(rig.ok(host, op::GET_PERMS, 0, &["/granted", ""]), "n0\0r6\0");
    assert_eq!(rig.ok(host, op::GET_PERMS, 0, &["@introduceDomain", ""]), "n0\0");
    assert_eq!(rig.ok(host, op::GET_QUOTA, 0, &["5", "nodes", ""]), "1000\0");
    assert!(rig.server.is_broken(old));
}

/// XSA-323, XSA-324.
#[test]
fn paths_and_tokens_stay_within_a_message() {
    let mut rig = Rig::new();
    let guest = rig.guest(1);
    rig.quota(1, Quota::PathMax, 0);
    let relative = "x".repeat(3072 - "/local/domain/1/".len());
    rig.write(guest, 0, &relative, "").unwrap();
    assert_eq!(rig.write(guest, 0, &format!("{relative}x"), ""), Err("EINVAL".into()), "relative path that grows too long");
    assert_eq!(rig.error(guest, op::WATCH, 0, &["x", &"t".repeat(1023), ""]), "E2BIG");
    rig.watch(guest, "/local/domain/1", &"t".repeat(1022));
    rig.write(guest, 0, &relative, "y").unwrap();
    assert_eq!(rig.heard(guest), [format!("/local/domain/1/{relative}")]);
}

/// XSA-325.
#[test]
fn domain_that_dies_with_requests_pending_takes_them_along() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    rig.server.receive(guest, &message(op::READ, 1, 0, b"x\0").repeat(100));
    rig.server.receive(guest, &message(op::READ, 1, 0, b"x\0")[..7]);
    rig.ok(host, op::RELEASE, 0, &["1", ""]);
    assert!(rig.server.is_broken(guest) && rig.server.take_active().contains(&guest));
    rig.server.receive(guest, &message(op::READ, 1, 0, b"x\0"));
    rig.server.sent(guest, 10);
    assert_eq!(rig.server.output(guest), b"");
    rig.assert_nothing_left(1);
}

/// XSA-326.
#[test]
fn guest_that_never_reads_costs_bounded_memory_and_loses_no_watch() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    rig.quota(1, Quota::Watches, 1000);
    for number in 0..1000 {
        rig.watch(guest, "hot", &format!("{number}-{}", "t".repeat(300)));
    }
    for number in 0..200 {
        rig.write(host, 0, &format!("/local/domain/1/hot/{number}"), "").unwrap();
    }
    assert!(rig.server.output(guest).len() < (256 << 10) + 4112);
    rig.replies(guest);
    let tokens: std::collections::HashSet<_> = rig.events.iter().map(|(_, _, token)| token.clone()).collect();
    assert_eq!(tokens.len(), 1000, "each watch fired");
}

/// XSA-416, XSA-326.
#[test]
fn snapshots_of_guests_hold_bounded_memory() {
    let config = Config { pinned_max: 1 << 20, ..Config::default() };
    let mut rig = Rig::of(Server::new(Store::new(config), Box::new(NoHost)));
    let (host, guest) = (rig.socket(), rig.guest(1));
    let (old, hosts) = (rig.start(guest), rig.start(host));
    rig.write(guest, old, "x", "").unwrap();
    for number in 0..1100 {
        rig.write(host, 0, &format!("/n/{}", number % 10), &number.to_string()).unwrap();
    }
    let young = rig.start(guest);
    rig.write(guest, young, "y", "").unwrap();
    assert_eq!(rig.commit(guest, old), Err("EAGAIN".into()), "the oldest gives way");
    assert_eq!(rig.commit(guest, young), Ok(b"OK\0".to_vec()));
    assert_eq!(rig.commit(host, hosts), Ok(b"OK\0".to_vec()));
}

/// XSA-416.
#[test]
fn large_transactions_are_charged_while_they_are_open() {
    let mut rig = Rig::new();
    let guest = rig.guest(1);
    rig.quota(1, Quota::Memory, 100_000);
    let tx = rig.start(guest);
    let mut written = 0;
    while rig.write(guest, tx, "x", &"v".repeat(written % 7)).is_ok() {
        written += 1;
        assert!(written < 1000);
    }
    assert!(rig.server.store().usage(DomId(1)).memory < 101_000);
    assert_eq!(rig.commit(guest, tx), Err("ENOMEM".into()));
    assert_eq!(rig.server.store().usage(DomId(1)).nodes, 1);
    assert!(rig.server.store().is_consistent());
}

/// XSA-326: as many transactions as a guest may have, each as large as it may be.
#[test]
fn all_transactions_of_a_guest_stay_within_its_memory() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    let open: Vec<_> = (0..10).map(|_| rig.start(guest)).collect();
    let value = "v".repeat(2000);
    let mut refused = 0;
    for number in 0..1024 {
        for tx in &open {
            refused += usize::from(rig.write(guest, *tx, &format!("x/{number}"), &value).is_err());
        }
    }
    let (limit, most) = (2560 << 10, rig.server.store().usage(DomId(1)).memory);
    assert!(refused > 0 && most <= limit + 4096, "{refused} refused, {most} bytes");
    rig.write(host, 0, "/others", "go on").unwrap();
    rig.ok(guest, op::RESET_WATCHES, 0, &["", ""]);
    assert_eq!(rig.server.store().usage(DomId(1)).nodes, 1);
    assert!(rig.server.store().is_consistent());
}

/// XSA-330.
#[test]
fn reset_drops_watches_and_transactions() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    for round in 0..3 {
        for number in 0..128 {
            rig.watch(guest, "x", &number.to_string());
        }
        for _ in 0..10 {
            rig.start(guest);
        }
        assert_eq!(rig.server.store().open_counts(DomId(1)), (128, 10));
        if round == 0 {
            rig.server.reconnect(guest);
        } else {
            rig.ok(guest, op::RESET_WATCHES, 0, &["", ""]);
        }
        assert_eq!(rig.server.store().open_counts(DomId(1)), (0, 0));
    }
    rig.write(host, 0, "/local/domain/1/x", "").unwrap();
    assert_eq!(rig.heard(guest), [""; 0]);
    assert!(rig.server.store().is_consistent());
}

/// XSA-352.
#[test]
fn nodes_cannot_be_given_to_a_victim() {
    let mut rig = Rig::new();
    let (guest, victim) = (rig.guest(1), rig.guest(2));
    rig.write(guest, 0, "x", "").unwrap();
    assert_eq!(rig.error(guest, op::SET_PERMS, 0, &["x", "n2", ""]), "EPERM");
    let tx = rig.start(guest);
    assert_eq!(rig.error(guest, op::SET_PERMS, tx, &["x", "n2", ""]), "EPERM");
    rig.ok(victim, op::SET_PERMS, 0, &["/local/domain/2", "b2", ""]);
    rig.write(guest, 0, "/local/domain/2/planted", "").unwrap();
    assert_eq!(rig.server.store().usage(DomId(2)).nodes, 1, "who creates pays");
}

/// XSA-353.
#[test]
fn root_is_the_hosts_and_child_of_a_removed_parent_is_gone() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    assert_eq!(rig.error(guest, op::READ, 0, &["/", ""]), "EACCES");
    assert_eq!(rig.write(guest, 0, "/planted", ""), Err("EACCES".into()));
    assert_eq!(rig.ok(host, op::GET_PERMS, 0, &["/", ""]), "n0\0");
    rig.write(guest, 0, "a/b", "").unwrap();
    let tx = rig.start(guest);
    rig.ok(guest, op::RM, tx, &["a", ""]);
    assert_eq!(rig.error(guest, op::SET_PERMS, tx, &["a/b", "b1", ""]), "ENOENT");
    assert_eq!(rig.error(guest, op::READ, tx, &["a/b", ""]), "ENOENT");
}

/// XSA-415.
#[test]
fn failed_creation_in_a_transaction_leaves_no_residue() {
    let mut rig = Rig::new();
    let guest = rig.guest(1);
    rig.quota(1, Quota::Nodes, 3);
    let tx = rig.start(guest);
    assert_eq!(rig.write(guest, tx, "a/b/c/d", ""), Err("ENOSPC".into()));
    assert_eq!(rig.read(guest, tx, "a"), Err("ENOENT".into()), "no part of the path was created");
    assert_eq!(rig.commit(guest, tx), Err("ENOMEM".into()));
    assert_eq!(rig.write(guest, 0, "a/b", ""), Ok(b"OK\0".to_vec()));
    assert!(rig.server.store().is_consistent());
}

/// XSA-421.
#[test]
fn commit_that_fails_changes_nothing_and_tells_nobody() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    rig.write(guest, 0, "read", "1").unwrap();
    rig.watch(host, "/local/domain/1", "t");
    let tx = rig.start(guest);
    rig.write(guest, tx, "first", "").unwrap();
    rig.read(guest, tx, "read").unwrap();
    rig.ok(guest, op::RM, tx, &["read", ""]);
    rig.write(guest, tx, "last", "").unwrap();
    rig.write(host, 0, "/local/domain/1/read", "2").unwrap();
    rig.heard(host);
    assert_eq!(rig.commit(guest, tx), Err("EAGAIN".into()));
    assert_eq!(rig.ok(guest, op::DIRECTORY, 0, &["/local/domain/1", ""]), "read\0");
    assert_eq!(rig.heard(host), [""; 0]);
    assert!(rig.server.store().is_consistent());
}

/// XSA-421.
#[test]
fn creating_and_deleting_in_one_transaction_is_nothing() {
    let mut rig = Rig::new();
    let guest = rig.guest(1);
    rig.watch(guest, "brief", "t");
    let tx = rig.start(guest);
    rig.write(guest, tx, "brief/node", "").unwrap();
    rig.ok(guest, op::RM, tx, &["brief", ""]);
    rig.commit(guest, tx).unwrap();
    assert_eq!(rig.error(guest, op::READ, 0, &["brief", ""]), "ENOENT");
    assert_eq!(rig.heard(guest), [""; 0]);
    assert_eq!(rig.server.store().usage(DomId(1)).nodes, 1);
    assert!(rig.server.store().is_consistent());
}

/// XSA-417.
#[test]
fn malformed_permissions_are_refused_and_change_nothing() {
    let mut rig = Rig::new();
    let guest = rig.guest(1);
    rig.write(guest, 0, "x", "").unwrap();
    for bad in ["", "r", "q1", "r1x", "1", "n1\0", "n1\0\0r2", "n1\0r", "n99999", "n-1"] {
        assert_eq!(rig.call_bytes(guest, op::SET_PERMS, 0, format!("x\0{bad}\0").as_bytes()), Err("EINVAL".into()), "{bad:?}");
    }
    assert_eq!(rig.error(guest, op::SET_PERMS, 0, &["x"]), "EINVAL");
    assert_eq!(rig.ok(guest, op::GET_PERMS, 0, &["x", ""]), "n1\0");
}

/// XSA-418. Runs on a small stack.
#[test]
fn depth_needs_no_stack() {
    let work = || {
        let mut rig = Rig::new();
        let (host, guest) = (rig.socket(), rig.guest(1));
        rig.quota(1, Quota::Nodes, 10_000);
        rig.quota(0, Quota::PathMax, 0);
        rig.quota(1, Quota::PathMax, 0);
        let path = format!("/local/domain/1{}", "/a".repeat(1500));
        for round in 0..3 {
            rig.write(guest, 0, &path, "deep").unwrap();
            rig.watch(guest, &path, &round.to_string());
            let tx = rig.start(host);
            rig.write(host, tx, &path, "deeper").unwrap();
            rig.server.state();
            assert!(rig.server.store().is_consistent());
            rig.commit(host, tx).unwrap();
            if round == 0 {
                rig.ok(guest, op::RM, 0, &["a", ""]);
            }
        }
        let restored = Server::restored(rig.server.state(), Config::default(), Box::new(NoHost)).unwrap();
        assert_eq!(restored.state().nodes.len(), 1504);
        rig.ok(host, op::RELEASE, 0, &["1", ""]);
        rig.assert_nothing_left(1);
    };
    std::thread::Builder::new().stack_size(128 << 10).spawn(work).unwrap().join().unwrap();
}

/// XSA-420.
#[test]
fn shrinking_below_the_size_at_the_start_is_no_debt() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    rig.write(guest, 0, "x", &"v".repeat(2000)).unwrap();
    let tx = rig.start(guest);
    for length in (0..20).rev() {
        rig.write(guest, tx, "x", &"v".repeat(length)).unwrap();
        rig.ok(guest, op::SET_PERMS, tx, &["x", "n1", "r2", ""]);
        rig.ok(guest, op::SET_PERMS, tx, &["x", "n1", ""]);
    }
    rig.write(host, 0, "/elsewhere", "").unwrap();
    rig.commit(guest, tx).unwrap();
    assert_eq!(rig.read(guest, 0, "x"), Ok(vec![]));
    assert!(rig.server.store().is_consistent());
}

/// XSA-440.
#[test]
fn two_transactions_that_delete_the_same_nodes_both_commit() {
    let mut rig = Rig::new();
    let (one, two) = (rig.socket(), rig.guest(1));
    rig.write(two, 0, "a/b", "").unwrap();
    let (first, second) = (rig.start(one), rig.start(two));
    rig.ok(one, op::RM, first, &["/local/domain/1/a", ""]);
    rig.ok(two, op::RM, second, &["a", ""]);
    rig.commit(one, first).unwrap();
    rig.commit(two, second).unwrap();
    assert_eq!(rig.server.store().usage(DomId(1)).nodes, 1);
    assert!(rig.server.store().is_consistent());
}

/// XSA-481.
#[test]
fn home_of_nobody_is_no_path() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    for client in [host, guest] {
        for path in ["/local/domain/", "/local/domain//", "/local/domain/1/", "/local/domain/x/"] {
            for op in [op::READ, op::DIRECTORY, op::GET_PERMS, op::MKDIR, op::RM] {
                assert_eq!(rig.error(client, op, 0, &[path, ""]), "EINVAL", "{path}");
            }
            assert_eq!(rig.error(client, op::WATCH, 0, &[path, "t", ""]), "EINVAL");
        }
    }
}

/// XSA-484.
#[test]
fn reset_inside_a_transaction_ends_it() {
    let mut rig = Rig::new();
    let guest = rig.guest(1);
    let tx = rig.start(guest);
    rig.write(guest, tx, "x", "").unwrap();
    assert_eq!(rig.call(guest, op::RESET_WATCHES, tx, &["", ""]), Ok(b"OK\0".to_vec()));
    assert_eq!(rig.commit(guest, tx), Err("ENOENT".into()));
    assert_eq!(rig.error(guest, op::RESET_WATCHES, tx, &["", ""]), "ENOENT");
    assert!(rig.server.store().is_consistent());
}

#[test]
fn guest_that_never_reads_events_does_not_stall_others() {
    let mut rig = Rig::new();
    let (host, guest, other) = (rig.socket(), rig.guest(1), rig.guest(2));
    rig.watch(guest, "data", "t");
    for number in 0..20_000 {
        rig.write(host, 0, &format!("/local/domain/1/data/{number}"), "").unwrap();
    }
    rig.write(other, 0, "x", "").unwrap();
    assert!(rig.server.output(guest).len() < (256 << 10) + 4112);
    assert_eq!(rig.heard(guest).last().map(String::as_str), Some("data"), "what did not fit is one event at the watch");
    rig.write(host, 0, "/local/domain/1/data/after", "").unwrap();
    assert_eq!(rig.heard(guest), ["data/after"]);
}

#[test]
fn host_cannot_destroy_the_store() {
    let mut rig = Rig::new();
    let host = rig.socket();
    rig.write(host, 0, "/a", "").unwrap();
    assert_eq!(rig.error(host, op::RELEASE, 0, &["0", ""]), "EINVAL");
    assert_eq!(rig.error(host, op::RM, 0, &["/", ""]), "EINVAL");
    assert_eq!(rig.error(host, op::SET_PERMS, 0, &["/", "n5", ""]), "EINVAL");
    assert_eq!(rig.ok(host, op::DIRECTORY, 0, &["/", ""]), "a\0");
}

#[test]
fn idle_connections_and_foreign_watches_are_not_looked_at() {
    let mut rig = Rig::new();
    let host = rig.socket();
    for number in 0..1000 {
        let idle = rig.socket();
        rig.watch(idle, "/elsewhere", &number.to_string());
    }
    rig.server.take_active();
    rig.write(host, 0, "/a", "x").unwrap();
    assert_eq!(rig.server.take_active(), [host]);
}

#[test]
fn client_that_crashes_in_the_middle_leaves_nothing() {
    let mut rig = Rig::new();
    let client = rig.socket();
    rig.watch(client, "/a", "t");
    let tx = rig.start(client);
    rig.write(client, tx, "/a/b", "").unwrap();
    rig.server.receive(client, &message(op::TRANSACTION_END, 1, tx, b"T\0")[..17]);
    rig.server.disconnect(client);
    let next = rig.socket();
    assert_ne!(next, client);
    assert_eq!(rig.read(next, 0, "/a/b"), Err("ENOENT".into()));
    assert!(rig.server.store().is_consistent());
    assert!(parse(rig.server.output(client)).is_empty());
}
