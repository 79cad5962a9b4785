//! The system calls that this program makes, without a C library.
//!
//! A read of a key is a process of its own, started by scripts again and again, and most of what such a process costs is its C library and
//! Rust's `std` on top of it: they take twice the time of everything else. So this program has neither. What it needs of Linux is here,
//! in the words of `linux-raw-sys`, and nothing outside this folder makes a system call.
//!
//! ```text
//!   file.rs     open, read, write, list, lock, ioctl, poll      process.rs   permissions, signals, background, exit
//!   time.rs     a clock and waiting                             syscall.rs   the instruction
//!   errno.rs    error numbers and their texts
//! ```

mod errno;
pub mod file;
pub mod process;
mod syscall;
pub mod time;

pub use errno::Errno;
pub use file::File;

/// Writes `text` to standard error, where nobody hears of a failure.
pub fn say(text: &str) {
    // There is nowhere to report it.
    let _ = File::STDERR.write_all(text.as_bytes());
}
