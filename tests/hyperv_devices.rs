//! Hyper-V's disks and network cards as Debian's own kernel sees them: hv_storvsc and hv_netvsc, unmodified.

// Helpers of tests are outside of what clippy takes for one.
#![allow(clippy::unwrap_used)]

#[path = "common/mod.rs"]
mod common;
#[allow(dead_code)]
#[path = "rig/initrd.rs"]
mod initrd;
#[path = "common/shell.rs"]
mod shell;
#[path = "common/tap.rs"]
mod tap;

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::Duration;

use common::{Selftest, debian, run_host, sum};
use shell::{Guest, Kind, PATIENCE, write_pattern};
use tap::Tap;

/// A whole Debian with systemd.
const SYSTEM_PATIENCE: Duration = Duration::from_secs(1200);

/// Hyper-V's drivers of disks, DVDs and cards.
const HYPERV: Kind = Kind {
    dialect: "hyperv",
    initrd: "initrd-hyperv.gz",
    modules: "hv_vmbus scsi_common scsi_mod scsi_transport_fc sd_mod cdrom sr_mod hv_storvsc hv_netvsc",
};

fn system_runs_and_fetches(cpus: &str) {
    let selftest = Selftest::new();
    let disk = format!("{},bus=hyperv", selftest.disk().display());
    let options = ["--dialect", "hyperv", "--cpus", cpus, "--disk", &disk, "--nic", "user,bus=hyperv"];
    let run = debian("initrd-hyperv.gz", &selftest.cmdline("hypervroot"), &options, SYSTEM_PATIENCE);
    run.expect(&[
        "Hypervisor detected: Microsoft Hyper-V",
        "hv_vmbus: Vmbus version:5.3",
        "Msft     Virtual Disk",
        "{ba6163d9-04a1-4d29-b605-72e2ffb1dc7f}",
        "{f8615163-df3e-46c5-913f-f2d2f965ed0e}",
        "(sda): mounted filesystem",
        "SELFTEST END",
        "Power down",
    ]);
    selftest.check(&run);
}

#[test]
fn linux_runs_from_storvsc_and_fetches_over_netvsc() {
    system_runs_and_fetches("1");
}

#[test]
fn linux_with_two_processors_runs_from_storvsc_and_fetches_over_netvsc() {
    system_runs_and_fetches("2");
}

#[test]
fn disk_comes_is_read_and_written_and_goes_while_the_machine_runs() {
    let mut guest = Guest::start(&HYPERV, &[]);
    write_pattern(&guest.path("first.raw"), 4 << 20);
    File::create(guest.path("second.raw")).unwrap().set_len(4 << 20).unwrap();
    // The first brings the controller, the second is a unit of it.
    assert_eq!(guest.vmctl(&["disk", "add", "first.raw,bus=hyperv"]), "disk0");
    guest.shell("await /dev/sda");
    assert_eq!(guest.vmctl(&["disk", "add", "second.raw,bus=hyperv"]), "disk1");
    guest.shell("await /dev/sdb");
    guest.until("both are in use", |guest| guest.vmctl(&["disk", "ls"]).matches("in use").count() == 2);
    assert!(guest.shell("sha256sum /dev/sda").starts_with(&sum(&guest.path("first.raw"))));
    guest.shell("dd if=/dev/sda of=/dev/sdb bs=64k conv=fsync");
    assert_eq!(sum(&guest.path("first.raw")), sum(&guest.path("second.raw")));

    guest.vmctl(&["disk", "rm", "disk1"]);
    guest.shell("until [ ! -b /dev/sdb ]; do usleep 50000; done");
    assert_eq!(guest.try_vmctl(&["disk", "rm", "disk1"]).status, Some(2));
    assert_eq!(guest.vmctl(&["disk", "add", "second.raw,bus=hyperv,ro"]), "disk2");
    assert_eq!(guest.shell("await /dev/sdb; cat /sys/block/sdb/ro"), "1");

    // What was added stays over a reboot.
    guest.machine.type_line("reboot -f");
    guest.machine.wait_for("READY", PATIENCE);
    assert!(guest.shell("await /dev/sdb; sha256sum /dev/sda").starts_with(&sum(&guest.path("first.raw"))));
    guest.machine.type_line("poweroff -f");
    guest.machine.end(PATIENCE).expect(&["reboot: Power down"]);
}

#[test]
fn blocks_that_the_guest_gives_back_are_holes_in_the_image() {
    let work = tempfile::tempdir().unwrap();
    let image = work.path().join("disk.raw");
    write_pattern(&image, 16 << 20);
    let mut guest = Guest::start(&HYPERV, &["--disk", &format!("{},bus=hyperv", image.display())]);
    let limits = guest.shell("await /dev/sda; cat /sys/block/sda/queue/discard_max_bytes");
    assert_eq!(limits, (1u64 << 30).to_string());
    guest.shell("blkdiscard -o 4194304 -l 8388608 /dev/sda");
    let used = run_host("du", &["-k", image.to_str().unwrap()]).output;
    let used: u64 = used.split_whitespace().next().unwrap().parse().unwrap();
    assert!((8 << 10..9 << 10).contains(&used), "{used} KiB");
    guest.machine.type_line("poweroff -f");
    guest.machine.end(PATIENCE).expect(&["reboot: Power down"]);
}

#[test]
fn dvd_is_a_drive_with_something_in_it() {
    let work = tempfile::tempdir().unwrap();
    let image = work.path().join("dvd.iso");
    write_pattern(&image, 1 << 20);
    let mut guest = Guest::start(&HYPERV, &["--disk", &format!("{},bus=hyperv,dvd", image.display())]);
    assert!(guest.shell("await /dev/sr0; sha256sum /dev/sr0").starts_with(&sum(&image)));
    assert_ne!(guest.shell("dd if=/dev/zero of=/dev/sr0 count=1 2>/dev/null && echo written; cat /sys/block/sr0/ro"), "written");
    guest.machine.type_line("poweroff -f");
    guest.machine.end(PATIENCE).expect(&["reboot: Power down"]);
}

#[test]
fn network_card_comes_gets_an_address_and_goes_while_the_machine_runs() {
    let mut guest = Guest::start(&HYPERV, &[]);
    assert_eq!(guest.vmctl(&["nic", "add", "user,bus=hyperv,mac=52:54:00:00:00:07"]), "nic0");
    assert_eq!(guest.shell("await eth0; cat /sys/class/net/eth0/address"), "52:54:00:00:00:07");
    guest.gets_address("");
    // A longer MTU is a new beginning, with larger parts of the receive buffer.
    guest.gets_address("mtu 9000");
    assert_eq!(guest.shell("cat /sys/class/net/eth0/mtu"), "9000");
    // The driver asks for another address by a parameter of the card.
    guest.shell("ifconfig eth0 down");
    guest.gets_address("hw ether 02:00:00:00:00:08");
    assert_eq!(guest.shell("cat /sys/class/net/eth0/address"), "02:00:00:00:00:08");
    guest.vmctl(&["nic", "rm", "nic0"]);
    guest.shell("until [ ! -e /sys/class/net/eth0 ]; do usleep 50000; done");
    assert_eq!(guest.vmctl(&["nic", "ls"]), "");
}

/// What udhcpc calls when there is a lease.
const LEASE: &str = r#"printf '#!/bin/busybox sh\n[ $1 = bound ] || exit 0\nifconfig $interface $ip netmask $subnet\nroute add default gw $router\necho $router > /gateway\n' > /bin/lease; chmod +x /bin/lease"#;

#[test]
fn offloads_and_channels_are_there_and_traffic_flows_with_and_without() {
    let kind = Kind { initrd: "initrd-hyperv-daemons.gz", ..HYPERV };
    let mut guest = Guest::start(&kind, &["--nic", "user,bus=hyperv"]);
    let features = guest.shell("await eth0; ethtool -k eth0");
    for feature in [
        "rx-checksumming: on",
        "tx-checksum-ipv4: on",
        "tx-checksum-ipv6: on",
        "scatter-gather: on",
        "tcp-segmentation-offload: on",
        "tx-tcp-segmentation: on",
        "tx-tcp6-segmentation: on",
        "large-receive-offload: on",
        "rx-vlan-offload: on",
        "tx-vlan-offload: on",
    ] {
        assert!(features.contains(feature), "{feature}: {features}");
    }
    // As many as processors, at most and in use.
    guest.shell_until("ethtool -l eth0 | sed -n 's/^Combined:[^0-9]*//p' | tr '\\n' ' '", |said| said == "2 2");

    let port = serve_traffic("127.0.0.1");
    guest.shell(LEASE);
    guest.shell("ifconfig eth0 up; udhcpc -i eth0 -n -q -t 20 -s /bin/lease");
    // Segments with a checksum that is not right would be lost, and nothing come to an end.
    for settings in ["tx on rx on", "tso off", "tx off rx off"] {
        guest.shell(&format!("ethtool -K eth0 {settings}"));
        for way in ["receive", "send"] {
            let said = guest.shell(&format!("traffic {way} $(cat /gateway) {port} 4"));
            assert!(said.contains("MICROSECONDS"), "{settings}, {way}: {said}");
        }
    }

    // Both channels are sent on, and packets come on that which the guest's table names.
    let table = guest.shell("ethtool -x eth0");
    assert!(table.contains("with 2 RX ring(s)"), "{table}");
    for queue in [1, 0] {
        let weights = if queue == 1 { "0 1" } else { "1 0" };
        let packets = |guest: &mut Guest| -> [u64; 2] {
            [0, 1].map(|queue| guest.shell(&format!("ethtool -S eth0 | sed -n 's/ *rx_queue_{queue}_packets: //p'")).parse().unwrap())
        };
        guest.shell(&format!("ethtool -X eth0 weight {weights}"));
        let before = packets(&mut guest);
        guest.shell(&format!("traffic receive $(cat /gateway) {port} 4"));
        let after = packets(&mut guest);
        let came = [after[0] - before[0], after[1] - before[1]];
        // 4 MiB are 64 packets at least, as several come as one.
        assert!(came[queue] > 50 && came[1 - queue] < 10, "weights {weights}: {came:?}");
    }
    assert_eq!(guest.shell("for n in 1 2 3 4 5 6 7 8; do traffic send $(cat /gateway) PORT 1 > /dev/null; done; ethtool -S eth0 | grep -c 'tx_queue_[01]_packets: [1-9]'".replace("PORT", &port.to_string()).as_str()), "2");
}

/// What the host's end of the network counts: with segmentation left to the host, and with segments taken whole, packets are longer than any frame.
#[test]
fn segments_are_cut_and_put_together_by_the_host_s_network() {
    let Some(tap) = Tap::new(&format!("pvbushv{}", std::process::id() % 10_000_000), "198.51.100.5/30") else {
        eprintln!("SKIPPED: a network between host and guest takes root, and /dev/net/tun");
        return;
    };
    let kind = Kind { initrd: "initrd-hyperv-daemons.gz", ..HYPERV };
    let mut guest = Guest::start(&kind, &["--nic", &format!("tap:{},bus=hyperv", tap.0)]);
    guest.shell("await eth0; ifconfig eth0 198.51.100.6 netmask 255.255.255.252 up");
    let port = serve_traffic("198.51.100.5");
    let count = |what: &str| -> u64 {
        std::fs::read_to_string(format!("/sys/class/net/{}/statistics/{what}", tap.0)).unwrap().trim().parse().unwrap()
    };
    // What the host receives the guest has sent.
    for (settings, way, end, is_long) in [
        ("tso on", "send", "rx", true),
        ("tso off gso off", "send", "rx", false),
        ("lro on", "receive", "tx", true),
        ("lro off", "receive", "tx", false),
    ] {
        guest.shell(&format!("ethtool -K eth0 {settings}"));
        let (bytes, packets) = (format!("{end}_bytes"), format!("{end}_packets"));
        let before = (count(&bytes), count(&packets));
        let said = guest.shell(&format!("traffic {way} 198.51.100.5 {port} 16"));
        assert!(said.contains("MICROSECONDS"), "{settings}: {said}");
        let mean = (count(&bytes) - before.0) / (count(&packets) - before.1);
        assert_eq!(mean > 1514, is_long, "{settings}: {mean} bytes in a packet");
        assert!(mean > 1000, "{settings}: {mean} bytes in a packet");
    }
}

/// The host's side of the guest's program `traffic`: sends without end when asked to, and takes everything.
fn serve_traffic(address: &str) -> u16 {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let (mut wish, mut piece) = ([0], vec![0x5a; 64 << 10]);
            stream.read_exact(&mut wish).unwrap();
            // Until the guest has enough.
            while if wish == *b"r" { stream.write_all(&piece).is_ok() } else { stream.read(&mut piece).is_ok_and(|count| count > 0) } {}
        }
    });
    port
}
