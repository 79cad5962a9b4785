//! The VMware dialect as Debian's own guest tools see it: open-vm-tools and cloud-init, unmodified.

// Helpers of tests are outside of what clippy takes for one.
#![allow(clippy::unwrap_used)]

#[path = "common/mod.rs"]
mod common;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Machine, Run, copy_sparse, guest, run};

/// A whole Debian with cloud-init's Python on the software CPU.
const SYSTEM_PATIENCE: Duration = Duration::from_secs(1200);
const PATIENCE: Duration = Duration::from_secs(120);

/// What cloud-init is told; it is Debian's DataSourceVMware that reads these keys.
const METADATA: &str = "instance-id: one\nlocal-hostname: named-by-metadata\n";
const USERDATA: &str = "#cloud-config\nwrite_files:\n- path: /root/from-user-data\n  content: told by user data\n";

fn vmctl(socket: &Path, arguments: &[&str]) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    command.args(arguments).arg("--control").arg(socket);
    run(command, PATIENCE)
}

#[test]
fn open_vm_tools_and_cloud_init_use_the_store_and_obey_the_host() {
    let work = tempfile::tempdir_in(guest("")).unwrap();
    let path = |name: &str| work.path().join(name);
    let (disk, socket, out) = (path("disk.raw"), path("control"), path("store.json"));
    copy_sparse(&guest("debian.raw"), &disk);
    let long: String = (0..40_000).map(|n| char::from(b'a' + (n % 26) as u8)).collect();
    for (name, content) in [("metadata", METADATA), ("userdata", USERDATA), ("long", &long)] {
        std::fs::write(path(name), content).unwrap();
    }

    let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    command.args(["run", "--backend", "soft", "--dialect", "vmware", "--nic", "user", "--kv", "guestinfo.x=of the host"]);
    for name in ["metadata", "userdata", "long"] {
        command.arg("--kv").arg(format!("guestinfo.{name}=@{}", path(name).display()));
    }
    command.args(["--cmdline", "console=ttyS0 test=root selftest=vmware"]);
    command.arg("--kernel").arg(guest("vmlinuz")).arg("--initrd").arg(guest("initrd-root.gz"));
    command.arg("--disk").arg(&disk).arg("--control").arg(&socket).arg("--kv-out").arg(&out);
    let mut machine = Machine::start(command);

    machine.wait_for("Hypervisor detected: VMware", SYSTEM_PATIENCE);
    machine.wait_for("SELFTEST READY", SYSTEM_PATIENCE);
    // vmtoolsd reports by itself what it sees; it started before the guest had an address.
    let until = Instant::now() + PATIENCE;
    let address = loop {
        let address = vmctl(&socket, &["kv", "get", "guestinfo.ip"]);
        assert_eq!(address.status, Some(0), "{address}");
        if !address.output.trim().is_empty() || Instant::now() > until {
            break address;
        }
        std::thread::sleep(Duration::from_secs(1));
    };
    let stop = vmctl(&socket, &["stop", "--via", "vmware"]);
    assert_eq!(stop.status, Some(0), "{stop}");
    let run = machine.end(SYSTEM_PATIENCE);
    run.expect(&["reboot: Power down"]);

    assert_eq!(run.value("SELFTEST VIRT"), "vmware", "{run}");
    assert_eq!(run.value("SELFTEST CHECKVM"), "VMware software version 6 (good)", "{run}");
    assert_eq!(run.value("SELFTEST RPCTOOL GET"), "of the host", "{run}");
    assert_eq!(run.value("SELFTEST RPCTOOL BACK"), "written by rpctool", "{run}");
    assert_eq!(run.value("SELFTEST RPCTOOL MISSING"), "No value found", "{run}");
    assert_eq!(run.value("SELFTEST VMTOOLSD GET"), "of the host", "{run}");
    assert_eq!(run.value("SELFTEST CLOUD-INIT"), "vmware named-by-metadata told by user data", "{run}");
    assert_eq!(run.value("SELFTEST TOOLS"), "active", "{run}");
    let guest_address = run.value("SELFTEST ADDRESS").split('/').next().unwrap();
    assert_eq!(address.output.trim(), guest_address, "{run}");
    // The store outlives the machine in the file.
    let store: serde_json::Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
    let text = store.to_string();
    for written in ["written by rpctool", "written by vmtoolsd"] {
        assert!(text.contains(written), "{text}");
    }
}
