//! Where the processor enters: one stub for each vector, and what they have in common.
//!
//! A stub makes the stack look the same for all vectors (a zero where the processor pushed no error code) and adds its number.
//! The common part saves every register, those of SSE too, because handlers are compiled code.
#![allow(unsafe_code)] // A symbol of the assembly.

use core::arch::global_asm;

/// Bytes from one stub to the next.
pub(super) const STUB_SIZE: u64 = 16;

/// The stack when [`super::handle`] is called: what the common part pushed, the stub, and the processor (SDM figure 6-9).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

unsafe extern "C" {
    /// The first stub; the others follow.
    pub(super) static interrupt_stubs: [u8; 0];
}

/// Exceptions with which the processor pushes an error code, a bit each: SDM table 6-1, and AMD APM vol. 2 table 8-1 for the last two.
const WITH_ERROR: u32 = 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17 | 1 << 21 | 1 << 29 | 1 << 30;

global_asm!(
    r#"
    .pushsection .text
    .balign 16
    .global interrupt_stubs
interrupt_stubs:
    .set vector, 0
    .rept 256
    .balign {size}
    .if vector >= 32 || ({with_error} >> vector) & 1 == 0
    push 0
    .endif
    push vector
    jmp interrupt_common
    .set vector, vector + 1
    .endr

interrupt_common:
    push rax
    push rbx
    push rcx
    push rdx
    push rsi
    push rdi
    push rbp
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    cld
    mov rdi, rsp
    mov rbp, rsp
    sub rsp, 512
    and rsp, -16
    fxsave64 [rsp]
    call {handle}
    fxrstor64 [rsp]
    mov rsp, rbp
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rbp
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    pop rbx
    pop rax
    add rsp, 16
    iretq
    .popsection
    "#,
    size = const STUB_SIZE,
    with_error = const WITH_ERROR,
    handle = sym super::handle,
);
