; A 64-bit ELF file with Xen's PVH note: prints what start info says.
%define NO_HEADER
%define LOAD 0x200000
bits 64
org LOAD
elf:
    db 0x7f, "ELF", 2, 1, 1
    times 9 db 0
    dw 2, 62                    ; executable, x86-64
    dd 1
    dq start
    dq programs - elf, 0
    dd 0
    dw 64, 56, 2, 64, 0, 0
programs:
    dd 1, 7
    dq 0, elf, elf, image_end - elf, bss_end - elf, 4096
    dd 4, 4
    dq note - elf, note, note, note_end - note, note_end - note, 4
note:
    dd 4, 4, 18
    db "Xen", 0
    dd start
note_end:

bits 32
%include "multiboot.inc"

start:
    mov esp, stack_end
    cmp dword [ebx], 0x336ec578
    jne bad
    print "hello from a PVH entry", 10
    print "command line: "
    mov esi, [ebx + 24]
    call puts
    call newline
    print "memory map entries: "
    mov eax, [ebx + 48]
    call putdec
    call newline
    print "RSDP: "
    mov esi, [ebx + 32]
    mov ecx, 8
    test esi, esi
    jz no_rsdp
signature:
    lodsb
    call putc
    loop signature
no_rsdp:
    call newline
    mov ecx, [ebx + 12]
    mov edi, [ebx + 16]
    jecxz done
module:
    print "module: "
    mov esi, [edi + 16]
    call puts
    print " holds "
    mov esi, [edi]
    mov edx, [edi + 8]
contents:
    test edx, edx
    jz contents_end
    lodsb
    call putc
    dec edx
    jmp contents
contents_end:
    call newline
    add edi, 32
    loop module
done:
    exit EXIT_OK
bad:
    print "no start info", 10
    exit EXIT_BAD

    align 16
image_end:
absolute image_end
    resb 4096
stack_end:
bss_end:
