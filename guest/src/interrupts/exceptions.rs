//! Exceptions: some are expected and have a fix-up, the others end the kernel with everything that is known.
#![allow(unsafe_code)] // Reads CR2 and CR3.

use core::arch::asm;

use super::stubs::Frame;
use crate::{cpu, power, print};

/// Mnemonics, SDM table 6-1.
const NAMES: [&str; 22] = [
    "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "", "#TS", "#NP", "#SS", "#GP", "#PF", "", "#MF", "#AC", "#MC", "#XM",
    "#VE", "#CP",
];

/// Goes on where somebody is prepared; gives up everywhere else.
pub(super) fn handle(frame: &mut Frame) {
    if let Some(resume) = cpu::fixup(frame.rip) {
        frame.rip = resume;
        return;
    }
    let (cr2, cr3): (u64, u64);
    // SAFETY: reads two registers.
    unsafe { asm!("mov {}, cr2", "mov {}, cr3", out(reg) cr2, out(reg) cr3, options(nomem, nostack, preserves_flags)) };
    let Frame { rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8, r9, r10, r11, r12, r13, r14, r15, .. } = *frame;
    let Frame { vector, error, rip, cs, rflags, ss, .. } = *frame;
    let name = NAMES.get(vector as usize).copied().unwrap_or("");
    print!(
        "\nexception {vector} {name} error {error:#x} at {cs:#x}:{rip:#018x}\n\
         rax {rax:016x} rbx {rbx:016x} rcx {rcx:016x} rdx {rdx:016x}\n\
         rsi {rsi:016x} rdi {rdi:016x} rbp {rbp:016x} rsp {rsp:016x}\n\
         r8  {r8:016x} r9  {r9:016x} r10 {r10:016x} r11 {r11:016x}\n\
         r12 {r12:016x} r13 {r13:016x} r14 {r14:016x} r15 {r15:016x}\n\
         rflags {rflags:#x} ss {ss:#x} cr2 {cr2:016x} cr3 {cr3:016x}\n"
    );
    power::fail();
}
