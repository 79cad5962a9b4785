//! Machine code in the making: just the encodings that translations consist of.
//!
//! Operands are host registers of 8 numbers that need no special ModRM forms, memory at one of them, and constants. Jumps go forward and
//! are completed when their target is known. Encodings: Intel SDM vol. 2 chapters 2 to 5.

/// A host register. RSP, RBP, R12 and R13, whose ModRM forms differ, are not among them, nor are registers that a callee must keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reg(u8);

pub(super) const AX: Reg = Reg(0);
pub(super) const CX: Reg = Reg(1);
pub(super) const DX: Reg = Reg(2);
pub(super) const SI: Reg = Reg(6);
pub(super) const DI: Reg = Reg(7);
pub(super) const R8: Reg = Reg(8);
pub(super) const R9: Reg = Reg(9);
pub(super) const R10: Reg = Reg(10);
pub(super) const R11: Reg = Reg(11);

/// What a ModRM byte names besides its register.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place {
    /// A register.
    Reg(Reg),
    /// Memory at a register plus a constant.
    At(Reg, i32),
    /// Memory at base plus index shifted left by 0 to 3 plus a constant.
    Sib(Option<Reg>, Reg, u8, i32),
}

/// Condition codes: the low four bits of the opcodes of Jcc, SETcc and CMOVcc (Intel SDM vol. 1 appendix B.1).
pub(super) mod condition {
    pub const BELOW: u8 = 2;
    pub const EQUAL: u8 = 4;
    pub const NOT_EQUAL: u8 = 5;
}

/// Two-operand arithmetic by its number in opcodes.
pub(super) mod alu {
    pub const ADD: u8 = 0;
    pub const OR: u8 = 1;
    pub const ADC: u8 = 2;
    pub const SBB: u8 = 3;
    pub const AND: u8 = 4;
    pub const SUB: u8 = 5;
    pub const XOR: u8 = 6;
    pub const CMP: u8 = 7;
}

/// A jump whose target is not known yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Jump(usize);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Code {
    bytes: Vec<u8>,
}

impl Code {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Forgets what was added after `len`.
    pub fn truncate(&mut self, len: usize) {
        self.bytes.truncate(len);
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Any instruction with a ModRM byte; `size` is that of its operands in bytes, `reg` the middle field.
    pub fn op(&mut self, size: u8, opcode: &[u8], reg: u8, place: Place) {
        if size == 2 {
            self.bytes.push(0x66);
        }
        let (base, index) = match place {
            Place::Reg(reg) | Place::At(reg, _) => (reg.0, 0),
            Place::Sib(base, index, ..) => (base.map_or(0, |base| base.0), index.0),
        };
        let rex = 0x40 | u8::from(size == 8) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3;
        // SIL and DIL, not DH and BH.
        let bytes = size == 1 || matches!(opcode, [0x0f, 0xb6 | 0xbe | 0x90..=0x9f]);
        let is_low_byte = bytes && (reg >= 4 || matches!(place, Place::Reg(reg) if reg.0 >= 4));
        if rex != 0x40 || is_low_byte {
            self.bytes.push(rex);
        }
        self.bytes.extend_from_slice(opcode);
        let reg = (reg & 7) << 3;
        match place {
            Place::Reg(rm) => self.bytes.push(0xc0 | reg | rm.0 & 7),
            Place::At(base, disp) => {
                let mode = Self::mode(disp);
                self.bytes.push(mode | reg | base.0 & 7);
                self.displacement(mode, disp);
            }
            Place::Sib(Some(base), index, scale, disp) => {
                let mode = Self::mode(disp);
                self.bytes.extend_from_slice(&[mode | reg | 4, scale << 6 | (index.0 & 7) << 3 | base.0 & 7]);
                self.displacement(mode, disp);
            }
            Place::Sib(None, index, scale, disp) => {
                self.bytes.extend_from_slice(&[reg | 4, scale << 6 | (index.0 & 7) << 3 | 5]);
                self.bytes.extend_from_slice(&disp.to_le_bytes());
            }
        }
    }

    fn mode(disp: i32) -> u8 {
        match disp {
            0 => 0,
            -128..=127 => 0x40,
            _ => 0x80,
        }
    }

    fn displacement(&mut self, mode: u8, disp: i32) {
        match mode {
            0 => {}
            0x40 => self.bytes.push(disp as u8),
            _ => self.bytes.extend_from_slice(&disp.to_le_bytes()),
        }
    }

    /// Loads a word; the rest of the register becomes zero.
    pub fn load(&mut self, size: u8, to: Reg, from: Place) {
        match size {
            1 => self.op(4, &[0x0f, 0xb6], to.0, from),
            2 => self.op(4, &[0x0f, 0xb7], to.0, from),
            _ => self.op(size, &[0x8b], to.0, from),
        }
    }

    /// Copies a word into a register whose other bits stay as they are (those of 4 bytes clear the upper half).
    pub fn insert(&mut self, size: u8, to: Reg, from: Place) {
        self.op(size, if size == 1 { &[0x8a] } else { &[0x8b] }, to.0, from);
    }

    /// Stores a word.
    pub fn store(&mut self, size: u8, to: Place, from: Reg) {
        self.op(size, if size == 1 { &[0x88] } else { &[0x89] }, from.0, to);
    }

    /// Stores a constant; one of 8 bytes is sign extended.
    pub fn store_constant(&mut self, size: u8, to: Place, value: i32) {
        self.op(size, if size == 1 { &[0xc6] } else { &[0xc7] }, 0, to);
        self.constant(size, value);
    }

    /// Copies a whole register.
    pub fn copy(&mut self, to: Reg, from: Reg) {
        self.op(8, &[0x8b], to.0, Place::Reg(from));
    }

    /// Sets a whole register.
    pub fn set(&mut self, to: Reg, value: u64) {
        if let Ok(small) = u32::try_from(value) {
            if to.0 >= 8 {
                self.bytes.push(0x41);
            }
            self.bytes.push(0xb8 | to.0 & 7);
            self.bytes.extend_from_slice(&small.to_le_bytes());
        } else if let Ok(negative) = i32::try_from(value as i64) {
            self.op(8, &[0xc7], 0, Place::Reg(to));
            self.bytes.extend_from_slice(&negative.to_le_bytes());
        } else {
            self.bytes.extend_from_slice(&[0x48 | to.0 >> 3, 0xb8 | to.0 & 7]);
            self.bytes.extend_from_slice(&value.to_le_bytes());
        }
    }

    /// The address of a place.
    pub fn address(&mut self, size: u8, to: Reg, of: Place) {
        self.op(size, &[0x8d], to.0, of);
    }

    /// Arithmetic on a register.
    pub fn alu(&mut self, operation: u8, size: u8, to: Reg, with: Place) {
        let opcode = operation << 3 | if size == 1 { 2 } else { 3 };
        self.op(size, &[opcode], to.0, with);
    }

    /// Arithmetic on a place.
    pub fn alu_to(&mut self, operation: u8, size: u8, to: Place, with: Reg) {
        let opcode = operation << 3 | u8::from(size != 1);
        self.op(size, &[opcode], with.0, to);
    }

    /// Arithmetic on a place with a constant.
    pub fn alu_constant(&mut self, operation: u8, size: u8, to: Place, value: i32) {
        match (size, i8::try_from(value)) {
            (1, _) => {
                self.op(1, &[0x80], operation, to);
                self.bytes.push(value as u8);
            }
            (_, Ok(byte)) => {
                self.op(size, &[0x83], operation, to);
                self.bytes.push(byte as u8);
            }
            _ => {
                self.op(size, &[0x81], operation, to);
                self.constant(size, value);
            }
        }
    }

    /// An immediate operand of an instruction with operands of this size.
    pub fn constant(&mut self, size: u8, value: i32) {
        let bytes = value.to_le_bytes();
        self.bytes.extend_from_slice(&bytes[..usize::from(size.min(4))]);
    }

    /// SHL, SHR, SAR and rotates by a constant; `operation` is the middle field of the ModRM byte.
    pub fn shift(&mut self, operation: u8, size: u8, to: Place, count: u8) {
        self.op(size, if size == 1 { &[0xc0] } else { &[0xc1] }, operation, to);
        self.bytes.push(count);
    }

    /// A jump on a condition, to be completed.
    pub fn jump_if(&mut self, condition: u8) -> Jump {
        self.bytes.extend_from_slice(&[0x0f, 0x80 | condition, 0, 0, 0, 0]);
        Jump(self.bytes.len())
    }

    /// A jump whose distance is at a multiple of 4 from the start, to be completed.
    pub fn aligned_jump(&mut self) -> Jump {
        // NOPs of 1 to 3 bytes (Intel SDM vol. 2, NOP).
        let nop: &[u8] = match (self.bytes.len() + 1) % 4 {
            0 => &[],
            1 => &[0x0f, 0x1f, 0x00],
            2 => &[0x66, 0x90],
            _ => &[0x90],
        };
        self.bytes.extend_from_slice(nop);
        self.bytes.extend_from_slice(&[0xe9, 0, 0, 0, 0]);
        Jump(self.bytes.len())
    }

    /// Where a jump has its distance.
    pub fn site(Jump(end): Jump) -> usize {
        end - 4
    }

    /// Completes a jump: it leads here.
    pub fn land(&mut self, Jump(end): Jump) {
        let distance = (self.bytes.len() - end) as i32;
        self.bytes[end - 4..end].copy_from_slice(&distance.to_le_bytes());
    }

    /// `JMP` to the address in a place.
    pub fn jump_to(&mut self, place: Place) {
        self.op(4, &[0xff], 4, place);
    }

    /// The number of a register for `op`.
    pub fn number(reg: Reg) -> u8 {
        reg.0
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    use super::*;

    /// What the code says, by an independent decoder.
    fn listing(make: impl FnOnce(&mut Code)) -> String {
        let mut code = Code::default();
        make(&mut code);
        let mut formatter = IntelFormatter::new();
        let lines = Decoder::with_ip(64, code.bytes(), 0, DecoderOptions::NONE).into_iter().map(|insn| {
            let mut line = String::new();
            formatter.format(&insn, &mut line);
            line
        });
        lines.collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn places_of_every_form_are_encoded() {
        let at = |place| listing(|code| code.load(8, R9, place));
        assert_eq!(at(Place::Reg(R11)), "mov r9,r11");
        assert_eq!(at(Place::At(AX, 0)), "mov r9,[rax]");
        assert_eq!(at(Place::At(R8, -128)), "mov r9,[r8-80h]");
        assert_eq!(at(Place::At(DI, 128)), "mov r9,[rdi+80h]");
        assert_eq!(at(Place::Sib(Some(SI), R10, 3, 0)), "mov r9,[rsi+r10*8]");
        assert_eq!(at(Place::Sib(Some(R8), CX, 0, 4)), "mov r9,[r8+rcx+4]");
        assert_eq!(at(Place::Sib(None, DX, 2, -1)), "mov r9,[rdx*4-1]");
    }

    #[test]
    fn operands_have_the_size_that_was_asked_for() {
        let store = |size| listing(|code| code.store(size, Place::At(AX, 0), SI));
        assert_eq!([1, 2, 4, 8].map(store), ["mov [rax],sil", "mov [rax],si", "mov [rax],esi", "mov [rax],rsi"]);
        let load = |size| listing(|code| code.load(size, R8, Place::Reg(DI)));
        assert_eq!([1, 2, 4, 8].map(load), ["movzx r8d,dil", "movzx r8d,di", "mov r8d,edi", "mov r8,rdi"]);
        let add = |size| listing(|code| code.alu_constant(alu::ADD, size, Place::Reg(CX), -2));
        assert_eq!([1, 2, 4, 8].map(add), ["add cl,0FEh", "add cx,0FFFEh", "add ecx,0FFFFFFFEh", "add rcx,0FFFFFFFFFFFFFFFEh"]);
        let large = |size| listing(|code| code.alu_constant(alu::XOR, size, Place::At(DX, 0), 0x1234));
        assert_eq!([2, 4].map(large), ["xor word ptr [rdx],1234h", "xor dword ptr [rdx],1234h"]);
        let set = |value| listing(|code| code.set(R10, value));
        assert_eq!([1, u64::MAX, 1 << 40].map(set), ["mov r10d,1", "mov r10,0FFFFFFFFFFFFFFFFh", "mov r10,10000000000h"]);
    }

    #[test]
    fn distance_that_is_to_be_changed_is_aligned() {
        for before in 0..8 {
            let mut code = Code::default();
            code.push(&[0x90; 8][..before]);
            let jump = code.aligned_jump();
            assert_eq!(Code::site(jump) % 4, 0);
            assert_eq!(code.bytes()[Code::site(jump) - 1], 0xe9);
        }
    }

    #[test]
    fn jumps_land_where_they_were_told() {
        let text = listing(|code| {
            let jump = code.jump_if(condition::EQUAL);
            code.copy(AX, CX);
            code.land(jump);
            code.jump_to(Place::Reg(AX));
        });
        assert_eq!(text, "je 9; mov rax,rcx; jmp rax");
    }
}
