//! Translations of what moves the stack pointer, and of jumps, calls and returns.

use iced_x86::{Instruction, OpKind};

use super::code::{AX, CX, DX, Place};
use super::emit::{Emitter, Miss, guest};
use super::lower::{After, Item, Operand, number, operand};
use super::window::Key;
use crate::cpu::{RIP_BASE, ZERO};
use crate::integer::condition_code;

const RSP: u8 = 4;
const RBP: u8 = 5;
/// The stack.
const STACK: Key = Key { base: RSP, segment: ZERO as u8 };

/// How far from the block's start a direct branch leads. `None` for one with a 16-bit target.
fn target_distance(insn: &Instruction) -> Option<i32> {
    if insn.op0_kind() == OpKind::NearBranch64 { i32::try_from(insn.near_branch_target() as i64).ok() } else { None }
}

impl Emitter<'_> {
    pub fn push(&mut self, item: &Item) -> Option<()> {
        let insn = item.insn;
        let value = match operand(insn, 0)? {
            Operand::Reg(register) if insn.op0_register().is_gpr64() => Ok(self.read(register)),
            Operand::Imm(value) if insn.stack_pointer_increment() == -8 => Err(value),
            _ => return None,
        };
        let place = self.access(item.k, STACK, -8, 8, true);
        match value {
            Ok(value) => self.code.store(8, place, value),
            Err(value) => self.code.store_constant(8, place, value),
        }
        self.move_stack(-8);
        Some(())
    }

    fn move_stack(&mut self, by: i32) {
        let stack = self.read(RSP);
        self.code.address(8, stack, Place::At(stack, by));
        self.moved(RSP, Some(by), stack);
    }

    pub fn pop(&mut self, item: &Item) -> Option<()> {
        if !item.insn.op0_register().is_gpr64() {
            return None;
        }
        let register = number(item.insn.op0_register())?;
        let place = self.access(item.k, STACK, 0, 8, false);
        // POP RSP: the loaded value wins.
        self.move_stack(8);
        let host = self.define(register);
        self.code.load(8, host, place);
        self.written(register, host);
        Some(())
    }

    /// LEAVE.
    pub fn leave_frame(&mut self, item: &Item) -> Option<()> {
        if item.insn.code() != iced_x86::Code::Leaveq {
            return None;
        }
        let frame = self.read(RBP);
        let place = self.access(item.k, Key { base: RBP, ..STACK }, 0, 8, false);
        let stack = self.define(RSP);
        self.code.address(8, stack, Place::At(frame, 8));
        self.written(RSP, stack);
        self.code.load(8, frame, place);
        self.written(RBP, frame);
        Some(())
    }

    /// A conditional jump: leaves the block either way.
    pub fn branch(&mut self, item: &Item, jump: &Instruction, miss: Miss) -> Option<After> {
        let target = target_distance(jump)?;
        let condition = self.condition(condition_code(jump));
        let taken = self.code.jump_if(condition);
        self.go_on(item.k, jump.next_ip() as i32, miss);
        self.code.land(taken);
        self.go_on(item.k, target, miss);
        Some(After::Left)
    }

    /// Goes to a place at this distance from the block's start behind op `k`, which changes nothing else.
    pub fn go_to(&mut self, k: usize, distance: i32) {
        self.go_on(k, distance, Miss::Handler);
    }

    pub fn jmp(&mut self, item: &Item) -> Option<After> {
        if let Some(distance) = target_distance(item.insn) {
            self.go_to(item.k, distance);
            return Some(After::Left);
        }
        self.target(item)?;
        self.look_up(item.k, Miss::Handler);
        self.enter(item.k);
        Some(After::Left)
    }

    /// RAX becomes where a jump or call leads.
    fn target(&mut self, item: &Item) -> Option<()> {
        let insn = item.insn;
        match insn.op0_kind() {
            OpKind::NearBranch64 => {
                self.code.load(8, AX, guest(RIP_BASE));
                self.code.address(8, AX, Place::At(AX, target_distance(insn)?));
            }
            OpKind::Register if insn.op0_register().is_gpr64() => {
                let host = self.read(number(insn.op0_register())?);
                self.code.copy(AX, host);
            }
            OpKind::Memory if insn.memory_size().size() == 8 && !insn.is_jmp_far_indirect() && !insn.is_call_far_indirect() => {
                let place = self.memory(item.k, 8, false)?;
                self.code.load(8, AX, place);
            }
            _ => return None,
        }
        Some(())
    }

    pub fn call(&mut self, item: &Item) -> Option<After> {
        self.target(item)?;
        self.look_up(item.k, Miss::Handler);
        self.unpin();
        let (to, entry) = (self.temporary(), self.temporary());
        self.code.copy(to, AX);
        self.code.copy(entry, DX);
        let place = self.access(item.k, STACK, -8, 8, true);
        self.code.load(8, CX, guest(RIP_BASE));
        self.code.address(8, CX, Place::At(CX, item.insn.next_ip() as i32));
        self.code.store(8, place, CX);
        self.move_stack(-8);
        self.code.copy(AX, to);
        self.code.copy(DX, entry);
        self.enter(item.k);
        Some(After::Left)
    }

    pub fn ret(&mut self, item: &Item) -> Option<After> {
        let insn = item.insn;
        if !matches!(insn.code(), iced_x86::Code::Retnq | iced_x86::Code::Retnq_imm16) {
            return None;
        }
        let more = if insn.op_count() == 0 { 0 } else { insn.immediate(0) as i32 };
        let place = self.access(item.k, STACK, 0, 8, false);
        self.code.load(8, AX, place);
        self.look_up(item.k, Miss::Handler);
        self.move_stack(8 + more);
        self.enter(item.k);
        Some(After::Left)
    }
}
