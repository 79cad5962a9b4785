//! A Debian kernel with a shell on its serial port, for tests of devices that come and go.

// Each test program uses a part of this. Helpers of tests are outside of what clippy takes for one.
#![allow(dead_code, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::common::{Machine, Run, guest, guest_program, initrd_with, run};
use crate::initrd::Initrd;

/// A boot to init on the software CPU takes seconds when built with optimisation and nothing else runs.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Which guest is booted.
pub struct Kind {
    /// The dialect.
    pub dialect: &'static str,
    /// The initial RAM disks, in order, with the modules.
    pub initrd: &'static str,
    /// Modules, in order.
    pub modules: &'static str,
}

/// A guest with a shell, and its control socket.
pub struct Guest {
    /// The machine.
    pub machine: Machine,
    work: TempDir,
}

impl Guest {
    /// Boots it until its modules are there, and somebody does what he reads at the serial port.
    pub fn start(kind: &Kind, more: &[&str]) -> Guest {
        Guest::start_with(kind, more, |own| own.file("bin/traffic", 0o755, &guest_program("traffic")))
    }

    /// The same with the files that `add` puts into its RAM disk.
    pub fn start_with(kind: &Kind, more: &[&str], add: impl FnOnce(&mut Initrd)) -> Guest {
        let work = tempfile::tempdir_in(guest("")).unwrap();
        let mut own = Initrd::default();
        add(&mut own);
        own.script(&init(kind.modules));
        let bases: Vec<&str> = kind.initrd.split(' ').collect();
        let image = initrd_with(work.path(), &bases, &own.finish());
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
        command.args(["run", "--dialect", kind.dialect, "--cpus", "2", "--cmdline", "console=ttyS0 quiet panic=-1"]).args(more);
        command.arg("--kernel").arg(guest("vmlinuz")).arg("--initrd").arg(image).arg("--control").arg(work.path().join("control"));
        let mut machine = Machine::start(command);
        machine.wait_for("READY", PATIENCE);
        Guest { machine, work }
    }

    /// A file that goes with the guest.
    pub fn path(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }

    /// Lets the guest's shell run `line`; what it prints, with plain ends of lines.
    #[track_caller]
    pub fn shell(&mut self, line: &str) -> String {
        self.machine.type_line(&format!("{line}; echo END$((1+1))"));
        let output = self.machine.wait_for("END2", PATIENCE);
        output.trim_end_matches("END2").trim().replace('\r', "")
    }

    /// Lets the guest's shell run `line` again and again until it prints what is wanted.
    #[track_caller]
    pub fn shell_until(&mut self, line: &str, is_wanted: impl Fn(&str) -> bool) {
        let until = Instant::now() + PATIENCE;
        loop {
            let output = self.shell(line);
            if is_wanted(&output) {
                return;
            }
            assert!(Instant::now() < until, "{line} still prints:\n{output}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Has the guest ask for an address for `eth0` once this is there, and brought up by `ifconfig eth0 settings`.
    #[track_caller]
    pub fn gets_address(&mut self, settings: &str) {
        let said = self.shell(&format!("await eth0; ifconfig eth0 {settings} up; udhcpc -i eth0 -n -q -t 20 -s /bin/true 2>&1"));
        assert!(said.contains("lease of"), "{said}");
    }

    /// `vmctl` on the machine; what it prints.
    #[track_caller]
    pub fn vmctl(&self, arguments: &[&str]) -> String {
        let run = self.try_vmctl(arguments);
        assert_eq!(run.status, Some(0), "{arguments:?}: {run}");
        run.output.trim().to_owned()
    }

    /// `vmctl` on the machine.
    pub fn try_vmctl(&self, arguments: &[&str]) -> Run {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmctl"));
        command.args(arguments).arg("--control").arg(self.path("control")).current_dir(self.work.path());
        run(command, PATIENCE)
    }

    /// Waits.
    #[track_caller]
    pub fn until(&self, what: &str, is_so: impl Fn(&Guest) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !is_so(self) {
            assert!(Instant::now() < until, "{what}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn init(modules: &str) -> String {
    format!(
        "export PATH=/bin
busybox mount -t proc proc /proc
busybox --install -s /bin
mkdir -p /sbin
printf '#!/bin/busybox sh\\n/bin/busybox poweroff -f\\n' > /sbin/poweroff
chmod +x /sbin/poweroff
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for m in {modules}; do insmod /lib/modules/$m.ko; done
stty -echo
echo READY
while read -r line; do eval \"$line\"; done"
    )
}

/// A file of `length` bytes that are no zeroes.
pub fn write_pattern(path: &Path, length: u64) {
    let words = 0..(length / 4) as u32;
    std::fs::write(path, words.flat_map(|word| word.wrapping_mul(2_654_435_761).to_le_bytes()).collect::<Vec<u8>>()).unwrap();
}
