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

#[path = "../tests/common/mod.rs"]
mod common;
mod machine;
mod measure;

use std::path::Path;
use std::process::Command;

use common::guest;
use machine::{KIB, Memory, Sample, run};
use measure::{load, median};

/// Bytes of a mebibyte.
const MIB: f64 = 1024.0 * KIB;
/// Loops and how often they go round: about a second each for the slower side.
const LOOPS: [(&str, u64); 5] = [("shell", 20_000), ("memory", 1_000), ("syscall", 100_000), ("fault", 40_000), ("fork", 100)];

fn main() {
    let pairs = std::env::args().skip(1).find_map(|argument| argument.parse::<usize>().ok()).unwrap_or(5);
    let (kernel, initrd) = (guest("vmlinuz"), guest("initrd-busybox.gz"));
    let disk = kernel.with_file_name("bench.raw");
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
    let of = |part: fn(Memory) -> f64| median(ours.iter().filter_map(|sample| sample.memory).map(part).collect()) / MIB;
    let (own, files) = (of(|memory| memory.own + memory.translations), of(|memory| memory.files));
    println!(
        "monitor beyond guest memory, with one disk and one network card: {own:.1} MiB of its own, {files:.1} MiB of the program's file"
    );
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
