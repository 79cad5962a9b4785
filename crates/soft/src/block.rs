//! Blocks: runs of decoded instructions, and the cache that finds them.
//!
//! A block is found by guest *physical* address and code width, so that it serves every mapping of its page; nothing in it
//! depends on the linear address (see `RIP_BASE`). In front of that stands the jump cache, by linear address and address space.
//! A block is valid as long as its page's state word (see `vmm::memory::CodeMap`) is the one it was decoded under. Translated code
//! ([`crate::translator`]) reads the jump cache too.
//!
//! An instruction that crosses into another page makes a block of its own, which looks each time it begins whether the second page is still
//! the one that it was decoded from. No link leads there.
#![allow(unsafe_code)] // Blocks keep pointers to state words and hand out pointers to their ops.

mod decode;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::mem::offset_of;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::attention;
use crate::cpu::{CS, Cpu, RIP_BASE, Width};
use crate::native::Natives;
use crate::op::{Cursor, Handler, Op, Outcome, Trap};
use crate::table::filled;
use crate::translator::{self, Link, Source, Translator};

pub(crate) use decode::Lowering;

/// Instructions in a block at most.
const MAX_INSTRUCTIONS: usize = 32;
/// Longest instruction (Intel SDM vol. 2 section 2.3.11).
const MAX_LENGTH: usize = 15;
const PAGE: u64 = 4096;
/// Entries of the jump cache.
pub(crate) const JUMPS: usize = 8192;
/// Entries of the jump cache that stand in for each other: what is not in its own entry may still be in one of the others.
const WAYS: usize = 4;
/// Ops kept before the whole cache is emptied; 40 bytes each. Less costs time in programs that start programs, more costs memory.
const MAX_OPS: usize = 104 * 1024;

/// As many instructions are one time for [`BlockCache::count_crossing`],
const CROSSING_TIME: u64 = 1 << 17;
/// of which the number is known by these bits,
const CROSSING_TIMES: u32 = 0xf_ffff;
/// and so many crossings in one are too many: each costs as much as about 50 instructions, so they are a tenth.
const CROSSINGS: u32 = 256;

/// No block's number.
const NO_BLOCK: u32 = u32::MAX;

/// One run of decoded instructions.
struct Block {
    /// The first is no instruction: it names the block, see [`translator::header`].
    ops: Box<[Op]>,
    gpa: u64,
    len: u16,
    /// See [`translator::Translation`]; [`enter_untranslated`] until there is one.
    entry: Handler,
    unchecked: u16,
    /// Second page, when the only instruction crosses into it.
    crosses: Option<Box<Second>>,
    state: *const AtomicU32,
    value: u32,
    /// How often it was executed, as long as [`translator::warm`] counts; later what [`BlockCache::count_crossing`] counts.
    heat: u32,
    /// The first of the links that lead here.
    links: Option<NonNull<Link>>,
}

impl Block {
    /// A block of these ops, behind one whose handler is `first`; its page is as stated.
    fn new(first: Handler, mut ops: Vec<Op>, gpa: u64, len: u16, (state, value): (*const AtomicU32, u32)) -> Block {
        ops.insert(0, translator::header(first));
        let entry = ENTER_UNTRANSLATED;
        Block { ops: ops.into_boxed_slice(), gpa, len, entry, unchecked: 0, crosses: None, state, value, heat: 0, links: None }
    }
}

/// Where an instruction that crosses pages goes on.
struct Second {
    gpa: u64,
    len: u16,
    state: *const AtomicU32,
    value: u32,
}

/// An entry of the jump cache: a block that is to be run, which looks itself whether it is still what its page says.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct JumpEntry {
    va: u64,
    /// See [`Cpu::space`].
    space: u64,
    /// Where translated code goes: the block's code, or [`enter_untranslated`], as it was once.
    run: Handler,
    /// The block's number. What has it may be another block by now, of the same address.
    number: u32,
}

/// Where things are, for generated code.
impl JumpEntry {
    pub const VA: i32 = offset_of!(JumpEntry, va) as i32;
    pub const SPACE: i32 = offset_of!(JumpEntry, space) as i32;
    pub const RUN: i32 = offset_of!(JumpEntry, run) as i32;
    pub const NUMBER: i32 = offset_of!(JumpEntry, number) as i32;
    /// The number of an entry is the linear address, exclusive-or that shifted right by this, modulo [`JUMPS`].
    pub const FOLD_SHIFT: u8 = 12;
    const NONE: JumpEntry = JumpEntry { va: 0, space: u64::MAX, run: ENTER_UNTRANSLATED, number: NO_BLOCK };
}

/// [`enter_untranslated`], which takes a block's number in place of an op.
type EnterUntranslated = extern "sysv64-unwind" fn(&mut Cpu, usize) -> Outcome;

// SAFETY: only generated code comes here, by an entry of the jump cache, and it has the entry's number where a second argument is.
const ENTER_UNTRANSLATED: Handler = unsafe { std::mem::transmute::<EnterUntranslated, Handler>(enter_untranslated) };

/// Runs a block that had no translation when translated code found it in the jump cache.
extern "sysv64-unwind" fn enter_untranslated(cpu: &mut Cpu, number: usize) -> Outcome {
    let first = Cursor::first(cpu.blocks.blocks[number].ops.as_ptr());
    (first.run)(cpu, first)
}

/// Whether a block's page is as it was when the block was decoded.
#[inline(always)]
fn is_state(state: *const AtomicU32, value: u32) -> bool {
    // SAFETY: states of blocks, and of entries that were found by their address and so come from blocks: see `Send` of `BlockCache`.
    unsafe { &*state }.load(Ordering::Relaxed) == value
}

/// All blocks of one processor.
pub(crate) struct BlockCache {
    blocks: Vec<Block>,
    by_address: HashMap<u64, u32, BuildHasherDefault<AddressHasher>>,
    /// An entry may outlive its block, which is replaced only when the entry is not fresh any more.
    jumps: Box<[JumpEntry; JUMPS]>,
    /// Where among its neighbours the last entry went that had to make room for another, 1 to `WAYS - 1`.
    way: usize,
    natives: Natives,
    translator: Translator,
    ops: usize,
    /// Number of the running block, [`NO_BLOCK`] when none is running. A block says so itself when it begins.
    running: u32,
    /// The link that a translated branch has just followed, and that is not filled.
    link: Option<NonNull<Link>>,
}

// SAFETY: the pointers lead into the code maps of the machine's memory, which the processor keeps alive (`Cpu::vm`) and which
// any thread may read.
unsafe impl Send for BlockCache {}

/// Multiplicative hash: keys are addresses, and nobody outside chooses them to collide at a price we would notice.
#[derive(Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _bytes: &[u8]) {}
    fn write_u64(&mut self, value: u64) {
        let hash = value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = hash ^ hash >> 32;
    }
}

impl BlockCache {
    /// Where the pointer to the jump cache is, for generated code.
    pub const JUMP_CACHE: usize = offset_of!(BlockCache, jumps);
    /// Where the number of the running block is.
    pub const RUNNING: usize = offset_of!(BlockCache, running);

    pub fn new() -> BlockCache {
        BlockCache {
            blocks: Vec::new(),
            by_address: HashMap::default(),
            jumps: filled(JumpEntry::NONE),
            way: 1,
            natives: Natives::new(),
            translator: Translator::default(),
            ops: 0,
            running: NO_BLOCK,
            link: None,
        }
    }

    fn running_block(&self) -> Option<&Block> {
        self.blocks.get(self.running as usize)
    }

    /// Whether the running block was decoded from any byte of `[start, end)`.
    pub fn runs_in(&self, start: u64, end: u64) -> bool {
        let Some(block) = self.running_block() else { return false };
        let overlaps = |gpa: u64, len: u16| start < gpa + u64::from(len) && gpa < end;
        overlaps(block.gpa, block.len) || block.crosses.as_ref().is_some_and(|second| overlaps(second.gpa, second.len))
    }

    /// Nothing is running: memory accesses from outside blocks never have to wait for themselves.
    pub fn stop_running(&mut self) {
        self.running = NO_BLOCK;
    }

    /// This block is what the link leads to that was followed, unless something came in between. One that crosses pages is left to the jump
    /// cache, as its second page is another in another address space.
    #[cold]
    fn fill_link(&mut self, number: u32) {
        let block = &mut self.blocks[number as usize];
        if let Some(link) = self.link.take()
            && block.crosses.is_none()
        {
            self.translator.links.fill(link, block.gpa, block.ops.as_ptr(), block.value, &mut block.links);
            self.translator.direct(block.links, block.entry, block.unchecked);
        }
    }

    /// The next block is what this link leads to.
    pub fn follow(&mut self, link: NonNull<Link>) {
        self.stop_running();
        self.link = Some(link);
    }

    fn clear(&mut self) {
        self.blocks.clear();
        self.by_address.clear();
        self.jumps.fill(JumpEntry::NONE);
        self.translator.clear();
        self.link = None;
        self.ops = 0;
    }

    /// The handler of a block that is entered at `va` may be another than the jump cache has.
    pub fn renew_jump(&mut self, va: u64, number: u32) {
        let jump = &mut self.jumps[jump_index(va)];
        if jump.number == number {
            jump.run = self.blocks[number as usize].entry;
        }
    }

    /// Whether a block whose first op this is has been translated.
    pub fn is_translated(&self, first: Cursor) -> bool {
        self.translator.has(first.run)
    }

    /// Counts an execution of a block; tells whether there were enough of them now.
    #[inline(always)]
    pub fn heat(&mut self, block: usize, enough: u32) -> bool {
        let block = &mut self.blocks[block];
        block.heat += 1;
        block.heat > enough
    }

    /// Counts that the running block was left as something of it lies across the end of a page, after so many instructions; tells whether
    /// this happens too often.
    pub fn count_crossing(&mut self, instructions: u64) -> bool {
        let Some(block) = self.blocks.get_mut(self.running as usize) else { return false };
        let time = (instructions / CROSSING_TIME) as u32 & CROSSING_TIMES;
        if block.heat & CROSSING_TIMES != time {
            block.heat = time;
        }
        block.heat += CROSSING_TIMES + 1;
        block.heat >> CROSSING_TIMES.count_ones() == CROSSINGS
    }

    /// Whether what a block was decoded from has not changed.
    #[inline(always)]
    fn is_fresh(block: &Block) -> bool {
        is_state(block.state, block.value) && block.crosses.as_ref().is_none_or(|second| is_state(second.state, second.value))
    }
}

impl Cpu {
    /// The block at RIP, decoded if need be, ready to run; `single` asks for one instruction only.
    #[inline(always)]
    pub fn enter_block(&mut self, single: bool) -> Result<Cursor, Trap> {
        let va = if self.width == Width::Bits64 { self.rip } else { self.fetch_linear()? };
        let space = self.space();
        self.regs[RIP_BASE] = self.rip;
        if !single && let Some(known) = self.known_block(jump_index(va), va, space) {
            return Ok(known);
        }
        self.find_block(va, space, single)
    }

    /// The block in an entry of the jump cache, if it is the one at `va`.
    #[inline(always)]
    fn known_block(&mut self, index: usize, va: u64, space: u64) -> Option<Cursor> {
        let jump = self.blocks.jumps[index];
        if jump.va != va || jump.space != space {
            return None;
        }
        if self.blocks.link.is_some() {
            self.blocks.fill_link(jump.number);
        }
        Some(Cursor::first(self.blocks.blocks[jump.number as usize].ops.as_ptr()))
    }

    /// Begins a block, of which this is the first op, unless it is not any more what its pages say.
    #[inline(always)]
    pub fn begin_block(&mut self, first: Cursor) -> bool {
        let number = first.imm as u32;
        let block = self.blocks.blocks.get(number as usize).filter(|block| BlockCache::is_fresh(block));
        let second = block.and_then(|block| block.crosses.as_ref()).map(|second| second.gpa);
        let is_same = block.is_some() && second.is_none_or(|gpa| self.is_second_page(gpa));
        if is_same {
            self.blocks.running = number;
        } else {
            self.forget_jump();
        }
        is_same
    }

    /// Whether the page behind that of the block that is entered is this one: the same instruction may go on in another page elsewhere.
    #[inline(never)]
    fn is_second_page(&mut self, gpa: u64) -> bool {
        let next = (self.entered_at() & !(PAGE - 1)).wrapping_add(PAGE);
        matches!(self.fetch_address(next), Ok(second) if second == gpa)
    }

    /// Linear address of the block that is entered.
    fn entered_at(&self) -> u64 {
        match self.width {
            Width::Bits64 => self.regs[RIP_BASE],
            _ => self.seg[CS].base.wrapping_add(self.regs[RIP_BASE]) & 0xffff_ffff,
        }
    }

    /// Takes the block that is entered out of the jump cache.
    #[cold]
    pub fn forget_jump(&mut self) {
        let va = self.entered_at();
        self.blocks.jumps[jump_index(va)] = JumpEntry::NONE;
    }

    /// What distinguishes linear addresses of code: the address space, and the width where it is not 64 bits.
    #[inline(always)]
    fn space(&self) -> u64 {
        self.tlb.address_space() | (Width::Bits64 as u64 - self.width as u64) << 56
    }

    /// Has a block translated, of which its first op says that it is hot.
    #[cold]
    #[inline(never)]
    pub fn translate_block(&mut self, index: usize) {
        if let Some(bytes) = self.bytes_of(index) {
            self.translate_bytes(index, &bytes, true);
        }
    }

    /// Has the running block translated anew, without windows.
    #[cold]
    #[inline(never)]
    pub fn narrow_block(&mut self) {
        let index = self.blocks.running as usize;
        let Some(bytes) = self.bytes_of(index) else { return };
        // As the interpreter has them.
        let Some(ops) = self.decode_bytes(&bytes, MAX_INSTRUCTIONS) else { return };
        for (op, new) in self.blocks.blocks[index].ops[1..].iter_mut().zip(ops) {
            op.run = new.run;
        }
        self.translate_bytes(index, &bytes, false);
        self.blocks.renew_jump(self.regs[RIP_BASE], self.blocks.running);
    }

    /// What a block was decoded from, if that has not changed.
    fn bytes_of(&self, index: usize) -> Option<Vec<u8>> {
        let block = self.blocks.blocks.get(index)?;
        let mut bytes = vec![0; usize::from(block.len)];
        self.vm.read_page(block.gpa, (block.gpa & (PAGE - 1)) as usize, &mut bytes);
        BlockCache::is_fresh(block).then_some(bytes)
    }

    fn translate_bytes(&mut self, index: usize, bytes: &[u8], wide: bool) {
        let attention = self.attention.address();
        let BlockCache { blocks, translator, ops, .. } = &mut self.blocks;
        let block = &mut blocks[index];
        let source =
            Source { number: index as u32, ops: &block.ops, bytes, gpa: block.gpa, state: block.state, value: block.value, attention };
        match translator::translate(translator, &source, wide) {
            Some(made) => {
                block.heat = 0;
                (block.entry, block.unchecked) = (made.looking, made.unchecked);
                made.entries.into_iter().for_each(|(k, handler)| block.ops[k].run = handler);
                translator.direct(block.links, block.entry, block.unchecked);
            }
            None => {
                block.ops[0].run = translator::named;
                if translator.can_be_emptied() {
                    // Everything begins anew with the next block that is decoded.
                    *ops = MAX_OPS + 1;
                }
            }
        }
    }

    /// CS limit check and linear address of RIP outside 64-bit code.
    fn fetch_linear(&mut self) -> Result<u64, Trap> {
        if self.rip > u64::from(self.seg[CS].limit) {
            return Err(self.gp());
        }
        Ok(self.seg[CS].base.wrapping_add(self.rip) & 0xffff_ffff)
    }

    #[cold]
    #[inline(never)]
    fn find_block(&mut self, va: u64, space: u64, single: bool) -> Result<Cursor, Trap> {
        let index = jump_index(va);
        if !single {
            for way in 1..WAYS {
                if let Some(known) = self.known_block(index ^ way, va, space) {
                    self.blocks.jumps.swap(index, index ^ way);
                    return Ok(known);
                }
            }
        }
        self.blocks.stop_running();
        let gpa = self.fetch_address(va)?;
        // One-instruction blocks are kept apart from ordinary ones; physical addresses have at most 46 bits.
        let key = gpa | (self.width as u64) << 56 | u64::from(single) << 60;
        let known = self.blocks.by_address.get(&key).copied();
        if let Some(index) = known {
            let block = &self.blocks.blocks[index as usize];
            let second = block.crosses.as_ref().map(|second| second.gpa);
            let same = BlockCache::is_fresh(block)
                && match second {
                    None => true,
                    Some(second) => self.fetch_address((va & !(PAGE - 1)).wrapping_add(PAGE))? == second,
                };
            if same {
                return Ok(self.start(index, va, space, single));
            }
        }
        if self.blocks.ops > MAX_OPS {
            self.blocks.clear();
        }
        let known = self.blocks.by_address.get(&key).copied();
        let block = self.decode(va, gpa, single)?;
        self.blocks.ops += block.ops.len();
        let index = match known {
            Some(index) => {
                let old = &mut self.blocks.blocks[index as usize];
                self.blocks.ops -= old.ops.len();
                *old = block;
                index
            }
            None => {
                let index = self.blocks.blocks.len() as u32;
                self.blocks.blocks.push(block);
                self.blocks.by_address.insert(key, index);
                index
            }
        };
        self.blocks.blocks[index as usize].ops[0].imm = index.into();
        Ok(self.start(index, va, space, single))
    }

    fn start(&mut self, index: u32, va: u64, space: u64, single: bool) -> Cursor {
        let block = &self.blocks.blocks[index as usize];
        let (first, run) = (Cursor::first(block.ops.as_ptr()), block.entry);
        if !single && (block.crosses.is_none() || self.width == Width::Bits64) {
            let jump = jump_index(va);
            let old = self.blocks.jumps[jump];
            if old.number != NO_BLOCK {
                self.blocks.way = self.blocks.way % (WAYS - 1) + 1;
                self.blocks.jumps[jump ^ self.blocks.way] = old;
            }
            self.blocks.jumps[jump] = JumpEntry { va, space, run, number: index };
        }
        if single {
            self.blocks.link = None;
        } else if self.blocks.link.is_some() {
            self.blocks.fill_link(index);
        }
        first
    }

    /// Makes sure that from now on every write to these bytes of the page at `gpa` is noticed.
    fn watch_code(&mut self, gpa: u64, start: usize, end: usize) -> (*const AtomicU32, u32) {
        let vm = std::sync::Arc::clone(&self.vm);
        let Some((_, code, page)) = vm.ram(gpa) else { unreachable!("the caller has looked") };
        let (value, first) = code.add_code(page, start, end);
        if first {
            let gpa = gpa & !(PAGE - 1);
            self.tlb.write_protect(gpa);
            vm.tell_code_page(self.id, gpa);
            while vm.code_page_unseen(self.id) {
                // The others may be waiting for us in the same way.
                if self.attention.flags() & attention::CODE_PAGES != 0 {
                    self.see_code_pages();
                }
                std::hint::spin_loop();
            }
        }
        (code.state(page), value)
    }

    /// Gives up write access to pages in which other processors found code.
    pub fn see_code_pages(&mut self) {
        self.attention.clear(attention::CODE_PAGES);
        for gpa in self.vm.take_code_pages(self.id) {
            self.tlb.write_protect(gpa);
        }
        self.vm.code_pages_seen(self.id);
    }
}

#[inline(always)]
fn jump_index(va: u64) -> usize {
    (va ^ va >> JumpEntry::FOLD_SHIFT) as usize & (JUMPS - 1)
}
