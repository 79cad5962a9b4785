//! What fits nowhere else: flag instructions, no-operations, fences, CRC32, BOUND, and decimal adjustment.

use iced_x86::{Instruction, Mnemonic};

use super::host::Host;
use super::operand::{Int, Kind, by_size, field, kind, reg, size};
use crate::block::Lowering;
use crate::cpu::{Cpu, rflags, vector};
use crate::mmu::GENERAL;
use crate::op::{Cursor, Flow, Handler, Op, Outcome, Slow, Trap, attempt, slow};

/// NOP, ENDBR, PREFETCH, hints, and fences that x86 hosts keep by themselves.
extern "sysv64-unwind" fn nothing(cpu: &mut Cpu, op: Cursor) -> Outcome {
    op.next(cpu)
}

/// MFENCE: the stores of this guest are stores of this host thread, so its fence orders them.
extern "sysv64-unwind" fn full_fence(cpu: &mut Cpu, op: Cursor) -> Outcome {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    op.next(cpu)
}

/// PAUSE: the other hyperthread, or processor, may go on.
extern "sysv64-unwind" fn pause(cpu: &mut Cpu, op: Cursor) -> Outcome {
    std::hint::spin_loop();
    op.next(cpu)
}

/// CLFLUSH, CLFLUSHOPT, CLWB: caches are coherent here, but the address is checked as for a load.
extern "sysv64-unwind" fn flush_line(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, 1, false));
    attempt!(cpu, op, cpu.load::<u8>(va));
    op.next(cpu)
}

extern "sysv64-unwind" fn clc(cpu: &mut Cpu, op: Cursor) -> Outcome {
    cpu.status_flags = cpu.status_flags.with_carry(false);
    op.next(cpu)
}

extern "sysv64-unwind" fn stc(cpu: &mut Cpu, op: Cursor) -> Outcome {
    cpu.status_flags = cpu.status_flags.with_carry(true);
    op.next(cpu)
}

extern "sysv64-unwind" fn cmc(cpu: &mut Cpu, op: Cursor) -> Outcome {
    cpu.status_flags = cpu.status_flags.with_carry(!cpu.carry());
    op.next(cpu)
}

extern "sysv64-unwind" fn cld(cpu: &mut Cpu, op: Cursor) -> Outcome {
    cpu.rflags &= !rflags::DF;
    op.next(cpu)
}

extern "sysv64-unwind" fn std(cpu: &mut Cpu, op: Cursor) -> Outcome {
    cpu.rflags |= rflags::DF;
    op.next(cpu)
}

/// Bits of AH's flags in RFLAGS.
const LOW_STATUS: u64 = rflags::STATUS & 0xff;

extern "sysv64-unwind" fn lahf(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let flags = cpu.status() & LOW_STATUS | rflags::FIXED;
    set_ah(cpu, flags as u8);
    op.next(cpu)
}

extern "sysv64-unwind" fn sahf(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let low = cpu.regs[reg::RAX] >> 8 & LOW_STATUS;
    cpu.set_status(cpu.status() & !LOW_STATUS | low);
    op.next(cpu)
}

/// SALC, which is not documented: AL becomes all CF.
extern "sysv64-unwind" fn salc(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let value = if cpu.carry() { 0xff } else { 0 };
    u8::set(cpu, reg::RAX, value);
    op.next(cpu)
}

fn ah(cpu: &Cpu) -> u8 {
    (cpu.regs[reg::RAX] >> 8) as u8
}

fn set_ah(cpu: &mut Cpu, value: u8) {
    cpu.regs[reg::RAX] = cpu.regs[reg::RAX] & !0xff00 | u64::from(value) << 8;
}

/// CRC-32C (polynomial 0x11EDC6F41, bits reversed) of each byte value; Intel SDM vol. 2, CRC32.
static CRC32C: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 != 0 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

fn crc32c(crc: u32, value: u64, bytes: u64) -> u32 {
    (0..bytes).fold(crc, |crc, n| crc >> 8 ^ CRC32C[usize::from(crc as u8 ^ (value >> (8 * n)) as u8)])
}

/// CRC32; the destination is 32 or 64 bits wide, and its upper half is cleared in both cases.
extern "sysv64-unwind" fn crc_reg<T: Int>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let crc = crc32c(u32::read_reg(cpu, op.a), T::read_reg(cpu, op.b).into_u64(), T::SIZE);
    u32::write_reg(cpu, op.a, crc);
    op.next(cpu)
}

extern "sysv64-unwind" fn crc_mem<T: Int>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, T::SIZE, false));
    let value = attempt!(cpu, op, cpu.load::<T>(va)).into_u64();
    let crc = crc32c(u32::read_reg(cpu, op.a), value, T::SIZE);
    u32::write_reg(cpu, op.a, crc);
    op.next(cpu)
}

/// BOUND: #BR unless the signed index lies between the two words in memory; `size` is the operand size.
struct Bound;

impl Slow for Bound {
    fn execute(cpu: &mut Cpu, op: &Op) -> Result<Flow, Trap> {
        let size = u64::from(op.size);
        let va = cpu.ea::<GENERAL>(op, 2 * size, false)?;
        let upper = va.wrapping_add(size) & 0xffff_ffff;
        let (index, lowest, highest) = if op.size == 2 {
            (u16::read_reg(cpu, op.a).sign_extended(), cpu.load::<u16>(va)?.sign_extended(), cpu.load::<u16>(upper)?.sign_extended())
        } else {
            (u32::read_reg(cpu, op.a).sign_extended(), cpu.load::<u32>(va)?.sign_extended(), cpu.load::<u32>(upper)?.sign_extended())
        };
        let index = index as i64;
        if index < lowest as i64 || index > highest as i64 { Err(cpu.raise(vector::BR)) } else { Ok(Flow::Next) }
    }
}

/// SF, ZF and PF of AL, with the given CF and AF.
fn set_decimal_status(cpu: &mut Cpu, carry: bool, adjust: bool) {
    let al = u8::get(cpu, reg::RAX);
    cpu.status_flags = u8::and(al, al).1;
    let carries = if carry { rflags::CF } else { 0 } | if adjust { rflags::AF } else { 0 };
    cpu.set_status(cpu.status() & !(rflags::CF | rflags::AF) | carries);
}

/// AAA and AAS (Intel SDM vol. 2).
extern "sysv64-unwind" fn ascii_adjust<const SUBTRACT: bool>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let al = u8::get(cpu, reg::RAX);
    let adjust = al & 15 > 9 || cpu.status() & rflags::AF != 0;
    if adjust {
        let ax = u16::get(cpu, reg::RAX);
        u16::set(cpu, reg::RAX, if SUBTRACT { ax.wrapping_sub(0x106) } else { ax.wrapping_add(0x106) });
    }
    let digit = u8::get(cpu, reg::RAX) & 15;
    u8::set(cpu, reg::RAX, digit);
    set_decimal_status(cpu, adjust, adjust);
    op.next(cpu)
}

/// AAM: AL divided by the immediate, quotient to AH, remainder to AL.
extern "sysv64-unwind" fn aam(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let al = u8::get(cpu, reg::RAX);
    let base = op.imm as u8;
    if base == 0 {
        let trap = cpu.raise(vector::DE);
        return op.trap(cpu, trap);
    }
    set_ah(cpu, al / base);
    u8::set(cpu, reg::RAX, al % base);
    set_decimal_status(cpu, false, false);
    op.next(cpu)
}

/// AAD: AH times the immediate added to AL.
extern "sysv64-unwind" fn aad(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let al = u8::get(cpu, reg::RAX).wrapping_add(ah(cpu).wrapping_mul(op.imm as u8));
    u16::set(cpu, reg::RAX, u16::from(al));
    set_decimal_status(cpu, false, false);
    op.next(cpu)
}

/// DAA and DAS (Intel SDM vol. 2).
extern "sysv64-unwind" fn decimal_adjust<const SUBTRACT: bool>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let status = cpu.status();
    let (al, old_carry) = (u8::get(cpu, reg::RAX), status & rflags::CF != 0);
    let (result, carry, adjust) = adjusted::<SUBTRACT>(al, old_carry, status & rflags::AF != 0);
    u8::set(cpu, reg::RAX, result);
    set_decimal_status(cpu, carry, adjust);
    op.next(cpu)
}

/// AL, CF and AF after DAA or DAS.
fn adjusted<const SUBTRACT: bool>(al: u8, old_carry: bool, old_adjust: bool) -> (u8, bool, bool) {
    let step = |value: u8, by: u8| if SUBTRACT { value.overflowing_sub(by) } else { value.overflowing_add(by) };
    let adjust = al & 15 > 9 || old_adjust;
    let (mut result, mut carry) = (al, false);
    if adjust {
        let (value, overflow) = step(al, 6);
        (result, carry) = (value, old_carry || overflow);
    }
    if al > 0x99 || old_carry {
        (result, carry) = (step(result, 0x60).0, true);
    } else if !SUBTRACT {
        carry = false;
    }
    (result, carry, adjust)
}

/// Lowers the instructions of this module.
pub(super) fn lower(_low: &Lowering, insn: &Instruction, op: &mut Op) -> usize {
    op.run = match insn.mnemonic() {
        Mnemonic::Nop | Mnemonic::Reservednop | Mnemonic::Endbr32 | Mnemonic::Endbr64 => nothing,
        // No-operations on processors without shadow stacks.
        Mnemonic::Rdsspd | Mnemonic::Rdsspq => nothing,
        Mnemonic::Prefetch | Mnemonic::Prefetchw | Mnemonic::Prefetchwt1 | Mnemonic::Prefetchnta => nothing,
        Mnemonic::Prefetcht0 | Mnemonic::Prefetcht1 | Mnemonic::Prefetcht2 => nothing,
        Mnemonic::Lfence | Mnemonic::Sfence => nothing,
        Mnemonic::Mfence => full_fence,
        Mnemonic::Pause => pause,
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => flush_line,
        Mnemonic::Clc => clc,
        Mnemonic::Stc => stc,
        Mnemonic::Cmc => cmc,
        Mnemonic::Cld => cld,
        Mnemonic::Std => std,
        Mnemonic::Lahf => lahf,
        Mnemonic::Sahf => sahf,
        Mnemonic::Salc => salc,
        Mnemonic::Crc32 => {
            op.a = field(insn.op0_register());
            if kind(insn, 1) == Kind::Reg {
                op.b = field(insn.op1_register());
                by_size!(size(insn, 1), T => crc_reg::<T> as Handler)
            } else {
                by_size!(size(insn, 1), T => crc_mem::<T> as Handler)
            }
        }
        Mnemonic::Bound => {
            op.a = field(insn.op0_register());
            op.size = size(insn, 0) as u8;
            slow::<Bound>
        }
        Mnemonic::Aaa => ascii_adjust::<false>,
        Mnemonic::Aas => ascii_adjust::<true>,
        Mnemonic::Daa => decimal_adjust::<false>,
        Mnemonic::Das => decimal_adjust::<true>,
        Mnemonic::Aam => {
            op.imm = insn.immediate(0);
            aam
        }
        Mnemonic::Aad => {
            op.imm = insn.immediate(0);
            aad
        }
        _ => return 0,
    };
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_has_its_check_value() {
        let crc = b"123456789".iter().fold(u32::MAX, |crc, &byte| crc32c(crc, u64::from(byte), 1));
        assert_eq!(!crc, 0xe306_9283);
    }

    #[test]
    fn decimal_adjustment_follows_the_manual() {
        // 79 + 35 = 114: AL AEh, AF 0 (Intel SDM vol. 2, DAA).
        assert_eq!(adjusted::<false>(0xae, false, false), (0x14, true, true));
        // 35 - 47 = -12: AL EEh, CF 1, AF 1 (Intel SDM vol. 2, DAS).
        assert_eq!(adjusted::<true>(0xee, true, true), (0x88, true, true));
    }
}
