//! Debian's kernel on the software CPU beside QEMU's TCG: the same files, in interleaved pairs, medians and ratios.
//!
//! ```text
//! tests/common/guest/make target/guest && cargo bench --bench boot            # 5 pairs
//! cargo bench --bench boot -- 9                                               # 9 pairs
//! ```
//!
//! Each run boots to init, executes five loops there (`tests/common/guest/loops.rs`) and powers off. Times of loops are the guest's
//! own, time to init is the host's, from the start of the program to the line that init prints. The load of the host is printed
//! because it decides what the figures are worth.

mod measure;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use measure::{load, median};

/// Loops and how often they go round: about a second each for the slower side.
const LOOPS: [(&str, u64); 5] = [("shell", 20_000), ("memory", 1_000), ("syscall", 100_000), ("fault", 40_000), ("fork", 100)];
/// A run that is not done by then is broken.
const PATIENCE: Duration = Duration::from_secs(600);
/// Mappings at least this large are the guest's memory.
const GUEST_MAPPING: u64 = 256 << 20;

/// What one run gave.
#[derive(Debug, Default, Clone)]
struct Sample {
    /// Seconds by name.
    seconds: BTreeMap<String, f64>,
    /// Instructions of the whole run.
    instructions: Option<f64>,
    /// Bytes resident besides guest memory, when init ran.
    overhead: Option<f64>,
}

fn main() {
    let pairs = std::env::args().skip(1).find_map(|argument| argument.parse::<usize>().ok()).unwrap_or(5);
    let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest");
    let (kernel, initrd) = (guest.join("vmlinuz"), guest.join("initrd-busybox.gz"));
    assert!(kernel.exists() && initrd.exists(), "no guest; make it with: tests/common/guest/make target/guest");
    let disk = guest.join("bench.raw");
    std::fs::File::create(&disk).and_then(|file| file.set_len(64 << 20)).expect("a disk image");

    let loops: String = LOOPS.iter().map(|(name, count)| format!(" {name}={count}")).collect();
    let all = format!("console=ttyS0 panic=-1 quiet test=bench{loops}");
    let plain = "console=ttyS0 panic=-1 quiet test=bench".to_owned();
    let shell = format!("{plain} shell={}", LOOPS[0].1);

    let (mut ours, mut theirs, mut rates) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 1..=pairs {
        eprintln!("pair {pair} of {pairs}, load {}", load());
        ours.push(run(vmctl(&kernel, &initrd, &disk, &all)));
        theirs.push(run(qemu(&kernel, &initrd, &disk, &all)));
        // The loop's instructions: a run with it less a run without.
        let (with, without) = (run(vmctl(&kernel, &initrd, &disk, &shell)), run(vmctl(&kernel, &initrd, &disk, &plain)));
        if let (Some(with_loop), Some(without_loop), Some(seconds)) = (with.instructions, without.instructions, with.seconds.get("shell")) {
            rates.push((with_loop - without_loop) / seconds / 1e6);
        }
    }
    // Best effort: the image is of no further use.
    let _ = std::fs::remove_file(&disk);

    println!("{:<12}{:>12}{:>12}{:>10}", "", "soft", "qemu tcg", "ratio");
    for name in std::iter::once("init").chain(LOOPS.iter().map(|(name, _)| *name)) {
        let of = |samples: &[Sample]| median(samples.iter().filter_map(|sample| sample.seconds.get(name).copied()).collect());
        let (a, b) = (of(&ours), of(&theirs));
        println!("{name:<12}{a:>10.3} s{b:>10.3} s{:>10.2}", a / b);
    }
    println!("shell loop: {:.0} million guest instructions a second", median(rates));
    let overhead = median(ours.iter().filter_map(|sample| sample.overhead).collect());
    println!("monitor beyond guest memory, with one disk and one network card: {:.1} MiB resident", overhead / f64::from(1 << 20));
}

fn vmctl(kernel: &Path, initrd: &Path, disk: &Path, cmdline: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    command.args(["run", "--backend", "soft", "--stats", "--memory", "512M", "--nic", "user"]).arg("--disk").arg(disk);
    command.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd).args(["--cmdline", cmdline]);
    command
}

fn qemu(kernel: &Path, initrd: &Path, disk: &Path, cmdline: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", "pc", "-accel", "tcg", "-cpu", "max", "-m", "512", "-smp", "1", "-nographic", "-no-reboot"]);
    command.arg("-drive").arg(format!("file={},if=virtio,format=raw", disk.display()));
    command.args(["-nic", "user,model=virtio-net-pci"]);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd).args(["-append", cmdline]);
    command
}

/// Runs one machine and takes down what it says.
fn run(mut command: Command) -> Sample {
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let smaps = PathBuf::from(format!("/proc/{}/smaps", child.id()));
    let stdout = child.stdout.take().expect("a pipe");
    let stderr = child.stderr.take().expect("a pipe");
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        // Whatever was said before it broke off is enough.
        let _ = BufReader::new(stderr).read_to_string(&mut text);
        text
    });
    let mut sample = Sample::default();
    for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).into_owned();
        if line.contains("INIT REACHED") {
            sample.seconds.insert("init".into(), start.elapsed().as_secs_f64());
            sample.overhead = std::fs::read_to_string(&smaps).ok().map(|text| resident_beyond_guest(&text));
        } else if let Some((_, rest)) = line.split_once("LOOP ") {
            let words: Vec<&str> = rest.split_whitespace().collect();
            if let [name, _, nanoseconds] = words[..] {
                sample.seconds.insert(name.into(), nanoseconds.parse::<f64>().expect("nanoseconds") / 1e9);
            }
        }
        assert!(start.elapsed() < PATIENCE, "{command:?} is not done after {PATIENCE:?}");
    }
    let status = child.wait().expect("its end");
    let errors = errors.join().expect("its errors");
    assert!(status.success(), "{command:?}: {status}\n{errors}");
    let count = errors.lines().find_map(|line| line.strip_prefix("instructions "));
    sample.instructions = count.and_then(|count| count.trim().parse().ok());
    sample
}

/// Resident bytes of all mappings but the guest's memory, out of /proc/PID/smaps.
fn resident_beyond_guest(smaps: &str) -> f64 {
    let kib = |line: &str| line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0) * 1024;
    let (mut size, mut sum) = (0, 0);
    for line in smaps.lines() {
        if line.starts_with("Size:") {
            size = kib(line);
        } else if line.starts_with("Rss:") && size < GUEST_MAPPING {
            sum += kib(line);
        }
    }
    sum as f64
}
