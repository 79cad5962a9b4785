//! The instructions that have a translation: what compilers make most code of, in 64-bit mode.
//!
//! Each function emits one instruction, or says by `None` that it has no translation in this form; what was emitted until then is dropped.
//! The host executes the guest's own instruction on its values, so results and flags are the processor's. Semantics: Intel SDM vol. 2.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::code::{AX, CX, Code, DX, Place, R8, R9, R10, Reg, alu};
use super::emit::{Emitter, Miss, guest};
use crate::cpu::RIP_BASE;
use crate::integer::condition_code;
use crate::op::Op;

const RAX: u8 = 0;
const RCX: u8 = 1;
const RDX: u8 = 2;
const RSP: u8 = 4;
const RBP: u8 = 5;

/// An instruction and what the interpreter knows of it.
pub(super) struct Item<'a> {
    pub insn: &'a Instruction,
    /// The conditional jump that was fused with it.
    pub jump: Option<&'a Instruction>,
    pub op: &'a Op,
    /// Number of the op in its block.
    pub k: usize,
    /// Somebody may look at the flags that it leaves.
    pub flags_needed: bool,
}

/// How the code goes on behind an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    /// With the next one.
    Next,
    /// Not at all: the block has been left.
    Left,
}

/// An operand: a general register with its size, or memory, or a constant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operand {
    Reg(u8),
    Mem,
    Imm(i32),
}

/// Number of a general register. `None` for AH to BH, which the interpreter deals with, and for all others.
fn number(register: Register) -> Option<u8> {
    let is_high = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
    (register.is_gpr() && !is_high).then(|| register.full_register().number() as u8)
}

fn operand(insn: &Instruction, n: u32) -> Option<Operand> {
    match insn.op_kind(n) {
        OpKind::Register => number(insn.op_register(n)).map(Operand::Reg),
        OpKind::Memory => Some(Operand::Mem),
        OpKind::Immediate8
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => Some(Operand::Imm(insn.immediate(n) as i32)),
        _ => None,
    }
}

/// Size of an operand in bytes.
fn size(insn: &Instruction, n: u32) -> u8 {
    let size = if insn.op_kind(n) == OpKind::Register { insn.op_register(n).size() } else { insn.memory_size().size() };
    size as u8
}

/// How far from the block's start a direct branch leads. `None` for one with a 16-bit target.
fn target_distance(insn: &Instruction) -> Option<i32> {
    if insn.op0_kind() == OpKind::NearBranch64 { i32::try_from(insn.near_branch_target() as i64).ok() } else { None }
}

/// Whether an instruction neither leaves its block nor can fail, and replaces all arithmetic flags without looking at them.
pub(super) fn replaces_flags(insn: &Instruction) -> bool {
    let in_registers = !insn.op_kinds().any(|kind| kind == OpKind::Memory);
    in_registers
        && matches!(
            insn.mnemonic(),
            Mnemonic::Add | Mnemonic::Or | Mnemonic::And | Mnemonic::Sub | Mnemonic::Xor | Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Neg
        )
}

/// Whether an instruction neither leaves its block nor can fail, and leaves the arithmetic flags alone without looking at them.
pub(super) fn ignores_flags(insn: &Instruction) -> bool {
    let in_registers = |n| insn.op_kind(n) != OpKind::Memory && (insn.op_kind(n) != OpKind::Register || insn.op_register(n).is_gpr());
    match insn.mnemonic() {
        Mnemonic::Lea | Mnemonic::Nop | Mnemonic::Endbr64 | Mnemonic::Cdqe | Mnemonic::Cwde => true,
        Mnemonic::Mov | Mnemonic::Movzx | Mnemonic::Movsx | Mnemonic::Movsxd => in_registers(0) && in_registers(1),
        _ => false,
    }
}

impl Emitter<'_> {
    /// Emits an instruction, and the jump that was fused with it.
    pub fn instruction(&mut self, item: &Item) -> Option<After> {
        let flags_ready = self.begin();
        let insn = item.insn;
        if insn.has_rep_prefix() || insn.has_repne_prefix() || insn.has_lock_prefix() && operand(insn, 0) != Some(Operand::Mem) {
            return None;
        }
        match insn.mnemonic() {
            Mnemonic::Mov => self.mov(item, flags_ready)?,
            Mnemonic::Movzx => self.extend(item, [0xb6, 0xb7])?,
            Mnemonic::Movsx | Mnemonic::Movsxd => self.extend(item, [0xbe, 0xbf])?,
            Mnemonic::Lea => self.lea(item, flags_ready)?,
            Mnemonic::Add => self.binary(item, alu::ADD)?,
            Mnemonic::Or => self.binary(item, alu::OR)?,
            Mnemonic::Adc => self.binary(item, alu::ADC)?,
            Mnemonic::Sbb => self.binary(item, alu::SBB)?,
            Mnemonic::And => self.binary(item, alu::AND)?,
            Mnemonic::Sub => self.binary(item, alu::SUB)?,
            Mnemonic::Xor => self.binary(item, alu::XOR)?,
            Mnemonic::Cmp => self.binary(item, alu::CMP)?,
            Mnemonic::Test => self.test(item)?,
            Mnemonic::Inc => self.unary(item, 0xfe, 0, true)?,
            Mnemonic::Dec => self.unary(item, 0xfe, 1, true)?,
            Mnemonic::Not => self.unary(item, 0xf6, 2, false)?,
            Mnemonic::Neg => self.unary(item, 0xf6, 3, true)?,
            Mnemonic::Rol => self.shift(item, 0)?,
            Mnemonic::Ror => self.shift(item, 1)?,
            Mnemonic::Shl | Mnemonic::Sal => self.shift(item, 4)?,
            Mnemonic::Shr => self.shift(item, 5)?,
            Mnemonic::Sar => self.shift(item, 7)?,
            Mnemonic::Imul => self.imul(item)?,
            Mnemonic::Bt => self.bit_test(item, 4)?,
            Mnemonic::Bts => self.bit_test(item, 5)?,
            Mnemonic::Btr => self.bit_test(item, 6)?,
            Mnemonic::Push => self.push(item)?,
            Mnemonic::Pop => self.pop(item)?,
            Mnemonic::Leave => self.leave_frame(item)?,
            Mnemonic::Cdqe | Mnemonic::Cwde => {
                let accumulator = self.read(RAX);
                // MOVSXD and MOVSX
                let (size, opcode): (u8, &[u8]) = if insn.mnemonic() == Mnemonic::Cdqe { (8, &[0x63]) } else { (4, &[0x0f, 0xbf]) };
                self.code.op(size, opcode, Code::number(accumulator), Place::Reg(accumulator));
                self.written(RAX, accumulator);
                self.flags_in_host = flags_ready;
            }
            Mnemonic::Cqo | Mnemonic::Cdq => {
                let size = if insn.mnemonic() == Mnemonic::Cqo { 8 } else { 4 };
                let (from, to) = (self.read(RAX), self.define(RDX));
                self.code.load(size, to, Place::Reg(from));
                self.code.shift(7, size, Place::Reg(to), size * 8 - 1);
                self.written(RDX, to);
            }
            Mnemonic::Bswap => {
                let (register, size) = (number(insn.op0_register())?, size(insn, 0));
                if size < 4 {
                    return None;
                }
                let host = self.read(register);
                // BSWAP has its register in the opcode.
                let number = Code::number(host);
                self.code.push(&[0x40 | u8::from(size == 8) << 3 | number >> 3, 0x0f, 0xc8 | number & 7]);
                self.written(register, host);
                self.flags_in_host = flags_ready;
            }
            Mnemonic::Nop | Mnemonic::Endbr64 => self.flags_in_host = flags_ready,
            Mnemonic::Jmp => return self.jmp(item),
            Mnemonic::Call => return self.call(item),
            Mnemonic::Ret => return self.ret(item),
            _ if insn.is_jcc_short_or_near() => return self.branch(item, insn, flags_ready, Miss::Handler),
            _ if insn.condition_code() != iced_x86::ConditionCode::None && insn.op_count() == 1 => self.set(item, flags_ready)?,
            _ if insn.condition_code() != iced_x86::ConditionCode::None && insn.op_count() == 2 => self.cmov(item, flags_ready)?,
            _ => return None,
        }
        let Some(jump) = item.jump else { return Some(After::Next) };
        let ready = std::mem::take(&mut self.flags_in_host);
        self.branch(item, jump, ready, Miss::Leave { branch: jump.ip() as i32 })
    }

    /// RAX becomes the host address of the op's memory operand.
    fn memory(&mut self, item: &Item, size: u8, write: bool) -> Option<()> {
        self.linear(item.op)?;
        self.host_address(item.k, size, write);
        Some(())
    }

    /// Operand `n` of `size` bytes, which is no constant, as a place to read from.
    fn source_of(&mut self, item: &Item, n: u32, size: u8) -> Option<Place> {
        match operand(item.insn, n)? {
            Operand::Reg(register) => Some(Place::Reg(self.read(register))),
            Operand::Mem => {
                self.memory(item, size, false)?;
                Some(Place::At(AX, 0))
            }
            Operand::Imm(_) => None,
        }
    }

    /// A host register for a guest register of which `size` bytes are about to be overwritten; smaller ones than 4 keep the rest.
    fn destination(&mut self, register: u8, size: u8) -> Reg {
        if size >= 4 { self.define(register) } else { self.read(register) }
    }

    fn lock(&mut self, item: &Item) {
        if item.insn.has_lock_prefix() {
            self.code.push(&[0xf0]);
        }
    }

    fn mov(&mut self, item: &Item, flags_ready: bool) -> Option<()> {
        let insn = item.insn;
        let size = size(insn, 0);
        if insn.op1_kind() == OpKind::Immediate64 {
            let register = number(insn.op0_register())?;
            let host = self.define(register);
            self.code.set(host, insn.immediate64());
            self.written(register, host);
            self.flags_in_host = flags_ready;
            return Some(());
        }
        match (operand(insn, 0)?, operand(insn, 1)?) {
            (Operand::Reg(to), Operand::Reg(from)) => {
                let from = self.read(from);
                let host = self.destination(to, size);
                self.code.insert(size, host, Place::Reg(from));
                self.written(to, host);
                self.flags_in_host = flags_ready;
            }
            (Operand::Reg(to), Operand::Imm(value)) => {
                let host = self.destination(to, size);
                match size {
                    8 => self.code.set(host, i64::from(value) as u64),
                    4 => self.code.set(host, u64::from(value as u32)),
                    _ => self.code.store_constant(size, Place::Reg(host), value),
                }
                self.written(to, host);
                self.flags_in_host = flags_ready;
            }
            (Operand::Reg(to), Operand::Mem) => {
                self.memory(item, size, false)?;
                let host = self.destination(to, size);
                self.code.insert(size, host, Place::At(AX, 0));
                self.written(to, host);
            }
            (Operand::Mem, Operand::Reg(from)) => {
                let from = self.read(from);
                self.memory(item, size, true)?;
                self.code.store(size, Place::At(AX, 0), from);
            }
            (Operand::Mem, Operand::Imm(value)) => {
                self.memory(item, size, true)?;
                self.code.store_constant(size, Place::At(AX, 0), value);
            }
            _ => return None,
        }
        Some(())
    }

    /// MOVZX and MOVSX; the opcodes for 1 and 2 bytes.
    fn extend(&mut self, item: &Item, opcodes: [u8; 2]) -> Option<()> {
        let insn = item.insn;
        let (size, from_size) = (size(insn, 0), size(insn, 1));
        if size < 4 {
            return None;
        }
        let to = number(insn.op0_register())?;
        let from = self.source_of(item, 1, from_size)?;
        let host = self.define(to);
        match from_size {
            1 => self.code.op(size, &[0x0f, opcodes[0]], Code::number(host), from),
            2 => self.code.op(size, &[0x0f, opcodes[1]], Code::number(host), from),
            // MOVSXD
            _ => self.code.op(size, &[0x63], Code::number(host), from),
        }
        self.written(to, host);
        Some(())
    }

    fn lea(&mut self, item: &Item, flags_ready: bool) -> Option<()> {
        let size = size(item.insn, 0);
        if size < 4 {
            return None;
        }
        let to = number(item.insn.op0_register())?;
        let place = self.operand(item.op)?;
        let host = self.define(to);
        self.code.address(size, host, place);
        self.written(to, host);
        self.flags_in_host = flags_ready;
        Some(())
    }

    fn binary(&mut self, item: &Item, operation: u8) -> Option<()> {
        let insn = item.insn;
        let size = size(insn, 0);
        let stores = operation != alu::CMP;
        let uses_carry = matches!(operation, alu::ADC | alu::SBB);
        match (operand(insn, 0)?, operand(insn, 1)?) {
            (Operand::Reg(to), second) => {
                let second = match second {
                    Operand::Reg(from) => Some(Place::Reg(self.read(from))),
                    Operand::Imm(_) => None,
                    Operand::Mem => {
                        self.memory(item, size, false)?;
                        if uses_carry {
                            self.code.copy(CX, AX);
                            Some(Place::At(CX, 0))
                        } else {
                            Some(Place::At(AX, 0))
                        }
                    }
                };
                let host = self.read(to);
                if uses_carry {
                    self.load_flags();
                }
                match (second, operand(insn, 1)?) {
                    (Some(place), _) => self.code.alu(operation, size, host, place),
                    (None, Operand::Imm(value)) => self.code.alu_constant(operation, size, Place::Reg(host), value),
                    _ => return None,
                }
                if stores {
                    self.written(to, host);
                }
            }
            (Operand::Mem, second) => {
                let from = if let Operand::Reg(from) = second { Some(self.read(from)) } else { None };
                self.memory(item, size, stores)?;
                let mut place = Place::At(AX, 0);
                if uses_carry {
                    self.code.copy(CX, AX);
                    place = Place::At(CX, 0);
                    self.load_flags();
                }
                self.lock(item);
                match (from, second) {
                    (Some(from), _) => self.code.alu_to(operation, size, place, from),
                    (None, Operand::Imm(value)) => self.code.alu_constant(operation, size, place, value),
                    _ => return None,
                }
            }
            _ => return None,
        }
        self.save_flags(item.flags_needed);
        Some(())
    }

    fn test(&mut self, item: &Item) -> Option<()> {
        let insn = item.insn;
        let size = size(insn, 0);
        let second = operand(insn, 1)?;
        let from = if let Operand::Reg(from) = second { Some(self.read(from)) } else { None };
        let place = self.source_of(item, 0, size)?;
        match (from, second) {
            (Some(from), _) => self.code.op(size, if size == 1 { &[0x84] } else { &[0x85] }, Code::number(from), place),
            (None, Operand::Imm(value)) => {
                self.code.op(size, if size == 1 { &[0xf6] } else { &[0xf7] }, 0, place);
                self.code.constant(size, value);
            }
            _ => return None,
        }
        self.save_flags(item.flags_needed);
        Some(())
    }

    /// INC, DEC, NEG, NOT: the opcode for bytes and the middle field of ModRM.
    fn unary(&mut self, item: &Item, opcode: u8, operation: u8, sets_flags: bool) -> Option<()> {
        let insn = item.insn;
        let size = size(insn, 0);
        let opcode = opcode | u8::from(size != 1);
        // INC and DEC leave CF as it is.
        let keeps_carry = opcode >= 0xfe;
        match operand(insn, 0)? {
            Operand::Reg(register) => {
                let host = self.read(register);
                if keeps_carry {
                    self.load_flags();
                }
                self.code.op(size, &[opcode], operation, Place::Reg(host));
                self.written(register, host);
            }
            Operand::Mem => {
                self.memory(item, size, true)?;
                self.code.copy(CX, AX);
                if keeps_carry {
                    self.load_flags();
                }
                self.lock(item);
                self.code.op(size, &[opcode], operation, Place::At(CX, 0));
            }
            Operand::Imm(_) => return None,
        }
        if sets_flags {
            self.save_flags(item.flags_needed);
        }
        Some(())
    }

    /// Shifts and rotates of registers, by a constant or CL; what they leave of the flags stays.
    fn shift(&mut self, item: &Item, operation: u8) -> Option<()> {
        let insn = item.insn;
        let (size, Operand::Reg(register)) = (size(insn, 0), operand(insn, 0)?) else { return None };
        if size < 4 {
            return None;
        }
        match operand(insn, 1)? {
            Operand::Imm(count) if count as u8 & (8 * size - 1) != 0 => {
                let host = self.read(register);
                self.load_flags();
                self.code.shift(operation, size, Place::Reg(host), count as u8);
                self.written(register, host);
            }
            Operand::Reg(RCX) => {
                let count = self.read(RCX);
                self.code.copy(CX, count);
                let host = self.read(register);
                self.load_flags();
                self.code.op(size, &[0xd3], operation, Place::Reg(host));
                self.written(register, host);
            }
            _ => return None,
        }
        self.save_flags(item.flags_needed);
        Some(())
    }

    /// IMUL with two or three operands.
    fn imul(&mut self, item: &Item) -> Option<()> {
        let insn = item.insn;
        let size = size(insn, 0);
        if size < 4 || insn.op_count() < 2 {
            return None;
        }
        let to = number(insn.op0_register())?;
        let from = self.source_of(item, 1, size)?;
        let host;
        if insn.op_count() == 3 {
            let Operand::Imm(value) = operand(insn, 2)? else { return None };
            host = self.define(to);
            self.code.op(size, &[0x69], Code::number(host), from);
            self.code.constant(size, value);
        } else {
            host = self.read(to);
            self.code.op(size, &[0x0f, 0xaf], Code::number(host), from);
        }
        self.written(to, host);
        self.save_flags(item.flags_needed);
        Some(())
    }

    /// BT, BTS, BTR of registers; the middle field of the form with a constant. They change CF only.
    fn bit_test(&mut self, item: &Item, operation: u8) -> Option<()> {
        let insn = item.insn;
        let (size, Operand::Reg(register)) = (size(insn, 0), operand(insn, 0)?) else { return None };
        if size < 4 {
            return None;
        }
        match operand(insn, 1)? {
            Operand::Imm(bit) => {
                let host = self.read(register);
                self.load_flags();
                self.code.op(size, &[0x0f, 0xba], operation, Place::Reg(host));
                self.code.push(&[bit as u8]);
                if operation != 4 {
                    self.written(register, host);
                }
            }
            Operand::Reg(bit) => {
                let (bit, host) = (self.read(bit), self.read(register));
                self.load_flags();
                self.code.op(size, &[0x0f, 0x83 | operation << 3], Code::number(bit), Place::Reg(host));
                if operation != 4 {
                    self.written(register, host);
                }
            }
            Operand::Mem => return None,
        }
        self.save_flags(item.flags_needed);
        Some(())
    }

    fn set(&mut self, item: &Item, flags_ready: bool) -> Option<()> {
        let Operand::Reg(register) = operand(item.insn, 0)? else { return None };
        let host = self.read(register);
        let condition = self.condition(condition_code(item.insn), flags_ready);
        self.code.op(1, &[0x0f, 0x90 | condition], 0, Place::Reg(host));
        self.written(register, host);
        self.flags_in_host = flags_ready;
        Some(())
    }

    fn cmov(&mut self, item: &Item, flags_ready: bool) -> Option<()> {
        let insn = item.insn;
        let size = size(insn, 0);
        if size < 4 {
            return None;
        }
        let to = number(insn.op0_register())?;
        let (from, ready) = match operand(insn, 1)? {
            Operand::Reg(from) => (self.read(from), flags_ready),
            _ => {
                // It is loaded in any case.
                self.memory(item, size, false)?;
                self.code.load(size, CX, Place::At(AX, 0));
                (CX, false)
            }
        };
        let host = self.read(to);
        let condition = self.condition(condition_code(insn), ready);
        self.code.op(size, &[0x0f, 0x40 | condition], Code::number(host), Place::Reg(from));
        self.written(to, host);
        self.flags_in_host = ready;
        Some(())
    }

    fn push(&mut self, item: &Item) -> Option<()> {
        let insn = item.insn;
        let value = match operand(insn, 0)? {
            Operand::Reg(register) if insn.op0_register().is_gpr64() => Ok(self.read(register)),
            Operand::Imm(value) if insn.stack_pointer_increment() == -8 => Err(value),
            _ => return None,
        };
        let stack = self.read(RSP);
        self.code.address(8, AX, Place::At(stack, -8));
        self.host_address(item.k, 8, true);
        match value {
            Ok(value) => self.code.store(8, Place::At(AX, 0), value),
            Err(value) => self.code.store_constant(8, Place::At(AX, 0), value),
        }
        self.move_stack(stack, -8);
        Some(())
    }

    fn move_stack(&mut self, stack: Reg, by: i32) {
        self.code.address(8, stack, Place::At(stack, by));
        self.written(RSP, stack);
    }

    fn pop(&mut self, item: &Item) -> Option<()> {
        if !item.insn.op0_register().is_gpr64() {
            return None;
        }
        let register = number(item.insn.op0_register())?;
        let stack = self.read(RSP);
        self.code.copy(AX, stack);
        self.host_address(item.k, 8, false);
        // POP RSP: the loaded value wins.
        self.move_stack(stack, 8);
        let host = self.define(register);
        self.code.load(8, host, Place::At(AX, 0));
        self.written(register, host);
        Some(())
    }

    /// LEAVE.
    fn leave_frame(&mut self, item: &Item) -> Option<()> {
        if item.insn.code() != iced_x86::Code::Leaveq {
            return None;
        }
        let frame = self.read(RBP);
        self.code.copy(AX, frame);
        self.host_address(item.k, 8, false);
        let stack = self.define(RSP);
        self.code.address(8, stack, Place::At(frame, 8));
        self.written(RSP, stack);
        self.code.load(8, frame, Place::At(AX, 0));
        self.written(RBP, frame);
        Some(())
    }

    /// A conditional jump: leaves the block either way.
    fn branch(&mut self, item: &Item, jump: &Instruction, flags_ready: bool, miss: Miss) -> Option<After> {
        let target = target_distance(jump)?;
        let condition = self.condition(condition_code(jump), flags_ready);
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

    fn jmp(&mut self, item: &Item) -> Option<After> {
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
                self.memory(item, 8, false)?;
                self.code.load(8, AX, Place::At(AX, 0));
            }
            _ => return None,
        }
        Some(())
    }

    fn call(&mut self, item: &Item) -> Option<After> {
        self.target(item)?;
        self.look_up(item.k, Miss::Handler);
        // The copies are of no use any more.
        self.forget();
        self.code.copy(R8, AX);
        self.code.copy(R9, DX);
        self.code.load(8, AX, guest(RSP.into()));
        self.code.address(8, AX, Place::At(AX, -8));
        self.code.copy(R10, AX);
        self.host_address(item.k, 8, true);
        self.code.load(8, CX, guest(RIP_BASE));
        self.code.address(8, CX, Place::At(CX, item.insn.next_ip() as i32));
        self.code.store(8, Place::At(AX, 0), CX);
        self.code.store(8, guest(RSP.into()), R10);
        self.code.copy(AX, R8);
        self.code.copy(DX, R9);
        self.enter(item.k);
        Some(After::Left)
    }

    fn ret(&mut self, item: &Item) -> Option<After> {
        let insn = item.insn;
        if !matches!(insn.code(), iced_x86::Code::Retnq | iced_x86::Code::Retnq_imm16) {
            return None;
        }
        let more = if insn.op_count() == 0 { 0 } else { insn.immediate(0) as i32 };
        let stack = self.read(RSP);
        self.code.copy(AX, stack);
        self.host_address(item.k, 8, false);
        self.code.load(8, AX, Place::At(AX, 0));
        self.look_up(item.k, Miss::Handler);
        self.move_stack(stack, 8 + more);
        self.enter(item.k);
        Some(After::Left)
    }
}
