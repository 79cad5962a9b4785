//! Instructions whose registers are x87, MMX or XMM: executed by the host's own processor.
//!
//! Guest and host are the same architecture, so the exact result of `fpatan` or `pcmpestri` is one host instruction away. Moves
//! and logic are written in Rust ([`moves`], [`mmx`]); every other computation runs in a [`thunk`], a small function generated
//! for that instruction when it is first decoded, put into an [`arena`] and shared by all places that use the instruction.
//! State instructions (FXSAVE, FNSTENV, LDMXCSR and the like) are written out in [`control`].
//!
//! ```text
//!   lower ──> moves | mmx | control | x87 | sse ──> Op { run: handler, imm: thunk }
//!                                                        │
//!             FxArea  <── registers ── handler ── call ──┘      memory operands: mmu, before the thunk and after it
//! ```
//!
//! Nothing is lowered that the host's processor does not have; [`features`] says what that leaves for CPUID.

mod access;
mod area;
mod arena;
mod control;
mod inexact;
mod mmx;
mod moves;
mod sse;
#[cfg(test)]
mod tests;
mod thunk;
mod x87;
mod xmm;

use std::collections::HashMap;

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction};

pub(crate) use area::FxArea;
pub(crate) use arena::Arena;
use thunk::{Shape, Thunk};

use crate::block::Lowering;
use crate::op::Op;

/// Room for thunks. All forms of all instructions fit, with every immediate byte (a test shows it), so it is never full.
const ARENA_BYTES: usize = 2 << 20;

/// An instruction form that has a thunk: its code, and the immediate byte or x87 register.
type Form = (Code, u8);

/// The thunks of one processor.
pub(crate) struct Natives {
    /// Made with the first thunk: most firmware never needs one.
    arena: Option<Arena>,
    /// The host refused executable memory; said once.
    refused: bool,
    thunks: HashMap<Form, Thunk>,
}

impl Natives {
    /// No thunks yet.
    pub fn new() -> Natives {
        Natives { arena: None, refused: false, thunks: HashMap::new() }
    }

    /// The thunk of a vector instruction.
    fn vector_thunk(&mut self, code: Code, immediate: u8, shape: Shape) -> Option<Thunk> {
        self.thunk((code, immediate), || thunk::assemble_vector(code, immediate, shape))
    }

    /// The thunk of an x87 instruction whose operand besides ST0, if it has one, is ST(`register`).
    fn x87_thunk(&mut self, insn: &Instruction, register: u8) -> Option<Thunk> {
        self.thunk((insn.code(), register), || thunk::assemble_x87(insn))
    }

    fn thunk(&mut self, form: Form, assemble: impl FnOnce() -> Result<Vec<u8>, iced_x86::IcedError>) -> Option<Thunk> {
        if let Some(&thunk) = self.thunks.get(&form) {
            return Some(thunk);
        }
        let code = match assemble() {
            Ok(code) => code,
            Err(error) => {
                tracing::error!(?form, %error, "an instruction cannot be encoded");
                return None;
            }
        };
        let thunk = Thunk::new(self.arena()?.add(&code)?);
        self.thunks.insert(form, thunk);
        Some(thunk)
    }

    fn arena(&mut self) -> Option<&mut Arena> {
        if self.arena.is_none() && !self.refused {
            match Arena::new(ARENA_BYTES) {
                Ok(arena) => self.arena = Some(arena),
                Err(error) => {
                    self.refused = true;
                    tracing::error!(%error, "the host refuses executable memory: guest SSE and x87 instructions raise #UD");
                }
            }
        }
        self.arena.as_mut()
    }
}

/// Extensions of the host's processor that this module executes when they are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Features {
    /// CPUID.1:ECX bit 0.
    pub sse3: bool,
    /// CPUID.1:ECX bit 1.
    pub pclmulqdq: bool,
    /// CPUID.1:ECX bit 9.
    pub ssse3: bool,
    /// CPUID.1:ECX bit 19.
    pub sse4_1: bool,
    /// CPUID.1:ECX bit 20.
    pub sse4_2: bool,
    /// CPUID.1:ECX bit 25.
    pub aes: bool,
    /// CPUID.7:EBX bit 29.
    pub sha: bool,
}

/// What this host has beyond x87, MMX, FXSR, SSE and SSE2, which every x86-64 processor has.
pub(crate) fn features() -> Features {
    Features {
        sse3: is_x86_feature_detected!("sse3"),
        pclmulqdq: is_x86_feature_detected!("pclmulqdq"),
        ssse3: is_x86_feature_detected!("ssse3"),
        sse4_1: is_x86_feature_detected!("sse4.1"),
        sse4_2: is_x86_feature_detected!("sse4.2"),
        aes: is_x86_feature_detected!("aes"),
        sha: is_x86_feature_detected!("sha"),
    }
}

impl Features {
    fn allow(self, feature: CpuidFeature) -> bool {
        match feature {
            CpuidFeature::INTEL8086
            | CpuidFeature::X64
            | CpuidFeature::FPU
            | CpuidFeature::FPU287
            | CpuidFeature::FPU287XL_ONLY
            | CpuidFeature::FPU387
            | CpuidFeature::FPU387SL_ONLY
            | CpuidFeature::CMOV
            | CpuidFeature::FXSR
            | CpuidFeature::MMX
            | CpuidFeature::SSE
            | CpuidFeature::SSE2
            | CpuidFeature::CLFSH
            | CpuidFeature::CLFLUSHOPT
            | CpuidFeature::CLWB => true,
            CpuidFeature::SSE3 => self.sse3,
            CpuidFeature::PCLMULQDQ => self.pclmulqdq,
            CpuidFeature::SSSE3 => self.ssse3,
            CpuidFeature::SSE4_1 => self.sse4_1,
            CpuidFeature::SSE4_2 => self.sse4_2,
            CpuidFeature::AES => self.aes,
            CpuidFeature::SHA => self.sha,
            _ => false,
        }
    }
}

/// Takes the instruction if it is one of this module's. `bytes` are its own.
pub(crate) fn lower(natives: &mut Natives, l: &Lowering, insn: &Instruction, bytes: &[u8], op: &mut Op) -> bool {
    let features = features();
    if insn.encoding() != EncodingKind::Legacy || !insn.cpuid_features().iter().all(|&f| features.allow(f)) {
        return false;
    }
    moves::lower(l, insn, op)
        || mmx::lower(l, insn, op)
        || control::lower(l, insn, op)
        || x87::lower(natives, l, insn, bytes, op)
        || sse::lower(natives, l, insn, op)
}
