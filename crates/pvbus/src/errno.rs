//! Error numbers of pvbus(4)'s ioctls, with their values on both systems (OpenBSD `sys/sys/errno.h`, Linux `asm-generic/errno*.h`).

use core::fmt;

macro_rules! errnos {
    ($($name:ident $openbsd:literal $linux:literal $text:literal),* $(,)?) => {
        /// An error number by its name.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(clippy::upper_case_acronyms, reason = "their names")]
        pub enum Errno {
            $(#[doc = $text] $name),*
        }

        impl Errno {
            /// Its number on OpenBSD.
            #[must_use]
            pub const fn openbsd(self) -> i32 {
                match self { $(Errno::$name => $openbsd),* }
            }

            /// Its number on Linux.
            #[must_use]
            pub const fn linux(self) -> i32 {
                match self { $(Errno::$name => $linux),* }
            }

            /// What it says.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Errno::$name => $text),* }
            }
        }
    };
}

errnos! {
    EPERM 1 1 "Operation not permitted",
    ENOENT 2 2 "No such file or directory",
    EIO 5 5 "Input/output error",
    ENXIO 6 6 "Device not configured",
    ENOMEM 12 12 "Cannot allocate memory",
    EACCES 13 13 "Permission denied",
    EFAULT 14 14 "Bad address",
    EEXIST 17 17 "File exists",
    ENODEV 19 19 "Operation not supported by device",
    EINVAL 22 22 "Invalid argument",
    ENOTTY 25 25 "Inappropriate ioctl for device",
    ENOSPC 28 28 "No space left on device",
    ERANGE 34 34 "Result too large",
    EMSGSIZE 40 90 "Message too long",
    EOPNOTSUPP 45 95 "Operation not supported",
    ETIMEDOUT 60 110 "Operation timed out",
    ENAMETOOLONG 63 36 "File name too long",
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl core::error::Error for Errno {}
