//! Random programs: runs of random instructions whose memory operands lie in the data, with branches, loops and calls around them.
//!
//! The instructions are those of the comparison with the host (`differential/generate.rs`), decoded and encoded again with operands
//! that mean something: a register whose value is known at that place is taken as the base or index, and where none is, a MOV
//! before the instruction makes one. A program ends by construction: loops count down registers that nothing in them writes, and
//! functions leave RSP alone but in pairs.

use iced_x86::code_asm::*;
use iced_x86::{
    Code, Encoder, FlowControl, Instruction, InstructionInfoFactory, MemoryOperand, Mnemonic, OpAccess, OpKind, Register as R, RflagsBits,
};

use crate::SECOND;
use crate::generate::{Class, Generator, Random};
use crate::guest::{FS_BASE, GS_BASE};
use crate::state::State;

/// Instructions from the generator in a program at most.
const LONGEST: u64 = 40;
/// Constructs inside each other at most; each level may multiply what is executed by [`MAX_ROUNDS`].
const DEEPEST: u32 = 3;
/// Rounds of a loop at most.
const MAX_ROUNDS: u64 = 9;
/// General registers in encoding order.
const GENERAL: [R; 16] =
    [R::RAX, R::RCX, R::RDX, R::RBX, R::RSP, R::RBP, R::RSI, R::RDI, R::R8, R::R9, R::R10, R::R11, R::R12, R::R13, R::R14, R::R15];

/// A program, and what it starts with.
pub struct Program {
    pub code: Vec<u8>,
    /// Offset of its first instruction in the code pages.
    pub offset: u64,
    pub state: State,
}

impl Program {
    /// The program that belongs to a seed.
    pub fn new(seed: u64) -> Program {
        let mut integer = Generator::new(Class::Integer, seed);
        let state = integer.state();
        // Near the end of the first page, now and then.
        let offset = if integer.random.below(2) == 0 { 0 } else { 4096 - 1 - integer.random.below(512) };
        let other = *integer.random.pick(&[Class::Bits, Class::String, Class::Sse2, Class::X87]);
        let mut writer = Writer {
            assembler: CodeAssembler::new(64).unwrap(),
            info: InstructionInfoFactory::new(),
            // Half of the programs are to come to their end.
            faulty: integer.random.below(2) == 0,
            common: Generator::new(Class::Common, seed),
            other: Generator::new(other, seed),
            integer,
            other_class: other,
            known: state.gpr.map(Some),
            reserved: Vec::new(),
            in_function: false,
        };
        if writer.random().below(4) > 0 {
            writer.warm_up();
        }
        let mut left = 1 + writer.random().below(LONGEST);
        if writer.random().below(3) == 0 {
            while left > 0 {
                writer.instruction(&mut left);
            }
        } else {
            writer.items(&mut left, 0, u64::MAX);
        }
        writer.assembler.int3().unwrap();
        let code = writer.assembler.assemble(State::CODE + offset).unwrap();
        Program { code, offset, state }
    }
}

/// One of the assembler's jump instructions.
type Jump = fn(&mut CodeAssembler, CodeLabel) -> Result<(), IcedError>;

struct Writer {
    assembler: CodeAssembler,
    info: InstructionInfoFactory,
    integer: Generator,
    common: Generator,
    other: Generator,
    other_class: Class,
    faulty: bool,
    /// By register: the value it has at this place whatever way led here.
    known: [Option<u64>; 16],
    /// Registers that nothing may write here.
    reserved: Vec<R>,
    /// What lies on top of the stack is a return address.
    in_function: bool,
}

/// Gives an instruction this memory operand.
fn set_operand(instruction: &mut Instruction, operand: &MemoryOperand) {
    instruction.set_memory_base(operand.base);
    instruction.set_memory_index(operand.index);
    instruction.set_memory_index_scale(operand.scale);
    instruction.set_memory_displacement64(operand.displacement as u64);
    instruction.set_memory_displ_size(operand.displ_size);
    instruction.set_segment_prefix(operand.segment_prefix);
}

impl Writer {
    fn random(&mut self) -> &mut Random {
        &mut self.integer.random
    }

    /// Makes the TLB know the data's pages at the address that the program calls them by, and at the one beside its code, so that what
    /// follows does not have to ask the page tables.
    fn warm_up(&mut self) {
        for page in [State::DATA, State::DATA + 0x1000] {
            for base in [R::None, R::RIP] {
                let operand = MemoryOperand::with_base_displ_size(base, page as i64, 8);
                let not = Instruction::with1(Code::Not_rm8, operand).unwrap();
                self.assembler.add_instruction(not).unwrap();
                self.assembler.add_instruction(not).unwrap();
            }
        }
        self.assembler.cmp(byte_ptr(State::DATA + 0x2000), al).unwrap();
        let mut start = self.assembler.create_label();
        self.assembler.jmp(start).unwrap();
        self.assembler.set_label(&mut start).unwrap();
        self.assembler.nop().unwrap();
    }

    /// Up to `most` constructs or instructions while instructions are left.
    fn items(&mut self, left: &mut u64, depth: u32, most: u64) {
        for _ in 0..most {
            if *left == 0 {
                return;
            }
            match self.random().below(if depth < DEEPEST { 24 } else { 18 }) {
                0 => self.stack(),
                1 | 2 => self.structure(left),
                18 | 19 => self.forward_branch(left, depth + 1),
                20 | 21 => self.bounded_loop(left, depth + 1),
                22 => self.function(left, depth + 1),
                23 => self.modified_instruction(),
                _ => self.instruction(left),
            }
        }
    }

    /// Binds a label here, where execution may come from elsewhere.
    fn bind(&mut self, label: &mut CodeLabel) {
        self.assembler.set_label(label).unwrap();
        // An instruction takes one label only.
        self.assembler.nop().unwrap();
        self.known = [None; 16];
    }

    /// A general register that may be written and is not RSP.
    fn register(&mut self, but: &[R]) -> R {
        loop {
            let register = *self.random().pick(&GENERAL);
            if register != R::RSP && !self.reserved.contains(&register) && !but.contains(&register) {
                return register;
            }
        }
    }

    /// Makes sure of a register's value; `false` if nothing may write it.
    fn set(&mut self, register: R, value: u64) -> bool {
        let number = register.number();
        if self.known[number] == Some(value) {
            return true;
        }
        if self.reserved.contains(&register) {
            return false;
        }
        // The shortest form, as compilers do it.
        match (u32::try_from(value), i32::try_from(value as i64)) {
            (Ok(value), _) => self.assembler.mov(gpr32::get_gpr32(R::EAX + number as u32).unwrap(), value).unwrap(),
            (_, Ok(value)) => self.assembler.mov(gpr64::get_gpr64(register).unwrap(), i64::from(value)).unwrap(),
            _ => self.assembler.mov(gpr64::get_gpr64(register).unwrap(), value).unwrap(),
        }
        self.known[number] = Some(value);
        true
    }

    /// Loads a label's address.
    fn load(&mut self, register: R, label: CodeLabel) {
        self.assembler.lea(gpr64::get_gpr64(register).unwrap(), ptr(label)).unwrap();
        self.known[register.number()] = None;
    }

    /// Linear address for a memory operand.
    fn target(&mut self) -> u64 {
        let faulty = self.faulty;
        let random = self.random();
        let end = State::WRITABLE as u64;
        let offset = match random.below(32) {
            // The page that is read only, and its end.
            0 if faulty => end + random.below(4096),
            1 if faulty => State::DATA_SIZE as u64 - random.below(20),
            // Across into it.
            2 if faulty => end - random.below(20),
            3 if faulty => random.next() >> 20,
            4..=6 => 4096 - random.below(20),
            7..=15 => 64 + random.below(end - 128),
            _ => 64 + (random.below(end - 128) & !15),
        };
        State::DATA.wrapping_add(offset)
    }

    /// One instruction of the generators, unless it does not fit here.
    fn instruction(&mut self, left: &mut u64) {
        let (generator, string) = match self.random().below(8) {
            0 => (&mut self.other, self.other_class == Class::String),
            1 | 2 => (&mut self.integer, false),
            _ => (&mut self.common, false),
        };
        let (_, instruction) = generator.instruction();
        if let Some(instruction) = self.fitted(instruction, string) {
            self.emit(instruction);
            *left -= 1;
        }
    }

    fn emit(&mut self, mut instruction: Instruction) {
        // The assembler takes addresses for labels.
        instruction.set_ip(0);
        self.assembler.add_instruction(instruction).unwrap();
        for register in self.written(&instruction) {
            self.known[register.number()] = None;
        }
        // What multiplication and division leave undefined differs from one execution to the next on some processors.
        if matches!(instruction.mnemonic(), Mnemonic::Mul | Mnemonic::Imul | Mnemonic::Div | Mnemonic::Idiv) {
            let register = self.register(&[]);
            if instruction.rflags_written() & RflagsBits::OF != 0 {
                self.assembler.seto(byte_ptr(State::DATA + 8)).unwrap();
            }
            self.assembler.cmp(gpr64::get_gpr64(register).unwrap(), 0x100).unwrap();
        }
        // Some leave OF as it was after a rotate by a constant, and not after one by CL, which is how the interpreter does both.
        if matches!(instruction.mnemonic(), Mnemonic::Rol | Mnemonic::Ror) && instruction.op1_kind() == OpKind::Immediate8 {
            let register = self.register(&[]);
            self.assembler.ror(gpr64::get_gpr64(register).unwrap(), 1).unwrap();
            self.known[register.number()] = None;
        }
    }

    /// General registers that an instruction writes.
    fn written(&mut self, instruction: &Instruction) -> Vec<R> {
        use OpAccess::*;
        let used = self.info.info(instruction).used_registers();
        used.iter()
            .filter(|used| matches!(used.access(), Write | CondWrite | ReadWrite | ReadCondWrite))
            .map(|used| used.register().full_register())
            .filter(|register| register.is_gpr())
            .collect()
    }

    /// The instruction with operands for this place.
    fn fitted(&mut self, mut instruction: Instruction, string: bool) -> Option<Instruction> {
        if instruction.flow_control() != FlowControl::Next {
            return None;
        }
        // A division of anything by anything mostly faults.
        if matches!(instruction.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) && self.random().below(4) != 0 {
            return None;
        }
        let written = self.written(&instruction);
        if written.iter().any(|register| self.reserved.contains(register)) {
            return None;
        }
        let moves_stack = written.contains(&R::RSP);
        let pushes =
            matches!(instruction.mnemonic(), Mnemonic::Push | Mnemonic::Pop | Mnemonic::Pushf | Mnemonic::Pushfq | Mnemonic::Leave)
                && instruction.op0_register().full_register() != R::RSP;
        if moves_stack && (self.in_function || !pushes && self.random().below(32) != 0) {
            return None;
        }
        if instruction.mnemonic() == Mnemonic::Leave {
            let frame = State::DATA + 0x800 + (self.random().below(0x800) & !7);
            if !self.set(R::RBP, frame) {
                return None;
            }
        }
        if string {
            let (source, destination, count) = (self.target(), self.target(), self.random().below(20));
            let placed = self.set(R::RSI, source) && self.set(R::RDI, destination) && self.set(R::RCX, count);
            return placed.then_some(instruction);
        }
        if instruction.op_kinds().any(|kind| kind == OpKind::Memory) {
            self.aim(&mut instruction)?;
        }
        Encoder::new(64).encode(&instruction, State::CODE).ok().map(|_| instruction)
    }

    /// Gives the instruction a memory operand in the data.
    fn aim(&mut self, instruction: &mut Instruction) -> Option<()> {
        use Mnemonic as M;
        let target = self.target();
        if instruction.mnemonic() == M::Xlatb {
            return self.set(R::RBX, target).then_some(());
        }
        let mut taken = Vec::new();
        // Bit strings reach beyond the operand by the bit offset in the register.
        if matches!(instruction.mnemonic(), M::Bt | M::Btc | M::Btr | M::Bts) && instruction.op1_kind() == OpKind::Register {
            let register = instruction.op1_register().full_register();
            let offset = self.random().below(512);
            if !self.set(register, offset) {
                return None;
            }
            taken.push(register);
        }
        let operand = self.memory_operand(target, taken);
        set_operand(instruction, &operand);
        let lockable = matches!(
            instruction.mnemonic(),
            M::Add
                | M::Or
                | M::Adc
                | M::Sbb
                | M::And
                | M::Sub
                | M::Xor
                | M::Inc
                | M::Dec
                | M::Neg
                | M::Not
                | M::Btc
                | M::Btr
                | M::Bts
                | M::Cmpxchg
                | M::Cmpxchg8b
                | M::Cmpxchg16b
                | M::Xadd
                | M::Xchg
        );
        let locked = lockable && instruction.op0_kind() == OpKind::Memory && self.random().below(4) == 0;
        instruction.set_has_lock_prefix(locked);
        Some(())
    }

    /// Some way to address `target`, with MOVs before it as it needs.
    fn memory_operand(&mut self, target: u64, mut taken: Vec<R>) -> MemoryOperand {
        let form = self.random().below(12);
        let fits = |displacement: i64| i32::try_from(displacement).is_ok();
        let (segment, base_of_segment) = match form {
            0 => (R::FS, FS_BASE),
            1 => (R::GS, GS_BASE),
            _ => (R::None, 0),
        };
        let offset = target.wrapping_sub(base_of_segment);
        match form {
            2 if target >> 31 == 0 => return MemoryOperand::with_base_displ_size(R::RIP, target as i64, 8),
            3 if target >> 31 == 0 => return MemoryOperand::with_displ(target, 8),
            0 if fits(offset as i64) && self.random().below(2) == 0 => {
                return MemoryOperand::new(R::None, R::None, 1, offset as i64, 8, false, R::FS);
            }
            _ => {}
        }
        // A known register near by, or any after a MOV.
        let near = GENERAL.iter().copied().filter(|register| {
            let known = self.known[register.number()];
            known.is_some_and(|known| fits(offset.wrapping_sub(known) as i64)) && !taken.contains(register)
        });
        let near: Vec<R> = near.collect();
        let base = if !near.is_empty() && self.random().below(4) != 0 {
            *self.random().pick(&near)
        } else {
            let register = self.register(&taken);
            let distance = if self.random().below(2) == 0 { self.random().below(128) } else { self.random().below(1 << 20) };
            self.set(register, offset.wrapping_sub(distance));
            register
        };
        taken.push(base);
        let mut left = offset.wrapping_sub(self.known[base.number()].unwrap_or_default()) as i64;
        let (mut index, mut scale) = (R::None, 1);
        if self.random().below(3) == 0 {
            index = self.register(&taken);
            scale = 1 << self.random().below(4);
            let value = self.random().below(256);
            let known = self.known[index.number()].filter(|known| fits(left.wrapping_sub(known.wrapping_mul(scale) as i64)));
            let value = known.unwrap_or(value);
            self.set(index, value);
            left = left.wrapping_sub(value.wrapping_mul(scale) as i64);
        }
        if form == 4 && index == R::None && target >> 32 == 0 {
            // By a 32-bit register; what is above it does not count.
            let register = R::EAX + base.number() as u32;
            return MemoryOperand::new(register, R::None, 1, i64::from(left as i32), 1, false, R::None);
        }
        MemoryOperand::new(base, index, scale as u32, left, 1, false, segment)
    }

    /// Accesses at small distances from one register, which moves a little in between.
    fn structure(&mut self, left: &mut u64) {
        let (mut at, base) = (self.target(), self.register(&[]));
        if !self.set(base, at) {
            return;
        }
        let register = gpr64::get_gpr64(base).unwrap();
        for _ in 0..2 + self.random().below(8) {
            if self.random().below(4) == 0 {
                let by = self.random().below(80) as i32 - 40;
                match self.random().below(3) {
                    0 => self.assembler.add(register, by).unwrap(),
                    1 => self.assembler.sub(register, -by).unwrap(),
                    _ => self.assembler.lea(register, ptr(register + by)).unwrap(),
                }
                at = at.wrapping_add_signed(by.into());
                self.known[base.number()] = Some(at);
            } else {
                let (_, instruction) = self.common.instruction();
                let Some(mut instruction) = self.fitted(instruction, false) else { continue };
                let distance = self.random().below(160) as i64 - 80;
                if instruction.op_kinds().any(|kind| kind == OpKind::Memory) && self.known[base.number()] == Some(at) {
                    set_operand(&mut instruction, &MemoryOperand::with_base_displ(base, distance));
                }
                if Encoder::new(64).encode(&instruction, State::CODE).is_err() {
                    continue;
                }
                self.emit(instruction);
                *left = left.saturating_sub(1);
            }
            // Something else may be in the register now.
            if self.known[base.number()] != Some(at) {
                return;
            }
        }
    }

    /// Instructions around the stack that leave it as it was.
    fn stack(&mut self) {
        let value = self.register(&[]);
        let other = gpr64::get_gpr64(self.register(&[])).unwrap();
        let register = gpr64::get_gpr64(value).unwrap();
        let kind = self.random().below(5);
        let saved: Vec<R> = (0..2 + self.random().below(5)).map(|_| self.register(&[])).collect();
        let a = &mut self.assembler;
        match kind {
            0 => {
                a.push(register).unwrap();
                a.pop(other).unwrap();
            }
            1 => {
                a.pushfq().unwrap();
                a.pop(other).unwrap();
            }
            2 => {
                a.push(0x1234_5678).unwrap();
                a.push(register).unwrap();
                a.pop(other).unwrap();
                a.pop(register).unwrap();
            }
            // As functions do.
            3 => {
                let saved: Vec<_> = saved.into_iter().map(|register| gpr64::get_gpr64(register).unwrap()).collect();
                saved.iter().for_each(|&register| a.push(register).unwrap());
                a.sub(rsp, 24).unwrap();
                a.mov(qword_ptr(rsp + 8), register).unwrap();
                a.mov(other, qword_ptr(rsp + 8)).unwrap();
                a.add(rsp, 24).unwrap();
                saved.iter().rev().for_each(|&register| a.pop(register).unwrap());
            }
            // ENTER keeps RBP; the counter of a loop may be there.
            _ => {
                a.enter(24, 0).unwrap();
                a.mov(qword_ptr(rbp - 16), register).unwrap();
                a.mov(other, qword_ptr(rbp - 16)).unwrap();
                a.leave().unwrap();
            }
        }
        self.known[value.number()] = None;
        self.known[R::from(other).number()] = None;
    }

    /// Something may be skipped.
    fn forward_branch(&mut self, left: &mut u64, depth: u32) {
        let mut over = self.assembler.create_label();
        let register = self.register(&[]);
        match self.random().below(10) {
            0 => {
                self.load(register, over);
                self.assembler.jmp(gpr64::get_gpr64(register).unwrap()).unwrap();
            }
            1 => self.assembler.jmp(over).unwrap(),
            2 => self.assembler.jrcxz(over).unwrap(),
            _ => self.jump_if(over),
        }
        let most = 1 + self.random().below(4);
        self.items(left, depth, most);
        self.bind(&mut over);
    }

    /// A conditional jump by flags, often straight after the comparison that makes them.
    fn jump_if(&mut self, to: CodeLabel) {
        const JUMPS: [Jump; 16] = [
            CodeAssembler::jo::<CodeLabel>,
            CodeAssembler::jno::<CodeLabel>,
            CodeAssembler::jb::<CodeLabel>,
            CodeAssembler::jae::<CodeLabel>,
            CodeAssembler::je::<CodeLabel>,
            CodeAssembler::jne::<CodeLabel>,
            CodeAssembler::jbe::<CodeLabel>,
            CodeAssembler::ja::<CodeLabel>,
            CodeAssembler::js::<CodeLabel>,
            CodeAssembler::jns::<CodeLabel>,
            CodeAssembler::jp::<CodeLabel>,
            CodeAssembler::jnp::<CodeLabel>,
            CodeAssembler::jl::<CodeLabel>,
            CodeAssembler::jge::<CodeLabel>,
            CodeAssembler::jle::<CodeLabel>,
            CodeAssembler::jg::<CodeLabel>,
        ];
        let (left, right) = (self.register(&[]), self.register(&[]));
        let number = |register: R| register.number() as u32;
        let byte = gpr8::get_gpr8(R::AL + number(left) % 8).unwrap();
        let half = (gpr32::get_gpr32(R::EAX + number(left)).unwrap(), gpr32::get_gpr32(R::EAX + number(right)).unwrap());
        let whole = (gpr64::get_gpr64(left).unwrap(), gpr64::get_gpr64(right).unwrap());
        let immediate = self.random().next() as i32;
        let kind = self.random().below(8);
        let a = &mut self.assembler;
        match kind {
            0 => a.cmp(whole.0, whole.1).unwrap(),
            1 => a.cmp(half.0, immediate).unwrap(),
            2 => a.cmp(byte, immediate & 0x7f).unwrap(),
            3 => a.test(half.0, half.1).unwrap(),
            4 => a.test(whole.0, whole.0).unwrap(),
            5 => a.sub(half.0, half.1).unwrap(),
            _ => {}
        }
        if kind == 5 {
            self.known[left.number()] = None;
        }
        let jump = *self.random().pick(&JUMPS);
        jump(&mut self.assembler, to).unwrap();
    }

    /// A loop that counts down or up.
    fn bounded_loop(&mut self, left: &mut u64, depth: u32) {
        let rounds = 1 + self.random().below(MAX_ROUNDS);
        let kind = self.random().below(4);
        let counter = if kind == 0 { R::RCX } else { self.register(&[R::RBP]) };
        let register = gpr64::get_gpr64(counter).unwrap();
        let half = gpr32::get_gpr32(R::EAX + counter.number() as u32).unwrap();
        let upwards = kind == 1;
        if self.reserved.contains(&counter) || !self.set(counter, if upwards { 0 } else { rounds }) {
            return;
        }
        let mut again = self.assembler.create_label();
        self.bind(&mut again);
        self.reserved.push(counter);
        let most = 1 + self.random().below(5);
        self.items(left, depth, most);
        self.reserved.pop();
        let a = &mut self.assembler;
        match kind {
            0 => a.loop_(again).unwrap(),
            1 => {
                a.inc(half).unwrap();
                a.cmp(register, rounds as i32).unwrap();
                a.jb(again).unwrap();
            }
            2 => {
                a.sub(register, 1).unwrap();
                a.jg(again).unwrap();
            }
            _ => {
                a.dec(half).unwrap();
                a.jnz(again).unwrap();
            }
        }
        self.known[counter.number()] = None;
    }

    /// A function that is called once or twice.
    fn function(&mut self, left: &mut u64, depth: u32) {
        let (mut entry, mut over) = (self.assembler.create_label(), self.assembler.create_label());
        self.assembler.jmp(over).unwrap();
        self.bind(&mut entry);
        let outer = std::mem::replace(&mut self.in_function, true);
        let most = 1 + self.random().below(4);
        self.items(left, depth, most);
        self.in_function = outer;
        let argument = self.random().below(4) == 0;
        if argument {
            self.assembler.ret_1(8).unwrap()
        } else {
            self.assembler.ret().unwrap()
        }
        self.bind(&mut over);
        for _ in 0..1 + self.random().below(2) {
            let register = self.register(&[]);
            let pointer = gpr64::get_gpr64(register).unwrap();
            if argument {
                self.assembler.push(pointer).unwrap();
            }
            match self.random().below(4) {
                0 => {
                    self.load(register, entry);
                    self.assembler.call(pointer).unwrap();
                }
                1 => {
                    self.load(register, entry);
                    let at = State::DATA + 64 + self.random().below(1024);
                    self.assembler.mov(qword_ptr(at), pointer).unwrap();
                    self.assembler.call(qword_ptr(at)).unwrap();
                }
                _ => self.assembler.call(entry).unwrap(),
            }
            self.known = [None; 16];
        }
    }

    /// A MOV whose immediate is written just before it is executed: in the same block or the next one, by the address of the
    /// code or by another of the same page.
    fn modified_instruction(&mut self) {
        let pointer = self.register(&[]);
        let destination = self.register(&[pointer]);
        let mut changed = self.assembler.create_label();
        self.load(pointer, changed);
        let value = self.random().next() as u8;
        let register = gpr64::get_gpr64(pointer).unwrap();
        // The immediate of MOV r32 is behind the opcode, and behind REX where the register needs that.
        let at = i32::from(destination.number() >= 8) + 1 + self.random().below(2) as i32;
        let at = at + if self.random().below(3) == 0 { SECOND as i32 } else { 0 };
        // In a loop it may be only a later round that writes there.
        if self.random().below(2) == 0 {
            let elsewhere = self.register(&[pointer]);
            self.set(elsewhere, State::DATA + 64);
            let elsewhere = gpr64::get_gpr64(elsewhere).unwrap();
            if self.random().below(2) == 0 {
                self.assembler.cmovb(register, elsewhere).unwrap();
            } else {
                self.assembler.cmovs(register, elsewhere).unwrap();
            }
        }
        if self.random().below(2) == 0 {
            self.assembler.mov(byte_ptr(register + at), u32::from(value)).unwrap();
        } else {
            self.assembler.add(byte_ptr(register + at), 1).unwrap();
        }
        match self.random().below(3) {
            0 => self.assembler.jmp(changed).unwrap(),
            1 => self.assembler.xor(gpr32::get_gpr32(R::EAX + destination.number() as u32).unwrap(), 5).unwrap(),
            _ => {}
        }
        self.assembler.set_label(&mut changed).unwrap();
        self.assembler.mov(gpr32::get_gpr32(R::EAX + destination.number() as u32).unwrap(), 0x0102_0304).unwrap();
        self.known[destination.number()] = None;
        self.known[pointer.number()] = None;
    }
}
