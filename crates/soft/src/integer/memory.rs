//! The fast half of memory operands: accesses that the TLB knows, in the flat addressing forms.
//!
//! A handler for a flat form asks here. On `None` (TLB miss, page crossing, device, page with instructions) it calls the handler
//! of the same instruction for [`GENERAL`], which can do everything, in tail position; so the fast one keeps no state over a call
//! and needs no stack frame.
#![allow(unsafe_code)] // Host addresses of guest RAM, straight from the TLB.

use crate::cpu::Cpu;
use crate::mmu::{GENERAL, Word};
use crate::op::Op;

/// Linear address of the op's memory operand, when it has a flat form; those never fail.
#[inline(always)]
fn flat<const K: u8>(cpu: &mut Cpu, op: &Op) -> Option<u64> {
    if K == GENERAL { None } else { cpu.ea::<K>(op, 0, false).ok() }
}

/// Loads the operand.
#[inline(always)]
pub(super) fn load<T: Word, const K: u8>(cpu: &mut Cpu, op: &Op) -> Option<T> {
    let va = flat::<K>(cpu, op)?;
    load_at(cpu, va)
}

/// Stores the operand.
#[inline(always)]
pub(super) fn store<T: Word, const K: u8>(cpu: &mut Cpu, op: &Op, value: T) -> Option<()> {
    let va = flat::<K>(cpu, op)?;
    store_at(cpu, va, value)
}

/// Replaces the operand; `update` returns the new value and something to keep.
#[inline(always)]
pub(super) fn update<T: Word, R, const K: u8>(cpu: &mut Cpu, op: &Op, update: impl FnOnce(T) -> (T, R)) -> Option<R> {
    let va = flat::<K>(cpu, op)?;
    let at = cpu.hit::<T, true>(va)?;
    // SAFETY: a TLB entry's address leads to a mapped page of guest RAM, and the access stays in the page.
    unsafe {
        let (value, kept) = update(T::read(at));
        T::write(at, value);
        Some(kept)
    }
}

/// Loads from a linear address.
#[inline(always)]
pub(super) fn load_at<T: Word>(cpu: &Cpu, va: u64) -> Option<T> {
    let at = cpu.hit::<T, false>(va)?;
    // SAFETY: as above.
    Some(unsafe { T::read(at) })
}

/// Stores to a linear address.
#[inline(always)]
pub(super) fn store_at<T: Word>(cpu: &Cpu, va: u64, value: T) -> Option<()> {
    let at = cpu.hit::<T, true>(va)?;
    // SAFETY: as above, and it is writable.
    unsafe { T::write(at, value) };
    Some(())
}

/// The value of the operand in form `K`: of flat forms by the TLB, leaving for the handler `$general` when it does not know; of
/// `GENERAL` by every means.
macro_rules! operand {
    ($cpu:expr, $op:expr, $t:ty, $k:ident, $general:expr) => {
        if $k == GENERAL {
            let va = attempt!($cpu, $op, $cpu.ea::<GENERAL>(&$op, <$t>::SIZE, false));
            attempt!($cpu, $op, $cpu.load::<$t>(va))
        } else {
            match $crate::integer::memory::load::<$t, $k>($cpu, &$op) {
                Some(value) => value,
                None => return $general($cpu, $op),
            }
        }
    };
}
pub(super) use operand;

/// Stores a value to the operand in the same way.
macro_rules! store_operand {
    ($cpu:expr, $op:expr, $t:ty, $k:ident, $value:expr, $general:expr) => {
        if $k == GENERAL {
            let va = attempt!($cpu, $op, $cpu.ea::<GENERAL>(&$op, <$t>::SIZE, true));
            attempt!($cpu, $op, $cpu.store::<$t>(va, $value));
        } else if $crate::integer::memory::store::<$t, $k>($cpu, &$op, $value).is_none() {
            return $general($cpu, $op);
        }
    };
}
pub(super) use store_operand;
