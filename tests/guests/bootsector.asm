; A boot sector: greets through the BIOS and on COM1, reads its second sector through the BIOS, and leaves by isa-debug-exit.
bits 16
org 0x7c00

%define COM1 0x3f8
%define DEBUG_EXIT 0xf4
%define SECOND 0x7e00

start:
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7c00
    mov [drive], dl
    mov si, greeting
    call say_by_bios
    mov si, hello
    call say
    ; Int 13h function 42h: extended read, by the packet at DS:SI.
    mov ah, 0x42
    mov dl, [drive]
    mov si, packet
    int 0x13
    jc failed
    mov si, SECOND
    call say
    ; Int 15h function E820h: the first range of the memory map.
    mov eax, 0xe820
    mov edx, 0x534d4150
    xor ebx, ebx
    mov ecx, 20
    mov di, range
    int 0x15
    jc failed
    cmp dword [range + 16], 1
    jne failed
    mov si, memory
    call say
    mov al, 0x10
    jmp leave_machine
failed:
    mov si, error
    call say
    mov al, 0x11
leave_machine:
    out DEBUG_EXIT, al
stop:
    hlt
    jmp stop

; Prints the string at SI through the BIOS: int 10h function 0Eh.
say_by_bios:
    lodsb
    test al, al
    jz .end
    push si
    mov ah, 0x0e
    mov bx, 7
    int 0x10
    pop si
    jmp say_by_bios
.end:
    ret

; Prints the string at SI on COM1.
say:
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
    jmp say
.end:
    ret

; What SeaBIOS shows on the serial port lags by the last character.
greeting: db 13, 10, "greetings through the BIOS ...", 13, 10, 0
hello: db "hello from the boot sector", 10, 0
memory: db "memory map found", 10, 0
error: db "the BIOS reports an error", 10, 0
drive: db 0
    align 4
packet:
    db 16, 0
    dw 1                        ; sectors
    dw SECOND, 0                ; offset, segment
    dq 1                        ; first sector
range: times 20 db 0

    times 510 - ($ - $$) db 0
    dw 0xaa55

    db "hello from the second sector", 10, 0
    times 1024 - ($ - $$) db 0
