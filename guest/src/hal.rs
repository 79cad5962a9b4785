//! This kernel's powers, lent to pvbus.
//!
//! Calls to a hypervisor carry general registers both ways, and the compiler keeps two of those for itself. So each instruction
//! that calls gets a function that loads them from memory and stores them back, with a fix-up: a port is always there, but a
//! processor raises #UD on the hypercall of another maker.
#![allow(unsafe_code)] // Instructions that may do anything.

use core::arch::asm;
use core::sync::atomic::AtomicU32;

use logic::pages::PAGE_SIZE;
use pvbus::hal::{Cpuid, Dma, Gate, Hal, HalError, Nanos, Registers, Transfer, Width, WordCopy};

use crate::{cpu, interrupts, memory, time};

/// Words of a page.
const PAGE_WORDS: usize = PAGE_SIZE as usize / size_of::<u32>();

/// The kernel, for pvbus.
pub struct Kernel;
/// There is one.
pub static KERNEL: Kernel = Kernel;

/// RAX, RBX, RCX, RDX, RSI, RDI, RBP.
type Block = [u64; 7];

/// Defines a function that executes one instruction with the registers of a block; it says whether the processor did.
macro_rules! gate {
    ($name:ident, $instruction:literal) => {
        /// # Safety
        /// What the host does for the instruction with these registers must leave alone what is not meant for it.
        unsafe fn $name(block: &mut Block) -> bool {
            let fault: u32;
            // SAFETY: the caller's promise. The stack holds what the compiler keeps and, below it, where the block is.
            unsafe {
                asm!(
                    "push rbx", "push rbp", "push r8",
                    "mov rax, [r8]", "mov rbx, [r8 + 8]", "mov rcx, [r8 + 16]", "mov rdx, [r8 + 24]",
                    "mov rsi, [r8 + 32]", "mov rdi, [r8 + 40]", "mov rbp, [r8 + 48]",
                    "mov r9d, 1", concat!("2: ", $instruction), "xor r9d, r9d", "3:",
                    "xchg [rsp], rax",
                    "mov [rax + 8], rbx", "mov [rax + 16], rcx", "mov [rax + 24], rdx",
                    "mov [rax + 32], rsi", "mov [rax + 40], rdi", "mov [rax + 48], rbp",
                    "pop qword ptr [rax]", "pop rbp", "pop rbx",
                    ".pushsection .fixups, \"a\"", ".quad 2b, 3b", ".popsection",
                    inout("r8") block.as_mut_ptr() => _, out("r9") fault,
                    out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _, out("r10") _, out("r11") _,
                );
            }
            fault == 0
        }
    };
}

gate!(input, "in eax, dx");
gate!(output, "out dx, eax");
gate!(input_bytes, "rep insb");
gate!(output_bytes, "rep outsb");
gate!(vmcall, "vmcall");
gate!(vmmcall, "vmmcall");

/// Calls the code at `address` with the registers of a block, and R8 zero.
///
/// # Safety
/// As of a gate; the code keeps the stack and what a function keeps.
unsafe fn code(block: &mut Block, address: u64) {
    // SAFETY: the caller's promise. The stack holds what the compiler keeps and, below it, where the block is.
    unsafe {
        asm!(
            "push rbx", "push rbp", "push r8",
            "mov rax, [r8]", "mov rbx, [r8 + 8]", "mov rcx, [r8 + 16]", "mov rdx, [r8 + 24]",
            "mov rsi, [r8 + 32]", "mov rdi, [r8 + 40]", "mov rbp, [r8 + 48]",
            "xor r8d, r8d", "call r9",
            "xchg [rsp], rax",
            "mov [rax + 8], rbx", "mov [rax + 16], rcx", "mov [rax + 24], rdx",
            "mov [rax + 32], rsi", "mov [rax + 40], rdi", "mov [rax + 48], rbp",
            "pop qword ptr [rax]", "pop rbp", "pop rbx",
            inout("r8") block.as_mut_ptr() => _, inout("r9") address => _,
            out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _, out("r10") _, out("r11") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
        );
    }
}

/// Memory that a host sees is copied by an instruction, as all memory is here (`runtime.rs`); a software processor does a page of it at once.
const COPY: WordCopy = WordCopy {
    load: |from, to| {
        let count = size_of_val(from).min(size_of_val(to));
        // SAFETY: so many bytes are in both, and `to` is borrowed for this alone. That the others may change meanwhile is why they are atomics.
        unsafe { copy(from.as_ptr().cast(), to.as_mut_ptr().cast(), count) };
    },
    store: |from, to| {
        let count = size_of_val(from).min(size_of_val(to));
        // SAFETY: so many bytes are in both. Atomics are written by a shared reference, and while others read them.
        unsafe { copy(from.as_ptr().cast(), to.as_ptr().cast_mut().cast(), count) };
    },
};

/// `memcpy` for memory that a host reads or writes meanwhile. The compiler knows that one by its name, and may read twice what it thinks nobody
/// writes to; it does not look into this one.
///
/// # Safety
/// `count` bytes at each pointer, apart from each other; this program neither writes what is read here meanwhile nor accesses what is written.
unsafe fn copy(from: *const u8, to: *mut u8, count: usize) {
    // SAFETY: the caller's promise.
    unsafe { asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags)) };
}

impl Hal for Kernel {
    fn cpuid(&self, leaf: u32, subleaf: u32) -> Cpuid {
        let answer = cpu::cpuid(leaf, subleaf);
        Cpuid { eax: answer.eax, ebx: answer.ebx, ecx: answer.ecx, edx: answer.edx }
    }

    fn now(&self) -> Nanos {
        time::now()
    }

    fn wait_until(&self, deadline: Nanos) {
        interrupts::doze(deadline);
    }

    fn call(&self, gate: Gate, registers: &mut Registers, mut transfer: Transfer<'_>) -> Result<(), HalError> {
        match &mut transfer {
            Transfer::None => {}
            Transfer::Out(bytes) => (registers.rsi, registers.rcx) = (bytes.as_ptr().expose_provenance() as u64, bytes.len() as u64),
            Transfer::In(bytes) => (registers.rdi, registers.rcx) = (bytes.as_mut_ptr().expose_provenance() as u64, bytes.len() as u64),
            Transfer::Exchange(bytes) => registers.rsi = bytes.as_mut_ptr().expose_provenance() as u64,
        }
        let Registers { rax, rbx, rcx, rdx, rsi, rdi, rbp } = *registers;
        let mut block = [rax, rbx, rcx, rdx, rsi, rdi, rbp];
        // SAFETY: the library calls hosts by their protocols, in which they write to a transfer's buffer and nowhere else.
        let done = unsafe {
            match (gate, transfer) {
                (Gate::In, Transfer::None) => input(&mut block),
                (Gate::Out, Transfer::None) => output(&mut block),
                (Gate::In | Gate::Out, Transfer::In(_)) => input_bytes(&mut block),
                (Gate::In | Gate::Out, Transfer::Out(_)) => output_bytes(&mut block),
                (Gate::In | Gate::Out, Transfer::Exchange(_)) => return Err(HalError::Unavailable),
                (Gate::Vmcall, _) => vmcall(&mut block),
                (Gate::Vmmcall, _) => vmmcall(&mut block),
            }
        };
        let [rax, rbx, rcx, rdx, rsi, rdi, rbp] = block;
        *registers = Registers { rax, rbx, rcx, rdx, rsi, rdi, rbp };
        if done { Ok(()) } else { Err(HalError::Fault) }
    }

    fn call_code(&self, gpa: u64, registers: &mut Registers) -> Result<(), HalError> {
        let Registers { rax, rbx, rcx, rdx, rsi, rdi, rbp } = *registers;
        let mut block = [rax, rbx, rcx, rdx, rsi, rdi, rbp];
        // SAFETY: addresses are physical ones, and the page has a hypervisor's code, which does what its registers say.
        unsafe { code(&mut block, gpa) };
        let [rax, rbx, rcx, rdx, rsi, rdi, rbp] = block;
        *registers = Registers { rax, rbx, rcx, rdx, rsi, rdi, rbp };
        Ok(())
    }

    fn read_msr(&self, index: u32) -> Result<u64, HalError> {
        cpu::rdmsr(index).map_err(|_| HalError::Fault)
    }

    fn write_msr(&self, index: u32, value: u64) -> Result<(), HalError> {
        // SAFETY: the library writes hypervisors' registers, and gives them pages from `dma_alloc` only.
        unsafe { cpu::wrmsr(index, value) }.map_err(|_| HalError::Fault)
    }

    fn port_in(&self, port: u16, width: Width) -> Result<u32, HalError> {
        Ok(match width {
            Width::U8 => cpu::inb(port).into(),
            Width::U16 => cpu::inw(port).into(),
            Width::U32 => cpu::inl(port),
        })
    }

    fn port_out(&self, port: u16, width: Width, value: u32) -> Result<(), HalError> {
        // SAFETY: the library's drivers give devices pages from `dma_alloc` only.
        unsafe {
            match width {
                Width::U8 => cpu::outb(port, value as u8),
                Width::U16 => cpu::outw(port, value as u16),
                Width::U32 => cpu::outl(port, value),
            }
        }
        Ok(())
    }

    fn dma_alloc(&self, pages: usize) -> Result<Dma, HalError> {
        let start = memory::take_pages(pages).ok_or(HalError::Unavailable)?;
        // SAFETY: the pages are ours, zero, aligned, and stay until `dma_free` gets them back.
        let words = unsafe { core::slice::from_raw_parts(start.cast::<AtomicU32>().as_ptr(), pages * PAGE_WORDS) };
        Ok(Dma::new(start.addr().get() as u64, words).copied_by(COPY))
    }

    fn dma_free(&self, dma: Dma) {
        let words = dma.into_words();
        // SAFETY: they are from `dma_alloc`, and `Dma` was the only reference.
        unsafe { memory::give_pages(words.into(), words.len() / PAGE_WORDS) };
    }

    fn map(&self, gpa: u64, pages: usize) -> Result<Dma, HalError> {
        let start = memory::host_pages(gpa, pages).ok_or(HalError::Unavailable)?;
        // SAFETY: mapped for ever, and accessed by atomics only: the library asks for it once, and the host knows that it is shared.
        let words = unsafe { core::slice::from_raw_parts(start.cast::<AtomicU32>().as_ptr(), pages * PAGE_WORDS) };
        Ok(Dma::new(gpa, words))
    }

    fn upcall_vector(&self) -> Option<u8> {
        Some(interrupts::UPCALL)
    }

    fn tsc(&self) -> Result<u64, HalError> {
        // SAFETY: waits for what comes before it.
        unsafe { core::arch::x86_64::_mm_lfence() };
        Ok(cpu::tsc())
    }
}
