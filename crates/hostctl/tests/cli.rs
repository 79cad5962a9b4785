//! The program as a process: what it prints where, and its exit status. Nothing here needs a store.

// Helpers of tests are outside of what clippy takes for one.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};

fn hostctl(line: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hostctl")).args(line.split_whitespace()).output().unwrap()
}

fn status(line: &str) -> i32 {
    hostctl(line).status.code().unwrap()
}

fn stdout(line: &str) -> String {
    String::from_utf8(hostctl(line).stdout).unwrap()
}

fn stderr(line: &str) -> String {
    String::from_utf8(hostctl(line).stderr).unwrap()
}

#[test]
fn wrong_command_line_is_1_as_openbsd_says_it_and_2_with_a_command() {
    assert_eq!(status(""), 1);
    assert_eq!(status("-x"), 1);
    assert_eq!(status("a b c"), 1);
    assert_eq!(status("get"), 2);
    assert_eq!(status("ls --nonsense"), 2);
    assert!(stderr("").starts_with("usage: hostctl [-qt] [-f device] [-i input] [-o output] key [value]\n"));
    assert!(stderr("-x").starts_with("hostctl: unknown option -x\nusage: "));
}

#[test]
fn help_and_version_go_to_standard_output() {
    assert!(stdout("--help").contains("hostctl detect [--json]"));
    assert!(stdout("--version").starts_with("hostctl "));
    assert_eq!((status("--help"), status("--version")), (0, 0));
}

#[test]
fn interface_that_is_not_there_is_1_as_openbsd_says_it_and_4_with_a_command() {
    assert_eq!(status("-f /dev/pvbus77 key"), 1);
    assert_eq!(status("-f /dev/pvbus77 get key"), 4);
    assert!(stderr("-f /dev/pvbus77 key").starts_with("hostctl: open: /dev/pvbus77: No such device\n"));
    assert!(stderr("-f /dev/pvbus77 get key").starts_with("hostctl: /dev/pvbus77: no such interface"));
}

#[test]
fn interface_without_a_store_is_1_as_openbsd_says_it_and_4_with_a_command() {
    assert_eq!(status("-f kvm key"), 1);
    assert_eq!(status("-f kvm get key"), 4);
    assert_eq!(stderr("-f kvm key"), "hostctl: ioctl: No such device or address\nhostctl: KVM has no information store\n");
}

#[test]
fn device_that_is_not_pvbus_s_says_so_by_the_ioctl() {
    assert_eq!(stderr("-f /dev/null key"), "hostctl: ioctl: Inappropriate ioctl for device\n");
    assert_eq!(stderr("-f /dev/null -t"), "hostctl: ioctl: Inappropriate ioctl for device\n");
}

#[test]
fn input_that_cannot_be_a_value_is_refused_before_the_store_is_opened() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = directory.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.display().to_string()
    };
    assert_eq!(stderr(&format!("-f kvm -i {} key", file("empty", b""))), "hostctl: input file\n");
    assert_eq!(stderr(&format!("-f kvm -i {} key", file("long", &[b'x'; 65_537]))), "hostctl: value too long\n");
    // These come as far as the store.
    for (name, bytes) in [("newline", [vec![b'x'; 65_536], vec![b'\n']].concat()), ("lines", b"a\nb\n".to_vec())] {
        assert_eq!(status(&format!("-f kvm set -i {} key", file(name, &bytes))), 4);
    }
    assert_eq!(stderr("-f kvm -i /no/such/file key"), "hostctl: fopen: /no/such/file: No such file or directory\n");
    assert_eq!(status("set -i /no/such/file key"), 1);
}

#[test]
fn output_file_is_made_and_holds_the_result() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out");
    std::fs::write(&path, "something else that is longer").unwrap();
    assert_eq!(stdout(&format!("detect --json -o {}", path.display())), "");
    assert!(std::fs::read_to_string(&path).unwrap().starts_with('{'));
    assert_eq!(stderr("-o /no/such/directory/out key"), "hostctl: fopen: /no/such/directory/out: No such file or directory\n");
}

#[test]
fn detection_agrees_with_the_kernel_about_a_hypervisor() {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let hypervisor = flags.lines().any(|line| line.starts_with("flags") && line.split_whitespace().any(|flag| flag == "hypervisor"));
    let found: serde_json::Value = serde_json::from_str(&stdout("detect --json")).unwrap();
    assert_eq!(found["hypervisor"], hypervisor);
    assert_eq!(stdout("detect").contains("no hypervisor"), !hypervisor);
}

#[test]
fn devices_are_not_made_without_cuse() {
    if !Path::new("/dev/cuse").exists() {
        assert_eq!(status("serve"), 4);
    }
}
