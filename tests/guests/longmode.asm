; Walks from the boot loader's protected mode down to real mode and up again to 16- and 32-bit protected mode, compatibility
; mode and 64-bit mode, saying so in each.
%include "multiboot.inc"

%define LOW 0x8000              ; where the part for real mode is copied to
%define CODE16 0x08
%define DATA16 0x10
%define CODE32 0x18
%define DATA32 0x20
%define CODE64 0x28
%define CR0_PE 1
%define CR0_PG 0x80000000
%define CR4_PAE 0x20
%define MSR_EFER 0xc0000080
%define EFER_LME 0x100

start:
    mov esp, stack_end
    print "protected mode", 10
    mov esi, low_part
    mov edi, LOW
    mov ecx, low_part_end - low_part
    rep movsb
    lgdt [gdt_pointer]
    jmp CODE16:LOW + (to_real - low_part)

; From here on the addresses are those of the copy.
low_part:
%define AT(label) (LOW + (label - low_part))
bits 16
to_real:
    mov ax, DATA16
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov eax, cr0
    and al, ~CR0_PE
    mov cr0, eax
    jmp 0:AT(real)
real:
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, LOW
    mov si, AT(real_text)
.next:
    lodsb
    test al, al
    jz .end
    mov bl, al
    mov dx, COM1 + 5
.wait:
    in al, dx
    test al, 0x20
    jz .wait
    mov dx, COM1
    mov al, bl
    out dx, al
    jmp .next
.end:
    ; Segments keep the limits of protected mode ("unreal mode"): reach above 1 MiB.
    mov eax, cr0
    or al, CR0_PE
    mov cr0, eax
    jmp .flush
.flush:
    mov ax, DATA32
    mov fs, ax
    mov eax, cr0
    and al, ~CR0_PE
    mov cr0, eax
    jmp 0:AT(unreal)
unreal:
    mov dword [fs:dword unreal_mark], 0x600df00d
    lgdt [AT(low_gdt_pointer)]
    mov eax, cr0
    or al, CR0_PE
    mov cr0, eax
    jmp dword CODE32:protected
real_text: db "real mode", 10, 0
    align 4
low_gdt_pointer:
    dw gdt_end - gdt - 1
    dd gdt
low_part_end:

bits 32
protected:
    mov ax, DATA32
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, stack_end
    cmp dword [unreal_mark], 0x600df00d
    jne bad
    print "unreal mode reached above 1 MiB", 10
    print "protected mode again", 10

    ; One page of each level maps the first 2 MiB.
    mov dword [pml4], pdpt + 3
    mov dword [pdpt], directory + 3
    mov dword [directory], 0x83
    mov eax, cr4
    or eax, CR4_PAE
    mov cr4, eax
    mov eax, pml4
    mov cr3, eax
    mov ecx, MSR_EFER
    rdmsr
    or eax, EFER_LME
    wrmsr
    mov eax, cr0
    or eax, CR0_PG
    mov cr0, eax
    print "compatibility mode", 10
    jmp CODE64:long_mode

bits 64
long_mode:
    mov rax, 0x123456789abcdef0
    mov r15, rax
    cmp r15, rax
    jne .halt
    lea rsi, [rel long_text]
.next:
    lodsb
    test al, al
    jz .end
    mov bl, al
    mov dx, COM1 + 5
.wait:
    in al, dx
    test al, 0x20
    jz .wait
    mov dx, COM1
    mov al, bl
    out dx, al
    jmp .next
.end:
    mov al, EXIT_OK
    out DEBUG_EXIT, al
.halt:
    hlt
    jmp .halt
long_text: db "long mode", 10, 0

bits 32
bad:
    exit EXIT_BAD

    align 8
gdt:
    dq 0
    dq 0x00009b000000ffff       ; 16-bit code
    dq 0x000093000000ffff       ; 16-bit data
    dq 0x00cf9b000000ffff       ; 32-bit code
    dq 0x00cf93000000ffff       ; 32-bit data
    dq 0x00af9b000000ffff       ; 64-bit code
gdt_end:
gdt_pointer:
    dw gdt_end - gdt - 1
    dd gdt

    align 16
image_end:
absolute image_end
    alignb 4096
pml4: resb 4096
pdpt: resb 4096
directory: resb 4096
unreal_mark: resd 1
    resb 4096
stack_end:
bss_end:
