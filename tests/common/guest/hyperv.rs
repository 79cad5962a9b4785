//! What tests of the Hyper-V dialect do inside of Linux.
//!
//! `hyperv kexec KERNEL INITRD CMDLINE` starts another kernel in place of this one.
//! `hyperv msr INDEX [VALUE]` writes a model-specific register of processor 0, or prints it (needs the module msr).

use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// `kexec_file_load(2)`, `arch/x86/entry/syscalls/syscall_64.tbl`.
const SYS_KEXEC_FILE_LOAD: i64 = 320;
/// `LINUX_REBOOT_CMD_KEXEC`, reboot(2).
const REBOOT_KEXEC: i32 = 0x4558_4543;

unsafe extern "C" {
    fn syscall(number: i64, ...) -> i64;
    fn reboot(command: i32) -> i32;
}

fn kexec(kernel: &str, initrd: &str, cmdline: &str) -> std::io::Result<()> {
    let (kernel, initrd) = (File::open(kernel)?, File::open(initrd)?);
    let cmdline = CString::new(cmdline)?;
    let length = cmdline.as_bytes_with_nul().len();
    // SAFETY: both files are open, and the text has this many bytes.
    let loaded = unsafe { syscall(SYS_KEXEC_FILE_LOAD, kernel.as_raw_fd(), initrd.as_raw_fd(), length, cmdline.as_ptr(), 0u64) };
    if loaded == 0 {
        // SAFETY: it does not return when it works.
        unsafe { reboot(REBOOT_KEXEC) };
    }
    Err(std::io::Error::last_os_error())
}

fn number(text: &str) -> u64 {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
    .unwrap_or_else(|_| panic!("not a number: {text}"))
}

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["kexec", kernel, initrd, cmdline] => kexec(kernel, initrd, cmdline),
        ["msr", index] => {
            let mut value = [0; 8];
            File::open("/dev/cpu/0/msr")?.read_exact_at(&mut value, number(index))?;
            println!("{:#x}", u64::from_le_bytes(value));
            Ok(())
        }
        ["msr", index, value] => {
            File::options().write(true).open("/dev/cpu/0/msr")?.write_all_at(&number(value).to_le_bytes(), number(index))
        }
        _ => Err(std::io::Error::other("usage: hyperv kexec KERNEL INITRD CMDLINE | hyperv msr INDEX [VALUE]")),
    }
}
