//! From bytes to blocks: instructions are decoded, and become ops.

use iced_x86::{Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, OpKind, Register};

use super::{Block, BlockCache, MAX_INSTRUCTIONS, MAX_LENGTH, PAGE, Second};
use crate::cpu::{CS, Cpu, DS, ES, FS, FS_BASE, GS, GS_BASE, RIP_BASE, SS, Width, ZERO};
use crate::mmu::{FLAT_BASE, FLAT_SIB, GENERAL};
use crate::op::{Op, Slow, Trap, end_of_block, slow};
use crate::{integer, native, system, translator};

/// What a lowering knows besides the instruction.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lowering {
    /// Code width.
    pub width: Width,
    /// Addressing form of the instruction's memory operand: `FLAT_BASE`, `FLAT_SIB` or `GENERAL`.
    pub ea: u8,
}

impl Cpu {
    /// Decodes the block at `gpa`, which the code runs at linear address `va`.
    pub(super) fn decode(&mut self, va: u64, gpa: u64, single: bool) -> Result<Block, Trap> {
        loop {
            let start = (gpa & (PAGE - 1)) as usize;
            // Executing where there is no memory: the bus floats high, and FF FF is no instruction.
            if self.vm.ram(gpa).is_none() {
                return Err(self.ud());
            }
            let (state, value) = self.watch_code(gpa, start, start + 1);
            let mut bytes = [0; (MAX_INSTRUCTIONS + 1) * MAX_LENGTH];
            let available = (PAGE as usize - start).min(MAX_INSTRUCTIONS * MAX_LENGTH);
            self.vm.read_page(gpa, start, &mut bytes[..available]);
            let limit = if single { 1 } else { MAX_INSTRUCTIONS };
            let mut block = match self.decode_bytes(&bytes[..available], limit) {
                Some(ops) => {
                    let len = ops.last().map_or(0, |op| op.start + u16::from(op.len));
                    let counts = self.width == Width::Bits64 && !single && self.vm.translate_after != u32::MAX;
                    let first = if counts { translator::warm } else { translator::named };
                    Block::new(first, ops, gpa, len, (state, value))
                }
                None => {
                    let next = self.fetch_address((va & !(PAGE - 1)).wrapping_add(PAGE))?;
                    if self.vm.ram(next).is_none() {
                        return Err(self.ud());
                    }
                    let (second_state, second_value) = self.watch_code(next, 0, MAX_LENGTH);
                    self.vm.read_page(next, 0, &mut bytes[available..available + MAX_LENGTH]);
                    // Fifteen more bytes complete any instruction; one that is longer is invalid and decodes as that.
                    let Some(ops) = self.decode_bytes(&bytes[..available + MAX_LENGTH], 1) else { return Err(self.ud()) };
                    let len = u16::from(ops[0].len).saturating_sub(available as u16);
                    let crosses = Some(Box::new(Second { gpa: next, len, state: second_state, value: second_value }));
                    Block { crosses, ..Block::new(translator::named, ops, gpa, available as u16, (state, value)) }
                }
            };
            let end = start + usize::from(block.len.max(1));
            let (_, value) = self.watch_code(gpa, start, end);
            block.value = value;
            // Somebody may have written between the reading and the watching of the later bytes.
            let mut again = [0; MAX_INSTRUCTIONS * MAX_LENGTH];
            self.vm.read_page(gpa, start, &mut again[..usize::from(block.len)]);
            if again[..usize::from(block.len)] == bytes[..usize::from(block.len)] && BlockCache::is_fresh(&block) {
                return Ok(block);
            }
        }
    }

    /// Decodes up to `limit` instructions; `None` when not even the first is complete.
    pub(super) fn decode_bytes(&mut self, bytes: &[u8], limit: usize) -> Option<Vec<Op>> {
        let bits = match self.width {
            Width::Bits16 => 16,
            Width::Bits32 => 32,
            Width::Bits64 => 64,
        };
        // Addresses in the decoded instructions are relative to the block's start.
        let mut decoder = Decoder::with_ip(bits, bytes, 0, DecoderOptions::NONE);
        let mut instructions: Vec<Instruction> = Vec::with_capacity(limit);
        while instructions.len() < limit && decoder.can_decode() {
            let instruction = decoder.decode();
            if decoder.last_error() == DecoderError::NoMoreBytes {
                break;
            }
            instructions.push(instruction);
            if instruction.is_invalid() || instruction.flow_control() != FlowControl::Next {
                break;
            }
        }
        if instructions.is_empty() { None } else { Some(self.lower(&instructions, bytes)) }
    }

    /// Turns instructions into ops and ends the block.
    fn lower(&mut self, instructions: &[Instruction], bytes: &[u8]) -> Vec<Op> {
        let mut ops = Vec::with_capacity(instructions.len() + 1);
        let mut done = 0;
        let mut leaves = false;
        while done < instructions.len() {
            let instruction = &instructions[done];
            let start = instruction.ip() as u16;
            let mut op = Op::new(slow::<Undefined>, start, instruction.len().max(1) as u8, done as u8 + 1);
            let lowering = Lowering { width: self.width, ea: memory_operand(instruction, self.width, &mut op) };
            let template = op;
            let mut taken = 0;
            if !instruction.is_invalid() {
                taken = integer::lower(&lowering, &instructions[done..], &mut op);
                // `integer::branch` never goes on to a next op.
                leaves = taken != 0 && instructions[done + taken - 1].flow_control() != FlowControl::Next;
                if taken == 0 {
                    op = template;
                    if system::lower(&lowering, instruction, &mut op) {
                        taken = 1;
                    }
                }
                if taken == 0 {
                    op = template;
                    let at = usize::from(start);
                    let raw = &bytes[at..at + instruction.len()];
                    if native::lower(&mut self.blocks.natives, &lowering, instruction, raw, &mut op) {
                        taken = 1;
                    }
                }
            }
            if taken == 0 {
                op = template;
                op.run = slow::<Undefined>;
                taken = 1;
            }
            op.count = taken as u8;
            op.seq = (done + taken) as u8;
            let last = &instructions[done + taken - 1];
            op.len = (last.ip() + last.len().max(1) as u64 - instruction.ip()) as u8;
            ops.push(op);
            done += taken;
        }
        if leaves {
            return ops;
        }
        let end = ops.last().map_or(0, |op| op.start + u16::from(op.len));
        let mut last = Op::new(end_of_block, end, 0, done as u8);
        last.count = 0;
        ops.push(last);
        ops
    }
}

/// An instruction that does not exist, or that this processor does not have.
struct Undefined;

impl Slow for Undefined {
    fn execute(cpu: &mut Cpu, _op: &Op) -> Result<crate::op::Flow, Trap> {
        Err(cpu.ud())
    }
}

/// Number of a segment register in encoding order.
fn segment_number(register: Register) -> usize {
    match register {
        Register::ES => ES,
        Register::CS => CS,
        Register::SS => SS,
        Register::FS => FS,
        Register::GS => GS,
        _ => DS,
    }
}

/// Fills the op's memory operand from the instruction and says which addressing form computes it fastest.
fn memory_operand(instruction: &Instruction, width: Width, op: &mut Op) -> u8 {
    let segment = match segment_number(instruction.memory_segment()) {
        segment @ (FS | GS) => segment,
        // 64-bit code ignores the other prefixes; which segment it is decides between #SS and #GP.
        _ if width == Width::Bits64 => match instruction.memory_base().full_register() {
            Register::RSP | Register::RBP => SS,
            _ => DS,
        },
        segment => segment,
    };
    op.seg = segment as u8;
    if !instruction.op_kinds().any(|kind| kind == OpKind::Memory) {
        return GENERAL;
    }
    let base = instruction.memory_base();
    let index = instruction.memory_index();
    let sized = if base != Register::None { base } else { index };
    op.addr_size = match sized {
        Register::None => match instruction.memory_displ_size() {
            2 => 2,
            4 => 4,
            _ => 8,
        },
        Register::RIP => 8,
        Register::EIP => 4,
        other => other.size() as u8,
    };
    // disp32 without registers in 64-bit code is sign extended to 64 bits; iced says 8 or 4 by the address size.
    op.disp = match op.addr_size {
        8 => instruction.memory_displacement64() as i64,
        4 => i64::from(instruction.memory_displacement32() as i32),
        _ => i64::from(instruction.memory_displacement32() as u16),
    };
    op.base = match base {
        Register::None => ZERO as u8,
        Register::RIP | Register::EIP => RIP_BASE as u8,
        register => register.number() as u8,
    };
    op.index = if index == Register::None { ZERO as u8 } else { index.number() as u8 };
    op.scale = instruction.memory_index_scale().trailing_zeros() as u8;
    op.seg_base = match segment {
        FS => FS_BASE as u8,
        GS => GS_BASE as u8,
        _ => ZERO as u8,
    };
    if width != Width::Bits64 || op.addr_size != 8 {
        GENERAL
    } else if index == Register::None && segment != FS && segment != GS {
        FLAT_BASE
    } else {
        FLAT_SIB
    }
}
