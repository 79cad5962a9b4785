//! Every instruction form of this module on the guest and on the host, with the same state before: all of it must be the same
//! after. Then the rules about what may not be executed.
#![allow(unsafe_code)] // The oracle executes generated code.
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use iced_x86::code_asm::*;
use iced_x86::{Code, Encoder, Instruction, Mnemonic, OpCodeOperandKind as Kind, OpKind, Register};
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::GuestMemory;

use super::area::{FxArea, mxcsr, x87};
use super::arena::Arena;
use super::thunk::Class;
use super::xmm::vector;
use super::{EncodingKind, Shape, features};
use crate::cpu::{Cpu, TrapKind, access, cr0, cr4, efer, rflags, vector as exception};
use crate::op::Outcome;
use crate::vm::VmShared;

/// Where the guest's instruction and its operand are.
const CODE: u64 = 0x1000;
const DATA: u64 = 0x4000;
const DATA_BYTES: usize = 512;
/// RBX holds the operand's address, RDI that of implied ones.
const RBX: usize = 3;
const RDI: usize = 7;

/// Everything an instruction of this module can read or write.
#[derive(Clone)]
#[repr(C, align(64))]
struct State {
    fx: FxArea,
    memory: [u8; DATA_BYTES],
    gpr: [u64; 16],
    flags: u64,
}

/// Small generator of reproducible test values.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn chance(&mut self) -> bool {
        self.next() & 1 != 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[(self.next() % from.len() as u64) as usize]
    }

    /// Bits that mean something as numbers of several formats.
    fn bits(&mut self) -> u64 {
        match self.next() % 4 {
            0 => self.next(),
            1 => self.pick(&[
                0,
                1 << 63,
                1,
                0x7ff0_0000_0000_0000,
                0x7ff8_0000_0000_0000,
                0x7ff0_0000_0000_0001,
                0x0010_0000_0000_0000,
                0x7fef_ffff_ffff_ffff,
            ]),
            2 => (self.pick(&[0.0_f64, -1.5, 3.25, 1e300, 1e-310, 2147483648.5, -9.3e18]) * self.pick(&[1.0, -1.0, 1.0 / 3.0])).to_bits(),
            _ => {
                let float = |r: &mut Random| {
                    u64::from(r.pick(&[
                        0u32,
                        0x8000_0000,
                        1,
                        0x7f80_0000,
                        0x7fa0_0000,
                        0xffc0_0000,
                        0x3f80_0001,
                        0x4f00_0000,
                        0x7f7f_ffff,
                        0x0080_0000,
                    ]))
                };
                float(self) | float(self) << 32
            }
        }
    }

    /// An extended real of any class, also those that no processor makes itself.
    fn real(&mut self) -> [u64; 2] {
        let exponent =
            self.pick(&[0, 1, 0x3ffe, 0x3fff, 0x4000, 0x401e, 0x403e, 0x43fe, 0x7ffe, 0x7fff, 0x3c01, 0x3f81]) | self.next() & 0x8000;
        let significand = self.pick(&[0, 1 << 63, 0xc000_0000_0000_0000, 0xa000_0000_0000_0000, u64::MAX, 1, 0x4000_0000_0000_0000]);
        [if self.chance() { self.next() | 1 << 63 } else { significand }, exponent]
    }

    fn state(&mut self) -> State {
        let mut fx = FxArea::reset();
        fx.fcw = x87::CONTROL_INIT & 0xff | (self.next() as u16 & 0xc00) | self.pick(&[0, 0x200, 0x300]);
        fx.fsw = self.next() as u16 & !(x87::ES | x87::BUSY);
        fx.ftw = self.pick(&[0xff, 0xff, 0xff, 0, 0x55, self.0 as u8]);
        fx.fop = self.next() as u16 & 0x7ff;
        (fx.fip, fx.fdp) = (0x1111_2222, 0x3333_4444);
        fx.mxcsr = self.next() as u32 & (mxcsr::FLAGS | 0xe040) | mxcsr::MASKS;
        fx.st.iter_mut().for_each(|st| *st = self.real());
        fx.xmm.iter_mut().for_each(|x| *x = vector(self.bits(), self.bits()));
        let mut memory = [0; DATA_BYTES];
        memory.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&self.bits().to_le_bytes()));
        if self.chance() {
            let [significand, exponent] = self.real();
            memory[..8].copy_from_slice(&significand.to_le_bytes());
            memory[8..10].copy_from_slice(&(exponent as u16).to_le_bytes());
        }
        let mut gpr = [0; 16];
        gpr.iter_mut().for_each(|r| *r = if self.chance() { self.next() } else { self.next() % 20 });
        State { fx, memory, gpr, flags: self.next() & rflags::STATUS }
    }
}

/// Where SIGFPE goes on, and whether there was one.
static AFTER: AtomicU64 = AtomicU64::new(0);
static FAULTED: AtomicBool = AtomicBool::new(false);
/// The tests that use the host's registers, one at a time.
static HOST: Mutex<()> = Mutex::new(());

extern "C" fn on_sigfpe(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    FAULTED.store(true, Ordering::SeqCst);
    // SAFETY: the kernel gives a signal handler with SA_SIGINFO the interrupted context.
    unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] = AFTER.load(Ordering::SeqCst) as i64 };
}

fn catch_sigfpe() {
    // SAFETY: the handler touches atomics and the context only.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigfpe as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGFPE, &action, std::ptr::null_mut()), 0);
    }
}

/// Executes an instruction on the host with all of `state` in the registers, except RSP and R15.
/// A SIMD exception leaves the instruction undone and its flags in MXCSR, and shows in [`FAULTED`].
fn on_host(arena: &mut Arena, insn: &[u8], state: &State) -> State {
    let mut state = Box::new(state.clone());
    let memory = state.memory.as_ptr() as u64;
    (state.gpr[RBX], state.gpr[RDI]) = (memory, memory);
    const GPR: usize = std::mem::offset_of!(State, gpr);
    const FLAGS: usize = std::mem::offset_of!(State, flags);
    let registers = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14];
    let mut a = CodeAssembler::new(64).unwrap();
    for saved in [rbx, rbp, r12, r13, r14, r15] {
        a.push(saved).unwrap();
    }
    a.mov(r15, rdi).unwrap();
    a.fxrstor64(ptr(r15)).unwrap();
    a.push(qword_ptr(r15 + FLAGS)).unwrap();
    a.popfq().unwrap();
    for (n, register) in registers.into_iter().enumerate().filter(|&(n, _)| n != 4) {
        a.mov(register, qword_ptr(r15 + GPR + 8 * n)).unwrap();
    }
    let mut code = a.assemble(0).unwrap();
    code.extend_from_slice(insn);
    let after = code.len();
    let mut a = CodeAssembler::new(64).unwrap();
    for (n, register) in registers.into_iter().enumerate().filter(|&(n, _)| n != 4) {
        a.mov(qword_ptr(r15 + GPR + 8 * n), register).unwrap();
    }
    a.pushfq().unwrap();
    a.pop(qword_ptr(r15 + FLAGS)).unwrap();
    a.fxsave64(ptr(r15)).unwrap();
    a.fninit().unwrap();
    a.push(mxcsr::MASKS as i32).unwrap();
    a.ldmxcsr(dword_ptr(rsp)).unwrap();
    a.pop(rax).unwrap();
    for saved in [r15, r14, r13, r12, rbp, rbx] {
        a.pop(saved).unwrap();
    }
    a.ret().unwrap();
    code.extend(a.assemble(0).unwrap());
    let entry: NonNull<u8> = arena.add(&code).unwrap();
    AFTER.store(entry.as_ptr() as u64 + after as u64, Ordering::SeqCst);
    FAULTED.store(false, Ordering::SeqCst);
    // SAFETY: the code is a function of this type that keeps the registers it has to.
    let function: extern "sysv64" fn(*mut State) = unsafe { std::mem::transmute(entry) };
    function(&mut *state);
    state.flags &= rflags::STATUS;
    for r in [RBX, RDI] {
        if state.gpr[r] == memory {
            state.gpr[r] = DATA;
        }
    }
    // The host has noted its own addresses.
    if state.fx.fip.wrapping_sub(entry.as_ptr() as u64) < 1024 {
        state.fx.fip = CODE;
    }
    if state.fx.fdp == memory {
        state.fx.fdp = DATA;
    }
    *state
}

/// A processor in 64-bit mode, its first GiB mapped to itself, and its memory.
fn guest() -> (Cpu, GuestMemory) {
    let memory = vmm::memory::map(&[(0, 0x10000)]).unwrap();
    let mut cpu = Cpu::new(0, VmShared::plain(&memory, 1));
    cpu.efer = efer::LME | efer::LMA;
    memory.write_obj(0x9003_u64, GuestAddress(0x8000)).unwrap();
    memory.write_obj(0x83_u64, GuestAddress(0x9000)).unwrap();
    cpu.cr3 = 0x8000;
    cpu.cr0 = cr0::PG | cr0::PE | cr0::NE | cr0::MP;
    cpu.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    cpu.seg[crate::cpu::CS].access |= access::L;
    cpu.update_mode();
    (cpu, memory)
}

/// Executes one instruction on the guest.
fn step(cpu: &mut Cpu, memory: &GuestMemory, bytes: &[u8]) -> Result<(), TrapKind> {
    cpu.blocks.stop_running();
    memory.write_slice(bytes, GuestAddress(CODE)).unwrap();
    // Tells the code map.
    cpu.vm.clone().ram(CODE).unwrap().1.written(CODE as usize / 4096, 0, bytes.len());
    cpu.rip = CODE;
    let block = cpu.enter_block(true).map_err(|_| cpu.trap)?;
    match (block.run)(cpu, block) {
        Outcome::Done => Ok(()),
        Outcome::Trapped => Err(cpu.trap),
    }
}

fn load(cpu: &mut Cpu, memory: &GuestMemory, state: &State) {
    cpu.fx = state.fx.clone();
    cpu.regs[..16].copy_from_slice(&state.gpr);
    (cpu.regs[RBX], cpu.regs[RDI]) = (DATA, DATA);
    cpu.set_flags(state.flags);
    memory.write_slice(&state.memory, GuestAddress(DATA)).unwrap();
}

fn save(cpu: &Cpu, memory: &GuestMemory) -> State {
    let mut state = State { fx: cpu.fx.clone(), memory: [0; DATA_BYTES], gpr: [0; 16], flags: cpu.status() };
    state.gpr.copy_from_slice(&cpu.regs[..16]);
    memory.read_slice(&mut state.memory, GuestAddress(DATA)).unwrap();
    state
}

/// What differs, for people.
fn host_is_intel() -> bool {
    std::arch::x86_64::__cpuid(0).ebx == u32::from_le_bytes(*b"Genu")
}

fn difference(code: Code, host: &State, guest: &State) -> String {
    let mut text = String::new();
    for (n, (h, g)) in host.gpr.iter().zip(&guest.gpr).enumerate().filter(|&(n, (h, g))| h != g && n != 4 && n != 15) {
        write!(text, " gpr{n} {h:x} {g:x}").unwrap();
    }
    if host.flags != guest.flags {
        write!(text, " flags {:x} {:x}", host.flags, guest.flags).unwrap();
    }
    let (h, g) = (host.fx.to_bytes(), guest.fx.to_bytes());
    // FOP, FIP and FDP in an area: AMD's processors store them only while an exception is pending (APM vol. 2, 11.4.4).
    let pointers = if host_is_intel() { 0..0 } else { 6..24 };
    let stored = if matches!(code, Code::Fxsave_m512byte | Code::Fxsave64_m512byte) { pointers.clone() } else { 0..0 };
    for at in (0..512).step_by(2).filter(|&at| !pointers.contains(&at) && h[at..at + 2] != g[at..at + 2]) {
        write!(text, " fx[{at}] {:02x?} {:02x?}", &h[at..at + 2], &g[at..at + 2]).unwrap();
    }
    for at in (0..DATA_BYTES).filter(|at| !stored.contains(at) && host.memory[*at] != guest.memory[*at]) {
        write!(text, " memory[{at}] {:02x} {:02x}", host.memory[at], guest.memory[at]).unwrap();
    }
    text
}

/// All forms of an instruction: its operands in registers, and in memory.
fn forms(code: Code) -> Vec<Instruction> {
    let info = code.op_code();
    let form = |in_memory: bool| {
        let mut insn = Instruction::new();
        insn.set_code(code);
        let mut has_memory = false;
        for n in 0..info.op_count() {
            let kind = info.op_kind(n);
            let register = match kind {
                Kind::xmm_reg | Kind::xmm_rm | Kind::xmm_or_mem => [Register::XMM3, Register::XMM9][n as usize % 2],
                Kind::mm_reg | Kind::mm_rm | Kind::mm_or_mem => [Register::MM2, Register::MM5][n as usize % 2],
                Kind::r32_reg | Kind::r32_rm | Kind::r32_or_mem => Register::R9D,
                Kind::r64_reg | Kind::r64_rm | Kind::r64_or_mem => Register::R9,
                Kind::st0 => Register::ST0,
                Kind::sti_opcode => Register::ST3,
                Kind::ax => Register::AX,
                _ => Register::None,
            };
            let memory = matches!(kind, Kind::mem)
                || in_memory && matches!(kind, Kind::xmm_or_mem | Kind::mm_or_mem | Kind::r32_or_mem | Kind::r64_or_mem);
            match kind {
                Kind::imm8 => insn.set_op_kind(n, OpKind::Immediate8),
                Kind::seg_rDI => insn.set_op_kind(n, OpKind::MemorySegRDI),
                _ if memory => {
                    has_memory = true;
                    insn.set_op_kind(n, OpKind::Memory);
                    insn.set_memory_base(Register::RBX);
                }
                _ if register != Register::None => {
                    insn.set_op_kind(n, OpKind::Register);
                    insn.set_op_register(n, register);
                }
                _ => return None,
            }
        }
        (has_memory || !in_memory).then_some(insn)
    };
    let mut forms: Vec<_> = [form(false), form(true)].into_iter().flatten().collect();
    forms.dedup();
    forms
}

/// The codes of this module that exist in 64-bit code.
fn codes() -> impl Iterator<Item = Code> {
    let features = features();
    Code::values().filter(move |code| {
        let info = code.op_code();
        let plain = |f: &iced_x86::CpuidFeature| matches!(f, iced_x86::CpuidFeature::INTEL8086 | iced_x86::CpuidFeature::X64);
        info.encoding() == EncodingKind::Legacy
            && info.is_instruction()
            && info.mode64()
            && !info.fwait()
            && code.cpuid_features().iter().all(|&f| features.allow(f))
            && !code.cpuid_features().iter().all(plain)
            && !is_general(*code)
    })
}

/// Instructions of these extensions that have no such registers and are done elsewhere.
fn is_general(code: Code) -> bool {
    let name = format!("{code:?}");
    ["Cmov", "Prefetch", "Lfence", "Mfence", "Sfence", "Pause", "Crc32"].iter().any(|prefix| name.starts_with(prefix))
}

fn encode(insn: &Instruction) -> Option<Vec<u8>> {
    let mut encoder = Encoder::new(64);
    encoder.encode(insn, CODE).ok()?;
    Some(encoder.take_buffer())
}

/// Compares forms on host and guest, `rounds` times each, with states that `prepare` has changed.
fn compare(codes: impl Iterator<Item = Code>, rounds: usize, seed: u64, prepare: impl Fn(Code, &mut Random, &mut State)) {
    let _one = HOST.lock().unwrap_or_else(PoisonError::into_inner);
    catch_sigfpe();
    let mut arena = Arena::new(32 << 20).unwrap();
    let (mut cpu, memory) = guest();
    let mut random = Random(seed);
    let mut failures = Vec::new();
    let mut tested = 0;
    for form in codes.flat_map(forms) {
        for _ in 0..rounds {
            let mut insn = form;
            if (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Immediate8) {
                insn.set_immediate8(random.next() as u8);
            }
            let Some(bytes) = encode(&insn) else { continue };
            let mut state = random.state();
            prepare(insn.code(), &mut random, &mut state);
            let host = on_host(&mut arena, &bytes, &state);
            let faulted = FAULTED.load(Ordering::SeqCst);
            load(&mut cpu, &memory, &state);
            let result = step(&mut cpu, &memory, &bytes);
            let guest = save(&cpu, &memory);
            let different = difference(insn.code(), &host, &guest);
            if result.is_err() != faulted || !different.is_empty() {
                failures.push(format!("{:?} {bytes:02x?}: {result:?}{different}", insn.code()));
                break;
            }
            tested += 1;
        }
    }
    assert!(failures.is_empty(), "{} forms differ (host, guest):\n{}", failures.len(), failures.join("\n"));
    assert!(tested > 1000, "only {tested} cases");
}

#[test]
fn every_instruction_does_what_the_host_does() {
    compare(codes(), 24, 7, |code, random, state| match code {
        Code::Fxrstor_m512byte | Code::Fxrstor64_m512byte => state.memory = random.state().fx.to_bytes(),
        Code::Ldmxcsr_m32 => state.memory[..4].copy_from_slice(&random.state().fx.mxcsr.to_le_bytes()),
        _ => {}
    });
}

#[test]
fn unmasked_x87_exceptions_leave_what_the_host_leaves() {
    let x87 = codes().filter(|code| format!("{code:?}").starts_with('F') && !format!("{code:?}").starts_with("Fx"));
    compare(x87, 100, 11, |_, random, state| {
        state.fx.fcw = state.fx.fcw & !x87::FLAGS | random.next() as u16 & x87::FLAGS;
        state.fx.fsw &= !(x87::FLAGS | x87::SF);
    });
}

#[test]
fn unmasked_simd_exceptions_leave_what_the_host_leaves() {
    let is_floating = |code: &Code| forms(*code).iter().any(|insn| Shape::of(insn).is_some_and(|shape| shape.floating));
    // Dot products are several operations, of which an exception ends the sequence: the flags of those after it differ.
    let single = |code: &Code| !matches!(code.mnemonic(), Mnemonic::Dpps | Mnemonic::Dppd);
    compare(codes().filter(is_floating).filter(single), 200, 13, |_, random, state| {
        let bits = mxcsr::MASKS | mxcsr::FLAGS;
        state.fx.mxcsr = state.fx.mxcsr & !bits | random.next() as u32 & mxcsr::MASKS;
    });
}

#[test]
fn operands_are_what_the_decoder_says() {
    let said = |kind| match kind {
        Kind::xmm_reg | Kind::xmm_rm | Kind::xmm_or_mem => Some(Class::Xmm),
        Kind::mm_reg | Kind::mm_rm | Kind::mm_or_mem => Some(Class::Mm),
        Kind::r32_reg | Kind::r32_rm | Kind::r32_or_mem => Some(Class::Gpr32),
        Kind::r64_reg | Kind::r64_rm | Kind::r64_or_mem => Some(Class::Gpr64),
        Kind::imm8 => Some(Class::None),
        _ => None,
    };
    let mut count = 0;
    for code in codes() {
        let info = code.op_code();
        let expected = [0, 1].map(|n| if n < info.op_count() { said(info.op_kind(n)) } else { Some(Class::None) });
        for insn in forms(code) {
            if let Some(shape) = Shape::of(&insn) {
                assert_eq!([Some(shape.first), Some(shape.second)], expected, "{code:?}");
                count += 1;
            }
        }
    }
    assert!(count > 400, "{count}");
}

#[test]
fn all_thunks_fit_the_arena() {
    let mut natives = super::Natives::new();
    let mut count = 0;
    for code in codes() {
        for insn in forms(code) {
            if let Some(shape) = Shape::of(&insn) {
                for immediate in 0..if shape.immediate { 256 } else { 1 } {
                    assert!(natives.vector_thunk(code, immediate as u8, shape).is_some(), "{code:?} {immediate}");
                    count += 1;
                }
            }
        }
    }
    assert!(count > 10_000);
    // x87: 8 registers for each code, no code longer than 64 bytes.
    assert!(natives.arena().unwrap().free() > Code::values().filter(|c| format!("{c:?}").starts_with('F')).count() * 8 * 64);
}

/// The vector of the exception that an instruction raises with the state that `prepare` makes.
fn raised(bytes: &[u8], prepare: impl Fn(&mut Cpu)) -> Option<u8> {
    let (mut cpu, memory) = guest();
    load(&mut cpu, &memory, &Random(3).state());
    cpu.fx.initialize_x87();
    prepare(&mut cpu);
    let before = cpu.fx.to_bytes();
    match step(&mut cpu, &memory, bytes) {
        Ok(()) => None,
        Err(TrapKind::Exception { vector, .. }) => {
            assert_eq!(cpu.fx.to_bytes(), before, "{bytes:02x?} changed registers and raised {vector}");
            Some(vector)
        }
        Err(other) => panic!("{other:?}"),
    }
}

const ADDPS: [u8; 3] = [0x0f, 0x58, 0xc1];
const MOVAPS: [u8; 3] = [0x0f, 0x28, 0xc1];
const PADDB_MM: [u8; 3] = [0x0f, 0xfc, 0xc1];
const MOVQ_MM: [u8; 3] = [0x0f, 0x6f, 0xc1];
const FLD1: [u8; 2] = [0xd9, 0xe8];
const FNSTSW_AX: [u8; 2] = [0xdf, 0xe0];
const FWAIT: [u8; 1] = [0x9b];
const FXSAVE: [u8; 3] = [0x0f, 0xae, 0x03];
const LDMXCSR: [u8; 3] = [0x0f, 0xae, 0x13];
const MOVNTI: [u8; 3] = [0x0f, 0xc3, 0x0b];

#[test]
fn state_of_another_task_is_not_available() {
    for bytes in [&ADDPS[..], &MOVAPS, &PADDB_MM, &MOVQ_MM, &FLD1, &FNSTSW_AX, &FWAIT, &FXSAVE, &LDMXCSR] {
        assert_eq!(raised(bytes, |cpu| cpu.cr0 |= cr0::TS), Some(exception::NM), "{bytes:02x?}");
        assert_eq!(raised(bytes, |_| {}), None, "{bytes:02x?}");
    }
    assert_eq!(raised(&FWAIT, |cpu| cpu.cr0 = cpu.cr0 & !cr0::MP | cr0::TS), None);
    assert_eq!(raised(&MOVNTI, |cpu| cpu.cr0 |= cr0::TS | cr0::EM), None);
}

#[test]
fn emulation_and_missing_system_support_make_instructions_invalid() {
    for bytes in [&ADDPS[..], &MOVAPS, &PADDB_MM, &MOVQ_MM, &LDMXCSR] {
        assert_eq!(raised(bytes, |cpu| cpu.cr0 |= cr0::EM | cr0::TS), Some(exception::UD), "{bytes:02x?}");
    }
    for bytes in [&FLD1[..], &FNSTSW_AX, &FXSAVE] {
        assert_eq!(raised(bytes, |cpu| cpu.cr0 |= cr0::EM), Some(exception::NM), "{bytes:02x?}");
    }
    for bytes in [&ADDPS[..], &MOVAPS, &LDMXCSR] {
        assert_eq!(raised(bytes, |cpu| cpu.cr4 &= !cr4::OSFXSR), Some(exception::UD), "{bytes:02x?}");
    }
    assert_eq!(raised(&PADDB_MM, |cpu| cpu.cr4 &= !cr4::OSFXSR), None);
}

#[test]
fn aligned_operands_have_to_be() {
    let unaligned = |cpu: &mut Cpu| cpu.regs[RBX] += 8;
    for (bytes, vector) in [
        (&[0x0f, 0x58, 0x03][..], Some(exception::GP)),   // addps xmm0, [rbx]
        (&[0x0f, 0x28, 0x03], Some(exception::GP)),       // movaps xmm0, [rbx]
        (&[0x66, 0x0f, 0xe7, 0x03], Some(exception::GP)), // movntdq [rbx], xmm0
        (&FXSAVE, Some(exception::GP)),
        (&[0x0f, 0x10, 0x03], None),                   // movups xmm0, [rbx]
        (&[0xf2, 0x0f, 0x58, 0x03], None),             // addsd xmm0, [rbx]
        (&[0x66, 0x0f, 0x3a, 0x63, 0x03, 0x0c], None), // pcmpistri xmm0, [rbx], 12
    ] {
        assert_eq!(raised(bytes, unaligned), vector, "{bytes:02x?}");
    }
}

#[test]
fn pending_x87_exception_is_reported_by_what_waits() {
    let pending = |cpu: &mut Cpu| {
        cpu.fx.set_control(0x37e);
        cpu.fx.set_status(1);
    };
    for bytes in [&FLD1[..], &FWAIT, &PADDB_MM, &MOVQ_MM] {
        assert_eq!(raised(bytes, pending), Some(exception::MF), "{bytes:02x?}");
    }
    for bytes in [&FNSTSW_AX[..], &FXSAVE, &[0xdb, 0xe2], &[0xdb, 0xe3], &ADDPS] {
        assert_eq!(raised(bytes, pending), None, "{bytes:02x?}");
    }
    let ignored = |cpu: &mut Cpu| {
        pending(cpu);
        cpu.cr0 &= !cr0::NE;
    };
    assert_eq!(raised(&FLD1, ignored), None);
}

#[test]
fn unmasked_simd_exception_needs_the_systems_consent() {
    // divss xmm0, xmm1 with a zero divisor.
    let divide_by_zero = |cpu: &mut Cpu| {
        cpu.fx.xmm[0] = vector(0x3f80_0000, 0);
        cpu.fx.xmm[1] = vector(0, 0);
        // The flag is set already, so that nothing changes.
        cpu.fx.mxcsr = 0x1d84;
    };
    assert_eq!(raised(&[0xf3, 0x0f, 0x5e, 0xc1], divide_by_zero), Some(exception::XM));
    let without = |cpu: &mut Cpu| {
        divide_by_zero(cpu);
        cpu.cr4 &= !cr4::OSXMMEXCPT;
    };
    assert_eq!(raised(&[0xf3, 0x0f, 0x5e, 0xc1], without), Some(exception::UD));
}

#[test]
fn store_that_faults_leaves_the_x87_stack_alone() {
    // fstp qword [rbx], fstp tbyte [rbx] to an address that is not canonical.
    for bytes in [[0xdd, 0x1b], [0xdb, 0x3b]] {
        let vector = raised(&bytes, |cpu| {
            cpu.fx.ftw = 0xff;
            cpu.regs[RBX] = 1 << 63;
        });
        assert_eq!(vector, Some(exception::GP));
    }
}

#[test]
fn reserved_bits_of_mxcsr_fault() {
    let (mut cpu, memory) = guest();
    let mut state = Random(5).state();
    state.memory[..4].copy_from_slice(&0x1_1f80_u32.to_le_bytes());
    load(&mut cpu, &memory, &state);
    let result = step(&mut cpu, &memory, &LDMXCSR);
    assert!(matches!(result, Err(TrapKind::Exception { vector: exception::GP, error: Some(0), .. })), "{result:?}");
    assert_eq!(cpu.fx.mxcsr, state.fx.mxcsr);
}

#[test]
fn environment_has_four_formats() {
    let (mut cpu, memory) = guest();
    cpu.fx.initialize_x87();
    (cpu.fx.fip, cpu.fx.fdp, cpu.fx.fop) = (0x5_4321, 0x9_8765, 0x5d9);
    for (protected, wide, pointers) in [
        (true, true, &[0x5_4321_u32, 0x05d9_0000, 0x9_8765, 0xffff_0000][..]),
        (true, false, &[0x4321, 0, 0x8765, 0]),
        (false, true, &[0xffff_4321, 0x55d9, 0xffff_8765, 0x9000]),
        (false, false, &[0x4321, 0x55d9, 0x8765, 0x9000]),
    ] {
        cpu.cr0 = if protected { cr0::PE } else { 0 };
        let bytes: &[u8] = if wide { &[0xd9, 0x33] } else { &[0x66, 0xd9, 0x33] };
        cpu.regs[RBX] = DATA;
        step(&mut cpu, &memory, bytes).unwrap();
        let word = |n: u64| -> u32 {
            if wide {
                memory.read_obj(GuestAddress(DATA + 4 * n)).unwrap()
            } else {
                u32::from(memory.read_obj::<u16>(GuestAddress(DATA + 2 * n)).unwrap())
            }
        };
        assert_eq!((3..7).map(word).collect::<Vec<_>>(), pointers, "protected {protected}, 32 bits {wide}");
        let (mut loaded, ftw) = (bytes.to_vec(), cpu.fx.ftw);
        *loaded.last_mut().unwrap() = 0x23;
        let before = (cpu.fx.fip, cpu.fx.fdp, cpu.fx.fop);
        (cpu.fx.fip, cpu.fx.fdp, cpu.fx.fop) = (0, 0, 0);
        step(&mut cpu, &memory, &loaded).unwrap();
        let expected = match (protected, wide) {
            (true, false) => (before.0 & 0xffff, before.1 & 0xffff, 0),
            _ => before,
        };
        assert_eq!((cpu.fx.fip, cpu.fx.fdp, cpu.fx.fop, cpu.fx.ftw), (expected.0, expected.1, expected.2, ftw));
        (cpu.fx.fip, cpu.fx.fdp, cpu.fx.fop) = before;
    }
}

/// Prints nanoseconds per instruction: `cargo test --release -p soft --lib -- --ignored --nocapture native_speed`.
#[test]
#[ignore = "a measurement; says nothing without optimisation"]
fn native_speed() {
    const BLOCK: usize = 24;
    const BLOCKS: u32 = 20_000;
    for (name, bytes) in [
        ("movaps xmm0, xmm1", &[0x0f, 0x28, 0xc1][..]),
        ("movups xmm0, [rbx]", &[0x0f, 0x10, 0x03]),
        ("movaps [rbx], xmm0", &[0x0f, 0x29, 0x03]),
        ("movsd xmm0, [rbx]", &[0xf2, 0x0f, 0x10, 0x03]),
        ("pxor xmm0, xmm1", &[0x66, 0x0f, 0xef, 0xc1]),
        ("pmovmskb eax, xmm1", &[0x66, 0x0f, 0xd7, 0xc1]),
        ("paddd xmm0, xmm1", &[0x66, 0x0f, 0xfe, 0xc1]),
        ("paddd xmm0, [rbx]", &[0x66, 0x0f, 0xfe, 0x03]),
        ("addsd xmm0, xmm1", &[0xf2, 0x0f, 0x58, 0xc1]),
        ("mulsd xmm0, [rbx]", &[0xf2, 0x0f, 0x59, 0x03]),
        ("ucomisd xmm0, xmm1", &[0x66, 0x0f, 0x2e, 0xc1]),
        ("cvtsi2sd xmm0, eax", &[0xf2, 0x0f, 0x2a, 0xc0]),
        ("cvttsd2si eax, xmm0", &[0xf2, 0x0f, 0x2c, 0xc0]),
        ("pcmpistri xmm0, xmm1, 12", &[0x66, 0x0f, 0x3a, 0x63, 0xc1, 0x0c]),
        ("paddb mm0, mm1", &[0x0f, 0xfc, 0xc1]),
        ("fchs", &[0xd9, 0xe0]),
        ("fst qword [rbx]", &[0xdd, 0x13]),
        ("nop dword [rax]", &[0x0f, 0x1f, 0x00]),
    ] {
        let (mut cpu, memory) = guest();
        cpu.regs[RBX] = DATA;
        cpu.fx.initialize_x87();
        cpu.fx.ftw = 0xff;
        cpu.fx.xmm = [vector(1.5f64.to_bits(), 0); 16];
        memory.write_obj(1.5f64.to_bits(), GuestAddress(DATA)).unwrap();
        memory.write_slice(&bytes.repeat(BLOCK), GuestAddress(CODE)).unwrap();
        memory.write_slice(&[0xf4], GuestAddress(CODE + (bytes.len() * BLOCK) as u64)).unwrap();
        let mut best = f64::MAX;
        for _ in 0..5 {
            let start = std::time::Instant::now();
            for _ in 0..BLOCKS {
                cpu.rip = CODE;
                let block = cpu.enter_block(false).unwrap();
                let _ = (block.run)(&mut cpu, block);
            }
            best = best.min(start.elapsed().as_nanos() as f64 / f64::from(BLOCKS) / BLOCK as f64);
        }
        println!("{name:28} {best:6.1} ns");
    }
}
