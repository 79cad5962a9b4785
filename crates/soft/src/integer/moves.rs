//! Data movement: MOV and its relatives, LEA, CMOVcc, SETcc, sign extensions.

use iced_x86::{ConditionCode, Instruction, Mnemonic};

use super::branch::condition_code;
use super::memory::{operand, store_operand};
use super::operand::{Int, Kind, by_ea, by_size, by_wide_size, field, kind, reg, size};
use crate::block::Lowering;
use crate::cpu::{Cpu, REG_MASK};
use crate::mmu::{FLAT_BASE, FLAT_SIB, GENERAL};
use crate::op::{Cursor, Handler, Op, Outcome, attempt};

extern "sysv64-unwind" fn mov_reg<T: Int>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let value = T::read_reg(cpu, op.b);
    T::write_reg(cpu, op.a, value);
    op.next(cpu)
}

extern "sysv64-unwind" fn mov_imm<T: Int>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    T::write_reg(cpu, op.a, T::from_u64(op.imm));
    op.next(cpu)
}

extern "sysv64-unwind" fn load<T: Int, const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let value = operand!(cpu, op, T, K, load::<T, GENERAL>);
    T::write_reg(cpu, op.a, value);
    op.next(cpu)
}

extern "sysv64-unwind" fn store<T: Int, const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let value = T::read_reg(cpu, op.b);
    store_operand!(cpu, op, T, K, value, store::<T, GENERAL>);
    op.next(cpu)
}

extern "sysv64-unwind" fn store_imm<T: Int, const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    store_operand!(cpu, op, T, K, T::from_u64(op.imm), store_imm::<T, GENERAL>);
    op.next(cpu)
}

/// MOVZX (and MOVSX with `SIGNED`) from a register; `S` is the source's size, `D` the destination's.
extern "sysv64-unwind" fn extend_reg<S: Int, D: Int, const SIGNED: bool>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let value = S::read_reg(cpu, op.b);
    D::write_reg(cpu, op.a, D::from_u64(if SIGNED { value.sign_extended() } else { value.into_u64() }));
    op.next(cpu)
}

extern "sysv64-unwind" fn extend_mem<S: Int, D: Int, const SIGNED: bool, const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let value = operand!(cpu, op, S, K, extend_mem::<S, D, SIGNED, GENERAL>);
    D::write_reg(cpu, op.a, D::from_u64(if SIGNED { value.sign_extended() } else { value.into_u64() }));
    op.next(cpu)
}

/// LEA in the given addressing kind; FS and GS bases do not count.
extern "sysv64-unwind" fn lea<T: Int, const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let base = cpu.regs[usize::from(op.base) & REG_MASK];
    let address = match K {
        FLAT_BASE => base.wrapping_add(op.disp as u64),
        FLAT_SIB => {
            let index = cpu.regs[usize::from(op.index) & REG_MASK] << (op.scale & 3);
            base.wrapping_add(index).wrapping_add(op.disp as u64)
        }
        _ => cpu.effective_address(&op),
    };
    T::write_reg(cpu, op.a, T::from_u64(address));
    op.next(cpu)
}

/// CMOVcc writes its destination in any case: a 32-bit one loses its upper half.
extern "sysv64-unwind" fn cmov_reg<T: Int>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let source = if cpu.condition(op.aux as u8) { op.b } else { op.a };
    let value = T::read_reg(cpu, source);
    T::write_reg(cpu, op.a, value);
    op.next(cpu)
}

/// CMOVcc loads in any case.
extern "sysv64-unwind" fn cmov_mem<T: Int, const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let loaded = operand!(cpu, op, T, K, cmov_mem::<T, GENERAL>);
    let value = if cpu.condition(op.aux as u8) { loaded } else { T::read_reg(cpu, op.a) };
    T::write_reg(cpu, op.a, value);
    op.next(cpu)
}

extern "sysv64-unwind" fn set_reg(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let value = u8::from(cpu.condition(op.aux as u8));
    u8::write_reg(cpu, op.a, value);
    op.next(cpu)
}

extern "sysv64-unwind" fn set_mem(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, 1, true));
    attempt!(cpu, op, cpu.store(va, u8::from(cpu.condition(op.aux as u8))));
    op.next(cpu)
}

fn reverse<T: Int>(value: T) -> T {
    T::from_u64(value.into_u64().swap_bytes() >> (64 - T::BITS))
}

/// BSWAP; of a 16-bit register it is undefined, and processors clear the register.
extern "sysv64-unwind" fn bswap<T: Int>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let value = T::read_reg(cpu, op.a);
    T::write_reg(cpu, op.a, if T::SIZE == 2 { T::default() } else { reverse(value) });
    op.next(cpu)
}

extern "sysv64-unwind" fn load_reversed<T: Int>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, T::SIZE, false));
    let value = attempt!(cpu, op, cpu.load::<T>(va));
    T::write_reg(cpu, op.a, reverse(value));
    op.next(cpu)
}

extern "sysv64-unwind" fn store_reversed<T: Int>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let va = attempt!(cpu, op, cpu.ea::<GENERAL>(&op, T::SIZE, true));
    attempt!(cpu, op, cpu.store(va, reverse(T::read_reg(cpu, op.b))));
    op.next(cpu)
}

/// CBW, CWDE, CDQE: the accumulator's lower half `S`, sign-extended.
extern "sysv64-unwind" fn extend_accumulator<S: Int, D: Int>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let value = S::get(cpu, reg::RAX).sign_extended();
    D::set(cpu, reg::RAX, D::from_u64(value));
    op.next(cpu)
}

/// CWD, CDQ, CQO: the accumulator's sign, into all bits of (R/E)DX.
extern "sysv64-unwind" fn extend_into_rdx<T: Int>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let sign = (T::get(cpu, reg::RAX).sign_extended() as i64 >> 63) as u64;
    T::set(cpu, reg::RDX, T::from_u64(sign));
    op.next(cpu)
}

/// XLAT: AL from the table at (R/E)BX. The lowering has put the address size into the op.
extern "sysv64-unwind" fn xlat(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let index = u64::from(u8::get(cpu, reg::RAX));
    let mask = u64::MAX >> (64 - 8 * u32::from(op.addr_size));
    let offset = cpu.regs[reg::RBX].wrapping_add(index) & mask;
    let va = attempt!(cpu, op, cpu.linear(usize::from(op.seg), offset, 1, false));
    let value = attempt!(cpu, op, cpu.load::<u8>(va));
    u8::set(cpu, reg::RAX, value);
    op.next(cpu)
}

/// Lowers the instructions of this module.
pub(super) fn lower(low: &Lowering, insn: &Instruction, op: &mut Op) -> usize {
    let (first, second) = (kind(insn, 0), kind(insn, 1));
    if first == Kind::Reg {
        op.a = field(insn.op0_register());
    }
    if second == Kind::Reg {
        op.b = field(insn.op1_register());
    }
    // Jcc and LOOPcc have neither a register nor memory.
    let conditional = insn.condition_code() != ConditionCode::None && matches!(first, Kind::Reg | Kind::Mem);
    let (set, cmov) = (conditional && insn.op_count() == 1, conditional && insn.op_count() == 2);
    if conditional {
        op.aux = u16::from(condition_code(insn));
    }
    op.run = match insn.mnemonic() {
        Mnemonic::Mov => match mov(low, insn, op) {
            Some(handler) => handler,
            None => return 0,
        },
        Mnemonic::Movnti => by_ea!(low.ea, K => by_wide_size!(size(insn, 0), T => store::<T, K> as Handler)),
        Mnemonic::Movzx => extension::<false>(low, insn),
        Mnemonic::Movsx | Mnemonic::Movsxd => extension::<true>(low, insn),
        Mnemonic::Lea => by_ea!(low.ea, K => by_wide_size!(size(insn, 0), T => lea::<T, K> as Handler)),
        Mnemonic::Bswap => by_wide_size!(size(insn, 0), T => bswap::<T> as Handler),
        Mnemonic::Movbe if first == Kind::Reg => {
            by_wide_size!(size(insn, 0), T => load_reversed::<T> as Handler)
        }
        Mnemonic::Movbe => by_wide_size!(size(insn, 1), T => store_reversed::<T> as Handler),
        Mnemonic::Cbw => extend_accumulator::<u8, u16>,
        Mnemonic::Cwde => extend_accumulator::<u16, u32>,
        Mnemonic::Cdqe => extend_accumulator::<u32, u64>,
        Mnemonic::Cwd => extend_into_rdx::<u16>,
        Mnemonic::Cdq => extend_into_rdx::<u32>,
        Mnemonic::Cqo => extend_into_rdx::<u64>,
        Mnemonic::Xlatb => {
            op.addr_size = insn.memory_base().size() as u8;
            xlat
        }
        _ if set && first == Kind::Reg => set_reg,
        _ if set => set_mem,
        _ if cmov && second == Kind::Reg => by_wide_size!(size(insn, 0), T => cmov_reg::<T> as Handler),
        _ if cmov => by_ea!(low.ea, K => by_wide_size!(size(insn, 0), T => cmov_mem::<T, K> as Handler)),
        _ => return 0,
    };
    1
}

/// MOV between general registers, memory and immediates; segment, control and debug registers are not ours.
fn mov(low: &Lowering, insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let size = size(insn, 0);
    Some(match (kind(insn, 0), kind(insn, 1)) {
        (Kind::Reg, Kind::Reg) => by_size!(size, T => mov_reg::<T>),
        (Kind::Reg, Kind::Imm) => {
            op.imm = insn.immediate(1);
            by_size!(size, T => mov_imm::<T>)
        }
        (Kind::Reg, Kind::Mem) => by_ea!(low.ea, K => by_size!(size, T => load::<T, K>)),
        (Kind::Mem, Kind::Reg) => by_ea!(low.ea, K => by_size!(size, T => store::<T, K>)),
        (Kind::Mem, Kind::Imm) => {
            op.imm = insn.immediate(1);
            by_ea!(low.ea, K => by_size!(size, T => store_imm::<T, K>))
        }
        _ => return None,
    })
}

fn extension<const SIGNED: bool>(low: &Lowering, insn: &Instruction) -> Handler {
    let (to, from) = (size(insn, 0), size(insn, 1));
    macro_rules! by_source {
        ($s:ident => $e:expr) => {
            match from {
                1 => {
                    type $s = u8;
                    $e
                }
                2 => {
                    type $s = u16;
                    $e
                }
                _ => {
                    type $s = u32;
                    $e
                }
            }
        };
    }
    if kind(insn, 1) == Kind::Reg {
        by_source!(S => by_wide_size!(to, D => extend_reg::<S, D, SIGNED>))
    } else {
        by_ea!(low.ea, K => by_source!(S => by_wide_size!(to, D => extend_mem::<S, D, SIGNED, K>)))
    }
}
