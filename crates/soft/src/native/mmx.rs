//! MMX moves and the stores under a byte mask.
//!
//! Every instruction with an MMX register makes TOP zero and all x87 registers valid (Intel SDM vol. 1 section 9.5.1).

use iced_x86::{Code, Instruction, OpKind};

use super::Lowering;
use super::access::{by_ea, check_mmx, check_sse, load_word, store_word};
use super::moves::register_number;
use super::xmm::halves;
use crate::cpu::{Cpu, REG_MASK};
use crate::op::{Cursor, Handler, Op, Outcome, Trap, attempt};

/// Index of RDI in `Cpu::regs`.
const RDI: u8 = 7;

/// mm, mm
extern "sysv64-unwind" fn registers(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_mmx(cpu));
    cpu.fx.enter_mmx();
    cpu.fx.set_mm(op.a, cpu.fx.mm(op.b));
    op.next(cpu)
}

/// mm, m32 or m64
extern "sysv64-unwind" fn load<const SIZE: u64, const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_mmx(cpu));
    let va = attempt!(cpu, op, cpu.ea::<K>(&op, SIZE, false));
    let value = attempt!(cpu, op, load_word(cpu, va, SIZE));
    cpu.fx.enter_mmx();
    cpu.fx.set_mm(op.a, value);
    op.next(cpu)
}

/// m32 or m64, mm
extern "sysv64-unwind" fn store<const SIZE: u64, const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_mmx(cpu));
    let va = attempt!(cpu, op, cpu.ea::<K>(&op, SIZE, true));
    cpu.fx.clear_top();
    attempt!(cpu, op, store_word(cpu, va, SIZE, cpu.fx.mm(op.b)));
    cpu.fx.enter_mmx();
    op.next(cpu)
}

/// mm, r32 or r64
extern "sysv64-unwind" fn from_general<const MASK: u64>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_mmx(cpu));
    cpu.fx.enter_mmx();
    cpu.fx.set_mm(op.a, cpu.regs[usize::from(op.b) & REG_MASK] & MASK);
    op.next(cpu)
}

/// r32 or r64, mm
extern "sysv64-unwind" fn to_general<const MASK: u64>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_mmx(cpu));
    cpu.fx.enter_mmx();
    cpu.regs[usize::from(op.a) & REG_MASK] = cpu.fx.mm(op.b) & MASK;
    op.next(cpu)
}

/// MASKMOVDQU xmm, xmm
extern "sysv64-unwind" fn masked_xmm(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_sse(cpu));
    let (data, mask) = (halves(cpu.fx.x(op.a)), halves(cpu.fx.x(op.b)));
    attempt!(cpu, op, store_masked(cpu, &op, &data, &mask));
    op.next(cpu)
}

/// MASKMOVQ mm, mm
extern "sysv64-unwind" fn masked_mm(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, check_mmx(cpu));
    cpu.fx.enter_mmx();
    let (data, mask) = ([cpu.fx.mm(op.a)], [cpu.fx.mm(op.b)]);
    attempt!(cpu, op, store_masked(cpu, &op, &data, &mask));
    op.next(cpu)
}

/// Stores the bytes whose mask byte has its sign set. Which bytes are selected does not matter for faults: the processor looks at
/// the whole operand first, its high half before its low one.
fn store_masked(cpu: &mut Cpu, op: &Op, data: &[u64], mask: &[u64]) -> Result<(), Trap> {
    let start = cpu.effective_address(op);
    // The operand may wrap at the address size.
    let address = |cpu: &mut Cpu, at: u64, size: u64| {
        let offset = start.wrapping_add(at) & (u64::MAX >> (64 - 8 * u32::from(op.addr_size)));
        cpu.linear(usize::from(op.seg), offset, size, true)
    };
    for half in (0..data.len() as u64).rev() {
        let va = address(cpu, 8 * half, 8)?;
        cpu.check_write(va, 8)?;
    }
    let bytes = data.iter().zip(mask).flat_map(|(data, mask)| data.to_le_bytes().into_iter().zip(mask.to_le_bytes()));
    for (at, (byte, mask)) in (0..).zip(bytes) {
        if mask & 0x80 != 0 {
            let va = address(cpu, at, 1)?;
            cpu.store(va, byte)?;
        }
    }
    Ok(())
}

/// Takes the instruction if it is one of this file's.
pub(super) fn lower(l: &Lowering, insn: &Instruction, op: &mut Op) -> bool {
    use Code::*;
    let ea = l.ea;
    let loads = insn.op1_kind() == OpKind::Memory;
    let stores = insn.op0_kind() == OpKind::Memory;
    let run: Handler = match insn.code() {
        Movq_mm_mmm64 | Movq_mm_rm64 if loads => by_ea!(ea, load, 8),
        Movd_mm_rm32 if loads => by_ea!(ea, load, 4),
        Movq_mmm64_mm | Movq_rm64_mm | Movntq_m64_mm if stores => by_ea!(ea, store, 8),
        Movd_rm32_mm if stores => by_ea!(ea, store, 4),
        Movq_mm_mmm64 | Movq_mmm64_mm => registers,
        Movd_mm_rm32 => from_general::<0xffff_ffff>,
        Movq_mm_rm64 => from_general::<{ u64::MAX }>,
        Movd_rm32_mm => to_general::<0xffff_ffff>,
        Movq_rm64_mm => to_general::<{ u64::MAX }>,
        Maskmovq_rDI_mm_mm | Maskmovdqu_rDI_xmm_xmm => {
            // The address is no operand in the encoding: DS:rDI, where the segment can be overridden.
            op.base = RDI;
            op.addr_size = match insn.op0_kind() {
                OpKind::MemorySegRDI => 8,
                OpKind::MemorySegEDI => 4,
                _ => 2,
            };
            op.seg = register_number(insn.memory_segment());
            op.a = register_number(insn.op1_register());
            op.b = register_number(insn.op2_register());
            op.run = if insn.code() == Maskmovq_rDI_mm_mm { masked_mm } else { masked_xmm };
            return true;
        }
        _ => return false,
    };
    op.run = run;
    op.a = register_number(insn.op0_register());
    op.b = register_number(insn.op1_register());
    true
}
