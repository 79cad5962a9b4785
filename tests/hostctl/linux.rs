//! Debian's kernel, with hostctl in its initial RAM disk: on QEMU's machine, and on ours.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::common::{guest, run};
use crate::initrd::Initrd;
use crate::script::{expect, script};
use crate::{c_program, hostctl};

/// Up in seconds when nothing else runs.
const PATIENCE: Duration = Duration::from_secs(300);

/// An initial RAM disk in `directory` that loads `modules`, runs `commands` and powers off.
fn initrd(directory: &Path, modules: &[&str], commands: &[(&str, &str, i32)]) -> PathBuf {
    let mut initrd = Initrd::default();
    for name in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
        initrd.directory(name);
    }
    initrd.file("bin/busybox", 0o755, &std::fs::read("/bin/busybox").unwrap());
    initrd.file("etc/passwd", 0o644, b"root::0:0::/:/bin/sh\nnobody::65534:65534::/:/bin/sh\n");
    initrd.file("bin/hostctl", 0o755, &std::fs::read(hostctl()).unwrap());
    initrd.file("bin/pvbus", 0o755, &std::fs::read(c_program(directory)).unwrap());
    initrd.script(
        "/bin/busybox --install -s /bin\nexport PATH=/bin\nmount -t proc proc /proc\nmount -t sysfs sys /sys\nmount -t devtmpfs dev /dev",
    );
    for module in modules {
        let file = Path::new(module).file_name().unwrap().to_str().unwrap();
        initrd.file(file, 0o644, &std::fs::read(guest_module(module)).unwrap());
        initrd.script(&format!("insmod /{file}"));
    }
    let commands: Vec<&str> = commands.iter().map(|(command, _, _)| *command).collect();
    initrd.script(&script(&commands));
    let path = directory.join("initrd");
    std::fs::write(&path, initrd.finish()).unwrap();
    path
}

/// A module of the guests' kernel, by its path below `kernel/`.
fn guest_module(path: &str) -> PathBuf {
    let versions = std::fs::read_dir(guest("lib/modules")).unwrap().flatten();
    let mut found = versions.map(|version| version.path().join("kernel").join(path)).filter(|module| module.exists());
    found.next().unwrap_or_else(|| panic!("the guests' kernel has no module {path}"))
}

/// Commands on QEMU's machine with files of `-fw_cfg`.
const FW_CFG: &[(&str, &str, i32)] = &[
    ("hostctl -t", "/dev/pvbus0: QEMU TCG", 0),
    ("hostctl opt/org.pvbus/x", "a value", 0),
    ("hostctl get opt/org.pvbus/x", "a value", 0),
    ("hostctl -f fw_cfg -t", "fw_cfg: QEMU fw_cfg", 0),
    ("hostctl -f fw_cfg ls opt/org.pvbus", "big\nx", 0),
    ("hostctl --raw opt/org.pvbus/big | md5sum", "759b667ca712df5f43993b6618607e3b  -", 0),
    ("hostctl ls | grep -x opt", "opt", 0),
    ("hostctl opt/org.pvbus/none", "hostctl: ioctl: No such file or directory", 1),
    ("hostctl get opt/org.pvbus/none", "hostctl: opt/org.pvbus/none: there is no such key", 3),
    (
        "hostctl set opt/org.pvbus/x other",
        "hostctl: opt/org.pvbus/x: the store has no such operation (fw_cfg files are named as by_name in sysfs shows them; they can only be \
         read, by root, and never change)",
        1,
    ),
    ("hostctl --explain get opt/org.pvbus/x 2>&1 | grep way", "hostctl: way: files in /sys/firmware/qemu_fw_cfg", 0),
    (
        "su nobody -s /bin/sh -c 'hostctl get opt/org.pvbus/x'",
        "hostctl: opt/org.pvbus/x: the host does not allow it (fw_cfg files are named as by_name in sysfs shows them; they can only be \
         read, by root, and never change)",
        5,
    ),
    // QEMU's machine has a backdoor that tells its version and nothing else. Nothing in CPUID says so, but it was asked for.
    (
        "su nobody -s /bin/sh -c 'hostctl -f vmware get x'",
        "hostctl: VMware's backdoor port is closed to programs here, only root opens it",
        5,
    ),
    (
        "hostctl --explain -f vmware get x 2>&1 | head -n 2",
        "hostctl: store: VMware\nhostctl: way: GuestRPC by the backdoor at port 0x5658, opened by ioperm(2)",
        0,
    ),
    ("hostctl -f vmware get x", "hostctl: x: the way to the host failed: the host refused a step of the protocol", 6),
    (
        "hostctl -f /dev/pvbus1 x",
        "hostctl: open: /dev/pvbus1: No such device\nhostctl: /dev/pvbus1: no such interface, there is QEMU TCG (/dev/pvbus0)",
        1,
    ),
];

#[test]
fn fw_cfg_files_of_qemu_are_read_and_listed() {
    let directory = tempfile::tempdir().unwrap();
    let big = directory.path().join("big");
    // Its checksum is above.
    let bytes: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(&big, bytes).unwrap();
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "pc,vmport=on", "-accel", "tcg", "-cpu", "max", "-m", "256", "-nographic", "-no-reboot"]);
    qemu.arg("-kernel").arg(guest("vmlinuz")).args(["-append", "console=ttyS0 quiet panic=-1"]);
    qemu.arg("-initrd").arg(initrd(directory.path(), &["drivers/firmware/qemu_fw_cfg.ko"], FW_CFG));
    qemu.args(["-fw_cfg", "name=opt/org.pvbus/x,string=a value", "-fw_cfg"]).arg(format!("name=opt/org.pvbus/big,file={}", big.display()));
    expect(&run(qemu, PATIENCE), FW_CFG);
}

/// Why VMware's store refuses.
macro_rules! vmware_rules {
    ($before:literal) => {
        concat!(
            $before,
            " (VMware's keys begin with guestinfo. and have no blanks; they cannot be listed or removed; key and value are 64 KiB at most)"
        )
    };
}

/// Commands on our machine with VMware's interface before KVM's.
const VMWARE: &[(&str, &str, i32)] = &[
    (
        "hostctl detect | cut -c1-47",
        "/dev/pvbus1  VMware         leaves 0x40000000 t\n/dev/pvbus0  KVM            leaves 0x40000100 t\nfw_cfg       QEMU fw_cfg    /sys/firmware/qemu_",
        0,
    ),
    ("hostctl -t; hostctl -tf /dev/pvbus1; hostctl -tf vmware", "/dev/pvbus0: KVM\n/dev/pvbus1: VMware\nvmware: VMware", 0),
    ("hostctl guestinfo.hostname", "vm-111.example.com", 0),
    ("hostctl -f /dev/pvbus1 guestinfo.hostname", "vm-111.example.com", 0),
    ("hostctl guestinfo.ip 192.168.100.111; hostctl guestinfo.ip", "192.168.100.111", 0),
    ("hostctl -q guestinfo.hostname", "", 0),
    ("hostctl guestinfo.lines", "#cloud-config\nusers:\n\\\\ \\^[", 0),
    ("hostctl --raw guestinfo.lines | od -An -tx1 | tail -n 1", " 65 72 73 3a 0a 5c 20 1b", 0),
    ("hostctl --json guestinfo.lines", r##"{"key":"guestinfo.lines","value":"#cloud-config\nusers:\n\\ \u001b"}"##, 0),
    ("hostctl guestinfo.none", "hostctl: ioctl: No such file or directory", 1),
    ("hostctl get guestinfo.none", "hostctl: guestinfo.none: there is no such key", 3),
    ("hostctl ls", vmware_rules!("hostctl: VMware: the store has no such operation"), 1),
    ("hostctl rm guestinfo.ip", vmware_rules!("hostctl: guestinfo.ip: the store has no such operation"), 1),
    ("hostctl set 'guestinfo.a b' x", vmware_rules!("hostctl: guestinfo.a b: not a key of this store"), 1),
    ("hostctl 'guestinfo.a b' x 2>&1 | head -n 1", "hostctl: ioctl: Invalid argument", 0),
    ("head -c 60000 /dev/zero | tr '\\0' x | hostctl -i - guestinfo.big; hostctl -o /tmp/f guestinfo.big; wc -c < /tmp/f", "60001", 0),
    (
        "(sleep 1; hostctl guestinfo.w 1; sleep 2; hostctl guestinfo.w 2) & hostctl watch guestinfo.w --count 2 --timeout 60",
        "guestinfo.w is not there\nguestinfo.w: 1\nguestinfo.w: 2",
        0,
    ),
    (
        "hostctl --explain get guestinfo.hostname",
        "hostctl: store: VMware, interface at CPUID leaf 0x40000000\n\
         hostctl: way: GuestRPC by the backdoor at port 0x5658, open to all programs\n\
         hostctl: why: the first interface with a store; KVM has no information store\n\
         vm-111.example.com",
        0,
    ),
    ("su nobody -s /bin/sh -c 'hostctl guestinfo.hostname'", "vm-111.example.com", 0),
    ("hostctl -f fw_cfg ls opt/org.pvbus", "hostname\nlines", 0),
    // Now by devices.
    (
        "hostctl serve --daemon",
        "hostctl: /dev/pvbus0: KVM has no information store\n\
         hostctl: /dev/pvbus1: VMware, GuestRPC by the backdoor at port 0x5658, open to all programs",
        0,
    ),
    ("stat -c '%a %n' /dev/pvbus*; pvbus type /dev/pvbus0; pvbus type /dev/pvbus1", "640 /dev/pvbus0\n640 /dev/pvbus1\nKVM\nVMware", 0),
    ("pvbus read /dev/pvbus1 guestinfo.hostname 64", "vm-111.example.com", 0),
    ("pvbus read /dev/pvbus1 guestinfo.big 60000", "pvbus: ioctl: Numerical result out of range", 1),
    ("pvbus read /dev/pvbus1 guestinfo.big 60001 | wc -c; hostctl guestinfo.big | wc -c", "60001\n60001", 0),
    ("pvbus write /dev/pvbus1 guestinfo.by-ioctl hello rw; hostctl -f vmware guestinfo.by-ioctl", "\nhello", 0),
    ("hostctl --explain get guestinfo.none 2>&1 | grep way", "hostctl: way: ioctl on the device /dev/pvbus1", 0),
    ("pvbus read /dev/pvbus0 guestinfo.hostname 64", "pvbus: ioctl: No such device or address", 1),
    ("pvbus read /dev/pvbus1 guestinfo.none 64", "pvbus: ioctl: No such file or directory", 1),
    ("pvbus read /dev/pvbus1 guestinfo.none 0", "pvbus: ioctl: Invalid argument", 1),
    ("pvbus read /dev/pvbus1 guestinfo.none 65537", "pvbus: ioctl: File name too long", 1),
    ("pvbus write /dev/pvbus1 guestinfo.by-ioctl no ro", "pvbus: ioctl: Operation not permitted", 1),
    ("pvbus wild /dev/pvbus1", "pvbus: ioctl: Bad address", 1),
    ("pvbus other /dev/pvbus1", "pvbus: ioctl: Inappropriate ioctl for device", 1),
];

#[test]
fn vmware_s_interface_of_ours_answers_directly_and_by_devices() {
    let directory = tempfile::tempdir().unwrap();
    let lines = directory.path().join("lines");
    std::fs::write(&lines, b"#cloud-config\nusers:\n\\ \x1b").unwrap();
    let mut vmctl = Command::new(env!("CARGO_BIN_EXE_vmctl"));
    vmctl.args(["run", "--backend", "soft", "--dialect", "vmware,kvm", "--kv", "guestinfo.hostname=vm-111.example.com"]);
    vmctl.arg("--kv").arg(format!("guestinfo.lines=@{}", lines.display()));
    let kv_out = directory.path().join("kv.json");
    vmctl.arg("--kv-out").arg(&kv_out);
    vmctl.arg("--kernel").arg(guest("vmlinuz")).args(["--cmdline", "console=ttyS0 quiet panic=-1"]);
    vmctl.arg("--initrd").arg(initrd(directory.path(), &["fs/fuse/fuse.ko", "fs/fuse/cuse.ko", "drivers/firmware/qemu_fw_cfg.ko"], VMWARE));
    expect(&run(vmctl, PATIENCE), VMWARE);
    let kept: serde_json::Value = serde_json::from_slice(&std::fs::read(kv_out).unwrap()).unwrap();
    assert!(kept.to_string().contains("192.168.100.111"), "what the guest wrote has not reached the host: {kept}");
}
