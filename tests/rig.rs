//! A real KVM on a machine that may have none: for our KVM backend, and for our guest under a monitor that is not ours.
//!
//! QEMU's TCG emulates AMD's SVM with nested paging; a Linux in it has a complete `/dev/kvm`. These tests pack Debian's kernel modules and
//! our programs, linked statically, or Debian's QEMU into an initrd, boot it, and read what they say on the serial port. The kernel and
//! its modules are in `PVBUS_GUEST_DIR` (default `target/guest`, where `./test` puts them); QEMU and busybox are Debian's packages
//! `qemu-system-x86` and `busybox-static`. What is missing is said, and then the tests are skipped.

#[path = "common/program.rs"]
mod program;

mod rig {
    pub mod boot;
    pub mod initrd;
    pub mod qemu;
}

use std::time::Duration;

use rig::boot::{Rig, read};
use rig::qemu;

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
    assert_has(
        &output,
        &["vmm0 at mainbus0: SVM/RVI", "Hypervisor detected: KVM", "INIT REACHED", "CLOCKSOURCE kvm-clock", "STEAL ", "vmctl status 0"],
        &output,
    );
}

/// What KVM has of Hyper-V, as far as this KVM has it all: QEMU refuses to start with what it has not.
const HYPERV: &str = "host,hv-relaxed,hv-vapic,hv-vpindex,hv-synic,hv-time,hv-stimer,hv-stimer-direct,hv-runtime,hv-reset,hv-crash,hv-frequencies,\
    hv-tlbflush,hv-ipi,hv-reenlightenment,hv-xmm-input";
/// What KVM tells of hypercalls and of the interrupts of the synthetic controller.
const KVM_EVENTS: &str = "kvm_hv_hypercall kvm_hv_hypercall_done kvm_hv_synic_set_irq";

/// The embedded guest against Hyper-V by KVM and QEMU, which have no line of ours: what the guest says, what QEMU's VMBus got, what KVM did.
#[test]
fn embedded_guest_uses_hyperv_of_kvm_and_qemu() {
    let Some(rig) = Rig::find() else { return };
    let mut initrd = rig.initrd_with_kvm();
    qemu::add(&mut initrd);
    initrd.file("guest", 0o644, embedded::GUEST);
    initrd.script(&format!(
        "mount -t tracefs tracefs /sys/kernel/tracing
         for event in {KVM_EVENTS}; do echo 1 >/sys/kernel/tracing/events/kvm/$event/enable; done
         dmesg | grep 'tsc: .*MHz' | tail -n 1
         for command in pvbus clock 'sleep 5' clock interrupts reboot dmesg poweroff; do echo $command; done |
             machine hyperv -M pc -cpu {HYPERV} -device vmbus-bridge -trace 'vmbus_*' -D /trace -kernel /guest -append prompt
         sed 's/^/QEMU: /' /trace
         sed 's/^.*: kvm_hv/KVM: kvm_hv/' /sys/kernel/tracing/trace
         for command in pvbus clock 'sleep 5' clock reboot; do echo $command; done |
             machine kvm -M q35 -cpu host -no-reboot -kernel /guest -append prompt
         for command in pvbus 'hostctl -f /dev/pvbus1 External/greeting' poweroff; do echo $command; done |
             machine renamed -M q35 -cpu host,hv-passthrough -device vmbus-bridge -no-reboot -kernel /guest -append prompt
         for command in pvbus poweroff; do echo $command; done |
             machine busless -M pc -cpu host,hv-vpindex,hv-synic -no-reboot -kernel /guest -append prompt"
    ));
    let output = rig.boot(&initrd, 1024, Duration::from_secs(600));

    let hyperv = said_by("hyperv", &output);
    let tree = "mainbus0\n  pvbus0\n    pvclock0\n    hyperv0\n/dev/pvbus0: KVM, leaves 0x40000100 to 0x40000101\n";
    assert_has(
        hyperv,
        &[
            "pvbus0 at mainbus0: KVM, Hyper-V 10.0\npvclock0 at pvbus0\nhyperv0 at pvbus0: protocol 4.0, features 0x",
            tree,
            "/dev/pvbus1: Hyper-V, leaves 0x40000000 to 0x40000005, version 10.0, has a store\n",
            "    shown by KVM, which is present too\n",
            "machine hyperv ended with status 0\n",
        ],
        &output,
    );
    // At the start and after the reboot, and by what dmesg keeps of the latter.
    assert_eq!(hyperv.matches("hyperv0 at pvbus0: protocol 4.0").count(), 3, "{output}");
    assert!(value(hyperv, "upcall") > 0.0, "the synthetic interrupt controller interrupts:\n{output}");
    let [before, after] = clocks(hyperv);
    for clocks in [&before, &after] {
        // They were read in this order.
        assert!(clocks.pvclock - 0.01 < clocks.counter && clocks.counter <= clocks.page, "{clocks:?}:\n{output}");
    }
    for (name, passed) in [
        ("time-stamp counter", after.uptime - before.uptime),
        ("reference counter", after.counter - before.counter),
        ("reference TSC page", after.page - before.page),
    ] {
        assert_agree(name, passed, after.pvclock - before.pvclock, &output);
    }

    // What QEMU has got, and what it has answered: twice a contact by version 4.1 and 4.0, a request of offers, of which there are none, and an end.
    let boots = |messages: [u32; 4]| messages.repeat(2);
    assert_eq!(numbers(&output, "QEMU: vmbus_recv_message type "), boots([14, 14, 3, 16]), "{output}");
    assert_eq!(numbers(&output, "QEMU: vmbus_post_msg type "), boots([15, 15, 4, 17]), "{output}");
    let contacts: Vec<&str> = output.lines().filter_map(|line| line.strip_prefix("QEMU: vmbus_initiate_contact version ")).collect();
    assert!(contacts.len() == 4 && contacts[0].starts_with("4.1 target vp 0 ") && contacts[1].starts_with("4.0 target vp 0 "), "{output}");
    assert!(!output.contains("QEMU: vmbus_send_offer"), "{output}");
    // The connection of versions 5.0 to 5.3 does not exist there (HV_STATUS_INVALID_CONNECTION_ID), and everything else is taken.
    assert_eq!(output.matches("KVM: kvm_hv_hypercall: code 0x5c slow").count(), 16, "{output}");
    let answers: Vec<&str> = output.lines().filter_map(|line| line.strip_prefix("KVM: kvm_hv_hypercall_done: result ")).collect();
    assert_eq!(answers, ["0x12", "0x12", "0x12", "0x12", "0x0", "0x0", "0x0", "0x0"].repeat(2), "{output}");
    assert_eq!(output.matches("KVM: kvm_hv_synic_set_irq: vcpu_id 0 sint 2 vector 49 ret 1\n").count(), 8, "{output}");

    let kvm = said_by("kvm", &output);
    assert_has(
        kvm,
        &["pvbus0 at mainbus0: KVM\npvclock0 at pvbus0\n", "/dev/pvbus0: KVM, leaves 0x40000000 to ", "machine kvm ended with status 0\n"],
        &output,
    );
    let [before, after] = clocks(kvm);
    assert_agree("time-stamp counter", after.uptime - before.uptime, after.pvclock - before.pvclock, &output);

    // As KVM shows itself, when QEMU does not give it Hyper-V's name.
    let renamed = said_by("renamed", &output);
    assert_has(
        renamed,
        &[
            "pvbus0 at mainbus0: KVM, Linux KVM Hv\npvclock0 at pvbus0\nhyperv0 at pvbus0: protocol 4.0, features 0x",
            "/dev/pvbus1: Linux KVM Hv, leaves 0x40000000 to ",
            "machine renamed ended with status 0\n",
        ],
        &output,
    );

    // As QEMU is started for Windows.
    let busless = said_by("busless", &output);
    assert_has(
        busless,
        &[
            "hyperv0 at pvbus0: not attached: the host has no VMBus behind this interface\n",
            "mainbus0\n  pvbus0\n    pvclock0\n/dev/pvbus0: KVM, ",
            "machine busless ended with status 0\n",
        ],
        &output,
    );

    // Nobody had to measure: the frequency is the one that the kernel of the rig has for its KVM.
    let rigs = output.lines().find(|line| line.contains("tsc: ")).map(|line| number_before(line, " MHz"));
    for said in [hyperv, kvm, renamed, busless] {
        let line = said.lines().find(|line| line.starts_with("cpu0 at mainbus0: ")).unwrap_or_else(|| panic!("{output}"));
        let hz = number_before(line, " MHz");
        assert!(rigs.is_some_and(|rigs| (rigs - hz).abs() < rigs / 1000.0), "{rigs:?} MHz in the rig, {hz} in its guest:\n{output}");
    }
}

/// All of these are in what somebody said, which is a part of the rig's output.
#[track_caller]
fn assert_has(said: &str, all: &[&str], output: &str) {
    for wanted in all {
        assert!(said.contains(wanted), "`{wanted}` is not in what the rig said:\n{output}");
    }
}

/// What a machine in the rig said.
fn said_by<'a>(machine: &str, output: &'a str) -> &'a str {
    let start = format!("machine {machine} starts\n");
    let end = format!("machine {machine} ended with status ");
    let from = output.find(&start).unwrap_or_else(|| panic!("machine {machine} did not start:\n{output}")) + start.len();
    let to = output[from..].find(&end).unwrap_or_else(|| panic!("machine {machine} did not end:\n{output}"));
    let line = output[from + to..].find('\n').map_or(output.len(), |line| from + to + line + 1);
    &output[from..line]
}

/// An answer to `clock`, in seconds.
#[derive(Debug)]
struct Clocks {
    uptime: f64,
    pvclock: f64,
    /// Hyper-V's, or not a number.
    counter: f64,
    page: f64,
}

/// The first two answers to `clock`.
fn clocks(said: &str) -> [Clocks; 2] {
    let mut answers = said.split("pvbus# clock\n").skip(1).map(|answer| Clocks {
        uptime: value(answer, "uptime"),
        pvclock: value(answer, "pvclock0"),
        counter: number_before(answer, " s by the reference counter"),
        page: number_before(answer, " s by the TSC page"),
    });
    [(); 2].map(|()| answers.next().unwrap_or_else(|| panic!("`clock` was not answered twice:\n{said}")))
}

/// Time that has passed by two clocks, which were read one after the other on a machine that may be busy.
fn assert_agree(name: &str, passed: f64, pvclock: f64, output: &str) {
    assert!(pvclock >= 4.9 && (passed - pvclock).abs() < 1.0, "{passed} s by the {name}, {pvclock} by pvclock:\n{output}");
}

/// The number behind a name at the beginning of a line.
fn value(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.split_ascii_whitespace().next()?.parse().ok()).unwrap_or(f64::NAN)
}

/// The number before the first of these words.
fn number_before(text: &str, words: &str) -> f64 {
    let number = text.split_once(words).and_then(|(before, _)| before.rsplit(' ').next()?.parse().ok());
    number.unwrap_or(f64::NAN)
}

/// The numbers behind the beginning of all lines that begin so.
fn numbers(output: &str, beginning: &str) -> Vec<u32> {
    let words = output.lines().filter_map(|line| line.strip_prefix(beginning)?.split(' ').next());
    words.map(|word| word.parse().unwrap_or(u32::MAX)).collect()
}
