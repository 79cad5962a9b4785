; Jumps to where there is no memory. What is fetched there is nothing to execute for long: no interrupt table catches it.
%include "multiboot.inc"

start:
    mov esp, stack_end
    print "jumping into nothing", 10
    lidt [no_table]
    mov eax, 0xd0000000
    jmp eax

no_table:
    dw 0
    dd 0
    align 16
image_end:
absolute image_end
    resb 4096
stack_end:
bss_end:
