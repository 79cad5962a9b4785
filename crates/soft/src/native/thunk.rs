//! Thunks: functions made at run time, each around one instruction that the host's processor executes for the guest.
//!
//! Operands are canonical, so that the number of thunks is bounded by the instruction set and not by what a guest does: vector
//! operands are XMM0 and XMM1 (or MM0 and MM1), general registers are RAX, memory operands have been loaded by the caller. Only
//! an immediate byte makes forms of their own; it cannot be an argument. What does not fit the registers of the calling
//! convention travels in an [`Io`].
//!
//! ```text
//!   addsd xmm3, [rbx]  ->  (guest's MXCSR)        pshufd xmm3, xmm9, 0x4e  ->  pshufd xmm0, xmm1, 0x4e
//!                          addsd xmm0, xmm1                                    ret
//!                          stmxcsr [rdi + mxcsr]
//!                          (host's MXCSR)
//!                          ret
//! ```
//!
//! Changing MXCSR costs as much as fifty additions, and STMXCSR next to nothing. So a thunk loads the guest's MXCSR only when the
//! register holds something else, and puts the host's back only when the guest's control bits are not the host's. Usually they
//! are, and then the guest's exception flags stay in the register from one thunk to the next; to Rust they mean nothing.
//!
//! x87 instructions run between FXRSTOR64 and FXSAVE64 of the guest's whole area. The host never takes #XM or #MF: the caller
//! masks all SIMD exceptions and looks at the flags afterwards, and it runs no x87 thunk while an exception is pending.
#![allow(unsafe_code)] // Calls generated code.

use std::arch::x86_64::_fxsave64;
use std::mem::{MaybeUninit, offset_of};
use std::ptr::NonNull;

use iced_x86::code_asm::{
    AsmMemoryOperand, CodeAssembler, al, ax, byte_ptr, dword_ptr, mm0, mm1, ptr, qword_ptr, r8d, rax, rcx, rdi, rdx, rsp, word_ptr, xmm0,
    xmm1,
};
use iced_x86::{Code, IcedError, Instruction, Mnemonic, OpKind, Register, RflagsBits};

use super::area::{FxArea, mxcsr, x87};
use super::xmm::__m128i;
use crate::flags::StatusFlags;
use crate::op::Op;

/// Arguments and results of a vector thunk that are not XMM registers. Which of them are used depends on the [`Shape`].
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Io {
    /// MXCSR to execute under, with all exceptions masked; then its value after.
    pub mxcsr: u32,
    /// MXCSR as the thunk found it.
    found: u32,
    /// General register operand; RAX of PCMPESTRx.
    pub gpr: u64,
    /// RDX of PCMPESTRx.
    pub rdx: u64,
    /// Result of PCMPxSTRI.
    pub rcx: u64,
    /// MMX operands; the first is written back.
    pub mm: [u64; 2],
    flags: u16,
}

impl Io {
    /// Arguments of a thunk that needs none, to be filled in.
    #[inline(always)]
    pub fn new() -> Io {
        Io { mxcsr: mxcsr::MASKS, found: 0, gpr: 0, rdx: 0, rcx: 0, mm: [0; 2], flags: 0 }
    }

    /// The six arithmetic flags that the instruction left.
    #[inline]
    pub fn status(&self) -> StatusFlags {
        StatusFlags(self.flags)
    }
}

/// What kind of register an operand is (or would be, when it is in memory).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// There is no such operand.
    None,
    /// XMM.
    Xmm,
    /// MMX.
    Mm,
    /// General, 32 bits.
    Gpr32,
    /// General, 64 bits.
    Gpr64,
}

impl Class {
    /// The class of operand `n`. iced's own table of operands (`Instruction::op_code`) is nearly a megabyte, and made as a whole when it is asked for the
    /// first time.
    fn of(insn: &Instruction, n: u32) -> Option<Class> {
        let register = insn.op_register(n);
        Some(match insn.op_kind(n) {
            OpKind::Register if register.is_xmm() => Class::Xmm,
            OpKind::Register if register.is_mm() => Class::Mm,
            OpKind::Register if register.is_gpr32() => Class::Gpr32,
            OpKind::Register if register.is_gpr64() => Class::Gpr64,
            OpKind::Memory => Class::in_memory(insn)?,
            _ => return None,
        })
    }

    /// The class of the memory operand.
    fn in_memory(insn: &Instruction) -> Option<Class> {
        use Mnemonic::*;
        Some(match insn.mnemonic() {
            Cvtsi2ss | Cvtsi2sd | Pinsrd | Pinsrq | Pextrd | Pextrq if insn.memory_size().size() == 8 => Class::Gpr64,
            Cvtsi2ss | Cvtsi2sd | Pinsrd | Pinsrq | Pextrd | Pextrq => Class::Gpr32,
            Pinsrb | Pinsrw | Pextrb | Pextrw | Extractps => match insn.code() {
                Code::Pinsrb_xmm_r64m8_imm8
                | Code::Pinsrw_xmm_r64m16_imm8
                | Code::Pinsrw_mm_r64m16_imm8
                | Code::Pextrb_r64m8_xmm_imm8
                | Code::Pextrw_r64m16_xmm_imm8
                | Code::Extractps_r64m32_xmm_imm8 => Class::Gpr64,
                _ => Class::Gpr32,
            },
            Cvtpi2ps | Cvtpi2pd => Class::Mm,
            Cvtps2pi | Cvttps2pi | Cvtpd2pi | Cvttpd2pi | Cvtss2si | Cvttss2si | Cvtsd2si | Cvttsd2si => Class::Xmm,
            // What only moves has handlers of its own.
            Movd | Movq | Movlps | Movhps | Movlpd | Movhpd | Movntdqa | Lddqu => return None,
            _ if insn.op0_register().is_mm() => Class::Mm,
            _ if insn.op0_register().is_xmm() => Class::Xmm,
            _ => return None,
        })
    }

    /// Whether the operand is a general register.
    pub fn is_gpr(self) -> bool {
        matches!(self, Class::Gpr32 | Class::Gpr64)
    }
}

/// What a vector instruction takes and gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// First operand: destination, or first source of comparisons.
    pub first: Class,
    /// Second operand.
    pub second: Class,
    /// There is an immediate byte.
    pub immediate: bool,
    /// Depends on MXCSR and may raise SIMD floating-point exceptions.
    pub floating: bool,
    /// Writes the arithmetic flags.
    pub flags: bool,
    /// Reads XMM0 besides its operands.
    pub mask: bool,
    /// Reads the lengths in RAX and RDX.
    pub lengths: bool,
    /// Result in RCX.
    pub index: bool,
}

impl Shape {
    /// The shape of an instruction; `None` for those that no vector thunk can execute.
    pub fn of(insn: &Instruction) -> Option<Shape> {
        let count = insn.op_count();
        let immediate = count > 1 && insn.op_kind(count - 1) == OpKind::Immediate8;
        let class = |n| if n < count - u32::from(immediate) { Class::of(insn, n) } else { Some(Class::None) };
        let (first, second, third) = (class(0)?, class(1)?, class(2)?);
        if first == Class::None || third != Class::None || first.is_gpr() && second.is_gpr() {
            return None;
        }
        let mnemonic = insn.mnemonic();
        let lengths = matches!(mnemonic, Mnemonic::Pcmpestri | Mnemonic::Pcmpestri64 | Mnemonic::Pcmpestrm | Mnemonic::Pcmpestrm64);
        let string = lengths || matches!(mnemonic, Mnemonic::Pcmpistri | Mnemonic::Pcmpistrm);
        let index = matches!(mnemonic, Mnemonic::Pcmpestri | Mnemonic::Pcmpestri64 | Mnemonic::Pcmpistri);
        let compare = matches!(mnemonic, Mnemonic::Comiss | Mnemonic::Comisd | Mnemonic::Ucomiss | Mnemonic::Ucomisd | Mnemonic::Ptest);
        Some(Shape {
            first,
            second,
            immediate,
            floating: is_floating(mnemonic),
            flags: string || compare,
            mask: matches!(mnemonic, Mnemonic::Blendvps | Mnemonic::Blendvpd | Mnemonic::Pblendvb | Mnemonic::Sha256rnds2),
            lengths,
            index,
        })
    }

    /// Whether an operand is an MMX register.
    pub fn uses_mmx(self) -> bool {
        self.first == Class::Mm || self.second == Class::Mm
    }
}

/// Whether an instruction depends on MXCSR. CVTPI2PD, CVTDQ2PD and CVTSI2SD from 32 bits are exact, RCP and RSQRT ignore MXCSR.
fn is_floating(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Addps
            | Addpd
            | Addss
            | Addsd
            | Subps
            | Subpd
            | Subss
            | Subsd
            | Mulps
            | Mulpd
            | Mulss
            | Mulsd
            | Divps
            | Divpd
            | Divss
            | Divsd
            | Minps
            | Minpd
            | Minss
            | Minsd
            | Maxps
            | Maxpd
            | Maxss
            | Maxsd
            | Sqrtps
            | Sqrtpd
            | Sqrtss
            | Sqrtsd
            | Cmpps
            | Cmppd
            | Cmpss
            | Cmpsd
            | Comiss
            | Comisd
            | Ucomiss
            | Ucomisd
            | Cvtdq2ps
            | Cvtpd2dq
            | Cvtpd2pi
            | Cvtpd2ps
            | Cvtpi2ps
            | Cvtps2dq
            | Cvtps2pd
            | Cvtps2pi
            | Cvtsd2si
            | Cvtsd2ss
            | Cvtsi2sd
            | Cvtsi2ss
            | Cvtss2sd
            | Cvtss2si
            | Cvttpd2dq
            | Cvttpd2pi
            | Cvttps2dq
            | Cvttps2pi
            | Cvttsd2si
            | Cvttss2si
            | Addsubps
            | Addsubpd
            | Haddps
            | Haddpd
            | Hsubps
            | Hsubpd
            | Roundps
            | Roundpd
            | Roundss
            | Roundsd
            | Dpps
            | Dppd
    )
}

/// Entry of a thunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Thunk(NonNull<u8>);

// SAFETY: an address; what it points at lives and is called where its arena is.
unsafe impl Send for Thunk {}

// Vectors travel in XMM registers: that is the calling convention's own rule for them, whatever their layout in memory.
#[allow(improper_ctypes_definitions)]
type VectorFunction = unsafe extern "sysv64" fn(__m128i, __m128i, __m128i, *mut Io) -> __m128i;
type X87Function = unsafe extern "sysv64" fn(*mut FxArea, *mut [u8; 16], u64) -> u64;

impl Thunk {
    /// A thunk from the address at which an arena put its code.
    pub fn new(entry: NonNull<u8>) -> Thunk {
        Thunk(entry)
    }

    /// The thunk that this module's lowering stored in an op's immediate.
    #[inline(always)]
    pub fn of(op: &Op) -> Thunk {
        debug_assert!(op.imm != 0);
        // SAFETY: the handlers that call this run only for ops whose lowering did `op.imm = thunk.address()`, which is not null.
        Thunk(unsafe { NonNull::new_unchecked(op.imm as *mut u8) })
    }

    /// For [`Thunk::of`].
    pub fn address(self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// Executes an instruction that needs nothing but its two operands; gives the first one as it is then.
    #[inline(always)]
    pub fn call_plain(self, first: __m128i, second: __m128i) -> __m128i {
        // SAFETY: as in `call_masked`; the code for such a shape does not touch the `Io`.
        unsafe { std::mem::transmute::<NonNull<u8>, VectorFunction>(self.0)(first, second, first, std::ptr::null_mut()) }
    }

    /// The same under `mxcsr`, which has all exceptions masked; also gives MXCSR as it is then.
    #[inline(always)]
    pub fn call_floating(self, first: __m128i, second: __m128i, mxcsr: u32) -> (__m128i, u32) {
        let mut io = MaybeUninit::<Io>::uninit();
        let at = io.as_mut_ptr();
        // SAFETY: as in `call_masked`; the code for such a shape reads only `mxcsr`, and writes it back.
        unsafe {
            (&raw mut (*at).mxcsr).write(mxcsr);
            let result = std::mem::transmute::<NonNull<u8>, VectorFunction>(self.0)(first, second, first, at);
            (result, (&raw const (*at).mxcsr).read())
        }
    }

    /// Executes a vector instruction on its two operands; gives the first one as it is then.
    #[inline(always)]
    pub fn call(self, first: __m128i, second: __m128i, io: &mut Io) -> __m128i {
        self.call_masked(first, second, first, io)
    }

    /// Executes an instruction with [`Shape::mask`]: XMM0, then the two operands.
    #[inline(always)]
    pub fn call_masked(self, mask: __m128i, first: __m128i, second: __m128i, io: &mut Io) -> __m128i {
        // SAFETY: the address is that of code made by `assemble_vector`, a function of this type, in an arena that lives as long
        // as the blocks whose ops refer to it. It touches `io` only, and keeps what the calling convention wants kept.
        unsafe { std::mem::transmute::<NonNull<u8>, VectorFunction>(self.0)(mask, first, second, io) }
    }

    /// Executes an x87 instruction on a whole area without pending exception, with its memory operand and arithmetic flags.
    /// Gives the arithmetic flags after it, which mean something for FCOMI and its kind.
    pub fn call_x87(self, area: &mut FxArea, memory: &mut [u8; 16], status: u64) -> StatusFlags {
        debug_assert!(area.fsw & !area.fcw & x87::FLAGS == 0);
        debug_assert!(area.mxcsr & !area.mxcsr_mask == 0);
        // SAFETY: the address is that of code made by `assemble_x87`, a function of this type. FXRSTOR64 does not fault: the area
        // is aligned by its type and reserved MXCSR bits are refused where they could get in. The instruction does not, because
        // nothing is pending. Its operand, 16 bytes at most, is `memory`.
        let result = unsafe { std::mem::transmute::<NonNull<u8>, X87Function>(self.0)(area, memory, status | FIXED_FLAGS) };
        StatusFlags(result as u16)
    }
}

/// RFLAGS bit 1, always set.
const FIXED_FLAGS: u64 = 2;

/// Machine code of a vector thunk for the instruction with this code and immediate.
pub(super) fn assemble_vector(code: Code, immediate: u8, shape: Shape) -> Result<Vec<u8>, IcedError> {
    const MXCSR: usize = offset_of!(Io, mxcsr);
    const FOUND: usize = offset_of!(Io, found);
    const GPR: usize = offset_of!(Io, gpr);
    const RDX: usize = offset_of!(Io, rdx);
    const RCX: usize = offset_of!(Io, rcx);
    const MM0: usize = offset_of!(Io, mm);
    const MM1: usize = offset_of!(Io, mm) + 8;
    const FLAGS: usize = offset_of!(Io, flags);

    let mut a = CodeAssembler::new(64)?;
    // Arguments that are in registers already: XMM0 (mask or first), XMM1, XMM2, RDI.
    if shape.first == Class::Mm {
        a.movq(mm0, qword_ptr(rdi + MM0))?;
    }
    if shape.second == Class::Mm {
        a.movq(mm1, qword_ptr(rdi + MM1))?;
    }
    if shape.second.is_gpr() || shape.lengths {
        a.mov(rax, qword_ptr(rdi + GPR))?;
    }
    if shape.lengths {
        a.mov(rdx, qword_ptr(rdi + RDX))?;
    }
    if shape.floating {
        let mut same = a.create_label();
        a.stmxcsr(dword_ptr(rdi + FOUND))?;
        a.mov(r8d, dword_ptr(rdi + MXCSR))?;
        a.cmp(r8d, dword_ptr(rdi + FOUND))?;
        a.je(same)?;
        a.ldmxcsr(dword_ptr(rdi + MXCSR))?;
        a.set_label(&mut same)?;
        a.zero_bytes()?;
    }

    a.add_instruction(canonical(code, immediate, shape))?;

    if shape.flags {
        a.lahf()?;
        a.seto(al)?;
        a.mov(word_ptr(rdi + FLAGS), ax)?;
    }
    if shape.index {
        a.mov(qword_ptr(rdi + RCX), rcx)?;
    }
    if shape.first.is_gpr() {
        a.mov(qword_ptr(rdi + GPR), rax)?;
    }
    if shape.floating {
        a.stmxcsr(dword_ptr(rdi + MXCSR))?;
        restore_mxcsr(&mut a, dword_ptr(rdi + MXCSR), dword_ptr(rdi + FOUND))?;
    }
    if shape.first == Class::Mm {
        a.movq(qword_ptr(rdi + MM0), mm0)?;
    }
    if shape.uses_mmx() {
        a.emms()?;
    }
    if shape.mask {
        a.movaps(xmm0, xmm1)?;
    }
    a.ret()?;
    a.assemble(0)
}

/// Loads the host's MXCSR unless the guest's, which is in the register, has the same control bits (the default ones).
fn restore_mxcsr(a: &mut CodeAssembler, guest: AsmMemoryOperand, host: AsmMemoryOperand) -> Result<(), IcedError> {
    let mut done = a.create_label();
    a.mov(r8d, guest)?;
    a.and(r8d, !mxcsr::FLAGS as i32)?;
    a.cmp(r8d, mxcsr::MASKS as i32)?;
    a.je(done)?;
    a.ldmxcsr(host)?;
    a.set_label(&mut done)?;
    a.zero_bytes()
}

/// The instruction with canonical register operands.
fn canonical(code: Code, immediate: u8, shape: Shape) -> Instruction {
    // With an implicit XMM0 the operands are one register further.
    let vectors = if shape.mask { [Register::XMM1, Register::XMM2] } else { [Register::XMM0, Register::XMM1] };
    let mmx = [Register::MM0, Register::MM1];
    let mut insn = Instruction::new();
    insn.set_code(code);
    let mut count = 0;
    for (n, class) in [shape.first, shape.second].into_iter().enumerate() {
        let register = match class {
            Class::None => continue,
            Class::Xmm => vectors[n],
            Class::Mm => mmx[n],
            Class::Gpr32 => Register::EAX,
            Class::Gpr64 => Register::RAX,
        };
        insn.set_op_kind(count, OpKind::Register);
        insn.set_op_register(count, register);
        count += 1;
    }
    if shape.immediate {
        insn.set_op_kind(count, OpKind::Immediate8);
        insn.set_immediate8(immediate);
    }
    insn
}

/// Machine code of an x87 thunk for this instruction; its memory operand, if any, at RSI.
pub(super) fn assemble_x87(insn: &Instruction) -> Result<Vec<u8>, IcedError> {
    let mut canonical = Instruction::new();
    canonical.set_code(insn.code());
    for n in 0..insn.op_count() {
        canonical.set_op_kind(n, insn.op_kind(n));
        match insn.op_kind(n) {
            OpKind::Register => canonical.set_op_register(n, insn.op_register(n)),
            _ => canonical.set_memory_base(Register::RSI),
        }
    }
    // iced counts the condition codes of the x87 status word among the flags.
    let status = RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;
    let reads_flags = insn.rflags_read() & status != 0;
    let writes_flags = insn.rflags_modified() & status != 0;
    let mut a = CodeAssembler::new(64)?;
    a.sub(rsp, 8)?;
    a.stmxcsr(dword_ptr(rsp))?;
    a.fxrstor64(ptr(rdi))?;
    if reads_flags {
        a.push(rdx)?;
        a.popfq()?;
    }
    a.add_instruction(canonical)?;
    if writes_flags {
        a.lahf()?;
        a.seto(al)?;
    }
    a.fxsave64(ptr(rdi))?;
    // Leave an empty stack and the host's control word. FNINIT would do it all, at the price of everything else here.
    let mut quiet = a.create_label();
    let mut default = a.create_label();
    a.test(byte_ptr(rdi + offset_of!(FxArea, fsw)), x87::ES as i32)?;
    a.je(quiet)?;
    a.fnclex()?;
    a.set_label(&mut quiet)?;
    a.emms()?;
    a.cmp(word_ptr(rdi + offset_of!(FxArea, fcw)), x87::CONTROL_INIT as i32)?;
    a.je(default)?;
    a.fninit()?;
    a.set_label(&mut default)?;
    a.zero_bytes()?;
    restore_mxcsr(&mut a, dword_ptr(rdi + offset_of!(FxArea, mxcsr)), dword_ptr(rsp))?;
    a.add(rsp, 8)?;
    a.ret()?;
    a.assemble(0)
}

/// The host's MXCSR_MASK, zero meaning the first one (Intel SDM vol. 1 section 11.6.6).
pub(super) fn host_mxcsr_mask() -> u32 {
    const FIRST: u32 = 0xffbf;
    #[repr(C, align(16))]
    struct Image([u8; 512]);
    let mut image = Image([0; 512]);
    // SAFETY: the image has FXSAVE's size and alignment, and every x86-64 processor has the instruction.
    unsafe { _fxsave64(image.0.as_mut_ptr()) };
    match u32::from_le_bytes([image.0[28], image.0[29], image.0[30], image.0[31]]) {
        0 => FIRST,
        mask => mask,
    }
}
