//! From the loader's hands to Rust: the PVH entry.
//!
//! Xen `docs/misc/pvh.pandoc` and `include/public/elfnote.h`: an ELF note of type `XEN_ELFNOTE_PHYS32_ENTRY` names an entry that is
//! called in flat 32-bit protected mode, paging off, with the address of the start info in EBX. The trampoline maps the first
//! 4 GiB to themselves in pages of 2 MiB, turns on SSE (`core` was compiled with it), goes to long mode and calls
//! [`kernel_main`](crate::kernel_main) on the boot stack. The loader has zeroed `.bss`, where tables and stack are.
#![allow(unsafe_code)] // The symbols of the assembly.

use core::arch::global_asm;

use abi::boot::pvh::NOTE_PHYS32_ENTRY;

/// Selector of the 64-bit code segment.
pub const CODE: u16 = 8;
/// Selector of the data segment.
const DATA: u16 = 0x10;
/// Selector of the task state segment, whose descriptor [`crate::interrupts`] fills in.
pub const TASK: u16 = 0x18;

unsafe extern "C" {
    /// Global descriptor table: null, code, data, and the two halves of the task state segment's descriptor.
    pub static mut boot_gdt: [u64; 5];
    /// Page directory pointer table of the first 512 GiB; the trampoline fills in the first four entries.
    pub static mut boot_pdpt: [u64; 512];
}

global_asm!(
    // The note: sizes of name and descriptor, type, name, descriptor. Eight bytes of it, because QEMU reads that many from
    // 64-bit files.
    r#"
    .pushsection .note.pvh, "a", @note
    .balign 4
    .long 4, 8, {note}
    .asciz "Xen"
    .quad pvh_start
    .popsection

    .pushsection .bss
    .balign 4096
boot_page_directories:
    .skip 4 * 4096
    .global boot_pdpt
boot_pdpt:
    .skip 4096
boot_pml4:
    .skip 4096
boot_stack:
    .skip 128 * 1024
boot_stack_end:
    .popsection

    .pushsection .data
    .balign 16
    .global boot_gdt
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0, 0
boot_gdt_end:
boot_gdt_pointer:
    .word boot_gdt_end - boot_gdt - 1
    .quad boot_gdt
    .popsection

    .pushsection .text.boot, "ax"
    .code32
    .global pvh_start
pvh_start:
    cld
    mov esp, offset boot_stack_end

    // Entries are present and writable; 0x80 makes a directory's entry a page. Their upper halves are zero.
    mov edi, offset boot_page_directories
    mov eax, 0x83
    mov ecx, 4 * 512
2:  mov [edi], eax
    add edi, 8
    add eax, 0x200000
    dec ecx
    jnz 2b
    mov edi, offset boot_pdpt
    mov eax, offset boot_page_directories + 3
    mov ecx, 4
3:  mov [edi], eax
    add edi, 8
    add eax, 4096
    dec ecx
    jnz 3b
    mov edi, offset boot_pml4
    mov eax, offset boot_pdpt + 3
    mov [edi], eax
    mov cr3, edi

    // CR4: PAE, OSFXSR, OSXMMEXCPT. EFER: LME. CR0: caches and SSE on (CD, NW, TS, EM off); PG, WP, NE, MP, PE.
    mov eax, cr4
    or eax, 0x620
    mov cr4, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffff3
    or eax, 0x80010023
    mov cr0, eax

    lgdt [boot_gdt_pointer]
    mov eax, offset long_mode
    push {code}
    push eax
    retf

    .code64
long_mode:
    mov eax, {data}
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov esp, offset boot_stack_end
    mov edi, ebx
    xor ebp, ebp
    call {main}
    ud2
    .popsection
    "#,
    note = const NOTE_PHYS32_ENTRY,
    code = const CODE,
    data = const DATA,
    main = sym crate::kernel_main,
);
