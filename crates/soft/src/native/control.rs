//! Instructions that load, store and initialise x87, MMX and SSE state as such.
//!
//! Those whose name has an N do not wait for a pending x87 exception; the loads of environments do (Intel SDM vol. 1 section
//! 8.6). Selectors of the last instruction and operand are neither kept nor stored, as on processors that have deprecated them
//! (CPUID.7:EBX bit 13).

use iced_x86::{Code, Instruction};

use super::Lowering;
use super::access::{check_mmx, check_pending, check_sse, check_x87};
use super::area::{FXSAVE_USED, FxArea, x87};
use super::moves::register_number;
use crate::cpu::{Cpu, REG_MASK, Width, cr0, vector};
use crate::mmu::{FLAT_BASE, FLAT_SIB, GENERAL};
use crate::op::{Cursor, Handler, Op, Outcome, Trap, attempt};

/// Bytes of FXSAVE's area.
const FXSAVE_BYTES: usize = 512;
/// Where XMM8 starts in it; only 64-bit code has the registers from there on.
const FXSAVE_XMM8: usize = 288;
/// Bytes of an x87 environment in 16-bit and in 32-bit format.
const ENVIRONMENT_16: usize = 14;
const ENVIRONMENT_32: usize = 28;
/// Bytes of the eight x87 registers without padding.
const STACK_BYTES: usize = 80;
/// Bytes of an extended real.
const REAL_BYTES: usize = 10;

fn fninit(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    check_x87(cpu)?;
    cpu.fx.initialize_x87();
    Ok(())
}

fn fnclex(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    check_x87(cpu)?;
    cpu.fx.fsw &= !(x87::FLAGS | x87::SF | x87::ES | x87::BUSY);
    Ok(())
}

/// FNENI, FNDISI and FNSETPM, which do nothing since the 80387.
fn nothing(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    check_x87(cpu)
}

fn wait(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    if cpu.cr0 & cr0::MP != 0 && cpu.cr0 & cr0::TS != 0 {
        return Err(cpu.raise(vector::NM));
    }
    check_pending(cpu)
}

fn emms(cpu: &mut Cpu, _: &Op) -> Result<(), Trap> {
    check_mmx(cpu)?;
    cpu.fx.enter_mmx();
    cpu.fx.ftw = 0;
    Ok(())
}

fn fnstsw_ax(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_x87(cpu)?;
    let ax = &mut cpu.regs[usize::from(op.a) & REG_MASK];
    *ax = *ax & !0xffff | u64::from(cpu.fx.fsw);
    Ok(())
}

fn fnstsw<const K: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_x87(cpu)?;
    let va = cpu.ea::<K>(op, 2, true)?;
    cpu.store(va, cpu.fx.fsw)
}

fn fnstcw<const K: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_x87(cpu)?;
    let va = cpu.ea::<K>(op, 2, true)?;
    cpu.store(va, cpu.fx.fcw)
}

fn fldcw<const K: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_x87(cpu)?;
    check_pending(cpu)?;
    let va = cpu.ea::<K>(op, 2, false)?;
    let value = cpu.load(va)?;
    cpu.fx.set_control(value);
    Ok(())
}

fn fnstenv<const K: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_x87(cpu)?;
    let size = environment_size(op);
    let va = cpu.ea::<K>(op, size as u64, true)?;
    check_ends(cpu, va, size, true)?;
    let environment = environment(&cpu.fx, size, cpu.protected());
    cpu.store_bytes(va, &environment[..size])?;
    cpu.fx.fcw |= x87::FLAGS;
    cpu.fx.settle_summary();
    Ok(())
}

fn fldenv<const K: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_x87(cpu)?;
    check_pending(cpu)?;
    let size = environment_size(op);
    let va = cpu.ea::<K>(op, size as u64, false)?;
    check_ends(cpu, va, size, false)?;
    let mut bytes = [0; ENVIRONMENT_32];
    cpu.load_bytes(va, &mut bytes[..size])?;
    let protected = cpu.protected();
    load_environment(&mut cpu.fx, &bytes[..size], protected);
    Ok(())
}

fn fnsave<const K: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_x87(cpu)?;
    let size = environment_size(op);
    let va = cpu.ea::<K>(op, (size + STACK_BYTES) as u64, true)?;
    check_ends(cpu, va, size + STACK_BYTES, true)?;
    let mut bytes = [0; ENVIRONMENT_32 + STACK_BYTES];
    bytes[..size].copy_from_slice(&environment(&cpu.fx, size, cpu.protected())[..size]);
    for (slot, [significand, exponent]) in bytes[size..].chunks_exact_mut(REAL_BYTES).zip(cpu.fx.st) {
        slot[..8].copy_from_slice(&significand.to_le_bytes());
        slot[8..].copy_from_slice(&(exponent as u16).to_le_bytes());
    }
    cpu.store_bytes(va, &bytes[..size + STACK_BYTES])?;
    cpu.fx.initialize_x87();
    Ok(())
}

fn frstor<const K: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_x87(cpu)?;
    check_pending(cpu)?;
    let size = environment_size(op);
    let va = cpu.ea::<K>(op, (size + STACK_BYTES) as u64, false)?;
    check_ends(cpu, va, size + STACK_BYTES, false)?;
    let mut bytes = [0; ENVIRONMENT_32 + STACK_BYTES];
    cpu.load_bytes(va, &mut bytes[..size + STACK_BYTES])?;
    let protected = cpu.protected();
    load_environment(&mut cpu.fx, &bytes[..size], protected);
    for (register, slot) in cpu.fx.st.iter_mut().zip(bytes[size..].chunks_exact(REAL_BYTES)) {
        *register = [little_endian(&slot[..8]), little_endian(&slot[8..])];
    }
    Ok(())
}

fn fxsave<const WIDE: bool, const K: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let va = fxsave_address::<K>(cpu, op, true)?;
    let mut bytes = cpu.fx.to_bytes();
    if !WIDE {
        // The upper halves of the pointers are selectors.
        bytes[12..16].fill(0);
        bytes[20..24].fill(0);
    }
    let used = if cpu.width == Width::Bits64 { FXSAVE_USED } else { FXSAVE_XMM8 };
    cpu.store_bytes(va, &bytes[..used])
}

fn fxrstor<const WIDE: bool, const K: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let va = fxsave_address::<K>(cpu, op, false)?;
    let mut bytes = [0; FXSAVE_BYTES];
    cpu.load_bytes(va, &mut bytes)?;
    if !WIDE {
        bytes[12..16].fill(0);
        bytes[20..24].fill(0);
    }
    if cpu.width != Width::Bits64 {
        bytes[FXSAVE_XMM8..FXSAVE_USED].copy_from_slice(&cpu.fx.to_bytes()[FXSAVE_XMM8..FXSAVE_USED]);
    }
    if cpu.fx.load_bytes(&bytes) { Ok(()) } else { Err(cpu.gp()) }
}

fn fxsave_address<const K: u8>(cpu: &mut Cpu, op: &Op, write: bool) -> Result<u64, Trap> {
    check_x87(cpu)?;
    let va = cpu.ea::<K>(op, FXSAVE_BYTES as u64, write)?;
    if va % 16 != 0 {
        return Err(cpu.gp());
    }
    // Here the last byte comes first, also of what FXSAVE leaves to software.
    check_byte(cpu, va.wrapping_add(FXSAVE_BYTES as u64 - 1), write)?;
    Ok(va)
}

fn ldmxcsr<const K: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_sse(cpu)?;
    let va = cpu.ea::<K>(op, 4, false)?;
    let value = cpu.load::<u32>(va)?;
    if value & !cpu.fx.mxcsr_mask != 0 {
        return Err(cpu.gp());
    }
    cpu.fx.mxcsr = value;
    Ok(())
}

fn stmxcsr<const K: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    check_sse(cpu)?;
    let va = cpu.ea::<K>(op, 4, true)?;
    cpu.store(va, cpu.fx.mxcsr)
}

/// CLFLUSH, CLFLUSHOPT and CLWB: guest memory is coherent anyway, so only the address is checked, as for a load of a byte. No
/// byte is loaded: device registers may change by it.
fn flush_line<const K: u8>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
    let va = cpu.ea::<K>(op, 1, false)?;
    cpu.host_slice(va, 1, false)?;
    Ok(())
}

/// Faults where the first or the last byte of an x87 environment does; the processor looks at both before it begins.
fn check_ends(cpu: &mut Cpu, va: u64, size: usize, write: bool) -> Result<(), Trap> {
    check_byte(cpu, va, write)?;
    check_byte(cpu, va.wrapping_add(size as u64 - 1), write)
}

fn check_byte(cpu: &mut Cpu, va: u64, write: bool) -> Result<(), Trap> {
    if write { cpu.check_write(va, 1) } else { cpu.host_slice(va, 1, false).map(drop) }
}

/// FNSAVE's environment is FNSTENV's.
fn environment_size(op: &Op) -> usize {
    if op.size == ENVIRONMENT_32 as u8 { ENVIRONMENT_32 } else { ENVIRONMENT_16 }
}

/// The environment in its first `size` bytes (Intel SDM vol. 1 figures 8-9 to 8-12).
fn environment(fx: &FxArea, size: usize, protected: bool) -> [u8; ENVIRONMENT_32] {
    let (fip, fdp, fop) = (fx.fip as u32, fx.fdp as u32, u32::from(fx.fop));
    let tags = tag_word(fx);
    let control = [u32::from(fx.fcw), u32::from(fx.fsw), u32::from(tags)];
    let pointers = match (size, protected) {
        (ENVIRONMENT_32, true) => [fip, fop << 16, fdp, 0xffff_0000],
        (ENVIRONMENT_32, false) => [0xffff_0000 | fip & 0xffff, (fip >> 16) << 12 | fop, 0xffff_0000 | fdp & 0xffff, (fdp >> 16) << 12],
        (_, true) => [fip, 0, fdp, 0],
        (_, false) => [fip, (fip >> 16 & 15) << 12 | fop, fdp, (fdp >> 16 & 15) << 12],
    };
    let mut bytes = [0; ENVIRONMENT_32];
    if size == ENVIRONMENT_32 {
        let words = control.map(|w| 0xffff_0000 | w).into_iter().chain(pointers);
        for (slot, word) in bytes.chunks_exact_mut(4).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
    } else {
        for (slot, word) in bytes.chunks_exact_mut(2).zip(control.into_iter().chain(pointers)) {
            slot.copy_from_slice(&(word as u16).to_le_bytes());
        }
    }
    bytes
}

fn load_environment(fx: &mut FxArea, bytes: &[u8], protected: bool) {
    let wide = bytes.len() == ENVIRONMENT_32;
    let word = |n: usize| if wide { little_endian(&bytes[4 * n..4 * n + 4]) } else { little_endian(&bytes[2 * n..2 * n + 2]) };
    let (high_ip, high_dp) = (word(4), word(6));
    fx.ftw = abridged(word(2) as u16);
    (fx.fip, fx.fdp, fx.fop) = match (wide, protected) {
        (true, true) => (word(3), word(5), (high_ip >> 16) as u16),
        // This format has no room for the opcode.
        (false, true) => (word(3), word(5), 0),
        (true, false) => {
            (word(3) & 0xffff | (high_ip >> 12 & 0xffff) << 16, word(5) & 0xffff | (high_dp >> 12 & 0xffff) << 16, high_ip as u16)
        }
        (false, false) => (word(3) | (high_ip >> 12) << 16, word(5) | (high_dp >> 12) << 16, high_ip as u16),
    };
    fx.fop &= 0x7ff;
    fx.set_control(word(0) as u16);
    fx.set_status(word(1) as u16);
}

/// The full tag word: for each physical register 0 valid, 1 zero, 2 special, 3 empty (Intel SDM vol. 1 section 8.1.7).
fn tag_word(fx: &FxArea) -> u16 {
    let top = fx.top();
    (0..8).fold(0, |tags, physical| {
        let [significand, exponent] = fx.st[(physical + 8 - top) & 7];
        let exponent = exponent & 0x7fff;
        let tag = if fx.ftw >> physical & 1 == 0 {
            3
        } else if exponent == 0 && significand == 0 {
            1
        } else if exponent == 0 || exponent == 0x7fff || significand >> 63 == 0 {
            2
        } else {
            0
        };
        tags | tag << (2 * physical)
    })
}

/// One bit for each register that a full tag word does not call empty.
fn abridged(tags: u16) -> u8 {
    (0..8).fold(0, |bits, physical| bits | u8::from(tags >> (2 * physical) & 3 != 3) << physical)
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// Takes the instruction if it is one of this file's.
pub(super) fn lower(l: &Lowering, insn: &Instruction, op: &mut Op) -> bool {
    use Code::*;
    /// The handler that calls a function of this file and goes on.
    macro_rules! run {
        ($($function:tt)+) => {{
            extern "sysv64-unwind" fn handler(cpu: &mut Cpu, op: Cursor) -> Outcome {
                attempt!(cpu, op, $($function)+(cpu, &op));
                op.next(cpu)
            }
            handler
        }};
    }
    macro_rules! memory {
        ($function:ident $(, $argument:literal)*) => {
            match l.ea {
                FLAT_BASE => run!($function::<$($argument,)* { FLAT_BASE }>),
                FLAT_SIB => run!($function::<$($argument,)* { FLAT_SIB }>),
                _ => run!($function::<$($argument,)* { GENERAL }>),
            }
        };
    }
    let run: Handler = match insn.code() {
        Fninit => run!(fninit),
        Fnclex => run!(fnclex),
        Fneni | Fndisi | Fnsetpm => run!(nothing),
        Wait => run!(wait),
        Emms => run!(emms),
        Fnstsw_AX => run!(fnstsw_ax),
        Fnstsw_m2byte => memory!(fnstsw),
        Fnstcw_m2byte => memory!(fnstcw),
        Fldcw_m2byte => memory!(fldcw),
        Fnstenv_m14byte | Fnstenv_m28byte => memory!(fnstenv),
        Fldenv_m14byte | Fldenv_m28byte => memory!(fldenv),
        Fnsave_m94byte | Fnsave_m108byte => memory!(fnsave),
        Frstor_m94byte | Frstor_m108byte => memory!(frstor),
        Fxsave_m512byte => memory!(fxsave, false),
        Fxsave64_m512byte => memory!(fxsave, true),
        Fxrstor_m512byte => memory!(fxrstor, false),
        Fxrstor64_m512byte => memory!(fxrstor, true),
        Ldmxcsr_m32 => memory!(ldmxcsr),
        Stmxcsr_m32 => memory!(stmxcsr),
        Clflush_m8 | Clflushopt_m8 | Clwb_m8 => memory!(flush_line),
        _ => return false,
    };
    op.run = run;
    op.a = register_number(insn.op0_register());
    op.size = match insn.code() {
        Fnstenv_m28byte | Fldenv_m28byte | Fnsave_m108byte | Frstor_m108byte => ENVIRONMENT_32 as u8,
        _ => ENVIRONMENT_16 as u8,
    };
    true
}
