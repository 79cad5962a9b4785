//! Bad input: each case is a clear message on standard error and status 1, and nothing is written.

// Tests fail by panicking; the lint knows only functions marked as tests.
#![allow(clippy::unwrap_used)]

mod guests;

use std::path::Path;

use guests::{EXIT_ERROR, Run, boot_disk, build, read_until, start, vmctl, write};
use tempfile::TempDir;

/// Formats that every "cannot boot this" message names.
const FORMATS: [&str; 5] = ["bzImage", "PVH", "multiboot", "OpenBSD", "BIOS"];

#[test]
fn missing_kernel_is_named() {
    let directory = TempDir::new().unwrap();
    let kernel = directory.path().join("absent");
    refused(&with_kernel(&kernel), &[kernel.to_str().unwrap(), "No such file"]);
}

#[test]
fn missing_initrd_is_named() {
    let directory = TempDir::new().unwrap();
    let kernel = build("hello", directory.path());
    let initrd = directory.path().join("absent");
    let run = run(&["--kernel", kernel.to_str().unwrap(), "--initrd", initrd.to_str().unwrap()]);
    refused(&run, &[initrd.to_str().unwrap(), "No such file"]);
}

#[test]
fn missing_disk_is_named() {
    let directory = TempDir::new().unwrap();
    let disk = directory.path().join("absent");
    refused(&run(&["--disk", disk.to_str().unwrap()]), &[disk.to_str().unwrap(), "No such file"]);
    assert!(!disk.exists(), "it must not be made");
}

#[test]
fn directory_as_kernel_or_disk_is_refused() {
    let directory = TempDir::new().unwrap();
    refused(&with_kernel(directory.path()), &["a directory"]);
    refused_formats(&with_kernel(directory.path()));
    refused(&run(&["--disk", directory.path().to_str().unwrap()]), &["a directory"]);
}

#[test]
fn text_file_as_kernel_is_refused() {
    let directory = TempDir::new().unwrap();
    let run = with_kernel(&write(directory.path(), "text", b"Dear kernel,\nplease start.\n"));
    refused(&run, &["a text file"]);
    refused_formats(&run);
}

#[test]
fn truncated_bzimage_is_refused() {
    let directory = TempDir::new().unwrap();
    let run = with_kernel(&write(directory.path(), "vmlinuz", &bzimage(1 << 20)[..4000]));
    refused(&run, &["truncated", "Linux kernel", "needs 1051136 bytes, the file has 4000"]);
}

#[test]
fn elf_for_another_machine_is_refused() {
    let directory = TempDir::new().unwrap();
    let kernel = build("pvh", directory.path());
    let mut image = std::fs::read(&kernel).unwrap();
    // e_machine: AArch64.
    image[18] = 183;
    let run = with_kernel(&write(directory.path(), "arm", &image));
    refused(&run, &["another machine", "AArch64"]);
    refused_formats(&run);
}

#[test]
fn compressed_openbsd_kernel_says_how_to_unpack_it() {
    let directory = TempDir::new().unwrap();
    refused(&with_kernel(&write(directory.path(), "bsd.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\x03garbage")), &["gzip", "gunzip"]);
}

#[test]
fn kernel_larger_than_the_memory_says_so() {
    let directory = TempDir::new().unwrap();
    let kernel = write(directory.path(), "vmlinuz", &bzimage(8 << 20));
    refused(&run(&["--memory", "4M", "--kernel", kernel.to_str().unwrap()]), &["does not fit", "--memory"]);
}

#[test]
fn impossible_memory_sizes_are_refused() {
    let directory = TempDir::new().unwrap();
    let kernel = build("hello", directory.path());
    let kernel = kernel.to_str().unwrap();
    refused(&run(&["--kernel", kernel, "--memory", "0"]), &["memory"]);
    refused(&run(&["--kernel", kernel, "--memory", "-1"]), &["memory"]);
    refused(&run(&["--kernel", kernel, "--memory", "lots"]), &["memory", "lots"]);
    // More than any host has, less than an address can say.
    refused(&run(&["--kernel", kernel, "--memory", "100000G"]), &["memory"]);
    refused(&run(&["--kernel", kernel, "--memory", "99999999999999999999G"]), &["memory"]);
}

#[test]
fn impossible_processor_counts_are_refused() {
    let directory = TempDir::new().unwrap();
    let kernel = build("hello", directory.path());
    let kernel = kernel.to_str().unwrap();
    for count in ["0", "1000", "65", "-1", "two"] {
        refused(&run(&["--kernel", kernel, "--cpus", count]), &["cpus"]);
    }
}

#[test]
fn disk_of_a_running_machine_is_refused() {
    let directory = TempDir::new().unwrap();
    let disk = boot_disk(directory.path());
    let disk = disk.to_str().unwrap();
    let kernel = build("hlt_off", directory.path());
    let mut first = start(&["run", "--backend", "soft", "--kernel", kernel.to_str().unwrap(), "--disk", disk]);
    let seen = read_until(first.stdout.as_mut().unwrap(), "halting for ever\n");
    let second = run(&["--kernel", kernel.to_str().unwrap(), "--disk", disk]);
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(seen.contains("halting for ever"), "the first machine runs: {seen}");
    refused(&second, &[disk, "in use"]);
}

#[test]
fn corrupt_qcow2_is_refused_and_left_alone() {
    let directory = TempDir::new().unwrap();
    // Magic and version 3, then nonsense.
    let mut image = b"QFI\xfb\0\0\0\x03".to_vec();
    image.resize(4096, 0xa5);
    let disk = write(directory.path(), "disk.qcow2", &image);
    for format in ["", ",format=qcow2"] {
        let run = run(&["--disk", &format!("{}{format}", disk.display())]);
        refused(&run, &[disk.to_str().unwrap(), "qcow2"]);
    }
    assert_eq!(std::fs::read(&disk).unwrap(), image, "nothing is written");
}

#[test]
fn unknown_options_and_values_are_refused() {
    let directory = TempDir::new().unwrap();
    let kernel = build("hello", directory.path());
    let kernel = kernel.to_str().unwrap();
    let disk = boot_disk(directory.path());
    refused(&vmctl(&["run", "--kernel", kernel, "--backend", "magic"]), &["magic"]);
    let cases: [(&[&str], &str); 7] = [
        (&["--kernel", kernel, "--dialect", "klingon"], "klingon"),
        (&["--kernel", kernel, "--serial", "smoke-signals"], "smoke-signals"),
        (&["--kernel", kernel, "--nic", "avian"], "avian"),
        (&["--kernel", kernel, "--nic", "user,mac=zz"], "mac"),
        (&["--kernel", kernel, "--disk", &format!("{},format=vhs", disk.display())], "vhs"),
        (&["--kernel", kernel, "--disk", &format!("{},fast", disk.display())], "fast"),
        (&["--kernel", kernel, "--frobnicate"], "frobnicate"),
    ];
    for (arguments, word) in cases {
        refused(&run(arguments), &[word]);
    }
}

#[test]
fn options_that_the_kernel_cannot_take_are_refused() {
    let directory = TempDir::new().unwrap();
    let openbsd = build("openbsd", directory.path());
    let openbsd = openbsd.to_str().unwrap();
    refused(&run(&["--kernel", openbsd, "--initrd", openbsd]), &["OpenBSD", "--initrd"]);
    refused(&run(&["--kernel", openbsd, "--cmdline", "console=ttyS0"]), &["OpenBSD", "--cmdline"]);
}

#[test]
fn initrd_without_kernel_is_refused() {
    refused(&run(&["--initrd", "/dev/null"]), &["--kernel"]);
}

#[test]
fn impossible_dialects_are_refused_with_those_there_are() {
    refused(&run(&["--dialect", "klingon"]), &["klingon", "kvm, vmware, openbsd", "vmware+kvmclock", "all"]);
    refused(&run(&["--dialect", "kvm,kvm"]), &["kvm", "twice"]);
    refused(&run(&["--dialect", "kvm,all"]), &["all", "stands alone"]);
    refused(&run(&["--dialect", ""]), &["dialect"]);
    refused(&run(&["--uuid", "42"]), &["42", "UUID"]);
}

#[test]
fn keys_that_cannot_be_set_are_refused_before_the_guest_starts() {
    let directory = TempDir::new().unwrap();
    let large = directory.path().join("large");
    std::fs::File::create(&large).unwrap().set_len((1 << 20) + 1).unwrap();
    let large = format!("a=@{}", large.display());
    let cases: [(&str, &[&str]); 8] = [
        ("hostname", &["hostname", "KEY=VALUE"]),
        ("=value", &["empty key"]),
        ("a=@", &["lacks a file", "@@"]),
        ("a=@/nonexistent/file", &["/nonexistent/file", "No such file"]),
        ("a=@/", &["directory"]),
        ("data//x=1", &["data//x", "not a path"]),
        ("data/a b=1", &["data/a b", "not a path"]),
        (&large, &["larger", "1048576 bytes"]),
    ];
    for (assignment, words) in cases {
        refused(&run(&["--kv", assignment]), words);
    }
}

#[test]
fn files_for_the_end_are_tried_at_the_start() {
    let directory = TempDir::new().unwrap();
    refused(&run(&["--kv-out", directory.path().to_str().unwrap()]), &["--kv-out", "directory"]);
    refused(&run(&["--kv-out", "/nonexistent/store.json"]), &["--kv-out", "/nonexistent/store.json", "No such file"]);
}

#[test]
fn impossible_firmware_files_are_refused() {
    refused(&run(&["--fw-cfg", "opt/a"]), &["opt/a", "name=opt/NAME,file=FILE"]);
    refused(&run(&["--fw-cfg", "name=etc/e820,string=x"]), &["opt/"]);
    refused(&run(&["--fw-cfg", "name=opt/a,file=/nonexistent/file"]), &["/nonexistent/file", "No such file"]);
}

#[test]
fn verbs_for_a_running_machine_want_its_socket_and_their_arguments() {
    let cases: [(&[&str], &str); 12] = [
        (&["status"], "--control"),
        (&["status", "--control", "/nonexistent/control"], "no such socket"),
        (&["stop", "--control", "/dev/null"], "not a socket"),
        (&["stop", "--control", "c", "--via", "telepathy"], "auto, acpi, vmware, openbsd"),
        (&["stop", "--control", "c", "--wait", "-1"], "seconds"),
        (&["stop", "--control", "c", "--wait", "nan"], "seconds"),
        (&["sync", "--control", "c", "--via", "sundial"], "sundial"),
        (&["kv"], "get"),
        (&["kv", "get", "--control", "c", ""], "empty key"),
        (&["kv", "set", "--control", "c", "key"], "VALUE"),
        (&["kv", "set", "--control", "c", "key", "value", "-i", "file"], "-i"),
        (&["kv", "watch", "--control", "c", "key", "--count", "0"], "count"),
    ];
    for (arguments, word) in cases {
        let run = vmctl(arguments);
        run.expect(EXIT_ERROR, &[]);
        assert!(run.errors.contains(word), "no «{word}» in:\n{run}");
    }
    let long = format!("/tmp/{}", "x".repeat(200));
    refused(&run(&["--control", &long]), &["at most 107 bytes"]);
}

fn run(arguments: &[&str]) -> Run {
    let mut all = vec!["run", "--backend", "soft"];
    all.extend_from_slice(arguments);
    vmctl(&all)
}

fn with_kernel(kernel: &Path) -> Run {
    run(&["--kernel", kernel.to_str().unwrap()])
}

/// Status 1, nothing on the guest's serial port, and a message of at most a few lines with these words.
#[track_caller]
fn refused(run: &Run, words: &[&str]) {
    run.expect(EXIT_ERROR, &[]);
    assert_eq!(run.output, "", "{run}");
    for word in words {
        assert!(run.errors.contains(word), "no «{word}» in:\n{run}");
    }
    assert!(run.errors.lines().count() <= 8, "a message, not a dump: {run}");
}

#[track_caller]
fn refused_formats(run: &Run) {
    for format in FORMATS {
        assert!(run.errors.contains(format), "{format} is not named:\n{run}");
    }
}

/// The header of a bzImage (Linux Documentation/arch/x86/boot.rst) with a protected-mode part of so many zeros.
fn bzimage(size: usize) -> Vec<u8> {
    let mut image = vec![0; 5 * 512 + size];
    image[0x1f1] = 4;
    image[0x1f4..0x1f8].copy_from_slice(&(size as u32 / 16).to_le_bytes());
    image[0x1fe..0x202].copy_from_slice(&[0x55, 0xaa, 0xeb, 0x6a]);
    image[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
    image[0x211] = 1;
    image
}
