//! Where a machine's memory lies, and what its kernel is told of it.
//!
//! ```text
//!   0         0x9fc00  0xa0000   0xc0000    0x100000        0xc0000000        4 GiB
//!   | usable  | EBDA   | (MMIO)  | reserved | usable ...    | PCI, APICs, ROM | usable ...
//! ```
//! 0xc0000 to 0xfffff is backed by RAM, for a BIOS' shadow and for ACPI tables, but reserved in the map.

use abi::boot::{E820_RAM, E820_RESERVED};
use vmm::memory::PAGE_SIZE;

/// End of the RAM below 4 GiB: what is more lies from [`HIGH_RAM_START`].
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM goes on above the PCI hole.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// A BIOS ROM ends here.
pub const ROM_END: u64 = 1 << 32;

/// End of conventional memory: 1 KiB of extended BIOS data area follows.
pub(super) const EBDA_START: u64 = 0x9_fc00;
/// Start of the video memory hole.
const VIDEO_START: u64 = 0xa_0000;
/// End of the video memory hole.
const VIDEO_END: u64 = 0xc_0000;
/// One mebibyte, where extended memory begins.
pub(super) const EXTENDED_START: u64 = 0x10_0000;

/// A range of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct E820Range {
    /// First address.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
    /// `E820_` type of [`abi::boot`].
    pub kind: u32,
}

/// Ranges (address, size) to map for a machine of `memory_size` bytes, for [`vmm::memory::map`]. `rom_size` bytes, rounded up
/// to pages, are mapped to end at 4 GiB ([`super::Image::rom_size`]). A machine never gets less than 1 MiB.
pub fn layout(memory_size: u64, rom_size: u64) -> Vec<(u64, u64)> {
    let size = (memory_size & !(PAGE_SIZE - 1)).max(EXTENDED_START);
    let low_end = size.min(LOW_RAM_END);
    let rom = rom_size.next_multiple_of(PAGE_SIZE).min(ROM_END - LOW_RAM_END);
    let mut ranges = vec![(0, VIDEO_START), (VIDEO_END, low_end - VIDEO_END)];
    if rom > 0 {
        ranges.push((ROM_END - rom, rom));
    }
    if size > low_end {
        ranges.push((HIGH_RAM_START, size - low_end));
    }
    ranges
}

/// The memory map of such a machine as its kernel sees it. Callers may add ranges of their own.
pub fn e820(memory_size: u64) -> Vec<E820Range> {
    let size = (memory_size & !(PAGE_SIZE - 1)).max(EXTENDED_START);
    let low_end = size.min(LOW_RAM_END);
    let all = [
        E820Range { start: 0, size: EBDA_START, kind: E820_RAM },
        E820Range { start: EBDA_START, size: EXTENDED_START - EBDA_START, kind: E820_RESERVED },
        E820Range { start: EXTENDED_START, size: low_end - EXTENDED_START, kind: E820_RAM },
        E820Range { start: HIGH_RAM_START, size: size - low_end, kind: E820_RAM },
    ];
    all.into_iter().filter(|r| r.size > 0).collect()
}
