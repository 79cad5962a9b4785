//! Error numbers, with the C library's texts (Linux `include/uapi/asm-generic/errno*.h`, glibc `sysdeps/gnu/errlist.h`).

use core::fmt;

/// An error number of the system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(i32);

macro_rules! errnos {
    ($($name:ident $number:literal $text:literal),* $(,)?) => {
        impl Errno {
            $(#[doc = $text] pub const $name: Errno = Errno($number);)*

            fn text(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

errnos! {
    EPERM 1 "Operation not permitted",
    ENOENT 2 "No such file or directory",
    EINTR 4 "Interrupted system call",
    EIO 5 "Input/output error",
    ENXIO 6 "No such device or address",
    EBADF 9 "Bad file descriptor",
    EAGAIN 11 "Resource temporarily unavailable",
    ENOMEM 12 "Cannot allocate memory",
    EACCES 13 "Permission denied",
    EFAULT 14 "Bad address",
    EBUSY 16 "Device or resource busy",
    EEXIST 17 "File exists",
    ENODEV 19 "No such device",
    ENOTDIR 20 "Not a directory",
    EISDIR 21 "Is a directory",
    EINVAL 22 "Invalid argument",
    EMFILE 24 "Too many open files",
    ENOTTY 25 "Inappropriate ioctl for device",
    EFBIG 27 "File too large",
    ENOSPC 28 "No space left on device",
    EROFS 30 "Read-only file system",
    EPIPE 32 "Broken pipe",
    ERANGE 34 "Numerical result out of range",
    ENAMETOOLONG 36 "File name too long",
    ENOSYS 38 "Function not implemented",
    ELOOP 40 "Too many levels of symbolic links",
    EMSGSIZE 90 "Message too long",
    EOPNOTSUPP 95 "Operation not supported",
    ETIMEDOUT 110 "Connection timed out",
    EDQUOT 122 "Disk quota exceeded",
}

impl Errno {
    /// The error of this number.
    #[must_use]
    pub const fn from_raw(number: i32) -> Errno {
        Errno(number)
    }

    /// Its number.
    #[must_use]
    pub const fn raw(self) -> i32 {
        self.0
    }
}

impl From<pvbus::Errno> for Errno {
    fn from(errno: pvbus::Errno) -> Errno {
        Errno(errno.linux())
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.text() {
            Some(text) => f.write_str(text),
            None => write!(f, "Unknown error {}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_those_of_the_c_library() {
        for number in 1..=130 {
            let ours = Errno(number);
            let theirs = std::io::Error::from_raw_os_error(number).to_string();
            assert!(ours.text().is_none() || theirs == format!("{ours} (os error {number})"), "{number}: {theirs}");
        }
    }
}
