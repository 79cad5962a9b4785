//! String instructions: MOVS STOS LODS CMPS SCAS, alone and repeated.
//!
//! A repeated one goes by pieces: as many elements as lie in one page of host memory on both sides are done by the host's own
//! repeated instruction, which has the guest's meaning also where the sides overlap. What crosses a page, touches a device or a
//! page with decoded instructions goes element by element. RCX, RSI and RDI are exact after each piece, so that a fault or an
//! interruption leaves the instruction to be entered again (Intel SDM vol. 2, REP).
#![allow(unsafe_code)] // The host's string instructions on host addresses of guest RAM.

use std::arch::asm;
use std::ptr::null_mut;

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::host::Host;
use super::operand::{Int, by_size, reg};
use crate::block::Lowering;
use crate::cpu::{Cpu, ES, rflags};
use crate::flags::StatusFlags;
use crate::mmu::Word;
use crate::op::{Cursor, Handler, Op, Outcome, Trap, attempt};

const PAGE: u64 = 4096;
/// Elements done one by one before somebody else may want something.
const PATIENCE: u32 = 4096;

/// Which prefix an instruction has, as `Op::aux`.
mod repeat {
    pub const NONE: u16 = 0;
    /// REP, REPE.
    pub const WHILE_EQUAL: u16 = 1;
    /// REPNE.
    pub const WHILE_DIFFERENT: u16 = 2;
}

/// A piece of a repeated instruction, in host memory. Going down, the addresses are those of the last element.
#[derive(Clone, Copy)]
struct Piece {
    source: *mut u8,
    destination: *mut u8,
    count: u64,
    down: bool,
    while_equal: bool,
}

/// Elements of the host's string instructions.
trait Element: Host {
    /// # Safety
    /// Source and destination must be valid for the whole piece.
    unsafe fn movs(piece: Piece);
    /// # Safety
    /// The destination must be valid for the whole piece.
    unsafe fn stos(piece: Piece, value: Self);
    /// Elements done and flags of the last one.
    /// # Safety
    /// Source and destination must be valid for the whole piece.
    unsafe fn cmps(piece: Piece) -> (u64, StatusFlags);
    /// Elements done and flags of the last one.
    /// # Safety
    /// The destination must be valid for the whole piece.
    unsafe fn scas(piece: Piece, value: Self) -> (u64, StatusFlags);
}

macro_rules! element {
    ($t:ty, $suffix:literal) => {
        impl Element for $t {
            unsafe fn movs(piece: Piece) {
                // SAFETY: the caller vouches for the addresses; the direction flag is clear again at the end.
                unsafe {
                    if piece.down {
                        asm!("std", concat!("rep movs", $suffix), "cld", inout("rcx") piece.count => _, inout("rsi") piece.source => _,
                            inout("rdi") piece.destination => _, options(nostack));
                    } else {
                        asm!(concat!("rep movs", $suffix), inout("rcx") piece.count => _, inout("rsi") piece.source => _,
                            inout("rdi") piece.destination => _, options(nostack));
                    }
                }
            }

            unsafe fn stos(piece: Piece, value: $t) {
                let value = value.into_u64();
                // SAFETY: as above.
                unsafe {
                    if piece.down {
                        asm!("std", concat!("rep stos", $suffix), "cld", inout("rcx") piece.count => _, in("rax") value,
                            inout("rdi") piece.destination => _, options(nostack));
                    } else {
                        asm!(concat!("rep stos", $suffix), inout("rcx") piece.count => _, in("rax") value,
                            inout("rdi") piece.destination => _, options(nostack));
                    }
                }
            }

            unsafe fn cmps(piece: Piece) -> (u64, StatusFlags) {
                let left: u64;
                let flags: u16;
                macro_rules! run {
                    ($before:literal, $repeat:literal) => {
                        asm!($before, concat!($repeat, " cmps", $suffix), "lahf", "seto al", "cld", inout("rcx") piece.count => left,
                            inout("rsi") piece.source => _, inout("rdi") piece.destination => _, lateout("ax") flags,
                            options(nostack))
                    };
                }
                // SAFETY: as above. The count is not zero, so the flags are those of a comparison.
                unsafe {
                    match (piece.down, piece.while_equal) {
                        (false, true) => run!("cld", "repe"),
                        (false, false) => run!("cld", "repne"),
                        (true, true) => run!("std", "repe"),
                        (true, false) => run!("std", "repne"),
                    }
                }
                (piece.count - left, StatusFlags(flags))
            }

            unsafe fn scas(piece: Piece, value: $t) -> (u64, StatusFlags) {
                let left: u64;
                let mut rax = value.into_u64();
                macro_rules! run {
                    ($before:literal, $repeat:literal) => {
                        asm!($before, concat!($repeat, " scas", $suffix), "lahf", "seto al", "cld", inout("rcx") piece.count => left,
                            inout("rdi") piece.destination => _, inout("rax") rax, options(nostack))
                    };
                }
                // SAFETY: as above. The count is not zero, so the flags are those of a comparison.
                unsafe {
                    match (piece.down, piece.while_equal) {
                        (false, true) => run!("cld", "repe"),
                        (false, false) => run!("cld", "repne"),
                        (true, true) => run!("std", "repe"),
                        (true, false) => run!("std", "repne"),
                    }
                }
                (piece.count - left, StatusFlags(rax as u16))
            }
        }
    };
}

element!(u8, "b");
element!(u16, "w");
element!(u32, "d");
element!(u64, "q");

/// One of the string instructions.
trait StringOperation {
    /// Reads at RSI.
    const SOURCE: bool;
    /// Accesses ES:RDI.
    const DESTINATION: bool;
    /// Writes there.
    const WRITES: bool;
    /// Compares, so that REPE and REPNE look at ZF.
    const COMPARES: bool;

    /// Does one element; pointers are advanced by the caller.
    fn one<T: Element>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap>;

    /// Does some elements in host memory, at least one, and says how many.
    ///
    /// # Safety
    /// The sides that the constants name must be valid for the whole piece.
    unsafe fn many<T: Element>(cpu: &mut Cpu, piece: Piece) -> u64;
}

struct Movs;

impl StringOperation for Movs {
    const SOURCE: bool = true;
    const DESTINATION: bool = true;
    const WRITES: bool = true;
    const COMPARES: bool = false;

    #[inline(always)]
    fn one<T: Element>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let from = source::<T>(cpu, op)?;
        let value = cpu.load::<T>(from)?;
        let to = destination::<T>(cpu, op, true)?;
        cpu.store(to, value)
    }

    unsafe fn many<T: Element>(_cpu: &mut Cpu, piece: Piece) -> u64 {
        // SAFETY: the caller's promise.
        unsafe { T::movs(piece) };
        piece.count
    }
}

struct Stos;

impl StringOperation for Stos {
    const SOURCE: bool = false;
    const DESTINATION: bool = true;
    const WRITES: bool = true;
    const COMPARES: bool = false;

    #[inline(always)]
    fn one<T: Element>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let to = destination::<T>(cpu, op, true)?;
        cpu.store(to, T::get(cpu, reg::RAX))
    }

    unsafe fn many<T: Element>(cpu: &mut Cpu, piece: Piece) -> u64 {
        // SAFETY: the caller's promise.
        unsafe { T::stos(piece, T::get(cpu, reg::RAX)) };
        piece.count
    }
}

struct Lods;

impl StringOperation for Lods {
    const SOURCE: bool = true;
    const DESTINATION: bool = false;
    const WRITES: bool = false;
    const COMPARES: bool = false;

    #[inline(always)]
    fn one<T: Element>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let from = source::<T>(cpu, op)?;
        let value = cpu.load::<T>(from)?;
        T::set(cpu, reg::RAX, value);
        Ok(())
    }

    unsafe fn many<T: Element>(cpu: &mut Cpu, piece: Piece) -> u64 {
        let last = if piece.down {
            piece.source.wrapping_sub(((piece.count - 1) * T::SIZE) as usize)
        } else {
            piece.source.wrapping_add(((piece.count - 1) * T::SIZE) as usize)
        };
        // SAFETY: the caller's promise; only the last element stays in the accumulator.
        let value = unsafe { T::read(last) };
        T::set(cpu, reg::RAX, value);
        piece.count
    }
}

struct Cmps;

impl StringOperation for Cmps {
    const SOURCE: bool = true;
    const DESTINATION: bool = true;
    const WRITES: bool = false;
    const COMPARES: bool = true;

    #[inline(always)]
    fn one<T: Element>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let from = source::<T>(cpu, op)?;
        let to = destination::<T>(cpu, op, false)?;
        // The host's processor faults on the destination first when both would.
        let b = cpu.load::<T>(to)?;
        let a = cpu.load::<T>(from)?;
        cpu.status_flags = T::sub(a, b).1;
        Ok(())
    }

    unsafe fn many<T: Element>(cpu: &mut Cpu, piece: Piece) -> u64 {
        // SAFETY: the caller's promise.
        let (done, flags) = unsafe { T::cmps(piece) };
        cpu.status_flags = flags;
        done
    }
}

struct Scas;

impl StringOperation for Scas {
    const SOURCE: bool = false;
    const DESTINATION: bool = true;
    const WRITES: bool = false;
    const COMPARES: bool = true;

    #[inline(always)]
    fn one<T: Element>(cpu: &mut Cpu, op: &Op) -> Result<(), Trap> {
        let to = destination::<T>(cpu, op, false)?;
        let b = cpu.load::<T>(to)?;
        cpu.status_flags = T::sub(T::get(cpu, reg::RAX), b).1;
        Ok(())
    }

    unsafe fn many<T: Element>(cpu: &mut Cpu, piece: Piece) -> u64 {
        // SAFETY: the caller's promise.
        let (done, flags) = unsafe { T::scas(piece, T::get(cpu, reg::RAX)) };
        cpu.status_flags = flags;
        done
    }
}

/// Bits of RCX, RSI and RDI that the address size uses.
#[inline(always)]
fn address_mask(op: &Op) -> u64 {
    u64::MAX >> (64 - 8 * u32::from(op.addr_size))
}

#[inline(always)]
fn source<T: Element>(cpu: &mut Cpu, op: &Op) -> Result<u64, Trap> {
    cpu.linear(usize::from(op.seg), cpu.regs[reg::RSI] & address_mask(op), T::SIZE, false)
}

#[inline(always)]
fn destination<T: Element>(cpu: &mut Cpu, op: &Op, write: bool) -> Result<u64, Trap> {
    cpu.linear(ES, cpu.regs[reg::RDI] & address_mask(op), T::SIZE, write)
}

/// Writes one of RCX, RSI and RDI in the address size.
#[inline(always)]
fn set(cpu: &mut Cpu, op: &Op, register: usize, value: u64) {
    match op.addr_size {
        2 => u16::set(cpu, register, value as u16),
        4 => u32::set(cpu, register, value as u32),
        _ => cpu.regs[register] = value,
    }
}

#[inline(always)]
fn is_down(cpu: &Cpu) -> bool {
    cpu.rflags & rflags::DF != 0
}

/// Moves the pointers past `count` elements.
#[inline(always)]
fn advance<S: StringOperation, T: Element>(cpu: &mut Cpu, op: &Op, count: u64) {
    let bytes = count.wrapping_mul(T::SIZE);
    let distance = if is_down(cpu) { bytes.wrapping_neg() } else { bytes };
    if S::SOURCE {
        set(cpu, op, reg::RSI, cpu.regs[reg::RSI].wrapping_add(distance));
    }
    if S::DESTINATION {
        set(cpu, op, reg::RDI, cpu.regs[reg::RDI].wrapping_add(distance));
    }
}

/// The instruction without a prefix.
extern "sysv64-unwind" fn once<S: StringOperation, T: Element>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    attempt!(cpu, op, S::one::<T>(cpu, &op));
    advance::<S, T>(cpu, &op, 1);
    op.next(cpu)
}

/// The instruction with a prefix. A comparing one that does not come to its end leaves the flags as they were.
extern "sysv64-unwind" fn repeated<S: StringOperation, T: Element>(cpu: &mut Cpu, op: Cursor) -> Outcome {
    let before = cpu.status_flags;
    match run::<S, T>(cpu, &op) {
        Ok(true) => op.next(cpu),
        Ok(false) => {
            cpu.status_flags = before;
            op.again(cpu)
        }
        Err(trap) => {
            cpu.status_flags = before;
            op.trap(cpu, trap)
        }
    }
}

/// Repeats; returns whether it came to the end.
#[inline(always)]
fn run<S: StringOperation, T: Element>(cpu: &mut Cpu, op: &Op) -> Result<bool, Trap> {
    let while_equal = op.aux == repeat::WHILE_EQUAL;
    let mut patience = PATIENCE;
    loop {
        let count = cpu.regs[reg::RCX] & address_mask(op);
        // ECX in 64-bit code loses its upper half even when nothing is done.
        set(cpu, op, reg::RCX, count);
        if count == 0 {
            return Ok(true);
        }
        let stepping = cpu.rflags & rflags::TF != 0;
        let mut done = if stepping { 0 } else { piece::<S, T>(cpu, op, count, while_equal)? };
        patience -= 1;
        if done == 0 {
            S::one::<T>(cpu, op)?;
            done = 1;
        } else {
            patience = 0;
        }
        advance::<S, T>(cpu, op, done);
        set(cpu, op, reg::RCX, count - done);
        if count == done || S::COMPARES && cpu.condition(4) != while_equal {
            return Ok(true);
        }
        if stepping {
            return Ok(false);
        }
        if patience == 0 {
            if cpu.attention.flags() != 0 {
                return Ok(false);
            }
            patience = PATIENCE;
        }
    }
}

/// Does as many elements as one piece of host memory allows; 0 when the next one has to be done by itself.
#[inline(always)]
fn piece<S: StringOperation, T: Element>(cpu: &mut Cpu, op: &Op, count: u64, while_equal: bool) -> Result<u64, Trap> {
    let mut count = count;
    if S::SOURCE {
        count = room::<T>(cpu, op, usize::from(op.seg), reg::RSI, false, count)?;
    }
    if S::DESTINATION {
        count = room::<T>(cpu, op, ES, reg::RDI, S::WRITES, count)?;
    }
    let mut piece = Piece { source: null_mut(), destination: null_mut(), count, down: is_down(cpu), while_equal };
    if S::SOURCE {
        let Some(at) = host::<T>(cpu, op, usize::from(op.seg), reg::RSI, false, count)? else { return Ok(0) };
        piece.source = at;
    }
    if S::DESTINATION {
        let Some(at) = host::<T>(cpu, op, ES, reg::RDI, S::WRITES, count)? else { return Ok(0) };
        piece.destination = at;
    }
    // SAFETY: `host` has answered for both sides, and the TLB's host addresses stay valid during an instruction.
    Ok(unsafe { S::many::<T>(cpu, piece) })
}

/// How many of `count` elements lie in the page of the first one, before the offset wraps.
#[inline(always)]
fn room<T: Element>(cpu: &mut Cpu, op: &Op, segment: usize, register: usize, write: bool, count: u64) -> Result<u64, Trap> {
    let mask = address_mask(op);
    let offset = cpu.regs[register] & mask;
    let va = cpu.linear(segment, offset, T::SIZE, write)?;
    let in_page = va & (PAGE - 1);
    if in_page + T::SIZE > PAGE {
        return Ok(0);
    }
    Ok(if is_down(cpu) {
        count.min(in_page / T::SIZE + 1).min(offset / T::SIZE + 1)
    } else {
        count.min((PAGE - in_page) / T::SIZE).min((mask - offset) / T::SIZE + 1)
    })
}

/// Host address of the first of `count` elements in one page, if all may be accessed there at once.
#[inline(always)]
fn host<T: Element>(cpu: &mut Cpu, op: &Op, segment: usize, register: usize, write: bool, count: u64) -> Result<Option<*mut u8>, Trap> {
    if count == 0 {
        return Ok(None);
    }
    let offset = cpu.regs[register] & address_mask(op);
    let bytes = count * T::SIZE;
    let below = if is_down(cpu) { bytes - T::SIZE } else { 0 };
    // Beyond the limit: element by element up to the one that faults.
    let Ok(va) = cpu.linear(segment, offset.wrapping_sub(below), bytes, write) else { return Ok(None) };
    match cpu.host_slice(va, bytes as usize, write) {
        Ok(slice) => Ok(slice.map(|at| at.wrapping_add(below as usize))),
        // The element by itself faults, at its own address and in its own order.
        Err(_) => Ok(None),
    }
}

/// Lowers the instructions of this module.
pub(super) fn lower(_low: &Lowering, insn: &Instruction, op: &mut Op) -> usize {
    let size = match insn.code() {
        Code::Movsb_m8_m8 | Code::Stosb_m8_AL | Code::Lodsb_AL_m8 | Code::Cmpsb_m8_m8 | Code::Scasb_AL_m8 => 1,
        Code::Movsw_m16_m16 | Code::Stosw_m16_AX | Code::Lodsw_AX_m16 | Code::Cmpsw_m16_m16 | Code::Scasw_AX_m16 => 2,
        Code::Movsd_m32_m32 | Code::Stosd_m32_EAX | Code::Lodsd_EAX_m32 | Code::Cmpsd_m32_m32 | Code::Scasd_EAX_m32 => 4,
        Code::Movsq_m64_m64 | Code::Stosq_m64_RAX | Code::Lodsq_RAX_m64 | Code::Cmpsq_m64_m64 | Code::Scasq_RAX_m64 => 8,
        _ => return 0,
    };
    op.aux = if insn.has_repne_prefix() {
        repeat::WHILE_DIFFERENT
    } else if insn.has_rep_prefix() {
        repeat::WHILE_EQUAL
    } else {
        repeat::NONE
    };
    let address_size = insn.op_kinds().find_map(|kind| match kind {
        OpKind::MemorySegSI | OpKind::MemoryESDI => Some(2),
        OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(4),
        OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(8),
        _ => None,
    });
    op.addr_size = address_size.unwrap_or(8);
    op.run = match insn.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => handler::<Movs>(op, size),
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => handler::<Stos>(op, size),
        Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => handler::<Lods>(op, size),
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => handler::<Cmps>(op, size),
        _ => handler::<Scas>(op, size),
    };
    1
}

fn handler<S: StringOperation>(op: &Op, size: usize) -> Handler {
    by_size!(size, T => if op.aux == repeat::NONE { once::<S, T> as Handler } else { repeated::<S, T> })
}
