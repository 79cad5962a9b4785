//! Builds static programs and boots Debian's kernel under QEMU with an emulated SVM.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::initrd::Initrd;
use crate::program::{build_static, workspace};

const BUSYBOX: &str = "/bin/busybox";
/// Modules that make `/dev/kvm`, in the order in which they are inserted.
const KVM_MODULES: [&str; 3] = ["virt/lib/irqbypass.ko", "arch/x86/kvm/kvm.ko", "arch/x86/kvm/kvm-amd.ko"];

/// One at a time: each wants a processor for itself, and Cargo's target directory.
static TURN: Mutex<()> = Mutex::new(());

/// What the rig is made of.
pub struct Rig {
    pub kernel: PathBuf,
    /// Where kernel and initrds are.
    pub guest: PathBuf,
    /// `lib/modules/VERSION/kernel`.
    modules: PathBuf,
}

impl Rig {
    /// Finds kernel, modules, QEMU and busybox; says loudly what is missing.
    pub fn find() -> Option<Rig> {
        let skip = |what: &str| {
            eprintln!("SKIPPED: the KVM rig needs {what}; ./test provides it");
            None
        };
        let guest = std::env::var_os("PVBUS_GUEST_DIR").map_or_else(|| workspace().join("target/guest"), PathBuf::from);
        let kernel = guest.join("vmlinuz");
        if !kernel.is_file() {
            return skip(&format!("a guest kernel at {}", kernel.display()));
        }
        let versions = std::fs::read_dir(guest.join("lib/modules")).into_iter().flatten().flatten();
        let Some(modules) = versions.map(|version| version.path().join("kernel")).find(|path| path.join(KVM_MODULES[1]).is_file()) else {
            return skip(&format!("the kernel's modules in {}", guest.join("lib/modules").display()));
        };
        if Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_err() {
            return skip("qemu-system-x86_64 (Debian package qemu-system-x86)");
        }
        if !Path::new(BUSYBOX).is_file() {
            return skip("/bin/busybox (Debian package busybox-static)");
        }
        Some(Rig { kernel, guest, modules })
    }

    /// An initrd whose script has mounted the usual file systems and has made `/dev/kvm`.
    pub fn initrd_with_kvm(&self) -> Initrd {
        let mut initrd = Initrd::default();
        for directory in ["bin", "dev", "proc", "sys", "tmp"] {
            initrd.directory(directory);
        }
        initrd.file("bin/busybox", 0o755, &read(Path::new(BUSYBOX)));
        initrd.script(
            "/bin/busybox mount -t proc proc /proc\n\
             /bin/busybox mount -t sysfs sys /sys\n\
             /bin/busybox mount -t devtmpfs dev /dev",
        );
        for module in KVM_MODULES {
            let name = Path::new(module).file_name().and_then(|name| name.to_str()).expect("module names are plain");
            initrd.file(name, 0o644, &read(&self.modules.join(module)));
            initrd.script(&format!("/bin/busybox insmod /{name}"));
        }
        initrd
    }

    /// Boots with one processor and this much memory, and gives what the serial port said until power-off.
    ///
    /// # Panics
    /// When it takes longer than `patience`.
    pub fn boot(&self, initrd: &Initrd, megabytes: u32, patience: Duration) -> String {
        let _turn = turn();
        let directory = tempfile::tempdir().expect("a temporary directory");
        let image = directory.path().join("initrd");
        let serial = directory.path().join("serial");
        std::fs::write(&image, initrd.finish()).expect("room for an initrd");
        let mut qemu = Command::new("qemu-system-x86_64")
            .args(["-M", "pc", "-accel", "tcg", "-cpu", "max,+svm,+npt", "-smp", "1", "-display", "none", "-no-reboot", "-nodefaults"])
            .args(["-m", &megabytes.to_string()])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&image)
            .args(["-append", "console=ttyS0 panic=-1 quiet"])
            .args(["-serial", &format!("file:{}", serial.display())])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64 starts");
        let start = Instant::now();
        let finished = loop {
            match qemu.try_wait().expect("QEMU is our child") {
                Some(_) => break true,
                None if start.elapsed() > patience => break false,
                None => std::thread::sleep(Duration::from_millis(200)),
            }
        };
        if !finished {
            let _ = qemu.kill();
            let _ = qemu.wait();
        }
        let output = String::from_utf8_lossy(&std::fs::read(&serial).unwrap_or_default()).replace('\r', "");
        assert!(finished, "the rig did not power off in {patience:?}; it said:\n{output}");
        output
    }

    /// Builds our programs without shared libraries; the path of the one that is at `product` in the profile's directory.
    pub fn program(&self, product: &str) -> PathBuf {
        let _turn = turn();
        build_static(&["-p", "kvm", "-p", "vmctl", "--example", "rig", "--bin", "vmctl"]).join("debug").join(product)
    }
}

/// A file that has to be there.
pub fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}
