//! Images made here byte by byte, loaded into a small machine's memory; then the same images with damage.

use std::io::Read;
use std::path::PathBuf;

use abi::boot::{linux as linux_words, openbsd as openbsd_words, pvh as pvh_words};
use abi::multiboot as multiboot_words;
use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use vmm::registers::{RAX, RBX, RSI, RSP};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::*;

const MIB: u64 = 1 << 20;

fn machine(size: u64, rom: u64) -> (GuestMemory, BootConfig) {
    let memory = vmm::memory::map(&layout(size, rom)).unwrap();
    (memory, BootConfig { memory_map: e820(size), rsdp: Some(0xe_0000), ..BootConfig::default() })
}

/// Random bytes that are all the same.
struct Constant(u8);

impl Read for Constant {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        buffer.fill(self.0);
        Ok(buffer.len())
    }
}

fn write(directory: &TempDir, name: &str, data: &[u8]) -> PathBuf {
    let path = directory.path().join(name);
    std::fs::write(&path, data).unwrap();
    path
}

fn contents(data: Vec<u8>) -> Result<Contents, BootError> {
    let path = PathBuf::from("kernel");
    let format = classify(&path, &data)?;
    Ok(Contents { path, data: data.into(), format })
}

fn load(data: Vec<u8>, memory: &GuestMemory, config: &BootConfig) -> Result<Loaded, BootError> {
    contents(data)?.load(memory, config, &mut Constant(0x42))
}

fn bytes(memory: &GuestMemory, at: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn word(memory: &GuestMemory, at: u64) -> u32 {
    memory.read_obj(GuestAddress(at)).unwrap()
}

fn text(memory: &GuestMemory, at: u64) -> String {
    let bytes = bytes(memory, at, 256);
    String::from_utf8(bytes[..bytes.iter().position(|&b| b == 0).unwrap()].to_vec()).unwrap()
}

/// A relocatable 64-bit kernel of 4 sectors of setup and 64 bytes.
fn bzimage() -> Vec<u8> {
    let mut data = vec![0; 5 * 512];
    data[linux_words::SETUP_SECTS] = 4;
    data[linux_words::SYSSIZE] = 4;
    data[linux_words::BOOT_FLAG..][..2].copy_from_slice(&linux_words::BOOT_FLAG_MAGIC.to_le_bytes());
    data[linux_words::JUMP_OFFSET] = 0x6a;
    data[linux_words::HEADER..][..4].copy_from_slice(linux_words::HEADER_MAGIC);
    data[linux_words::VERSION..][..2].copy_from_slice(&0x20fu16.to_le_bytes());
    data[linux_words::LOADFLAGS] = linux_words::LOADED_HIGH;
    data[linux_words::CODE32_START..][..4].copy_from_slice(&0x10_0000u32.to_le_bytes());
    data[linux_words::INITRD_ADDR_MAX..][..4].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    data[linux_words::KERNEL_ALIGNMENT..][..4].copy_from_slice(&0x20_0000u32.to_le_bytes());
    data[linux_words::RELOCATABLE_KERNEL] = 1;
    data[linux_words::XLOADFLAGS] = linux_words::XLF_KERNEL_64 as u8;
    data[linux_words::CMDLINE_SIZE..][..4].copy_from_slice(&2047u32.to_le_bytes());
    data[linux_words::PREF_ADDRESS..][..8].copy_from_slice(&0x20_0000u64.to_le_bytes());
    data[linux_words::INIT_SIZE..][..4].copy_from_slice(&0x10_0000u32.to_le_bytes());
    data.extend_from_slice(&[0x5a; 64]);
    data
}

/// (type, flags, file bytes, virtual, physical, memory size) of a program header.
type Program<'a> = (u32, &'a [u8], u64, u64, u64);

fn elf64(entry: u64, programs: &[Program<'_>]) -> Vec<u8> {
    let mut data = b"\x7fELF\x02\x01\x01".to_vec();
    data.resize(16, 0);
    for half in [2u16, 62] {
        data.extend_from_slice(&half.to_le_bytes());
    }
    data.extend_from_slice(&1u32.to_le_bytes());
    for address in [entry, 64, 0] {
        data.extend_from_slice(&address.to_le_bytes());
    }
    data.extend_from_slice(&0u32.to_le_bytes());
    for half in [64, 56, programs.len() as u16, 64, 0, 0] {
        data.extend_from_slice(&half.to_le_bytes());
    }
    let mut offset = 64 + 56 * programs.len();
    for (kind, bytes, virtual_address, physical, size) in programs {
        data.extend_from_slice(&kind.to_le_bytes());
        data.extend_from_slice(&7u32.to_le_bytes());
        for value in [offset as u64, *virtual_address, *physical, bytes.len() as u64, *size, 4096] {
            data.extend_from_slice(&value.to_le_bytes());
        }
        offset += bytes.len();
    }
    for (_, bytes, ..) in programs {
        data.extend_from_slice(bytes);
    }
    data
}

/// The same in 32-bit form.
fn elf32(entry: u32, programs: &[Program<'_>]) -> Vec<u8> {
    let mut data = b"\x7fELF\x01\x01\x01".to_vec();
    data.resize(16, 0);
    for half in [2u16, 3] {
        data.extend_from_slice(&half.to_le_bytes());
    }
    for value in [1, entry, 52, 0, 0] {
        data.extend_from_slice(&value.to_le_bytes());
    }
    for half in [52, 32, programs.len() as u16, 40, 0, 0] {
        data.extend_from_slice(&half.to_le_bytes());
    }
    let mut offset = 52 + 32 * programs.len();
    for (kind, bytes, virtual_address, physical, size) in programs {
        let [virtual_address, physical, size] = [virtual_address, physical, size].map(|value| *value as u32);
        for value in [*kind, offset as u32, virtual_address, physical, bytes.len() as u32, size, 7, 4096] {
            data.extend_from_slice(&value.to_le_bytes());
        }
        offset += bytes.len();
    }
    for (_, bytes, ..) in programs {
        data.extend_from_slice(bytes);
    }
    data
}

fn note(name: &[u8], kind: u32, descriptor: &[u8]) -> Vec<u8> {
    let mut data = Vec::new();
    for value in [name.len() as u32 + 1, descriptor.len() as u32, kind] {
        data.extend_from_slice(&value.to_le_bytes());
    }
    data.extend_from_slice(name);
    data.push(0);
    data.resize(data.len().next_multiple_of(4), 0);
    data.extend_from_slice(descriptor);
    data
}

fn multiboot_header(flags: u32) -> Vec<u8> {
    let magic = multiboot_words::HEADER_MAGIC;
    [magic, flags, 0u32.wrapping_sub(magic.wrapping_add(flags))].iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn multiboot_elf() -> Vec<u8> {
    elf64(0xffff_ffff_8020_0010, &[(1, &[multiboot_header(3), vec![0xaa; 20]].concat(), 0xffff_ffff_8020_0000, 0x20_0000, 0x5000)])
}

fn multiboot_flat() -> Vec<u8> {
    let mut data = vec![0x90; 64];
    data.extend_from_slice(&multiboot_header(multiboot_words::HEADER_ADDRESSES));
    for address in [0x20_0040u32, 0x20_0000, 0, 0x20_2000, 0x20_0004] {
        data.extend_from_slice(&address.to_le_bytes());
    }
    data.extend_from_slice(&[0xbb; 32]);
    data
}

fn pvh_elf() -> Vec<u8> {
    let note = note(pvh_words::NOTE_NAME, pvh_words::NOTE_PHYS32_ENTRY, &0x20_0020u64.to_le_bytes());
    elf64(0xffff_ffff_8100_0000, &[(1, &[0xcc; 64], 0xffff_ffff_8100_0000, 0x20_0000, 0x3000), (4, &note, 0, 0, 0)])
}

fn openbsd_elf() -> Vec<u8> {
    let note = note(openbsd_words::NOTE_NAME, 1, &[0; 4]);
    elf64(
        0xffff_ffff_8100_1000,
        &[
            (1, &[0xcc; 64], 0xffff_ffff_8100_1000, 0x20_1000, 0x3000),
            (openbsd_words::PT_OPENBSD_RANDOMIZE, &[0; 32], 0xffff_ffff_8100_1010, 0x20_1010, 32),
            (4, &note, 0, 0, 0),
        ],
    )
}

fn bios() -> Vec<u8> {
    let mut data = vec![0; 0x4_0000];
    data[0x3_fff0] = 0xea;
    data[0x2_0000] = 0x77;
    data[0] = 0x66;
    data
}

#[test]
fn linux_starts_at_its_64_bit_entry_with_zero_page_and_ramdisks() {
    let directory = TempDir::new().unwrap();
    let (memory, mut config) = machine(16 * MIB, 0);
    config.cmdline = "console=ttyS0".into();
    config.modules = [("a", &b"hello"[..]), ("b", &b"world"[..])]
        .map(|(name, data)| Module { path: write(&directory, name, data), args: String::new() })
        .to_vec();
    let loaded = load(bzimage(), &memory, &config).unwrap();
    let registers = loaded.registers;
    assert_eq!(registers.rip, 0x20_0200);
    assert_eq!((registers.cr0, registers.cr4, registers.efer), (0x8000_0011, 0x20, 0x500));
    assert_eq!((registers.cs.selector, registers.cs.access, registers.ds.selector), (0x10, 0xa09b, 0x18));
    assert_eq!(bytes(&memory, 0x20_0000, 64), [0x5a; 64]);

    let page = registers.gpr[RSI];
    assert_eq!(word(&memory, page + linux_words::HEADER as u64), u32::from_le_bytes(*b"HdrS"));
    assert_eq!(text(&memory, word(&memory, page + linux_words::CMD_LINE_PTR as u64).into()), "console=ttyS0");
    assert_eq!(word(&memory, page + linux_words::ACPI_RSDP_ADDR as u64), 0xe_0000);
    assert_eq!(bytes(&memory, page + linux_words::E820_ENTRIES as u64, 1), [3]);
    let ramdisk = u64::from(word(&memory, page + linux_words::RAMDISK_IMAGE as u64));
    assert_eq!(word(&memory, page + linux_words::RAMDISK_SIZE as u64), 16);
    assert_eq!(ramdisk, 16 * MIB - 4096);
    assert_eq!(bytes(&memory, ramdisk, 16), *b"hello\0\0\0world\0\0\0");

    // The page tables map an address of the last gigabyte to itself.
    let address = 0xfee0_0000u64;
    let mut table = registers.cr3;
    for shift in [39, 30, 21] {
        let entry: u64 = memory.read_obj(GuestAddress(table + (address >> shift & 511) * 8)).unwrap();
        assert_eq!(entry & 3, 3);
        table = entry & !0xfff;
    }
    assert_eq!(table, address);
}

#[test]
fn linux_without_a_64_bit_entry_starts_in_protected_mode() {
    let (memory, config) = machine(16 * MIB, 0);
    let mut data = bzimage();
    data[linux_words::XLOADFLAGS] = 0;
    let registers = load(data, &memory, &config).unwrap().registers;
    assert_eq!((registers.rip, registers.cr0, registers.efer), (0x20_0000, 0x11, 0));
    assert_eq!((registers.cs.access, registers.cs.limit), (0xc09b, u32::MAX));
}

#[test]
fn linux_kernel_that_needs_more_memory_says_how_much() {
    let (memory, config) = machine(2 * MIB, 0);
    let error = load(bzimage(), &memory, &config).unwrap_err().to_string();
    assert!(error.contains("0x200000 to 0x300000") && error.contains("--memory"), "{error}");
}

#[test]
fn ramdisk_larger_than_memory_is_refused() {
    let directory = TempDir::new().unwrap();
    let (memory, mut config) = machine(4 * MIB, 0);
    config.modules = vec![Module { path: write(&directory, "big", &vec![0; 3 << 20]), args: String::new() }];
    let error = load(bzimage(), &memory, &config).unwrap_err().to_string();
    assert!(error.contains("initial ramdisk"), "{error}");
}

#[test]
fn command_line_longer_than_the_kernel_reads_is_refused() {
    let (memory, mut config) = machine(16 * MIB, 0);
    config.cmdline = "x".repeat(3000);
    let error = load(bzimage(), &memory, &config).unwrap_err();
    assert!(matches!(error, BootError::CommandLine { length: 3000, max: 2047 }), "{error}");
}

#[test]
fn truncated_bzimage_is_named_so() {
    let mut data = bzimage();
    data.truncate(data.len() - 32);
    let error = contents(data).unwrap_err();
    assert!(matches!(error, BootError::Truncated { need: 2624, have: 2592, .. }), "{error}");
}

#[test]
fn multiboot_elf_gets_its_modules_and_memory_map() {
    let directory = TempDir::new().unwrap();
    let (memory, mut config) = machine(16 * MIB, 0);
    config.cmdline = "one two".into();
    config.modules = vec![Module { path: write(&directory, "m", b"contents"), args: "first".into() }];
    let loaded = load(multiboot_elf(), &memory, &config).unwrap();
    let registers = loaded.registers;
    assert_eq!((registers.rip, registers.gpr[RAX]), (0x20_0010, 0x2bad_b002));
    let mut info = multiboot_words::Info::new_zeroed();
    memory.read_slice(info.as_mut_bytes(), GuestAddress(registers.gpr[RBX])).unwrap();
    assert_eq!((info.mem_lower.get(), info.mem_upper.get()), (639, 15 * 1024));
    assert_eq!(text(&memory, info.cmdline.get().into()), "kernel one two");
    assert_eq!(text(&memory, info.boot_loader_name.get().into()), "pvbus");
    let module = multiboot_words::Module::read_from_bytes(&bytes(&memory, info.mods_addr.get().into(), 16)).unwrap();
    assert_eq!(module.mod_start.get(), 0x20_5000);
    assert_eq!(bytes(&memory, module.mod_start.get().into(), 8), b"contents");
    assert!(text(&memory, module.string.get().into()).ends_with("/m first"));
    let map = bytes(&memory, info.mmap_addr.get().into(), info.mmap_length.get() as usize);
    let last = multiboot_words::MemoryMapEntry::read_from_bytes(&map[map.len() - 24..]).unwrap();
    assert_eq!(({ last.base }.get(), { last.length }.get(), { last.kind }.get()), (MIB, 15 * MIB, 1));
}

/// What kvm-unit-tests builds: ELF32, header without flags, loaded at 4 MiB.
#[test]
fn elf32_multiboot_kernel_without_modules_starts() {
    let (memory, mut config) = machine(16 * MIB, 0);
    config.cmdline = "-smp 2".into();
    let data = elf32(0x40_000c, &[(1, &[multiboot_header(0), vec![0xf4; 16]].concat(), 0x40_0000, 0x40_0000, 0x2000)]);
    let registers = load(data, &memory, &config).unwrap().registers;
    assert_eq!((registers.rip, registers.gpr[RAX]), (0x40_000c, 0x2bad_b002));
    assert_eq!(bytes(&memory, 0x40_000c, 16), [0xf4; 16]);
    let mut info = multiboot_words::Info::new_zeroed();
    memory.read_slice(info.as_mut_bytes(), GuestAddress(registers.gpr[RBX])).unwrap();
    assert_eq!(info.mods_count.get(), 0);
    assert_eq!(text(&memory, info.cmdline.get().into()), "kernel -smp 2");
}

#[test]
fn multiboot_kernel_with_addresses_in_its_header_is_loaded_flat() {
    let (memory, config) = machine(16 * MIB, 0);
    memory.write_slice(&[0xff; 16], GuestAddress(0x20_1ff0)).unwrap();
    let registers = load(multiboot_flat(), &memory, &config).unwrap().registers;
    assert_eq!(registers.rip, 0x20_0004);
    assert_eq!(bytes(&memory, 0x20_0060, 32), [0xbb; 32]);
    assert_eq!(bytes(&memory, 0x20_1ff0, 16), [0; 16], "what follows the file is zeroed");
}

#[test]
fn pvh_kernel_finds_start_info() {
    let directory = TempDir::new().unwrap();
    let (memory, mut config) = machine(16 * MIB, 0);
    config.cmdline = "hello".into();
    config.modules = vec![Module { path: write(&directory, "m", b"contents"), args: "first".into() }];
    let registers = load(pvh_elf(), &memory, &config).unwrap().registers;
    assert_eq!((registers.rip, registers.cr0), (0x20_0020, 0x11));
    let info = pvh_words::StartInfo::read_from_bytes(&bytes(&memory, registers.gpr[RBX], 56)).unwrap();
    assert_eq!((info.magic.get(), info.version.get(), info.nr_modules.get()), (0x336e_c578, 1, 1));
    assert_eq!(text(&memory, info.cmdline_paddr.get()), "hello");
    assert_eq!(info.rsdp_paddr.get(), 0xe_0000);
    let module = pvh_words::Module::read_from_bytes(&bytes(&memory, info.modlist_paddr.get(), 32)).unwrap();
    assert_eq!(bytes(&memory, module.paddr.get(), 8), b"contents");
    assert_eq!(text(&memory, module.cmdline_paddr.get()), "first");
    let map = pvh_words::MemmapEntry::read_from_bytes(&bytes(&memory, info.memmap_paddr.get(), 24)).unwrap();
    assert_eq!((map.addr.get(), map.size.get(), map.kind.get()), (0, 0x9_fc00, 1));
    assert_eq!(info.memmap_entries.get(), 3);
}

#[test]
fn image_that_is_part_of_the_program_boots_like_a_file() {
    let (memory, config) = machine(16 * MIB, 0);
    let image = recognise_bytes("built in", pvh_elf().leak()).unwrap();
    assert_eq!((image.format(), image.rom_size()), ("ELF kernel with PVH entry", 0));
    assert_eq!(super::load(&image, &memory, &config, &mut Constant(0)).unwrap().registers.rip, 0x20_0020);
    assert!(recognise_bytes("built in", b"text").unwrap_err().to_string().starts_with("built in: a text file"));
}

#[test]
fn openbsd_kernel_finds_its_arguments_on_the_stack() {
    let (memory, mut config) = machine(16 * MIB, 0);
    config.cmdline = "-s -d".into();
    let registers = load(openbsd_elf(), &memory, &config).unwrap().registers;
    assert_eq!(registers.rip, 0x100_1000);
    assert_eq!((registers.cs.selector, registers.ds.selector, registers.gdtr.base), (8, 0x10, 0x1_0000));
    let stack = registers.gpr[RSP];
    assert_eq!(stack + 36, 0x1_0000);
    assert_eq!(word(&memory, stack + 4), openbsd_words::RB_SINGLE | openbsd_words::RB_KDB);
    assert_eq!(word(&memory, stack + 12), 0x0e);
    assert_eq!(word(&memory, stack + 32), 0x2000);
    // Memory map of two ranges and an end, console, end.
    assert_eq!(word(&memory, stack + 28), (12 + 3 * 20) + (12 + 32) + 4);
    assert_eq!([0, 4, 8].map(|o| word(&memory, 0x2000 + o)), [0, 72, 72]);
    assert_eq!(word(&memory, 0x2000 + 72), openbsd_words::BOOTARG_CONSDEV);
    assert_eq!(bytes(&memory, 0x20_1010, 32), [0x42; 32], "random bytes were filled in");
    assert_eq!(bytes(&memory, 0x20_1000, 16), [0xcc; 16]);
}

#[test]
fn openbsd_kernel_finds_its_symbols_after_it() {
    let mut data = openbsd_elf();
    let (symbols, strings) = (data.len() as u64, data.len() as u64 + 24);
    data.extend_from_slice(&[0x11; 24]);
    data.extend_from_slice(b"\0main\0");
    let sections = data.len() as u64;
    for (kind, offset, size) in [(0u32, 0, 0), (2, symbols, 24u64), (3, strings, 6)] {
        data.extend_from_slice(&[0; 4]);
        data.extend_from_slice(&kind.to_le_bytes());
        for value in [0, 0, offset, size, 0, 0, 0] {
            data.extend_from_slice(&value.to_le_bytes());
        }
    }
    data[40..48].copy_from_slice(&sections.to_le_bytes());
    data[60] = 3;

    let (memory, config) = machine(16 * MIB, 0);
    let registers = load(data, &memory, &config).unwrap().registers;
    // The kernel ends at 0x204000; ELF header, section headers, symbols, strings follow.
    let start = 0x20_4000;
    let header = bytes(&memory, start, 64);
    assert_eq!((&header[..4], u64_at(&header, 40), u64_at(&header, 32)), (&b"\x7fELF"[..], Some(64), Some(0)));
    let offset = |section: u64| memory.read_obj::<u64>(GuestAddress(start + 64 + section * 64 + 24)).unwrap();
    assert_eq!((offset(1), offset(2)), (64 + 3 * 64, 64 + 3 * 64 + 24));
    assert_eq!(bytes(&memory, start + offset(1), 24), [0x11; 24]);
    assert_eq!(bytes(&memory, start + offset(2), 6), *b"\0main\0");
    let end = word(&memory, registers.gpr[RSP] + 16);
    assert_eq!(u64::from(end), start + offset(2) + 8);
}

#[test]
fn openbsd_kernel_takes_only_its_own_options() {
    let directory = TempDir::new().unwrap();
    let (memory, config) = machine(16 * MIB, 0);
    let with_text = BootConfig { cmdline: "console=ttyS0".into(), ..config.clone() };
    let module = Module { path: write(&directory, "m", b"contents"), args: String::new() };
    let with_module = BootConfig { modules: vec![module], ..config };
    for config in [with_text, with_module] {
        let error = load(openbsd_elf(), &memory, &config).unwrap_err();
        assert!(matches!(error, BootError::NotTaken { .. }), "{error}");
    }
}

#[test]
fn bios_is_at_the_top_of_4_gib_and_below_1_mib() {
    let directory = TempDir::new().unwrap();
    let image = recognise(&write(&directory, "bios", &bios())).unwrap();
    let (memory, mut config) = machine(16 * MIB, image.rom_size());
    let loaded = super::load(&image, &memory, &config, &mut std::io::empty()).unwrap();
    assert_eq!(loaded.registers, Registers::reset());
    assert_eq!(bytes(&memory, 0xffff_fff0, 1), [0xea]);
    assert_eq!(bytes(&memory, 0xf_fff0, 1), [0xea]);
    assert_eq!(bytes(&memory, 0xe_0000, 1), [0x77]);
    assert_eq!(bytes(&memory, 0xc_0000, 1), [0x66]);
    config.cmdline = "x".into();
    assert!(matches!(load(bios(), &memory, &config), Err(BootError::NotTaken { .. })));
}

#[test]
fn files_that_do_not_boot_are_named_for_what_they_are() {
    let directory = TempDir::new().unwrap();
    let mut arm = elf64(0, &[]);
    arm[18] = 183;
    let mut sparc = elf64(0, &[]);
    (sparc[5], sparc[18], sparc[19]) = (2, 0, 43);
    let cases: [(&[u8], &str); 8] = [
        (b"Dear kernel,\n", "a text file"),
        (b"", "an empty file"),
        (b"\x1f\x8b\x08\0", "gunzip"),
        (&arm, "AArch64"),
        (&sparc, "SPARC"),
        (&elf64(0, &[]), "neither PVH note"),
        (b"QFI\xfb\0\0\0\x03", "--disk"),
        (b"\x01\x02\x03\0\xff", "no known format"),
    ];
    for (data, expected) in cases {
        let error = recognise(&write(&directory, "f", data)).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(FORMATS), "{error}");
    }
    let error = recognise(directory.path()).unwrap_err().to_string();
    assert!(error.contains("a directory") && error.contains(FORMATS), "{error}");
    let error = recognise(&directory.path().join("absent")).unwrap_err().to_string();
    assert!(error.contains("No such file"), "{error}");
}

#[test]
fn kernel_over_the_zero_page_is_refused() {
    let (memory, config) = machine(16 * MIB, 0);
    let note = note(pvh_words::NOTE_NAME, pvh_words::NOTE_PHYS32_ENTRY, &0x7000u32.to_le_bytes());
    let data = elf64(0x7000, &[(1, &[0xcc; 64], 0x7000, 0x7000, 64), (4, &note, 0, 0, 0)]);
    let error = load(data, &memory, &config).unwrap_err();
    assert!(matches!(error, BootError::Overlap { .. }), "{error}");
}

#[test]
fn memory_beyond_3_gib_moves_above_4_gib() {
    const GIB: u64 = 1 << 30;
    assert_eq!(layout(4 * GIB, 0x4_0000), [(0, 0xa_0000), (0xc_0000, 3 * GIB - 0xc_0000), (0xfffc_0000, 0x4_0000), (4 * GIB, GIB)]);
    assert_eq!(e820(4 * GIB).last(), Some(&E820Range { start: 4 * GIB, size: GIB, kind: abi::boot::E820_RAM }));
    assert_eq!(layout(512 * MIB, 0), [(0, 0xa_0000), (0xc_0000, 512 * MIB - 0xc_0000)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Damage of any kind ends in a loaded machine or an error, never in a panic, and never in writes outside RAM (which would fail).
    #[test]
    fn damaged_images_never_panic(
        which in 0usize..7,
        damage in prop::collection::vec((0usize..2700, prop_oneof![Just(0u8), Just(0xff), Just(0x7f), any::<u8>()]), 1..12),
        cut in prop::option::of(0usize..2700),
    ) {
        let mut data = match which {
            0 => bzimage(),
            1 => multiboot_elf(),
            2 => multiboot_flat(),
            3 => pvh_elf(),
            4 => openbsd_elf(),
            5 => elf32(0x40_000c, &[(1, &multiboot_header(0), 0x40_0000, 0x40_0000, 0x2000)]),
            _ => bios(),
        };
        // Most offsets fall into the headers, where damage matters.
        let length = data.len().min(2700);
        for (at, value) in damage {
            data[at % length] = value;
        }
        if let Some(cut) = cut {
            data.truncate(cut);
        }
        let (memory, config) = machine(8 * MIB, if which == 6 { data.len() as u64 } else { 0 });
        if let Ok(contents) = contents(data) {
            let _ = contents.load(&memory, &config, &mut Constant(1));
        }
    }
}
