//! The two processor states that boot protocols start in: flat 32-bit protected mode, and long mode with an identity map.

use vmm::{DescriptorTable, Registers, Segment};

use super::BootError;
use super::place::Ram;

/// Where the GDT goes, after the BIOS data area.
const GDT: u64 = 0x500;
/// Top of the page tables; the page directory pointers follow, then the directories.
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORIES: u64 = 0xb000;
/// Each directory maps 1 GiB.
const DIRECTORIES: u64 = 4;

/// Page table entry: present, writable (Intel SDM vol. 3 table 4-15).
const PRESENT_WRITABLE: u64 = 3;
/// Directory entry: maps a 2 MiB page.
const LARGE: u64 = 0x80;

/// CR0: protection enable, extension type.
const CR0_PE_ET: u64 = 0x11;
/// CR0: paging.
const CR0_PG: u64 = 1 << 31;
/// CR4: physical address extension.
const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode enabled and active.
const EFER_LME_LMA: u64 = 0x500;

/// Access rights, VMX' layout: present, 32-bit code, readable, accessed, 4 KiB granularity.
const CODE_32: u32 = 0xc09b;
/// The same for 64-bit code.
const CODE_64: u32 = 0xa09b;
/// The same for writable data.
const DATA_32: u32 = 0xc093;
/// Present, busy 32-bit task state segment.
const TSS_BUSY: u32 = 0x8b;
/// Limit of the smallest task state segment.
const TSS_LIMIT: u32 = 0x67;

/// Protected mode, flat segments, no paging, interrupts off: what every protocol with a 32-bit entry asks for.
pub(super) fn protected_mode(ram: &mut Ram<'_>, entry: u32) -> Result<Registers, BootError> {
    put_gdt(ram, GDT, abi::boot::linux::BOOT_CS, abi::boot::linux::BOOT_DS, CODE_32)?;
    Ok(registers(GDT, abi::boot::linux::BOOT_CS, abi::boot::linux::BOOT_DS, CODE_32, u64::from(entry)))
}

/// The same with the GDT and the selectors of the caller's choice.
pub(super) fn protected_mode_with(ram: &mut Ram<'_>, gdt: u64, code: u16, data: u16, entry: u64) -> Result<Registers, BootError> {
    put_gdt(ram, gdt, code, data, CODE_32)?;
    Ok(registers(gdt, code, data, CODE_32, entry))
}

/// Long mode, the first 4 GiB mapped one to one with 2 MiB pages, interrupts off.
pub(super) fn long_mode(ram: &mut Ram<'_>, entry: u64) -> Result<Registers, BootError> {
    put_gdt(ram, GDT, abi::boot::linux::BOOT_CS, abi::boot::linux::BOOT_DS, CODE_64)?;
    ram.put("page tables", PML4, &table([(0, PDPT | PRESENT_WRITABLE)]))?;
    ram.put("page tables", PDPT, &table((0..DIRECTORIES).map(|i| (i as usize, (PAGE_DIRECTORIES + i * 0x1000) | PRESENT_WRITABLE))))?;
    for directory in 0..DIRECTORIES {
        let entries = (0..512u64).map(|i| (i as usize, (directory << 30) | (i << 21) | LARGE | PRESENT_WRITABLE));
        ram.put("page tables", PAGE_DIRECTORIES + directory * 0x1000, &table(entries))?;
    }
    let registers = registers(GDT, abi::boot::linux::BOOT_CS, abi::boot::linux::BOOT_DS, CODE_64, entry);
    Ok(Registers { cr0: registers.cr0 | CR0_PG, cr3: PML4, cr4: CR4_PAE, efer: EFER_LME_LMA, ..registers })
}

fn registers(gdt: u64, code: u16, data: u16, code_access: u32, entry: u64) -> Registers {
    let segment = Segment { selector: data, limit: u32::MAX, access: DATA_32, base: 0 };
    Registers {
        rip: entry,
        cr0: CR0_PE_ET,
        cs: Segment { selector: code, limit: u32::MAX, access: code_access, base: 0 },
        ds: segment,
        es: segment,
        fs: segment,
        gs: segment,
        ss: segment,
        tr: Segment { selector: 0, limit: TSS_LIMIT, access: TSS_BUSY, base: 0 },
        gdtr: DescriptorTable { base: gdt, limit: data | 7 },
        idtr: DescriptorTable { base: 0, limit: 0 },
        ..Registers::reset()
    }
}

fn put_gdt(ram: &mut Ram<'_>, at: u64, code: u16, data: u16, code_access: u32) -> Result<(), BootError> {
    let mut gdt = vec![0; usize::from(data) + 8];
    gdt[usize::from(code)..][..8].copy_from_slice(&descriptor(code_access).to_le_bytes());
    gdt[usize::from(data)..][..8].copy_from_slice(&descriptor(DATA_32).to_le_bytes());
    ram.put("GDT", at, &gdt)
}

/// Descriptor of a flat 4 GiB segment (Intel SDM vol. 3 figure 3-8) with access rights in VMX' layout.
fn descriptor(access: u32) -> u64 {
    0x000f_0000_0000_ffff | u64::from(access) << 40
}

fn table(entries: impl IntoIterator<Item = (usize, u64)>) -> Vec<u8> {
    let mut page = vec![0; 4096];
    for (index, entry) in entries {
        page[index * 8..][..8].copy_from_slice(&entry.to_le_bytes());
    }
    page
}
