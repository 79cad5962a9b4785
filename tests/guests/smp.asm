; Starts the other processors by INIT and SIPI. All count at once: by `lock inc`, and by plain increments under a spinlock.
; The sums tell whether the increments were atomic.
%include "multiboot.inc"

%define APIC 0xfee00000
%define APIC_ID 0x20
%define APIC_SPURIOUS 0xf0
%define APIC_ICR 0x300
; Everybody but this processor: INIT, then start-up at page 8.
%define ICR_INIT 0x000c4500
%define ICR_STARTUP 0x000c4608
%define LOW 0x8000
%define ROUNDS 50000
%define PATIENCE 20000000

start:
    mov esp, stack_end
    mov esi, low_part
    mov edi, LOW
    mov ecx, low_part_end - low_part
    rep movsb
    ; Software enable, spurious vector 255.
    mov dword [APIC + APIC_SPURIOUS], 0x1ff
    mov dword [APIC + APIC_ICR + 0x10], 0
    mov dword [APIC + APIC_ICR], ICR_INIT
    call pause_a_little
    mov dword [APIC + APIC_ICR], ICR_STARTUP
    call pause_a_little
    mov dword [APIC + APIC_ICR], ICR_STARTUP

    mov ecx, PATIENCE
wait_for_others:
    cmp dword [online], 0
    jne others_came
    pause
    dec ecx
    jnz wait_for_others
    print "no second processor", 10
    exit EXIT_BAD
others_came:
    call pause_a_little
    mov dword [go], 1
    call count
    ; Those that came count; wait until as many are done.
    mov ecx, PATIENCE
wait_for_done:
    mov eax, [done]
    cmp eax, [online]
    je all_done
    pause
    dec ecx
    jnz wait_for_done
    print "a processor does not finish", 10
    exit EXIT_BAD
all_done:
    print "processors: "
    mov eax, [online]
    inc eax
    call putdec
    print ", APIC ids:"
    mov eax, [apic_ids]
    call puthex
    call newline
    print "atomic: "
    mov eax, [atomic]
    call putdec
    print ", under a lock: "
    mov eax, [locked]
    call putdec
    call newline
    ; Every processor has made ROUNDS of each.
    mov eax, [online]
    inc eax
    imul eax, ROUNDS
    cmp eax, [atomic]
    jne wrong
    cmp eax, [locked]
    jne wrong
    exit EXIT_OK
wrong:
    print "increments were lost", 10
    exit EXIT_BAD

pause_a_little:
    mov ecx, 100000
.next:
    pause
    loop .next
    ret

count:
    mov ecx, ROUNDS
.next:
    lock inc dword [atomic]
.acquire:
    mov eax, 1
    xchg eax, [spinlock]
    test eax, eax
    jz .mine
    pause
    jmp .acquire
.mine:
    inc dword [locked]
    mov dword [spinlock], 0
    loop .next
    ret

other_processor:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    ; A stack for each, and a bit for its APIC id.
    mov eax, 1
    lock xadd [online], eax
    shl eax, 8
    lea esp, [other_stacks + eax + 256]
    mov ecx, [APIC + APIC_ID]
    shr ecx, 24
    mov eax, 1
    shl eax, cl
    lock or [apic_ids], eax
.wait:
    pause
    cmp dword [go], 0
    je .wait
    call count
    lock inc dword [done]
.stop:
    cli
    hlt
    jmp .stop

bits 16
low_part:
    cli
    xor ax, ax
    mov ds, ax
    lgdt [LOW + (low_gdt_pointer - low_part)]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp dword 0x08:other_processor
    align 4
low_gdt_pointer:
    dw 23
    dd LOW + (low_gdt - low_part)
    align 8
low_gdt:
    dq 0
    dq 0x00cf9b000000ffff
    dq 0x00cf93000000ffff
low_part_end:

    align 16
image_end:
absolute image_end
online: resd 1
go: resd 1
done: resd 1
atomic: resd 1
locked: resd 1
spinlock: resd 1
apic_ids: resd 1
    resb 4096
stack_end:
other_stacks:
    resb 64 * 256
bss_end:
