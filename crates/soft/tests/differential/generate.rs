//! Random cases: an instruction of a class, and a state in which it has something to do.
//!
//! Instructions are made of random opcode bytes, not from a table, so that every encoding is reached: prefixes, REX, opcode map,
//! ModRM and immediates are random, and what iced decodes as an instruction of the wanted class and as one that user code may
//! execute without telling the machines apart is kept. Registers of the memory operand are then moved so that it usually, but
//! not always, lies in the data pages.

use iced_x86::{Code, CpuidFeature, Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic, OpKind, Register, RflagsBits};

use crate::state::State;

/// Opcodes of [`Class::Common`].
#[rustfmt::skip]
const COMMON: &[&[u8]] = &[
    // ADD OR ADC SBB AND SUB XOR CMP
    &[0x00], &[0x01], &[0x02], &[0x03], &[0x05], &[0x09], &[0x0b], &[0x11], &[0x13], &[0x19], &[0x1b], &[0x21], &[0x23], &[0x28], &[0x29],
    &[0x2b], &[0x31], &[0x33], &[0x38], &[0x39], &[0x3a], &[0x3b], &[0x80], &[0x81], &[0x83], &[0x83],
    // MOV MOVSXD LEA XCHG TEST
    &[0x88], &[0x89], &[0x89], &[0x8a], &[0x8b], &[0x8b], &[0xb1], &[0xb9], &[0xc6], &[0xc7], &[0x63], &[0x8d], &[0x8d], &[0x87], &[0x84], &[0x85],
    &[0xa8],
    // Multiplication, shifts, NOT NEG MUL DIV, INC DEC
    &[0x69], &[0x6b], &[0xc0], &[0xc1], &[0xc1], &[0xd1], &[0xd3], &[0xf6], &[0xf7], &[0xfe], &[0xfe], &[0xff], &[0xff],
    // PUSH POP CDQE CDQ CLC STC CMC LAHF
    &[0x53], &[0x5e], &[0x98], &[0x99], &[0xf8], &[0xf9], &[0xf5], &[0x9f],
    // CMOV SETcc
    &[0x0f, 0x42], &[0x0f, 0x44], &[0x0f, 0x48], &[0x0f, 0x4f], &[0x0f, 0x92], &[0x0f, 0x95], &[0x0f, 0x9a], &[0x0f, 0x9c],
    // BT BTS BTR, double shifts, IMUL, CMPXCHG, MOVZX MOVSX, BSF, XADD, BSWAP
    &[0x0f, 0xa3], &[0x0f, 0xab], &[0x0f, 0xb3], &[0x0f, 0xba], &[0x0f, 0xa4], &[0x0f, 0xad], &[0x0f, 0xaf], &[0x0f, 0xb1], &[0x0f, 0xb6],
    &[0x0f, 0xb7], &[0x0f, 0xbe], &[0x0f, 0xbf], &[0x0f, 0xbc], &[0x0f, 0xc1], &[0x0f, 0xca],
];

/// Kind of instructions to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    Integer,
    /// The integer instructions that compilers make most code of, with few useless prefixes.
    Common,
    /// BMI1, BMI2 and ADX.
    Bits,
    String,
    X87,
    Mmx,
    Sse,
    Sse2,
    SseLater,
}

impl Class {
    /// How many mnemonics a run of the default length reaches at least; a guard against a generator that went blind.
    pub fn mnemonics_expected(self) -> usize {
        match self {
            Class::Integer => 80,
            Class::Common => 50,
            Class::Bits => 14,
            Class::String => 5,
            Class::X87 => 60,
            Class::Mmx => 25,
            Class::Sse => 35,
            Class::Sse2 => 70,
            Class::SseLater => 50,
        }
    }

    fn has(self, instruction: &Instruction) -> bool {
        use CpuidFeature as F;
        let features = instruction.cpuid_features();
        let any = |wanted: &[F]| features.iter().any(|feature| wanted.contains(feature));
        let fpu = any(&[F::FPU, F::FPU287, F::FPU387]);
        match self {
            Class::String => instruction.is_string_instruction(),
            Class::Bits => any(&[F::BMI1, F::BMI2, F::ADX]),
            Class::Integer | Class::Common => {
                !instruction.is_string_instruction()
                    && !fpu
                    && features.iter().all(|feature| {
                        matches!(
                            feature,
                            F::INTEL8086
                                | F::INTEL186
                                | F::INTEL286
                                | F::INTEL386
                                | F::INTEL486
                                | F::X64
                                | F::CMOV
                                | F::CX8
                                | F::CMPXCHG16B
                                | F::POPCNT
                                | F::LZCNT
                                | F::BMI1
                                | F::MOVBE
                                | F::MULTIBYTENOP
                                | F::PREFETCHW
                                | F::PAUSE
                        )
                    })
                    && (!any(&[F::BMI1]) || instruction.mnemonic() == Mnemonic::Tzcnt)
            }
            Class::X87 => fpu,
            Class::Mmx => any(&[F::MMX]),
            Class::Sse => any(&[F::SSE]),
            Class::Sse2 => any(&[F::SSE2]),
            Class::SseLater => any(&[F::SSE3, F::SSSE3, F::SSE4_1, F::SSE4_2, F::AES, F::PCLMULQDQ]) && !any(&[F::AVX, F::MONITOR]),
        }
    }

    /// Opcode bytes of this class, before ModRM.
    fn opcode(self, random: &mut Random, bytes: &mut Vec<u8>) {
        match self {
            Class::Common => bytes.extend(*random.pick(COMMON)),
            Class::X87 => bytes.push(0xd8 + random.below(8) as u8),
            Class::String => bytes.push(*random.pick(&[0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf])),
            Class::Bits if random.below(4) == 0 => bytes.extend([0x0f, 0x38, 0xf6]),
            // A VEX prefix for map 2 (or 3, of RORX), with VVVV all ones where no register belongs there.
            Class::Bits => {
                let rorx = random.below(12) == 0;
                let register = if rorx { 0x78 } else { (random.below(16) as u8) << 3 };
                let (map, opcode, kind) = if rorx { (3, 0xf0, 3) } else { (2, 0xf2 + random.below(6) as u8, random.below(4) as u8) };
                bytes.clear();
                bytes.extend([0xc4, (random.next() as u8 & 0xe0) | map, (random.below(2) as u8) << 7 | register | kind, opcode]);
            }
            Class::Integer if random.below(3) > 0 => bytes.push(random.next() as u8),
            _ => {
                bytes.push(0x0f);
                match random.below(8) {
                    0 | 1 => bytes.extend([0x38, random.next() as u8]),
                    2 => bytes.extend([0x3a, random.next() as u8]),
                    _ => bytes.push(random.next() as u8),
                }
            }
        }
    }
}

/// One case.
pub struct Case {
    pub bytes: Vec<u8>,
    pub instruction: Instruction,
    pub state: State,
    /// RFLAGS bits that the instruction leaves undefined.
    pub undefined_flags: u64,
    /// General register whose value is undefined afterwards.
    pub undefined_register: Option<usize>,
    /// Whether what it writes to memory is undefined.
    pub undefined_memory: bool,
}

impl Case {
    /// The case for people.
    pub fn describe(&self) -> String {
        format!("{:02x?} {}\n    gpr {:x?}\n    flags {:x}", self.bytes, self.instruction, self.state.gpr, self.state.rflags)
    }
}

/// Small generator with a good enough distribution (xorshift64*), so that a seed means the same everywhere.
pub struct Random(u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 32) % limit
    }

    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len() as u64) as usize]
    }
}

/// Makes the cases of one class.
pub struct Generator {
    class: Class,
    pub random: Random,
    fx: [u8; 512],
}

impl Generator {
    pub fn new(class: Class, seed: u64) -> Generator {
        Generator { class, random: Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1), fx: [0; 512] }
    }

    /// The next case.
    pub fn next_case(&mut self) -> Case {
        let (bytes, instruction) = self.instruction();
        let mut state = self.state();
        if self.class == Class::String {
            for register in [6, 7] {
                state.gpr[register] = State::DATA + self.random.below(State::DATA_SIZE as u64 + 64);
            }
            state.gpr[1] = if self.random.below(4) == 0 { self.random.below(1200) } else { self.random.below(20) };
            if instruction.memory_displ_size() == 4 || bytes.contains(&0x67) {
                state.gpr[1] |= self.random.next() << 32;
            }
        }
        self.aim(&instruction, &mut state);
        let undefined = instruction.rflags_undefined();
        let undefined_flags = [
            (RflagsBits::CF, 1),
            (RflagsBits::PF, 4),
            (RflagsBits::AF, 0x10),
            (RflagsBits::ZF, 0x40),
            (RflagsBits::SF, 0x80),
            (RflagsBits::OF, 0x800),
        ]
        .iter()
        .filter(|(bit, _)| undefined & bit != 0)
        .map(|(_, flag)| flag)
        .sum();
        let double_shift = matches!(instruction.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd) && instruction.op1_register().size() == 2;
        // A 16-bit double shift by more than 16 leaves its result undefined; so does BSWAP of 16 bits.
        let undefined_result = double_shift || instruction.code() == Code::Bswap_r16;
        let undefined_register =
            (undefined_result && instruction.op0_kind() == OpKind::Register).then(|| instruction.op0_register().full_register().number());
        let undefined_memory = double_shift && instruction.op0_kind() == OpKind::Memory;
        Case { bytes, instruction, state, undefined_flags, undefined_register, undefined_memory }
    }

    /// Random bytes until they are an instruction to test.
    pub fn instruction(&mut self) -> (Vec<u8>, Instruction) {
        loop {
            let mut bytes = Vec::with_capacity(24);
            let random = &mut self.random;
            for (prefix, chance) in [(0x66, 4), (0xf3, 6), (0xf2, 6), (0xf0, 24), (0x67, 24), (0x2e, 60)] {
                let repeats = matches!(prefix, 0xf2 | 0xf3);
                let chance = match self.class {
                    Class::String if repeats => 2,
                    Class::Common if repeats => 64,
                    _ => chance,
                };
                if random.below(chance) == 0 {
                    bytes.push(prefix);
                }
            }
            if random.below(2) == 0 {
                bytes.push(0x40 | random.below(16) as u8);
            }
            self.class.opcode(random, &mut bytes);
            for _ in 0..12 {
                bytes.push(random.next() as u8);
            }
            let mut decoder = Decoder::with_ip(64, &bytes, State::CODE, DecoderOptions::NONE);
            let instruction = decoder.decode();
            if decoder.last_error() == DecoderError::None && self.class.has(&instruction) && is_comparable(&instruction) {
                bytes.truncate(instruction.len());
                return (bytes, instruction);
            }
        }
    }

    /// A value that some instruction finds interesting.
    pub fn value(&mut self) -> u64 {
        let random = &mut self.random;
        let value = match random.below(8) {
            0 => random.below(64),
            1 => 0u64.wrapping_sub(random.below(64)),
            2 => *random.pick(&[0, 0x7f, 0x80, 0x7fff, 0x8000, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, i64::MAX as u64, i64::MIN as u64]),
            3 => 1 << random.below(64),
            4 => random.next() & 0xffff_ffff,
            5 => State::DATA + random.below(State::DATA_SIZE as u64),
            _ => random.next(),
        };
        // A wild value must not be an address that something else in this process has.
        if (0x1_0000..0x0000_8000_0000_0000).contains(&value)
            && !(State::DATA..State::DATA + 0x10_0000).contains(&value)
            && value > 0xffff_ffff
        {
            value | 0x4000_0000_0000_0000
        } else {
            value
        }
    }

    /// A random state.
    pub fn state(&mut self) -> State {
        let mut gpr = [0; 16];
        for register in &mut gpr {
            *register = self.value();
        }
        gpr[4] = State::DATA + 0x800 + (self.random.below(0x1000) & !7);
        let mut data = vec![0; State::DATA_SIZE];
        for chunk in data.chunks_mut(8) {
            let value = self.value().to_le_bytes();
            chunk.copy_from_slice(&value[..chunk.len()]);
        }
        let rflags = 0x202 | self.random.next() & 0xcd5;
        self.random_fx();
        State { gpr, rip: State::CODE, rflags, fx: self.fx, data }
    }

    /// Random x87 and SSE state; exceptions are masked most of the time.
    fn random_fx(&mut self) {
        let mut fx = [0u8; 512];
        let random = &mut self.random;
        // FCW: precision, rounding; masks.
        let precision = *random.pick(&[0x000u16, 0x200, 0x300, 0x300, 0x300]);
        let masks = if random.below(10) == 0 { random.below(64) as u16 } else { 0x3f };
        let fcw = 0x40 | masks | precision | (random.below(4) as u16) << 10;
        let mmx = self.class == Class::Mmx || random.below(2) == 0;
        let top = if mmx { 0 } else { random.below(8) as u16 };
        let mut fsw = top << 11 | (random.next() as u16 & 0x4700);
        // A pending exception now and then: the flag and, because it is unmasked, the summary and busy bits.
        if masks != 0x3f && random.below(4) == 0 {
            let flags = random.below(64) as u16;
            fsw |= flags;
            if flags & !masks & 0x3f != 0 {
                fsw |= 0x8080;
            }
        }
        fx[0..2].copy_from_slice(&fcw.to_le_bytes());
        fx[2..4].copy_from_slice(&fsw.to_le_bytes());
        fx[4] = match random.below(4) {
            0 => random.next() as u8,
            _ => 0xff,
        };
        let mxcsr = (if random.below(10) == 0 { random.below(64) as u32 } else { 0x3f }) << 7
            | (random.below(4) as u32) << 13
            | if random.below(8) == 0 { 0x8000 } else { 0 }
            | if random.below(8) == 0 { 0x40 } else { 0 }
            | if random.below(4) == 0 { random.below(64) as u32 } else { 0 };
        fx[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        fx[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
        for n in 0..8 {
            let at = 32 + 16 * n;
            let (mantissa, exponent) = match random.below(8) {
                0 => (0, 0),
                1 => (random.next() | 1 << 63, 0x7fff),
                2 => (1 << 63, 0x7fff | (random.below(2) as u16) << 15),
                3 => (random.next() >> random.below(64), random.next() as u16),
                4 => (random.next() & !(1 << 63), 0),
                _ => (random.next() | 1 << 63, (0x3fff + random.below(64) as u16 - 32) | ((random.below(2) as u16) << 15)),
            };
            fx[at..at + 8].copy_from_slice(&mantissa.to_le_bytes());
            fx[at + 8..at + 10].copy_from_slice(&exponent.to_le_bytes());
        }
        for n in 0..32 {
            let at = 160 + 8 * n;
            let value = match random.below(6) {
                0 => f64::to_bits((random.below(2000) as f64 - 1000.0) / 8.0),
                1 => {
                    let low = f32::to_bits((random.below(2000) as f32 - 1000.0) / 8.0);
                    let high = f32::to_bits((random.below(2000) as f32 - 1000.0) * 3.0);
                    u64::from(low) | u64::from(high) << 32
                }
                2 => *random.pick(&[0, 0x7ff0_0000_0000_0000, 0xfff8_0000_0000_0000, 0x7f80_0000_7fc0_0000, 1, 0x8000_0000_8000_0000]),
                3 => random.next() & 0x0f0f_0f0f_0f0f_0f0f,
                _ => random.next(),
            };
            fx[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        self.fx = fx;
    }

    /// Moves a register of the memory operand so that the operand lies in the data pages, most of the time.
    fn aim(&mut self, instruction: &Instruction, state: &mut State) {
        if !instruction.op_kinds().any(|kind| kind == OpKind::Memory) || self.random.below(12) == 0 {
            return;
        }
        let base = instruction.memory_base();
        let index = instruction.memory_index();
        if base == Register::None || base.is_ip() {
            return;
        }
        let aligned = if self.random.below(4) == 0 { 0 } else { 15 };
        let target = State::DATA + 0x40 + (self.random.below(State::WRITABLE as u64 + 0x100) & !aligned);
        let value = |register: Register, state: &State| if register == Register::None { 0 } else { state.gpr[register.number()] };
        let number = base.number();
        if index != Register::None && index.number() == number {
            return;
        }
        let scaled = value(index, state).wrapping_mul(u64::from(instruction.memory_index_scale()));
        let mut wanted = target.wrapping_sub(instruction.memory_displacement64()).wrapping_sub(scaled);
        // Bit strings reach beyond the operand by the bit offset in the register.
        if matches!(instruction.mnemonic(), Mnemonic::Bt | Mnemonic::Btc | Mnemonic::Btr | Mnemonic::Bts)
            && instruction.op1_kind() == OpKind::Register
        {
            let bits = state.gpr[instruction.op1_register().full_register().number()];
            let offset = match instruction.op1_register().size() {
                2 => i64::from(bits as i16 >> 4) * 2,
                4 => i64::from(bits as i32 >> 5) * 4,
                _ => (bits as i64 >> 6) * 8,
            };
            if instruction.op1_register().full_register().number() != number {
                wanted = wanted.wrapping_sub(offset as u64);
            }
        }
        if base.size() == 4 {
            wanted = wanted & 0xffff_ffff | state.gpr[number] & !0xffff_ffff;
        }
        state.gpr[number] = wanted;
    }
}

/// Whether user code may execute it on both sides with the same result.
fn is_comparable(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    if instruction.segment_prefix() == Register::FS || instruction.segment_prefix() == Register::GS {
        return false;
    }
    // Segment registers mean different descriptors on the two sides.
    if (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Register && instruction.op_register(n).is_segment_register()) {
        return false;
    }
    // Wild memory operands without a register could be anything of this process.
    let far = (0..instruction.op_count()).any(|n| matches!(instruction.op_kind(n), OpKind::FarBranch16 | OpKind::FarBranch32));
    if far || instruction.code().is_jmp_far_indirect() || instruction.code().is_call_far_indirect() {
        return false;
    }
    !matches!(
        instruction.mnemonic(),
        // Enter the kernel or a debugger, or end in INT3's own vector.
        M::Int | M::Int3 | M::Int1 | M::Into | M::Syscall | M::Sysenter | M::Vmcall | M::Vmmcall | M::Iret | M::Iretd | M::Iretq | M::Retf
            | M::Sysexit | M::Sysexitq | M::Sysret | M::Sysretq | M::Getsec
            // Differ from moment to moment.
            | M::Rdtsc | M::Rdtscp | M::Rdrand | M::Rdseed | M::Cpuid | M::Rdpmc | M::Rdpid
            // Show the machine's own tables or change its TLS.
            | M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw | M::Lar | M::Lsl | M::Verr | M::Verw
            | M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase | M::Lfs | M::Lgs | M::Lss
            // TF and AC from random stack contents.
            | M::Popf | M::Popfd | M::Popfq
            // Our guest has no XSAVE; whole-state instructions have their own tests.
            | M::Xgetbv | M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64
            | M::Monitor | M::Mwait
    ) && !instruction.is_privileged()
}
