//! The instructions that have a translation: what compilers make most code of, in 64-bit mode.
//!
//! Each function emits one instruction, or says by `None` that it has no translation in this form; what was emitted until then is dropped.
//! The host executes the guest's own instruction on its values, so results and flags are the processor's. Semantics: Intel SDM vol. 2.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::atomic::has_high_byte;
use super::code::{AX, CX, Code, Place, Reg, alu};
use super::emit::{Emitter, Miss};
use crate::cpu::ZERO;
use crate::integer::condition_code;
use crate::op::Op;

pub(super) const RAX: u8 = 0;
const RCX: u8 = 1;
pub(super) const RDX: u8 = 2;

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
pub(super) enum Operand {
    Reg(u8),
    Mem,
    Imm(i32),
}

/// Number of a general register. `None` for AH to BH, which the interpreter deals with, and for all others.
pub(super) fn number(register: Register) -> Option<u8> {
    let is_high = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
    (register.is_gpr() && !is_high).then(|| register.full_register().number() as u8)
}

pub(super) fn operand(insn: &Instruction, n: u32) -> Option<Operand> {
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
pub(super) fn size(insn: &Instruction, n: u32) -> u8 {
    let size = if insn.op_kind(n) == OpKind::Register { insn.op_register(n).size() } else { insn.memory_size().size() };
    size as u8
}

/// What an instruction that neither fails nor leaves its block does with the arithmetic flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flags {
    /// All become new.
    Replaced,
    /// Those that it leaves may depend on what they were, nothing else does.
    Passed,
    /// It looks at them; or nothing is known of it.
    Seen,
}

/// See [`Flags`].
pub(super) fn flags(insn: &Instruction) -> Flags {
    match insn.mnemonic() {
        Mnemonic::Add | Mnemonic::Or | Mnemonic::And | Mnemonic::Sub | Mnemonic::Xor | Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Neg => {
            Flags::Replaced
        }
        Mnemonic::Lea | Mnemonic::Nop | Mnemonic::Endbr64 | Mnemonic::Cdqe | Mnemonic::Cwde | Mnemonic::Cqo | Mnemonic::Cdq => {
            Flags::Passed
        }
        Mnemonic::Bswap | Mnemonic::Not | Mnemonic::Inc | Mnemonic::Dec | Mnemonic::Imul | Mnemonic::Push | Mnemonic::Pop => Flags::Passed,
        Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr | Mnemonic::Sar | Mnemonic::Rol | Mnemonic::Ror => Flags::Passed,
        Mnemonic::Shld | Mnemonic::Shrd | Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc => Flags::Passed,
        Mnemonic::Movzx | Mnemonic::Movsx | Mnemonic::Movsxd => Flags::Passed,
        // Not those of segment and control registers.
        Mnemonic::Mov if insn.op_kinds().all(|kind| kind != OpKind::Register) => Flags::Passed,
        Mnemonic::Mov if (0..2).all(|n| insn.op_kind(n) != OpKind::Register || insn.op_register(n).is_gpr()) => Flags::Passed,
        _ => Flags::Seen,
    }
}

/// Whether an instruction accesses memory.
pub(super) fn accesses(insn: &Instruction) -> bool {
    let named = insn.op_kinds().any(|kind| kind == OpKind::Memory) && !matches!(insn.mnemonic(), Mnemonic::Lea | Mnemonic::Nop);
    named || insn.is_stack_instruction()
}

impl Emitter<'_> {
    /// Emits an instruction, and the jump that was fused with it.
    pub fn instruction(&mut self, item: &Item) -> Option<After> {
        self.unpin();
        let insn = item.insn;
        let is_in_memory = insn.op_count() > 0 && operand(insn, 0) == Some(Operand::Mem);
        if insn.has_rep_prefix() || insn.has_repne_prefix() || insn.has_lock_prefix() && !is_in_memory {
            return None;
        }
        match insn.mnemonic() {
            _ if has_high_byte(insn) => self.high_byte(item)?,
            Mnemonic::Mul => self.mul(item)?,
            Mnemonic::Shld | Mnemonic::Shrd => self.double_shift(item)?,
            Mnemonic::Xchg | Mnemonic::Xadd | Mnemonic::Cmpxchg if is_in_memory => self.exchange(item)?,
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc if is_in_memory => self.bit_test_memory(item)?,
            Mnemonic::Mov => self.mov(item)?,
            Mnemonic::Movzx => self.extend(item, [0xb6, 0xb7])?,
            Mnemonic::Movsx | Mnemonic::Movsxd => self.extend(item, [0xbe, 0xbf])?,
            Mnemonic::Lea => self.lea(item)?,
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
            }
            Mnemonic::Cqo | Mnemonic::Cdq => {
                let size = if insn.mnemonic() == Mnemonic::Cqo { 8 } else { 4 };
                let (from, to) = (self.read(RAX), self.define(RDX));
                self.code.load(size, to, Place::Reg(from));
                self.code.shift(7, size, Place::Reg(to), size * 8 - 1);
                self.flags_in_host = false;
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
            }
            Mnemonic::Nop | Mnemonic::Endbr64 => {}
            Mnemonic::Jmp => return self.jmp(item),
            Mnemonic::Call => return self.call(item),
            Mnemonic::Ret => return self.ret(item),
            _ if insn.is_jcc_short_or_near() => return self.branch(item, insn, Miss::Handler),
            _ if insn.condition_code() != iced_x86::ConditionCode::None && insn.op_count() == 1 => self.set(item)?,
            _ if insn.condition_code() != iced_x86::ConditionCode::None && insn.op_count() == 2 => self.cmov(item)?,
            _ => return None,
        }
        let Some(jump) = item.jump else { return Some(After::Next) };
        self.branch(item, jump, Miss::Leave { branch: jump.ip() as i32 })
    }

    /// Operand `n` of `size` bytes, which is no constant, as a place to read from.
    fn source_of(&mut self, item: &Item, n: u32, size: u8) -> Option<Place> {
        match operand(item.insn, n)? {
            Operand::Reg(register) => Some(Place::Reg(self.read(register))),
            Operand::Mem => self.memory(item.k, size, false),
            Operand::Imm(_) => None,
        }
    }

    /// A host register for a guest register of which `size` bytes are about to be overwritten; smaller ones than 4 keep the rest.
    fn destination(&mut self, register: u8, size: u8) -> Reg {
        if size >= 4 { self.define(register) } else { self.read(register) }
    }

    /// Makes the host's flags the guest's, for an instruction that leaves some of them, if somebody may look at these.
    pub fn load_old_flags(&mut self, item: &Item) {
        if item.flags_needed {
            self.load_flags();
        }
    }

    /// The same place without RAX, which flags are loaded by.
    pub fn away_from_ax(&mut self, place: Place) -> Place {
        if !matches!(place, Place::At(AX, _)) {
            return place;
        }
        self.code.copy(CX, AX);
        Place::At(CX, 0)
    }

    /// The LOCK prefix, when the instruction has it.
    pub fn lock(&mut self, item: &Item) {
        if item.insn.has_lock_prefix() {
            self.code.push(&[0xf0]);
        }
    }

    fn mov(&mut self, item: &Item) -> Option<()> {
        let insn = item.insn;
        let size = size(insn, 0);
        if insn.op1_kind() == OpKind::Immediate64 {
            let register = number(insn.op0_register())?;
            let host = self.define(register);
            self.code.set(host, insn.immediate64());
            self.written(register, host);
            return Some(());
        }
        match (operand(insn, 0)?, operand(insn, 1)?) {
            (Operand::Reg(to), Operand::Reg(from)) => {
                let from = self.read(from);
                let host = self.destination(to, size);
                self.code.insert(size, host, Place::Reg(from));
                self.written(to, host);
            }
            (Operand::Reg(to), Operand::Imm(value)) => {
                let host = self.destination(to, size);
                match size {
                    8 => self.code.set(host, i64::from(value) as u64),
                    4 => self.code.set(host, u64::from(value as u32)),
                    _ => self.code.store_constant(size, Place::Reg(host), value),
                }
                self.written(to, host);
            }
            (Operand::Reg(to), Operand::Mem) => {
                let place = self.memory(item.k, size, false)?;
                let host = self.destination(to, size);
                self.code.insert(size, host, place);
                self.written(to, host);
            }
            (Operand::Mem, Operand::Reg(from)) => {
                let from = self.read(from);
                let place = self.memory(item.k, size, true)?;
                self.code.store(size, place, from);
            }
            (Operand::Mem, Operand::Imm(value)) => {
                let place = self.memory(item.k, size, true)?;
                self.code.store_constant(size, place, value);
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

    fn lea(&mut self, item: &Item) -> Option<()> {
        let size = size(item.insn, 0);
        if size < 4 {
            return None;
        }
        let to = number(item.insn.op0_register())?;
        let place = self.operand(item.op)?;
        let is_own = size == 8 && item.op.base == to && usize::from(item.op.index) == ZERO;
        let host = self.define(to);
        self.code.address(size, host, place);
        self.moved(to, if is_own { i32::try_from(item.op.disp).ok() } else { None }, host);
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
                        let place = self.memory(item.k, size, false)?;
                        Some(if uses_carry { self.away_from_ax(place) } else { place })
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
                    let by = match (operation, operand(insn, 1)?) {
                        (alu::ADD, Operand::Imm(value)) if size == 8 => Some(value),
                        (alu::SUB, Operand::Imm(value)) if size == 8 => value.checked_neg(),
                        _ => None,
                    };
                    self.moved(to, by, host);
                }
            }
            (Operand::Mem, second) => {
                let from = if let Operand::Reg(from) = second { Some(self.read(from)) } else { None };
                let mut place = self.memory(item.k, size, stores)?;
                if uses_carry {
                    place = self.away_from_ax(place);
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
        self.flags_changed(item.flags_needed, true);
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
        self.flags_changed(item.flags_needed, true);
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
                    self.load_old_flags(item);
                }
                self.code.op(size, &[opcode], operation, Place::Reg(host));
                self.written(register, host);
            }
            Operand::Mem => {
                let mut place = self.memory(item.k, size, true)?;
                if keeps_carry {
                    place = self.away_from_ax(place);
                    self.load_old_flags(item);
                }
                self.lock(item);
                self.code.op(size, &[opcode], operation, place);
            }
            Operand::Imm(_) => return None,
        }
        if sets_flags {
            self.flags_changed(item.flags_needed, !keeps_carry);
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
                self.load_old_flags(item);
                self.code.shift(operation, size, Place::Reg(host), count as u8);
                self.written(register, host);
            }
            Operand::Reg(RCX) => {
                let count = self.read(RCX);
                self.code.copy(CX, count);
                let host = self.read(register);
                self.load_old_flags(item);
                self.code.op(size, &[0xd3], operation, Place::Reg(host));
                self.written(register, host);
            }
            _ => return None,
        }
        self.flags_changed(item.flags_needed, false);
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
        self.flags_changed(item.flags_needed, true);
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
                self.load_old_flags(item);
                self.code.op(size, &[0x0f, 0xba], operation, Place::Reg(host));
                self.code.push(&[bit as u8]);
                if operation != 4 {
                    self.written(register, host);
                }
            }
            Operand::Reg(bit) => {
                let (bit, host) = (self.read(bit), self.read(register));
                self.load_old_flags(item);
                self.code.op(size, &[0x0f, 0x83 | operation << 3], Code::number(bit), Place::Reg(host));
                if operation != 4 {
                    self.written(register, host);
                }
            }
            Operand::Mem => return None,
        }
        self.flags_changed(item.flags_needed, false);
        Some(())
    }

    fn set(&mut self, item: &Item) -> Option<()> {
        let Operand::Reg(register) = operand(item.insn, 0)? else { return None };
        let host = self.read(register);
        let condition = self.condition(condition_code(item.insn));
        self.code.op(1, &[0x0f, 0x90 | condition], 0, Place::Reg(host));
        self.written(register, host);
        Some(())
    }

    fn cmov(&mut self, item: &Item) -> Option<()> {
        let insn = item.insn;
        let size = size(insn, 0);
        if size < 4 {
            return None;
        }
        let to = number(insn.op0_register())?;
        let from = match operand(insn, 1)? {
            Operand::Reg(from) => self.read(from),
            _ => {
                // It is loaded in any case.
                let place = self.memory(item.k, size, false)?;
                self.code.load(size, CX, place);
                CX
            }
        };
        let host = self.read(to);
        let condition = self.condition(condition_code(insn));
        self.code.op(size, &[0x0f, 0x40 | condition], Code::number(host), Place::Reg(from));
        self.written(to, host);
        Some(())
    }
}
