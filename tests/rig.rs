//! A real KVM for the KVM backend, on a machine that may have none.
//!
//! QEMU's TCG emulates AMD's SVM with nested paging; a Linux in it has a complete `/dev/kvm`. This test packs Debian's kernel modules and
//! `crates/kvm/examples/rig`, linked statically, into an initrd, boots it, and reads the program's `PASS` and `FAIL` lines from the serial
//! port. The kernel and its modules are in `PVBUS_GUEST_DIR` (default `target/guest`, where `./test` puts them); QEMU and busybox are Debian's
//! packages `qemu-system-x86` and `busybox-static`. What is missing is said, and then the test is skipped.

mod rig {
    pub mod boot;
    pub mod initrd;
}

use std::path::Path;
use std::time::Duration;

use rig::boot::{Rig, build_static};

#[test]
fn directed_tests_of_the_kvm_backend_pass_on_a_real_kvm() {
    let Some(rig) = Rig::find() else { return };
    let program = build_static(&["-p", "kvm", "--example", "rig"], Path::new("examples/rig"));
    let mut initrd = rig.initrd_with_kvm();
    initrd.file("rig", 0o755, &std::fs::read(program).expect("the program just built"));
    initrd.script(
        "/rig\n\
         echo rig status $?",
    );
    let output = rig.boot(&initrd, 512, Duration::from_secs(180));
    let failed: Vec<&str> = output.lines().filter(|line| line.contains("FAIL ")).collect();
    let passed = output.lines().filter(|line| line.starts_with("PASS ")).count();
    println!("{passed} directed tests passed");
    assert!(failed.is_empty() && output.contains("rig status 0"), "in the rig:\n{}\n\nall it said:\n{output}", failed.join("\n"));
    assert!(passed > 20, "only {passed} tests ran:\n{output}");
}
