; Halts with interrupts off: nothing ever happens again, and that must cost the host nothing.
%include "multiboot.inc"

start:
    mov esp, stack_end
    print "halting for ever", 10
    cli
    hlt
    print "woken?", 10
    exit EXIT_BAD

    align 16
image_end:
absolute image_end
    resb 4096
stack_end:
bss_end:
