//! The machine's ACPI tables. ACPI 6.5 chapter 5; the AML comes from the `acpi_tables` crate.
//!
//! RSDP, RSDT and XSDT, FADT (revision 3, which old systems read too), FACS, MADT, DSDT. They describe what this crate builds: the
//! wiring of [`crate::interrupts`], the ports of [`crate::acpi_pm`], the windows of [`crate::pci`].
//!
//! One builder serves both ways to the guest: [`AcpiTables::place`] gives finished bytes for an address, and
//! [`AcpiTables::loader_script`] tells firmware (QEMU's `etc/table-loader`, as SeaBIOS and OVMF execute it) how to place them.
//!
//! The keyboard controller is not declared: there is no keyboard, and guests boot faster when they do not look for one.

mod dsdt;

use abi::apic::{APIC_DEFAULT_BASE, IOAPIC_BASE};

use crate::acpi_pm::{PM_TIMER, PM1_CONTROL, PM1_EVENT};
use crate::interrupts::{SCI_IRQ, TIMER_PIN};
use crate::reset::{RESET_CONTROL, RESET_VALUE};

/// Where [`AcpiTables::place`] usually puts the tables: the RSDP must be in 0xe0000-0xfffff, on 16 bytes.
pub const DEFAULT_BASE: u32 = 0xe_0000;
/// Name of the file with the RSDP, for firmware.
pub const RSDP_FILE: &str = "etc/acpi/rsdp";
/// Name of the file with all other tables.
pub const TABLES_FILE: &str = "etc/acpi/tables";
/// Name of the file with the loader's commands.
pub const LOADER_FILE: &str = "etc/table-loader";

const OEM_ID: [u8; 6] = *b"PVBUS ";
const OEM_TABLE_ID: [u8; 8] = *b"PVBUSPC ";
const CREATOR: [u8; 4] = *b"PVBS";
const HEADER: usize = 36;
const CHECKSUM_OFFSET: usize = 9;
const RSDP_SIZE: usize = 36;
/// FACS must be on 64 bytes; the others may be anywhere.
const TABLE_ALIGNMENT: usize = 64;

/// What the tables describe, besides what every machine has.
#[derive(Debug, Clone, Copy)]
pub struct AcpiConfig {
    /// Number of processors; processor n has APIC id n.
    pub processors: u8,
    /// Whether there is fw_cfg.
    pub fw_cfg: bool,
    /// Whether there is Hyper-V's VMBus.
    pub vmbus: bool,
}

/// One of the two files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum File {
    Rsdp,
    Tables,
}

/// Tables at address zero, and what has to change when they go elsewhere.
pub struct AcpiTables {
    rsdp: Vec<u8>,
    tables: Vec<u8>,
    /// Places that hold the offset of a table: file, offset, size.
    pointers: Vec<(File, usize, u8)>,
    /// Checksums: file, where, and what range they cover.
    checksums: Vec<(File, usize, std::ops::Range<usize>)>,
}

impl AcpiTables {
    /// Builds the tables.
    pub fn new(config: &AcpiConfig) -> AcpiTables {
        let mut acpi = AcpiTables { rsdp: Vec::new(), tables: Vec::new(), pointers: Vec::new(), checksums: Vec::new() };
        let facs = acpi.add_facs();
        let dsdt = acpi.add(b"DSDT", 2, &dsdt::body(config), &[]);
        let (fadt, pointers) = fadt(facs, dsdt);
        let fadt = acpi.add(b"FACP", 3, &fadt, &pointers);
        let madt = acpi.add(b"APIC", 3, &madt(config.processors), &[]);
        let entries = [fadt, madt];
        let body: Vec<u8> = entries.iter().flat_map(|entry| (*entry as u32).to_le_bytes()).collect();
        let rsdt = acpi.add(b"RSDT", 1, &body, &[(HEADER, 4), (HEADER + 4, 4)]);
        let body: Vec<u8> = entries.iter().flat_map(|entry| (*entry as u64).to_le_bytes()).collect();
        let xsdt = acpi.add(b"XSDT", 1, &body, &[(HEADER, 8), (HEADER + 8, 8)]);
        acpi.add_rsdp(rsdt, xsdt);
        acpi
    }

    /// The tables as they are at `base`, which is also the RSDP's address. It must be a multiple of 64.
    pub fn place(&self, base: u32) -> Vec<u8> {
        let tables_base = (base as usize).saturating_add(TABLE_ALIGNMENT);
        let mut files = [self.rsdp.clone(), self.tables.clone()];
        for &(file, offset, size) in &self.pointers {
            let bytes = &mut files[file as usize][offset..offset + usize::from(size)];
            let value = bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)) + tables_base as u64;
            bytes.copy_from_slice(&value.to_le_bytes()[..usize::from(size)]);
        }
        for (file, at, range) in &self.checksums {
            let bytes = &mut files[*file as usize];
            bytes[*at] = checksum(&bytes[range.clone()]);
        }
        let [mut bytes, tables] = files;
        bytes.resize(TABLE_ALIGNMENT, 0);
        bytes.extend(tables);
        bytes
    }

    /// The files for firmware: name and contents.
    pub fn files(&self) -> [(&'static str, Vec<u8>); 3] {
        [(RSDP_FILE, self.rsdp.clone()), (TABLES_FILE, self.tables.clone()), (LOADER_FILE, self.loader_script())]
    }

    /// Commands that place the files, 128 bytes each: QEMU `docs/specs/acpi_hw_reduced`, `hw/acpi/bios-linker-loader.c`.
    pub fn loader_script(&self) -> Vec<u8> {
        const ALLOCATE: u32 = 1;
        const ADD_POINTER: u32 = 2;
        const ADD_CHECKSUM: u32 = 3;
        /// Anywhere below 4 GiB, and the segment at 0xf0000.
        const HIGH: u8 = 1;
        const F_SEGMENT: u8 = 2;
        let allocate = |file: &str, align: u32, zone: u8| command(ALLOCATE, &[&name(file), &align.to_le_bytes(), &[zone]]);
        let mut script = allocate(RSDP_FILE, 16, F_SEGMENT);
        script.extend(allocate(TABLES_FILE, TABLE_ALIGNMENT as u32, HIGH));
        for &(file, offset, size) in &self.pointers {
            let place = (offset as u32).to_le_bytes();
            script.extend(command(ADD_POINTER, &[&name(file.name()), &name(TABLES_FILE), &place, &[size]]));
        }
        for (file, at, range) in &self.checksums {
            let numbers = [*at, range.start, range.len()].map(|number| (number as u32).to_le_bytes()).concat();
            script.extend(command(ADD_CHECKSUM, &[&name(file.name()), &numbers]));
        }
        script
    }

    /// Adds a table; `pointers` are places in it that hold offsets of other tables, and their size. Its checksum is zero until it is
    /// placed.
    fn add(&mut self, signature: &[u8; 4], revision: u8, body: &[u8], pointers: &[(usize, u8)]) -> usize {
        let start = self.tables.len().next_multiple_of(TABLE_ALIGNMENT);
        self.tables.resize(start, 0);
        self.tables.extend(signature);
        self.tables.extend(((HEADER + body.len()) as u32).to_le_bytes());
        self.tables.extend([revision, 0]);
        self.tables.extend(OEM_ID);
        self.tables.extend(OEM_TABLE_ID);
        self.tables.extend(1u32.to_le_bytes());
        self.tables.extend(CREATOR);
        self.tables.extend(1u32.to_le_bytes());
        self.tables.extend(body);
        self.pointers.extend(pointers.iter().map(|&(offset, size)| (File::Tables, start + offset, size)));
        self.checksums.push((File::Tables, start + CHECKSUM_OFFSET, start..self.tables.len()));
        start
    }

    /// Firmware ACPI control structure: no checksum, and nothing in it that a machine without sleep states needs.
    fn add_facs(&mut self) -> usize {
        let mut facs = [0; 64];
        facs[..4].copy_from_slice(b"FACS");
        facs[4] = 64;
        facs[32] = 1;
        self.tables.extend(facs);
        0
    }

    fn add_rsdp(&mut self, rsdt: usize, xsdt: usize) {
        self.rsdp.extend(b"RSD PTR \0");
        self.rsdp.extend(OEM_ID);
        self.rsdp.push(2);
        self.rsdp.extend((rsdt as u32).to_le_bytes());
        self.rsdp.extend((RSDP_SIZE as u32).to_le_bytes());
        self.rsdp.extend((xsdt as u64).to_le_bytes());
        self.rsdp.extend([0; 4]);
        self.pointers.extend([(File::Rsdp, 16, 4), (File::Rsdp, 24, 8)]);
        // The first 20 bytes have their own checksum, which the second one covers.
        self.checksums.extend([(File::Rsdp, 8, 0..20), (File::Rsdp, 32, 0..RSDP_SIZE)]);
    }
}

impl File {
    fn name(self) -> &'static str {
        match self {
            File::Rsdp => RSDP_FILE,
            File::Tables => TABLES_FILE,
        }
    }
}

/// Fixed ACPI description table: body after the header, and its pointers. Offsets are those of ACPI 6.5 table 5.9.
fn fadt(facs: usize, dsdt: usize) -> (Vec<u8>, [(usize, u8); 3]) {
    const SIZE: usize = 244;
    const FIRMWARE_CTRL: usize = 36;
    const DSDT: usize = 40;
    const X_DSDT: usize = 140;
    /// Longer than any C2 or C3 state may take: there are none.
    const NO_SLEEP_LATENCY: u16 = 0xfff;
    /// There are ISA devices; there is no VGA.
    const BOOT_ARCHITECTURE: u16 = 1 << 0 | 1 << 2;
    /// WBINVD works, C1 works, no sleep button, RTC wakes nothing, 32-bit timer, reset register.
    const FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10;

    let mut table = [0; SIZE];
    let mut put = |offset: usize, bytes: &[u8]| table[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(FIRMWARE_CTRL, &(facs as u32).to_le_bytes());
    put(DSDT, &(dsdt as u32).to_le_bytes());
    put(46, &u16::from(SCI_IRQ).to_le_bytes());
    put(56, &u32::from(PM1_EVENT).to_le_bytes());
    put(64, &u32::from(PM1_CONTROL).to_le_bytes());
    put(76, &u32::from(PM_TIMER).to_le_bytes());
    put(88, &[4, 2, 0, 4]);
    put(96, &[NO_SLEEP_LATENCY.to_le_bytes(), NO_SLEEP_LATENCY.to_le_bytes()].concat());
    put(108, &[crate::rtc::CENTURY]);
    put(109, &BOOT_ARCHITECTURE.to_le_bytes());
    put(112, &FLAGS.to_le_bytes());
    put(116, &io_address(RESET_CONTROL, 8));
    put(128, &[RESET_VALUE]);
    put(X_DSDT, &(dsdt as u64).to_le_bytes());
    put(148, &io_address(PM1_EVENT, 32));
    put(172, &io_address(PM1_CONTROL, 16));
    put(208, &io_address(PM_TIMER, 32));
    (table[HEADER..].to_vec(), [(FIRMWARE_CTRL, 4), (DSDT, 4), (X_DSDT, 8)])
}

/// Generic address structure of an I/O register of `bits`.
fn io_address(port: u16, bits: u8) -> [u8; 12] {
    const IO_SPACE: u8 = 1;
    let access = match bits {
        8 => 1,
        16 => 2,
        _ => 3,
    };
    let [low, high] = port.to_le_bytes();
    [IO_SPACE, bits, 0, access, low, high, 0, 0, 0, 0, 0, 0]
}

/// Multiple APIC description table: body after the header. ACPI 6.5 section 5.2.12.
fn madt(processors: u8) -> Vec<u8> {
    const PC_AT_COMPATIBLE: u32 = 1;
    const ENABLED: u32 = 1;
    const ALL_PROCESSORS: u8 = 0xff;
    /// Active high, level triggered.
    const LEVEL_HIGH: u16 = 0x0d;
    const ISA_BUS: u8 = 0;

    let mut body = (APIC_DEFAULT_BASE as u32).to_le_bytes().to_vec();
    body.extend(PC_AT_COMPATIBLE.to_le_bytes());
    for id in 0..processors {
        body.extend([0, 8, id, id]);
        body.extend(ENABLED.to_le_bytes());
    }
    body.extend([1, 12, 0, 0]);
    body.extend((IOAPIC_BASE as u32).to_le_bytes());
    body.extend(0u32.to_le_bytes());
    for (irq, gsi, flags) in [(0, TIMER_PIN, 0), (SCI_IRQ, SCI_IRQ, LEVEL_HIGH)] {
        body.extend([2, 10, ISA_BUS, irq]);
        body.extend(u32::from(gsi).to_le_bytes());
        body.extend(flags.to_le_bytes());
    }
    // NMI of all processors is their LINT1.
    body.extend([4, 6, ALL_PROCESSORS, 0, 0, 1]);
    body
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_sub(*byte))
}

/// A file name in a loader command.
fn name(file: &str) -> [u8; 56] {
    let mut name = [0; 56];
    name[..file.len()].copy_from_slice(file.as_bytes());
    name
}

fn command(code: u32, fields: &[&[u8]]) -> Vec<u8> {
    let mut bytes = code.to_le_bytes().to_vec();
    bytes.extend(fields.concat());
    bytes.resize(128, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: AcpiConfig = AcpiConfig { processors: 3, fw_cfg: true, vmbus: true };

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    /// The table at `address` of tables that were placed at `base`.
    fn table(placed: &[u8], base: u32, address: u32) -> &[u8] {
        let at = (address - base) as usize;
        &placed[at..at + u32_at(placed, at + 4) as usize]
    }

    #[test]
    fn placed_tables_are_found_from_the_rsdp_and_sum_to_zero() {
        let placed = AcpiTables::new(&CONFIG).place(DEFAULT_BASE);
        assert_eq!(&placed[..8], b"RSD PTR ");
        assert_eq!((sum(&placed[..20]), sum(&placed[..36])), (0, 0));
        let rsdt = table(&placed, DEFAULT_BASE, u32_at(&placed, 16));
        let xsdt = table(&placed, DEFAULT_BASE, u32_at(&placed, 24));
        assert_eq!((&rsdt[..4], &xsdt[..4]), (&b"RSDT"[..], &b"XSDT"[..]));
        assert_eq!(u32_at(rsdt, 36), u32_at(xsdt, 36));
        let fadt = table(&placed, DEFAULT_BASE, u32_at(rsdt, 36));
        let madt = table(&placed, DEFAULT_BASE, u32_at(rsdt, 40));
        let dsdt = table(&placed, DEFAULT_BASE, u32_at(fadt, 40));
        assert_eq!((&fadt[..4], &madt[..4], &dsdt[..4]), (&b"FACP"[..], &b"APIC"[..], &b"DSDT"[..]));
        assert_eq!(u32_at(fadt, 40), u32_at(fadt, 140));
        for table in [rsdt, xsdt, fadt, madt, dsdt] {
            assert_eq!(sum(table), 0);
        }
        assert_eq!(fadt.len(), 244);
        assert_eq!(&table(&placed, DEFAULT_BASE, u32_at(fadt, 36))[..4], b"FACS");
        assert!(DEFAULT_BASE as usize + placed.len() <= 0x10_0000);
    }

    #[test]
    fn most_processors_fit_below_one_mebibyte() {
        let placed = AcpiTables::new(&AcpiConfig { processors: 64, fw_cfg: true, vmbus: true }).place(DEFAULT_BASE);
        assert!(placed.len() < 0x4000, "{}", placed.len());
    }

    #[test]
    fn madt_lists_processors_io_apic_overrides_and_nmi() {
        let body = madt(3);
        let mut kinds = Vec::new();
        let mut at = 8;
        while at < body.len() {
            kinds.push(body[at]);
            at += usize::from(body[at + 1]);
        }
        assert_eq!(kinds, [0, 0, 0, 1, 2, 2, 4]);
        assert_eq!(at, body.len());
    }

    /// Does what firmware does with the script.
    #[test]
    fn loader_script_places_the_same_tables() {
        let acpi = AcpiTables::new(&CONFIG);
        let base = 0xe_0000;
        let mut files = [acpi.rsdp.clone(), acpi.tables.clone()];
        let script = acpi.loader_script();
        assert_eq!(script.len() % 128, 0);
        for command in script.chunks(128) {
            let which = usize::from(command[4..].starts_with(TABLES_FILE.as_bytes()));
            match u32_at(command, 0) {
                1 => {}
                2 => {
                    let (at, size) = (u32_at(command, 116) as usize, usize::from(command[120]));
                    let mut value = [0; 8];
                    value[..size].copy_from_slice(&files[which][at..at + size]);
                    let value = u64::from_le_bytes(value) + base + 64;
                    files[which][at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
                }
                3 => {
                    let [at, start, len] = [60, 64, 68].map(|field| u32_at(command, field) as usize);
                    let covered = sum(&files[which][start..start + len]);
                    files[which][at] = files[which][at].wrapping_sub(covered);
                }
                other => panic!("command {other}"),
            }
        }
        let placed = acpi.place(base as u32);
        assert_eq!(placed[..36], files[0]);
        assert_eq!(placed[64..], files[1]);
    }

    #[test]
    fn vmbus_is_declared_where_it_is() {
        let placed = |vmbus| AcpiTables::new(&AcpiConfig { vmbus, ..CONFIG }).place(DEFAULT_BASE);
        let names = |table: &[u8]| table.windows(5).filter(|name| *name == b"VMBUS").count();
        assert_eq!((names(&placed(true)), names(&placed(false))), (2, 0), "as _HID and as _DDN");
    }

    /// ACPICA's compiler, as a stranger who reads our AML; not everywhere installed.
    #[test]
    fn acpica_reads_the_dsdt_and_compiles_it_again() {
        // The compiler wants seven letters of a `_HID`; VMBus' is as Microsoft has it.
        let placed = AcpiTables::new(&AcpiConfig { vmbus: false, ..CONFIG }).place(DEFAULT_BASE);
        let rsdt = table(&placed, DEFAULT_BASE, u32_at(&placed, 16));
        let fadt = table(&placed, DEFAULT_BASE, u32_at(rsdt, 36));
        let directory = tempfile::tempdir().unwrap();
        let run = |arguments: &[&str]| {
            std::process::Command::new("iasl").args(arguments).current_dir(directory.path()).output().map(|output| {
                let text = [output.stdout, output.stderr].concat();
                (output.status.success(), String::from_utf8_lossy(&text).into_owned())
            })
        };
        for (file, bytes) in [("dsdt.aml", table(&placed, DEFAULT_BASE, u32_at(fadt, 40))), ("facp.aml", fadt)] {
            std::fs::write(directory.path().join(file), bytes).unwrap();
            let Ok((good, text)) = run(&["-d", file]) else {
                eprintln!("skipped: iasl (package acpica-tools) is not installed");
                return;
            };
            assert!(good && !text.contains("Error"), "{text}");
        }
        let (good, text) = run(&["-p", "again", "dsdt.dsl"]).unwrap();
        assert!(good && text.contains(" 0 Errors, 0 Warnings"), "{text}");
    }
}
