//! Hyper-V's integration components as Debian's own kernel and hyperv-daemons use them: hv_utils, hv_kvp_daemon, hv_vss_daemon, unmodified.

// Helpers of tests are outside of what clippy takes for one.
#![allow(clippy::unwrap_used)]

#[path = "common/mod.rs"]
mod common;
#[allow(dead_code)]
#[path = "rig/initrd.rs"]
mod initrd;
#[path = "common/program.rs"]
mod program;
#[path = "common/shell.rs"]
mod shell;

use std::path::{Path, PathBuf};

use common::{copy_sparse, guest, run_host};
use shell::{Guest, Kind, PATIENCE};

/// All of Hyper-V's drivers that a machine of ours has something for.
const HYPERV: Kind = Kind {
    dialect: "hyperv",
    initrd: "initrd-hyperv-daemons.gz",
    modules: "hv_vmbus hv_utils scsi_common scsi_mod scsi_transport_fc sd_mod hv_storvsc hv_netvsc",
};

/// All of a machine's classes of devices and Linux' drivers for them, in order: time, snapshots, heartbeat, key/value pairs, disks, network, and first
/// of all shutdown.
const DEVICES: [(&str, &str); 7] = [
    ("0e0b6031-5213-4934-818b-38d90ced39db", "hv_utils"),
    ("35fa2e29-ea23-4236-96ae-3a6ebacba440", "hv_utils"),
    ("57164f39-9115-4e78-ab55-382f3bd5422d", "hv_utils"),
    ("9527e630-d0ae-497b-adce-e80ab0175caf", "hv_utils"),
    ("a9a0f4e7-5a45-4d96-b827-8a841e8c03e6", "hv_utils"),
    ("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f", "hv_storvsc"),
    ("f8615163-df3e-46c5-913f-f2d2f965ed0e", "hv_netvsc"),
];

/// What prints the keys and values of the daemon's pool with this number, in one line.
fn pool(number: u32) -> String {
    format!("cat /var/lib/hyperv/.kvp_pool_{number} 2>/dev/null | tr -s '\\0' ' '")
}

/// Waits until the daemon's pool holds `text`.
#[track_caller]
fn wait_for_pool(guest: &mut Guest, number: u32, text: &str) {
    guest.shell_until(&pool(number), |pool| pool.contains(text));
}

fn has_key(guest: &Guest, path: &str, value: &str) -> bool {
    guest.try_vmctl(&["kv", "get", path]).output == value
}

fn status_has(guest: &Guest, line: &str) -> bool {
    let status = guest.vmctl(&["status"]);
    status.lines().any(|there| there.split_whitespace().collect::<Vec<_>>().join(" ") == line)
}

/// An ext4 image in `directory` with the files of `content`.
fn image(directory: &Path, content: &Path) -> PathBuf {
    let image = directory.join("ext4.raw");
    std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let made = run_host("mkfs.ext4", &["-q", "-F", "-d", content.to_str().unwrap(), image.to_str().unwrap()]);
    assert_eq!(made.status, Some(0), "{made}");
    image
}

/// Waits until the bus has devices of these classes with these drivers, and no others: offers come, and some drivers take them, in their own time.
#[track_caller]
fn wait_for_devices(guest: &mut Guest, devices: &[(&str, &str)]) {
    let list = "for d in /sys/bus/vmbus/devices/*; do echo $(cat $d/class_id) $(basename \"$(readlink $d/driver)\"); done | sort";
    let wanted: Vec<String> = devices.iter().map(|(class, driver)| format!("{{{class}}} {driver}").trim_end().to_owned()).collect();
    guest.shell_until(list, |said| said == wanted.join("\n"));
}

#[test]
fn every_device_has_its_driver_and_the_heart_beats() {
    let work = tempfile::tempdir().unwrap();
    let disk = work.path().join("disk.raw");
    shell::write_pattern(&disk, 1 << 20);
    let mut guest = Guest::start(&HYPERV, &["--disk", &format!("{},bus=hyperv", disk.display()), "--nic", "user,bus=hyperv"]);
    wait_for_devices(&mut guest, &DEVICES);
    // A controller and a card have a channel for each processor.
    for driver in ["hv_storvsc", "hv_netvsc"] {
        let count = format!("ls -d /sys/bus/vmbus/drivers/{driver}/*/channels/* | wc -l");
        guest.shell_until(&count, |said| said == "2");
    }
    for processor in [1, 2] {
        assert!(
            guest
                .shell(&format!("echo 3 > /proc/sys/vm/drop_caches; taskset {processor} sha256sum /dev/sda"))
                .starts_with(&common::sum(&disk))
        );
    }
    guest.until("the heart beats", |guest| status_has(guest, "heartbeat ok"));
    let freeze = guest.try_vmctl(&["freeze"]);
    assert!(freeze.status == Some(1) && freeze.errors.contains("hv_vss_daemon"), "{freeze}");
}

#[test]
fn daemon_has_the_host_s_keys_and_the_store_has_the_guest_s() {
    let mut guest = Guest::start(&HYPERV, &["--kv", "hostname=web1", "--kv", "a.b=deep"]);
    // A record that somebody in the guest has written before the daemon runs.
    guest.shell("{ printf said.by-guest | dd bs=512 conv=sync; printf 'hello host' | dd bs=2048 conv=sync; } 2>/dev/null >/var/lib/hyperv/.kvp_pool_1");
    guest.shell("(/usr/sbin/hv_kvp_daemon -n &)");
    wait_for_pool(&mut guest, 0, "a.b deep hostname web1");
    wait_for_pool(&mut guest, 3, "VirtualMachineName machine");
    let host = run_host("uname", &["-n"]).output;
    assert!(guest.shell(&pool(3)).contains(&format!("HostName {}", host.trim())), "{host}");
    guest.until("the daemon tells what it runs on", |guest| has_key(guest, "data/hyperv/Auto/OSName", "Linux"));
    guest.until("the host sees the guest's key", |guest| has_key(guest, "data/hyperv/Guest/said/by-guest", "hello host"));

    guest.vmctl(&["kv", "set", "hostname", "web2"]);
    guest.vmctl(&["kv", "rm", "a.b"]);
    wait_for_pool(&mut guest, 0, "hostname web2");
    assert!(!guest.shell(&pool(0)).contains("deep"));
    guest.shell(": > /var/lib/hyperv/.kvp_pool_1");
    guest.until("the guest's key is gone", |guest| guest.try_vmctl(&["kv", "get", "data/hyperv/Guest/said/by-guest"]).status == Some(2));
}

/// What the guest's `hostctl` prints, and its status.
fn hostctl(guest: &mut Guest, arguments: &str) -> (String, i32) {
    let text = guest.shell(&format!("hostctl {arguments} 2>&1; echo \"status $?\"")).replace('\r', "");
    let (said, status) = text.rsplit_once("status ").unwrap_or_else(|| panic!("no status in «{text}»"));
    (said.trim_end().to_owned(), status.parse().unwrap_or_else(|_| panic!("status «{status}»")))
}

#[test]
fn hostctl_reads_and_writes_the_pools_and_tells_what_is_missing_before_the_daemon_runs() {
    let program = std::fs::read(program::build_static(program::HOSTCTL).join("small/hostctl")).unwrap();
    let mut guest =
        Guest::start_with(&HYPERV, &["--kv", "hostname=web1", "--kv", "a.b=deep"], |initrd| initrd.file("bin/hostctl", 0o755, &program));
    let done = |text: &str| (text.to_owned(), 0);
    let (detected, status) = hostctl(&mut guest, "detect");
    assert!(status == 0 && detected.contains("Hyper-V") && detected.contains("key/value pools"), "{detected}");

    // Without the daemon: the pool of the guest is a file, the host's keys have not come.
    assert_eq!(hostctl(&mut guest, "set Guest/early 'hello host'"), done(""));
    assert_eq!(hostctl(&mut guest, "get Guest/early"), done("hello host"));
    for missing in ["get External/hostname", "ls External/", "get Guest/Parameters/VirtualMachineName"] {
        let (said, status) = hostctl(&mut guest, missing);
        assert!(status == 3 && said.contains("hv_kvp_daemon") && said.contains("has not run here"), "{missing}: {status} {said}");
    }

    guest.shell("(/usr/sbin/hv_kvp_daemon -n &)");
    wait_for_pool(&mut guest, 0, "a.b deep hostname web1");
    wait_for_pool(&mut guest, 3, "VirtualMachineName machine");
    assert_eq!(hostctl(&mut guest, "External/hostname"), done("web1"));
    assert_eq!(hostctl(&mut guest, "get External/a.b"), done("deep"));
    assert_eq!(hostctl(&mut guest, "get Guest/Parameters/VirtualMachineName"), done("machine"));
    assert_eq!(hostctl(&mut guest, "ls"), done("External\nGuest\nAuto\nGuest/Parameters"));
    assert_eq!(hostctl(&mut guest, "ls External/"), done("a.b\nhostname"));
    assert_eq!(hostctl(&mut guest, "ls Guest/"), done("early"));
    let (parameters, _) = hostctl(&mut guest, "Guest/Parameters/");
    assert!(parameters.lines().any(|name| name == "VirtualMachineName"), "{parameters}");
    assert_eq!(hostctl(&mut guest, "get External/absent").1, 3);

    let (refusal, status) = hostctl(&mut guest, "set External/hostname other");
    assert!(status == 5 && refusal.contains("of which only Guest can be written"), "{status} {refusal}");
    // The daemon computes these when the host asks: the host has them, no file of the guest does.
    let (refusal, status) = hostctl(&mut guest, "get Auto/OSName");
    assert!(status == 1 && refusal.contains("hv_kvp_daemon computes it"), "{status} {refusal}");
    guest.until("the host has the Auto keys", |guest| has_key(guest, "data/hyperv/Auto/OSName", "Linux"));

    guest.until("the host sees the early key", |guest| has_key(guest, "data/hyperv/Guest/early", "hello host"));
    assert_eq!(hostctl(&mut guest, "Guest/late 'once more'"), done(""));
    assert_eq!(hostctl(&mut guest, "Guest/late"), done("once more"));
    guest.until("the host sees the late key", |guest| has_key(guest, "data/hyperv/Guest/late", "once more"));
    assert_eq!(hostctl(&mut guest, "rm Guest/late"), done(""));
    guest.until("the late key is gone", |guest| guest.try_vmctl(&["kv", "get", "data/hyperv/Guest/late"]).status == Some(2));
    guest.vmctl(&["kv", "set", "hostname", "web2"]);
    guest.shell_until("hostctl External/hostname", |said| said == "web2");
}

#[test]
fn file_systems_at_rest_do_not_change_until_they_go_on() {
    let work = tempfile::tempdir().unwrap();
    let empty = tempfile::tempdir().unwrap();
    let disk = image(work.path(), empty.path());
    let mut guest = Guest::start(&HYPERV, &["--disk", &format!("{},bus=hyperv", disk.display())]);
    guest.shell("await /dev/sda; mkdir /mnt; mount /dev/sda /mnt; echo before > /mnt/file");
    guest.shell("(/usr/sbin/hv_vss_daemon -n &)");
    guest.until("the daemon brings them to rest", |guest| guest.try_vmctl(&["freeze"]).status == Some(0));
    assert!(status_has(&guest, "file systems at rest"));
    guest.shell("((echo after > /mnt/file; echo done > /written) &); sleep 1");
    // A copy of the disk as it is: its file system is whole, without its journal's help.
    let copy = work.path().join("copy.raw");
    copy_sparse(&disk, &copy);
    let check = run_host("e2fsck", &["-fn", copy.to_str().unwrap()]);
    assert_eq!(check.status, Some(0), "{check}");
    assert_eq!(run_host("debugfs", &["-R", "cat /file", copy.to_str().unwrap()]).output, "before\n");
    assert_eq!(guest.shell("cat /written 2>/dev/null"), "");
    guest.vmctl(&["thaw"]);
    assert_eq!(guest.shell("until [ -e /written ]; do usleep 50000; done; cat /mnt/file"), "after");
    assert!(status_has(&guest, "file systems working"));
}

#[test]
fn guest_takes_the_host_s_time() {
    let mut guest = Guest::start(&HYPERV, &[]);
    guest.until("the heart beats", |guest| status_has(guest, "heartbeat ok"));
    guest.shell("date -s 2001-01-01");
    guest.vmctl(&["sync", "--via", "hyperv"]);
    let host = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let there: u64 = guest.shell("until [ $(date +%Y) != 2001 ]; do usleep 50000; done; date +%s").parse().unwrap();
    assert!(there.abs_diff(host) < 30, "{there} in the guest, {host} here");
}

/// Fails unless the guest reads its disk and gets an address.
#[track_caller]
fn disk_and_card_work(guest: &mut Guest, disk: &Path) {
    assert!(guest.shell("await /dev/sda; sha256sum /dev/sda").starts_with(&common::sum(disk)));
    guest.gets_address("");
}

/// Hyper-V's interface first and VMware's behind it: Linux takes the first, VMware's tools find their port.
#[test]
fn hyperv_s_drivers_and_daemons_and_vmware_s_tools_work_in_one_guest() {
    let kind = Kind { dialect: "hyperv+vmware", initrd: "initrd-hyperv-daemons.gz initrd-vmtools.gz", ..HYPERV };
    let work = tempfile::tempdir().unwrap();
    let disk = work.path().join("disk.raw");
    shell::write_pattern(&disk, 1 << 20);
    let options = ["--kv", "hostname=web1", "--disk", &format!("{},bus=hyperv", disk.display()), "--nic", "user,bus=hyperv"];
    let mut guest = Guest::start(&kind, &options);
    assert!(guest.shell("dmesg").contains("Hypervisor detected: Microsoft Hyper-V"));
    wait_for_devices(&mut guest, &DEVICES);
    disk_and_card_work(&mut guest, &disk);
    guest.shell("(/usr/sbin/hv_kvp_daemon -n &)");
    // One key of the host by both interfaces, and a key of the guest by each.
    wait_for_pool(&mut guest, 0, "hostname web1");
    assert_eq!(guest.shell("vmware-rpctool 'info-get guestinfo.hostname'"), "web1");
    guest.shell("vmware-rpctool 'info-set guestinfo.said by-rpctool'");
    assert!(has_key(&guest, "vm-data/said", "by-rpctool"));
    wait_for_pool(&mut guest, 0, "said by-rpctool");
    guest.until("the daemon tells what it runs on", |guest| has_key(guest, "data/hyperv/Auto/OSName", "Linux"));
    guest.vmctl(&["stop", "--via", "hyperv", "--wait", "60"]);
}

#[test]
fn guest_shuts_down_and_reboots_when_it_is_asked() {
    let work = tempfile::tempdir().unwrap();
    let disk = work.path().join("disk.raw");
    shell::write_pattern(&disk, 1 << 20);
    let mut guest = Guest::start(&HYPERV, &["--disk", &format!("{},bus=hyperv", disk.display()), "--nic", "user,bus=hyperv"]);
    guest.until("the drivers are there", |guest| status_has(guest, "heartbeat ok"));
    disk_and_card_work(&mut guest, &disk);
    // What the kernel calls for it.
    guest.shell("printf '#!/bin/busybox sh\\n/bin/busybox reboot -f\\n' > /sbin/reboot; chmod +x /sbin/reboot");
    guest.vmctl(&["stop", "--via", "hyperv", "--reboot", "--wait", "60"]);
    guest.machine.wait_for("READY", PATIENCE);
    guest.until("the drivers are there again", |guest| status_has(guest, "heartbeat ok"));
    wait_for_devices(&mut guest, &DEVICES);
    disk_and_card_work(&mut guest, &disk);
    guest.vmctl(&["stop", "--wait", "60"]);
    guest.machine.end(PATIENCE).expect(&["reboot: Power down"]);
}

/// Linux is told to speak no newer version of VMBus, as it would with older hosts. Its drivers go and come again: up to 3.0 they take a card's buffers
/// back while the channel is open.
#[test]
fn devices_work_with_every_version_of_vmbus_that_linux_speaks() {
    let work = tempfile::tempdir().unwrap();
    let disk = work.path().join("disk.raw");
    shell::write_pattern(&disk, 1 << 20);
    let kind = Kind { modules: "scsi_common scsi_mod scsi_transport_fc sd_mod", ..HYPERV };
    for (version, number) in [
        ("2.4", 0x2_0004),
        ("3.0", 0x3_0000),
        ("4.0", 0x4_0000),
        ("4.1", 0x4_0001),
        ("5.0", 0x5_0000),
        ("5.1", 0x5_0001),
        ("5.2", 0x5_0002),
    ] {
        let mut guest = Guest::start(&kind, &["--disk", &format!("{},bus=hyperv", disk.display()), "--nic", "user,bus=hyperv"]);
        let mut devices = DEVICES;
        if version == "2.4" {
            // Snapshots came with Windows 8.1 (`hv_vss_init`).
            devices[1].1 = "";
        }
        guest.shell(&format!("insmod /lib/modules/hv_vmbus.ko max_version={number}"));
        assert!(guest.shell("dmesg | grep 'Vmbus version'").ends_with(&format!("Vmbus version:{version}")));
        for _ in 0..3 {
            guest.shell("for m in hv_utils hv_storvsc hv_netvsc; do insmod /lib/modules/$m.ko; done");
            wait_for_devices(&mut guest, &devices);
            disk_and_card_work(&mut guest, &disk);
            guest.until("the heart beats", |guest| status_has(guest, "heartbeat ok"));
            assert_eq!(guest.shell("rmmod hv_netvsc hv_storvsc hv_utils 2>&1 | grep -v unregister"), "", "{version}");
        }
    }
}

#[test]
fn devices_work_in_the_next_kernel_after_kexec() {
    let content = tempfile::tempdir().unwrap();
    let work = tempfile::tempdir().unwrap();
    let mut guest = Guest::start(&HYPERV, &["--nic", "user,bus=hyperv"]);
    std::fs::copy(self::guest("vmlinuz"), content.path().join("vmlinuz")).unwrap();
    std::fs::copy(guest.path("initrd"), content.path().join("initrd")).unwrap();
    let disk = image(work.path(), content.path());
    guest.vmctl(&["disk", "add", &format!("{},bus=hyperv", disk.display())]);
    guest.shell("await /dev/sda; mkdir /mnt; mount -r /dev/sda /mnt");
    // A purgatory, which looks at all of it once more, and a whole boot.
    guest.machine.type_line("hyperv kexec /mnt/vmlinuz /mnt/initrd 'console=ttyS0 quiet panic=-1 next'");
    guest.machine.wait_for("READY", 5 * PATIENCE);
    assert!(guest.shell("cat /proc/cmdline").ends_with("next"), "the next kernel");
    let sum = guest.shell("await /dev/sda; mkdir /mnt; mount -r /dev/sda /mnt; sha256sum /mnt/vmlinuz");
    assert!(sum.starts_with(&common::sum(&self::guest("vmlinuz"))), "{sum}");
    guest.gets_address("");
    guest.until("the heart beats", |guest| status_has(guest, "heartbeat ok"));
    guest.vmctl(&["stop", "--via", "hyperv", "--wait", "60"]);
}
