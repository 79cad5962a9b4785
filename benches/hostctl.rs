//! One read of a key as a whole process: hostctl beside vmware-rpctool in a guest of ours, and beside xenstore-read in a real Xen's dom0.
//!
//! ```text
//! tests/common/guest/make target/guest && tests/common/vmware/make target/guest && tests/common/xen/make target/guest
//! cargo bench --bench hostctl [-- ROUNDS]
//! ```
//!
//! In the guest `benches/hostctl/launch.c` runs each program many times in a row, in alternating rounds, and tells how long one takes from
//! before its start until it is gone, in the guest's own time. Medians and ratios are printed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

#[allow(dead_code)]
#[path = "../tests/rig/initrd.rs"]
mod initrd;
mod measure;
#[path = "../tests/common/program.rs"]
mod program;

use initrd::Initrd;
use measure::{load, median};
use program::{HOSTCTL, build_static, workspace};

/// Runs of each program in a round.
const RUNS: u32 = 200;
/// Rounds, where the command line has no number.
const ROUNDS: u32 = 5;

fn main() {
    let rounds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(ROUNDS);
    let hostctl = std::fs::read(build_static(HOSTCTL).join("small/hostctl")).expect("it has been built");
    let directory = tempfile::tempdir().expect("a temporary directory");
    let launch = directory.path().join("launch");
    let mut gcc = Command::new("gcc");
    gcc.args(["-O2", "-static", "-o"]).arg(&launch).arg(workspace().join("benches/hostctl/launch.c"));
    assert!(gcc.status().expect("gcc").success(), "{gcc:?}");
    let launch = std::fs::read(launch).expect("it has been compiled");

    let files = |init: &str, script: String| {
        let mut archive = Initrd::default();
        for name in ["bin", "dev", "proc", "sys"] {
            archive.directory(name);
        }
        archive.file("bin/busybox", 0o755, &std::fs::read("/bin/busybox").expect("busybox-static"));
        archive.file("bin/hostctl", 0o755, &hostctl);
        archive.file("bin/launch", 0o755, &launch);
        archive.file(init, 0o755, format!("#!/bin/busybox sh\nexport PATH=/bin\n/bin/busybox --install -s /bin\n{script}").as_bytes());
        archive.archive()
    };

    let mount = "mount -t proc proc /proc\nmount -t sysfs sys /sys\nmount -t devtmpfs dev /dev\n";
    let measured = measure(rounds, "/bin/hostctl guestinfo.x", "/bin/vmware-rpctool 'info-get guestinfo.x'");
    let ours = files("init", format!("{mount}{measured}poweroff -f\n"));
    let mut vmctl = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    vmctl.args(["run", "--backend", "soft", "--dialect", "vmware", "--no-reboot", "--kv", "guestinfo.x=value"]);
    vmctl.args(["--cmdline", "console=ttyS0 quiet panic=-1", "--kernel"]).arg(guest("vmlinuz"));
    vmctl.arg("--initrd").arg(archive(directory.path(), &ours, "initrd-vmtools.gz"));
    report("vmware-rpctool", vmctl);

    let measured = measure(rounds, "/bin/hostctl data/x", "/bin/xenstore-read data/x");
    let xen = files("test", format!("xenstore-write data/x value\n{measured}"));
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "pc", "-accel", "tcg", "-cpu", "Nehalem", "-m", "1024", "-nographic", "-no-reboot"]);
    qemu.arg("-kernel").arg(guest("xen")).args(["-append", "console=com1 com1=115200 dom0_mem=512M", "-initrd"]);
    let image = archive(directory.path(), &xen, "initrd-dom0.gz");
    qemu.arg(format!("{} console=hvc0 earlyprintk=xen quiet,{}", guest("xen-vmlinuz").display(), image.display()));
    report("xenstore-read", qemu);
}

/// A script that runs rounds of both commands.
fn measure(rounds: u32, ours: &str, theirs: &str) -> String {
    let round = format!("echo ROUND ours $(launch {RUNS} {ours})\necho ROUND theirs $(launch {RUNS} {theirs})\n");
    round.repeat(rounds as usize)
}

/// Boots the machine and prints what its rounds say.
fn report(name: &str, mut machine: Command) {
    let output = machine.stdin(Stdio::null()).stderr(Stdio::inherit()).output().unwrap_or_else(|error| panic!("{machine:?}: {error}"));
    let output = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut rounds: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for line in output.lines().filter_map(|line| line.split_once("ROUND ")) {
        let words: Vec<&str> = line.1.split_whitespace().collect();
        if let [name, milliseconds] = words[..] {
            rounds.entry(name).or_default().push(milliseconds.parse().expect("milliseconds"));
        }
    }
    let (Some(ours), Some(theirs)) = (rounds.remove("ours"), rounds.remove("theirs")) else {
        panic!("{machine:?} has not measured anything:\n{output}");
    };
    let (ours, theirs) = (median(ours), median(theirs));
    println!("milliseconds of guest time for one read as a process, load {}", load());
    println!("  hostctl        {ours:>8.3}");
    println!("  {name:<15}{theirs:>8.3}   ratio {:.2}", ours / theirs);
}

/// `first` and the guests' archive `second` in one file, as Linux takes them.
fn archive(directory: &Path, first: &[u8], second: &str) -> PathBuf {
    let path = directory.join(second);
    let second = std::fs::read(guest(second)).expect("a guest");
    std::fs::write(&path, [first, &second].concat()).expect("room for an initrd");
    path
}

fn guest(name: &str) -> PathBuf {
    let path = workspace().join("target/guest").join(name);
    assert!(path.exists(), "{} is missing; the head of benches/hostctl.rs says how to make it", path.display());
    path
}
