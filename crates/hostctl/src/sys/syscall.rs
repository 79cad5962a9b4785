//! The system call instruction: number in RAX, arguments in RDI, RSI, RDX, R10, R8, R9; results of -4095 to -1 are error numbers
//! (System V ABI, AMD64 supplement, A.2.1).
#![allow(unsafe_code)] // One instruction.

use core::arch::asm;

use super::Errno;

/// The highest error number.
const MAX_ERRNO: isize = 4095;

/// Makes the system call `number`. Arguments that it does not have are 0.
///
/// # Safety
/// The arguments are such that the call does to memory only what its caller means it to do.
pub(super) unsafe fn syscall<const N: usize>(number: u32, arguments: [usize; N]) -> Result<usize, Errno> {
    let mut all = [0; 6];
    for (argument, given) in all.iter_mut().zip(arguments) {
        *argument = given;
    }
    let mut result = number as isize;
    // SAFETY: the caller's promise. The kernel keeps all registers but RAX, RCX and R11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") all[0],
            in("rsi") all[1],
            in("rdx") all[2],
            in("r10") all[3],
            in("r8") all[4],
            in("r9") all[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    if (-MAX_ERRNO..0).contains(&result) { Err(Errno::from_raw(-result as i32)) } else { Ok(result as usize) }
}
