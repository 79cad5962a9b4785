//! qcow2 images, by the `imago` crate.
//!
//! imago works on buffers of its own process, so data passes through a bounce buffer in pieces ([`Disk`]'s default). Reads and
//! writes may run at once; a discard waits for them, since it moves what they may be using.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use imago::file::File as ImageFile;
use imago::qcow2::Qcow2 as Image;
use imago::{DenyImplicitOpenGate, FormatDriverBuilder, PermissiveImplicitOpenGate, StorageOpenOptions, SyncFormatAccess};

use super::raw::read_up_to;
use super::{Disk, DiskError, DiskSpec, Format, SECTOR, whole_sectors, write_plain_zeroes};

/// A qcow2 disk.
pub(super) struct Qcow2 {
    image: RwLock<SyncFormatAccess<ImageFile>>,
    size: u64,
    read_only: bool,
    /// imago panicked; nothing it holds can be trusted.
    broken: AtomicBool,
}

impl Qcow2 {
    /// The image in `file`, which is open and locked.
    pub(super) fn open(file: File, spec: &DiskSpec) -> Result<Qcow2, DiskError> {
        let path = || spec.path.clone();
        let broken = |source| DiskError::Corrupt { path: path(), format: Format::Qcow2, source };
        check_header(&file).map_err(broken)?;
        let options = StorageOpenOptions::new().filename(&spec.path).write(!spec.read_only);
        let storage = ImageFile::from_open_file(file, options).map_err(|source| DiskError::Open { path: path(), source })?;
        let builder = Image::<ImageFile>::builder(storage).write(!spec.read_only);
        let opened = catch_unwind(AssertUnwindSafe(|| {
            if spec.follow_references {
                builder.open_sync(PermissiveImplicitOpenGate::default())
            } else {
                builder.open_sync(DenyImplicitOpenGate::default())
            }
        }));
        let opened = opened.unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::InvalidData, "its tables make no sense")));
        let image = opened.map_err(|source| match source.kind() {
            // Only the gate says so: the file itself is open already.
            io::ErrorKind::PermissionDenied if !spec.follow_references => DiskError::Reference { path: path(), source },
            _ => broken(source),
        })?;
        let image = SyncFormatAccess::new(image).map_err(broken)?;
        let size = whole_sectors(&spec.path, image.size())?;
        let disk = Qcow2 { image: RwLock::new(image), size, read_only: spec.read_only, broken: AtomicBool::new(false) };
        // A broken first table shows here and not in the middle of the guest's boot.
        disk.read_at(0, &mut [0; SECTOR as usize]).map_err(broken)?;
        Ok(disk)
    }

    /// Does `work` on the image. Some images whose tables are wrong make imago panic; that is an I/O error here, and the last thing
    /// that is done with the image.
    fn with<T>(&self, work: impl FnOnce(&SyncFormatAccess<ImageFile>) -> io::Result<T>) -> io::Result<T> {
        let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
        self.guard(|| work(&image))
    }

    /// Like [`Qcow2::with`], with nobody else at it.
    fn with_alone(&self, work: impl FnOnce(&mut SyncFormatAccess<ImageFile>) -> io::Result<()>) -> io::Result<()> {
        let mut image = self.image.write().unwrap_or_else(PoisonError::into_inner);
        self.guard(|| work(&mut image))
    }

    fn guard<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.broken.load(Ordering::Acquire) {
            return Err(io::Error::other("qcow2 image is broken"));
        }
        catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
            self.broken.store(true, Ordering::Release);
            Err(io::Error::other("qcow2 image is broken"))
        })
    }
}

/// What imago does not look at: it takes ciphertext for data, and a table behind the end of the file for one of zeroes, which
/// would make an empty disk of a cut-off image. Offsets from QEMU's docs/interop/qcow2.txt; all fields are big-endian.
fn check_header(mut file: &File) -> io::Result<()> {
    let wrong = |text: String| Err(io::Error::new(io::ErrorKind::InvalidData, text));
    let end = file.seek(SeekFrom::End(0))?;
    let mut header = [0; 104];
    // Version 2 ends after 72 bytes, but is followed by tables.
    if read_up_to(file, 0, &mut header)? < header.len() {
        return wrong("the header is cut off".into());
    }
    let field32 = |at: usize| header[at..].first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
    let field64 = |at: usize| header[at..].first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
    if field32(32) != 0 {
        return wrong("it is encrypted, which is not supported".into());
    }
    let (cluster_bits, size, l1_entries) = (field32(20), field64(24), field32(36));
    // An L2 table is a cluster of 8-byte entries, each for a cluster.
    if (9..=21).contains(&cluster_bits) && size.div_ceil(1 << (2 * cluster_bits - 3)) > u64::from(l1_entries) {
        return wrong(format!("its L1 table of {l1_entries} entries is too small for {size} bytes"));
    }
    let inside = |name: &str, offset: u64| {
        if offset == 0 || offset >= end {
            wrong(format!("its {name} would be at {offset:#x}, and the file ends at {end:#x}"))
        } else {
            Ok(())
        }
    };
    inside("L1 table", field64(40))?;
    let refcount_table = if field32(56) == 0 { 0 } else { field64(48) };
    inside("refcount table", refcount_table)?;
    let mut entry = [0; 8];
    read_up_to(file, refcount_table, &mut entry)?;
    let refcounts = u64::from_be_bytes(entry) & !0x1ff;
    inside("first refcount block", refcounts)?;
    // The first refcount is the header's own; without it, imago would give the header away as free space.
    let mut first = [0; 8];
    read_up_to(file, refcounts, &mut first)?;
    let order = if field32(4) < 3 { 4 } else { field32(96) };
    let is_used = match order {
        0..=2 => first[0] & ((1u8 << (1 << order)) - 1) != 0,
        3..=6 => first[..1 << (order - 3)].iter().any(|byte| *byte != 0),
        _ => true, // imago refuses it.
    };
    if is_used { Ok(()) } else { wrong("its refcounts say that its header is free space".into()) }
}

impl Disk for Qcow2 {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.with(|image| image.read(data, offset))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.with(|image| image.write(data, offset))
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.with(|image| image.flush().and_then(|()| image.sync()))
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.with_alone(|image| image.discard_to_any(offset, len)) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        let result = if may_unmap {
            self.with_alone(|image| image.discard_to_zero(offset, len))
        } else {
            self.with(|image| image.write_zeroes(offset, len))
        };
        match result {
            // Version 2 has no clusters of zeroes.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => write_plain_zeroes(self, offset, len),
            result => result,
        }
    }
}
