//! What the compiler expects of the system that it has none of: the memory functions of C, the names that the prebuilt `alloc`
//! refers to, and what happens on a panic.
//!
//! Copies and fills are single `rep` instructions: a software processor does them page by page, a real one knows fast strings.
#![allow(unsafe_code)] // Symbols by name, and assembly.

use core::arch::asm;
use core::panic::PanicInfo;

use crate::{power, print};

/// memcpy(3).
///
/// # Safety
/// As the C function: `count` bytes at each pointer, apart from each other.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe { asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags)) };
    to
}

/// memmove(3).
///
/// # Safety
/// As the C function: `count` bytes at each pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= count {
        // SAFETY: going upwards, nothing is overwritten before it is read.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: the caller's promise; downwards from the last byte, and upwards again as everybody expects it.
    unsafe {
        asm!(
            "std", "rep movsb", "cld",
            inout("rcx") count => _,
            inout("rdi") to.wrapping_add(count).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(count).wrapping_sub(1) => _,
            options(nostack),
        );
    }
    to
}

/// memset(3).
///
/// # Safety
/// As the C function: `count` bytes at `to`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe { asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") byte as u8, options(nostack, preserves_flags)) };
    to
}

/// memcmp(3).
///
/// # Safety
/// As the C function: `count` bytes at each pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    for at in 0..count {
        // SAFETY: the caller's promise.
        let (a, b) = unsafe { (a.add(at).read(), b.add(at).read()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// bcmp(3).
///
/// # Safety
/// As [`memcmp`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(a, b, count) }
}

/// Named by the prebuilt `alloc`; nothing unwinds here.
#[unsafe(no_mangle)]
pub extern "C" fn rust_eh_personality() {}

/// Named by the prebuilt `alloc`; nothing unwinds here.
#[unsafe(no_mangle)]
pub extern "C" fn _Unwind_Resume() -> ! {
    power::fail()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    print!("{info}\n");
    power::fail()
}
