//! What can go wrong, what a person reads about it, and the two numbers that programs see.
//!
//! OpenBSD's hostctl(8) prints the text of an `errno` and exits with 1. That is kept for its own command lines; the other commands print the
//! whole sentence and exit with a status that tells the kind.
//!
//! | status | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | any failure of an OpenBSD command line; everything that is not below |
//! | 2 | the command line is wrong |
//! | 3 | no such key |
//! | 4 | no such interface, or it has no store |
//! | 5 | not permitted |
//! | 6 | the host cannot be reached or did not answer in time, or the time of `--timeout` is over |

use alloc::format;
use alloc::string::{String, ToString};
use core::fmt::{self, Display};

use pvbus::StoreError;

use crate::sys::Errno;

/// A failure. The text says what was wanted and where to look next; it is complete without the name of the variant.
#[derive(Debug)]
pub enum Error {
    /// No such interface on this machine.
    NoInterface(String),
    /// The interface is there, its store is not.
    NoStore(String),
    /// The system does not let this user reach the store.
    Denied(String),
    /// The store refused.
    Store {
        /// What was asked for, as it can be printed.
        key: String,
        /// Why.
        error: StoreError,
        /// What the store takes, or why keys may be missing in it.
        rules: &'static str,
    },
    /// A file or device of the system.
    System {
        /// The call or the file.
        what: String,
        /// The system's answer.
        errno: Errno,
    },
    /// The time of `--timeout` is over.
    TimeOver,
    /// A value on the command line, or in a file, that cannot be used.
    Input(&'static str),
}

impl Error {
    /// A failed call of the system on `what`.
    pub fn system(what: impl Display) -> impl FnOnce(Errno) -> Error {
        move |errno| Error::System { what: what.to_string(), errno }
    }

    /// What OpenBSD's ioctl would have answered.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Error::NoInterface(_) => Errno::ENODEV,
            Error::NoStore(_) => Errno::ENXIO,
            Error::Denied(_) => Errno::EACCES,
            Error::TimeOver => Errno::ETIMEDOUT,
            Error::Store { error, .. } => error.errno().into(),
            Error::Input(_) => Errno::EINVAL,
            Error::System { errno, .. } => *errno,
        }
    }

    /// What OpenBSD's hostctl prints for it: the call that failed and the error number's text. Where that does not say it all, the whole
    /// sentence follows on a line of its own.
    #[must_use]
    pub fn as_openbsd(&self, device: Option<&str>) -> String {
        let device = device.unwrap_or("/dev/pvbus0");
        let text = self.errno();
        match self {
            Error::Store { error: StoreError::NotFound, rules: "", .. } | Error::Store { error: StoreError::NoMemory, .. } => {
                format!("ioctl: {text}")
            }
            Error::Store { error: StoreError::Refused(reason), .. } => format!("ioctl: {reason}"),
            Error::Store { .. } | Error::NoStore(_) => format!("ioctl: {text}\nhostctl: {self}"),
            Error::NoInterface(_) | Error::Denied(_) => format!("open: {device}: {text}\nhostctl: {self}"),
            Error::System { .. } | Error::TimeOver | Error::Input(_) => self.to_string(),
        }
    }

    /// Exit status of the commands that are not OpenBSD's.
    #[must_use]
    pub fn status(&self) -> u8 {
        match (self, self.errno()) {
            // The file of -i, say, is not a key.
            (Error::Store { .. }, Errno::ENOENT) => 3,
            (Error::Store { error: StoreError::Transport(_), .. }, _) => 6,
            (_, Errno::ENODEV | Errno::ENXIO) => 4,
            (_, Errno::EACCES | Errno::EPERM) => 5,
            (_, Errno::ETIMEDOUT) => 6,
            _ => 1,
        }
    }
}

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::NoInterface(text) | Error::NoStore(text) | Error::Denied(text) => f.write_str(text),
            Error::Store { key, error, rules } => write!(f, "{key}: {error}{}", rules_of(error, rules)),
            Error::System { what, errno } => write!(f, "{what}: {errno}"),
            Error::TimeOver => f.write_str("no change in time"),
            Error::Input(text) => f.write_str(text),
        }
    }
}

impl core::error::Error for Error {}

/// A store's rules, where they explain the refusal.
fn rules_of(error: &StoreError, rules: &str) -> String {
    match error {
        StoreError::NotFound | StoreError::BadKey | StoreError::Denied | StoreError::TooLong | StoreError::Unsupported
            if !rules.is_empty() =>
        {
            format!(" ({rules})")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(error: StoreError) -> Error {
        Error::Store { key: "k".into(), error, rules: "keys are numbers" }
    }

    fn absent(rules: &'static str) -> Error {
        Error::Store { key: "k".into(), error: StoreError::NotFound, rules }
    }

    #[test]
    fn kinds_have_statuses_of_their_own() {
        assert_eq!(store(StoreError::NotFound).status(), 3);
        assert_eq!(Error::NoStore("x".into()).status(), 4);
        assert_eq!(store(StoreError::Denied).status(), 5);
        assert_eq!(store(StoreError::Timeout).status(), 6);
        assert_eq!(store(StoreError::Transport("gone")).status(), 6);
        assert_eq!(store(StoreError::Full).status(), 1);
        // A missing file is not a missing key.
        assert_eq!(Error::System { what: "input".into(), errno: Errno::ENOENT }.status(), 1);
    }

    #[test]
    fn openbsd_s_form_has_the_error_number_s_text_first() {
        assert_eq!(absent("").as_openbsd(None), "ioctl: No such file or directory");
        let explained = "ioctl: No such file or directory\nhostctl: k: there is no such key (none has come)";
        assert_eq!(absent("none has come").as_openbsd(None), explained);
        assert_eq!(Error::NoStore("KVM has none".into()).as_openbsd(None), "ioctl: No such device or address\nhostctl: KVM has none");
        assert_eq!(Error::NoInterface("none".into()).as_openbsd(None), "open: /dev/pvbus0: No such device\nhostctl: none");
        assert_eq!(Error::Input("value too long").as_openbsd(None), "value too long");
    }

    #[test]
    fn rules_are_told_where_they_explain() {
        assert_eq!(store(StoreError::BadKey).to_string(), "k: not a key of this store (keys are numbers)");
        assert_eq!(absent("").to_string(), "k: there is no such key");
    }
}
