//! What hvmloader leaves for SeaBIOS: with it, SeaBIOS runs as on Xen.
//!
//! SeaBIOS `src/fw/xen.c` and Xen `tools/firmware/hvmloader/seabios.c`: a structure at a fixed address names the memory map and the tables of ACPI
//! and SMBIOS, which stay where they are. SeaBIOS then leaves PCI alone, as hvmloader has set it up: here the bus itself
//! ([`PciBus::assign`](devices::pci::PciBus::assign)), so that the platform device's memory is where the guest's grant table can be.
//!
//! ```text
//!   0x1000        the structure, the addresses of the tables, the map
//!   0xfc000000    the tables, reserved in the map
//! ```

use abi::boot::E820_RESERVED;
use vm_memory::{Bytes, GuestAddress};
use vmm::GuestMemory;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{Immutable, IntoBytes};

use crate::boot::E820Range;

/// `SEABIOS_INFO_PHYSICAL_ADDRESS`.
const INFO: u64 = 0x1000;
/// Where the tables are: hvmloader's `RESERVED_MEMBASE` (`tools/firmware/hvmloader/config.h`).
pub const TABLES: u64 = 0xfc00_0000;
/// Room for each of the two kinds.
const ROOM: u64 = 0x1_0000;
/// Bytes of memory for the tables.
pub const TABLES_SIZE: u64 = 2 * ROOM;
/// Where ACPI's are, and SMBIOS'.
pub const ACPI: u32 = TABLES as u32;
/// See [`ACPI`].
pub const SMBIOS: u32 = (TABLES + ROOM) as u32;

/// `struct xen_seabios_info`, with what it points at behind it.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Info {
    signature: [u8; 14],
    length: u8,
    checksum: u8,
    tables: U32,
    tables_nr: U32,
    e820: U32,
    e820_nr: U32,
    places: [U32; 2],
}

/// Bytes of [`Info`] without what is behind.
const LENGTH: u8 = 32;
const _: () = assert!(size_of::<Info>() == LENGTH as usize + 8);

/// `struct e820entry`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MapEntry {
    start: U64,
    size: U64,
    kind: U32,
}

/// What the memory map says of the tables.
pub fn reserved() -> E820Range {
    E820Range { start: TABLES, size: TABLES_SIZE, kind: E820_RESERVED }
}

/// Puts all of it into memory; the tables are made for [`ACPI`] and [`SMBIOS`]. `false` when there is no room.
pub fn place(memory: &GuestMemory, acpi: &[u8], smbios: &[u8], map: &[E820Range]) -> bool {
    let behind = INFO as u32 + u32::from(LENGTH);
    let mut info = Info {
        signature: *b"XenHVMSeaBIOS\0",
        length: LENGTH,
        checksum: 0,
        tables: behind.into(),
        tables_nr: 2.into(),
        e820: (INFO as u32 + size_of::<Info>() as u32).into(),
        e820_nr: (map.len() as u32).into(),
        places: [ACPI.into(), SMBIOS.into()],
    };
    let sum = info.as_bytes().iter().take(LENGTH.into()).fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    info.checksum = sum.wrapping_neg();
    let entry = |range: &E820Range| MapEntry { start: range.start.into(), size: range.size.into(), kind: range.kind.into() };
    let map: Vec<MapEntry> = map.iter().map(entry).collect();
    let pieces = [(INFO, info.as_bytes()), (INFO + size_of::<Info>() as u64, map.as_bytes()), (ACPI.into(), acpi), (SMBIOS.into(), smbios)];
    let fits = acpi.len() as u64 <= ROOM && smbios.len() as u64 <= ROOM;
    fits && pieces.iter().all(|(at, bytes)| memory.write_slice(bytes, GuestAddress(*at)).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structure_sums_to_zero_and_names_tables_and_map() {
        let memory = vmm::memory::map(&[(0, 0x1_0000), (TABLES, TABLES_SIZE)]).unwrap();
        assert!(place(&memory, b"RSD PTR ", b"_SM_", &[E820Range { start: 0, size: 0x9_fc00, kind: 1 }, reserved()]));
        let mut info = [0; LENGTH as usize];
        memory.read_slice(&mut info, GuestAddress(INFO)).unwrap();
        assert!(info.starts_with(b"XenHVMSeaBIOS\0 "));
        assert_eq!(info.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let word = |at: u64| u64::from(memory.read_obj::<u32>(GuestAddress(at)).unwrap());
        let (tables, map) = (word(INFO + 16), word(INFO + 24));
        assert_eq!(
            (word(word(tables)), word(word(tables + 4))),
            (u64::from(u32::from_le_bytes(*b"RSD ")), u64::from(u32::from_le_bytes(*b"_SM_")))
        );
        assert_eq!((word(INFO + 28), word(map + 8), word(map + 20)), (2, 0x9_fc00, TABLES));
        assert!(!place(&memory, &vec![0; ROOM as usize + 1], b"", &[]));
    }
}
