//! QEMU's firmware configuration files, as Linux shows them: `/sys/firmware/qemu_fw_cfg/by_name/NAME/raw`.
//!
//! (Linux `Documentation/ABI/testing/sysfs-firmware-qemu_fw_cfg`; module `qemu_fw_cfg`.) The names have slashes and are a tree there. The
//! files are read only, and they never change while the machine runs. The kernel goes through a file from its beginning for each
//! read, so a value is fetched with as few reads as it gives.

use alloc::format;
use alloc::vec::Vec;

use pvbus::{Kind, Store, StoreError};

use super::Opened;
use crate::error::Error;
use crate::sys::{Errno, file};

/// Where the kernel shows the files.
pub const DIRECTORY: &str = "/sys/firmware/qemu_fw_cfg";
/// Largest file that is read.
const MAX_SIZE: usize = 256 << 20;
/// Bytes of a size's text that are looked at.
const SIZE_TEXT: usize = 32;
/// Not a hypervisor's interface, so it has no kind of its own, but this name.
pub const KIND: Kind = Kind::Unknown(*b"QEMU fw_cfg\0");

/// The files.
#[derive(Debug)]
pub struct Files {
    by_name: Vec<u8>,
}

impl Files {
    /// The files in `directory`.
    ///
    /// # Errors
    /// [`Error::NoStore`] when the kernel shows none.
    pub fn open(directory: &str) -> Result<Files, Error> {
        let by_name = format!("{directory}/by_name");
        if file::kind(by_name.as_bytes()) == Ok(file::Kind::Directory) {
            return Ok(Files { by_name: by_name.into_bytes() });
        }
        Err(Error::NoStore(format!("no fw_cfg files: {by_name} is not there (module qemu_fw_cfg, and a QEMU-like host)")))
    }

    /// The path of `name` and `attribute`. It may not lead out of the tree.
    fn path(&self, name: &[u8], attribute: &[u8]) -> Result<Vec<u8>, StoreError> {
        if !name.is_empty() && name.split(|&byte| byte == b'/').any(|part| matches!(part, b"" | b"." | b"..")) {
            return Err(StoreError::BadKey);
        }
        Ok([self.by_name.as_slice(), b"/", name, attribute].concat())
    }
}

impl Store for Files {
    fn kind(&self) -> Kind {
        KIND
    }

    fn read(&mut self, key: &[u8]) -> Result<Vec<u8>, StoreError> {
        let size = file::read(&self.path(key, b"/size")?, SIZE_TEXT).map_err(refusal)?;
        let size = core::str::from_utf8(&size).ok().and_then(|size| size.trim().parse::<usize>().ok());
        let size = size.filter(|&size| size <= MAX_SIZE).ok_or(StoreError::NoMemory)?;
        file::read(&self.path(key, b"/raw")?, size).map_err(refusal)
    }

    fn write(&mut self, _: &[u8], _: &[u8]) -> Result<(), StoreError> {
        Err(StoreError::Unsupported)
    }

    fn list(&mut self, key: &[u8]) -> Result<Vec<Vec<u8>>, StoreError> {
        let key = key.strip_suffix(b"/").unwrap_or(key);
        // A file's directory holds its attributes; below it there is nothing.
        if file::exists(&self.path(key, b"/raw")?) {
            return Ok(Vec::new());
        }
        file::names(&self.path(key, b"")?).map_err(refusal)
    }
}

impl Opened for Files {
    fn rules(&self) -> &'static str {
        "fw_cfg files are named as by_name in sysfs shows them; they can only be read, by root, and never change"
    }

    fn subscribe(&mut self, _: &[u8]) -> Result<(), StoreError> {
        Err(StoreError::Unsupported)
    }
}

fn refusal(errno: Errno) -> StoreError {
    match errno {
        Errno::ENOENT | Errno::ENOTDIR => StoreError::NotFound,
        Errno::EACCES | Errno::EPERM => StoreError::Denied,
        Errno::EINVAL | Errno::ENAMETOOLONG => StoreError::BadKey,
        _ => StoreError::Transport("the kernel does not show the file"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn files() -> (tempfile::TempDir, Files) {
        let directory = tempfile::tempdir().unwrap();
        for (name, value) in [("opt/org.pvbus/x", b"a\nb\0".as_slice()), ("opt/org.pvbus/y", b""), ("etc/e820", b"\xff")] {
            let file = directory.path().join("by_name").join(name);
            fs::create_dir_all(&file).unwrap();
            fs::write(file.join("raw"), value).unwrap();
            fs::write(file.join("size"), format!("{}\n", value.len())).unwrap();
        }
        let files = Files::open(directory.path().to_str().unwrap()).unwrap();
        (directory, files)
    }

    #[test]
    fn file_s_bytes_are_its_value() {
        let (_directory, mut files) = files();
        assert_eq!(files.read(b"opt/org.pvbus/x").unwrap(), b"a\nb\0");
        assert_eq!(files.read(b"opt/org.pvbus/y").unwrap(), b"");
        assert_eq!(files.read(b"opt/org.pvbus/z"), Err(StoreError::NotFound));
        assert_eq!(files.read(b"opt/org.pvbus"), Err(StoreError::NotFound));
    }

    #[test]
    fn tree_is_listed_and_files_have_nothing_below() {
        let (_directory, mut files) = files();
        assert_eq!(files.list(b"").unwrap(), [b"etc", b"opt"]);
        assert_eq!(files.list(b"opt/org.pvbus/").unwrap(), [b"x", b"y"]);
        assert!(files.list(b"opt/org.pvbus/x").unwrap().is_empty());
        assert_eq!(files.list(b"nowhere"), Err(StoreError::NotFound));
    }

    #[test]
    fn names_do_not_lead_out_of_the_tree() {
        let (directory, mut files) = files();
        fs::write(directory.path().join("raw"), b"secret").unwrap();
        fs::write(directory.path().join("size"), b"6").unwrap();
        for name in ["..", "opt/../..", "/etc", "./opt"] {
            assert_eq!(files.read(name.as_bytes()), Err(StoreError::BadKey), "{name}");
        }
    }

    #[test]
    fn nothing_is_written_and_nothing_changes() {
        let (_directory, mut files) = files();
        assert_eq!(files.write(b"etc/e820", b""), Err(StoreError::Unsupported));
        assert_eq!(files.remove(b"etc/e820"), Err(StoreError::Unsupported));
        assert_eq!(files.subscribe(b"etc/e820"), Err(StoreError::Unsupported));
    }

    #[test]
    fn kernel_without_the_files_is_no_store() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Files::open(directory.path().to_str().unwrap()).unwrap_err().status(), 4);
    }
}
