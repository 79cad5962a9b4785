//! Opening and locking an image file.
#![allow(unsafe_code)] // Open-file-description locks have no safe wrapper.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

use super::{DiskError, DiskSpec};

/// Opens the image that `spec` names, for writing unless it is read only, and locks it.
pub(super) fn open_locked(spec: &DiskSpec) -> Result<File, DiskError> {
    let path = || spec.path.clone();
    let open_error = |source| DiskError::Open { path: path(), source };
    // A pipe would block the open, and a directory fails later with a worse message.
    let kind = std::fs::metadata(&spec.path).map_err(open_error)?.file_type();
    if kind.is_dir() {
        return Err(DiskError::NotAnImage { path: path(), what: "a directory" });
    }
    if !kind.is_file() && !kind.is_block_device() {
        return Err(DiskError::NotAnImage { path: path(), what: "a device or pipe" });
    }
    let file = OpenOptions::new().read(true).write(!spec.read_only).custom_flags(libc::O_CLOEXEC).open(&spec.path).map_err(open_error)?;
    match lock(&file, !spec.read_only) {
        Ok(()) => Ok(file),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            let hint = if spec.read_only { ", which writes it" } else { "; add ro to all users to share it" };
            Err(DiskError::InUse { path: path(), hint })
        }
        Err(error) => Err(open_error(error)),
    }
}

/// Locks the whole file for as long as it is open: against everybody, or against writers.
fn lock(file: &File, exclusive: bool) -> io::Result<()> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    // Length 0 reaches to the end, wherever it will be.
    let lock = libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: the descriptor is open and `lock` is a valid struct flock that the call only reads.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
