//! Xen devices of a Debian kernel that come and go, hold what was flushed, and end a machine: what the toolstack and the backends do, unmodified
//! frontends in the guest.

// Helpers of tests are outside of what clippy takes for one.
#![allow(clippy::unwrap_used)]

#[path = "common/mod.rs"]
mod common;
#[allow(dead_code)]
#[path = "rig/initrd.rs"]
mod initrd;
#[path = "common/guest/pattern.rs"]
mod pattern;
#[path = "common/shell.rs"]
mod shell;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Run, run_host, sum};
use pattern::{BLOCK, block, place};
use shell::{Guest, Kind, PATIENCE, write_pattern};

/// Frontends.
const XEN: Kind = Kind { dialect: "xen", initrd: "initrd-xen.gz", modules: "xen-blkfront xen-netfront" };

#[test]
fn disk_comes_is_read_and_written_and_goes_while_the_machine_runs() {
    let mut guest = Guest::start(&XEN, &[]);
    write_pattern(&guest.path("first.raw"), 4 << 20);
    File::create(guest.path("second.raw")).unwrap().set_len(4 << 20).unwrap();
    // A name that says nothing of directories is the caller's, not the machine's.
    assert_eq!(guest.vmctl(&["disk", "add", "first.raw,bus=xen"]), "disk0");
    assert_eq!(guest.vmctl(&["disk", "add", "second.raw,bus=xen"]), "disk1");
    guest.shell("await /dev/xvda /dev/xvdb");
    guest.until("both are in use", |guest| guest.vmctl(&["disk", "ls"]).matches("in use").count() == 2);
    assert!(guest.shell("sha256sum /dev/xvda").starts_with(&sum(&guest.path("first.raw"))));
    guest.shell("dd if=/dev/xvda of=/dev/xvdb bs=64k conv=fsync");

    // Not every bus takes devices.
    let refused = guest.try_vmctl(&["disk", "add", "second.raw"]);
    assert!(refused.status == Some(1) && refused.errors.contains("bus=xen"), "{refused}");
    // The image is the machine's until the guest has let go.
    let refused = guest.try_vmctl(&["disk", "add", "second.raw,bus=xen"]);
    assert!(refused.status == Some(1) && refused.errors.contains("in use"), "{refused}");
    guest.vmctl(&["disk", "rm", "disk1"]);
    assert_eq!(sum(&guest.path("first.raw")), sum(&guest.path("second.raw")));
    assert_eq!(guest.shell("until [ ! -b /dev/xvdb ]; do usleep 50000; done; ls /sys/bus/xen/devices"), "vbd-51712");
    assert_eq!(guest.try_vmctl(&["disk", "rm", "disk1"]).status, Some(2));

    // It may come again, as a new device in the free place, and one that is used can be taken.
    assert_eq!(guest.vmctl(&["disk", "add", "second.raw,bus=xen,ro"]), "disk2");
    guest.shell("await /dev/xvdb; exec 3</dev/xvdb");
    guest.until("it is in use", |guest| guest.vmctl(&["disk", "ls"]).matches("in use").count() == 2);
    guest.vmctl(&["disk", "rm", "--force", "disk2"]);
    guest.shell("until [ ! -b /dev/xvdb ]; do usleep 50000; done");

    // What was added stays over a reboot.
    guest.vmctl(&["stop", "--reboot", "--via", "xen"]);
    guest.machine.wait_for("READY", PATIENCE);
    assert!(guest.shell("await /dev/xvda; sha256sum /dev/xvda").starts_with(&sum(&guest.path("first.raw"))));
    guest.vmctl(&["stop", "--via", "xen"]);
    guest.machine.end(PATIENCE).expect(&["reboot: Power down"]);
}

#[test]
fn network_card_comes_gets_an_address_and_goes_while_the_machine_runs() {
    let mut guest = Guest::start(&XEN, &[]);
    assert_eq!(guest.vmctl(&["nic", "add", "user,bus=xen,mac=52:54:00:00:00:07"]), "nic0");
    assert_eq!(guest.shell("await eth0; cat /sys/class/net/eth0/address"), "52:54:00:00:00:07");
    guest.gets_address("");
    guest.vmctl(&["nic", "rm", "nic0"]);
    assert_eq!(guest.shell("until [ ! -e /sys/class/net/eth0 ]; do usleep 50000; done; ls /sys/bus/xen/devices"), "");
    assert_eq!(guest.vmctl(&["nic", "ls"]), "");
}

/// Blocks of the disk in the tests of what is kept: more than a guest fills in their time.
const BLOCKS: u64 = 1 << 18;

/// A machine whose guest writes and flushes until it has said that block `enough` is flushed.
fn writing(image: &Path, enough: u64) -> Guest {
    let mut guest = Guest::start(&XEN, &["--disk", &format!("{},bus=xen", image.display())]);
    guest.machine.type_line(&format!("await /dev/xvda; traffic flush /dev/xvda {BLOCKS}"));
    guest.machine.wait_for(&format!("FLUSHED {enough}."), PATIENCE);
    guest
}

/// Fails unless the raw image has all blocks that the guest said are flushed.
#[track_caller]
fn expect_flushed(run: &Run, image: &Path, enough: u64) {
    let said = run.output.lines().filter_map(|line| line.trim().strip_prefix("FLUSHED ")?.strip_suffix('.')?.parse::<u64>().ok());
    let last = said.max().unwrap();
    assert!(last >= enough, "{run}");
    let image = File::open(image).unwrap();
    for n in 0..=last {
        let mut bytes = [0; BLOCK];
        image.read_exact_at(&mut bytes, place(n, BLOCKS) * BLOCK as u64).unwrap();
        assert!(bytes == block(n), "block {n} of {last} is lost");
    }
}

#[test]
fn what_was_flushed_is_in_the_image_when_the_monitor_is_killed() {
    let work = tempfile::tempdir().unwrap();
    let (image, raw) = (work.path().join("disk.qcow2"), work.path().join("disk.raw"));
    // Of all formats the one with the most that can be kept back: its tables.
    let created = run_host("qemu-img", &["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "1G"]);
    assert_eq!(created.status, Some(0), "{created}");
    let run = writing(&image, 1999).machine.kill();
    // Clusters that nobody refers to may be left (status 3), wrong ones may not.
    let check = run_host("qemu-img", &["check", "-q", image.to_str().unwrap()]);
    assert!(matches!(check.status, Some(0 | 3)), "{check}");
    let converted = run_host("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image.to_str().unwrap(), raw.to_str().unwrap()]);
    assert_eq!(converted.status, Some(0), "{converted}");
    expect_flushed(&run, &raw, 1999);
}

#[test]
fn what_was_flushed_is_in_the_image_when_the_plug_is_pulled() {
    let work = tempfile::tempdir().unwrap();
    let image = work.path().join("disk.raw");
    File::create(&image).unwrap().set_len(BLOCKS * BLOCK as u64).unwrap();
    let guest = writing(&image, 1999);
    guest.vmctl(&["stop", "--force"]);
    let run = guest.machine.end(PATIENCE);
    assert_eq!(run.status, Some(0), "{run}");
    expect_flushed(&run, &image, 1999);
}

#[test]
fn disk_has_what_was_written_after_heavy_writing() {
    const HEAVY: u64 = 48 << 20;
    let work = tempfile::tempdir().unwrap();
    let image = work.path().join("disk.raw");
    let blocks = HEAVY / BLOCK as u64;
    File::create(&image).unwrap().set_len(HEAVY).unwrap();
    let mut guest = Guest::start(&XEN, &["--disk", &format!("{},bus=xen", image.display())]);
    let written = guest.shell(&format!("await /dev/xvda; traffic fill /dev/xvda {blocks} 4; sha256sum /dev/xvda"));
    assert!(written.contains("FILLED"), "{written}");
    guest.vmctl(&["stop", "--force"]);
    guest.machine.end(PATIENCE);
    let bytes = std::fs::read(&image).unwrap();
    for (at, bytes) in (0..).zip(bytes.chunks(BLOCK)) {
        assert!(bytes == block(at + 3), "block {at}");
    }
    assert!(written.contains(&sum(&image)), "the guest reads what the host does: {written}");
}

#[test]
fn linux_keeps_its_grants_and_reads_and_writes_right_with_and_without() {
    let work = tempfile::tempdir().unwrap();
    let (source, target) = (work.path().join("source.raw"), work.path().join("target.raw"));
    write_pattern(&source, 16 << 20);
    // The module's own choice is 1.
    for (offer, option, says) in [("", 1, "disabled"), (",persistent-grants", 1, "enabled"), (",persistent-grants", 0, "disabled")] {
        let disks = [&source, &target].map(|image| format!("{},bus=xen{offer}", image.display()));
        let (option, says) = (format!("feature_persistent={option}"), format!("persistent grants: {says}"));
        std::fs::write(&target, vec![0; 16 << 20]).unwrap();
        let kind = Kind { modules: "", ..XEN };
        let mut guest = Guest::start(&kind, &["--disk", &disks[0], "--disk", &disks[1]]);
        guest.shell(&format!("insmod /lib/modules/xen-blkfront.ko {option}; await /dev/xvda /dev/xvdb"));
        let said = guest.shell("dmesg | grep 'blkfront: xvd'");
        assert_eq!(said.matches(&says).count(), 2, "{said}");
        // Past the page cache, in the largest requests, and twice, so that grants are used again.
        guest.shell("for n in 1 2; do dd if=/dev/xvda of=/dev/xvdb bs=1M iflag=direct oflag=direct; done 2>/dev/null");
        assert!(guest.shell("sha256sum /dev/xvdb").starts_with(&sum(&source)), "{offer} {option}");
        guest.vmctl(&["stop", "--via", "xen"]);
        guest.machine.end(PATIENCE);
        assert_eq!(sum(&target), sum(&source), "{option}");
    }
}

#[test]
fn guest_goes_on_after_a_suspend_that_is_refused() {
    let work = tempfile::tempdir().unwrap();
    let image = work.path().join("disk.raw");
    write_pattern(&image, 1 << 20);
    let mut guest = Guest::start(&XEN, &["--disk", &format!("{},bus=xen", image.display())]);
    guest.shell("await /dev/xvda");
    guest.vmctl(&["kv", "set", "control/shutdown", "suspend"]);
    guest.until("the request is taken back", |guest| guest.vmctl(&["kv", "get", "/local/domain/1/control/shutdown"]).is_empty());
    let why = guest.vmctl(&["kv", "get", "/local/domain/1/error/control/shutdown/error"]);
    assert!(why.contains("cannot save a machine"), "{why}");
    assert!(guest.shell("echo 3 > /proc/sys/vm/drop_caches; sha256sum /dev/xvda").starts_with(&sum(&image)), "its disk works");
}
