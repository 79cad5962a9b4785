//! Debian's unmodified kernel and userland on our machine.

// Helpers of tests are outside of what clippy takes for one.
#![allow(clippy::unwrap_used)]

#[path = "common/mod.rs"]
mod common;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Selftest, debian, guest};

/// A boot to init on the software CPU takes seconds when built with optimisation and nothing else runs.
const PATIENCE: Duration = Duration::from_secs(300);
/// A whole Debian with systemd.
const SYSTEM_PATIENCE: Duration = Duration::from_secs(1200);

#[test]
fn debian_kernel_reaches_init_and_powers_off() {
    let run = debian("initrd-busybox.gz", "", &["--backend", "soft", "--stats"], PATIENCE);
    run.expect(&["Linux version 6.1", "INIT REACHED", "reboot: Power down"]);
    assert!(run.output.contains("kvm-clock"), "the KVM dialect's clock is not used:\n{run}");
}

#[test]
fn debian_kernel_boots_without_any_dialect() {
    let run = debian("initrd-busybox.gz", "", &["--backend", "soft", "--dialect", "none"], PATIENCE);
    run.expect(&["INIT REACHED", "reboot: Power down"]);
    assert!(!run.output.contains("Hypervisor detected"), "{run}");
}

#[test]
fn two_processors_work_at_once() {
    let run = debian("initrd-busybox.gz", "test=smp", &["--backend", "soft", "--cpus", "2"], PATIENCE);
    run.expect(&["INIT REACHED", "processors 2", "reboot: Power down"]);
    // User time in hundredths of a second: each processor had its own loop.
    for cpu in ["cpu0 ", "cpu1 "] {
        let user: u64 = run.value(cpu).split_whitespace().next().unwrap().parse().unwrap();
        assert!(user > 5, "{cpu} did nothing:\n{run}");
    }
}

#[test]
fn virtio_console_carries_what_the_guest_writes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    let console = format!("file:{}", path.display());
    let run = debian("initrd-root.gz", "test=console", &["--backend", "soft", "--console", &console], PATIENCE);
    run.expect(&["INIT REACHED", "reboot: Power down"]);
    let written = std::fs::read_to_string(&path).unwrap();
    assert!(written.contains("through the virtio console"), "console: {written}\n{run}");
}

#[test]
fn reset_under_no_reboot_ends_the_machine() {
    let once = debian("initrd-busybox.gz", "test=reboot", &["--backend", "soft", "--no-reboot"], PATIENCE);
    once.expect(&["INIT REACHED"]);
    assert_eq!(once.output.matches("INIT REACHED").count(), 1, "{once}");
}

#[test]
fn reset_starts_the_machine_again_until_a_signal_ends_it() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    command.args(["run", "--backend", "soft", "--cmdline", "console=ttyS0 quiet test=reboot"]);
    command.arg("--kernel").arg(guest("vmlinuz")).arg("--initrd").arg(guest("initrd-busybox.gz"));
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).split(b'\n').map_while(Result::ok);
    let boots = lines.filter(|line| String::from_utf8_lossy(line).contains("INIT REACHED")).take(2).count();
    assert_eq!(boots, 2);
    Command::new("kill").arg(child.id().to_string()).status().unwrap();
    // 128 and the number of SIGTERM.
    assert_eq!(child.wait().unwrap().code(), Some(143));
}

#[test]
fn deterministic_runs_are_equal() {
    let hash = || {
        let run = debian("initrd-busybox.gz", "", &["--deterministic", "--stats"], PATIENCE);
        run.expect(&["INIT REACHED", "reboot: Power down"]);
        (run.value("trace hash").to_owned(), run.value("instructions ").to_owned(), run.output)
    };
    assert_eq!(hash(), hash());
}

#[test]
fn debian_system_boots_uses_its_disk_and_fetches_over_http() {
    let selftest = Selftest::new();
    let disk = selftest.disk();
    let options = ["--backend", "soft", "--disk", disk.to_str().unwrap(), "--nic", "user"];
    let run = debian("initrd-root.gz", &selftest.cmdline("root"), &options, SYSTEM_PATIENCE);
    run.expect(&["INIT REACHED", "systemd[1]: systemd 252", "guest login:", "SELFTEST END", "reboot: Power down"]);
    selftest.check(&run);
}
