//! The translator: host code for blocks that are executed often.
//!
//! Guest and host are the same architecture, so there is no intermediate language: one pass over a block's instructions makes the host's
//! instructions for each ([`lower`]), with guest registers in memory and copies of some in host registers ([`emit`]). The interpreter stays
//! what is right by definition. Its ops are kept, and the code is a handler like others, to which the first op that it stands for points:
//!
//! ```text
//!   ops      warm     mov     cpuid    add     jmp          before: warm counts, the others are interpreted
//!              │               ▲         │
//!   code       └─> mov ────────┘   ┌─────┘                  after: what has no translation, or an access that the TLB does not know,
//!                                  └─> add -> jmp ─> block         is done by the handler of its op
//! ```
//!
//! A branch finds the next block by itself, by its link ([`link`]) or in the jump cache ([`crate::block`]), and goes there, unless something
//! wants the processor's attention. Code lies in an arena of the processor's own; when that is full, the whole block cache is emptied with it.
#![allow(unsafe_code)] // Makes handlers of code.

mod code;
mod emit;
mod link;
mod lower;

use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use iced_x86::{Decoder, DecoderOptions, Instruction};

use crate::cpu::Cpu;
use crate::native::Arena;
use crate::op::{Cursor, Handler, Op, Outcome};
use emit::Emitter;
pub(crate) use link::{Link, Links};
use lower::{After, Item};

/// Room for code. A byte of guest code makes about ten here, and what is hot in a Linux guest is some hundred KiB.
const ARENA_BYTES: usize = 16 << 20;

/// The translations of one processor.
#[derive(Default)]
pub(crate) struct Translator {
    /// Made with the first translation.
    arena: Option<Arena>,
    /// What direct branches remember.
    pub links: Links,
    /// The host gives no executable memory; said once.
    refused: bool,
}

impl Translator {
    /// Adds code. `None` when it does not fit.
    fn add(&mut self, code: &[u8]) -> Option<NonNull<u8>> {
        if self.arena.is_none() && !self.refused {
            match Arena::new(ARENA_BYTES) {
                Ok(arena) => self.arena = Some(arena),
                Err(error) => {
                    tracing::warn!(%error, "no executable memory: guest code is interpreted");
                    self.refused = true;
                }
            }
        }
        self.arena.as_mut()?.add(code)
    }

    /// Whether forgetting all code would make room.
    pub fn can_be_emptied(&self) -> bool {
        self.arena.is_some()
    }

    /// Forgets all code; none of it may be running or be reached.
    pub fn clear(&mut self) {
        if let Some(arena) = &mut self.arena {
            arena.clear();
        }
        self.links.clear();
    }
}

/// The first op of a block, which is no instruction: counts how often the block is executed, and has it translated. `imm` is the
/// block's number.
pub(crate) extern "sysv64-unwind" fn warm(cpu: &mut Cpu, op: Cursor) -> Outcome {
    if !cpu.blocks.heat(op.imm as usize, cpu.vm.translate_after) {
        return op.next(cpu);
    }
    cpu.translate_block(op.imm as usize);
    // The block's ops have changed: it is entered again.
    op.again(cpu)
}

/// The first op of a block that is not to be translated: only names it.
pub(crate) extern "sysv64-unwind" fn named(cpu: &mut Cpu, op: Cursor) -> Outcome {
    op.next(cpu)
}

/// The first op of a block; whoever makes the block gives it the block's number.
pub(crate) fn header(run: Handler) -> Op {
    let mut op = Op::new(run, 0, 0, 0);
    op.count = 0;
    op
}

/// A block to translate.
pub(crate) struct Source<'a> {
    /// The first is [`warm`].
    pub ops: &'a [Op],
    /// What they were decoded from.
    pub bytes: &'a [u8],
    /// Where those are.
    pub gpa: u64,
    /// State word of the page, and what it is now.
    pub state: *const AtomicU32,
    pub value: u32,
    /// The processor's flags of [`crate::attention`].
    pub attention: *const AtomicU32,
}

/// Translates a block. The result is by op its new handler, where it gets one. `None` when there is no room for the code.
pub(crate) fn translate(translator: &mut Translator, source: &Source) -> Option<Vec<(usize, Handler)>> {
    let Source { ops, bytes, .. } = *source;
    let instructions: Vec<Instruction> = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).into_iter().collect();
    let at = |start: u64| instructions.iter().position(|insn| insn.ip() == start);
    let mut flags_needed = vec![true; ops.len()];
    let mut needed = true;
    for (k, op) in ops.iter().enumerate().rev() {
        flags_needed[k] = needed;
        if op.count > 0 {
            let insn = &instructions[at(op.start.into())?];
            needed = !lower::replaces_flags(insn) && (needed || !lower::ignores_flags(insn));
        }
    }
    let mut emitter = Emitter::new(source, &mut translator.links);
    let mut entries = vec![(0, 0)];
    // Whether the code made last goes on with what is made next.
    let mut falls_through = true;
    for (k, op) in ops.iter().enumerate().skip(1) {
        if op.count == 0 {
            // The block ended by its length.
            if falls_through {
                emitter.go_to(k, op.start.into());
            }
            falls_through = false;
            continue;
        }
        let mark = emitter.mark();
        let index = at(op.start.into())?;
        let jump = if op.count == 2 { instructions.get(index + 1) } else { None };
        let item = Item { insn: &instructions[index], jump, op, k, flags_needed: flags_needed[k] };
        let start = emitter.code.len();
        emitter.is_reentered |= !falls_through;
        match emitter.instruction(&item) {
            Some(after) => {
                if !falls_through {
                    entries.push((k, start));
                }
                falls_through = after == After::Next;
            }
            None => {
                emitter.back_to(&mark);
                if falls_through {
                    emitter.interpret(k);
                }
                falls_through = false;
            }
        }
    }
    let code = emitter.finish();
    let base = translator.add(code.bytes())?;
    let handler = |offset: usize| {
        // SAFETY: the offset is inside of what was just added, where an instruction's code begins that is a handler by its calling
        // convention: it takes the processor in RDI, keeps what a callee must keep, and returns an `Outcome` or goes on to a handler.
        unsafe { std::mem::transmute::<NonNull<u8>, Handler>(base.add(offset)) }
    };
    Some(entries.into_iter().map(|(k, offset)| (k, handler(offset))).collect())
}
