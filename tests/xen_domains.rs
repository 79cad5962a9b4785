//! Our `xenstored` in place of Xen's own, under a real Xen: dom0's kernel, Xen's toolstack and a domain talk to it by their own means.
//!
//! QEMU boots the hypervisor, and Debian's kernel as dom0; `xl` makes a domain of the same kernel, whose initial RAM disk dom0 packs of its own
//! programs. `tests/common/xen/make` makes all but our program. The server is replaced (SIGUSR2) while the domain waits for an event.

#[path = "common/mod.rs"]
mod common;
#[path = "common/dom0.rs"]
mod dom0;
#[allow(dead_code)]
#[path = "rig/initrd.rs"]
mod initrd;
#[path = "common/program.rs"]
mod program;
#[path = "common/script.rs"]
mod script;

use dom0::{WITH_XL, dom0};
use script::expect;

/// In place of the one that `/init` starts.
const START: &[u8] = b"#!/bin/busybox sh\nexec /bin/our-xenstored --daemon --log /log \"$@\"\n";

/// What dom0 does first. The domain's programs are dom0's own; it answers each ping with a pong.
const PREPARE: &str = r#"
kernel() { XENSTORED_PATH=/dev/xen/xenbus "$@"; }
key() { until xenstore-read $1 2>/dev/null; do usleep 200000; done; }
becomes() { until [ "$(xenstore-read $1 2>/dev/null)" = "$2" ]; do usleep 200000; done; }
watch() { rm -f /events; timeout 300 "$@" > /events & until [ -s /events ]; do usleep 100000; done; }
gone() { while xenstore-exists $1; do usleep 200000; done; }
upgrade() { kill -USR2 $(cat /run/xenstored.pid); until [ $(grep -c 'took over' /log) = $1 ]; do usleep 100000; done; }
xenstore-rm /local/domain/0/domid
xen-init-dom0
mkdir -p /run/xen /dev/pts /domain/dev
mount -t devpts devpts /dev/pts
xenconsoled
cp -a /lib64 /usr /domain/
mkdir /domain/bin
cp -a /bin/busybox /bin/xenstore* /domain/bin/
rm /domain/bin/xenstored
cat > /domain/init <<'END'
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
xenstore-watch data/ping | while read path; do xenstore-write data/pong "$(xenstore-read data/ping)"; done &
xenstore-write name mine 2>/dev/null || xenstore-write data/denied "$(xenstore-read name)"
xenstore-write data/hello "I am $(xenstore-read domid)"
sleep 1000
END
chmod 755 /domain/init
(cd /domain; find . | cpio -o -H newc | gzip -1 > /domain.gz)
cat > /domain.cfg <<END
name = "u"
type = "pv"
memory = 128
kernel = "/vmlinuz"
ramdisk = "/domain.gz"
extra = "console=hvc0 quiet rdinit=/init"
END
"#;

/// Commands in dom0, what they print and how they end.
const COMMANDS: &[(&str, &str, i32)] = &[
    // The kernel's own ring.
    ("kernel xenstore-write data/x 'a b'; xenstore-read /local/domain/0/data/x; kernel xenstore-list data", "a b\nx", 0),
    ("watch env XENSTORED_PATH=/dev/xen/xenbus xenstore-watch -n 2 /w; xenstore-write /w/x 1; wait $!; cat /events", "/w\n/w/x", 0),
    // Our clients, by the kernel: transactions, watches, what is too long.
    ("xenstore-rig > /rig; grep -v ^PASS /rig; grep -c ^PASS /rig", "9", 0),
    ("upgrade 1; kernel xenstore-read data/x", "a b", 0),
    // A domain.
    (
        "watch xenstore-watch -n 2 @introduceDomain; xl create -e -q /domain.cfg; wait $!; cat /events",
        "@introduceDomain\n@introduceDomain",
        0,
    ),
    ("key /local/domain/1/data/hello; key /local/domain/1/data/denied; xl list | grep -c '^u '", "I am 1\nu\n1", 0),
    ("xenstore-write /local/domain/1/data/ping one; becomes /local/domain/1/data/pong one", "", 0),
    ("upgrade 2; xenstore-write /local/domain/1/data/ping two; becomes /local/domain/1/data/pong two", "", 0),
    // Nobody waits for its end but the server, which the hypervisor tells.
    (
        "watch xenstore-watch -n 2 @releaseDomain; xl destroy u; wait $!; cat /events; gone /local/domain/1",
        "@releaseDomain\n@releaseDomain",
        0,
    ),
    ("grep -o 'a domain is gone.*' /log; xl list | grep -c '^u '; kernel xenstore-read data/x", "a domain is gone domain=1\n0\na b", 0),
];

#[test]
fn dom0_toolstack_and_a_domain_of_a_real_xen_are_served_and_survive_upgrades() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let start = directory.path().join("xenstored");
    std::fs::write(&start, START).expect("room for a script");
    let ours = program::build_static(&["-p", "xenstored", "--bin", "xenstored"]).join("debug/xenstored");
    let rig = program::build_static(&["-p", "hostctl", "--example", "xenstore"]).join("debug/examples/xenstore");
    let files = [("xenstored", &start), ("our-xenstored", &ours), ("xenstore-rig", &rig)];
    expect(&dom0(WITH_XL, &files.map(|(name, path)| (name, path.as_path())), PREPARE, COMMANDS), COMMANDS);
}
