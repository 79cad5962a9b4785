//! Translations of what kernels do to words that they share, and of what counts in such code besides: exchanges, single bits in memory,
//! products of two words and shifts of these, and AH to BH, where compilers look for a flag.
//!
//! As in [`super::lower`]: the host executes the guest's own instruction, locked when it is, on the guest's memory. AH to BH have no number
//! beside R8; they are used where they are, as the second byte of a guest register in memory. Semantics: Intel SDM vol. 2.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::code::{AX, Code, DX, Place, alu};
use super::emit::{Emitter, guest};
use super::lower::{Item, Operand, RAX, RDX, operand, size};

/// The guest register of which a register is the second byte.
fn of_high_byte(register: Register) -> Option<u8> {
    match register {
        Register::AH => Some(0),
        Register::CH => Some(1),
        Register::DH => Some(2),
        Register::BH => Some(3),
        _ => None,
    }
}

/// The second byte of a guest register.
fn second_byte(register: u8) -> Place {
    match guest(register.into()) {
        Place::At(base, at) => Place::At(base, at + 1),
        place => place,
    }
}

/// Whether an operand is AH to BH.
pub(super) fn has_high_byte(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Register && of_high_byte(insn.op_register(n)).is_some())
}

impl Emitter<'_> {
    /// The op's memory operand as a place without RAX, which the instruction or the flags need. Changes RAX, RCX and RDX.
    fn shared(&mut self, item: &Item, write: bool) -> Option<Place> {
        let place = self.memory(item.k, size(item.insn, 0), write)?;
        Some(self.away_from_ax(place))
    }

    /// XCHG, XADD and CMPXCHG of memory and a register.
    pub fn exchange(&mut self, item: &Item) -> Option<()> {
        let insn = item.insn;
        let (size, Operand::Reg(register)) = (size(insn, 0), operand(insn, 1)?) else { return None };
        let host = self.read(register);
        let place = self.shared(item, true)?;
        let is_word = u8::from(size != 1);
        if insn.mnemonic() == Mnemonic::Cmpxchg {
            let accumulator = self.read(RAX);
            self.code.copy(AX, accumulator);
            self.lock(item);
            self.code.op(size, &[0x0f, 0xb0 | is_word], Code::number(host), place);
            self.code.copy(accumulator, AX);
            self.written(RAX, accumulator);
            self.flags_changed(item.flags_needed, true);
            return Some(());
        }
        let is_sum = insn.mnemonic() == Mnemonic::Xadd;
        self.lock(item);
        let opcode: &[u8] = if is_sum { &[0x0f, 0xc0 | is_word] } else { &[0x86 | is_word] };
        // Four bytes clear the upper half of the register.
        self.code.op(size, opcode, Code::number(host), place);
        self.written(register, host);
        if is_sum {
            self.flags_changed(item.flags_needed, true);
        }
        Some(())
    }

    /// BT, BTS, BTR and BTC of memory by a constant. They change CF only.
    pub fn bit_test_memory(&mut self, item: &Item) -> Option<()> {
        let insn = item.insn;
        let operation = match insn.mnemonic() {
            Mnemonic::Bt => 4,
            Mnemonic::Bts => 5,
            Mnemonic::Btr => 6,
            _ => 7,
        };
        let Operand::Imm(bit) = operand(insn, 1)? else { return None };
        let place = self.shared(item, operation != 4)?;
        self.load_old_flags(item);
        self.lock(item);
        self.code.op(size(insn, 0), &[0x0f, 0xba], operation, place);
        self.code.push(&[bit as u8]);
        self.flags_changed(item.flags_needed, false);
        Some(())
    }

    /// MUL by a register.
    pub fn mul(&mut self, item: &Item) -> Option<()> {
        let (size, Operand::Reg(factor)) = (size(item.insn, 0), operand(item.insn, 0)?) else { return None };
        if size < 4 {
            return None;
        }
        let (factor, low) = (self.read(factor), self.read(RAX));
        self.code.copy(AX, low);
        self.code.op(size, &[0xf7], 4, Place::Reg(factor));
        let high = self.define(RDX);
        self.code.copy(low, AX);
        self.code.copy(high, DX);
        self.written(RAX, low);
        self.written(RDX, high);
        self.flags_changed(item.flags_needed, true);
        Some(())
    }

    /// SHLD and SHRD of registers by a constant; what they leave of the flags stays.
    pub fn double_shift(&mut self, item: &Item) -> Option<()> {
        let insn = item.insn;
        let (Operand::Reg(to), Operand::Reg(from), Operand::Imm(count)) = (operand(insn, 0)?, operand(insn, 1)?, operand(insn, 2)?) else {
            return None;
        };
        let (size, opcode) = (size(insn, 0), if insn.mnemonic() == Mnemonic::Shld { 0xa4 } else { 0xac });
        if size < 4 || count as u8 & (8 * size - 1) == 0 {
            return None;
        }
        let (from, host) = (self.read(from), self.read(to));
        self.load_old_flags(item);
        self.code.op(size, &[0x0f, opcode], Code::number(from), Place::Reg(host));
        self.code.push(&[count as u8]);
        self.written(to, host);
        self.flags_changed(item.flags_needed, false);
        Some(())
    }

    /// What compilers do with AH to BH: arithmetic with a constant or another byte register, and MOVZX.
    pub fn high_byte(&mut self, item: &Item) -> Option<()> {
        let insn = item.insn;
        let high = |n| if insn.op_kind(n) == OpKind::Register { of_high_byte(insn.op_register(n)) } else { None };
        let operation = match insn.mnemonic() {
            Mnemonic::Movzx if size(insn, 0) >= 4 => {
                let (Operand::Reg(to), from) = (operand(insn, 0)?, high(1)?) else { return None };
                let host = self.define(to);
                self.code.load(1, host, second_byte(from));
                self.written(to, host);
                return Some(());
            }
            Mnemonic::Test => {
                let (register, Operand::Imm(value)) = (high(0)?, operand(insn, 1)?) else { return None };
                self.code.op(1, &[0xf6], 0, second_byte(register));
                self.code.constant(1, value);
                self.flags_changed(item.flags_needed, true);
                return Some(());
            }
            Mnemonic::Add => alu::ADD,
            Mnemonic::Or => alu::OR,
            Mnemonic::And => alu::AND,
            Mnemonic::Sub => alu::SUB,
            Mnemonic::Xor => alu::XOR,
            Mnemonic::Cmp => alu::CMP,
            _ => return None,
        };
        let (to, host) = match (high(0), high(1)) {
            (Some(to), None) => {
                let host = self.read(to);
                match operand(insn, 1)? {
                    Operand::Reg(from) => {
                        let from = self.read(from);
                        self.code.alu_to(operation, 1, second_byte(to), from);
                    }
                    Operand::Imm(value) => self.code.alu_constant(operation, 1, second_byte(to), value),
                    Operand::Mem => return None,
                }
                self.code.load(8, host, guest(to.into()));
                (to, host)
            }
            (None, Some(from)) => {
                let Operand::Reg(to) = operand(insn, 0)? else { return None };
                let host = self.read(to);
                self.code.alu(operation, 1, host, second_byte(from));
                (to, host)
            }
            _ => return None,
        };
        if operation != alu::CMP {
            self.written(to, host);
        }
        self.flags_changed(item.flags_needed, true);
        Some(())
    }
}
