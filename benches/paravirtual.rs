//! Disks and network cards of every dialect beside virtio's in the same Linux guest, and virtio's beside those of QEMU's TCG.
//!
//! ```text
//! tests/common/guest/make target/guest && cargo bench --bench paravirtual [-- ROUNDS]
//! ```
//!
//! A machine for each dialect has two disks of equal content and two cards, one of each kind; `tests/common/guest/traffic.rs` uses them in turn, round
//! after round, so that all have the same load of the host. Times are the guest's own. What is shown is the median time for one piece, and the median
//! of the rounds' ratios: the dialect's to virtio's, which is to be at most 1.5, and virtio's to QEMU's, at most 1. Images are in the host's page
//! cache, so that nothing but guest and monitor is measured. The embedded guest, with the drivers of `pvbus`, does the same in the same machine with
//! the same disk (`traffic` at its prompt).

#![allow(clippy::unwrap_used)]

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/guests/mod.rs"]
mod guests;
#[allow(dead_code)]
#[path = "../tests/rig/initrd.rs"]
mod initrd;
mod measure;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{guest, guest_program, initrd_with, run};
use guests::session::Session;
use initrd::Initrd;
use measure::{load, median};

/// By what a guest has a disk and a card.
struct Bus {
    name: &'static str,
    /// `--dialect` and the devices' option.
    dialect: &'static str,
    option: &'static str,
    disk: &'static str,
    /// The card's driver, as sysfs has it.
    driver: &'static str,
    /// The disk's driver in the embedded guest, and the disk there.
    own: Option<(&'static str, &'static str)>,
}

const VIRTIO: Bus = Bus { name: "virtio", dialect: "", option: "", disk: "/dev/vda", driver: "virtio_net", own: None };
/// Those that are compared with it.
const DIALECTS: [Bus; 2] = [
    Bus { name: "xen", dialect: "xen", option: ",bus=xen", disk: "/dev/xvda", driver: "vif", own: Some(("xbf", "xbf0")) },
    Bus { name: "hyperv", dialect: "hyperv", option: ",bus=hyperv", disk: "/dev/sda", driver: "hv_netvsc", own: Some(("hvs", "sd0")) },
];
/// In the order of their needs; a guest has those of its RAM disk.
const MODULES: &str = "virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk failover net_failover virtio_net \
                       xen-blkfront xen-netfront hv_vmbus scsi_common scsi_mod scsi_transport_fc sd_mod hv_storvsc hv_netvsc";

/// What is measured: a name, and the arguments of `traffic`.
const DISK: [(&str, &str); 5] = [
    ("read 4 KiB at random", "random DISK read 1000"),
    ("write 4 KiB at random", "random DISK write 1000"),
    ("read 1 MiB in order", "sequential DISK read 100"),
    ("write 1 MiB in order", "sequential DISK write 100"),
    ("read 1 MiB by the cache", "cached DISK read 100"),
];
const NETWORK: [(&str, &str); 3] =
    [("receive 1 MiB by TCP", "receive HOST 24"), ("send 1 MiB by TCP", "send HOST 24"), ("ask and be answered", "answer HOST 500")];

const IMAGE: usize = 128 << 20;
const ROUNDS: usize = 9;
/// Boots of each side beside QEMU.
const TURNS: usize = 3;
/// A run that is not done by then is broken.
const PATIENCE: Duration = Duration::from_secs(1800);

/// Microseconds of each round, by what was measured and the bus.
type Results = BTreeMap<(String, String), Vec<f64>>;

fn main() {
    let rounds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(ROUNDS);
    let work = tempfile::tempdir().unwrap();
    let port = serve();
    let disk = |name: &str| {
        let path = work.path().join(name);
        // No zeroes, which some layer may know.
        std::fs::write(&path, (0..IMAGE as u32 / 4).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect::<Vec<u8>>())
            .unwrap();
        path
    };
    let (first, second) = (disk("first.raw"), disk("second.raw"));

    for bus in DIALECTS {
        let image = archive(work.path(), &[&VIRTIO, &bus], rounds, port);
        let with_devices = |mut vmctl: Command| {
            vmctl.args(["--dialect", bus.dialect, "--nic", "user", "--nic", &format!("user{}", bus.option)]);
            vmctl.arg("--disk").arg(&first).arg("--disk").arg(format!("{}{}", second.display(), bus.option));
            vmctl
        };
        let linux = results(with_devices(vmctl(&image)));
        report(&linux, bus.name, &linux, VIRTIO.name);
        if let Some((driver, disk)) = bus.own {
            let mut vmctl = Command::new(env!("CARGO_BIN_EXE_vmctl"));
            vmctl.args(["run", "--backend", "soft", "--cmdline", "prompt", "--kernel"]);
            vmctl.arg(guests::write(work.path(), "embedded", embedded::GUEST));
            report(&embedded(with_devices(vmctl), driver, disk, rounds), driver, &linux, VIRTIO.name);
        }
    }

    // In turns, as the host's load changes.
    let image = archive(work.path(), &[&VIRTIO], rounds.div_ceil(TURNS), port);
    let (mut ours, mut theirs) = (Results::new(), Results::new());
    for _ in 0..TURNS {
        let mut vmctl = vmctl(&image);
        vmctl.args(["--nic", "user", "--disk"]).arg(&first);
        add(&mut ours, results(vmctl));
        add(&mut theirs, results(qemu(&image, &first, &Passt::start())));
    }
    report(&ours, VIRTIO.name, &theirs, "qemu");
}

fn add(all: &mut Results, more: Results) {
    for (what, rounds) in more {
        all.entry(what).or_default().extend(rounds);
    }
}

fn vmctl(initrd: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    command.args(["run", "--backend", "soft", "--no-reboot", "--cmdline", "console=ttyS0 quiet panic=-1"]);
    command.arg("--kernel").arg(guest("vmlinuz")).arg("--initrd").arg(initrd);
    command
}

fn qemu(initrd: &Path, disk: &Path, network: &Passt) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", "pc", "-accel", "tcg", "-cpu", "max", "-m", "512", "-smp", "1", "-nographic", "-no-reboot"]);
    command.arg("-drive").arg(format!("file={},if=virtio,format=raw", disk.display()));
    command.arg("-netdev").arg(format!("stream,id=net,addr.type=fd,addr.str={}", network.socket.as_raw_fd()));
    command.args(["-device", "virtio-net-pci,netdev=net", "-append", "console=ttyS0 quiet panic=-1"]);
    command.arg("-kernel").arg(guest("vmlinuz")).arg("-initrd").arg(initrd);
    command
}

/// The network that `vmctl` has by `--nic user`, for QEMU.
struct Passt {
    process: Child,
    /// The other end of its socket, which a child inherits.
    socket: UnixStream,
}

impl Passt {
    fn start() -> Passt {
        let (ours, theirs) = UnixStream::pair().unwrap();
        rustix::io::fcntl_setfd(&ours, rustix::io::FdFlags::empty()).unwrap();
        let mut command = Command::new("passt");
        command.args(["--foreground", "--quiet", "--fd", "0"]).stdin(OwnedFd::from(theirs)).stderr(Stdio::null());
        Passt { process: command.spawn().expect("passt"), socket: ours }
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An initial RAM disk whose guest measures the devices of `buses`.
fn archive(directory: &Path, buses: &[&Bus], rounds: usize, port: u16) -> PathBuf {
    let mut script = format!(
        "export PATH=/bin
busybox mount -t proc proc /proc
busybox --install -s /bin
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for m in {MODULES}; do [ -f /lib/modules/$m.ko ] && insmod /lib/modules/$m.ko; done
up() {{ for i in /sys/class/net/*; do case $(readlink $i/device/driver) in */$1) card=${{i##*/}};; esac; done
ifconfig $card up; udhcpc -i $card -n -q -s /bin/dhcp >/dev/null 2>&1; }}
tell() {{ echo \"RESULT $1,$2,$(traffic $3)\"; }}
"
    );
    for bus in buses {
        script.push_str(&format!("await {}\n", bus.disk));
    }
    let mut round = String::new();
    for (name, arguments) in DISK {
        for bus in buses {
            round.push_str(&format!("tell '{name}' {} '{}'\n", bus.name, arguments.replace("DISK", bus.disk)));
        }
    }
    for bus in buses {
        round.push_str(&format!("up {}\n", bus.driver));
        for (name, arguments) in NETWORK {
            let arguments = arguments.replace("HOST", &format!("$(cat /gateway) {port}"));
            round.push_str(&format!("tell '{name}' {} \"{arguments}\"\n", bus.name));
        }
        round.push_str("ifconfig $card 0.0.0.0 down\n");
    }
    script.push_str(&round.repeat(rounds));
    let mut own = Initrd::default();
    own.file("bin/traffic", 0o755, &guest_program("traffic"));
    let dhcp = "#!/bin/busybox sh\n[ \"$1\" = bound ] || exit 0\nifconfig $interface $ip netmask $subnet\nroute add default gw ${router%% *}\n\
                echo ${router%% *} > /gateway\n";
    own.file("bin/dhcp", 0o755, dhcp.as_bytes());
    own.script(&script);
    initrd_with(directory, &["initrd-root.gz", "initrd-xen.gz", "initrd-hyperv.gz"], &own.finish())
}

/// Boots the machine to its end; what its guest has measured.
fn results(machine: Command) -> Results {
    let run = run(machine, PATIENCE);
    let mut results = Results::new();
    for line in run.output.lines().filter_map(|line| line.split_once("RESULT ")) {
        let words: Vec<&str> = line.1.split(',').collect();
        if let [name, bus, said] = words[..] {
            let microseconds = said.trim().strip_prefix("MICROSECONDS ").and_then(|text| text.parse().ok());
            let microseconds = microseconds.unwrap_or_else(|| panic!("{name} on {bus} was not measured:\n{run}"));
            results.entry((name.into(), bus.into())).or_default().push(microseconds);
        }
    }
    assert!(!results.is_empty(), "nothing was measured:\n{run}");
    results
}

/// Boots the embedded guest and has it use its disk; what it says that it took.
fn embedded(machine: Command, driver: &str, disk: &str, rounds: usize) -> Results {
    const PROMPT: &str = "pvbus# ";
    let mut guest = Session::start(machine);
    guest.wait_for(PROMPT);
    let mut answer = |command: &str| {
        guest.type_in(&format!("{command}\r"));
        guest.wait_for("\r\n");
        guest.wait_for(PROMPT)
    };
    // The disk is there when its backend is.
    while !answer("disk").contains(disk) {}
    let mut results = Results::new();
    for _ in 0..rounds {
        for (name, arguments) in DISK.iter().filter(|(_, arguments)| !arguments.starts_with("cached")) {
            let said = answer(&format!("traffic {}", arguments.replace("DISK", disk)));
            let microseconds = said.split_once(" bytes in ").and_then(|(_, rest)| rest.split_once(" us")?.0.parse().ok());
            let microseconds = microseconds.unwrap_or_else(|| panic!("{name} on {disk} was not measured: {said}"));
            results.entry(((*name).into(), driver.into())).or_default().push(microseconds);
        }
    }
    results
}

/// Prints both sides, and the ratios of rounds that belong together.
fn report(ours: &Results, our_name: &str, theirs: &Results, their_name: &str) {
    println!("\n{:<24}{our_name:>12}{their_name:>12}{:>10}    load {}", "microseconds", "ratio", load());
    for (name, _) in DISK.iter().chain(&NETWORK) {
        // QEMU's devices are virtio's, too.
        let bus = if their_name == "qemu" { VIRTIO.name } else { their_name };
        let (Some(ours), Some(theirs)) = (ours.get(&((*name).into(), our_name.into())), theirs.get(&((*name).into(), bus.into()))) else {
            continue;
        };
        let ratios = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
        println!("{name:<24}{:>12.1}{:>12.1}{:>10.2}", median(ours.clone()), median(theirs.clone()), median(ratios));
    }
}

/// The host's side of `traffic` on networks: does what a connection's first byte says.
fn serve() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(|| serve_one(stream));
        }
    });
    port
}

/// Until the guest has enough.
fn serve_one(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut wish = [0];
    stream.read_exact(&mut wish)?;
    let mut piece = vec![0x5a; 64 << 10];
    loop {
        match wish[0] {
            b'r' => stream.write_all(&piece)?,
            b's' => {
                if stream.read(&mut piece)? == 0 {
                    return Ok(());
                }
            }
            _ => {
                stream.read_exact(&mut piece[..1])?;
                stream.write_all(&piece[..1])?;
            }
        }
    }
}
