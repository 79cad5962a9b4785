//! What every translated instruction is made of: guest registers, flags, memory, and the ways out of the code.
//!
//! ```text
//!   RDI  the processor (`Cpu`)             RSI R8..R11  copies of guest registers
//!   RAX RCX RDX  scratch
//! ```
//!
//! Guest registers live in [`Cpu::regs`]. A copy in a host register only saves loads: every result is stored at once, so memory is exact
//! after each instruction and whoever takes over finds all of it there. Copies are forgotten where another may have been at work. Likewise
//! the arithmetic flags: those that somebody may look at are stored as the interpreter stores them, and what stands directly behind takes
//! them from the host's.
//!
//! An access that the TLB does not know, and every instruction that has no translation, is done by the interpreter's handler: the code
//! jumps there, as [`crate::op::Cursor::next`] would.

use std::mem::offset_of;

use super::code::{AX, CX, Code, DI, DX, Jump, Place, R8, R9, R10, R11, Reg, SI, alu, condition};
use crate::block::{BlockCache, JUMPS, JumpEntry};
use crate::cpu::{Cpu, RIP_BASE, ZERO};
use crate::mmu::Tlb;
use crate::op::{Op, Outcome};

use super::{Link, Links, Source};

/// Where copies of guest registers are kept.
const COPIES: [Reg; 5] = [R8, R9, R10, R11, SI];
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
    /// The run loop goes on at RAX: all of the op is done. When RAX is no canonical address, all but its branch is, which stands at this
    /// distance from the block's start and is executed next, alone.
    Leave { branch: i32 },
    /// The run loop goes on at the next block, of which the address is where entered blocks have theirs: all of the op is done.
    Arrived,
}

/// A way out of an op.
type Exit = (usize, Miss);

/// The code of a block in the making.
pub(super) struct Emitter<'a> {
    pub code: Code,
    source: &'a Source<'a>,
    links: &'a mut Links,
    /// Guest register by host register in [`COPIES`].
    copies: [Option<u8>; COPIES.len()],
    /// Bit by place in [`COPIES`]: used by the instruction under way.
    pinned: u8,
    next_copy: usize,
    /// The host's arithmetic flags are the guest's.
    pub flags_in_host: bool,
    /// Handlers of the interpreter go back to this code.
    pub is_reentered: bool,
    /// By op and what happens: the jumps there.
    cold: Vec<(Exit, Jump)>,
}

/// What an [`Emitter`] goes back to when an instruction turns out to have no translation.
pub(super) struct Mark {
    len: usize,
    cold: usize,
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
    pub fn new(source: &'a Source<'a>, links: &'a mut Links) -> Emitter<'a> {
        Emitter {
            code: Code::default(),
            source,
            links,
            copies: [None; COPIES.len()],
            pinned: 0,
            next_copy: 0,
            flags_in_host: false,
            is_reentered: false,
            cold: Vec::new(),
        }
    }

    /// An instruction begins. Tells whether the host's flags are the guest's until something changes them.
    pub fn begin(&mut self) -> bool {
        self.pinned = 0;
        std::mem::take(&mut self.flags_in_host)
    }

    pub fn mark(&self) -> Mark {
        Mark { len: self.code.len(), cold: self.cold.len() }
    }

    /// Drops what was made since the mark, and all copies.
    pub fn back_to(&mut self, mark: &Mark) {
        self.code.truncate(mark.len);
        self.cold.truncate(mark.cold);
        self.forget();
    }

    /// Somebody else may have changed registers and flags.
    pub fn forget(&mut self) {
        self.copies = [None; COPIES.len()];
        self.flags_in_host = false;
    }

    fn copy_of(&self, register: u8) -> Option<usize> {
        self.copies.iter().position(|&copy| copy == Some(register))
    }

    /// A host register for a guest register that is about to be overwritten whole.
    pub fn define(&mut self, register: u8) -> Reg {
        let place = self.copy_of(register).unwrap_or_else(|| {
            // An instruction uses four at most.
            while self.pinned & 1 << self.next_copy != 0 {
                self.next_copy = (self.next_copy + 1) % COPIES.len();
            }
            let place = self.next_copy;
            self.next_copy = (place + 1) % COPIES.len();
            self.copies[place] = Some(register);
            place
        });
        self.pinned |= 1 << place;
        COPIES[place]
    }

    /// A host register that holds a guest register.
    pub fn read(&mut self, register: u8) -> Reg {
        let known = self.copy_of(register).is_some();
        let host = self.define(register);
        if !known {
            self.code.load(8, host, guest(register.into()));
        }
        host
    }

    /// A guest register has got its new value in `host`.
    pub fn written(&mut self, register: u8, host: Reg) {
        self.code.store(8, guest(register.into()), host);
    }

    /// The host's arithmetic flags become the guest's; they are stored when `needed`. Changes RAX.
    pub fn save_flags(&mut self, needed: bool) {
        if needed {
            self.code.push(&FLAGS_TO_AX);
            self.code.store(2, flags(0), AX);
        }
        self.flags_in_host = true;
    }

    /// Makes the guest's arithmetic flags the host's. Changes RAX.
    pub fn load_flags(&mut self) {
        self.code.load(2, AX, flags(0));
        self.code.push(&AX_TO_FLAGS);
    }

    /// The condition of the host's flags that is the guest's condition `cc`; `ready` when its flags are in the host's. Changes RAX.
    pub fn condition(&mut self, cc: u8, ready: bool) -> u8 {
        if ready {
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

    /// RAX becomes the linear address of an op's memory operand.
    pub fn linear(&mut self, op: &Op) -> Option<()> {
        let place = self.operand(op)?;
        if !matches!(place, Place::At(AX, 0)) {
            self.code.address(8, AX, place);
        }
        if usize::from(op.seg_base) != ZERO {
            self.code.alu(alu::ADD, 8, AX, guest(op.seg_base.into()));
        }
        Some(())
    }

    /// RAX becomes the host address of the `size` bytes at linear address RAX; the interpreter executes op `k` when the TLB does not know
    /// them. Changes RCX and RDX.
    pub fn host_address(&mut self, k: usize, size: u8, write: bool) {
        self.code.address(8, CX, Place::At(AX, i32::from(size) - 1));
        self.code.load(4, DX, Place::Reg(AX));
        self.code.shift(5, 4, Place::Reg(DX), Tlb::INDEX_SHIFT);
        self.code.alu_constant(alu::AND, 4, Place::Reg(DX), Tlb::INDEX_MASK);
        self.code.alu(alu::ADD, 8, DX, of_tlb(Tlb::ENTRIES));
        self.code.alu_constant(alu::AND, 8, Place::Reg(CX), -4096);
        self.code.alu(alu::OR, 8, CX, of_tlb(Tlb::KEY));
        self.code.alu(alu::CMP, 8, CX, Place::At(DX, if write { Tlb::WRITE_TAG } else { Tlb::READ_TAG }));
        let miss = self.code.jump_if(condition::NOT_EQUAL);
        self.cold.push(((k, Miss::Handler), miss));
        self.code.alu(alu::ADD, 8, AX, Place::At(DX, Tlb::ADDEND));
    }

    /// The interpreter executes op `k` and goes on behind it.
    pub fn interpret(&mut self, k: usize) {
        let op = &self.source.ops[k];
        self.code.set(SI, std::ptr::from_ref(op) as u64);
        self.code.set(AX, op.run as usize as u64);
        self.code.jump_to(Place::Reg(AX));
    }

    /// RDX becomes the entry of the jump cache for linear address RAX, if it is fresh and nothing wants the processor's attention; otherwise
    /// op `k` is left by `miss`. Changes RCX.
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
        code.load(8, CX, Place::At(DX, JumpEntry::STATE));
        code.load(4, CX, Place::At(CX, 0));
        code.alu(alu::CMP, 4, CX, Place::At(DX, JumpEntry::VALUE));
        unequal(code);
        self.look_around((k, miss));
        self.look_at_stack((k, miss));
    }

    /// Leaves by `exit` when something wants the processor's attention. Changes RCX.
    fn look_around(&mut self, exit: Exit) {
        let code = &mut self.code;
        code.set(CX, self.source.attention as u64);
        code.alu_constant(alu::CMP, 4, Place::At(CX, 0), 0);
        self.cold.push((exit, code.jump_if(condition::NOT_EQUAL)));
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
        if self.is_reentered || op.count > 0 && distance <= op.start.into() {
            self.look_around((k, Miss::Arrived));
            let code = &mut self.code;
            code.set(CX, self.source.state as u64);
            code.alu_constant(alu::CMP, 4, Place::At(CX, 0), self.source.value.cast_signed());
            self.cold.push(((k, Miss::Arrived), code.jump_if(condition::NOT_EQUAL)));
        }
        self.look_at_stack((k, Miss::Arrived));
        let link = self.links.add(gpa, self.source.value);
        self.code.set(DX, link.as_ptr() as u64);
        self.run(Place::At(DX, Link::OPS));
    }

    /// Runs the ops that are at the address in a place.
    fn run(&mut self, ops: Place) {
        let code = &mut self.code;
        code.load(8, SI, ops);
        code.store(8, of_cache(BlockCache::RUNNING), SI);
        code.jump_to(Place::At(SI, offset_of!(Op, run) as i32));
    }

    /// Goes on in the block at linear address RAX, whose entry of the jump cache RDX is; op `k` is the last of this one.
    pub fn enter(&mut self, k: usize) {
        self.code.store(8, guest(RIP_BASE), AX);
        self.count(k);
        self.run(Place::At(DX, JumpEntry::OPS));
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
                Miss::Leave { branch } => self.leave(k, branch),
                Miss::Arrived => {
                    self.code.load(8, AX, guest(RIP_BASE));
                    self.done();
                }
            }
        }
        self.code
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
