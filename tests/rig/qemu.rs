//! Debian's QEMU inside of the rig: a monitor that is not ours, on the KVM of the kernel that is not ours either.
//!
//! The program goes into the initrd as it is installed, with the libraries that `ldd` names and the firmware that a PVH guest takes. A shell
//! function starts it and types at the guest's prompt, each command when the one before it is done.

use std::path::Path;
use std::process::Command;

use super::boot::read;
use super::initrd::Initrd;

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// Where Debian's packages seabios and qemu-system-data have these.
const FIRMWARE: [&str; 3] = ["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/kvmvapic.bin", "/usr/share/qemu/pvh.bin"];
/// Where it is looked for in the rig.
const FIRMWARE_DIRECTORY: &str = "usr/share/qemu";

/// `machine NAME OPTIONS...` reads commands, one a line; `sleep SECONDS` is done at the prompt and not typed. All that the machine says is printed at once,
/// so that it is known also when the rig is given up.
const MACHINE: &str = r#"
machine() {
    echo "machine $1 starts"
    name=$1; shift; rm -f /keys; mkfifo /keys; : >/said
    (qemu-system-x86_64 -L /usr/share/qemu -accel kvm -m 128 -nodefaults -display none -vga none -nic none -serial stdio "$@" </keys
        echo "machine $name ended with status $?") 2>&1 | tee /said &
    exec 3>/keys
    prompts=1
    while read -r command; do
        until [ "$(grep -c 'pvbus# ' /said)" -ge $prompts ]; do
            grep -q 'ended with status' /said && break 2
            sleep 0.1
        done
        case $command in
            "sleep "*) $command;;
            *) printf '%s\r' "$command" >&3; prompts=$((prompts + 1));;
        esac
    done
    exec 3>&-
    wait
}
"#;

/// Adds QEMU, and the shell function by which the script uses it.
///
/// # Panics
/// When a library or firmware is missing that Debian's packages bring.
pub fn add(initrd: &mut Initrd) {
    let output = Command::new("ldd").arg(QEMU).output().expect("ldd is a part of the C library");
    let libraries = String::from_utf8(output.stdout).expect("paths of libraries are plain");
    // `libz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x...)`, and the loader by its path alone.
    let paths = libraries.split_ascii_whitespace().filter(|word| word.starts_with('/'));
    let mut directories = vec![FIRMWARE_DIRECTORY.to_owned()];
    let mut files: Vec<(String, &str)> = paths.map(|path| (path[1..].to_owned(), path)).collect();
    assert!(files.len() > 1, "ldd {QEMU} said:\n{libraries}");
    files.push(("bin/qemu-system-x86_64".to_owned(), QEMU));
    for path in FIRMWARE {
        let name = Path::new(path).file_name().and_then(|name| name.to_str()).expect("names of firmware are plain");
        files.push((format!("{FIRMWARE_DIRECTORY}/{name}"), path));
    }
    directories.extend(files.iter().filter_map(|(name, _)| name.rsplit_once('/')).map(|(directory, _)| directory.to_owned()));
    for directory in &directories {
        for (end, _) in directory.match_indices('/').chain([(directory.len(), "")]) {
            initrd.directory(&directory[..end]);
        }
    }
    for (name, path) in files {
        initrd.file(&name, 0o755, &read(Path::new(path)));
    }
    initrd.script("export PATH=/bin\n/bin/busybox --install -s /bin");
    initrd.script(MACHINE);
}
