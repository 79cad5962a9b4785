//! The Xen dialect as Debian's own kernel sees it: its clock, event channels, blkfront and netfront, unmodified.

// Helpers of tests are outside of what clippy takes for one.
#![allow(clippy::unwrap_used)]

#[path = "common/mod.rs"]
mod common;
#[allow(dead_code)]
#[path = "rig/initrd.rs"]
mod initrd;
#[path = "guests/vmlinux.rs"]
mod vmlinux;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Machine, Rival, Run, Selftest, copy_sparse, debian, guest, initrd_with, pinned, run, run_host};

/// A boot to init on the software CPU takes seconds when built with optimisation and nothing else runs.
const PATIENCE: Duration = Duration::from_secs(300);
/// A whole Debian with systemd.
const SYSTEM_PATIENCE: Duration = Duration::from_secs(1200);

#[test]
fn linux_of_hvm_kind_takes_clock_events_and_console_from_xen() {
    let work = tempfile::tempdir().unwrap();
    let console = work.path().join("console");
    let target = format!("file:{}", console.display());
    let options = ["--dialect", "xen", "--cpus", "2", "--console", &target];
    let run = debian("initrd-busybox.gz", "console=hvc0 test=smp", &options, PATIENCE);
    run.expect(&["Hypervisor detected: Xen HVM", "Xen version 4.17", "clocksource: Switched to clocksource xen", "reboot: Power down"]);
    // What init prints goes to the last console of the command line.
    let written = std::fs::read_to_string(&console).unwrap();
    assert!(written.contains("INIT REACHED") && written.contains("processors 2"), "console: {written}\n{run}");
}

#[test]
fn time_that_a_rival_on_the_same_processor_takes_is_stolen_in_the_runstate() {
    let rival = Rival::on("0");
    let run = pinned("console=ttyS0 panic=-1 quiet test=clocks steal=10", &["--dialect", "xen"]);
    drop(rival);
    run.expect(&["CLOCKSOURCE xen", "STEAL "]);
    // Hundredths of a second of ten seconds; fair would be half of them.
    let stolen: u32 = run.value("STEAL ").parse().unwrap();
    assert!((200..=1000).contains(&stolen), "{stolen} hundredths of a second:\n{run}");
}

#[test]
fn linux_of_hvm_kind_runs_from_xvda_and_fetches_over_its_netfront() {
    let selftest = Selftest::new();
    let disk = format!("{},bus=xen", selftest.disk().display());
    let options = ["--dialect", "xen", "--cpus", "2", "--disk", &disk, "--nic", "user,bus=xen"];
    let run = debian("initrd-xen.gz", &selftest.cmdline("xenroot"), &options, SYSTEM_PATIENCE);
    run.expect(&["Xen HVM", "XEN vbd-51712 Connected", "XEN vif-0 Connected", "(xvda): mounted filesystem", "SELFTEST END", "Power down"]);
    selftest.check(&run);
}

#[test]
fn linux_without_callback_vectors_runs_from_xvda_by_the_platform_devices_line() {
    let selftest = Selftest::new();
    let disk = format!("{},bus=xen", selftest.disk().display());
    let options = ["--dialect", "xen", "--cpus", "2", "--disk", &disk, "--nic", "user,bus=xen"];
    let cmdline = format!("{} xen_no_vector_callback", selftest.cmdline("xenroot"));
    let run = debian("initrd-xen.gz", &cmdline, &options, SYSTEM_PATIENCE);
    run.expect(&["Xen HVM", "(xvda): mounted filesystem", "SELFTEST END", "Power down"]);
    selftest.check(&run);
}

/// Reads a disk, and tells by which interrupts.
const READER: &str = "busybox mount -t proc proc /proc
busybox mount -t devtmpfs dev /dev
busybox insmod /lib/modules/xen-blkfront.ko
/bin/await /dev/xvda
busybox sha256sum /dev/xvda
busybox grep -E 'xen-platform-pci|xenbus|blkif' /proc/interrupts
busybox poweroff -f";

#[test]
fn linux_takes_each_event_once_by_a_line_of_either_controller() {
    let work = tempfile::tempdir().unwrap();
    let image = work.path().join("disk.raw");
    std::fs::write(&image, (0..1u32 << 20).flat_map(u32::to_le_bytes).collect::<Vec<u8>>()).unwrap();
    let mut own = initrd::Initrd::default();
    own.script(READER);
    let initrd = initrd_with(work.path(), &["initrd-xen.gz"], &own.finish());
    for (option, controller) in [("", "IO-APIC"), ("noapic", "XT-PIC")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
        command.args(["run", "--dialect", "xen", "--cmdline"]).arg(format!("console=ttyS0 quiet panic=-1 xen_no_vector_callback {option}"));
        command.arg("--kernel").arg(guest("vmlinuz")).arg("--initrd").arg(&initrd);
        command.arg("--disk").arg(format!("{},bus=xen", image.display()));
        let run = run(command, PATIENCE);
        run.expect(&[&common::sum(&image), controller, "xen-platform-pci"]);
        let count = |name: &str| -> u64 {
            let line = run.output.lines().find(|line| line.trim_end().ends_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let (interrupts, events) = (count("xen-platform-pci"), count("xenbus") + count("blkif"));
        // One may tell of several.
        assert!((1..=events).contains(&interrupts), "{interrupts} interrupts for {events} events:\n{run}");
    }
}

#[test]
fn linux_of_pvh_kind_uses_its_devices_and_obeys_a_shutdown_by_the_host() {
    pvh_uses_its_devices_and_obeys("1");
}

#[test]
fn linux_of_pvh_kind_with_two_processors_uses_its_devices_and_obeys_a_shutdown_by_the_host() {
    pvh_uses_its_devices_and_obeys("2");
}

fn pvh_uses_its_devices_and_obeys(cpus: &str) {
    let work = tempfile::tempdir_in(guest("")).unwrap();
    let path = |name: &str| work.path().join(name);
    let (disk, socket, kernel) = (path("disk.raw"), path("control"), path("vmlinux"));
    copy_sparse(&guest("debian.raw"), &disk);
    std::fs::write(&kernel, vmlinux::unpack(&std::fs::read(guest("vmlinuz")).unwrap())).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    command.args([
        "run",
        "--dialect",
        "xen",
        "--cpus",
        cpus,
        "--nic",
        "user,bus=xen",
        "--cmdline",
        "console=ttyS0 test=xenroot cloud-init=disabled",
    ]);
    command.arg("--kernel").arg(&kernel).arg("--initrd").arg(guest("initrd-xen.gz"));
    command.arg("--disk").arg(format!("{},bus=xen", disk.display())).arg("--control").arg(&socket);
    let mut machine = Machine::start(command);

    machine.wait_for("Booting kernel on Xen PVH", PATIENCE);
    machine.wait_for(&format!("Brought up 1 node, {cpus} CPU"), PATIENCE);
    machine.wait_for("XEN vif-0 Connected", PATIENCE);
    machine.wait_for("guest login:", SYSTEM_PATIENCE);
    let stop = vmctl(&socket, &["stop", "--via", "xen"]);
    assert_eq!(stop.status, Some(0), "{stop}");
    machine.end(SYSTEM_PATIENCE).expect(&["reboot: Power down"]);
}

/// What the kernel that GRUB starts does: modules for both kinds of disks, and a look at which there are.
const FROM_DISK: &str = "export PATH=/bin
busybox mount -t proc proc /proc
busybox --install -s /bin
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for m in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk xen-blkfront; do insmod /lib/modules/$m.ko; done
await /dev/xvda1
mkdir -p /mnt
mount -t ext2 /dev/xvda1 /mnt
cat /mnt/greeting
echo \"DISKS $(ls /sys/block | grep -v loop)\"";

#[test]
fn disk_image_for_xen_boots_by_firmware_and_its_own_grub() {
    /// Where the partition is, in sectors, and its size.
    const PARTITION: (u32, u32) = (2048, 128 << 11);
    let work = tempfile::tempdir().unwrap();
    let path = |name: &str| work.path().join(name);
    let (files, partition, disk) = (path("files"), path("partition"), path("disk.raw"));
    std::fs::create_dir_all(files.join("grub")).unwrap();
    let mut own = initrd::Initrd::default();
    own.script(FROM_DISK);
    std::fs::rename(initrd_with(work.path(), &["initrd-root.gz", "initrd-xen.gz"], &own.finish()), files.join("initrd")).unwrap();
    std::fs::copy(guest("vmlinuz"), files.join("vmlinuz")).unwrap();
    std::fs::write(files.join("greeting"), "greetings from the disk\n").unwrap();
    std::fs::write(
        files.join("grub/grub.cfg"),
        "set timeout=0\nmenuentry guest {\nlinux /vmlinuz console=ttyS0 quiet panic=-1\ninitrd /initrd\n}\n",
    )
    .unwrap();
    std::fs::File::create(&partition).unwrap().set_len(u64::from(PARTITION.1) * 512).unwrap();
    let made = run_host("mkfs.ext2", &["-q", "-F", "-d", files.to_str().unwrap(), partition.to_str().unwrap()]);
    assert_eq!(made.status, Some(0), "{made}");
    let mut sector = std::fs::read(guest("grub-boot.img")).unwrap();
    // The table: one active partition of Linux' kind, where the image has code for floppy disks.
    sector[440..510].fill(0);
    (sector[446], sector[450]) = (0x80, 0x83);
    sector[454..458].copy_from_slice(&PARTITION.0.to_le_bytes());
    sector[458..462].copy_from_slice(&PARTITION.1.to_le_bytes());
    sector.extend(std::fs::read(guest("grub-core.img")).unwrap());
    sector.resize(PARTITION.0 as usize * 512, 0);
    std::fs::write(&disk, [sector, std::fs::read(&partition).unwrap()].concat()).unwrap();

    let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    command.args(["run", "--dialect", "xen", "--cpus", "2", "--disk", &format!("{},bus=xen", disk.display())]);
    let run = run(command, PATIENCE);
    run.expect(&["SeaBIOS", "greetings from the disk", "reboot: Power down"]);
    assert_eq!(run.value("DISKS"), "xvda", "the disk that the BIOS had is unplugged: {run}");
}

/// Debian's XenStore clients in the guest, through Linux' `/dev/xen/xenbus`.
const CLIENTS: &str = "/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
export PATH=/bin
xenstore-exists vm-data/booted || { xenstore-write vm-data/booted once; busybox reboot -f; }
echo \"READ $(xenstore-read vm-data/hostname)\"
xenstore-write vm-data/said 'of the guest' data/reported 1
(xenstore-watch -n 2 vm-data/asked | while read path; do echo \"HEARD $path\"; done; echo \"ASKED $(xenstore-read vm-data/asked)\"
 xenstore-write vm-data/answer 42
 until xenstore-exists vm-data/leave; do busybox usleep 50000; done; xenstore-ls vm-data)";

#[test]
fn keys_of_the_host_are_xenstores_in_the_guest_and_the_other_way_round() {
    let work = tempfile::tempdir().unwrap();
    let path = |name: &str| work.path().join(name);
    let (socket, store_socket, out) = (path("control"), path("xenstored"), path("store.json"));
    let mut own = initrd::Initrd::default();
    own.script(CLIENTS);
    let image = initrd_with(work.path(), &["initrd-dom0.gz"], &own.finish());
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    command.args(["run", "--dialect", "xen", "--cmdline", "console=ttyS0 quiet panic=-1", "--kv", "hostname=web1"]);
    command.arg("--kernel").arg(guest("vmlinuz")).arg("--initrd").arg(&image);
    command.arg("--control").arg(&socket).arg("--xenstore").arg(&store_socket).arg("--kv-out").arg(&out);
    let mut machine = Machine::start(command);

    // The second boot finds what the first wrote.
    machine.wait_for("READ web1", PATIENCE);
    // The watch's first event is that it has begun.
    machine.wait_for("HEARD vm-data/asked", PATIENCE);
    assert_eq!(vmctl(&socket, &["kv", "get", "said"]).output, "of the guest");
    assert_eq!(vmctl(&socket, &["kv", "get", "/local/domain/1/data/reported"]).output, "1");
    let mut client = Command::new("xenstore-write");
    client.args(["-s", "/local/domain/1/vm-data/asked", "what is it?"]).env("XENSTORED_PATH", &store_socket);
    assert_eq!(run(client, PATIENCE).status, Some(0));
    machine.wait_for("HEARD vm-data/asked", PATIENCE);
    machine.wait_for("ASKED what is it?", PATIENCE);
    let until = Instant::now() + PATIENCE;
    while vmctl(&socket, &["kv", "get", "answer"]).output != "42" && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(vmctl(&socket, &["kv", "ls", "/"]).output.contains("vm"), "the toolstack's nodes are there too");
    assert_eq!(vmctl(&socket, &["kv", "set", "leave", "now"]).status, Some(0));
    let run = machine.end(PATIENCE);
    run.expect(&["answer = \"42\"", "hostname = \"web1\"", "said = \"of the guest\""]);
    let store: serde_json::Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
    assert_eq!((&store["vm-data/answer"], &store["name"]), (&"42".into(), &"machine".into()), "{store}");
}

fn vmctl(socket: &Path, arguments: &[&str]) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    command.args(arguments).arg("--control").arg(socket);
    run(command, PATIENCE)
}
