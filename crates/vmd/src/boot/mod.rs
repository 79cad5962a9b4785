//! Boot protocols: from a file to a machine's first instruction.
//!
//! [`recognise`] tells by a file's content what it is, [`load`] puts it into guest memory and says with which registers the
//! first processor starts. One file for each protocol: `linux` (bzImage), `pvh`, `multiboot`, `openbsd`, `bios`; each
//! names its specification. Files are not trusted: every offset is checked against the file and every address against the
//! machine's RAM (`place::Ram`), and nothing is allocated beyond a file's size.
//!
//! What is put into low memory, beside the kernel:
//!
//! | address | Linux bzImage | PVH | multiboot 1 | OpenBSD |
//! |---|---|---|---|---|
//! | 0x0500 | GDT | GDT | GDT | |
//! | 0x2000 | | | | boot arguments |
//! | 0x7000 | zero page | start info, modules, memory map | | |
//! | 0x9000 to 0xe000 | page tables, identity, 4 GiB | | | |
//! | 0xf000 | | | | stack |
//! | 0x10000 | | | | GDT |
//! | 0x20000 | command line | command lines | information, strings | |

mod bios;
mod elf;
mod flat;
mod linux;
mod memory_map;
mod multiboot;
mod openbsd;
mod place;
mod pvh;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use vmm::{GuestMemory, Registers};

pub use bios::find as find_bios;
pub use memory_map::{E820Range, HIGH_RAM_START, LOW_RAM_END, ROM_END, e820, layout};

/// What [`recognise`] understands, for error messages.
pub const FORMATS: &str = "Linux bzImage, ELF with PVH note, multiboot 1, OpenBSD kernel, BIOS image";

/// Largest kernel file that is read.
const FILE_MAX: u64 = 1 << 30;

/// A file that can be booted. Its contents are read again by [`load`], so that nothing of them stays in the monitor's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    path: PathBuf,
    /// The contents of an image that is part of this program.
    built_in: Option<&'static [u8]>,
    format: &'static str,
    rom_size: u64,
}

/// A file with its contents, as long as they are looked at.
#[derive(Debug)]
struct Contents {
    path: PathBuf,
    data: Cow<'static, [u8]>,
    format: Format,
}

/// How a file boots.
#[derive(Debug)]
enum Format {
    Linux(linux::Header),
    Multiboot(multiboot::Kernel),
    Pvh { elf: elf::Elf, entry: u32 },
    OpenBsd(elf::Elf),
    Bios,
}

/// What the machine gives its kernel.
#[derive(Debug, Clone, Default)]
pub struct BootConfig {
    /// Command line.
    pub cmdline: String,
    /// Initial ramdisks or multiboot modules, in order.
    pub modules: Vec<Module>,
    /// What the kernel is told of the address space; see [`e820`].
    pub memory_map: Vec<E820Range>,
    /// Address of the ACPI RSDP, where there is one.
    pub rsdp: Option<u64>,
}

/// A file for the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Module {
    /// The file.
    pub path: PathBuf,
    /// What follows it on the command line (multiboot, PVH).
    pub args: String,
}

/// A machine ready to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// State of the first processor.
    pub registers: Registers,
    /// What was recognised and where it went, one line for people.
    pub description: String,
}

/// Why a machine cannot boot from a file.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The host does not let us read it.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: std::io::Error,
    },
    /// Not a regular file.
    #[error("{}: is {what}, not a file to boot (understood: {FORMATS})", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// What it is instead.
        what: &'static str,
    },
    /// Nothing that this program boots.
    #[error("{}: {found}; cannot boot it (understood: {FORMATS})", path.display())]
    Unknown {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        found: String,
    },
    /// The file ends too early.
    #[error("{}: truncated: {what} needs {need} bytes, the file has {have}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        what: String,
        /// Bytes that would be enough.
        need: u64,
        /// Bytes that are there.
        have: u64,
    },
    /// The file contradicts itself or asks for the impossible.
    #[error("{}: {what}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Something does not fit into the machine's memory.
    #[error(
        "{what} does not fit into the machine's memory: it needs {start:#x} to {end:#x}, the machine has {ram}; give it more with --memory"
    )]
    NoRoom {
        /// What was to be placed.
        what: String,
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
        /// The machine's RAM.
        ram: String,
    },
    /// Two things want the same memory.
    #[error("{what} at {start:#x} to {end:#x} overlaps {other}")]
    Overlap {
        /// What came second.
        what: String,
        /// Its first address.
        start: u64,
        /// Address after its last.
        end: u64,
        /// What was there.
        other: String,
    },
    /// An option this kind of image cannot take.
    #[error("{format} takes no {option}")]
    NotTaken {
        /// Kind of image.
        format: &'static str,
        /// The option.
        option: String,
    },
    /// The command line is longer than the kernel can read.
    #[error("the command line has {length} bytes, this kernel reads at most {max}")]
    CommandLine {
        /// Bytes given.
        length: usize,
        /// Bytes taken.
        max: usize,
    },
    /// There is no BIOS on the host.
    #[error("no BIOS found to boot a disk with (looked for {tried}); install the package `seabios`, or name a kernel with --kernel")]
    NoBios {
        /// Paths, comma separated.
        tried: String,
    },
}

impl Image {
    /// Kind of image, for people.
    pub fn format(&self) -> &'static str {
        self.format
    }

    /// The file it came from, or the name of one that is part of this program.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of ROM that have to end at 4 GiB, for [`layout`]: a BIOS' size, 0 for everything else.
    pub fn rom_size(&self) -> u64 {
        self.rom_size
    }
}

/// Reads a file and tells how it boots.
///
/// # Errors
/// [`BootError`] when it cannot be read or is nothing that boots; the text names what is understood.
pub fn recognise(path: &Path) -> Result<Image, BootError> {
    Ok(Contents::read(path)?.image())
}

/// Tells how an image boots that is part of this program; `name` is for messages.
///
/// # Errors
/// [`BootError`] when it is nothing that boots.
pub fn recognise_bytes(name: &str, data: &'static [u8]) -> Result<Image, BootError> {
    Ok(Contents::built_in(Path::new(name), data)?.image())
}

/// Puts `image` into `memory`. `entropy` fills what the kernel wants at random (OpenBSD).
///
/// # Errors
/// [`BootError`] when something does not fit, contradicts itself, or the image does not take what `config` gives it.
pub fn load(image: &Image, memory: &GuestMemory, config: &BootConfig, entropy: &mut dyn Read) -> Result<Loaded, BootError> {
    let contents = match image.built_in {
        Some(data) => Contents::built_in(&image.path, data)?,
        None => Contents::read(&image.path)?,
    };
    contents.load(memory, config, entropy)
}

impl Contents {
    fn read(path: &Path) -> Result<Contents, BootError> {
        let (file, size) = open(path)?;
        if size > FILE_MAX {
            let found = format!("{size} bytes are too many for a kernel");
            return Err(BootError::Unknown { path: path.to_owned(), found });
        }
        // The limit keeps a file that grows meanwhile, or lies about its size, from filling the host's memory.
        let mut data = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
        file.take(size).read_to_end(&mut data).map_err(|source| BootError::Read { path: path.to_owned(), source })?;
        let format = classify(path, &data)?;
        Ok(Contents { path: path.to_owned(), data: data.into(), format })
    }

    fn built_in(path: &Path, data: &'static [u8]) -> Result<Contents, BootError> {
        Ok(Contents { path: path.to_owned(), data: data.into(), format: classify(path, data)? })
    }

    fn image(self) -> Image {
        let (format, rom_size) = match self.format {
            Format::Linux(_) => ("Linux bzImage", 0),
            Format::Multiboot(_) => ("multiboot 1 kernel", 0),
            Format::Pvh { .. } => ("ELF kernel with PVH entry", 0),
            Format::OpenBsd(_) => ("OpenBSD kernel", 0),
            Format::Bios => ("BIOS", self.data.len() as u64),
        };
        let built_in = match self.data {
            Cow::Borrowed(data) => Some(data),
            Cow::Owned(_) => None,
        };
        Image { path: self.path, built_in, format, rom_size }
    }

    fn load(&self, memory: &GuestMemory, config: &BootConfig, entropy: &mut dyn Read) -> Result<Loaded, BootError> {
        let mut ram = place::Ram::new(memory, &config.memory_map);
        match &self.format {
            Format::Linux(header) => linux::load(self, header, &mut ram, config),
            Format::Multiboot(kernel) => multiboot::load(self, kernel, &mut ram, config),
            Format::Pvh { elf, entry } => pvh::load(self, elf, *entry, &mut ram, config),
            Format::OpenBsd(elf) => openbsd::load(self, elf, &mut ram, config, entropy),
            Format::Bios => bios::load(self, memory, config),
        }
    }
}

/// Opens a regular file and tells its size.
fn open(path: &Path) -> Result<(File, u64), BootError> {
    let read = |source| BootError::Read { path: path.to_owned(), source };
    // Looked at before it is opened: opening a FIFO would wait for a writer.
    let metadata = std::fs::metadata(path).map_err(read)?;
    if !metadata.is_file() {
        let what = if metadata.is_dir() { "a directory" } else { "a device, socket or pipe" };
        return Err(BootError::NotAFile { path: path.to_owned(), what });
    }
    let file = File::open(path).map_err(read)?;
    let size = file.metadata().map_err(read)?.len();
    Ok((file, size))
}

fn classify(path: &Path, data: &[u8]) -> Result<Format, BootError> {
    let unknown = |found: String| Err(BootError::Unknown { path: path.to_owned(), found });
    if let Some(header) = linux::Header::parse(path, data)? {
        return Ok(Format::Linux(header));
    }
    let elf = elf::Elf::parse(path, data)?;
    if let Some(elf) = &elf
        && openbsd::is_kernel(elf)
    {
        return Ok(Format::OpenBsd(elf.clone()));
    }
    if let Some(kernel) = multiboot::Kernel::parse(path, data, elf.as_ref())? {
        return Ok(Format::Multiboot(kernel));
    }
    if let Some(elf) = elf {
        return match pvh::entry(&elf) {
            Some(entry) => Ok(Format::Pvh { elf, entry }),
            None => unknown("an ELF file for x86, but with neither PVH note nor multiboot header nor OpenBSD's notes".into()),
        };
    }
    if bios::is_image(data) {
        return Ok(Format::Bios);
    }
    unknown(look(data).into())
}

/// What a file that does not boot looks like.
fn look(data: &[u8]) -> &'static str {
    const MAGICS: [(usize, &[u8], &str); 12] = [
        (0, b"\x1f\x8b", "compressed by gzip (unpack it with gunzip first)"),
        (0, b"\x28\xb5\x2f\xfd", "compressed by zstd (unpack it with unzstd first)"),
        (0, b"\xfd7zXZ\0", "compressed by xz (unpack it with unxz first)"),
        (0, b"BZh", "compressed by bzip2 (unpack it with bunzip2 first)"),
        (0, b"QFI\xfb", "a qcow2 disk image (give it with --disk)"),
        (0, b"KDMV", "a VMDK disk image"),
        (0, b"070701", "a cpio archive (an initial ramdisk goes to --initrd)"),
        (0, b"!<arch>\n", "an ar archive or Debian package"),
        (0x38, b"ARM\x64", "a Linux kernel for arm64"),
        (0x30, b"RISCV\0", "a Linux kernel for RISC-V"),
        (0, b"MZ", "an EFI or Windows program"),
        (510, b"\x55\xaa", "a disk image or boot sector (give it with --disk)"),
    ];
    if data.is_empty() {
        return "an empty file";
    }
    if let Some((_, _, name)) = MAGICS.iter().find(|(at, magic, _)| data.get(*at..).is_some_and(|d| d.starts_with(magic))) {
        return name;
    }
    let head = &data[..data.len().min(1024)];
    let is_text = std::str::from_utf8(head).is_ok_and(|s| !s.contains('\0')) || head.is_ascii() && !head.contains(&0);
    if is_text { "a text file" } else { "of no known format" }
}

/// Little-endian numbers out of a file, `None` past its end.
fn u16_at(data: &[u8], at: usize) -> Option<u16> {
    data.get(at..)?.first_chunk().map(|b| u16::from_le_bytes(*b))
}

fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    data.get(at..)?.first_chunk().map(|b| u32::from_le_bytes(*b))
}

fn u64_at(data: &[u8], at: usize) -> Option<u64> {
    data.get(at..)?.first_chunk().map(|b| u64::from_le_bytes(*b))
}
