//! ELF files of x86 machines: segments, notes, sections. System V ABI, "Object Files" (ELF-64 Object File Format 1.5).
//!
//! A parsed [`Elf`] only holds ranges that lie inside the file.

use std::ops::Range;
use std::path::Path;

use super::{BootError, u16_at, u32_at, u64_at};

/// e_machine of i386.
const EM_386: u16 = 3;
/// e_machine of x86-64.
const EM_X86_64: u16 = 62;
/// p_type: loadable segment.
const PT_LOAD: u32 = 1;
/// p_type: notes.
const PT_NOTE: u32 = 4;
/// e_type: executable file.
const ET_EXEC: u16 = 2;
/// e_type: shared object, also position independent executables.
const ET_DYN: u16 = 3;

/// What is needed of an ELF file to boot it.
#[derive(Debug, Clone)]
pub(super) struct Elf {
    /// Whether it is ELFCLASS64.
    pub(super) is_64: bool,
    /// e_entry.
    pub(super) entry: u64,
    /// PT_LOAD segments that take memory, in file order.
    pub(super) segments: Vec<Segment>,
    /// Segments of other types.
    pub(super) others: Vec<(u32, Segment)>,
    /// Notes of all PT_NOTE segments.
    pub(super) notes: Vec<Note>,
    /// Section headers.
    pub(super) sections: Vec<Section>,
    /// Where the section headers are in the file.
    pub(super) section_table: Range<usize>,
}

/// A program header whose file part lies inside the file.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    file: Range<usize>,
    /// p_vaddr.
    pub(super) virtual_address: u64,
    /// p_paddr.
    pub(super) physical: u64,
    /// p_memsz, not less than the file part.
    pub(super) memory_size: u64,
}

/// A note; contents as they are in the file.
#[derive(Debug, Clone)]
pub(super) struct Note {
    /// Name without its terminator.
    pub(super) name: Vec<u8>,
    /// Type.
    pub(super) kind: u32,
    /// Descriptor's first eight bytes at most.
    pub(super) descriptor: Vec<u8>,
}

/// A section header.
#[derive(Debug, Clone)]
pub(super) struct Section {
    /// sh_type.
    pub(super) kind: u32,
    /// Contents in the file; empty when there are none.
    pub(super) file: Range<usize>,
    /// Where sh_offset is in the file.
    pub(super) offset_field: usize,
}

/// Where fields are in the two classes.
struct Class {
    is_64: bool,
    header_size: usize,
    program_header_size: usize,
    section_header_size: usize,
}

const CLASS_32: Class = Class { is_64: false, header_size: 52, program_header_size: 32, section_header_size: 40 };
const CLASS_64: Class = Class { is_64: true, header_size: 64, program_header_size: 56, section_header_size: 64 };

impl Class {
    /// A field of address size; the 32-bit class has it elsewhere.
    fn address(&self, data: &[u8], at_32: usize, at_64: usize) -> Option<u64> {
        if self.is_64 { u64_at(data, at_64) } else { u32_at(data, at_32).map(u64::from) }
    }

    fn half(&self, data: &[u8], at_32: usize, at_64: usize) -> Option<u16> {
        u16_at(data, if self.is_64 { at_64 } else { at_32 })
    }
}

impl Elf {
    /// Parses `data`; `None` when it is not ELF at all.
    pub(super) fn parse(path: &Path, data: &[u8]) -> Result<Option<Elf>, BootError> {
        if !data.starts_with(b"\x7fELF") {
            return Ok(None);
        }
        let truncated =
            |what: &str, need: u64| BootError::Truncated { path: path.to_owned(), what: what.into(), need, have: data.len() as u64 };
        let malformed = |what: String| BootError::Malformed { path: path.to_owned(), what };
        let short = || truncated("the ELF header", CLASS_64.header_size as u64);

        let (&class, &order) = data.get(4).zip(data.get(5)).ok_or_else(short)?;
        let class = match class {
            1 => CLASS_32,
            2 => CLASS_64,
            other => return Err(malformed(format!("ELF class {other} is neither 32 nor 64 bit"))),
        };
        let machine = data.get(18..20).ok_or_else(short)?;
        // EI_DATA 2 is big-endian: no x86, but its machine number says what it is.
        let machine = if order == 2 { u16::from_be_bytes([machine[0], machine[1]]) } else { u16::from_le_bytes([machine[0], machine[1]]) };
        if order != 1 || !matches!(machine, EM_386 | EM_X86_64) {
            let name = machine_name(machine);
            let found = format!("an ELF file for another machine ({name}), this one is x86");
            return Err(BootError::Unknown { path: path.to_owned(), found });
        }
        let header = data.get(..class.header_size).ok_or_else(short)?;
        let kind = u16_at(header, 16).ok_or_else(short)?;
        if !matches!(kind, ET_EXEC | ET_DYN) {
            let found = format!("an ELF file, but not an executable one (type {kind})");
            return Err(BootError::Unknown { path: path.to_owned(), found });
        }

        let entry = class.address(header, 24, 24).ok_or_else(short)?;
        let table = |offset: Option<u64>, size: Option<u16>, count: Option<u16>, least: usize, what: &str| {
            let (offset, size, count) = (offset.ok_or_else(short)?, size.ok_or_else(short)?, count.ok_or_else(short)?);
            let (size, count) = (usize::from(size), usize::from(count));
            if count == 0 {
                return Ok((0..0, least));
            }
            if size < least {
                return Err(malformed(format!("{what} of {size} bytes are too small")));
            }
            let end = offset.saturating_add((size * count) as u64);
            let range = file_range(data, offset, end).ok_or_else(|| truncated(what, end))?;
            Ok((range, size))
        };
        let (programs, program_size) = table(
            class.address(header, 28, 32),
            class.half(header, 42, 54),
            class.half(header, 44, 56),
            class.program_header_size,
            "the program headers",
        )?;
        // Sections only serve to give OpenBSD its symbols: without them a kernel still boots.
        let (section_table, section_size) = table(
            class.address(header, 32, 40),
            class.half(header, 46, 58),
            class.half(header, 48, 60),
            class.section_header_size,
            "the section headers",
        )
        .unwrap_or((0..0, class.section_header_size));

        let mut elf = Elf {
            is_64: class.is_64,
            entry,
            segments: Vec::new(),
            others: Vec::new(),
            notes: Vec::new(),
            sections: Vec::new(),
            section_table: section_table.clone(),
        };
        let mut note_bytes = 0;
        for header in data[programs].chunks_exact(program_size) {
            let kind = u32_at(header, 0).ok_or_else(short)?;
            let offset = class.address(header, 4, 8).ok_or_else(short)?;
            let virtual_address = class.address(header, 8, 16).ok_or_else(short)?;
            let physical = class.address(header, 12, 24).ok_or_else(short)?;
            let file_size = class.address(header, 16, 32).ok_or_else(short)?;
            let memory_size = class.address(header, 20, 40).ok_or_else(short)?;
            if kind == PT_LOAD && memory_size == 0 {
                continue;
            }
            let end = offset.saturating_add(file_size);
            let file = if file_size == 0 { Some(0..0) } else { file_range(data, offset, end) };
            match (kind, file) {
                (PT_LOAD, None) => return Err(truncated("a segment", end)),
                (PT_LOAD, Some(_)) if memory_size < file_size => {
                    return Err(malformed(format!("a segment has {file_size:#x} bytes in the file but only {memory_size:#x} in memory")));
                }
                (PT_LOAD, Some(file)) => elf.segments.push(Segment { file, virtual_address, physical, memory_size }),
                (_, None) => {}
                (kind, Some(file)) => {
                    // Overlapping note segments could otherwise hold the file's notes many times.
                    note_bytes += file.len();
                    if kind == PT_NOTE && note_bytes <= data.len() {
                        read_notes(&data[file.clone()], &mut elf.notes);
                    }
                    elf.others.push((kind, Segment { file, virtual_address, physical, memory_size }));
                }
            }
        }
        for (index, header) in data[section_table.clone()].chunks_exact(section_size).enumerate() {
            let kind = u32_at(header, 4).ok_or_else(short)?;
            let offset = class.address(header, 16, 24).ok_or_else(short)?;
            let size = class.address(header, 20, 32).ok_or_else(short)?;
            let file = file_range(data, offset, offset.saturating_add(size)).unwrap_or(0..0);
            let offset_field = section_table.start + index * section_size + if class.is_64 { 24 } else { 16 };
            elf.sections.push(Section { kind, file, offset_field });
        }
        Ok(Some(elf))
    }

    /// Physical address of the entry: translated when it is a virtual address of a segment that is loaded elsewhere.
    pub(super) fn physical_entry(&self) -> u64 {
        let entry = self.entry;
        self.segments
            .iter()
            .find(|s| entry >= s.virtual_address && entry - s.virtual_address < s.memory_size)
            .map_or(entry, |s| (entry - s.virtual_address).wrapping_add(s.physical))
    }
}

impl Segment {
    /// The part that is in the file.
    pub(super) fn bytes<'a>(&self, data: &'a [u8]) -> &'a [u8] {
        data.get(self.file.clone()).unwrap_or_default()
    }
}

fn file_range(data: &[u8], start: u64, end: u64) -> Option<Range<usize>> {
    let range = usize::try_from(start).ok()?..usize::try_from(end).ok()?;
    (range.start <= range.end && range.end <= data.len()).then_some(range)
}

fn read_notes(mut data: &[u8], notes: &mut Vec<Note>) {
    while let (Some(name_size), Some(descriptor_size), Some(kind)) = (u32_at(data, 0), u32_at(data, 4), u32_at(data, 8)) {
        let (name_size, descriptor_size) = (name_size as usize, descriptor_size as usize);
        let name = 12..12 + name_size;
        let descriptor_start = name.end.next_multiple_of(4);
        let descriptor = descriptor_start..descriptor_start + descriptor_size;
        let (Some(name), Some(bytes)) = (data.get(name), data.get(descriptor.clone())) else { return };
        let name = name.strip_suffix(b"\0").unwrap_or(name);
        // Only names this long or shorter are looked for.
        if name.len() <= 16 {
            notes.push(Note { name: name.to_vec(), kind, descriptor: bytes[..bytes.len().min(8)].to_vec() });
        }
        let Some(rest) = data.get(descriptor.end.next_multiple_of(4)..) else { return };
        data = rest;
    }
}

fn machine_name(machine: u16) -> String {
    let name = match machine {
        2 | 18 | 43 => "SPARC",
        4 => "m68k",
        8 => "MIPS",
        20 => "PowerPC",
        21 => "64-bit PowerPC",
        22 => "S/390",
        40 => "ARM",
        50 => "IA-64",
        183 => "AArch64",
        243 => "RISC-V",
        258 => "LoongArch",
        _ => return format!("number {machine}"),
    };
    name.into()
}
