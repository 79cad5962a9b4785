; An ELF file that looks like an OpenBSD kernel to its loader (linked high, loaded low, OpenBSD's note, a segment for random
; bytes), and prints the arguments that locore0.S would read from its stack.
%define NO_HEADER
%define LOAD 0x1000000
%define BASE 0xffffffff80000000
bits 64
org LOAD
elf:
    db 0x7f, "ELF", 2, 1, 1
    times 9 db 0
    dw 2, 62
    dd 1
    dq BASE + start
    dq programs - elf, 0
    dd 0
    dw 64, 56, 3, 64, 0, 0
programs:
    dd 1, 7
    dq 0, BASE + LOAD, LOAD, image_end - elf, bss_end - elf, 4096
    dd 0x65a3dbe6, 4
    dq random - elf, BASE + LOAD + (random - elf), random, 32, 32, 8
    dd 4, 4
    dq note - elf, note, note, note_end - note, note_end - note, 4
note:
    dd 8, 4, 1
    db "OpenBSD", 0
    dd 0
note_end:
    align 8
random: times 32 db 0

bits 32
%include "multiboot.inc"

start:
    mov ebp, esp
    mov esp, stack_end
    print "hello from an OpenBSD entry", 10
    print "boothowto "
    mov eax, [ebp + 4]
    call puthex
    print ", bootdev "
    mov eax, [ebp + 8]
    call puthex
    print ", version "
    mov eax, [ebp + 12]
    call puthex
    call newline
    mov esi, [ebp + 32]         ; boot arguments
    mov edi, esi
    add edi, [ebp + 28]         ; their end
argument:
    mov eax, [esi]
    cmp eax, -1
    je arguments_end
    cmp esi, edi
    jae bad
    test eax, eax
    jne not_memory
    lea edx, [esi + 12]
range:
    cmp dword [edx + 16], 0
    je next
    print "memory "
    mov eax, [edx]
    call puthex
    print " size "
    mov eax, [edx + 8]
    call puthex
    call newline
    add edx, 20
    jmp range
not_memory:
    cmp eax, 5
    jne next
    print "console device "
    mov eax, [esi + 12]
    call puthex
    print " port "
    mov eax, [esi + 20]
    call puthex
    print " speed "
    mov eax, [esi + 16]
    call putdec
    call newline
next:
    add esi, [esi + 4]
    jmp argument
arguments_end:
    xor eax, eax
    mov ecx, 8
    mov esi, random
collect:
    or eax, [esi]
    add esi, 4
    loop collect
    test eax, eax
    jz bad
    print "random bytes are there", 10
    exit EXIT_OK
bad:
    print "bad boot arguments", 10
    exit EXIT_BAD

    align 16
image_end:
absolute image_end
    resb 4096
stack_end:
bss_end:
