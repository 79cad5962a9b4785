//! The translator: host code for blocks that are executed often.
//!
//! Guest and host are the same architecture, so there is no intermediate language: a pass over a block's instructions makes the host's
//! instructions for each ([`lower`]), with guest registers in memory and copies of some in host registers ([`emit`]), and a second pass where
//! accesses to memory have something in common ([`window`]). The interpreter stays what is right by definition. Its ops are kept, and the code
//! is a handler like others, to which the first op that it stands for points:
//!
//! ```text
//!   ops      warm     mov     cpuid    add     jmp          before: warm counts, the others are interpreted
//!              │               ▲         │
//!   code       └─> mov ────────┘   ┌─────┘                  after: what has no translation, or an access that the TLB does not know,
//!                                  └─> add -> jmp ─> block         is done by the handler of its op
//! ```
//!
//! A branch leads to the next block's code by itself ([`link`]), or finds it in the jump cache ([`crate::block`]). A block looks around before it
//! begins: not when something wants the processor's attention, or when its page has changed. Code lies in an arena of the processor's own; when
//! that is full, the whole block cache is emptied with it.
#![allow(unsafe_code)] // Makes handlers of code.

mod atomic;
mod code;
mod emit;
mod flow;
mod link;
mod lower;
mod window;

use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use iced_x86::{Decoder, DecoderOptions, Instruction};

use crate::cpu::{Cpu, RIP_BASE};
use crate::native::Arena;
use crate::op::{Cursor, Handler, Op, Outcome};
use code::Code;
use emit::Emitter;
pub(crate) use link::{Link, Links};
use lower::{After, Flags, Item};
use window::{Event, Plan};

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

    /// Where a handler is in the arena, if it is a translation.
    fn offset_of(&self, handler: Handler) -> Option<usize> {
        self.arena.as_ref()?.offset_of(handler as *const u8)
    }

    /// Whether a handler is a translation.
    pub fn has(&self, handler: Handler) -> bool {
        self.offset_of(handler).is_some()
    }

    /// Has the jumps of links, from the `first`, lead to the code of a block, if it is translated: to `looking`, or so far behind its beginning
    /// where nothing has to be looked at.
    pub fn direct(&mut self, first: Option<NonNull<Link>>, looking: Handler, unchecked: u16) {
        if let Some(target) = self.offset_of(looking)
            && let Some(arena) = &mut self.arena
        {
            let target = |checked| if checked { target } else { target + usize::from(unchecked) };
            self.links.sites(first).for_each(|(site, checked)| arena.redirect(site as usize, target(checked)));
        }
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
    if !cpu.begin_block(op) {
        return op.again(cpu);
    }
    if !cpu.blocks.is_translated(op) {
        if !cpu.blocks.heat(op.imm as usize, cpu.vm.translate_after) {
            return op.next(cpu);
        }
        cpu.translate_block(op.imm as usize);
    }
    // Where the block was entered is its linear address, in 64-bit code.
    cpu.blocks.renew_jump(cpu.regs[RIP_BASE], op.imm as u32);
    // The block's ops have changed: it is entered again.
    op.again(cpu)
}

/// In place of op `op`'s handler `run`: a window could not be opened as it would lie across the end of a page. Where that is often so, as with
/// a stack frame there, the block is translated anew without windows.
extern "sysv64-unwind" fn crossed(cpu: &mut Cpu, op: Cursor, run: Handler) -> Outcome {
    if cpu.blocks.count_crossing(cpu.instructions) {
        cpu.narrow_block();
        return op.again(cpu);
    }
    run(cpu, op)
}

/// [`crossed`].
type Crossed = extern "sysv64-unwind" fn(&mut Cpu, Cursor, Handler) -> Outcome;

/// The block that was about to begin is not any more what its page says. Its ops may be gone.
extern "sysv64-unwind" fn stale(cpu: &mut Cpu) -> Outcome {
    cpu.forget_jump();
    cpu.rip = cpu.regs[RIP_BASE];
    Outcome::Done
}

/// [`stale`].
type Stale = extern "sysv64-unwind" fn(&mut Cpu) -> Outcome;

/// The first op of a block that is not to be translated.
pub(crate) extern "sysv64-unwind" fn named(cpu: &mut Cpu, op: Cursor) -> Outcome {
    if cpu.begin_block(op) { op.next(cpu) } else { op.again(cpu) }
}

/// The first op of a block; whoever makes the block gives it the block's number.
pub(crate) fn header(run: Handler) -> Op {
    let mut op = Op::new(run, 0, 0, 0);
    op.count = 0;
    op
}

/// A block to translate.
pub(crate) struct Source<'a> {
    pub number: u32,
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

/// A translated block.
pub(crate) struct Translation {
    /// By op its new handler, where it gets one.
    pub entries: Vec<(usize, Handler)>,
    /// The handler that looks first whether something wants the processor's attention.
    pub looking: Handler,
    /// How far behind its beginning the code is that does not look at anything.
    pub unchecked: u16,
}

/// Translates a block, with windows if `wide`. `None` when there is no room for the code.
pub(crate) fn translate(translator: &mut Translator, source: &Source, wide: bool) -> Option<Translation> {
    let instructions: Vec<Instruction> = Decoder::with_ip(64, source.bytes, 0, DecoderOptions::NONE).into_iter().collect();
    let mut items = items(source.ops, &instructions)?;
    let links = &mut translator.links;
    let (first, mut plan) = (links.len(), Plan::default());
    let mut made = emit(source, &mut items, links, &plan)?;
    if wide {
        plan = window::plan(&made.events);
    }
    if !plan.inside.is_empty() {
        links.truncate(first);
        made = match emit(source, &mut items, links, &plan) {
            None => {
                // The plan cannot be followed.
                links.truncate(first);
                emit(source, &mut items, links, &Plan::default())?
            }
            Some(made) => made,
        };
    }
    let base = translator.add(made.code.bytes())?;
    let start = translator.arena.as_ref().and_then(|arena| arena.offset_of(base.as_ptr()))?;
    made.sites.iter().for_each(|&(link, site)| translator.links.place(link, (start + site) as u32));
    let handler = |offset: usize| {
        // SAFETY: the offset is inside of what was just added, where an instruction's code begins that is a handler by its calling
        // convention: it takes the processor in RDI, keeps what a callee must keep, and returns an `Outcome` or goes on to a handler.
        unsafe { std::mem::transmute::<NonNull<u8>, Handler>(base.add(offset)) }
    };
    let entries = made.entries.into_iter().map(|(k, offset)| (k, handler(offset))).collect();
    Some(Translation { entries, looking: handler(0), unchecked: made.unchecked as u16 })
}

/// The block's instructions, each with what was made of it.
fn items<'a>(ops: &'a [Op], instructions: &'a [Instruction]) -> Option<Vec<Item<'a>>> {
    let item = |(k, op): (usize, &'a Op)| {
        let index = instructions.iter().position(|insn| insn.ip() == u64::from(op.start))?;
        let jump = if op.count == 2 { instructions.get(index + 1) } else { None };
        Some(Item { insn: &instructions[index], jump, op, k, flags_needed: true })
    };
    ops.iter().enumerate().filter(|(_, op)| op.count > 0).map(item).collect()
}

/// Finds out after which instructions somebody may look at the arithmetic flags. Those in `inside` access memory and cannot fail.
fn find_flags_needed(items: &mut [Item], inside: &[usize]) {
    let mut needed = true;
    for item in items.iter_mut().rev() {
        item.flags_needed = needed;
        let may_fail = lower::accesses(item.insn) && !inside.contains(&item.k);
        needed = may_fail
            || match lower::flags(item.insn) {
                Flags::Replaced => false,
                Flags::Passed => needed,
                Flags::Seen => true,
            };
    }
}

/// What is made of a block.
struct Made {
    code: Code,
    /// Ops whose code begins at an offset.
    entries: Vec<(usize, usize)>,
    /// Where the code begins that has looked around.
    unchecked: usize,
    /// Where the jumps of links have their distances.
    sites: Vec<(NonNull<Link>, usize)>,
    /// What the block does.
    events: Vec<Event>,
}

/// Makes a block's code, with windows as planned. `None` when the plan cannot be followed.
fn emit(source: &Source, items: &mut [Item], links: &mut Links, plan: &Plan) -> Option<Made> {
    find_flags_needed(items, &plan.inside);
    let mut emitter = Emitter::new(source, links, &plan.ways);
    let (entered, unchecked) = (emitter.entered, emitter.unchecked);
    let mut entries = vec![(0, entered)];
    // Whether the code made last goes on with what is made next.
    let mut falls_through = true;
    for item in items {
        let mark = emitter.mark();
        let start = emitter.code.len();
        emitter.is_reentered |= !falls_through;
        match emitter.instruction(item) {
            Some(after) => {
                if !falls_through {
                    entries.push((item.k, start));
                }
                falls_through = after == After::Next;
            }
            None => {
                emitter.back_to(&mark);
                if falls_through {
                    emitter.interpret(item.k);
                }
                falls_through = false;
            }
        }
    }
    // A block that ends by its length has one op more.
    if let Some(end) = source.ops.last().filter(|op| falls_through && op.count == 0) {
        emitter.go_to(source.ops.len() - 1, end.start.into());
    }
    if emitter.is_off_plan {
        return None;
    }
    let (events, sites) = (std::mem::take(&mut emitter.events), std::mem::take(&mut emitter.sites));
    Some(Made { code: emitter.finish(), entries, unchecked, sites, events })
}
