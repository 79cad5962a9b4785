//! What instructions of this module check before they start, and their memory operands.
//!
//! The order is the processor's (Intel SDM vol. 2 section 2.4 and vol. 3 section 6.9): #UD and #NM by control registers, then a
//! pending x87 exception, then alignment, then the access itself.

use super::area::x87;
use super::xmm::{__m128i, vector as join};
use crate::cpu::{Cpu, cr0, cr4, vector};
use crate::op::{Op, Trap};

/// Bytes of an XMM operand in memory.
const XMM_BYTES: u64 = 16;

/// Chooses the instance of a handler for the op's addressing form, its last generic argument.
macro_rules! by_ea {
    ($ea:expr, $handler:ident $(, $argument:expr)*) => {
        match $ea {
            $crate::mmu::FLAT_BASE => $handler::<$({ $argument },)* { $crate::mmu::FLAT_BASE }>,
            $crate::mmu::FLAT_SIB => $handler::<$({ $argument },)* { $crate::mmu::FLAT_SIB }>,
            _ => $handler::<$({ $argument },)* { $crate::mmu::GENERAL }>,
        }
    };
}
pub(super) use by_ea;

/// Instructions with XMM registers: #UD without the system's support for them, #NM while the state belongs to another task.
#[inline(always)]
pub(super) fn check_sse(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.cr0 & (cr0::EM | cr0::TS) == 0 && cpu.cr4 & cr4::OSFXSR != 0 { Ok(()) } else { Err(refuse_sse(cpu)) }
}

#[cold]
fn refuse_sse(cpu: &mut Cpu) -> Trap {
    if cpu.cr0 & cr0::EM != 0 || cpu.cr4 & cr4::OSFXSR == 0 { cpu.ud() } else { cpu.raise(vector::NM) }
}

/// Instructions with MMX registers.
#[inline]
pub(super) fn check_mmx(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.cr0 & cr0::EM != 0 {
        return Err(cpu.ud());
    }
    check_x87(cpu)?;
    check_pending(cpu)
}

/// x87 instructions, waiting or not.
#[inline]
pub(super) fn check_x87(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.cr0 & (cr0::EM | cr0::TS) == 0 { Ok(()) } else { Err(cpu.raise(vector::NM)) }
}

/// #MF when an unmasked x87 exception is pending. With CR0.NE clear a PC would get IRQ 13 and assert IGNNE#; here IGNNE# is
/// asserted all the time, so the instruction is executed.
#[inline]
pub(super) fn check_pending(cpu: &mut Cpu) -> Result<(), Trap> {
    if cpu.fx.fsw & x87::ES != 0 && cpu.cr0 & cr0::NE != 0 { Err(cpu.raise(vector::MF)) } else { Ok(()) }
}

/// Address of a 16-byte operand, which `ALIGNED` ones have to be.
#[inline(always)]
pub(super) fn address16<const ALIGNED: bool, const K: u8>(cpu: &mut Cpu, op: &Op, write: bool) -> Result<u64, Trap> {
    let va = cpu.ea::<K>(op, XMM_BYTES, write)?;
    if ALIGNED && va % XMM_BYTES != 0 {
        return Err(cpu.gp());
    }
    Ok(va)
}

/// Loads 16 bytes.
#[inline(always)]
pub(super) fn load16(cpu: &mut Cpu, va: u64) -> Result<__m128i, Trap> {
    let low = cpu.load::<u64>(va)?;
    let high = cpu.load::<u64>(va.wrapping_add(8))?;
    Ok(join(low, high))
}

/// Stores 16 bytes, or none of them.
#[inline(always)]
pub(super) fn store16(cpu: &mut Cpu, va: u64, value: [u64; 2]) -> Result<(), Trap> {
    if va & 0xfff > 0xff0 {
        return store16_across_pages(cpu, va, value);
    }
    cpu.store::<u64>(va, value[0])?;
    cpu.store::<u64>(va.wrapping_add(8), value[1])
}

#[cold]
#[inline(never)]
fn store16_across_pages(cpu: &mut Cpu, va: u64, value: [u64; 2]) -> Result<(), Trap> {
    let value = u128::from(value[0]) | u128::from(value[1]) << 64;
    cpu.store_bytes(va, &value.to_le_bytes())
}

/// Loads 2, 4 or 8 bytes (a constant where this is inlined).
#[inline(always)]
pub(super) fn load_word(cpu: &mut Cpu, va: u64, size: u64) -> Result<u64, Trap> {
    match size {
        1 => Ok(u64::from(cpu.load::<u8>(va)?)),
        2 => Ok(u64::from(cpu.load::<u16>(va)?)),
        4 => Ok(u64::from(cpu.load::<u32>(va)?)),
        _ => cpu.load::<u64>(va),
    }
}

/// Stores 1, 2, 4 or 8 bytes.
#[inline(always)]
pub(super) fn store_word(cpu: &mut Cpu, va: u64, size: u64, value: u64) -> Result<(), Trap> {
    match size {
        1 => cpu.store(va, value as u8),
        2 => cpu.store(va, value as u16),
        4 => cpu.store(va, value as u32),
        _ => cpu.store(va, value),
    }
}
