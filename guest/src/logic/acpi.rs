//! What a kernel without an AML interpreter needs of ACPI: how to switch the machine off, how to reset it, and where its power
//! button is.
//!
//! ACPI 6.5 sections 5.2.5 (RSDP), 5.2.7 and 5.2.8 (RSDT, XSDT), 5.2.9 (FADT), 7.4.2 (`\_S5`), 20.2 (AML encoding). Sleep types
//! stand in the DSDT, in a package of small integers that every firmware writes literally; it is found by its name.

/// Physical memory.
pub trait Memory {
    /// `length` bytes at `address`, when there is such memory.
    fn bytes(&self, address: u64, length: usize) -> Option<&[u8]>;
}

/// Largest table that is looked at.
const TABLE_MAX: u32 = 4 << 20;
/// Bytes of a table's header: signature, length and what is not needed here.
const HEADER: usize = 36;
/// Where the RSDP is to be found on a PC when nobody says, on every 16 bytes.
const SEARCH: core::ops::Range<u64> = 0xe_0000..0x10_0000;
/// Address space of generic addresses: system I/O.
const SPACE_IO: u8 = 1;

/// Offsets in the FADT, ACPI 6.5 table 5.9.
mod fadt {
    pub const DSDT: usize = 40;
    pub const SCI_INTERRUPT: usize = 46;
    pub const SMI_COMMAND: usize = 48;
    pub const ACPI_ENABLE: usize = 52;
    pub const PM1A_EVENT: usize = 56;
    pub const PM1A_CONTROL: usize = 64;
    pub const PM1B_CONTROL: usize = 68;
    pub const PM1_EVENT_LENGTH: usize = 88;
    pub const FLAGS: usize = 112;
    pub const RESET_REGISTER: usize = 116;
    pub const RESET_VALUE: usize = 128;
    pub const X_DSDT: usize = 140;
    /// There is no power button of the fixed hardware.
    pub const FLAG_NO_BUTTON: u32 = 1 << 4;
    pub const FLAG_RESET: u32 = 1 << 10;
}

/// The machine's fixed hardware.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Power {
    /// Ports of the PM1 control blocks and the sleep types that switch off.
    pub off: [Option<(u16, u8)>; 2],
    /// Port and value that reset the machine.
    pub reset: Option<(u16, u8)>,
    /// Port and value that turn ACPI on where firmware has it off.
    pub enable: Option<(u16, u8)>,
    /// The power button of the fixed hardware.
    pub button: Option<Button>,
}

/// Where the fixed hardware tells of its power button.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Button {
    /// PM1a status register.
    pub status: u16,
    /// PM1a enable register.
    pub enable: u16,
    /// The system control interrupt.
    pub irq: u8,
}

impl Power {
    /// Reads the tables. `rsdp` is the root pointer's address, when the loader told it.
    pub fn find(memory: &impl Memory, rsdp: Option<u64>) -> Option<Power> {
        let rsdp = match rsdp {
            Some(address) => memory.bytes(address, 36).filter(|bytes| is_rsdp(bytes))?,
            None => SEARCH.step_by(16).find_map(|at| memory.bytes(at, 36).filter(|bytes| is_rsdp(bytes)))?,
        };
        let fadt = fadt_of(memory, rsdp)?;
        let port = |offset| u32_at(fadt, offset).and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0);
        let dsdt = u64_at(fadt, fadt::X_DSDT).filter(|address| *address != 0).or(u32_at(fadt, fadt::DSDT).map(u64::from))?;
        let types = table(memory, dsdt, b"DSDT").and_then(sleep_types);
        let off = match types {
            Some([a, b]) => [port(fadt::PM1A_CONTROL).map(|port| (port, a)), port(fadt::PM1B_CONTROL).map(|port| (port, b))],
            None => [None; 2],
        };
        let flags = u32_at(fadt, fadt::FLAGS).unwrap_or(0);
        let has_reset = |register: &&[u8]| flags & fadt::FLAG_RESET != 0 && register.first() == Some(&SPACE_IO);
        let register = fadt.get(fadt::RESET_REGISTER..).filter(has_reset);
        let reset = register.and_then(|register| u16::try_from(u64_at(register, 4)?).ok()).zip(fadt.get(fadt::RESET_VALUE).copied());
        let enable = port(fadt::SMI_COMMAND).zip(fadt.get(fadt::ACPI_ENABLE).copied().filter(|value| *value != 0));
        Some(Power { off, reset, enable, button: button(fadt, flags, port(fadt::PM1A_EVENT)) })
    }
}

/// The power button by the FADT; its status register is the first half of the event block.
fn button(fadt: &[u8], flags: u32, status: Option<u16>) -> Option<Button> {
    let half = u16::from(*fadt.get(fadt::PM1_EVENT_LENGTH)? / 2);
    let irq = *fadt.get(fadt::SCI_INTERRUPT)?;
    let status = status.filter(|_| flags & fadt::FLAG_NO_BUTTON == 0 && half >= 2 && irq < 16)?;
    Some(Button { status, enable: status.checked_add(half)?, irq })
}

/// Whether these bytes are an RSDP with a right checksum (of the part that all revisions have).
fn is_rsdp(bytes: &[u8]) -> bool {
    bytes.starts_with(b"RSD PTR ") && bytes.iter().take(20).fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0
}

fn fadt_of<'a>(memory: &'a impl Memory, rsdp: &[u8]) -> Option<&'a [u8]> {
    const REVISION: usize = 15;
    const RSDT: usize = 16;
    const XSDT: usize = 24;
    let extended = if rsdp.get(REVISION).is_some_and(|revision| *revision >= 2) { u64_at(rsdp, XSDT) } else { None };
    if let Some(address) = extended.filter(|address| *address != 0) {
        let entries = table(memory, address, b"XSDT")?.get(HEADER..)?;
        return entries.chunks_exact(8).find_map(|entry| table(memory, u64_at(entry, 0)?, b"FACP"));
    }
    let entries = table(memory, u32_at(rsdp, RSDT)?.into(), b"RSDT")?.get(HEADER..)?;
    entries.chunks_exact(4).find_map(|entry| table(memory, u32_at(entry, 0)?.into(), b"FACP"))
}

/// The table at `address`, when it is of that kind.
fn table<'a>(memory: &'a impl Memory, address: u64, signature: &[u8; 4]) -> Option<&'a [u8]> {
    let length = u32_at(memory.bytes(address, HEADER).filter(|header| header.starts_with(signature))?, 4)?;
    memory.bytes(address, usize::try_from(length).ok().filter(|_| length <= TABLE_MAX)?)
}

/// The first two integers of the package `_S5_` in a DSDT.
fn sleep_types(dsdt: &[u8]) -> Option<[u8; 2]> {
    const NAME: u8 = 0x08;
    const PACKAGE: u8 = 0x12;
    let at = dsdt.windows(5).enumerate().find_map(|(at, window)| {
        // NameOp comes before it, or before the backslash of an absolute name.
        let named = at.checked_sub(1).and_then(|before| dsdt.get(before)).is_some_and(|byte| matches!(*byte, NAME | b'\\'));
        (window.starts_with(b"_S5_") && window[4] == PACKAGE && named).then_some(at + 5)
    })?;
    // PkgLength: the two top bits of its first byte say how many bytes follow; then the number of elements.
    let length_bytes = 1 + usize::from(dsdt.get(at)? >> 6);
    let mut elements = dsdt.get(at + length_bytes + 1..)?;
    let mut next = || {
        let (value, used) = match *elements {
            [value @ (0 | 1), ..] => (value, 1),      // ZeroOp, OneOp
            [0x0a, value, ..] => (value, 2),          // BytePrefix
            [0x0b, value, _, ..] => (value, 3),       // WordPrefix
            [0x0c, value, _, _, _, ..] => (value, 5), // DWordPrefix
            _ => return None,
        };
        elements = elements.get(used..)?;
        Some(value & 7)
    };
    Some([next()?, next()?])
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory from [`SEARCH`] on.
    struct Rom(Vec<u8>);

    impl Memory for Rom {
        fn bytes(&self, address: u64, length: usize) -> Option<&[u8]> {
            let at = usize::try_from(address.checked_sub(SEARCH.start)?).ok()?;
            self.0.get(at..)?.get(..length)
        }
    }

    impl Rom {
        fn put(&mut self, at: usize, bytes: &[u8]) {
            self.0[at..at + bytes.len()].copy_from_slice(bytes);
        }

        fn table(&mut self, at: usize, signature: &[u8; 4], length: usize) {
            self.put(at, signature);
            self.put(at + 4, &(length as u32).to_le_bytes());
        }
    }

    /// Tables of a PC: RSDP with an RSDT at 0x40, FADT, DSDT with `aml`.
    fn rom(aml: &[u8]) -> Rom {
        let mut rom = Rom(vec![0; 0x1000]);
        rom.put(0x40, b"RSD PTR ");
        rom.put(0x40 + 16, &0xe_0100u32.to_le_bytes());
        let sum = rom.0[0x40..0x54].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        rom.put(0x48, &[sum.wrapping_neg()]);
        rom.table(0x100, b"RSDT", HEADER + 8);
        rom.put(0x100 + HEADER, &0xe_0180u32.to_le_bytes());
        rom.put(0x100 + HEADER + 4, &0xe_0200u32.to_le_bytes());
        rom.table(0x180, b"APIC", HEADER);
        rom.table(0x200, b"FACP", 244);
        rom.put(0x200 + fadt::DSDT, &0xe_0400u32.to_le_bytes());
        rom.put(0x200 + fadt::SMI_COMMAND, &[0xb2, 0, 0, 0, 0xf1]);
        rom.put(0x200 + fadt::SCI_INTERRUPT, &[9]);
        rom.put(0x200 + fadt::PM1A_EVENT, &[0x00, 0x06]);
        rom.put(0x200 + fadt::PM1_EVENT_LENGTH, &[4]);
        rom.put(0x200 + fadt::PM1A_CONTROL, &[0x04, 0x06]);
        rom.put(0x200 + fadt::FLAGS, &fadt::FLAG_RESET.to_le_bytes());
        rom.put(0x200 + fadt::RESET_REGISTER, &[SPACE_IO, 8, 0, 1, 0xf9, 0x0c]);
        rom.put(0x200 + fadt::RESET_VALUE, &[6]);
        rom.table(0x400, b"DSDT", HEADER + aml.len());
        rom.put(0x400 + HEADER, aml);
        rom
    }

    #[test]
    fn tables_tell_how_to_switch_off_and_reset() {
        let button = Some(Button { status: 0x600, enable: 0x602, irq: 9 });
        let power = Power { off: [Some((0x604, 5)), None], reset: Some((0xcf9, 6)), enable: Some((0xb2, 0xf1)), button };
        let rom = rom(b"\x08_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00");
        assert_eq!(Power::find(&rom, None), Some(power));
        assert_eq!(Power::find(&rom, Some(0xe_0040)), Some(power));
        assert_eq!(Power::find(&rom, Some(0xe_0041)), None);
    }

    #[test]
    fn sleep_types_have_several_encodings() {
        for (aml, types) in [
            (&b"\x08_S5_\x12\x06\x04\x00\x00\x00\x00"[..], Some([0, 0])),
            (b"\x08\\_S5_\x12\x40\x01\x02\x01\x0b\x07\x00", Some([1, 7])),
            (b"\x08_S5_\x12\x08\x02\x0c\x05\x00\x00\x00\x01", Some([5, 1])),
            (b"x_S5_\x12\x06\x04\x00\x00", None),
            (b"\x08_S5_\x12\x06\x04\x0a", None),
            (b"\x08_S5_\x12\xff", None),
            (b"\x08_S4_\x12\x06\x04\x00\x00", None),
        ] {
            assert_eq!(sleep_types(aml), types, "{aml:x?}");
        }
    }

    #[test]
    fn damaged_tables_are_no_tables() {
        let whole = rom(b"\x08_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00");
        for length in 0..0x450 {
            // Any answer will do, as long as there is one.
            let _ = Power::find(&Rom(whole.0[..length].to_vec()), None);
        }
        let mut endless = rom(b"");
        endless.put(0x100 + 4, &u32::MAX.to_le_bytes());
        assert_eq!(Power::find(&endless, None), None);
    }
}
