//! The integers that one host instruction loads, stores or exchanges: how guest RAM is touched.
#![allow(unsafe_code)] // Guest RAM is shared with other processors and devices; only assembly says "exactly one access".

use std::arch::asm;

/// An unsigned integer that one host instruction loads or stores.
pub(crate) trait Word: Copy + Eq + 'static {
    const SIZE: u64;
    fn from_u64(value: u64) -> Self;
    fn into_u64(self) -> u64;
    /// # Safety
    /// `at` must be readable memory of the right size; alignment does not matter.
    unsafe fn read(at: *const u8) -> Self;
    /// # Safety
    /// `at` must be writable memory of the right size; alignment does not matter.
    unsafe fn write(at: *mut u8, value: Self);
    /// One attempt of a locked compare-exchange; returns what was there.
    /// # Safety
    /// `at` must be writable memory of the right size inside one page; alignment does not matter.
    unsafe fn compare_exchange(at: *mut u8, expected: Self, new: Self) -> Self;
}

macro_rules! word {
    ($t:ty, $size:literal, $class:ident, $reg:literal, $accumulator:tt) => {
        impl Word for $t {
            const SIZE: u64 = $size;

            #[inline(always)]
            fn from_u64(value: u64) -> $t {
                value as $t
            }

            #[inline(always)]
            fn into_u64(self) -> u64 {
                u64::from(self)
            }

            #[inline(always)]
            unsafe fn read(at: *const u8) -> $t {
                let value: $t;
                // SAFETY: the caller says that `at` is readable.
                unsafe { asm!(concat!("mov {0", $reg, "}, [{1}]"), out($class) value, in(reg) at, options(nostack, preserves_flags, readonly)) };
                value
            }

            #[inline(always)]
            unsafe fn write(at: *mut u8, value: $t) {
                // SAFETY: the caller says that `at` is writable.
                unsafe { asm!(concat!("mov [{1}], {0", $reg, "}"), in($class) value, in(reg) at, options(nostack, preserves_flags)) };
            }

            #[inline(always)]
            unsafe fn compare_exchange(at: *mut u8, expected: $t, new: $t) -> $t {
                let old: $t;
                // SAFETY: the caller says that `at` is writable; x86 allows locked access at any alignment.
                unsafe {
                    asm!(concat!("lock cmpxchg [{1}], {0", $reg, "}"), in($class) new, in(reg) at,
                        inlateout($accumulator) expected => old, options(nostack))
                };
                old
            }
        }
    };
}

word!(u8, 1, reg_byte, "", "al");
word!(u16, 2, reg, ":x", "ax");
word!(u32, 4, reg, ":e", "eax");
word!(u64, 8, reg, ":r", "rax");

/// Copies bytes between guest RAM and memory of ours.
///
/// # Safety
/// Both ranges must be valid and must not overlap.
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller's promise. `rep movsb` by hand, because other processors may write the guest side at the same time.
    unsafe { asm!("rep movsb", inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _, options(nostack, preserves_flags)) };
}
