//! Debian's unmodified kernel under the KVM dialect of the software CPU: its clock, steal time, and the host's clock by ptp_kvm.

// Helpers of tests are outside of what clippy takes for one.
#![allow(clippy::unwrap_used)]

#[path = "common/mod.rs"]
mod common;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use common::{Rival, debian, guest, pinned};

const PATIENCE: Duration = Duration::from_secs(300);
const MILLISECOND: i64 = 1_000_000;
const CMDLINE: &str = "console=ttyS0 panic=-1 quiet test=clocks";

/// A line of the guest, and when the host had it, in nanoseconds since 1970.
type Stamped = (i64, String);

/// Runs a machine and stamps each line that it prints.
fn stamped(cmdline: &str) -> Vec<Stamped> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    command.args(["run", "--backend", "soft", "--cmdline", cmdline]);
    command.arg("--kernel").arg(guest("vmlinuz")).arg("--initrd").arg(guest("initrd-busybox.gz"));
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as i64;
    let lines = BufReader::new(child.stdout.take().unwrap()).split(b'\n').map_while(Result::ok);
    let lines = lines.map(|line| (now(), String::from_utf8_lossy(&line).trim().to_owned())).collect();
    assert!(child.wait().unwrap().success());
    lines
}

fn text(lines: &[Stamped]) -> String {
    lines.iter().map(|(_, line)| format!("{line}\n")).collect()
}

/// By how much the guest's clock is behind the host's, from `PTP HOST GUEST`.
fn ptp_offsets(lines: &[Stamped]) -> Vec<i64> {
    let numbers = lines.iter().filter_map(|(_, line)| line.strip_prefix("PTP ")?.split_once(' '));
    numbers.filter_map(|(host, guest)| Some(host.parse::<i64>().ok()? - guest.parse::<i64>().ok()?)).collect()
}

/// The same from `NOW GUEST` and the host's stamps, plus what the line took on its way: never less than the clock is behind.
fn stamp_offsets(lines: &[Stamped]) -> Vec<i64> {
    lines.iter().filter_map(|(at, line)| Some(at - line.strip_prefix("NOW ")?.parse::<i64>().ok()?)).collect()
}

#[test]
fn guest_clock_stays_within_a_millisecond_of_the_host_over_a_minute() {
    let lines = stamped(&format!("{CMDLINE} watch=60"));
    let all = text(&lines);
    assert!(all.contains("CLOCKSOURCE kvm-clock"), "{all}");
    assert!(all.contains("PTP SAMPLES 5"), "PTP_SYS_OFFSET of ptp_kvm:\n{all}");

    let offsets = ptp_offsets(&lines);
    assert!(offsets.len() > 30, "only {} readings of ptp_kvm:\n{all}", offsets.len());
    println!("ptp_kvm: {} to {} ns", offsets.iter().min().unwrap(), offsets.iter().max().unwrap());
    assert!(offsets.iter().all(|offset| offset.abs() < MILLISECOND), "{offsets:?}");

    // And without the guest's word for the host's time: the luckiest lines of the first and of the last third of the minute.
    let offsets = stamp_offsets(&lines);
    let third = offsets.len() / 3;
    let (first, last) = (offsets[..third].iter().min().unwrap(), offsets[2 * third..].iter().min().unwrap());
    println!("luckiest lines of {third}: {first} and {last} ns behind");
    assert!((first - last).abs() < MILLISECOND, "{first} and {last} ns");
}

#[test]
fn time_that_a_rival_on_the_same_processor_takes_is_steal_time() {
    let _rival = Rival::on("0");
    let run = pinned(&format!("{CMDLINE} steal=10"), &[]);
    run.expect(&["STEAL "]);
    // Hundredths of a second of ten seconds; fair would be half of them.
    let stolen: u32 = run.value("STEAL ").parse().unwrap();
    assert!((200..=1000).contains(&stolen), "{stolen} hundredths of a second:\n{run}");
}

#[test]
fn processors_that_share_one_of_the_host_halt_at_locks_and_are_kicked() {
    let run = pinned("console=ttyS0 panic=-1 test=smp", &["--cpus", "2", "--stats"]);
    run.expect(&["PV spinlocks enabled", "setup PV IPIs", "INIT REACHED", "processors 2", "reboot: Power down"]);
    // With a host processor each, they hardly ever wait for a lock long enough.
    let calls: u64 = run.value("hypercalls ").parse().unwrap();
    assert!(calls > 0, "{run}");
}

#[test]
fn deterministic_machine_is_not_stolen_from() {
    let cmdline = "quiet test=clocks steal=2";
    let run = debian("initrd-busybox.gz", cmdline, &["--deterministic"], PATIENCE);
    run.expect(&["CLOCKSOURCE kvm-clock", "STEAL 0"]);
}

#[test]
fn linux_takes_openbsds_clock_and_finds_its_control_device() {
    let run = debian("initrd-busybox.gz", "test=clocks", &["--backend", "soft", "--dialect", "openbsd"], PATIENCE);
    // The device's ids and class as Linux prints them.
    run.expect(&["Hypervisor detected: KVM", "[0b5d:0777] type 00 class 0x078000", "CLOCKSOURCE kvm-clock"]);
}
