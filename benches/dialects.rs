//! What dialects cost a machine: Debian's kernel boots with each of them beside it, and then by it, as ratios to a machine without any.
//!
//! ```text
//! tests/common/guest/make target/guest && cargo bench --bench dialects [-- ROUNDS]
//! ```
//!
//! A round boots each machine once with `nopv`, by which Linux takes no dialect, and once without, when it takes one; the kernel's own log says which. What
//! is shown are medians: of the time to init, of the guest's instructions until it has powered off, and of what the monitor has resident beyond the guest's
//! memory when init runs, with the median of the rounds' ratios, and for memory of their differences, to the machine without dialects. That machine boots
//! twice in each round: its second line is what the figures are worth on this host. Each round begins one machine later than the last, so that none is
//! always measured behind the same other.
//!
//! Memory has three parts ([`machine::Memory`]): what the monitor allocates and translated code are its own, which is what a dialect costs each machine;
//! pages of the program's file that are mapped are the same for all machines. A dialect that is set up and unused has executed some more of the program.

#[path = "../tests/common/mod.rs"]
mod common;
mod machine;
mod measure;

use std::process::Command;

use common::guest;
use machine::{KIB, Memory, Sample, run};
use measure::{load, median};

/// What is compared: a name, `--dialect`, and what Linux says it is paravirtualized on. The first is what the others are compared with.
const MACHINES: [(&str, &str, &str); 8] = [
    ("none", "none", UNUSED),
    ("none again", "none", UNUSED),
    ("kvm", "kvm", "KVM"),
    ("vmware", "vmware", "VMware hypervisor"),
    ("openbsd", "openbsd", "KVM"),
    ("xen", "xen", "Xen HVM"),
    ("hyperv", "hyperv", "Hyper-V"),
    ("all", "all", "KVM"),
];
/// What Linux says when it takes no dialect (`arch/x86/kernel/paravirt.c`, `default_banner`).
const UNUSED: &str = "bare hardware";
const ROUNDS: usize = 5;

/// For each machine, one sample a round.
type Samples = [Vec<Sample>; MACHINES.len()];

fn main() {
    let rounds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(ROUNDS);
    let (mut unused, mut used) = (Samples::default(), Samples::default());
    for round in 0..rounds {
        eprintln!("round {} of {rounds}, load {}", round + 1, load());
        for turn in 0..MACHINES.len() {
            let index = (round + turn) % MACHINES.len();
            let (_, dialect, taken) = MACHINES[index];
            unused[index].push(boot(dialect, "nopv", UNUSED));
            used[index].push(boot(dialect, "", taken));
        }
    }
    report("not used", &unused);
    report("used", &used);
}

/// Boots Debian's kernel, which has to say that it took what it was to take.
fn boot(dialect: &str, parameter: &str, taken: &str) -> Sample {
    let mut command = at_fixed_addresses(env!("CARGO_BIN_EXE_vmctl"));
    command.args(["run", "--backend", "soft", "--stats", "--memory", "512M", "--dialect", dialect]);
    command.arg("--kernel").arg(guest("vmlinuz")).arg("--initrd").arg(guest("initrd-busybox.gz"));
    command.args(["--cmdline", &format!("console=ttyS0 panic=-1 {parameter}")]);
    let sample = run(command);
    let says = format!("Booting paravirtualized kernel on {taken}");
    assert!(sample.output.contains(&says), "--dialect {dialect}: no «{says}» in:\n{}", sample.output);
    sample
}

/// The program at the same addresses in each run, where the host allows it: how many pages the host maps around one that is touched depends on them.
fn at_fixed_addresses(program: &str) -> Command {
    let setarch = |program: &str| {
        let mut command = Command::new("setarch");
        command.args(["--addr-no-randomize", program]);
        command
    };
    if setarch("true").status().is_ok_and(|status| status.success()) { setarch(program) } else { Command::new(program) }
}

/// Prints one line for each machine.
fn report(title: &str, samples: &Samples) {
    let memory = ["own KiB", "translated", "of the file"].map(|part| format!("{part:>13}{:>8}", "more")).concat();
    println!("\n{title:<12}{:>8}{:>8}{:>14}{:>8}{memory}", "init", "ratio", "instructions", "ratio");
    for ((name, ..), machine) in MACHINES.iter().zip(samples) {
        let of = |value: fn(&Sample) -> f64| median(machine.iter().map(value).collect());
        let beside = |value: fn(&Sample) -> f64, compare: fn(f64, f64) -> f64| {
            median(machine.iter().zip(&samples[0]).map(|(one, none)| compare(value(one), value(none))).collect())
        };
        let ratio = |one: f64, none: f64| one / none;
        let memory = [own, translations, files].map(|part| {
            let (size, more) = (of(part) / KIB, beside(part, |one, none| one - none) / KIB);
            format!("{size:>13.0}{more:>+8.0}")
        });
        println!(
            "{name:<12}{:>6.2} s{:>8.2}{:>12.1} M{:>8.4}{}",
            of(init),
            beside(init, ratio),
            of(instructions) / 1e6,
            beside(instructions, ratio),
            memory.concat(),
        );
    }
}

fn init(sample: &Sample) -> f64 {
    sample.seconds.get("init").copied().expect("init was reached")
}

fn instructions(sample: &Sample) -> f64 {
    sample.instructions.expect("instructions are counted")
}

fn own(sample: &Sample) -> f64 {
    memory(sample).own
}

fn translations(sample: &Sample) -> f64 {
    memory(sample).translations
}

fn files(sample: &Sample) -> f64 {
    memory(sample).files
}

fn memory(sample: &Sample) -> Memory {
    sample.memory.expect("mappings are readable")
}
