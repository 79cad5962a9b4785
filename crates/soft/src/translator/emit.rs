//! What every translated instruction is made of: guest registers, flags, memory, and the ways out of the code.
//!
//! ```text
//!   RDI  the processor (`Cpu`)             RSI R8..R11  copies of guest registers, and windows
//!   RAX RCX RDX  scratch
//! ```
//!
//! Guest registers live in [`Cpu::regs`]. A copy in a host register only saves loads: every result is stored at once, so memory is exact
//! after each instruction and whoever takes over finds all of it there. Copies are forgotten where another may have been at work. Likewise
//! the arithmetic flags: those that somebody may look at are stored as the interpreter stores them, and what follows takes them from the
//! host's as long as they are there. Others of these host registers lead to guest memory ([`super::window`]).
//!
//! An access that the TLB does not know, and every instruction that has no translation, is done by the interpreter's handler: the code
//! jumps there, as [`crate::op::Cursor::next`] would.

use std::mem::offset_of;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use super::code::{AX, CX, Code, DI, DX, Jump, Place, R8, R9, R10, R11, Reg, SI, alu, condition};
use super::window::{Event, Key, Way, Window};
use super::{Crossed, Link, Links, Source, Stale, crossed, stale};
use crate::block::{BlockCache, JUMPS, JumpEntry};
use crate::cpu::{Cpu, RIP_BASE, ZERO};
use crate::mmu::Tlb;
use crate::op::{Op, Outcome};

/// Where copies of guest registers and windows are kept.
const KEPT: [Reg; 5] = [R8, R9, R10, R11, SI];
/// LAHF, and SETO AL.
const FLAGS_TO_AX: [u8; 4] = [0x9f, 0x0f, 0x90, 0xc0];
/// ADD AL, 127, and SAHF: the reverse, see [`crate::flags`].
const AX_TO_FLAGS: [u8; 3] = [0x04, 127, 0x9e];
/// RET.
const RETURN: u8 = 0xc3;

/// What happens where the code cannot go on. It stands behind the rest, as it is rarely executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Miss {
    /// The interpreter executes the whole op, of which nothing has been done.
    Handler,
    /// The same, where a window of this size was to be opened at RAX. It may be that it lies across the end of a page.
    Window { size: u8 },
    /// The run loop goes on at RAX: all of the op is done. When RAX is no canonical address, all but its branch is, which stands at this
    /// distance from the block's start and is executed next, alone.
    Leave { branch: i32 },
    /// Goes to the block that a link leads to, of which the address is where entered blocks have theirs: all of the op is done.
    Link(NonNull<Link>),
    /// The block is forgotten, and the run loop looks for what is at its address.
    Stale,
    /// The run loop goes on at the next block, of which the address is where entered blocks have theirs: all of the op is done.
    Arrived,
}

/// A way out of an op.
type Exit = (usize, Miss);

/// What a host register has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    /// The value of a guest register.
    Copy(u8),
    /// The host address of a window's first byte.
    Window(Window),
}

/// The code of a block in the making.
pub(super) struct Emitter<'a> {
    pub code: Code,
    source: &'a Source<'a>,
    links: &'a mut Links,
    /// By host register in [`KEPT`].
    kept: [Option<Kept>; KEPT.len()],
    /// Bit by place in [`KEPT`]: used by the instruction under way.
    pinned: u8,
    next: usize,
    /// How memory is accessed, by access.
    plan: &'a [Way],
    /// A window is not open where it was planned to be.
    pub is_off_plan: bool,
    /// Accesses until now.
    accesses: usize,
    /// What the block does, for the plan.
    pub events: Vec<Event>,
    /// The host's arithmetic flags are the guest's. Whatever changes them says so.
    pub flags_in_host: bool,
    /// Handlers of the interpreter go back to this code.
    pub is_reentered: bool,
    /// Where the code begins for who knows that nothing wants the processor's attention,
    pub entered: usize,
    /// and for who knows besides that the block is what its page says.
    pub unchecked: usize,
    /// By op and what happens: the jumps there.
    cold: Vec<(Exit, Jump)>,
    /// Where the jumps of links have their distances.
    pub sites: Vec<(NonNull<Link>, usize)>,
}

/// What an [`Emitter`] goes back to when an instruction turns out to have no translation.
pub(super) struct Mark {
    len: usize,
    cold: usize,
    accesses: usize,
    events: usize,
}

/// A guest register in [`Cpu`].
pub(super) fn guest(number: usize) -> Place {
    Place::At(DI, (offset_of!(Cpu, regs) + number * 8) as i32)
}

fn of_tlb(offset: usize) -> Place {
    Place::At(DI, (offset_of!(Cpu, tlb) + offset) as i32)
}

fn of_cache(offset: usize) -> Place {
    Place::At(DI, (offset_of!(Cpu, blocks) + offset) as i32)
}

/// The arithmetic flags in [`Cpu`], or their upper byte.
fn flags(byte: usize) -> Place {
    Place::At(DI, (offset_of!(Cpu, status_flags) + byte) as i32)
}

impl<'a> Emitter<'a> {
    /// Begins a block's code, with windows as planned.
    pub fn new(source: &'a Source<'a>, links: &'a mut Links, plan: &'a [Way]) -> Emitter<'a> {
        let mut emitter = Emitter {
            code: Code::default(),
            source,
            links,
            kept: [None; KEPT.len()],
            pinned: 0,
            next: 0,
            plan,
            is_off_plan: false,
            accesses: 0,
            events: Vec::new(),
            flags_in_host: false,
            is_reentered: false,
            entered: 0,
            unchecked: 0,
            cold: Vec::new(),
            sites: Vec::new(),
        };
        emitter.begin();
        emitter
    }

    /// The block begins.
    fn begin(&mut self) {
        let Source { number, attention, state, value, .. } = *self.source;
        self.compare_word(attention, 0, Miss::Arrived);
        self.entered = self.code.len();
        self.compare_word(state, value, Miss::Stale);
        self.unchecked = self.code.len();
        self.code.store_constant(4, of_cache(BlockCache::RUNNING), number.cast_signed());
    }

    /// Leaves by `miss`, at the block's beginning, when a word is not `value`. Changes RCX.
    fn compare_word(&mut self, word: *const AtomicU32, value: u32, miss: Miss) {
        self.code.set(CX, word as u64);
        self.code.alu_constant(alu::CMP, 4, Place::At(CX, 0), value.cast_signed());
        self.cold.push(((0, miss), self.code.jump_if(condition::NOT_EQUAL)));
    }

    pub fn mark(&self) -> Mark {
        Mark { len: self.code.len(), cold: self.cold.len(), accesses: self.accesses, events: self.events.len() }
    }

    /// Drops what was made since the mark, and all copies.
    pub fn back_to(&mut self, mark: &Mark) {
        self.code.truncate(mark.len);
        self.cold.truncate(mark.cold);
        self.accesses = mark.accesses;
        self.events.truncate(mark.events);
        self.forget();
    }

    /// Somebody else may have changed registers and flags.
    pub fn forget(&mut self) {
        self.kept = [None; KEPT.len()];
        self.flags_in_host = false;
        self.events.push(Event::Barrier);
    }

    /// A host register that the instruction under way does not use; it is in use from now on.
    fn take(&mut self) -> usize {
        let place = |n: usize| (self.next + n) % KEPT.len();
        let is_free = |&place: &usize| self.pinned & 1 << place == 0;
        let is_copy = |&place: &usize| !matches!(self.kept[place], Some(Kept::Window(_)));
        let mut free = (0..KEPT.len()).map(place).filter(is_free);
        // A copy is made by one instruction, a window by ten. An instruction uses four registers at most.
        let place = free.clone().find(is_copy).or_else(|| free.next()).unwrap_or(self.next);
        self.next = (place + 1) % KEPT.len();
        self.pinned |= 1 << place;
        place
    }

    /// A host register for whatever the instruction under way wants.
    pub fn temporary(&mut self) -> Reg {
        let place = self.take();
        self.kept[place] = None;
        KEPT[place]
    }

    /// What uses registers begins, or is done with those that it has used until now.
    pub fn unpin(&mut self) {
        self.pinned = 0;
    }

    /// A host register for a guest register that is about to be overwritten whole.
    pub fn define(&mut self, register: u8) -> Reg {
        let known = self.kept.iter().position(|&kept| kept == Some(Kept::Copy(register)));
        let place = known.unwrap_or_else(|| self.take());
        self.kept[place] = Some(Kept::Copy(register));
        self.pinned |= 1 << place;
        KEPT[place]
    }

    /// A host register that holds a guest register.
    pub fn read(&mut self, register: u8) -> Reg {
        let is_known = self.kept.contains(&Some(Kept::Copy(register)));
        let host = self.define(register);
        if !is_known {
            self.code.load(8, host, guest(register.into()));
        }
        host
    }

    /// A guest register has got its new value in `host`.
    pub fn written(&mut self, register: u8, host: Reg) {
        self.moved(register, None, host);
    }

    /// A guest register has got its new value in `host`: its old one plus a constant, if that is known.
    pub fn moved(&mut self, register: u8, by: Option<i32>, host: Reg) {
        self.code.store(8, guest(register.into()), host);
        self.events.push(Event::Moved { register, by });
        for kept in &mut self.kept {
            if let Some(Kept::Window(window)) = kept {
                *kept = window.moved(register, by).map(Kept::Window);
            }
        }
    }

    /// An instruction has changed the host's arithmetic flags as the guest's: all of them, or else some, in what the guest's were if they are
    /// `needed`. Then they are stored. Changes RAX.
    pub fn flags_changed(&mut self, needed: bool, all: bool) {
        self.flags_in_host |= all;
        if needed {
            self.code.push(&FLAGS_TO_AX);
            self.code.store(2, flags(0), AX);
        }
    }

    /// Makes the host's arithmetic flags the guest's. May change RAX.
    pub fn load_flags(&mut self) {
        if !self.flags_in_host {
            self.code.load(2, AX, flags(0));
            self.code.push(&AX_TO_FLAGS);
            self.flags_in_host = true;
        }
    }

    /// The condition of the host's flags that is the guest's condition `cc`. May change RAX.
    pub fn condition(&mut self, cc: u8) -> u8 {
        if self.flags_in_host {
            return cc;
        }
        // Where one byte of the stored flags tells: OF, CF, ZF, CF or ZF, SF, PF.
        let (byte, mask) = match cc >> 1 {
            0 => (0, 1),
            1 => (1, 0x01),
            2 => (1, 0x40),
            3 => (1, 0x41),
            4 => (1, 0x80),
            5 => (1, 0x04),
            _ => {
                self.load_flags();
                return cc;
            }
        };
        // TEST byte, mask
        self.code.op(1, &[0xf6], 0, flags(byte));
        self.code.push(&[mask]);
        condition::NOT_EQUAL ^ cc & 1
    }

    /// The place an op's memory operand names, without its segment's base. `None` when its address form is not flat.
    pub fn operand(&mut self, op: &Op) -> Option<Place> {
        let disp = i32::try_from(op.disp).ok()?;
        if op.addr_size != 8 {
            return None;
        }
        let base = match usize::from(op.base) {
            ZERO => None,
            RIP_BASE => {
                self.code.load(8, AX, guest(RIP_BASE));
                Some(AX)
            }
            _ => Some(self.read(op.base)),
        };
        Some(match (base, usize::from(op.index)) {
            (Some(base), ZERO) => Place::At(base, disp),
            (None, ZERO) => {
                self.code.set(AX, i64::from(disp) as u64);
                Place::At(AX, 0)
            }
            (base, _) => Place::Sib(base, self.read(op.index), op.scale, disp),
        })
    }

    /// The `size` bytes of op `k`'s memory operand as a place. `None` when its address form is not flat. Changes RAX, RCX and RDX.
    pub fn memory(&mut self, k: usize, size: u8, write: bool) -> Option<Place> {
        let op = &self.source.ops[k];
        if usize::from(op.index) == ZERO {
            let at = i32::try_from(op.disp).ok()?;
            let key = Key { base: op.base, segment: op.seg_base };
            return (op.addr_size == 8).then(|| self.access(k, key, at, size, write));
        }
        let place = self.operand(op)?;
        self.code.address(8, AX, place);
        if usize::from(op.seg_base) != ZERO {
            self.code.alu(alu::ADD, 8, AX, guest(op.seg_base.into()));
        }
        self.events.push(Event::Access { k, window: None });
        self.accesses += 1;
        self.host_address((k, Miss::Handler), size, write);
        Some(Place::At(AX, 0))
    }

    /// The `size` bytes at a constant distance from what `key` says, for op `k`, as a place: through a window, which may have to be opened, or
    /// by a look of their own. Changes RAX, RCX and RDX.
    pub fn access(&mut self, k: usize, key: Key, at: i32, size: u8, write: bool) -> Place {
        let access = Window::new(key, at, size, write);
        self.events.push(Event::Access { k, window: Some(access) });
        let way = self.plan.get(self.accesses).copied().unwrap_or(Way::Alone);
        self.accesses += 1;
        match way {
            Way::Alone => {
                // Others may want the register, too.
                if key.base < 16 {
                    self.read(key.base);
                }
                self.address_of(key, at);
                self.host_address((k, Miss::Handler), size, write);
                Place::At(AX, 0)
            }
            Way::Opens { window, low, closes } => {
                self.address_of(key, low);
                let size = window.size() as u8;
                self.host_address((k, Miss::Window { size }), size, window.write);
                let closed = closes.and_then(|gone| self.kept.iter().position(|&kept| kept == Some(Kept::Window(gone))));
                let place = closed.unwrap_or_else(|| self.take());
                self.code.copy(KEPT[place], AX);
                self.kept[place] = Some(Kept::Window(window));
                self.inside(place, &access)
            }
            Way::Inside => {
                let is_open = |kept: &Option<Kept>| matches!(kept, Some(Kept::Window(window)) if window.covers(&access));
                let place = self.kept.iter().position(is_open);
                self.is_off_plan |= place.is_none();
                self.inside(place.unwrap_or(0), &access)
            }
        }
    }

    /// Where an access is by the window at a place.
    fn inside(&mut self, place: usize, access: &Window) -> Place {
        self.pinned |= 1 << place;
        let low = if let Some(Kept::Window(window)) = &self.kept[place] { window.low } else { access.low };
        Place::At(KEPT[place], (access.low - low) as i32)
    }

    /// RAX becomes a linear address.
    fn address_of(&mut self, key: Key, at: i32) {
        let place = match usize::from(key.base) {
            ZERO => None,
            RIP_BASE => Some(guest(RIP_BASE)),
            _ if self.kept.contains(&Some(Kept::Copy(key.base))) => Some(Place::Reg(self.read(key.base))),
            _ => Some(guest(key.base.into())),
        };
        match place {
            None => self.code.set(AX, i64::from(at) as u64),
            Some(Place::Reg(base)) => self.code.address(8, AX, Place::At(base, at)),
            Some(place) => {
                self.code.load(8, AX, place);
                if at != 0 {
                    self.code.address(8, AX, Place::At(AX, at));
                }
            }
        }
        if usize::from(key.segment) != ZERO {
            self.code.alu(alu::ADD, 8, AX, guest(key.segment.into()));
        }
    }

    /// RAX becomes the host address of the `size` bytes at linear address RAX; the code is left by `miss` when the TLB does not know
    /// them. Changes RCX and RDX.
    fn host_address(&mut self, miss: Exit, size: u8, write: bool) {
        self.flags_in_host = false;
        self.code.address(8, CX, Place::At(AX, i32::from(size) - 1));
        self.code.load(4, DX, Place::Reg(AX));
        self.code.shift(5, 4, Place::Reg(DX), Tlb::INDEX_SHIFT);
        self.code.alu_constant(alu::AND, 4, Place::Reg(DX), Tlb::INDEX_MASK);
        self.code.alu(alu::ADD, 8, DX, of_tlb(Tlb::ENTRIES));
        self.code.alu_constant(alu::AND, 8, Place::Reg(CX), -4096);
        self.code.alu(alu::OR, 8, CX, of_tlb(Tlb::KEY));
        self.code.alu(alu::CMP, 8, CX, Place::At(DX, if write { Tlb::WRITE_TAG } else { Tlb::READ_TAG }));
        let jump = self.code.jump_if(condition::NOT_EQUAL);
        self.cold.push((miss, jump));
        self.code.alu(alu::ADD, 8, AX, Place::At(DX, Tlb::ADDEND));
    }

    /// The interpreter executes op `k` and goes on behind it.
    pub fn interpret(&mut self, k: usize) {
        let op = &self.source.ops[k];
        self.code.set(SI, std::ptr::from_ref(op) as u64);
        self.code.set(AX, op.run as usize as u64);
        self.code.jump_to(Place::Reg(AX));
    }

    /// RDX becomes the entry of the jump cache for linear address RAX; if there is none, op `k` is left by `miss`. Changes RCX.
    pub fn look_up(&mut self, k: usize, miss: Miss) {
        let code = &mut self.code;
        let mut unequal = |code: &mut Code| self.cold.push(((k, miss), code.jump_if(condition::NOT_EQUAL)));
        code.load(4, DX, Place::Reg(AX));
        code.shift(5, 4, Place::Reg(DX), JumpEntry::FOLD_SHIFT);
        code.alu(alu::XOR, 4, DX, Place::Reg(AX));
        code.alu_constant(alu::AND, 4, Place::Reg(DX), JUMPS as i32 - 1);
        code.shift(4, 4, Place::Reg(DX), size_of::<JumpEntry>().trailing_zeros() as u8);
        code.alu(alu::ADD, 8, DX, of_cache(BlockCache::JUMP_CACHE));
        code.alu(alu::CMP, 8, AX, Place::At(DX, JumpEntry::VA));
        unequal(code);
        code.load(8, CX, of_tlb(Tlb::KEY));
        code.alu(alu::OR, 8, CX, of_tlb(Tlb::EPOCH));
        code.alu(alu::CMP, 8, CX, Place::At(DX, JumpEntry::SPACE));
        unequal(code);
        self.look_at_stack((k, miss));
    }

    /// Leaves by `exit` when the stack is used up: handlers may call the next one instead of jumping to it, and if that is this code, it would
    /// never end.
    fn look_at_stack(&mut self, exit: Exit) {
        if self.is_reentered {
            let code = &mut self.code;
            // CMP RSP, [floor]
            code.op(8, &[0x3b], 4, Place::At(DI, offset_of!(Cpu, stack_floor) as i32));
            self.cold.push((exit, code.jump_if(condition::BELOW)));
        }
    }

    /// Op `k`, the last, is done.
    fn count(&mut self, k: usize) {
        self.code.alu_constant(alu::ADD, 8, Place::At(DI, offset_of!(Cpu, instructions) as i32), self.source.ops[k].seq.into());
    }

    /// Goes to the block `distance` from this one's start, behind op `k`; when that cannot be, leaves by `miss`.
    pub fn go_on(&mut self, k: usize, distance: i32, miss: Miss) {
        let gpa = self.source.gpa.wrapping_add_signed(distance.into());
        if (gpa ^ self.source.gpa) >> 12 != 0 {
            self.code.load(8, AX, guest(RIP_BASE));
            self.code.address(8, AX, Place::At(AX, distance));
            self.look_up(k, miss);
            self.enter(k);
            return;
        }
        if distance != 0 {
            self.code.alu_constant(alu::ADD, 8, guest(RIP_BASE), distance);
        }
        self.count(k);
        // What only goes forward ends with the page. So it is enough to look around, and whether the page has changed, on the way back; and behind
        // handlers, which may have changed it.
        let op = &self.source.ops[k];
        let checked = self.is_reentered || op.count > 0 && distance <= op.start.into();
        self.look_at_stack((k, Miss::Arrived));
        let link = self.links.add(gpa, self.source.value, checked);
        let jump = self.code.aligned_jump();
        self.sites.push((link, Code::site(jump)));
        self.cold.push(((k, Miss::Link(link)), jump));
    }

    /// Goes on in the block at linear address RAX, whose entry of the jump cache RDX is; op `k` is the last of this one.
    pub fn enter(&mut self, k: usize) {
        self.code.store(8, guest(RIP_BASE), AX);
        self.count(k);
        self.code.load(4, SI, Place::At(DX, JumpEntry::NUMBER));
        self.code.jump_to(Place::At(DX, JumpEntry::RUN));
    }

    /// Ends the code: puts what is rarely executed behind it.
    pub fn finish(mut self) -> Code {
        let mut cold = std::mem::take(&mut self.cold);
        cold.sort_by_key(|&(exit, _)| exit);
        for exits in cold.chunk_by(|a, b| a.0 == b.0) {
            exits.iter().for_each(|&(_, jump)| self.code.land(jump));
            let (k, miss) = exits[0].0;
            match miss {
                Miss::Handler => self.interpret(k),
                Miss::Window { size } => self.miss_window(k, size),
                Miss::Leave { branch } => self.leave(k, branch),
                Miss::Link(link) => {
                    self.code.set(DX, link.as_ptr() as u64);
                    self.code.load(8, SI, Place::At(DX, Link::OPS));
                    self.code.jump_to(Place::At(SI, offset_of!(Op, run) as i32));
                }
                Miss::Stale => {
                    self.code.set(AX, stale as Stale as usize as u64);
                    self.code.jump_to(Place::Reg(AX));
                }
                Miss::Arrived => {
                    self.code.load(8, AX, guest(RIP_BASE));
                    self.done();
                }
            }
        }
        self.code
    }

    /// The interpreter executes op `k`, as no window of `size` bytes could be opened at RAX; when the end of a page is the reason, that is
    /// counted.
    fn miss_window(&mut self, k: usize, size: u8) {
        let code = &mut self.code;
        code.address(8, CX, Place::At(AX, i32::from(size) - 1));
        code.alu(alu::XOR, 8, CX, Place::Reg(AX));
        code.shift(5, 8, Place::Reg(CX), 12);
        let op = &self.source.ops[k];
        code.set(SI, std::ptr::from_ref(op) as u64);
        code.set(DX, op.run as usize as u64);
        let in_page = code.jump_if(condition::EQUAL);
        code.set(AX, crossed as Crossed as usize as u64);
        code.jump_to(Place::Reg(AX));
        code.land(in_page);
        code.jump_to(Place::Reg(DX));
    }

    /// Returns to the run loop with `rip` being RAX; or before the branch, when RAX is not canonical.
    fn leave(&mut self, k: usize, branch: i32) {
        let code = &mut self.code;
        code.copy(CX, AX);
        code.shift(4, 8, Place::Reg(CX), 16);
        code.shift(7, 8, Place::Reg(CX), 16);
        code.alu(alu::CMP, 8, CX, Place::Reg(AX));
        let canonical = code.jump_if(condition::EQUAL);
        code.load(8, AX, guest(RIP_BASE));
        code.alu_constant(alu::ADD, 8, Place::Reg(AX), branch);
        code.alu_constant(alu::SUB, 8, Place::At(DI, offset_of!(Cpu, instructions) as i32), 1);
        code.land(canonical);
        self.count(k);
        self.done();
    }

    /// Returns to the run loop with `rip` being RAX.
    fn done(&mut self) {
        let code = &mut self.code;
        code.store(8, Place::At(DI, offset_of!(Cpu, rip) as i32), AX);
        code.set(AX, Outcome::Done as u64);
        code.push(&[RETURN]);
    }
}
