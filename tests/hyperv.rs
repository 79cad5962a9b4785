//! The Hyper-V dialect as Debian's own kernel sees it: its clock, timers and hypercalls, unmodified.

// Helpers of tests are outside of what clippy takes for one.
#![allow(clippy::unwrap_used)]

#[path = "common/mod.rs"]
mod common;
#[allow(dead_code)]
#[path = "rig/initrd.rs"]
mod initrd;

use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::{Machine, Run, guest, run, run_host};
use initrd::Initrd;

/// A boot to init on the software CPU takes seconds when built with optimisation and nothing else runs.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long a machine is kept from running.
const PAUSE: Duration = Duration::from_secs(8);
const MOUNT: &str =
    "export PATH=/bin; busybox mount -t proc proc /proc; busybox mount -t sysfs sys /sys; busybox mount -t devtmpfs dev /dev";

/// A machine whose guest is Debian's kernel and the given script of busybox.
struct Guest {
    work: tempfile::TempDir,
    files: Initrd,
}

impl Guest {
    fn new(script: &str) -> Guest {
        let mut files = Initrd::default();
        files.script(MOUNT);
        files.script(script);
        Guest { work: tempfile::tempdir().unwrap(), files }
    }

    fn file(mut self, name: &str, content: &[u8]) -> Guest {
        self.files.file(name, 0o755, content);
        self
    }

    /// A module of the kernel, at the root.
    fn module(self, name: &str) -> Guest {
        let found = run_host("find", &["-L", guest("lib/modules").to_str().unwrap(), "-name", name]);
        self.file(name, &std::fs::read(found.output.trim()).unwrap())
    }

    /// The program of these tests, as `/bin/hyperv`, and the module that it needs.
    fn with_program(self) -> Guest {
        self.file("bin/hyperv", &std::fs::read(guest("hyperv")).unwrap()).module("msr.ko")
    }

    fn command(&self, base: &str, cmdline: &str, options: &[&str]) -> Command {
        let path = self.work.path().join("initrd");
        std::fs::write(&path, self.image(base)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
        command.args(["run", "--cmdline", &format!("console=ttyS0 panic=-1 {cmdline}")]);
        command.arg("--kernel").arg(guest("vmlinuz")).arg("--initrd").arg(path).args(options);
        command
    }

    /// The archive `base`, and our files and `/init` over it.
    fn image(&self, base: &str) -> Vec<u8> {
        let mut bytes = std::fs::read(guest(base)).unwrap();
        // An archive begins at a multiple of four.
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(self.files.finish());
        bytes
    }
}

/// Fails if the kernel has complained.
#[track_caller]
fn without_complaints(run: &Run) {
    for complaint in ["WARNING:", "BUG:", "Call Trace", "rcu: INFO", "unchecked MSR", "Oops"] {
        assert!(!run.output.contains(complaint), "{complaint} in\n{run}");
    }
}

#[test]
fn linux_takes_clock_timers_and_hypercalls_from_hyperv() {
    let script = "busybox grep -E 'LOC|HVS' /proc/interrupts
        echo CLOCKSOURCE $(busybox cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
        echo PROCESSORS $(busybox grep -c ^processor /proc/cpuinfo)
        echo VMBUS $(busybox cat /sys/bus/acpi/devices/VMBUS:00/status)";
    for cpus in ["1", "2"] {
        let run = run(Guest::new(script).command("initrd-busybox.gz", "", &["--dialect", "hyperv", "--cpus", cpus]), PATIENCE);
        run.expect(&[
            "Hypervisor detected: Microsoft Hyper-V",
            "Host Build 10.0.20348",
            "Using hypercall for remote TLB flush",
            "Using enlightened APIC (x2apic mode)",
            "Switched to clocksource hyperv_clocksource_tsc_page",
            "Hyper-V stimer0 interrupts",
            "CLOCKSOURCE hyperv_clocksource_tsc_page",
            &format!("PROCESSORS {cpus}"),
            "VMBUS 15",
            "reboot: Power down",
        ]);
        let local_timer = run.value("LOC:");
        assert!(local_timer.starts_with("0 "), "no interrupt of the local APIC's timer: {local_timer}\n{run}");
        assert!(run.output.contains("Using IPI hypercalls"), "{run}");
        without_complaints(&run);
    }
}

/// Two processors that change each other's address space all the time: a translation that was not flushed shows as a wrong page.
#[test]
fn processors_flush_each_others_translations() {
    let script = "work() { for i in 1 2 3 4 5 6 7 8; do busybox dd if=/dev/zero bs=64k count=64 2>/dev/null | busybox md5sum; done; }
        work > /a & work > /b & work > /c; wait
        echo SUMS $(busybox cat /a /b /c | busybox sort | busybox uniq -c)
        echo FLUSHES $(busybox grep TLB /proc/interrupts)";
    let run = run(Guest::new(script).command("initrd-busybox.gz", "quiet", &["--dialect", "hyperv", "--cpus", "2"]), PATIENCE);
    // md5sum of four mebibytes of zeros.
    run.expect(&["SUMS 24 b5cfa9d6c8febd618f91ac2843d50a1c -"]);
    without_complaints(&run);
}

#[test]
fn time_follows_the_host_after_a_pause() {
    let script = "while :; do echo \"UP $(busybox cut -d' ' -f1 /proc/uptime) $(busybox date +%s) END\"; busybox usleep 200000; done";
    let guest = Guest::new(script);
    let mut machine = Machine::start(guest.command("initrd-busybox.gz", "quiet", &["--dialect", "hyperv"]));
    // Time since the start, time of day, and when that was.
    let times = |machine: &mut Machine| {
        machine.wait_for("UP ", PATIENCE);
        let text = machine.wait_for(" END", PATIENCE);
        let (up, day) = text.trim_end_matches(" END").trim().split_once(' ').unwrap();
        (up.parse::<f64>().unwrap(), day.parse::<u64>().unwrap(), Instant::now())
    };
    let (before, _, at) = times(&mut machine);
    let signal = |name: &str| assert_eq!(run_host("kill", &["-s", name, &machine.id().to_string()]).status, Some(0));
    signal("STOP");
    std::thread::sleep(PAUSE);
    signal("CONT");
    // One line may have been on its way.
    times(&mut machine);
    let (after, day, later) = times(&mut machine);
    let host = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let (guests, hosts) = (after - before, (later - at).as_secs_f64());
    assert!(
        hosts > PAUSE.as_secs_f64() && (guests - hosts).abs() < PAUSE.as_secs_f64() / 2.0,
        "{guests} s in the guest, {hosts} s on the host"
    );
    assert!(day.abs_diff(host) <= PAUSE.as_secs() / 2, "it is {day} in the guest, {host} on the host");
}

#[test]
fn kernel_that_replaces_another_finds_everything_again() {
    let second = Guest::new("echo SECOND $(busybox cat /sys/devices/system/clocksource/clocksource0/current_clocksource)");
    let first = "echo FIRST; hyperv kexec /kernel /second 'console=ttyS0 panic=-1'";
    let first = Guest::new(first)
        .with_program()
        .file("kernel", &std::fs::read(guest("vmlinuz")).unwrap())
        .file("second", &second.image("initrd-busybox.gz"));
    let run = run(first.command("initrd-busybox.gz", "", &["--dialect", "hyperv", "--cpus", "2"]), PATIENCE);
    run.expect(&["FIRST", "Hypervisor detected: Microsoft Hyper-V", "SECOND hyperv_clocksource_tsc_page", "reboot: Power down"]);
    without_complaints(&run);
}

#[test]
fn machine_reboots_by_the_kernel_and_by_the_reset_register() {
    let script = "busybox insmod /msr.ko
        if [ $(hyperv msr 0x40000002) = 0x0 ] && [ $(hyperv msr 0x40000010) != 0x0 ]; then echo BOOTED; fi
        busybox grep -q how=kernel /proc/cmdline && busybox reboot -f
        hyperv msr 0x40000003 1; busybox sleep 60";
    for how in ["how=kernel", "how=register"] {
        let guest = Guest::new(script).with_program();
        let mut machine = Machine::start(guest.command("initrd-busybox.gz", &format!("quiet {how}"), &["--dialect", "hyperv"]));
        machine.wait_for("BOOTED", PATIENCE);
        machine.wait_for("BOOTED", PATIENCE);
    }
}

#[test]
fn crash_that_a_guest_reports_is_printed() {
    let script = "busybox insmod /msr.ko
        hyperv msr 0x40000100 0xdead; hyperv msr 0x40000105 0x8000000000000000";
    let run = run(Guest::new(script).with_program().command("initrd-busybox.gz", "quiet", &["--dialect", "hyperv"]), PATIENCE);
    run.expect(&[]);
    assert!(run.errors.contains("the guest says that it has crashed: 0xdead 0x0 0x0 0x0 0x0"), "{run}");
}

/// Linux tells of its panics once VMBus' driver is there: the end of its log.
#[test]
fn panic_of_linux_is_printed_with_its_log() {
    let script = "busybox insmod /hv_vmbus.ko && echo LOADED; echo c > /proc/sysrq-trigger";
    let guest = Guest::new(script).module("hv_vmbus.ko");
    let run = run(guest.command("initrd-busybox.gz", "panic=-1", &["--dialect", "hyperv", "--no-reboot"]), PATIENCE);
    run.expect(&["LOADED", "Kernel panic"]);
    let (_, told) = run.errors.split_once("the guest says that it has crashed:").unwrap_or_else(|| panic!("{run}"));
    assert!(told.contains("Kernel panic - not syncing: sysrq triggered crash"), "{run}");
}
