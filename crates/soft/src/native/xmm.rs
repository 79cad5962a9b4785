//! Values of XMM registers, with what the handlers in Rust do to them.
#![allow(unsafe_code)] // Intrinsics are safe to call only where their feature is declared; SSE2 is part of every x86-64 target.

use std::arch::x86_64 as arch;
pub(super) use std::arch::x86_64::__m128i;

/// A safe function from an SSE2 intrinsic.
macro_rules! intrinsic {
    ($(#[$doc:meta])* $name:ident($($argument:ident: $type:ty),*) -> $result:ty, $body:expr) => {
        $(#[$doc])*
        #[inline(always)]
        pub(super) fn $name($($argument: $type),*) -> $result {
            // SAFETY: SSE2 is part of x86-64; the intrinsic has no other requirement.
            unsafe { $body }
        }
    };
}

intrinsic!(
    /// All bits clear.
    zero() -> __m128i, arch::_mm_setzero_si128());
intrinsic!(
    /// From the low and the high half.
    vector(low: u64, high: u64) -> __m128i, arch::_mm_set_epi64x(high as i64, low as i64));
intrinsic!(
    /// The low half.
    low(x: __m128i) -> u64, arch::_mm_cvtsi128_si64(x) as u64);
intrinsic!(
    /// The high half.
    high(x: __m128i) -> u64, arch::_mm_cvtsi128_si64(arch::_mm_unpackhi_epi64(x, x)) as u64);
intrinsic!(and(a: __m128i, b: __m128i) -> __m128i, arch::_mm_and_si128(a, b));
intrinsic!(
    /// `!a & b`
    and_not(a: __m128i, b: __m128i) -> __m128i, arch::_mm_andnot_si128(a, b));
intrinsic!(or(a: __m128i, b: __m128i) -> __m128i, arch::_mm_or_si128(a, b));
intrinsic!(xor(a: __m128i, b: __m128i) -> __m128i, arch::_mm_xor_si128(a, b));
intrinsic!(
    /// The low half with zero above.
    low_zeroed(x: __m128i) -> __m128i, arch::_mm_move_epi64(x));
intrinsic!(
    /// Both low halves, the first one below.
    low_low(a: __m128i, b: __m128i) -> __m128i, arch::_mm_unpacklo_epi64(a, b));
intrinsic!(
    /// Both high halves, the first one below.
    high_high(a: __m128i, b: __m128i) -> __m128i, arch::_mm_unpackhi_epi64(a, b));
intrinsic!(
    /// `a` with the low 32 bits of `b`.
    low_32_replaced(a: __m128i, b: __m128i) -> __m128i,
    arch::_mm_castps_si128(arch::_mm_move_ss(arch::_mm_castsi128_ps(a), arch::_mm_castsi128_ps(b))));
intrinsic!(
    /// `a` with the low half of `b`.
    low_replaced(a: __m128i, b: __m128i) -> __m128i,
    arch::_mm_castpd_si128(arch::_mm_move_sd(arch::_mm_castsi128_pd(a), arch::_mm_castsi128_pd(b))));
intrinsic!(
    /// The signs of the bytes.
    byte_signs(x: __m128i) -> u32, arch::_mm_movemask_epi8(x) as u32);

/// Low and high half.
#[inline(always)]
pub(super) fn halves(x: __m128i) -> [u64; 2] {
    [low(x), high(x)]
}
