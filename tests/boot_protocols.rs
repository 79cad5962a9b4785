//! Each boot protocol with a guest of ours, and Linux by each of its entries, whole machine, on the software CPU. And guests
//! that misbehave.

// Tests fail by panicking; the lint knows only functions marked as tests.
#![allow(clippy::unwrap_used)]

#[path = "common/mod.rs"]
mod common;
mod guests;

use std::path::Path;
use std::time::Duration;

use guests::{EXIT_DIED, EXIT_OK, Run, boot_disk, build, processor_time, read_until, run_soft, start, vmctl, wait, write};
use tempfile::TempDir;

#[test]
fn multiboot_guest_reads_its_command_line_and_modules() {
    let directory = TempDir::new().unwrap();
    let kernel = build("hello", directory.path());
    let module = write(directory.path(), "module", b"contents of the module");
    let first = format!("{} first argument", module.display());
    let run = run_soft(&kernel, &["--cmdline", "one two", "--initrd", &first, "--initrd", module.to_str().unwrap()]);
    run.expect(
        EXIT_OK,
        &[
            "hello from protected mode\n",
            &format!("command line: {} one two\n", kernel.display()),
            "memory: 523264 KiB above 1 MiB\n",
            &format!("module: {first} holds contents of the module\n"),
            &format!("module: {} holds contents of the module\n", module.display()),
        ],
    );
    assert!(run.errors.contains("multiboot 1 kernel"), "what was recognised is printed: {run}");
}

#[test]
fn guest_walks_through_all_modes() {
    let directory = TempDir::new().unwrap();
    let run = run_soft(&build("longmode", directory.path()), &[]);
    run.expect(
        EXIT_OK,
        &["protected mode\nreal mode\nunreal mode reached above 1 MiB\nprotected mode again\ncompatibility mode\nlong mode\n"],
    );
}

#[test]
fn pvh_guest_finds_start_info() {
    let directory = TempDir::new().unwrap();
    let kernel = build("pvh", directory.path());
    let module = write(directory.path(), "module", b"contents");
    let run = run_soft(&kernel, &["--cmdline", "one two", "--initrd", &format!("{} argument", module.display())]);
    run.expect(EXIT_OK, &["hello from a PVH entry\n", "command line: one two\n", "RSDP: RSD PTR \n", "module: argument holds contents\n"]);
}

/// Debian's kernel as it is, but with the flag of its 64-bit entry cleared (xloadflags of the boot protocol, XLF_KERNEL_64).
#[test]
fn debian_kernel_starts_by_its_32_bit_entry() {
    let directory = TempDir::new().unwrap();
    let mut image = std::fs::read(common::guest("vmlinuz")).unwrap();
    image[0x236] &= !1;
    let run = run_debian(&write(directory.path(), "vmlinuz", &image));
    assert!(run.errors.contains("32-bit entry at 0x200000"), "{run}");
}

/// The ELF file inside it, by its PVH note.
#[test]
fn debian_kernel_starts_by_its_pvh_entry() {
    let directory = TempDir::new().unwrap();
    let image = std::fs::read(common::guest("vmlinuz")).unwrap();
    let run = run_debian(&write(directory.path(), "vmlinux", &guests::vmlinux::unpack(&image)));
    assert!(run.errors.contains("ELF kernel with PVH note"), "{run}");
}

/// Boots to the init script and off again.
#[track_caller]
fn run_debian(kernel: &Path) -> Run {
    let initrd = common::guest("initrd-busybox.gz");
    let options = ["--initrd", initrd.to_str().unwrap(), "--cmdline", "console=ttyS0 panic=-1"];
    let run = run_soft(kernel, &options);
    run.expect(0, &["Linux version", "INIT REACHED", "reboot: Power down"]);
    run
}

#[test]
fn openbsd_guest_finds_its_boot_arguments() {
    let directory = TempDir::new().unwrap();
    let run = run_soft(&build("openbsd", directory.path()), &["--cmdline", "-s", "--memory", "64M"]);
    run.expect(
        EXIT_OK,
        &[
            "boothowto 00000002, bootdev a0000004, version 0000000e\n",
            "memory 00000000 size 0009fc00\n",
            "memory 00100000 size 03f00000\n",
            "console device 00000800 port 000003f8 speed 115200\n",
            "random bytes are there\n",
        ],
    );
}

#[test]
fn boot_sector_starts_by_seabios_from_a_virtio_disk() {
    let directory = TempDir::new().unwrap();
    let disk = boot_disk(directory.path());
    let disk = format!("{},format=raw", disk.display());
    let run = vmctl(&["run", "--backend", "soft", "--debug-exit", "--no-reboot", "--disk", &disk]);
    run.expect(
        EXIT_OK,
        &["SeaBIOS", "greetings through the BIOS", "hello from the boot sector\n", "hello from the second sector\n", "memory map found\n"],
    );
}

#[test]
fn two_processors_count_at_once_and_lose_nothing() {
    let directory = TempDir::new().unwrap();
    let run = run_soft(&build("smp", directory.path()), &["--cpus", "2"]);
    run.expect(EXIT_OK, &["processors: 2, APIC ids:00000002\n", "atomic: 100000, under a lock: 100000\n"]);
}

#[test]
fn triple_fault_ends_with_status_3_and_a_register_dump() {
    let directory = TempDir::new().unwrap();
    let run = run_soft(&build("triple", directory.path()), &[]);
    run.expect(EXIT_DIED, &["about to fault three times\n"]);
    assert!(run.errors.contains("triple fault") && run.errors.contains("rip"), "{run}");
}

#[test]
fn jump_into_nothing_ends_with_status_3() {
    let directory = TempDir::new().unwrap();
    let run = run_soft(&build("nowhere", directory.path()), &[]);
    run.expect(EXIT_DIED, &["jumping into nothing\n"]);
    assert!(run.errors.contains("rip"), "{run}");
}

#[test]
fn halt_with_interrupts_off_sleeps_until_it_is_ended() {
    let directory = TempDir::new().unwrap();
    let kernel = build("hlt_off", directory.path());
    let mut child = start(&["run", "--backend", "soft", "--kernel", kernel.to_str().unwrap()]);
    let seen = read_until(child.stdout.as_mut().unwrap(), "halting for ever\n");
    assert!(seen.contains("halting for ever"), "{seen}");
    let before = processor_time(child.id());
    assert_eq!(wait(&mut child, Duration::from_secs(1)), None, "it must not end by itself");
    let used = processor_time(child.id()) - before;
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(used < 0.2, "a halted machine used {used} seconds of processor time in one second");
}

#[test]
fn garbage_everywhere_hurts_only_the_guest() {
    let directory = TempDir::new().unwrap();
    let kernel = build("garbage", directory.path());
    let disk = format!("{},format=raw", boot_disk(directory.path()).display());
    for seed in ["1", "2", "3"] {
        let run = run_soft(&kernel, &["--cmdline", seed, "--disk", &disk, "--testdev", "--cpus", "2"]);
        run.expect_no_panic();
        for line in
            ["garbage begins", "model-specific registers: ", "interrupt controllers and timers done", "PCI devices: ", "garbage ends"]
        {
            assert!(run.output.contains(line), "no «{line}» in:\n{run}");
        }
        // After its last message it writes to what may reset the machine or turn it off.
        assert!(matches!(run.status, Some(0 | EXIT_DIED | EXIT_OK)), "{run}");
    }
}
