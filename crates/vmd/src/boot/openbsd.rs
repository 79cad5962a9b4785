//! OpenBSD's kernel as vmd(8) starts it: `usr.sbin/vmd/loadfile_elf.c` 1.49, `sys/arch/amd64/amd64/locore0.S`.
//!
//! The kernel starts in 32-bit protected mode with its arguments on the stack, from the top down: address and size of the boot
//! arguments, two memory sizes that it ignores, the end of its symbols, version, boot device, boothowto. Symbols are loaded
//! after it as boot(8) does: ELF header, section headers, then the symbol and string tables. `--cmdline` takes boot(8)'s
//! flags: `-a -c -d -s`.

use std::io::Read;

use abi::boot::{E820_RAM, E820Entry, openbsd as words};
use vmm::registers::RSP;
use zerocopy::IntoBytes;

use super::elf::Elf;
use super::place::Ram;
use super::{BootConfig, BootError, Contents, Loaded, flat};

/// Selectors of the GDT that vmd(8) makes.
const CODE: u16 = 0x08;
const DATA: u16 = 0x10;
/// Size of a page, of the boot arguments and of the stack.
const PAGE: u64 = 4096;
/// I/O port of the first serial port, and the speed vmd(8) states.
const COM1: u64 = 0x3f8;
const COM1_SPEED: u32 = 115_200;
/// sh_type of symbol and string tables.
const SHT_SYMTAB: u32 = 2;
const SHT_STRTAB: u32 = 3;
/// Largest piece of random bytes fetched at once.
const RANDOM_PIECE: usize = 4096;

/// Whether the notes or program headers are those of an OpenBSD kernel.
pub(super) fn is_kernel(elf: &Elf) -> bool {
    elf.notes.iter().any(|n| n.name == words::NOTE_NAME) || elf.others.iter().any(|(kind, _)| *kind == words::PT_OPENBSD_RANDOMIZE)
}

/// Loads the kernel with its symbols and boot arguments.
pub(super) fn load(
    file: &Contents,
    elf: &Elf,
    ram: &mut Ram<'_>,
    config: &BootConfig,
    entropy: &mut dyn Read,
) -> Result<Loaded, BootError> {
    if let Some(module) = config.modules.first() {
        return Err(BootError::NotTaken { format: "an OpenBSD kernel", option: format!("--initrd ({})", module.path.display()) });
    }
    let howto = boothowto(&config.cmdline)?;
    let end = ram.put_segments(file, elf)?;
    let end = put_symbols(file, elf, ram, end)?;
    fill_random(file, elf, ram, entropy)?;

    let arguments = boot_arguments(config);
    ram.put("the boot arguments", words::BOOTARGS_PAGE, &arguments)?;
    // The word below boothowto is where a return address would be.
    let stack: [u32; 9] = [
        0,
        howto,
        words::BOOTDEV_SD0A,
        words::BOOTARG_APIVER,
        low(end & words::ADDRESS_MASK),
        0,
        0,
        low(arguments.len() as u64),
        low(words::BOOTARGS_PAGE),
    ];
    ram.reserve("the stack", words::STACK_PAGE, PAGE)?;
    let stack_pointer = words::STACK_PAGE + PAGE - size_of_val(&stack) as u64;
    ram.write("the stack", stack_pointer, stack.map(u32::to_le).as_bytes())?;

    let entry = elf.entry & words::ADDRESS_MASK;
    let mut registers = flat::protected_mode_with(ram, words::GDT_PAGE, CODE, DATA, entry)?;
    registers.gpr[RSP] = stack_pointer;
    let description = format!("OpenBSD kernel ({}), 32-bit entry at {entry:#x}", if elf.is_64 { "amd64" } else { "i386" });
    Ok(Loaded { registers, description })
}

/// boot(8)'s flags as reboot(2)'s bits.
fn boothowto(cmdline: &str) -> Result<u32, BootError> {
    let mut howto = 0;
    for word in cmdline.split_whitespace() {
        let refused =
            || BootError::NotTaken { format: "an OpenBSD kernel", option: format!("`{word}` in --cmdline (only -a, -c, -d, -s)") };
        let flags = word.strip_prefix('-').filter(|f| !f.is_empty()).ok_or_else(refused)?;
        for flag in flags.chars() {
            howto |= match flag {
                'a' => words::RB_ASKNAME,
                'c' => words::RB_CONFIG,
                'd' => words::RB_KDB,
                's' => words::RB_SINGLE,
                _ => return Err(refused()),
            };
        }
    }
    Ok(howto)
}

/// Loads symbols after the kernel, where there are some. Returns their end, or 0.
fn put_symbols(file: &Contents, elf: &Elf, ram: &mut Ram<'_>, end: u64) -> Result<u64, BootError> {
    if !elf.sections.iter().any(|s| s.kind == SHT_SYMTAB && !s.file.is_empty()) {
        return Ok(0);
    }
    let align: usize = if elf.is_64 { 8 } else { 4 };
    let header_size = if elf.is_64 { 64 } else { 52 };
    let what = "the kernel's symbols";
    let mut headers = file.data[elf.section_table.clone()].to_vec();
    let mut block = file.data[..header_size].to_vec();
    let (phoff, shoff, phentsize) = if elf.is_64 { (32..40, 40..48, 54..58) } else { (28..32, 32..36, 42..46) };
    block[phoff].fill(0);
    // e_phentsize and e_phnum.
    block[phentsize].fill(0);
    block[shoff].copy_from_slice(&(header_size as u64).to_le_bytes()[..if elf.is_64 { 8 } else { 4 }]);

    // First the places, so that the headers can be written, then the contents.
    let mut offset = (header_size + headers.len()).next_multiple_of(align);
    let mut contents = Vec::new();
    for section in elf.sections.iter().filter(|s| matches!(s.kind, SHT_SYMTAB | SHT_STRTAB)) {
        let field = section.offset_field - elf.section_table.start;
        let width = if elf.is_64 { 8 } else { 4 };
        headers[field..field + width].copy_from_slice(&(offset as u64).to_le_bytes()[..width]);
        contents.push((offset, &file.data[section.file.clone()]));
        offset = (offset + section.file.len()).next_multiple_of(align);
    }
    block.extend_from_slice(&headers);
    let start = end.checked_next_multiple_of(align as u64).unwrap_or(u64::MAX);
    ram.reserve(what, start, offset as u64)?;
    ram.write(what, start, &block)?;
    for (offset, bytes) in contents {
        ram.write(what, start + offset as u64, bytes)?;
    }
    Ok(start + offset as u64)
}

/// Fills what PT_OPENBSD_RANDOMIZE names, which lies inside the loaded segments.
fn fill_random(file: &Contents, elf: &Elf, ram: &Ram<'_>, entropy: &mut dyn Read) -> Result<(), BootError> {
    for (_, segment) in elf.others.iter().filter(|(kind, _)| *kind == words::PT_OPENBSD_RANDOMIZE) {
        let size = segment.bytes(&file.data).len();
        let inside = elf
            .segments
            .iter()
            .any(|s| segment.physical.checked_sub(s.physical).is_some_and(|o| o.saturating_add(size as u64) <= s.memory_size));
        if !inside {
            let what = "the segment for random bytes is not inside the kernel".into();
            return Err(BootError::Malformed { path: file.path.clone(), what });
        }
        let mut piece = [0; RANDOM_PIECE];
        for offset in (0..size).step_by(RANDOM_PIECE) {
            let piece = &mut piece[..RANDOM_PIECE.min(size - offset)];
            entropy.read_exact(piece).map_err(|source| BootError::Read { path: "random numbers".into(), source })?;
            ram.write("random bytes", segment.physical + offset as u64, piece)?;
        }
    }
    Ok(())
}

/// Memory map, console, end; each but the end with its type, its size and, once more, its size.
fn boot_arguments(config: &BootConfig) -> Vec<u8> {
    let mut memory_map = Vec::new();
    for range in config.memory_map.iter().filter(|r| r.kind == E820_RAM) {
        let entry = E820Entry { address: range.start.into(), size: range.size.into(), kind: range.kind.into() };
        memory_map.extend_from_slice(entry.as_bytes());
    }
    memory_map.extend_from_slice(&[0; size_of::<E820Entry>()]);
    let console = words::ConsoleDevice {
        device: words::DEVICE_COM0.into(),
        speed: COM1_SPEED.into(),
        address: COM1.into(),
        ..words::ConsoleDevice::default()
    };
    let mut arguments = Vec::new();
    for (kind, body) in [(words::BOOTARG_MEMMAP, memory_map.as_slice()), (words::BOOTARG_CONSDEV, console.as_bytes())] {
        let size = low(12 + body.len() as u64);
        for word in [kind, size, size] {
            arguments.extend_from_slice(&word.to_le_bytes());
        }
        arguments.extend_from_slice(body);
    }
    arguments.extend_from_slice(&words::BOOTARG_END.to_le_bytes());
    arguments
}

/// Sizes and masked addresses here are far below 4 GiB.
fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
