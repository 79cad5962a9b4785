//! SMBIOS tables: what the machine says it is, to people and to programs that look at its maker's name.
//!
//! cloud-init, open-vm-tools and systemd read the product's name and the UUID from here (`/sys/class/dmi/id`). Three structures are there: firmware,
//! system, and the enclosure that the specification wants. They lie in memory behind their entry point for kernels that start without firmware
//! ([`Smbios::place`]), or go to the firmware by fw_cfg ([`Smbios::files`]), which places them itself. DMTF DSP0134 3.x; the entry
//! point is that of version 2.1 (5.2.1), which every reader knows.

/// Where the tables lie without firmware: the first place that readers look at (5.2: on a 16-byte boundary from 0xf0000).
pub const DEFAULT_BASE: u32 = 0xf_0000;
/// Bytes of the entry point (5.2.1).
const ENTRY_SIZE: usize = 0x1f;
/// Where the part of the entry point with a checksum of its own begins: `_DMI_`.
const INTERMEDIATE: usize = 0x10;
/// Where the tables begin, from the entry point.
const TABLES_OFFSET: u32 = 0x20;

/// What the tables tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SmbiosConfig<'a> {
    /// Maker of the machine.
    pub manufacturer: &'a str,
    /// Its product name.
    pub product: &'a str,
    /// Its serial number.
    pub serial: &'a str,
    /// Its UUID, bytes as the text form has them.
    pub uuid: [u8; 16],
}

/// The structures, ready to be placed.
pub struct Smbios {
    tables: Vec<u8>,
    count: u16,
    longest: u16,
}

impl Smbios {
    /// The tables of a machine.
    pub fn new(config: &SmbiosConfig) -> Smbios {
        let mut smbios = Smbios { tables: Vec::new(), count: 0, longest: 0 };
        smbios.add(0, &firmware(), &[config.manufacturer, env!("CARGO_PKG_VERSION"), "01/01/2024"]);
        smbios.add(1, &system(config.uuid), &[config.manufacturer, config.product, config.serial]);
        smbios.add(3, &ENCLOSURE, &[config.manufacturer]);
        smbios.add(127, &[], &[]);
        smbios
    }

    /// Entry point and structures for memory at `base`.
    pub fn place(&self, base: u32) -> Vec<u8> {
        let mut bytes = self.entry_point(base + TABLES_OFFSET);
        bytes.resize(TABLES_OFFSET as usize, 0);
        bytes.extend_from_slice(&self.tables);
        bytes
    }

    /// The same as files for firmware, which fills in the address (QEMU `docs/specs/fw_cfg.rst`, SeaBIOS `src/fw/biostables.c`).
    pub fn files(&self) -> [(&'static str, Vec<u8>); 2] {
        [("etc/smbios/smbios-anchor", self.entry_point(0)), ("etc/smbios/smbios-tables", self.tables.clone())]
    }

    /// Appends a structure: header, `body`, and its `strings`, which the body names by number from 1 (6.1.3).
    fn add(&mut self, kind: u8, body: &[u8], strings: &[&str]) {
        let start = self.tables.len();
        let [low, high] = self.count.to_le_bytes();
        self.tables.extend_from_slice(&[kind, body.len() as u8 + 4, low, high]);
        self.tables.extend_from_slice(body);
        for string in strings {
            self.tables.extend_from_slice(string.as_bytes());
            self.tables.push(0);
        }
        // Two zeroes end a structure, also one without strings.
        self.tables.extend_from_slice(if strings.is_empty() { &[0, 0] } else { &[0] });
        self.count += 1;
        self.longest = self.longest.max((self.tables.len() - start) as u16);
    }

    /// Version 2.1's entry point, which says that the structures are of version 2.8.
    fn entry_point(&self, tables: u32) -> Vec<u8> {
        let mut entry = Vec::with_capacity(ENTRY_SIZE);
        entry.extend_from_slice(b"_SM_");
        entry.extend_from_slice(&[0, ENTRY_SIZE as u8, 2, 8]);
        entry.extend_from_slice(&self.longest.to_le_bytes());
        entry.extend_from_slice(&[0; 6]);
        entry.extend_from_slice(b"_DMI_\0");
        entry.extend_from_slice(&(self.tables.len() as u16).to_le_bytes());
        entry.extend_from_slice(&tables.to_le_bytes());
        entry.extend_from_slice(&self.count.to_le_bytes());
        entry.push(0x28);
        entry[INTERMEDIATE + 5] = checksum(&entry[INTERMEDIATE..]);
        entry[4] = checksum(&entry);
        entry
    }
}

/// The byte that makes the sum of all zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

/// Type 0 (7.1) of version 2.4: characteristics "not supported", and in the second extension byte "the table describes a virtual machine".
fn firmware() -> [u8; 20] {
    let mut body = [0; 20];
    (body[0], body[1], body[4]) = (1, 2, 3);
    body[6] = 1 << 3;
    body[15] = 1 << 4;
    // No embedded controller.
    (body[18], body[19]) = (0xff, 0xff);
    body
}

/// Type 1 (7.2). The first three fields of the UUID are little-endian (7.2.1); it was woken by its power switch.
fn system(uuid: [u8; 16]) -> [u8; 23] {
    const POWER_SWITCH: u8 = 6;
    let mut body = [0; 23];
    (body[0], body[1], body[3]) = (1, 2, 3);
    body[4..20].copy_from_slice(&uuid);
    body[4..8].reverse();
    body[8..10].reverse();
    body[10..12].reverse();
    body[20] = POWER_SWITCH;
    body
}

/// Type 3 (7.4) of version 2.0: an enclosure of "other" kind whose three states are "safe" and whose security is "unknown".
const ENCLOSURE: [u8; 9] = [1, 1, 0, 0, 0, 3, 3, 3, 2];

#[cfg(test)]
mod tests {
    use super::*;

    fn placed() -> Vec<u8> {
        let uuid = *b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff";
        Smbios::new(&SmbiosConfig { manufacturer: "maker", product: "product", serial: "serial", uuid }).place(DEFAULT_BASE)
    }

    #[test]
    fn entry_point_has_both_checksums_and_points_at_the_tables() {
        let bytes = placed();
        assert_eq!(checksum(&bytes[..ENTRY_SIZE]), 0);
        assert_eq!(checksum(&bytes[INTERMEDIATE..ENTRY_SIZE]), 0);
        assert_eq!(u32::from_le_bytes(bytes[0x18..0x1c].try_into().unwrap()), DEFAULT_BASE + TABLES_OFFSET);
        assert_eq!(usize::from(u16::from_le_bytes(bytes[0x16..0x18].try_into().unwrap())), bytes.len() - TABLES_OFFSET as usize);
    }

    #[test]
    fn structures_follow_each_other_to_the_end() {
        let bytes = placed();
        let mut rest = &bytes[TABLES_OFFSET as usize..];
        let mut kinds = Vec::new();
        while let [kind, length, ..] = *rest {
            kinds.push(kind);
            let strings = &rest[usize::from(length)..];
            let end = strings.windows(2).position(|pair| pair == [0, 0]).unwrap();
            rest = &strings[end + 2..];
        }
        assert_eq!(kinds, [0, 1, 3, 127]);
    }

    #[test]
    fn uuid_has_its_first_fields_turned_round() {
        let bytes = placed();
        let at = bytes.windows(4).position(|four| four == [0x33, 0x22, 0x11, 0x00]).unwrap();
        assert_eq!(bytes[at + 4..at + 9], [0x55, 0x44, 0x77, 0x66, 0x88]);
    }
}
