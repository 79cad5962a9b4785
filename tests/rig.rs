//! A real KVM for the KVM backend, on a machine that may have none.
//!
//! QEMU's TCG emulates AMD's SVM with nested paging; a Linux in it has a complete `/dev/kvm`. These tests pack Debian's kernel modules and
//! our programs, linked statically, into an initrd, boot it, and read what they say on the serial port. The kernel and its modules are in
//! `PVBUS_GUEST_DIR` (default `target/guest`, where `./test` puts them); QEMU and busybox are Debian's packages `qemu-system-x86` and
//! `busybox-static`. What is missing is said, and then the tests are skipped.

#[path = "common/program.rs"]
mod program;

mod rig {
    pub mod boot;
    pub mod initrd;
}

use std::time::Duration;

use rig::boot::{Rig, read};

#[test]
fn directed_tests_of_the_kvm_backend_pass_on_a_real_kvm() {
    let Some(rig) = Rig::find() else { return };
    let mut initrd = rig.initrd_with_kvm();
    initrd.file("rig", 0o755, &read(&rig.program("examples/rig")));
    initrd.script("/rig\necho rig status $?");
    let output = rig.boot(&initrd, 512, Duration::from_secs(300));
    let failed: Vec<&str> = output.lines().filter(|line| line.contains("FAIL ")).collect();
    let passed = output.lines().filter(|line| line.starts_with("PASS ")).count();
    println!("{passed} directed tests passed");
    assert!(failed.is_empty() && output.contains("rig status 0"), "in the rig:\n{}\n\nall it said:\n{output}", failed.join("\n"));
    assert!(passed > 20, "only {passed} tests ran:\n{output}");
}

#[test]
fn debian_kernel_boots_on_the_kvm_backend() {
    let Some(rig) = Rig::find() else { return };
    let mut initrd = rig.initrd_with_kvm();
    initrd.file("vmctl", 0o755, &read(&rig.program("vmctl")));
    initrd.file("vmlinuz", 0o644, &read(&rig.kernel));
    initrd.file("guest.gz", 0o644, &read(&rig.guest.join("initrd-busybox.gz")));
    initrd.script(
        "/vmctl run --backend kvm --memory 256M --kernel /vmlinuz --initrd /guest.gz --cmdline 'console=ttyS0 panic=-1 test=clocks steal=1' --stats </dev/null\n\
         echo vmctl status $?",
    );
    let output = rig.boot(&initrd, 1024, Duration::from_secs(900));
    for wanted in
        ["vmm0 at mainbus0: SVM/RVI", "Hypervisor detected: KVM", "INIT REACHED", "CLOCKSOURCE kvm-clock", "STEAL ", "vmctl status 0"]
    {
        assert!(output.contains(wanted), "`{wanted}` is not in what the rig said:\n{output}");
    }
}
