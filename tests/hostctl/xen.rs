//! A real Xen, a real xenstored, and hostctl in dom0.

use crate::dom0::{PLAIN, dom0};
use crate::script::expect;
use crate::{c_program, hostctl, program};

/// Commands in dom0, what they print and how they end.
const COMMANDS: &[(&str, &str, i32)] = &[
    ("hostctl -t", "/dev/pvbus0: Xen", 0),
    ("xenstore-write data/from-xen 'a b'; hostctl data/from-xen", "a b", 0),
    ("hostctl data/from-us 'My interface' && xenstore-read data/from-us", "My interface", 0),
    ("hostctl data", "from-xen\nfrom-us", 0),
    ("hostctl ls data", "from-xen\nfrom-us", 0),
    ("hostctl ls --json data/", r#"["from-xen","from-us"]"#, 0),
    ("hostctl get data | wc -c", "0", 0),
    ("hostctl /local/domain/0/name", "Domain-0", 0),
    ("hostctl --json data/from-xen", r#"{"key":"data/from-xen","value":"a b"}"#, 0),
    ("printf 'one\\ntwo\\n' | hostctl -i - data/lines; hostctl data/lines", "one\ntwo", 0),
    ("printf '\\001\\n' | hostctl set -i - --raw data/bytes; hostctl --raw data/bytes | od -An -tx1", " 01 0a", 0),
    ("hostctl data/bytes", "\\^A", 0),
    ("hostctl data/no-such-key", "hostctl: ioctl: No such file or directory", 1),
    ("hostctl get data/no-such-key", "hostctl: data/no-such-key: there is no such key", 3),
    ("hostctl rm data/from-us && xenstore-exists data/from-us", "", 1),
    ("hostctl rm data/from-us", "hostctl: data/from-us: there is no such key", 3),
    ("dd if=/dev/zero bs=5000 count=1 2>/dev/null | tr '\\0' x | hostctl set -i - data/big >/dev/null 2>&1", "", 1),
    (
        "(sleep 1; xenstore-write data/w/x 1; sleep 1; xenstore-rm data/w/x) & hostctl watch --count 2 --timeout 20 data/w",
        "data/w is not there\ndata/w/x: 1\ndata/w/x is not there",
        0,
    ),
    ("hostctl watch --timeout 0.3 data/from-xen", "data/from-xen: a b\nhostctl: no change in time", 6),
    (
        "i=0; while [ $i -lt 300 ]; do echo x; i=$((i+1)); done | while read x; do i=$((i+1)); xenstore-write data/many/a-rather-long-name-$i 1; done; hostctl ls data/many | wc -l",
        "300",
        0,
    ),
    (
        "hostctl --explain data/from-xen 2>&1 | cut -d' ' -f1-5",
        "hostctl: store: Xen, interface at\nhostctl: way: /dev/xen/xenbus\nhostctl: why: the first interface\na b",
        0,
    ),
    ("hostctl -f xen -t; hostctl -f xen data/from-xen", "xen: Xen\na b", 0),
    (
        "busybox su nobody -s /bin/sh -c 'hostctl get data/from-xen' 2>&1",
        "hostctl: /dev/xen/xenbus is not for this user: XenStore wants root",
        5,
    ),
];

#[test]
fn dom0_of_a_real_xen_reads_writes_lists_removes_and_watches() {
    let directory = tempfile::tempdir().unwrap();
    let files = [("hostctl", hostctl()), ("pvbus", c_program(directory.path()))];
    expect(&dom0(PLAIN, &files.each_ref().map(|(name, path)| (*name, path.as_path())), "hostctl detect\n", COMMANDS), COMMANDS);
}

/// Directed tests of both clients.
const CLIENTS: &[(&str, &str, i32)] = &[("xenstore-rig | grep -v ^PASS", "", 1), ("xenstore-rig | grep -c ^PASS", "9", 0)];

#[test]
fn both_clients_agree_with_a_real_xenstored_about_transactions_and_watches() {
    let rig = program::build_static(&["-p", "hostctl", "--example", "xenstore"]).join("debug/examples/xenstore");
    expect(&dom0(PLAIN, &[("xenstore-rig", &rig)], "", CLIENTS), CLIENTS);
}
