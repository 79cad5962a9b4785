//! Memory: what the start info says there is, pages for devices, and the heap.
//!
//! Physical addresses are virtual ones, everywhere. Pages come from the PVH memory map, above 1 MiB and outside of what the loader
//! placed. The heap takes pages as it grows: blocks up to half a page in sizes that are powers of two, each with its list of free
//! ones; larger blocks are pages of their own. Nothing is touched before it is used, so that a large machine starts as quickly
//! as a small one.
#![allow(unsafe_code)] // Addresses become references.

use core::alloc::{GlobalAlloc, Layout};
use core::ffi::CStr;
use core::ops::Range;
use core::ptr::NonNull;

use abi::boot::E820_RAM;
use abi::boot::pvh::{MemmapEntry, Module, START_MAGIC, StartInfo};
use logic::acpi;
use logic::pages::{PAGE_SIZE, Pages};
use zerocopy::FromBytes;

use crate::boot::boot_pdpt;
use crate::cpu;
use crate::global::Global;

/// What the trampoline maps.
const FIRST_MAPPED: u64 = 1 << 32;
/// What one entry of the page directory pointer table maps.
const GIBIBYTE: u64 = 1 << 30;
/// Most that the table of the first 512 GiB maps.
const MAPPED_MAX: u64 = 512 * GIBIBYTE;
/// CPUID leaf 0x8000_0001 EDX: pages of 1 GiB.
const EDX_GIBIBYTE_PAGES: u32 = 1 << 26;
/// Page table entry: present, writable, a page.
const ENTRY_PAGE: u64 = 0x83;
/// Firmware's and the loader's.
const LOW_MEMORY_END: u64 = 0x10_0000;
/// Most entries of the memory map that are read.
const MAP_MAX: usize = 256;
/// Longest command line.
const CMDLINE_MAX: u64 = 4096;

static MEMORY: Global<Memory> = Global::new(Memory { pages: Pages::new(), total: 0, mapped: FIRST_MAPPED });
static HEAP: Global<Heap> = Global::new(Heap { free: [None; CLASSES], used: 0 });

unsafe extern "C" {
    static kernel_start: [u8; 0];
    static kernel_end: [u8; 0];
}

struct Memory {
    pages: Pages,
    /// RAM of the machine.
    total: u64,
    /// Everything below this is mapped.
    mapped: u64,
}

/// What the loader says, besides the memory map.
#[derive(Debug, Clone, Copy)]
pub struct Start {
    /// Command line.
    pub cmdline: &'static str,
    /// Address of the ACPI root pointer.
    pub rsdp: Option<u64>,
}

/// What there is, for people.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// RAM of the machine.
    pub total: u64,
    /// RAM in free pages.
    pub free: u64,
    /// Bytes in use on the heap.
    pub heap: u64,
}

/// Reads the start info at `address` and makes its memory usable.
///
/// # Errors
/// What is wrong with the start info.
pub fn init(address: u64) -> Result<Start, &'static str> {
    let info = physical(address, size_of::<StartInfo>()).and_then(|bytes| StartInfo::ref_from_bytes(bytes).ok());
    let info = info.filter(|info| info.magic.get() == START_MAGIC).ok_or("there is no PVH start info")?;
    if info.version.get() < 1 {
        return Err("the PVH start info is too old to have a memory map");
    }
    let (map, entries) = (info.memmap_paddr.get(), (info.memmap_entries.get() as usize).min(MAP_MAX));
    let map_size = entries * size_of::<MemmapEntry>();
    let entries = physical(map, map_size).and_then(|bytes| <[MemmapEntry]>::ref_from_bytes(bytes).ok());
    let entries = entries.filter(|entries| !entries.is_empty()).ok_or("the PVH start info has no memory map")?;
    let ram = || entries.iter().filter(|entry| entry.kind.get() == E820_RAM);
    let ram = || ram().map(|entry| entry.addr.get()..entry.addr.get().saturating_add(entry.size.get()));
    let modules = u64::from(info.nr_modules.get()) * size_of::<Module>() as u64;
    let cmdline = info.cmdline_paddr.get();
    let image = (&raw const kernel_start).addr() as u64..(&raw const kernel_end).addr() as u64;
    MEMORY.with(|memory| {
        memory.mapped = map_high(ram().map(|range| range.end).max().unwrap_or(0));
        for range in ram() {
            memory.total += range.end - range.start;
            memory.pages.add(range.start.max(LOW_MEMORY_END)..range.end.min(memory.mapped));
        }
        for range in [
            image,
            address..address + size_of::<StartInfo>() as u64,
            map..map + map_size as u64,
            extent(info.modlist_paddr.get(), modules),
            extent(cmdline, CMDLINE_MAX),
        ] {
            memory.pages.reserve(range.start & !(PAGE_SIZE - 1)..range.end.next_multiple_of(PAGE_SIZE));
        }
    });
    let cmdline = physical(cmdline, CMDLINE_MAX as usize).and_then(|bytes| CStr::from_bytes_until_nul(bytes).ok()?.to_str().ok());
    let rsdp = Some(info.rsdp_paddr.get()).filter(|address| *address != 0);
    Ok(Start { cmdline: cmdline.unwrap_or(""), rsdp })
}

/// `size` bytes from `start`; nothing for address zero, which means that there is nothing.
fn extent(start: u64, size: u64) -> Range<u64> {
    if start == 0 { 0..0 } else { start..start.saturating_add(size).min(MAPPED_MAX) }
}

/// Maps memory above 4 GiB where the processor has pages of 1 GiB, up to `end`; the end of what is mapped. Without them, the
/// memory there is not used.
fn map_high(end: u64) -> u64 {
    if end <= FIRST_MAPPED || cpu::cpuid(0x8000_0001, 0).edx & EDX_GIBIBYTE_PAGES == 0 {
        return FIRST_MAPPED;
    }
    let entries = end.min(MAPPED_MAX).div_ceil(GIBIBYTE);
    for entry in FIRST_MAPPED / GIBIBYTE..entries {
        // SAFETY: these entries were not present, and nothing else writes to the table.
        unsafe { (&raw mut boot_pdpt).cast::<u64>().add(entry as usize).write_volatile((entry * GIBIBYTE) | ENTRY_PAGE) };
    }
    entries * GIBIBYTE
}

/// Memory that firmware or the loader wrote before the kernel began and that nobody writes to since: the start info and what it
/// points to, which [`init`] reserves, and ACPI tables, which the memory map does.
fn physical(address: u64, length: usize) -> Option<&'static [u8]> {
    let end = address.checked_add(length as u64)?;
    if address == 0 || end > FIRST_MAPPED {
        return None;
    }
    // SAFETY: mapped, and constant as said above.
    Some(unsafe { core::slice::from_raw_parts(core::ptr::with_exposed_provenance(address as usize), length) })
}

/// Firmware's tables.
pub struct Firmware;

impl acpi::Memory for Firmware {
    fn bytes(&self, address: u64, length: usize) -> Option<&[u8]> {
        physical(address, length)
    }
}

/// How much there is.
pub fn usage() -> Usage {
    let heap = HEAP.with(|heap| heap.used);
    MEMORY.with(|memory| Usage { total: memory.total, free: memory.pages.free(), heap })
}

/// Takes `count` pages that follow each other and are zero.
pub fn take_pages(count: usize) -> Option<NonNull<u8>> {
    let address = MEMORY.with(|memory| memory.pages.take(count as u64))?;
    let pages = NonNull::new(core::ptr::with_exposed_provenance_mut::<u8>(address as usize))?;
    // SAFETY: the pages are mapped and nobody else's.
    unsafe { pages.write_bytes(0, count * PAGE_SIZE as usize) };
    Some(pages)
}

/// Pages that a hypervisor set aside, which are none of ours.
pub fn host_pages(address: u64, count: usize) -> Option<NonNull<u8>> {
    let end = address.checked_add((count as u64).checked_mul(PAGE_SIZE)?)?;
    let is_there = address.is_multiple_of(PAGE_SIZE) && end <= MEMORY.with(|memory| memory.mapped);
    NonNull::new(core::ptr::with_exposed_provenance_mut(address as usize)).filter(|_| is_there)
}

/// Gives pages back.
///
/// # Safety
/// They are `count` from [`take_pages`], and nobody uses them any more.
pub unsafe fn give_pages<T: ?Sized>(pages: NonNull<T>, count: usize) {
    let start = pages.addr().get() as u64;
    MEMORY.with(|memory| memory.pages.add(start..start + count as u64 * PAGE_SIZE));
}

/// Size of the smallest blocks, and the binary logarithm of it.
const SMALLEST: usize = 16;
/// Sizes of blocks: 16, 32 and so on to 2048.
const CLASSES: usize = 8;
const LARGEST: usize = SMALLEST << (CLASSES - 1);

/// A free block; the memory of each holds where the next is.
struct Free {
    next: Option<NonNull<Free>>,
}

struct Heap {
    /// Free blocks by size.
    free: [Option<NonNull<Free>>; CLASSES],
    used: u64,
}

/// How a layout is served.
enum Kind {
    /// A block of this class.
    Block(usize),
    /// So many pages.
    Pages(usize),
}

impl Kind {
    fn of(layout: Layout) -> Kind {
        let size = layout.size().max(layout.align()).max(SMALLEST);
        match size {
            ..=LARGEST => Kind::Block((size.next_power_of_two() / SMALLEST).trailing_zeros() as usize),
            _ => Kind::Pages(size.div_ceil(PAGE_SIZE as usize)),
        }
    }
}

impl Heap {
    fn take(&mut self, class: usize) -> Option<NonNull<u8>> {
        if self.free[class].is_none() {
            let page = take_pages(1)?;
            let size = SMALLEST << class;
            for at in (0..PAGE_SIZE as usize).step_by(size).rev() {
                // SAFETY: inside the page, which is new.
                unsafe { self.give(page.add(at), class) };
            }
        }
        let block = self.free[class]?;
        // SAFETY: blocks on the list are free, and begin with their successor.
        self.free[class] = unsafe { block.read() }.next;
        Some(block.cast())
    }

    /// # Safety
    /// The block is of that class, and nobody uses it.
    unsafe fn give(&mut self, block: NonNull<u8>, class: usize) {
        let block = block.cast::<Free>();
        // SAFETY: the caller's promise; every block is large enough and aligned to its size.
        unsafe { block.write(Free { next: self.free[class] }) };
        self.free[class] = Some(block);
    }
}

/// The heap, for `alloc`.
struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

// SAFETY: blocks are apart from each other, at least as large as asked for, and aligned to their size or to a page.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.align() > PAGE_SIZE as usize {
            return core::ptr::null_mut();
        }
        let block = match Kind::of(layout) {
            Kind::Block(class) => HEAP.with(|heap| heap.take(class)),
            Kind::Pages(count) => take_pages(count),
        };
        let Some(block) = block else { return core::ptr::null_mut() };
        HEAP.with(|heap| heap.used += layout.size() as u64);
        block.as_ptr()
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let Some(block) = NonNull::new(block) else { return };
        HEAP.with(|heap| heap.used -= layout.size() as u64);
        match Kind::of(layout) {
            // SAFETY: it came from here with this layout, says the caller.
            Kind::Block(class) => HEAP.with(|heap| unsafe { heap.give(block, class) }),
            // SAFETY: as above.
            Kind::Pages(count) => unsafe { give_pages(block, count) },
        }
    }
}
