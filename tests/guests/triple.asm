; An undefined instruction without an interrupt table: double fault, triple fault, shutdown.
%include "multiboot.inc"

start:
    mov esp, stack_end
    print "about to fault three times", 10
    lidt [no_table]
    ud2
    print "survived?", 10
    exit EXIT_BAD

no_table:
    dw 0
    dd 0
    align 16
image_end:
absolute image_end
    resb 4096
stack_end:
bss_end:
