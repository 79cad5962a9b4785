//! Disks: images on the host that block devices of every dialect read and write.
//!
//! [`Disk`] is what a device sees. [`open`] makes one from a [`DiskSpec`]: a raw file or block device ([`raw`]) or a qcow2 image
//! ([`qcow2`], by the `imago` crate). The format is the one asked for, or told by the image's first bytes; raw is assumed only
//! when no other format's mark is found. A file that an image names by itself (backing file, data file) is opened only when asked
//! for, since an image from a stranger could name any file of the host.
//!
//! An image that is written is locked against all others, one that is only read against writers, by an open-file-description
//! lock: two machines, or two disks of one, never write the same file. QEMU takes such locks, too, and respects these.

mod file;
mod qcow2;
mod raw;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use crate::DeviceBus;
use crate::virtio::queue::GuestSlice;

/// Unit of disk sizes and positions, in bytes.
pub const SECTOR: u64 = 512;

/// A disk. Every position and length is in bytes and a multiple of [`SECTOR`]; devices check against [`Disk::size`] first.
pub trait Disk: Send + Sync {
    /// Size in bytes, a multiple of [`SECTOR`].
    fn size(&self) -> u64;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// Fills `data` from `offset`.
    ///
    /// # Errors
    /// What the host says.
    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes `data` to `offset`. Durable only after [`Disk::flush`].
    ///
    /// # Errors
    /// What the host says.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// What the host says; nothing is known of earlier writes then.
    fn flush(&self) -> io::Result<()>;

    /// The range is not needed any more; it may read as anything of this disk afterwards.
    ///
    /// # Errors
    /// What the host says. A host that cannot free space is no error.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// The range reads as zeroes afterwards; `may_unmap` allows to give its space back.
    ///
    /// # Errors
    /// What the host says.
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;

    /// Fills guest memory from `offset`.
    ///
    /// # Errors
    /// What the host says.
    fn read_to_guest(&self, mut offset: u64, slices: &[GuestSlice<'_>]) -> io::Result<()> {
        let mut bounce = Bounce::new(slices);
        for slice in slices {
            for_chunks(slice, |chunk| {
                let data = bounce.of(chunk.len());
                self.read_at(offset, data)?;
                chunk.copy_from(data);
                offset += data.len() as u64;
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Writes guest memory to `offset`.
    ///
    /// # Errors
    /// What the host says.
    fn write_from_guest(&self, mut offset: u64, slices: &[GuestSlice<'_>]) -> io::Result<()> {
        let mut bounce = Bounce::new(slices);
        for slice in slices {
            for_chunks(slice, |chunk| {
                let data = bounce.of(chunk.len());
                chunk.copy_to(data);
                self.write_at(offset, data)?;
                offset += data.len() as u64;
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// Image formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The bytes of the disk and nothing else.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        })
    }
}

/// Which image to open, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// The image.
    pub path: PathBuf,
    /// Never write to it.
    pub read_only: bool,
    /// Its format; `None` to look at its first bytes.
    pub format: Option<Format>,
    /// Open the backing and data files that the image names.
    pub follow_references: bool,
    /// By which device the guest finds it.
    pub bus: DeviceBus,
    /// The guest finds a drive with a DVD in it.
    pub dvd: bool,
    /// Xen's frontend may have its grants kept (`feature-persistent` of `io/blkif.h`): faster for 4 KiB at random, slower for what is large.
    pub persistent_grants: bool,
}

impl DiskSpec {
    /// The image at `path`, writable, of the format that it says.
    pub fn new(path: impl Into<PathBuf>) -> DiskSpec {
        DiskSpec {
            path: path.into(),
            read_only: false,
            format: None,
            follow_references: false,
            bus: DeviceBus::default(),
            dvd: false,
            persistent_grants: false,
        }
    }
}

impl FromStr for DiskSpec {
    type Err = String;

    /// `FILE[,ro][,format=raw|qcow2][,backing=on|off][,bus=virtio|xen|hyperv][,dvd][,persistent-grants]`; a comma in the file's name is written twice.
    fn from_str(text: &str) -> Result<DiskSpec, String> {
        let mut words = split_options(text).into_iter();
        let mut spec = DiskSpec::new(words.next().unwrap_or_default());
        if spec.path.as_os_str().is_empty() {
            return Err(
                "a disk needs a file name: FILE[,ro][,format=raw|qcow2][,backing=on|off][,bus=virtio|xen|hyperv][,dvd][,persistent-grants]"
                    .into(),
            );
        }
        for word in words {
            match word.as_str() {
                "ro" => spec.read_only = true,
                "dvd" => (spec.dvd, spec.read_only) = (true, true),
                "persistent-grants" => spec.persistent_grants = true,
                "format=raw" => spec.format = Some(Format::Raw),
                "format=qcow2" => spec.format = Some(Format::Qcow2),
                "backing=on" => spec.follow_references = true,
                "backing=off" => spec.follow_references = false,
                _ => match word.strip_prefix("bus=") {
                    Some(bus) => spec.bus = bus.parse()?,
                    None => {
                        return Err(format!(
                            "unknown disk option '{word}'; there are ro, format=raw|qcow2, backing=on|off, bus=virtio|xen|hyperv, dvd and persistent-grants"
                        ));
                    }
                },
            }
        }
        Ok(spec)
    }
}

impl fmt::Display for DiskSpec {
    /// As it is parsed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path.to_string_lossy().replace(',', ",,"))?;
        if self.read_only {
            f.write_str(",ro")?;
        }
        if let Some(format) = self.format {
            write!(f, ",format={format}")?;
        }
        if self.follow_references {
            f.write_str(",backing=on")?;
        }
        write!(f, ",bus={}", self.bus)?;
        for (word, is_given) in [("dvd", self.dvd), ("persistent-grants", self.persistent_grants)] {
            if is_given {
                write!(f, ",{word}")?;
            }
        }
        Ok(())
    }
}

/// Splits at single commas; two in a row are one comma of a word.
pub fn split_options(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter == ',' && letters.next_if_eq(&',').is_none() {
            words.push(String::new());
        } else if let Some(word) = words.last_mut() {
            word.push(letter);
        }
    }
    words
}

/// Why an image cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The host does not open it.
    #[error("disk {path}: {source}")]
    Open {
        /// The image.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// It is neither a file nor a block device.
    #[error("disk {path} is {what}; a disk is a file or a block device")]
    NotAnImage {
        /// The image.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Somebody else has it open.
    #[error("disk {path} is in use by another machine{hint}")]
    InUse {
        /// The image.
        path: PathBuf,
        /// What can be done.
        hint: &'static str,
    },
    /// It holds no sector.
    #[error("disk {path} is empty; make it with: truncate -s SIZE {path}")]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// A known format that is not supported.
    #[error(
        "disk {path} is {format}, which is not supported; convert it with: qemu-img convert -O qcow2 {path} disk.qcow2 (or say format=raw to use its bytes as they are)"
    )]
    Format {
        /// The image.
        path: PathBuf,
        /// The format found.
        format: &'static str,
    },
    /// The image's own data structures are wrong.
    #[error("disk {path} is not a usable {format} image: {source}; `qemu-img check {path}` may tell more")]
    Corrupt {
        /// The image.
        path: PathBuf,
        /// The format asked for or found.
        format: Format,
        /// What is wrong.
        source: io::Error,
    },
    /// The image names other files, and nobody allowed to open them.
    #[error("disk {path} needs another file ({source}); add backing=on if you trust the image to name files of this host")]
    Reference {
        /// The image.
        path: PathBuf,
        /// Which file.
        source: io::Error,
    },
}

/// Opens and locks an image.
///
/// # Errors
/// [`DiskError`] says what the image is and what can be done.
pub fn open(spec: &DiskSpec) -> Result<Arc<dyn Disk>, DiskError> {
    let file = file::open_locked(spec)?;
    let found = probe(&file).map_err(|source| DiskError::Open { path: spec.path.clone(), source })?;
    match (spec.format, found) {
        (Some(Format::Raw), _) => Ok(Arc::new(raw::Raw::new(file, spec, false)?)),
        (None, Probed::None) => Ok(Arc::new(raw::Raw::new(file, spec, true)?)),
        (Some(Format::Qcow2), _) | (None, Probed::Known(Format::Qcow2)) => Ok(Arc::new(qcow2::Qcow2::open(file, spec)?)),
        (None, Probed::Known(Format::Raw)) => Ok(Arc::new(raw::Raw::new(file, spec, false)?)),
        (None, Probed::Unsupported(format)) => Err(DiskError::Format { path: spec.path.clone(), format }),
    }
}

/// What an image's first bytes say.
enum Probed {
    Known(Format),
    Unsupported(&'static str),
    None,
}

/// Marks at the start of images, from the formats' documents.
const MAGICS: [(usize, &[u8], Probed); 9] = [
    (0, b"QFI\xfb\0\0\0\x01", Probed::Unsupported("a qcow image of version 1")),
    (0, b"QFI\xfb", Probed::Known(Format::Qcow2)),
    (0, b"KDMV", Probed::Unsupported("a VMDK image")),
    (0, b"# Disk DescriptorFile", Probed::Unsupported("a VMDK descriptor")),
    (0, b"vhdxfile", Probed::Unsupported("a VHDX image")),
    (0, b"conectix", Probed::Unsupported("a VHD image")),
    (0, b"QED\0", Probed::Unsupported("a QED image")),
    (64, &[0x7f, 0x10, 0xda, 0xbe], Probed::Unsupported("a VDI image")),
    (0, b"WithoutFreeSpace", Probed::Unsupported("a Parallels image")),
];

/// Bytes that [`probe_bytes`] wants to see.
const PROBE_BYTES: usize = 512;

fn probe(file: &std::fs::File) -> io::Result<Probed> {
    let mut head = [0; PROBE_BYTES];
    let len = raw::read_up_to(file, 0, &mut head)?;
    Ok(probe_bytes(&head[..len]))
}

fn probe_bytes(head: &[u8]) -> Probed {
    for (offset, magic, probed) in MAGICS {
        if head.get(offset..).is_some_and(|tail| tail.starts_with(magic)) {
            return probed;
        }
    }
    Probed::None
}

/// Bytes moved at once where data cannot go to guest memory directly.
const CHUNK: usize = 256 << 10;

/// A buffer for [`Disk`]s that need one; never larger than [`CHUNK`].
struct Bounce(Vec<u8>);

impl Bounce {
    fn new(slices: &[GuestSlice<'_>]) -> Bounce {
        let longest = slices.iter().map(VolatileSlice::len).max().unwrap_or_default();
        Bounce(vec![0; longest.min(CHUNK)])
    }

    fn of(&mut self, len: usize) -> &mut [u8] {
        &mut self.0[..len]
    }
}

fn for_chunks<'a>(slice: &GuestSlice<'a>, mut each: impl FnMut(GuestSlice<'a>) -> io::Result<()>) -> io::Result<()> {
    let mut at = 0;
    while at < slice.len() {
        let len = (slice.len() - at).min(CHUNK);
        each(slice.subslice(at, len).map_err(io::Error::other)?)?;
        at += len;
    }
    Ok(())
}

/// Zeroes written at once where nothing better is to be had.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

fn write_plain_zeroes(disk: &dyn Disk, mut offset: u64, mut len: u64) -> io::Result<()> {
    while len > 0 {
        let step = len.min(ZEROES.len() as u64);
        disk.write_at(offset, &ZEROES[..step as usize])?;
        offset += step;
        len -= step;
    }
    Ok(())
}

/// Size in whole sectors.
fn whole_sectors(path: &Path, bytes: u64) -> Result<u64, DiskError> {
    match bytes / SECTOR * SECTOR {
        0 => Err(DiskError::Empty { path: path.into() }),
        size => Ok(size),
    }
}

#[cfg(test)]
mod tests;
