; Multiboot 1: prints what the boot loader handed over.
%include "multiboot.inc"

start:
    mov esp, stack_end
    cmp eax, 0x2badb002
    jne bad
    print "hello from protected mode", 10
    print "command line: "
    mov esi, [ebx + 16]
    call puts
    call newline
    print "memory: "
    mov eax, [ebx + 8]
    call putdec
    print " KiB above 1 MiB", 10
    mov ecx, [ebx + 20]
    mov edi, [ebx + 24]
    jecxz done
module:
    print "module: "
    mov esi, [edi + 8]
    call puts
    print " holds "
    mov esi, [edi]
contents:
    cmp esi, [edi + 4]
    jae contents_end
    lodsb
    call putc
    jmp contents
contents_end:
    call newline
    add edi, 16
    loop module
done:
    exit EXIT_OK
bad:
    print "no multiboot magic", 10
    exit EXIT_BAD

    align 16
image_end:
absolute image_end
    resb 4096
stack_end:
bss_end:
