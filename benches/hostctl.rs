//! One read of a key as a whole process: hostctl beside vmware-rpctool in a guest of ours, and beside xenstore-read in a real Xen's dom0.
//!
//! ```text
//! tests/common/guest/make target/guest && tests/common/vmware/make target/guest && tests/common/xen/make target/guest
//! cargo bench --bench hostctl [-- ROUNDS]
//! ```
//!
//! In the guest a shell runs each program many times in a row, in alternating rounds; a round's time is the guest's own. The shell's part, a
//! loop around /bin/true of the same static kind, is measured in the same way and taken off. Medians and ratios are printed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

#[allow(dead_code)]
#[path = "../tests/rig/initrd.rs"]
mod initrd;
#[path = "../tests/common/program.rs"]
mod program;

use initrd::Initrd;
use program::{build_static, workspace};

/// Runs of each program in a round.
const RUNS: u32 = 200;
/// Rounds, where the command line has no number.
const ROUNDS: u32 = 5;

fn main() {
    let rounds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(ROUNDS);
    let hostctl = std::fs::read(build_static(&["-p", "hostctl", "--release"]).join("release/hostctl")).expect("it has been built");
    let directory = tempfile::tempdir().expect("a temporary directory");

    let files = |init: &str, script: String| {
        let mut archive = Initrd::default();
        for name in ["bin", "dev", "proc", "sys"] {
            archive.directory(name);
        }
        archive.file("bin/busybox", 0o755, &std::fs::read("/bin/busybox").expect("busybox-static"));
        archive.file("bin/hostctl", 0o755, &hostctl);
        archive.file(init, 0o755, format!("#!/bin/busybox sh\nexport PATH=/bin\n/bin/busybox --install -s /bin\n{script}").as_bytes());
        archive.archive()
    };

    let mount = "mount -t proc proc /proc\nmount -t sysfs sys /sys\nmount -t devtmpfs dev /dev\n";
    let measured = measure(rounds, "hostctl guestinfo.x", "vmware-rpctool 'info-get guestinfo.x'");
    let ours = files("init", format!("{mount}{measured}poweroff -f\n"));
    let mut vmctl = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    vmctl.args(["run", "--backend", "soft", "--dialect", "vmware", "--no-reboot", "--kv", "guestinfo.x=value"]);
    vmctl.args(["--cmdline", "console=ttyS0 quiet panic=-1", "--kernel"]).arg(guest("vmlinuz"));
    vmctl.arg("--initrd").arg(archive(directory.path(), &ours, "initrd-vmtools.gz"));
    report("vmware-rpctool", vmctl);

    let measured = measure(rounds, "hostctl -f xen data/x", "xenstore-read data/x");
    let xen = files("test", format!("xenstore-write data/x value\n{measured}"));
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "pc", "-accel", "tcg", "-cpu", "Nehalem", "-m", "1024", "-nographic", "-no-reboot"]);
    qemu.arg("-kernel").arg(guest("xen")).args(["-append", "console=com1 com1=115200 dom0_mem=512M", "-initrd"]);
    let image = archive(directory.path(), &xen, "initrd-xen.gz");
    qemu.arg(format!("{} console=hvc0 earlyprintk=xen quiet,{}", guest("xen-vmlinuz").display(), image.display()));
    report("xenstore-read", qemu);
}

/// A script that times rounds of both commands and of the loop alone.
fn measure(rounds: u32, ours: &str, theirs: &str) -> String {
    let mut script = format!(
        "{ours}\n{theirs}\nuptime() {{ cut -d' ' -f1 /proc/uptime; }}\n\
         loop() {{ name=$1; shift; from=$(uptime); i=0; while [ $i -lt {RUNS} ]; do \"$@\" >/dev/null 2>&1; i=$((i+1)); done; \
         echo ROUND $name $from $(uptime); }}\n"
    );
    for _ in 0..rounds {
        script.push_str(&format!("loop none /bin/true\nloop ours {ours}\nloop theirs {theirs}\n"));
    }
    script
}

/// Boots the machine and prints what its rounds say.
fn report(name: &str, mut machine: Command) {
    let output = machine.stdin(Stdio::null()).stderr(Stdio::inherit()).output().unwrap_or_else(|error| panic!("{machine:?}: {error}"));
    let output = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut rounds: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for line in output.lines().filter_map(|line| line.split_once("ROUND ")) {
        let words: Vec<&str> = line.1.split_whitespace().collect();
        if let [name, from, to] = words[..] {
            let time = |word: &str| word.parse::<f64>().expect("seconds");
            rounds.entry(name).or_default().push((time(to) - time(from)) / f64::from(RUNS) * 1000.0);
        }
    }
    let (Some(none), Some(ours), Some(theirs)) = (rounds.remove("none"), rounds.remove("ours"), rounds.remove("theirs")) else {
        panic!("{machine:?} has not measured anything:\n{output}");
    };
    let (none, ours, theirs) = (median(none), median(ours), median(theirs));
    println!("milliseconds of guest time for a whole process, load {}", load());
    println!("  {:<16}{ours:>8.2}   with {none:.2} for a process that does nothing", "hostctl");
    println!("  {name:<16}{theirs:>8.2}   ratio {:.2}", ours / theirs);
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

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn load() -> String {
    std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim().to_owned()
}
