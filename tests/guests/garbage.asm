; Writes pseudo-random garbage to all model-specific registers in the known ranges, to the interrupt controllers' and timers'
; pages, to every PCI device's memory, and to every I/O port, reading everything too. Exceptions are skipped. What would by
; design end the machine (resets, power off, INIT) is kept for the very end, after the last message.
%include "multiboot.inc"

%define CONFIG_ADDRESS 0xcf8
%define CONFIG_DATA 0xcfc
%define BAR_WINDOW 0xe8000000
%define VECTOR_SIZE 16          ; bytes of an entry
%define BAR_PART 0x3000         ; bytes of each BAR that get garbage

start:
    mov esp, stack_end
    ; The command line after the file's name varies the numbers.
    mov esi, [ebx + 16]
.name:
    lodsb
    test al, al
    jz .seeded
    cmp al, ' '
    jne .name
.argument:
    movzx eax, byte [esi]
    inc esi
    imul ecx, [seed], 31
    add ecx, eax
    mov [seed], ecx
    test al, al
    jnz .argument
.seeded:
    lgdt [gdt_pointer]
    jmp 0x08:.flat
.flat:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov fs, ax
    mov gs, ax
    ; Every vector goes to an entry of its own, so that those with an error code can be told apart.
    mov edi, idt
    mov eax, vectors
    mov ecx, 256
.gate:
    mov [edi], ax
    mov word [edi + 2], 0x08
    mov edx, eax
    shr edx, 16
    mov word [edi + 6], dx
    mov word [edi + 4], 0x8e00
    add edi, 8
    add eax, VECTOR_SIZE
    loop .gate
    lidt [idt_pointer]
    print "garbage begins", 10

; --- model-specific registers
    mov ebp, msr_ranges
.range:
    mov esi, [ebp]
.msr:
    mov dword [resume], .read
    mov ecx, esi
    rdmsr
.read:
    call msr_is_spared
    je .next_msr
    mov dword [resume], .written
    call random
    mov ebx, eax
    call random
    mov edx, eax
    call random
    test al, 3
    jz .wide
    xor edx, edx                ; most registers fault on high bits
.wide:
    mov eax, ebx
    mov ecx, esi
    wrmsr
.written:
.next_msr:
    inc esi
    cmp esi, [ebp + 4]
    jbe .msr
    add ebp, 8
    cmp dword [ebp + 4], 0
    jne .range
    mov dword [resume], 0
    call mend_serial
    print "model-specific registers: "
    mov eax, [faults]
    call putdec
    print " faults", 10

; --- pages of the interrupt controllers and timers
    mov ebp, pages
.page:
    mov edi, [ebp]
    mov ecx, 0x1000
    call garbage_memory
    add ebp, 4
    cmp dword [ebp], 0
    jne .page
    call mend_serial
    print "interrupt controllers and timers done", 10

; --- PCI: every memory BAR of bus 0 gets an address and then garbage
    mov dword [next_bar], BAR_WINDOW
    xor ebx, ebx                ; device
.device:
    mov eax, ebx
    shl eax, 11
    or eax, 0x80000000
    mov [function], eax
    call config_read
    cmp ax, 0xffff
    je .next_device
    inc dword [devices]
    mov ebp, 0x10
.bar:
    lea eax, [ebp]
    or eax, [function]
    mov [bar], eax
    call config_read
    test al, 1
    jnz .next_bar
    mov esi, eax
    mov eax, [bar]
    mov ecx, -1
    call config_write
    mov eax, [bar]
    call config_read
    and eax, ~15
    jz .next_bar
    neg eax                     ; size
    mov edx, eax
    mov edi, [next_bar]
    lea edi, [edi + eax - 1]
    neg eax
    and edi, eax
    lea eax, [edi + edx]
    mov [next_bar], eax
    mov ecx, edi
    mov eax, [bar]
    call config_write
    and esi, 6
    cmp esi, 4
    jne .small
    add ebp, 4                  ; the high half of a 64-bit BAR
    mov eax, [bar]
    add eax, 4
    xor ecx, ecx
    call config_write
.small:
    mov eax, [function]
    or eax, 4
    mov ecx, 6                  ; memory and bus master
    call config_write
    mov ecx, edx
    cmp ecx, BAR_PART
    jbe .fits
    mov ecx, BAR_PART
.fits:
    call garbage_memory
.next_bar:
    add ebp, 4
    cmp ebp, 0x24
    jbe .bar
.next_device:
    inc ebx
    cmp ebx, 32
    jb .device
    ; Then garbage in every register of their configuration space: BARs and capabilities go anywhere.
    xor ebx, ebx
.register:
    call random
    mov ecx, eax
    lea eax, [ebx + 0x80000000]
    call config_write
    lea eax, [ebx + 0x80000000]
    call config_read
    add ebx, 4
    cmp ebx, 0x10000
    jb .register
    call mend_serial
    print "PCI devices: "
    mov eax, [devices]
    call putdec
    call newline

; --- ports, twice
    mov ebp, 2
.round:
    xor esi, esi
.port:
    call port_is_spared
    je .next_port
    call garbage_port
.next_port:
    inc esi
    cmp esi, 0x10000
    jb .port
    dec ebp
    jnz .round
    call mend_serial
    call newline
    print "ports done", 10
    print "garbage ends", 10

; --- what may end the machine
    mov ebp, fatal_ports
.fatal:
    movzx esi, word [ebp]
    test esi, esi
    jz .end
.one:
    call garbage_port
    inc esi
    cmp si, [ebp + 2]
    jbe .one
    add ebp, 4
    jmp .fatal
.end:
    exit EXIT_OK

; Reads and writes port ESI with all sizes.
garbage_port:
    mov edx, esi
    in al, dx
    in ax, dx
    in eax, dx
    call random
    out dx, al
    call random
    out dx, ax
    call random
    out dx, eax
    ret

; Garbage to ECX bytes at EDI, four at a time, and single bytes and words in between.
garbage_memory:
    push ecx
    push edi
    add ecx, edi
    mov [limit], ecx
.next:
    mov eax, [edi]
    mov ax, [edi + 2]
    mov al, [edi + 1]
    call random
    mov ecx, edi
    and ecx, 0xfffffff0
    cmp ecx, 0xfee00300         ; the interrupt command: no INIT, no start-up
    je .tame
    cmp ecx, 0xfee00000         ; what some take for a message: the same
    je .tame
    and ecx, 0xfffff0f0
    cmp ecx, 0xfec00010         ; I/O APIC data, which some repeat over the page: the same
    jne .wild
.tame:
    and eax, 0xfffff8ff
    mov [edi], eax
    jmp .step
.wild:
    mov [edi], eax
    test al, 7
    jnz .step
    call random
    mov [edi + 1], al
    call random
    mov [edi + 2], ax
.step:
    add edi, 4
    cmp edi, [limit]
    jb .next
    pop edi
    pop ecx
    ret

; Sets ZF when writing to MSR ESI ends this guest: the APIC's place, the interrupt command.
msr_is_spared:
    cmp esi, 0x1b
    je .yes
    cmp esi, 0x830
.yes:
    ret

; Sets ZF when garbage in port ESI may end the machine. Keeps ESI.
port_is_spared:
    push ebp
    mov ebp, spared_ports
.next:
    cmp word [ebp], 0
    je .no
    cmp si, [ebp]
    jb .other
    cmp si, [ebp + 2]
    jbe .yes
.other:
    add ebp, 4
    jmp .next
.yes:
    pop ebp
    cmp eax, eax
    ret
.no:
    pop ebp
    or ebp, ebp                 ; not zero where this is called: a loop counter
    ret

; First and last port of what may end the machine. An access of two or four bytes reaches the ports after it.
spared_ports:
    dw 0xf1, 0xf7               ; isa-debug-exit
fatal_ports:
    dw 0xb000, 0xb03f           ; ACPI where QEMU has it
    dw 0x5fd, 0x63f             ; ACPI
    dw 0x8f, 0x92               ; fast reset
    dw 0x61, 0x64               ; keyboard controller
    dw 0xcf6, 0xcf9             ; reset control
    dw 0, 0

; The serial port as it was, after garbage.
mend_serial:
    push eax
    push edx
    mov edx, COM1 + 3
    mov al, 3
    out dx, al
    mov edx, COM1 + 1
    xor eax, eax
    out dx, al
    mov edx, COM1 + 4
    mov al, 3
    out dx, al
    pop edx
    pop eax
    ret

; EAX: the next number of a linear congruential generator (its high half is the random one).
random:
    push edx
    mov eax, [seed]
    imul eax, eax, 1664525
    add eax, 1013904223
    mov [seed], eax
    mov edx, eax
    imul edx, edx, 22695477
    inc edx
    shr edx, 16
    xor eax, edx
    pop edx
    ret

; EAX: address of a configuration register. Answers in EAX, or writes ECX.
config_read:
    push edx
    mov edx, CONFIG_ADDRESS
    out dx, eax
    mov edx, CONFIG_DATA
    in eax, dx
    pop edx
    ret
config_write:
    push edx
    mov edx, CONFIG_ADDRESS
    out dx, eax
    mov edx, CONFIG_DATA
    mov eax, ecx
    out dx, eax
    pop edx
    ret

; Entries of the 256 vectors; each makes the stack the same: vector, error code, EIP.
%macro entry 1
%%begin:
%if %1 == 8 || (%1 >= 10 && %1 <= 14) || %1 == 17 || %1 == 21
    times 2 nop
%else
    push byte 0
%endif
    push dword %1
    jmp near handler
    times VECTOR_SIZE - ($ - %%begin) nop
%endmacro
    align 16
vectors:
%assign number 0
%rep 256
    entry number
%assign number number + 1
%endrep

; Exceptions go on at `resume`; interrupts return.
handler:
    cmp dword [esp], 32
    jae .interrupt
    cmp dword [esp], 2
    je .interrupt
    inc dword [faults]
    cmp dword [resume], 0
    je .unexpected
    push eax
    mov eax, [resume]
    mov [esp + 12], eax
    pop eax
.interrupt:
    add esp, 8
    iret
.unexpected:
    call mend_serial
    print "unexpected exception "
    mov eax, [esp]
    call puthex
    print " at "
    mov eax, [esp + 8]
    call puthex
    call newline
    exit EXIT_BAD

    align 8
msr_ranges:
    dd 0, 0x3ff                 ; architectural, MTRRs
    dd 0x400, 0x4ff             ; machine check
    dd 0x600, 0x6ff             ; TSC deadline, shadow stacks
    dd 0x800, 0x8ff             ; x2APIC
    dd 0xc00, 0xdff             ; resource director, XSS
    dd 0x40000000, 0x400001ff   ; Hyper-V
    dd 0x4b564d00, 0x4b564d0f   ; KVM
    dd 0xc0000080, 0xc0000104   ; system calls, segment bases
    dd 0xc0010000, 0xc00101ff   ; AMD
    dd 0xc0011000, 0xc00110ff
    dd 0, 0
pages:
    dd 0xfee00000, 0xfec00000, 0xfed00000, 0xfed40000, 0
gdt:
    dq 0
    dq 0x00cf9b000000ffff
    dq 0x00cf93000000ffff
gdt_pointer:
    dw 23
    dd gdt
idt_pointer:
    dw 2047
    dd idt
seed: dd 0x2a61c3f7

    align 16
image_end:
absolute image_end
    alignb 8
idt: resb 2048
resume: resd 1
faults: resd 1
limit: resd 1
function: resd 1
bar: resd 1
next_bar: resd 1
devices: resd 1
    resb 4096
stack_end:
bss_end:
