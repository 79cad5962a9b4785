//! Linux bzImage: Linux `Documentation/arch/x86/boot.rst`, sections "64-bit boot protocol" and "32-bit boot protocol".
//!
//! The monitor does what the real-mode part would: it fills the zero page and starts the protected-mode part, by its 64-bit
//! entry in long mode when the kernel has one (XLF_KERNEL_64), else by its 32-bit entry. Several initial ramdisks become one.

use std::ops::Range;
use std::path::Path;

use abi::boot::{E820Entry, linux as words};
use vmm::memory::PAGE_SIZE;
use vmm::registers::RSI;
use zerocopy::IntoBytes;

use super::memory_map::EXTENDED_START;
use super::place::Ram;
use super::{BootConfig, BootError, Contents, Loaded, Module, flat, open, u16_at, u32_at, u64_at};

/// Where the zero page goes.
const ZERO_PAGE: u64 = 0x7000;
/// Where the command line goes.
const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line that fits there, below the EBDA, with its terminator.
const COMMAND_LINE_ROOM: u32 = 0x1_0000;

/// The setup header's fields that a loader needs.
#[derive(Debug, Clone)]
pub(super) struct Header {
    version: u16,
    /// The protected-mode part in the file.
    kernel: Range<usize>,
    /// The header's bytes in the file, copied into the zero page.
    fields: Range<usize>,
    entry_64: bool,
    relocatable: bool,
    alignment: u64,
    preferred: u64,
    init_size: u64,
    code32_start: u32,
    initrd_max: u32,
    cmdline_size: u32,
}

impl Header {
    /// Parses the first sectors; `None` when it is no Linux kernel.
    pub(super) fn parse(path: &Path, data: &[u8]) -> Result<Option<Header>, BootError> {
        if data.get(words::HEADER..).is_none_or(|d| !d.starts_with(words::HEADER_MAGIC))
            || u16_at(data, words::BOOT_FLAG) != Some(words::BOOT_FLAG_MAGIC)
        {
            return Ok(None);
        }
        let short = |what: &str, need: u64| BootError::Truncated {
            path: path.to_owned(),
            what: format!("{what} of the Linux kernel"),
            need,
            have: data.len() as u64,
        };
        let malformed = |what: &str| BootError::Malformed { path: path.to_owned(), what: what.into() };
        if data.len() < words::HEADER_END {
            return Err(short("the setup header", words::HEADER_END as u64));
        }
        let field = |at| u32_at(data, at).unwrap_or(0);
        let version = u16_at(data, words::VERSION).unwrap_or(0);
        if version < 0x202 {
            return Err(malformed("a Linux kernel of boot protocol older than 2.02 (before Linux 2.4); it cannot be started"));
        }
        if data[words::LOADFLAGS] & words::LOADED_HIGH == 0 {
            return Err(malformed("a Linux zImage, loaded below 1 MiB; only bzImage can be started"));
        }
        let sectors = match data[words::SETUP_SECTS] {
            0 => 4,
            n => usize::from(n),
        };
        let start = (sectors + 1) * 512;
        // Before 2.04 only the low half of syssize was valid; take what there is.
        let size = if version < 0x204 { data.len().saturating_sub(start) as u64 } else { u64::from(field(words::SYSSIZE)) * 16 };
        // The last unit may be cut: some images are not padded.
        let need = start as u64 + size;
        if size == 0 || (data.len() as u64) < need.saturating_sub(15) {
            return Err(short("the protected-mode part", need.max(start as u64 + 16)));
        }
        let end = data.len().min(usize::try_from(need).unwrap_or(usize::MAX));
        let relocatable = version >= 0x205 && data[words::RELOCATABLE_KERNEL] != 0;
        let xloadflags = if version >= 0x20c { u16_at(data, words::XLOADFLAGS).unwrap_or(0) } else { 0 };
        Ok(Some(Header {
            version,
            kernel: start..end,
            fields: words::SETUP_SECTS..words::HEADER + usize::from(data[words::JUMP_OFFSET]),
            entry_64: xloadflags & words::XLF_KERNEL_64 != 0,
            relocatable,
            alignment: if relocatable { u64::from(field(words::KERNEL_ALIGNMENT)) } else { 0 },
            preferred: if version >= 0x20a { u64_at(data, words::PREF_ADDRESS).unwrap_or(0) } else { EXTENDED_START },
            init_size: if version >= 0x20a { u64::from(field(words::INIT_SIZE)) } else { 0 },
            code32_start: field(words::CODE32_START),
            initrd_max: if version >= 0x203 { field(words::INITRD_ADDR_MAX) } else { words::INITRD_ADDR_MAX_OLD },
            cmdline_size: if version >= 0x206 { field(words::CMDLINE_SIZE) } else { words::CMDLINE_SIZE_OLD },
        }))
    }

    /// Where the protected-mode part goes.
    fn load_address(&self) -> u64 {
        if self.entry_64 && self.preferred != 0 {
            self.preferred
        } else if self.relocatable && self.alignment.is_power_of_two() {
            EXTENDED_START.next_multiple_of(self.alignment)
        } else {
            EXTENDED_START
        }
    }
}

/// Loads the kernel and its ramdisks.
pub(super) fn load(file: &Contents, header: &Header, ram: &mut Ram<'_>, config: &BootConfig) -> Result<Loaded, BootError> {
    let kernel = file.data.get(header.kernel.clone()).unwrap_or_default();
    let at = header.load_address();
    // Not all of init_size is written, but the ramdisk must stay out of it.
    ram.reserve("the Linux kernel", at, header.init_size.max(kernel.len() as u64))?;
    ram.write("the Linux kernel", at, kernel)?;

    let max = header.cmdline_size.min(COMMAND_LINE_ROOM - 1) as usize;
    if config.cmdline.len() > max {
        return Err(BootError::CommandLine { length: config.cmdline.len(), max });
    }
    ram.put("the command line", COMMAND_LINE, &[config.cmdline.as_bytes(), b"\0"].concat())?;

    let mut zero_page = vec![0; words::ZERO_PAGE_SIZE];
    let fields = header.fields.start..header.fields.end.min(file.data.len());
    zero_page[fields.clone()].copy_from_slice(&file.data[fields]);
    zero_page[words::TYPE_OF_LOADER] = words::LOADER_UNDEFINED;
    put_u32(&mut zero_page, words::CMD_LINE_PTR, COMMAND_LINE);
    if header.version >= 0x20e {
        zero_page[words::ACPI_RSDP_ADDR..][..8].copy_from_slice(&config.rsdp.unwrap_or(0).to_le_bytes());
    }
    put_memory_map(&mut zero_page, config);
    let initrd = put_initrd(ram, header, &config.modules, at)?;
    put_u32(&mut zero_page, words::RAMDISK_IMAGE, initrd.start);
    put_u32(&mut zero_page, words::RAMDISK_SIZE, initrd.end - initrd.start);

    let mut registers = if header.entry_64 {
        flat::long_mode(ram, at + words::ENTRY_64)?
    } else {
        // A relocatable kernel starts where it was loaded; another says where.
        let entry = if header.relocatable { u32::try_from(at).unwrap_or(u32::MAX) } else { header.code32_start };
        put_u32(&mut zero_page, words::CODE32_START, u64::from(entry));
        flat::protected_mode(ram, entry)?
    };
    registers.gpr[RSI] = ZERO_PAGE;
    ram.put("the zero page", ZERO_PAGE, &zero_page)?;

    let mut description = format!(
        "Linux bzImage, boot protocol {}.{:02}, {}-bit entry at {:#x}",
        header.version >> 8,
        header.version & 0xff,
        if header.entry_64 { 64 } else { 32 },
        registers.rip
    );
    if initrd.end > initrd.start {
        description += &format!(", initial ramdisk at {:#x} ({} KiB)", initrd.start, (initrd.end - initrd.start).div_ceil(1024));
    }
    Ok(Loaded { registers, description })
}

fn put_memory_map(zero_page: &mut [u8], config: &BootConfig) {
    let mut count = 0;
    for (range, slot) in config.memory_map.iter().take(words::E820_MAX).zip(zero_page[words::E820_TABLE..].chunks_exact_mut(20)) {
        let entry = E820Entry { address: range.start.into(), size: range.size.into(), kind: range.kind.into() };
        slot.copy_from_slice(entry.as_bytes());
        count += 1;
    }
    zero_page[words::E820_ENTRIES] = count;
}

/// Places the ramdisks one after the other, as high as the kernel allows. Each starts 4-byte aligned, as cpio wants it.
fn put_initrd(ram: &mut Ram<'_>, header: &Header, modules: &[Module], kernel: u64) -> Result<Range<u64>, BootError> {
    let mut files = Vec::with_capacity(modules.len());
    let mut total: u64 = 0;
    for module in modules {
        if !module.args.is_empty() {
            let option = format!("arguments after an initial ramdisk (`{}`)", module.args);
            return Err(BootError::NotTaken { format: "a Linux kernel", option });
        }
        let (file, size) = open(&module.path)?;
        files.push((&module.path, file, total, size));
        total = total.saturating_add(size).next_multiple_of(4);
    }
    if total == 0 {
        return Ok(0..0);
    }
    let limit = ram.end_of_ram(kernel).unwrap_or(0).min(u64::from(header.initrd_max) + 1);
    let what = "the initial ramdisk";
    let Some(start) = limit.checked_sub(total).map(|start| start & !(PAGE_SIZE - 1)) else {
        // Says how much is wanted and what there is.
        ram.reserve(what, kernel, total)?;
        return Err(BootError::NotTaken { format: "this Linux kernel", option: format!("initial ramdisk of {total} bytes") });
    };
    ram.reserve(what, start, total)?;
    for (path, file, offset, size) in files {
        ram.read_file(path, file, start + offset, size)?;
    }
    Ok(start..start + total)
}

/// Stores the low half of `value`; addresses given to it are below 4 GiB.
fn put_u32(page: &mut [u8], at: usize, value: u64) {
    page[at..][..4].copy_from_slice(&value.to_le_bytes()[..4]);
}
