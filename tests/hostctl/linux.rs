//! Debian's kernel, with hostctl in its initial RAM disk: on QEMU's machine, and on ours.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::common::guest;
use crate::initrd::Initrd;
use crate::{c_program, expect, hostctl, run, script};

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
    ("su nobody -s /bin/sh -c 'hostctl get opt/org.pvbus/x' 2>&1 | cut -c1-48", "hostctl: opt/org.pvbus/x: the host does not all", 0),
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
    qemu.args(["-M", "pc", "-accel", "tcg", "-cpu", "max", "-m", "256", "-nographic", "-no-reboot"]);
    qemu.arg("-kernel").arg(guest("vmlinuz")).args(["-append", "console=ttyS0 quiet panic=-1"]);
    qemu.arg("-initrd").arg(initrd(directory.path(), &["drivers/firmware/qemu_fw_cfg.ko"], FW_CFG));
    qemu.args(["-fw_cfg", "name=opt/org.pvbus/x,string=a value", "-fw_cfg"]).arg(format!("name=opt/org.pvbus/big,file={}", big.display()));
    expect(&run(qemu, PATIENCE), FW_CFG);
}
