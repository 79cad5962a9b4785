//! Each operation with its rules and errors, on the wire.

mod common;

use abi::xen::xenstore::op;
use common::Rig;
use xenstore::{DomId, Quota};

fn err<T>(name: &str) -> Result<T, String> {
    Err(name.into())
}

fn ok() -> common::Answer {
    Ok(b"OK\0".to_vec())
}

#[test]
fn values_hold_any_bytes_and_come_back_without_a_zero_byte() {
    let mut rig = Rig::new();
    let host = rig.socket();
    assert_eq!(rig.call_bytes(host, op::WRITE, 0, b"/a/b\0x\0\xff\0"), ok());
    assert_eq!(rig.read(host, 0, "/a/b"), Ok(b"x\0\xff\0".to_vec()));
    assert_eq!(rig.read(host, 0, "/a"), Ok(vec![]));
    assert_eq!(rig.call_bytes(host, op::WRITE, 0, b"/a/b"), err("EINVAL"));
}

#[test]
fn directory_lists_names_and_is_empty_for_a_leaf() {
    let mut rig = Rig::new();
    let host = rig.socket();
    for name in ["b", "a", "c/d"] {
        rig.write(host, 0, &format!("/dir/{name}"), "").unwrap();
    }
    assert_eq!(rig.ok(host, op::DIRECTORY, 0, &["/dir", ""]), "a\0b\0c\0");
    assert_eq!(rig.ok(host, op::DIRECTORY, 0, &["/dir/a", ""]), "");
    assert_eq!(rig.error(host, op::DIRECTORY, 0, &["/dir/x", ""]), "ENOENT");
}

#[test]
fn large_directory_is_read_in_parts_of_one_generation() {
    let mut rig = Rig::new();
    let host = rig.socket();
    let names: Vec<String> = (0..3000).map(|number| format!("child-{number:05}")).collect();
    for name in &names {
        rig.write(host, 0, &format!("/dir/{name}"), "").unwrap();
    }
    assert_eq!(rig.error(host, op::DIRECTORY, 0, &["/dir", ""]), "E2BIG");
    let mut list = String::new();
    let mut generation = None;
    let mut part = || {
        let reply = rig.ok(host, op::DIRECTORY_PART, 0, &["/dir", &list.len().to_string(), ""]);
        let (number, names) = reply.split_once('\0').unwrap();
        assert_eq!(*generation.get_or_insert(number.to_owned()), number);
        let end = names.strip_suffix("\0\0");
        list.push_str(end.map_or(names, |_| &names[..names.len() - 1]));
        end.is_some()
    };
    while !part() {}
    assert_eq!(list.split_terminator('\0').collect::<Vec<_>>(), names);
    let beyond = rig.ok(host, op::DIRECTORY_PART, 0, &["/dir", "999999", ""]);
    rig.write(host, 0, "/dir/one-more", "").unwrap();
    let changed = rig.ok(host, op::DIRECTORY_PART, 0, &["/dir", "999999", ""]);
    assert!(beyond.ends_with("\0\0") && changed.ends_with("\0\0") && beyond != changed);
    assert_eq!(rig.ok(host, op::DIRECTORY_PART, 0, &["/dir/one-more", "0", ""]), "0\0\0");
}

#[test]
fn mkdir_keeps_what_exists_and_says_nothing() {
    let mut rig = Rig::new();
    let host = rig.socket();
    rig.write(host, 0, "/a", "value").unwrap();
    rig.watch(host, "/", "w");
    assert_eq!(rig.call(host, op::MKDIR, 0, &["/a", ""]), ok());
    assert_eq!(rig.heard(host), [""; 0]);
    assert_eq!(rig.call(host, op::MKDIR, 0, &["/a/b/c", ""]), ok());
    assert_eq!(rig.heard(host), ["/a/b/c"]);
    assert_eq!(rig.read(host, 0, "/a"), Ok(b"value".to_vec()));
}

#[test]
fn rm_needs_only_the_parent() {
    let mut rig = Rig::new();
    let host = rig.socket();
    rig.write(host, 0, "/a/b/c", "").unwrap();
    assert_eq!(rig.call(host, op::RM, 0, &["/a/x", ""]), ok());
    assert_eq!(rig.error(host, op::RM, 0, &["/x/y", ""]), "ENOENT");
    assert_eq!(rig.call(host, op::RM, 0, &["/a", ""]), ok());
    assert_eq!(rig.read(host, 0, "/a/b/c"), err("ENOENT"));
}

#[test]
fn relative_paths_are_below_the_callers_home() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(4));
    rig.write(guest, 0, "data/x", "guest").unwrap();
    rig.write(host, 0, "data/x", "host").unwrap();
    assert_eq!(rig.read(host, 0, "/local/domain/4/data/x"), Ok(b"guest".to_vec()));
    assert_eq!(rig.read(host, 0, "/local/domain/0/data/x"), Ok(b"host".to_vec()));
    assert_eq!(rig.ok(guest, op::GET_DOMAIN_PATH, 0, &["17", ""]), "/local/domain/17\0");
}

#[test]
fn who_may_not_read_the_nearest_ancestor_learns_nothing() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    rig.write(host, 0, "/secret/known", "").unwrap();
    rig.write(host, 0, "/open/known", "").unwrap();
    rig.ok(host, op::SET_PERMS, 0, &["/open", "r0", ""]);
    for path in ["/secret/known", "/secret/unknown", "/secret/unknown/deeper", "/nowhere"] {
        assert_eq!(rig.read(guest, 0, path), err("EACCES"), "{path}");
        assert_eq!(rig.error(guest, op::RM, 0, &[path, ""]), "EACCES", "{path}");
        assert_eq!(rig.error(guest, op::SET_PERMS, 0, &[path, "b1", ""]), "EACCES", "{path}");
    }
    assert_eq!(rig.read(guest, 0, "/open/unknown"), err("ENOENT"));
    assert_eq!(rig.error(guest, op::SET_PERMS, 0, &["/open/unknown", "b1", ""]), "ENOENT");
    assert_eq!(rig.write(guest, 0, "/open/unknown", ""), err("EACCES"));
}

#[test]
fn created_nodes_take_their_parents_permissions_and_a_guest_owns_its_own() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    rig.ok(host, op::SET_PERMS, 0, &["/local/domain/1", "n1", "r2", ""]);
    rig.write(host, 0, "/local/domain/1/by-host", "").unwrap();
    assert_eq!(rig.ok(host, op::GET_PERMS, 0, &["/local/domain/1/by-host", ""]), "n1\0r2\0");
    rig.write(host, 0, "/shared", "").unwrap();
    rig.ok(host, op::SET_PERMS, 0, &["/shared", "r0", "b1", ""]);
    rig.write(guest, 0, "/shared/a/b", "").unwrap();
    assert_eq!(rig.ok(host, op::GET_PERMS, 0, &["/shared/a", ""]), "r1\0b1\0");
    assert_eq!(rig.server.store().usage(DomId(1)).nodes, 4);
}

#[test]
fn write_only_does_not_read_back() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    rig.write(host, 0, "/drop", "").unwrap();
    rig.ok(host, op::SET_PERMS, 0, &["/drop", "w0", ""]);
    assert_eq!(rig.write(guest, 0, "/drop", "x"), ok());
    assert_eq!(rig.read(guest, 0, "/drop"), err("EACCES"));
}

#[test]
fn set_perms_is_the_owners_who_stays() {
    let mut rig = Rig::new();
    let (host, guest, other) = (rig.socket(), rig.guest(1), rig.guest(2));
    rig.write(guest, 0, "x", "").unwrap();
    assert_eq!(rig.call(guest, op::SET_PERMS, 0, &["x", "b1", "r2"]), ok());
    assert_eq!(rig.error(guest, op::SET_PERMS, 0, &["x", "b2", ""]), "EPERM");
    assert_eq!(rig.error(other, op::SET_PERMS, 0, &["/local/domain/1/x", "b1", ""]), "EACCES");
    assert_eq!(rig.error(guest, op::SET_PERMS, 0, &["x", "b1", "r2", "r3", "r4", "r5", "r6", ""]), "ENOSPC");
    assert_eq!(rig.call(host, op::SET_PERMS, 0, &["/local/domain/1/x", "b2", ""]), ok());
    assert_eq!(rig.error(host, op::SET_PERMS, 0, &["/nowhere", "b2", ""]), "ENOENT");
}

#[test]
fn target_lends_its_rights_until_it_is_gone() {
    let mut rig = Rig::new();
    let (host, target, stub) = (rig.socket(), rig.guest(1), rig.guest(2));
    rig.write(target, 0, "x", "1").unwrap();
    assert_eq!(rig.read(stub, 0, "/local/domain/1/x"), err("EACCES"));
    assert_eq!(rig.error(host, op::SET_TARGET, 0, &["2", "9", ""]), "ENOENT");
    rig.ok(host, op::SET_TARGET, 0, &["2", "1", ""]);
    assert_eq!(rig.read(stub, 0, "/local/domain/1/x"), Ok(b"1".to_vec()));
    assert_eq!(rig.call(stub, op::SET_PERMS, 0, &["/local/domain/1/x", "b1", "r2", ""]), ok());
    rig.ok(host, op::RELEASE, 0, &["1", ""]);
    rig.guest(1);
    rig.write(host, 0, "/local/domain/1/x", "new").unwrap();
    assert_eq!(rig.read(stub, 0, "/local/domain/1/x"), err("EACCES"));
}

#[test]
fn domains_come_and_go() {
    let mut rig = Rig::new();
    let host = rig.socket();
    rig.watch(host, "@introduceDomain", "i");
    rig.watch(host, "@releaseDomain", "r");
    for bad in
        [["0", "1", "1"], ["32752", "1", "1"], ["x", "1", "1"], ["-1", "1", "1"], ["70000", "1", "1"], ["5", "1", "0"], ["5", "1", "x"]]
    {
        assert_eq!(rig.error(host, op::INTRODUCE, 0, &[bad[0], bad[1], bad[2], ""]), "EINVAL", "{bad:?}");
    }
    assert_eq!(rig.ok(host, op::IS_DOMAIN_INTRODUCED, 0, &["5", ""]), "F\0");
    for _ in 0..2 {
        rig.ok(host, op::INTRODUCE, 0, &["5", "100", "3", ""]);
        assert_eq!(rig.heard(host), ["@introduceDomain"]);
    }
    assert_eq!(rig.ok(host, op::IS_DOMAIN_INTRODUCED, 0, &["5", ""]), "T\0");
    assert_eq!(rig.ok(host, op::IS_DOMAIN_INTRODUCED, 0, &["32752", ""]), "T\0");
    assert_eq!(rig.error(host, op::READ, 0, &["/local/domain/5", ""]), "ENOENT");
    for _ in 0..2 {
        rig.server.store().shut_down(DomId(5)).unwrap();
        rig.server.deliver();
    }
    assert_eq!(rig.heard(host), ["@releaseDomain"]);
    rig.ok(host, op::RESUME, 0, &["5", ""]);
    rig.server.store().shut_down(DomId(5)).unwrap();
    rig.server.deliver();
    assert_eq!(rig.heard(host), ["@releaseDomain"]);
    rig.ok(host, op::RELEASE, 0, &["5", ""]);
    assert_eq!(rig.heard(host), ["@releaseDomain"]);
    for operation in [op::RELEASE, op::RESUME] {
        assert_eq!(rig.error(host, operation, 0, &["5", ""]), "ENOENT");
    }
}

#[test]
fn release_removes_what_the_domain_owned_and_all_below() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    rig.write(guest, 0, "device/vbd/state", "1").unwrap();
    rig.write(host, 0, "/local/domain/1/device/by-host", "").unwrap();
    rig.ok(host, op::SET_PERMS, 0, &["/local/domain/1/device/by-host", "n0", ""]);
    rig.write(host, 0, "/backend/x", "").unwrap();
    rig.ok(host, op::SET_PERMS, 0, &["/backend/x", "n0", "r1", "r2", ""]);
    rig.watch(host, "/", "all");
    rig.watch(host, "/local/domain/1/device/by-host", "leaf");
    rig.watch(host, "@releaseDomain", "end");
    rig.ok(host, op::RELEASE, 0, &["1", ""]);
    assert_eq!(rig.heard(host), ["/local/domain/1", "/local/domain/1/device/by-host", "@releaseDomain"]);
    assert_eq!(rig.ok(host, op::DIRECTORY, 0, &["/local/domain", ""]), "");
    assert_eq!(rig.ok(host, op::GET_PERMS, 0, &["/backend/x", ""]), "n0\0r2\0");
    rig.assert_nothing_left(1);
    assert!(rig.server.is_broken(guest));
}

#[test]
fn special_watches_tell_the_domain_with_depth_1_or_by_name() {
    let mut rig = Rig::new();
    let host = rig.socket();
    rig.guest(5);
    rig.guest(6);
    rig.ok(host, op::WATCH, 0, &["@releaseDomain", "deep", "1", ""]);
    rig.ok(host, op::WATCH, 0, &["@releaseDomain/5", "one", ""]);
    rig.ok(host, op::WATCH, 0, &["@anything", "never", ""]);
    rig.heard(host);
    for bad in [["@releaseDomain", "0"], ["@releaseDomain", "2"], ["@releaseDomain/5", "1"], ["@anything", "1"]] {
        assert_eq!(rig.error(host, op::WATCH, 0, &[bad[0], "bad", bad[1], ""]), "EINVAL");
    }
    rig.ok(host, op::RELEASE, 0, &["6", ""]);
    assert_eq!(rig.heard(host), ["@releaseDomain/6"]);
    rig.ok(host, op::RELEASE, 0, &["5", ""]);
    assert_eq!(rig.heard(host), ["@releaseDomain/5", "@releaseDomain/5"]);
}

#[test]
fn guests_hear_special_events_as_their_permissions_say() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    rig.watch(guest, "@introduceDomain", "i");
    rig.watch(guest, "@releaseDomain", "r");
    rig.guest(2);
    rig.ok(host, op::RELEASE, 0, &["2", ""]);
    assert_eq!(rig.heard(guest), ["@releaseDomain"]);
    assert_eq!(rig.error(guest, op::GET_PERMS, 0, &["@introduceDomain", ""]), "EACCES");
    assert_eq!(rig.error(guest, op::SET_PERMS, 0, &["@introduceDomain", "r0", ""]), "EACCES");
    rig.ok(host, op::SET_PERMS, 0, &["@introduceDomain", "n0", "r1", ""]);
    rig.ok(host, op::SET_PERMS, 0, &["@releaseDomain", "n0", ""]);
    assert_eq!(rig.ok(host, op::GET_PERMS, 0, &["@introduceDomain", ""]), "n0\0r1\0");
    rig.guest(2);
    rig.ok(host, op::RELEASE, 0, &["2", ""]);
    assert_eq!(rig.heard(guest), ["@introduceDomain"]);
    for operation in [op::READ, op::DIRECTORY, op::MKDIR, op::RM] {
        assert_eq!(rig.error(host, operation, 0, &["@releaseDomain", ""]), "EINVAL");
    }
    assert_eq!(rig.error(host, op::GET_PERMS, 0, &["@anything", ""]), "EINVAL");
}

#[test]
fn features_are_shown_as_the_host_set_them_before_the_introduction() {
    let mut rig = Rig::new();
    let host = rig.socket();
    assert_eq!(rig.ok(host, op::GET_FEATURE, 0, &["", ""]), "15\0");
    assert_eq!(rig.call(host, op::SET_FEATURE, 0, &["3", "5", ""]), ok());
    assert_eq!(rig.error(host, op::SET_FEATURE, 0, &["3", "16", ""]), "EINVAL");
    let guest = rig.guest(3);
    assert_eq!(rig.error(host, op::SET_FEATURE, 0, &["3", "1", ""]), "EBUSY");
    assert_eq!(rig.error(host, op::SET_FEATURE, 0, &["0", "1", ""]), "EBUSY");
    assert_eq!(rig.ok(guest, op::GET_FEATURE, 0, &["", ""]), "5\0");
    assert_eq!(rig.error(guest, op::GET_FEATURE, 0, &["3", ""]), "EACCES");
}

#[test]
fn quotas_are_read_and_set_for_all_or_for_one() {
    let mut rig = Rig::new();
    let host = rig.socket();
    let names = "nodes watches transactions outstanding transaction-nodes node-permissions node-size path-max memory\0";
    assert_eq!(rig.ok(host, op::GET_QUOTA, 0, &["", ""]), names);
    assert_eq!(rig.ok(host, op::GET_QUOTA, 0, &["nodes", ""]), "1000\0");
    rig.ok(host, op::SET_QUOTA, 0, &["3", "nodes", "2", ""]);
    rig.ok(host, op::SET_QUOTA, 0, &["nodes", "50", ""]);
    assert_eq!(rig.ok(host, op::GET_QUOTA, 0, &["3", "nodes", ""]), "2\0");
    assert_eq!(rig.ok(host, op::GET_QUOTA, 0, &["4", "nodes", ""]), "50\0");
    for bad in [&["elephants", ""][..], &["3", "elephants", ""], &["3", "nodes", "1", ""]] {
        assert_eq!(rig.error(host, op::GET_QUOTA, 0, bad), "EINVAL");
    }
    let guest = rig.guest(3);
    assert_eq!(rig.write(guest, 0, "a", ""), ok());
    assert_eq!(rig.write(guest, 0, "b", ""), err("ENOSPC"));
    rig.ok(host, op::SET_QUOTA, 0, &["3", "nodes", "0", ""]);
    assert_eq!(rig.write(guest, 0, "b", ""), ok());
}

#[test]
fn each_quota_answers_enospc_at_its_limit() {
    let mut rig = Rig::new();
    let guest = rig.guest(1);
    rig.quota(1, Quota::Watches, 2);
    rig.quota(1, Quota::Transactions, 2);
    rig.quota(1, Quota::NodeSize, 4);
    rig.quota(1, Quota::PathMax, 10);
    for number in ["1", "2"] {
        rig.ok(guest, op::WATCH, 0, &["x", number, ""]);
        rig.ok(guest, op::TRANSACTION_START, 0, &["", ""]);
    }
    assert_eq!(rig.error(guest, op::WATCH, 0, &["x", "3", ""]), "ENOSPC");
    assert_eq!(rig.error(guest, op::TRANSACTION_START, 0, &["", ""]), "ENOSPC");
    assert_eq!(rig.write(guest, 0, "x", "1234"), ok());
    assert_eq!(rig.write(guest, 0, "x", "12345"), err("ENOSPC"));
    assert_eq!(rig.write(guest, 0, "0123456789", ""), ok());
    assert_eq!(rig.write(guest, 0, "01234567890", ""), err("EINVAL"));
    rig.quota(1, Quota::Memory, 1);
    assert_eq!(rig.write(guest, 0, "more", ""), err("ENOSPC"));
    assert_eq!(rig.write(guest, 0, "x", "1"), ok(), "giving back is always allowed");
    assert_eq!(rig.server.store().quota_hits(DomId(1), Quota::Memory), 1);
}

#[test]
fn host_has_no_quotas_but_guests_pay_for_what_it_gives_them() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    rig.quota(1, Quota::Nodes, 2);
    for name in ["a", "b", "c"] {
        assert_eq!(rig.write(host, 0, &format!("/local/domain/1/{name}"), ""), ok());
    }
    assert_eq!(rig.server.store().usage(DomId(1)).nodes, 4);
    assert_eq!(rig.write(guest, 0, "d", ""), err("ENOSPC"));
}

#[test]
fn large_value_of_this_process_is_e2big_on_the_wire() {
    let mut rig = Rig::new();
    let host = rig.socket();
    let path = rig.server.store().path(host, b"/large").unwrap();
    let op = |length| xenstore::Op::Write(path.clone(), vec![7u8; length].as_slice().into());
    rig.server.store().apply(host, 0, op(4096)).unwrap();
    assert_eq!(rig.read(host, 0, "/large"), Ok(vec![7; 4096]));
    rig.server.store().apply(host, 0, op(1 << 20)).unwrap();
    assert_eq!(rig.read(host, 0, "/large"), err("E2BIG"));
}

#[test]
fn control_answers_people() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    rig.quota(1, Quota::Nodes, 7);
    assert_eq!(rig.ok(host, op::CONTROL, 0, &["check", ""]), "OK\0");
    assert!(rig.ok(host, op::CONTROL, 0, &["help", ""]).contains("quota"));
    assert!(rig.ok(host, op::CONTROL, 0, &["memreport", ""]).starts_with("nodes: 4\n"));
    assert!(rig.ok(host, op::CONTROL, 0, &["quota", "1", ""]).starts_with("nodes: 1/7 refused 0\n"));
    assert_eq!(rig.ok(host, op::CONTROL, 0, &["quota", "set", "nodes", "9", ""]), "OK\0");
    assert!(rig.ok(host, op::CONTROL, 0, &["quota", ""]).starts_with("nodes: 9\n"));
    assert_eq!(rig.ok(host, op::CONTROL, 0, &["print", "hello", ""]), "OK\0");
    for bad in [&["elephant", ""][..], &["", ""], &["quota", "x", ""], &["quota", "set", "nodes", ""]] {
        assert_eq!(rig.error(host, op::CONTROL, 0, bad), "EINVAL", "{bad:?}");
    }
    assert_eq!(rig.error(guest, op::CONTROL, 0, &["check", ""]), "EACCES");
}

#[test]
fn numbers_that_are_no_operation_are_enosys() {
    let mut rig = Rig::new();
    let (host, guest) = (rig.socket(), rig.guest(1));
    for number in [15, 16, 20, 27, 0xffff, u32::MAX] {
        assert_eq!(rig.error(host, number, 0, &["", ""]), "ENOSYS");
        assert_eq!(rig.error(guest, number, 9, &["", ""]), "ENOSYS");
    }
}
