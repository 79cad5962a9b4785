//! PVH: an ELF kernel with a Xen note that names a 32-bit entry (Xen `docs/misc/pvh.pandoc`, `start_info.h` version 1).

use abi::boot::pvh::{MemmapEntry, Module, NOTE_NAME, NOTE_PHYS32_ENTRY, START_MAGIC, START_VERSION, StartInfo};
use vmm::registers::RBX;
use zerocopy::IntoBytes;

use super::elf::Elf;
use super::place::Ram;
use super::{BootConfig, BootError, Contents, Loaded, flat};

/// Where the start info goes; module list and memory map follow.
const START_INFO: u64 = 0x7000;
/// Where the command lines go.
const STRINGS: u64 = 0x2_0000;

/// The entry that the note names.
pub(super) fn entry(elf: &Elf) -> Option<u32> {
    let note = elf.notes.iter().find(|n| n.name == NOTE_NAME && n.kind == NOTE_PHYS32_ENTRY)?;
    match note.descriptor.len() {
        4 => Some(u32::from_le_bytes(*note.descriptor.first_chunk()?)),
        8 => u32::try_from(u64::from_le_bytes(*note.descriptor.first_chunk()?)).ok(),
        _ => None,
    }
}

/// Loads the kernel and its modules.
pub(super) fn load(file: &Contents, elf: &Elf, entry: u32, ram: &mut Ram<'_>, config: &BootConfig) -> Result<Loaded, BootError> {
    let end = ram.put_segments(file, elf)?;
    let files = ram.put_modules(&config.modules, end)?;

    let mut strings = [config.cmdline.as_bytes(), b"\0"].concat();
    let mut modules = Vec::with_capacity(files.len());
    for (module, file) in config.modules.iter().zip(&files) {
        let cmdline_paddr = STRINGS + strings.len() as u64;
        strings.extend_from_slice(module.args.as_bytes());
        strings.push(0);
        modules.push(Module {
            paddr: file.start.into(),
            size: (file.end - file.start).into(),
            cmdline_paddr: cmdline_paddr.into(),
            ..Module::default()
        });
    }
    let memmap: Vec<MemmapEntry> = config
        .memory_map
        .iter()
        .map(|r| MemmapEntry { addr: r.start.into(), size: r.size.into(), kind: r.kind.into(), ..MemmapEntry::default() })
        .collect();
    let modlist_paddr = START_INFO + size_of::<StartInfo>() as u64;
    let memmap_paddr = modlist_paddr + modules.as_bytes().len() as u64;
    let info = StartInfo {
        magic: START_MAGIC.into(),
        version: START_VERSION.into(),
        nr_modules: (modules.len() as u32).into(),
        modlist_paddr: if modules.is_empty() { 0 } else { modlist_paddr }.into(),
        cmdline_paddr: STRINGS.into(),
        rsdp_paddr: config.rsdp.unwrap_or(0).into(),
        memmap_paddr: memmap_paddr.into(),
        memmap_entries: (memmap.len() as u32).into(),
        ..StartInfo::default()
    };
    ram.put("the start info", START_INFO, &[info.as_bytes(), modules.as_bytes(), memmap.as_bytes()].concat())?;
    ram.put("the command lines", STRINGS, &strings)?;

    let mut registers = flat::protected_mode(ram, entry)?;
    registers.gpr[RBX] = START_INFO;
    let description = format!("ELF kernel with PVH note, 32-bit entry at {entry:#x}");
    Ok(Loaded { registers, description })
}
