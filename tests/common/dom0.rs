//! A real Xen under QEMU with a dom0 that runs a script: `tests/common/xen/make` makes it.

// Each test program uses a part of this. Helpers of tests are outside of what clippy takes for one.
#![allow(dead_code, clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::common::{Run, guest, run};
use crate::initrd::Initrd;
use crate::script::script;

/// Xen and dom0 are up after some 15 seconds when nothing else runs, and what is done with domains takes another minute or two.
const PATIENCE: Duration = Duration::from_secs(900);

/// What dom0 begins with.
pub const PLAIN: &[&str] = &["initrd-dom0.gz"];
/// The same, and Xen's toolstack.
pub const WITH_XL: &[&str] = &["initrd-dom0.gz", "initrd-xl.gz"];

/// Boots Xen with a dom0 that has `archives`, and `files` in `/bin`, and runs `commands` after the lines `before`.
#[track_caller]
pub fn dom0(archives: &[&str], files: &[(&str, &Path)], before: &str, commands: &[(&str, &str, i32)]) -> Run {
    let directory = tempfile::tempdir().unwrap();
    let commands: Vec<&str> = commands.iter().map(|(command, _, _)| *command).collect();
    let mut archive = Initrd::default();
    archive.directory("bin");
    archive.directory("etc");
    archive.file("etc/passwd", 0o644, b"root::0:0::/:/bin/sh\nnobody::65534:65534::/:/bin/sh\n");
    for (name, path) in files {
        archive.file(&format!("bin/{name}"), 0o755, &std::fs::read(path).unwrap());
    }
    archive.file("test", 0o755, format!("export PATH=/bin\nbusybox --install -s /bin\n{before}{}", script(&commands)).as_bytes());

    // The last archive's files win. One that is not compressed begins at a multiple of 4.
    let mut whole: Vec<u8> = archives.iter().flat_map(|name| std::fs::read(guest(name)).unwrap()).collect();
    whole.resize(whole.len().next_multiple_of(4), 0);
    whole.extend(archive.archive());
    let initrd = directory.path().join("initrd");
    std::fs::write(&initrd, whole).unwrap();
    let mut qemu = Command::new("qemu-system-x86_64");
    // "max" makes dom0 crash on QEMU's translator.
    qemu.args(["-M", "pc", "-accel", "tcg", "-cpu", "Nehalem", "-m", "1024", "-nographic", "-no-reboot"]);
    qemu.arg("-kernel").arg(guest("xen")).args(["-append", "console=com1 com1=115200 dom0_mem=600M"]);
    let modules = format!("{} console=hvc0 earlyprintk=xen quiet,{}", guest("xen-vmlinuz").display(), initrd.display());
    qemu.args(["-initrd", &modules]);
    run(qemu, PATIENCE)
}
