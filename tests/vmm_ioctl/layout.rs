//! A guest of a few instructions in 64-bit ring 0: where its parts are, its tables, its registers.

// The programs that share this take what they need of it.
#![allow(dead_code)]

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use vm_memory::{Bytes, GuestAddress};
use vmm::{GuestMemory, Registers, Segment};
use zerocopy::FromBytes;

/// Guest physical memory.
pub const MEMORY: u64 = 0x20_0000;
/// Where things are: page tables (six pages), code, interrupt descriptors, handlers, data, stack.
pub const TABLES: u64 = 0x1000;
pub const CODE: u64 = 0x1_0000;
pub const IDT: u64 = 0x1_1000;
pub const HANDLER: u64 = 0x1_2000;
pub const DATA: u64 = 0x1_4000;
pub const STACK: u64 = 0x2_0000;
/// An address with neither memory nor anything else.
pub const NOWHERE: u64 = 0x4000_0000;
/// Selector of the code segment in the guest's descriptor table at `GDT`.
pub const GDT: u64 = 0x8000;
pub const CODE_SELECTOR: u16 = 8;

pub fn assemble(bitness: u32, at: u64, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Result<Vec<u8>, String> {
    let mut assembler = CodeAssembler::new(bitness).map_err(text)?;
    code(&mut assembler).map_err(text)?;
    assembler.assemble(at).map_err(text)
}

pub fn write(memory: &GuestMemory, gpa: u64, bytes: &[u8]) -> Result<(), String> {
    memory.write_slice(bytes, GuestAddress(gpa)).map_err(text)
}

/// Page tables that map 4 GiB to itself in 2 MiB pages, and a descriptor table.
pub fn lay_out(memory: &GuestMemory) -> Result<(), String> {
    const WRITABLE: u64 = 3;
    const LARGE: u64 = 0x80;
    write(memory, TABLES, &(TABLES + 0x1000 + WRITABLE).to_le_bytes())?;
    for directory in 0..4u64 {
        let at = TABLES + 0x2000 + directory * 0x1000;
        write(memory, TABLES + 0x1000 + directory * 8, &(at + WRITABLE).to_le_bytes())?;
        for page in 0..512u64 {
            write(memory, at + page * 8, &((directory << 30) + (page << 21) + LARGE + WRITABLE).to_le_bytes())?;
        }
    }
    for (index, descriptor) in [0u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff].iter().enumerate() {
        write(memory, GDT + index as u64 * 8, &descriptor.to_le_bytes())?;
    }
    Ok(())
}

/// 64-bit ring 0 at `rip`, interrupts off.
pub fn long_mode(rip: u64) -> Registers {
    let data = Segment { selector: 0x10, limit: u32::MAX, access: 0xc093, base: 0 };
    let mut registers = Registers {
        rip,
        cr0: 0x8000_0033,
        cr3: TABLES,
        cr4: 0x620,
        efer: 0x500,
        cs: Segment { selector: CODE_SELECTOR, limit: u32::MAX, access: 0xa09b, base: 0 },
        ss: data,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        gdtr: vmm::DescriptorTable { base: GDT, limit: 23 },
        idtr: vmm::DescriptorTable { base: IDT, limit: 0xfff },
        // What KVM starts with; QEMU's AMD processor has no other bits.
        misc_enable: 1,
        ..Registers::reset()
    };
    registers.gpr[vmm::registers::RSP] = STACK;
    registers
}

pub fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, wanted: T) -> Result<(), String> {
    if found == wanted { Ok(()) } else { Err(format!("{what}: found {found:x?}, wanted {wanted:x?}")) }
}

/// The time a guest with this TSC reads from pvclock's page (kernel: arch/x86/include/asm/pvclock.h).
pub fn pvclock_time(memory: &vmm::GuestMemory, gpa: u64, tsc: u64) -> Result<u64, String> {
    let mut bytes = [0; size_of::<abi::kvm::PvclockVcpuTimeInfo>()];
    vm_memory::Bytes::read_slice(memory.as_ref(), &mut bytes, vm_memory::GuestAddress(gpa)).map_err(text)?;
    let page = abi::kvm::PvclockVcpuTimeInfo::read_from_bytes(&bytes).map_err(text)?;
    if page.version.get() == 0 || page.version.get() % 2 != 0 {
        return Err(format!("pvclock's version is {}", page.version.get()));
    }
    let ticks = tsc.wrapping_sub(page.tsc_timestamp.get());
    let shift = page.tsc_shift;
    let ticks = if shift < 0 { ticks >> shift.unsigned_abs() } else { ticks << shift };
    let nanoseconds = (u128::from(ticks) * u128::from(page.tsc_to_system_mul.get())) >> 32;
    u64::try_from(nanoseconds).map_err(text).map(|n| n + page.system_time.get())
}
