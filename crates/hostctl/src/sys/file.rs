//! Files, directories and devices.
#![allow(unsafe_code)] // System calls with pointers.

use alloc::vec::Vec;
use core::mem::{ManuallyDrop, MaybeUninit};
use core::ops::Deref;

use linux_raw_sys::general::{
    __NR_chmod, __NR_close, __NR_fcntl, __NR_ftruncate, __NR_getdents64, __NR_ioctl, __NR_lseek, __NR_mkdir, __NR_open, __NR_ppoll,
    __NR_read, __NR_stat, __NR_write, F_RDLCK, F_SETLK, F_WRLCK, O_CLOEXEC, O_CREAT, O_DIRECTORY, O_RDONLY, O_RDWR, O_TRUNC, O_WRONLY,
    POLLIN, S_IFCHR, S_IFDIR, S_IFMT, SEEK_SET, flock, pollfd, stat,
};
use pvbus::Nanos;

use super::syscall::syscall;
use super::{Errno, time};

/// Pieces in which files are read whose size nobody knows.
const PIECE: usize = 64 << 10;
/// Room for a part of a directory.
const NAMES: usize = 8 << 10;

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// To be read.
    Read,
    /// To be read and written.
    ReadWrite,
    /// The same; it is made when it is not there.
    ReadWriteOrMake,
    /// To be written; it is made, or emptied.
    Replace,
}

/// What a path leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A character device.
    CharacterDevice,
    /// Anything else.
    Other,
}

/// An open file. Closed when dropped.
#[derive(Debug)]
pub struct File(i32);

impl File {
    /// Standard input, to be used and never closed.
    pub const STDIN: &Standard = &Standard(ManuallyDrop::new(File(0)));
    /// Standard output.
    pub const STDOUT: &Standard = &Standard(ManuallyDrop::new(File(1)));
    /// Standard error.
    pub const STDERR: &Standard = &Standard(ManuallyDrop::new(File(2)));

    /// open(2). New files have the mode 0644, less the process' mask.
    ///
    /// # Errors
    /// The system's.
    pub fn open(path: &[u8], access: Access) -> Result<File, Errno> {
        let flags = match access {
            Access::Read => O_RDONLY,
            Access::ReadWrite => O_RDWR,
            Access::ReadWriteOrMake => O_RDWR | O_CREAT,
            Access::Replace => O_WRONLY | O_CREAT | O_TRUNC,
        };
        open(path, flags)
    }

    /// read(2): how many bytes there were.
    ///
    /// # Errors
    /// The system's.
    pub fn read(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        // SAFETY: the call writes to `buffer`, within its length.
        unsafe { syscall(__NR_read, [self.number(), buffer.as_mut_ptr().addr(), buffer.len()]) }
    }

    /// Reads to the end, or until `bytes` holds `most`.
    ///
    /// # Errors
    /// The system's.
    pub fn read_to_end(&self, most: usize) -> Result<Vec<u8>, Errno> {
        let mut bytes = Vec::new();
        let mut filled = 0;
        loop {
            bytes.resize(most.min(filled + PIECE), 0);
            match self.read(&mut bytes[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// The system's.
    pub fn write_all(&self, mut bytes: &[u8]) -> Result<(), Errno> {
        while !bytes.is_empty() {
            // SAFETY: the call reads `bytes`.
            match unsafe { syscall(__NR_write, [self.number(), bytes.as_ptr().addr(), bytes.len()]) } {
                Ok(0) => return Err(Errno::EIO),
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Makes `bytes` the file's whole content.
    ///
    /// # Errors
    /// The system's.
    pub fn replace(&self, bytes: &[u8]) -> Result<(), Errno> {
        // SAFETY: no memory.
        unsafe { syscall(__NR_lseek, [self.number(), 0, SEEK_SET as usize]) }?;
        self.write_all(bytes)?;
        // SAFETY: no memory.
        unsafe { syscall(__NR_ftruncate, [self.number(), bytes.len()]) }.map(drop)
    }

    /// Takes a POSIX lock over the whole file, or fails with [`Errno::EAGAIN`]. It goes with the file.
    ///
    /// # Errors
    /// The system's.
    pub fn try_lock(&self, for_writing: bool) -> Result<(), Errno> {
        let kind = if for_writing { F_WRLCK } else { F_RDLCK };
        // Both constants are small; start and length 0 mean all of it.
        let lock = flock { l_type: kind as i16, l_whence: SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
        // SAFETY: the call reads `lock`.
        match unsafe { syscall(__NR_fcntl, [self.number(), F_SETLK as usize, (&raw const lock).addr()]) } {
            Err(Errno::EACCES) => Err(Errno::EAGAIN),
            result => result.map(drop),
        }
    }

    /// ioctl(2).
    ///
    /// # Errors
    /// The system's.
    ///
    /// # Safety
    /// `argument` is what the command takes, and so are the places that it points to.
    pub unsafe fn ioctl<T>(&self, command: u32, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: the caller's promise.
        unsafe { syscall(__NR_ioctl, [self.number(), command as usize, (&raw mut *argument).addr()]) }.map(drop)
    }

    /// The number by which the system knows it.
    pub(super) fn number(&self) -> usize {
        self.0 as usize
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: no memory, and nobody has this number any more. Nothing can be done about a failure.
        let _ = unsafe { syscall(__NR_close, [self.number()]) };
    }
}

/// A file that is open from the beginning to the end.
#[derive(Debug)]
pub struct Standard(ManuallyDrop<File>);

impl Deref for Standard {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

/// Waits until some of `files` can be read, or have failed: for each, whether it is one of them. [`Errno::ETIMEDOUT`] at `deadline`.
///
/// # Errors
/// The system's.
pub fn wait(files: &[&File], deadline: Option<Nanos>) -> Result<Vec<bool>, Errno> {
    let mut polled: Vec<pollfd> = files.iter().map(|file| pollfd { fd: file.0, events: POLLIN as i16, revents: 0 }).collect();
    loop {
        let left = deadline.map(time::left_until);
        let timeout = left.as_ref().map_or(0, |left| (&raw const *left).addr());
        // SAFETY: the call writes to `polled`, of that length, and to `left`, which nobody looks at afterwards.
        match unsafe { syscall(__NR_ppoll, [polled.as_mut_ptr().addr(), polled.len(), timeout, 0, 0]) } {
            Ok(0) => return Err(Errno::ETIMEDOUT),
            Ok(_) => return Ok(polled.iter().map(|file| file.revents != 0).collect()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// The whole content of the file at `path`, `most` bytes of it.
///
/// # Errors
/// The system's.
pub fn read(path: &[u8], most: usize) -> Result<Vec<u8>, Errno> {
    File::open(path, Access::Read)?.read_to_end(most)
}

/// What `path` leads to, symbolic links followed.
///
/// # Errors
/// The system's.
pub fn kind(path: &[u8]) -> Result<Kind, Errno> {
    let path = c_string(path)?;
    let mut status = MaybeUninit::<stat>::uninit();
    // SAFETY: the call reads `path`, which ends with a zero byte, and fills `status`.
    unsafe { syscall(__NR_stat, [path.as_ptr().addr(), status.as_mut_ptr().addr()]) }?;
    // SAFETY: filled.
    let mode = unsafe { status.assume_init() }.st_mode;
    Ok(match mode & S_IFMT {
        S_IFDIR => Kind::Directory,
        S_IFCHR => Kind::CharacterDevice,
        _ => Kind::Other,
    })
}

/// Whether there is anything at `path`.
#[must_use]
pub fn exists(path: &[u8]) -> bool {
    kind(path).is_ok()
}

/// Names in the directory at `path`, sorted.
///
/// # Errors
/// The system's.
pub fn names(path: &[u8]) -> Result<Vec<Vec<u8>>, Errno> {
    let directory = open(path, O_RDONLY | O_DIRECTORY)?;
    let mut names = Vec::new();
    let mut part = [0; NAMES];
    loop {
        // SAFETY: the call writes to `part`, within its length.
        let count = unsafe { syscall(__NR_getdents64, [directory.number(), part.as_mut_ptr().addr(), part.len()]) }?;
        if count == 0 {
            break;
        }
        let mut rest = part.get(..count).unwrap_or_default();
        // `struct linux_dirent64`: inode (8 bytes), offset (8), length of this record (2), type (1), name with a zero byte.
        while let [_, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, low, high, _, name @ ..] = rest {
            let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
            rest = rest.get(usize::from(u16::from_le_bytes([*low, *high])).max(1)..).unwrap_or_default();
        }
    }
    names.sort();
    Ok(names)
}

/// Makes a directory and those above it, with the mode 0755.
///
/// # Errors
/// The system's.
pub fn make_directories(path: &[u8]) -> Result<(), Errno> {
    let slashes = path.iter().enumerate().skip(1).filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
    for end in slashes.chain([path.len()]) {
        let part = c_string(&path[..end])?;
        // SAFETY: the call reads `part`, which ends with a zero byte.
        match unsafe { syscall(__NR_mkdir, [part.as_ptr().addr(), 0o755]) } {
            Ok(_) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// chmod(2).
///
/// # Errors
/// The system's.
pub fn set_mode(path: &[u8], mode: u32) -> Result<(), Errno> {
    let path = c_string(path)?;
    // SAFETY: the call reads `path`, which ends with a zero byte.
    unsafe { syscall(__NR_chmod, [path.as_ptr().addr(), mode as usize]) }.map(drop)
}

fn open(path: &[u8], flags: u32) -> Result<File, Errno> {
    let path = c_string(path)?;
    // SAFETY: the call reads `path`, which ends with a zero byte.
    let number = unsafe { syscall(__NR_open, [path.as_ptr().addr(), (flags | O_CLOEXEC) as usize, 0o644]) }?;
    i32::try_from(number).map(File).map_err(|_| Errno::EMFILE)
}

/// `path` with a zero byte behind it.
fn c_string(path: &[u8]) -> Result<Vec<u8>, Errno> {
    if path.contains(&0) {
        return Err(Errno::EINVAL);
    }
    let mut string = Vec::with_capacity(path.len() + 1);
    string.extend_from_slice(path);
    string.push(0);
    Ok(string)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn file_is_made_replaced_and_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b/c");
        let path = path.as_os_str().as_bytes();
        make_directories(&path[..path.len() - 2]).unwrap();
        File::open(path, Access::ReadWriteOrMake).unwrap().replace(b"long content").unwrap();
        File::open(path, Access::ReadWriteOrMake).unwrap().replace(b"short").unwrap();
        assert_eq!(read(path, 100).unwrap(), b"short");
        assert_eq!(read(path, 3).unwrap(), b"sho");
        File::open(path, Access::Replace).unwrap();
        assert_eq!(read(path, 100).unwrap(), b"");
    }

    #[test]
    fn long_file_is_read_whole() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..3 * PIECE + 5).map(|n| n as u8).collect();
        std::fs::write(file.path(), &bytes).unwrap();
        assert!(read(file.path().as_os_str().as_bytes(), usize::MAX).unwrap() == bytes);
    }

    #[test]
    fn kinds_are_told_apart() {
        assert_eq!(kind(b"/").unwrap(), Kind::Directory);
        assert_eq!(kind(b"/dev/null").unwrap(), Kind::CharacterDevice);
        assert_eq!(kind(b"/proc/version").unwrap(), Kind::Other);
        assert_eq!(kind(b"/no/such/thing"), Err(Errno::ENOENT));
        assert_eq!(kind(b"/\0"), Err(Errno::EINVAL));
    }

    #[test]
    fn names_are_all_there_however_many() {
        let directory = tempfile::tempdir().unwrap();
        let mut wanted: Vec<Vec<u8>> = (0..1000).map(|n| format!("name-{n}").into_bytes()).collect();
        for name in &wanted {
            std::fs::write(directory.path().join(std::ffi::OsStr::from_bytes(name)), b"").unwrap();
        }
        wanted.sort();
        assert_eq!(names(directory.path().as_os_str().as_bytes()).unwrap(), wanted);
    }

    #[test]
    fn waiting_ends_at_the_deadline() {
        let (file, _other) = std::io::pipe().unwrap();
        let file = ManuallyDrop::new(File(std::os::fd::AsRawFd::as_raw_fd(&file)));
        let before = time::now();
        assert_eq!(wait(&[&file], Some(before + 2_000_000)), Err(Errno::ETIMEDOUT));
        assert!(time::now() >= before + 2_000_000);
    }
}
