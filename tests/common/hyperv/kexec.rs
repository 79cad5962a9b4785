//! `kexec KERNEL INITRD CMDLINE`: starts another kernel in place of the running one, without the firmware (kexec_file_load(2), reboot(2)).

use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;

/// Number of kexec_file_load(2) on x86-64.
const KEXEC_FILE_LOAD: i64 = 320;
/// LINUX_REBOOT_CMD_KEXEC.
const REBOOT_KEXEC: i32 = 0x4558_4543;

unsafe extern "C" {
    fn syscall(number: i64, ...) -> i64;
    fn reboot(command: i32) -> i32;
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, kernel, initrd, cmdline] = arguments.as_slice() else { panic!("kexec KERNEL INITRD CMDLINE") };
    let [kernel, initrd] = [kernel, initrd].map(|name| File::open(name).expect("a file"));
    let cmdline = CString::new(cmdline.as_str()).expect("no zero");
    // SAFETY: the command line is as long as it is said to be, with its zero.
    let loaded = unsafe {
        syscall(KEXEC_FILE_LOAD, kernel.as_raw_fd(), initrd.as_raw_fd(), cmdline.as_bytes_with_nul().len(), cmdline.as_ptr(), 0u64)
    };
    assert_eq!(loaded, 0, "kexec_file_load: {}", std::io::Error::last_os_error());
    // SAFETY: comes back only when it fails.
    unsafe { reboot(REBOOT_KEXEC) };
    panic!("reboot: {}", std::io::Error::last_os_error());
}
