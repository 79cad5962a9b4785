//! Multiboot 1: Multiboot Specification version 0.6.96.
//!
//! The kernel is an ELF file, or flat with addresses in its header. As GRUB Legacy and QEMU do it, the command line and the
//! modules' strings begin with the file's name.

use std::path::Path;

use abi::multiboot as words;
use vmm::registers::{RAX, RBX};
use zerocopy::{FromBytes, IntoBytes};

use super::elf::Elf;
use super::memory_map::{EBDA_START, EXTENDED_START};
use super::place::Ram;
use super::{BootConfig, BootError, Contents, Loaded, flat, u32_at};

/// Where the information structure goes; modules, memory map and strings follow.
const INFO: u64 = 0x2_0000;
/// What `boot_loader_name` says.
const LOADER_NAME: &str = "pvbus";

/// A kernel with a multiboot header.
#[derive(Debug)]
pub(super) struct Kernel {
    flags: u32,
    body: Body,
}

#[derive(Debug)]
enum Body {
    Elf(Elf),
    /// Loaded as the header's addresses say.
    Flat {
        file_offset: usize,
        file_size: usize,
        address: u64,
        memory_size: u64,
        entry: u32,
    },
}

impl Kernel {
    /// Looks for the header; `None` when there is none.
    pub(super) fn parse(path: &Path, data: &[u8], elf: Option<&Elf>) -> Result<Option<Kernel>, BootError> {
        let search = &data[..data.len().min(words::HEADER_SEARCH)];
        let header = (0..search.len()).step_by(4).find(|&at| is_header(&search[at..]));
        let Some(at) = header else { return Ok(None) };
        let malformed = |what: String| BootError::Malformed { path: path.to_owned(), what: format!("multiboot header: {what}") };
        let flags = u32_at(data, at + 4).unwrap_or(0);
        let known = words::HEADER_PAGE_ALIGN | words::HEADER_MEMORY_INFO | words::HEADER_VIDEO_MODE;
        let unknown = flags & words::HEADER_REQUIRED & !known;
        if unknown != 0 {
            return Err(malformed(format!("the kernel requires features that are not defined (flags {unknown:#x})")));
        }
        if flags & words::HEADER_ADDRESSES == 0 {
            let Some(elf) = elf else {
                return Err(malformed("there are no load addresses in it, and the file is not ELF".into()));
            };
            return Ok(Some(Kernel { flags, body: Body::Elf(elf.clone()) }));
        }
        let Ok((header, _)) = words::Header::read_from_prefix(&data[at..]) else {
            return Err(BootError::Truncated {
                path: path.to_owned(),
                what: "the multiboot header".into(),
                need: (at + size_of::<words::Header>()) as u64,
                have: data.len() as u64,
            });
        };
        Ok(Some(Kernel { flags, body: flat_body(&header, at, data.len()).map_err(malformed)? }))
    }
}

fn is_header(bytes: &[u8]) -> bool {
    let (Some(magic), Some(flags), Some(checksum)) = (u32_at(bytes, 0), u32_at(bytes, 4), u32_at(bytes, 8)) else { return false };
    magic == words::HEADER_MAGIC && magic.wrapping_add(flags).wrapping_add(checksum) == 0
}

/// Section 3.1.3 of the specification. `at` is the header's offset in the file of `length` bytes.
fn flat_body(header: &words::Header, at: usize, length: usize) -> Result<Body, String> {
    let (header_addr, load_addr) = (header.header_addr.get(), header.load_addr.get());
    let before = header_addr.checked_sub(load_addr).ok_or("it says that it lies before the part that is loaded")? as usize;
    let file_offset = at.checked_sub(before).ok_or("the part to be loaded would begin before the file")?;
    let file_size = match header.load_end_addr.get() {
        0 => length - file_offset,
        end => end.checked_sub(load_addr).ok_or("the part to be loaded ends before it begins")? as usize,
    };
    if file_offset + file_size > length {
        return Err(format!("it wants {} bytes of the file, which has {length}", file_offset + file_size));
    }
    let memory_size = match header.bss_end_addr.get() {
        0 => file_size as u64,
        end => u64::from(end.checked_sub(load_addr).ok_or("the memory to be zeroed ends before the load address")?).max(file_size as u64),
    };
    Ok(Body::Flat { file_offset, file_size, address: load_addr.into(), memory_size, entry: header.entry_addr.get() })
}

/// Loads the kernel and its modules.
pub(super) fn load(file: &Contents, kernel: &Kernel, ram: &mut Ram<'_>, config: &BootConfig) -> Result<Loaded, BootError> {
    let (end, entry) = match &kernel.body {
        Body::Elf(elf) => {
            let end = ram.put_segments(file, elf)?;
            let entry = u32::try_from(elf.physical_entry()).map_err(|_| BootError::Malformed {
                path: file.path.clone(),
                what: format!("the multiboot kernel's entry {:#x} is beyond 4 GiB", elf.entry),
            })?;
            (end, entry)
        }
        Body::Flat { file_offset, file_size, address, memory_size, entry } => {
            let bytes = file.data.get(*file_offset..file_offset + file_size).unwrap_or_default();
            ram.put_zero_extended("the kernel", *address, bytes, *memory_size)?;
            (address + memory_size, *entry)
        }
    };
    let files = ram.put_modules(&config.modules, end)?;

    // The information block: structure, modules, memory map, strings.
    let modules_at = INFO + size_of::<words::Info>() as u64;
    let memory_map_at = modules_at + (files.len() * size_of::<words::Module>()) as u64;
    let strings_at = memory_map_at + (config.memory_map.len() * size_of::<words::MemoryMapEntry>()) as u64;
    let mut strings = Strings { start: strings_at, bytes: Vec::new() };
    let cmdline = strings.add(&format!("{} {}", file.path.display(), config.cmdline));
    let loader_name = strings.add(LOADER_NAME);
    let mut modules = Vec::with_capacity(files.len());
    for (module, file) in config.modules.iter().zip(&files) {
        let string = strings.add(&format!("{} {}", module.path.display(), module.args));
        modules.push(words::Module {
            mod_start: low(file.start).into(),
            mod_end: low(file.end).into(),
            string: string.into(),
            ..words::Module::default()
        });
    }
    let memory_map: Vec<words::MemoryMapEntry> = config
        .memory_map
        .iter()
        .map(|r| words::MemoryMapEntry {
            size: (size_of::<words::MemoryMapEntry>() as u32 - 4).into(),
            base: r.start.into(),
            length: r.size.into(),
            kind: r.kind.into(),
        })
        .collect();
    let upper = ram.end_of_ram(EXTENDED_START).unwrap_or(EXTENDED_START) - EXTENDED_START;
    let info = words::Info {
        flags: (words::INFO_MEMORY | words::INFO_CMDLINE | words::INFO_MODULES | words::INFO_MEMORY_MAP | words::INFO_LOADER_NAME).into(),
        mem_lower: low(EBDA_START / 1024).into(),
        mem_upper: low(upper / 1024).into(),
        cmdline: cmdline.into(),
        mods_count: (modules.len() as u32).into(),
        mods_addr: low(modules_at).into(),
        mmap_length: (memory_map.as_bytes().len() as u32).into(),
        mmap_addr: low(memory_map_at).into(),
        boot_loader_name: loader_name.into(),
        ..words::Info::default()
    };
    let block = [info.as_bytes(), modules.as_bytes(), memory_map.as_bytes(), &strings.bytes].concat();
    ram.put("the multiboot information", INFO, &block)?;

    let mut registers = flat::protected_mode(ram, entry)?;
    registers.gpr[RAX] = words::ENTRY_MAGIC.into();
    registers.gpr[RBX] = INFO;
    let kind = match &kernel.body {
        Body::Elf(elf) if elf.is_64 => "ELF64",
        Body::Elf(_) => "ELF32",
        Body::Flat { .. } => "flat",
    };
    let video = if kernel.flags & words::HEADER_VIDEO_MODE != 0 { "; it wants a video mode, there is none" } else { "" };
    let description = format!("multiboot 1 kernel ({kind}), 32-bit entry at {entry:#x}, modules: {}{video}", files.len());
    Ok(Loaded { registers, description })
}

/// Zero-terminated strings that follow each other in memory.
struct Strings {
    start: u64,
    bytes: Vec<u8>,
}

impl Strings {
    /// Adds one and returns its address.
    fn add(&mut self, text: &str) -> u32 {
        let address = low(self.start + self.bytes.len() as u64);
        self.bytes.extend_from_slice(text.trim_end().as_bytes());
        self.bytes.push(0);
        address
    }
}

/// Addresses here are below the PCI hole: [`Ram`] placed them, and modules that are not do not fit the protocol.
fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
