//! Debian's unmodified kernel and userland on our machine.

// Helpers of tests are outside of what clippy takes for one.
#![allow(clippy::unwrap_used)]

#[path = "common/mod.rs"]
mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{copy_sparse, debian, guest, run};

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
    let work = tempfile::tempdir_in(guest("")).unwrap();
    let disk = work.path().join("disk.raw");
    copy_sparse(&guest("debian.raw"), &disk);
    let body: Vec<u8> = (0..300_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    std::fs::write(work.path().join("body"), &body).unwrap();
    let port = serve(body);

    let disk_option = disk.to_str().unwrap().to_owned();
    let cmdline = format!("test=root cloud-init=disabled selftest selftest_url=http://GATEWAY:{port}/body");
    let run = debian("initrd-root.gz", &cmdline, &["--backend", "soft", "--disk", &disk_option, "--nic", "user"], SYSTEM_PATIENCE);
    run.expect(&["INIT REACHED", "systemd[1]: systemd 252", "guest login:", "SELFTEST END", "reboot: Power down"]);

    let sum = |path: &std::path::Path| {
        let output = Command::new("sha256sum").arg(path).output().unwrap();
        String::from_utf8(output.stdout).unwrap()[..64].to_owned()
    };
    assert_ne!(run.value("SELFTEST ADDRESS"), "", "{run}");
    assert_eq!(run.value("SELFTEST HTTP"), sum(&work.path().join("body")), "{run}");
    // The host reads the guest's file out of the image, after a check that the file system is whole.
    let check = run_host("e2fsck", &["-fn", &disk_option]);
    assert_eq!(check.status, Some(0), "{check}");
    let blob = work.path().join("blob");
    run_host("debugfs", &["-R", &format!("dump /root/blob {}", blob.display()), &disk_option]);
    assert_eq!(run.value("SELFTEST BLOB"), sum(&blob), "{run}");
}

fn run_host(program: &str, arguments: &[&str]) -> common::Run {
    let mut command = Command::new(program);
    command.args(arguments).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    run(command, PATIENCE)
}

/// An HTTP server on the host's loopback that answers everything with `body`. It lives as long as the process.
fn serve(body: Vec<u8>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
        }
    });
    port
}
