//! x87 arithmetic, loads and stores: the guest's whole area around one host instruction.
//!
//! The host's processor notes its own instruction and data pointers, so those fields go in as zero, and where they come out
//! changed they are replaced by the guest's: what is noted when (always, or only for unmasked exceptions) stays the processor's
//! choice (Intel SDM vol. 1 section 8.1.8). Selectors read as zero, as on every processor that has deprecated them.

use iced_x86::{Instruction, Mnemonic, OpKind, RflagsBits};

use super::access::{by_ea, check_pending, check_x87};
use super::area::x87;
use super::moves::register_number;
use super::thunk::Thunk;
use super::{Lowering, Natives};
use crate::cpu::{Cpu, cr0};
use crate::flags::StatusFlags;
use crate::op::{Cursor, Op, Outcome, Trap, attempt};

/// Bytes of the largest operand of a thunk, an extended real.
const OPERAND_BYTES: usize = 10;

/// What an op does besides the thunk, in `Op::a`.
mod plan {
    pub const LOAD: u8 = 1;
    pub const STORE: u8 = 2;
    pub const FLAGS: u8 = 4;
}

/// Any x87 instruction that computes.
extern "sysv64-unwind" fn any<const K: u8>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let rip = op.rip(cpu);
    attempt!(cpu, op, execute::<K>(cpu, &op, rip));
    op.next(cpu)
}

fn execute<const K: u8>(cpu: &mut Cpu, op: &Op, rip: u64) -> Result<(), Trap> {
    check_x87(cpu)?;
    check_pending(cpu)?;
    let size = usize::from(op.size).min(OPERAND_BYTES);
    let mut memory = [0; 16];
    if op.a & plan::LOAD != 0 {
        let va = cpu.ea::<K>(op, size as u64, false)?;
        match size {
            4 => memory[..4].copy_from_slice(&cpu.load::<u32>(va)?.to_le_bytes()),
            8 => memory[..8].copy_from_slice(&cpu.load::<u64>(va)?.to_le_bytes()),
            _ => cpu.load_bytes(va, &mut memory[..size])?,
        }
    }
    if op.a & plan::STORE != 0 {
        let va = cpu.ea::<K>(op, size as u64, true)?;
        return store(cpu, op, rip, va, size);
    }
    let status = cpu.status();
    let after = call(cpu, op, rip, &mut memory, status);
    if op.a & plan::FLAGS != 0 {
        cpu.status_flags = after;
    }
    Ok(())
}

/// Stores may fault after the thunk has popped the stack, so the registers are put back then.
fn store(cpu: &mut Cpu, op: &Op, rip: u64, va: u64, size: usize) -> Result<(), Trap> {
    /// Not what an instruction stores by chance: an unmasked exception leaves memory alone, and is recognised by this.
    const UNTOUCHED: [u8; 16] = [0xa5, 0x5a, 0xc3, 0x3c, 0x96, 0x69, 0xe1, 0x1e, 0xb4, 0x4b, 0xd2, 0x2d, 0x87, 0x78, 0xf0, 0x0f];
    let before = cpu.fx.clone();
    let mut memory = UNTOUCHED;
    call(cpu, op, rip, &mut memory, 0);
    if cpu.fx.fsw & x87::ES != 0 && memory == UNTOUCHED {
        return Ok(());
    }
    let stored = match size {
        4 => cpu.store(va, u32::from_le_bytes([memory[0], memory[1], memory[2], memory[3]])),
        8 => cpu.store(va, u64::from_le_bytes([memory[0], memory[1], memory[2], memory[3], memory[4], memory[5], memory[6], memory[7]])),
        _ => cpu.store_bytes(va, &memory[..size]),
    };
    if stored.is_err() {
        cpu.fx = before;
    }
    stored
}

/// Runs the op's thunk and settles what the host knows better than the guest should.
fn call(cpu: &mut Cpu, op: &Op, rip: u64, memory: &mut [u8; 16], status: u64) -> StatusFlags {
    // Only with CR0.NE clear is an exception pending here, and then it is ignored; the host must not see it.
    debug_assert!(cpu.fx.fsw & x87::ES == 0 || cpu.cr0 & cr0::NE == 0);
    let pending = if cpu.fx.fsw & x87::ES != 0 { cpu.fx.fsw & x87::FLAGS } else { 0 };
    cpu.fx.fsw &= !pending;
    let (fip, fdp, fop) = (cpu.fx.fip, cpu.fx.fdp, cpu.fx.fop);
    (cpu.fx.fip, cpu.fx.fdp, cpu.fx.fop) = (0, 0, 0);
    let after = Thunk::of(op).call_x87(&mut cpu.fx, memory, status);
    cpu.fx.fip = if cpu.fx.fip != 0 { rip } else { fip };
    cpu.fx.fdp = if cpu.fx.fdp != 0 { cpu.effective_address(op) } else { fdp };
    cpu.fx.fop = if cpu.fx.fop != 0 { op.aux } else { fop };
    if pending != 0 {
        cpu.fx.fsw |= pending;
        cpu.fx.settle_summary();
    }
    after
}

/// Takes the instruction if an x87 thunk can execute it.
pub(super) fn lower(natives: &mut Natives, l: &Lowering, insn: &Instruction, bytes: &[u8], op: &mut Op) -> bool {
    let Some(opcode) = opcode(bytes) else { return false };
    let register = register_number(insn.op0_register()).max(register_number(insn.op1_register()));
    let Some(thunk) = natives.x87_thunk(insn, register) else { return false };
    op.run = by_ea!(l.ea, any);
    op.imm = thunk.address();
    op.aux = opcode;
    op.a = 0;
    if insn.op0_kind() == OpKind::Memory {
        op.size = insn.memory_size().size() as u8;
        op.a = if is_store(insn.mnemonic()) { plan::STORE } else { plan::LOAD };
    }
    if insn.rflags_modified() & RflagsBits::CF != 0 {
        op.a |= plan::FLAGS;
    }
    true
}

fn is_store(mnemonic: Mnemonic) -> bool {
    matches!(mnemonic, Mnemonic::Fst | Mnemonic::Fstp | Mnemonic::Fist | Mnemonic::Fistp | Mnemonic::Fisttp | Mnemonic::Fbstp)
}

/// The 11 bits that the processor notes of an x87 instruction: the escape opcode's low three, and the ModRM byte. `None` for
/// other instructions.
fn opcode(bytes: &[u8]) -> Option<u16> {
    // REX prefixes exist in 64-bit code only; elsewhere those bytes are whole instructions, never followed by an escape opcode.
    let is_prefix = |b: u8| matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf2 | 0xf3);
    let at = bytes.iter().position(|&b| !is_prefix(b))?;
    let (escape, modrm) = (bytes[at], *bytes.get(at + 1)?);
    (escape & 0xf8 == 0xd8).then_some(u16::from(escape & 7) << 8 | u16::from(modrm))
}
