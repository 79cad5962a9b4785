//! From linear addresses to host memory: the TLB, the guest's page tables, and every load and store.
//!
//! The TLB is direct mapped by linear page, and what had to make room for another page stays in a neighbouring entry. A tag is the
//! page address with the *context* in its low 12 bits: a number that stands for the current PCID (a fresh one whenever that PCID was
//! flushed) and whether accesses are those of CPL 3. So a usual access is one compare and one host access, an access that crosses a
//! page misses by itself, and a CR3 write or a change of privilege costs nothing. A page gets a write tag only when it is dirty,
//! allowed to be written, and holds no decoded instructions. Specification: Intel SDM vol. 3 chapter 4.
//!
//! Guest memory is shared with other processors and devices, so every access is one host instruction on the same address and
//! of the same size: the host's memory order is the guest's.
#![allow(unsafe_code)] // Guest RAM is reached by host pointers; the TLB is what makes them valid.

mod atomic;
mod flush;
mod mmio;
mod segmentation;
mod walk;
mod word;

use std::mem::offset_of;

use crate::cpu::{Cpu, TrapKind, Width, cr0, rflags, vector};
use crate::op::Trap;
use crate::table::filled;

pub(crate) use walk::PHYSICAL_BITS;
pub(crate) use word::Word;
use word::copy;

/// Addressing form of an op's memory operand: base + displacement, 64-bit, no segment base.
pub(crate) const FLAT_BASE: u8 = 0;
/// Base + scaled index + displacement + FS or GS base, 64-bit.
pub(crate) const FLAT_SIB: u8 = 1;
/// Anything: any segment with its limit, any address size.
pub(crate) const GENERAL: u8 = 2;

/// Entries of the data TLB.
const TLB_ENTRIES: usize = 2048;
/// Entries of the data TLB that stand in for each other: a page that is not in its own may still be in one of the others.
const WAYS: usize = 4;
/// Entries of the instruction TLB.
const FETCH_ENTRIES: usize = 256;
/// Contexts before the TLB has to be emptied: what fits a tag's low bits above the user bit.
const CONTEXTS: u64 = 2047;
const PAGE: u64 = 4096;
const PAGE_MASK: u64 = !(PAGE - 1);
/// Step of [`Tlb::epoch`], which stands above the context.
const EPOCH: u64 = 1 << 16;
/// What it stays below.
const EPOCH_END: u64 = 1 << 56;
/// A tag that no access has: its low bits are context 2047, which is never given out.
const NO_TAG: u64 = u64::MAX;
/// The key while alignment is checked: also of context 2047, and nothing is cached under it, so every access takes the slow way.
const UNCACHED: u64 = CONTEXTS << 1;

#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Entry {
    read: u64,
    write: u64,
    /// Host address minus linear address.
    addend: u64,
    /// Guest physical page address.
    gpa: u64,
}

impl Entry {
    /// Whether this is of the page of `va`, in any context.
    fn is_of(&self, va: u64) -> bool {
        (self.read ^ va) & PAGE_MASK == 0
    }
}

const EMPTY: Entry = Entry { read: NO_TAG, write: NO_TAG, addend: 0, gpa: NO_TAG };

#[derive(Clone, Copy)]
struct FetchEntry {
    tag: u64,
    gpa: u64,
}

/// Everything cached about translation.
pub(crate) struct Tlb {
    /// Context of the current PCID and privilege, as the low bits of tags.
    key: u64,
    entries: Box<[Entry; TLB_ENTRIES]>,
    /// To which of its neighbours the last entry went that had to make room for another.
    way: usize,
    fetch: Box<[FetchEntry; FETCH_ENTRIES]>,
    /// Context number by PCID; 0 means none given out yet.
    contexts: Box<[u16; 4096]>,
    next_context: u64,
    /// Bit (address >> 30) mod 64 is set when an entry comes from a large page there, so that INVLPG there has to empty all.
    large: u64,
    /// Counts, in steps of [`EPOCH`], events after which a cached linear-to-block mapping may be stale.
    epoch: u64,
    /// Bit (page number) mod 4096 is set when instructions were fetched there in this epoch, so that INVLPG of a page that holds
    /// only data, the usual case, leaves the linear-to-block mapping alone.
    fetched: [u64; 64],
}

/// Where things are, for generated code. An entry's offset from the first is the linear address shifted right by `INDEX_SHIFT`, and
/// `INDEX_MASK`.
impl Tlb {
    pub const KEY: usize = offset_of!(Tlb, key);
    pub const EPOCH: usize = offset_of!(Tlb, epoch);
    pub const ENTRIES: usize = offset_of!(Tlb, entries);
    pub const INDEX_SHIFT: u8 = 12 - size_of::<Entry>().trailing_zeros() as u8;
    pub const INDEX_MASK: i32 = ((TLB_ENTRIES - 1) * size_of::<Entry>()) as i32;
    pub const READ_TAG: i32 = offset_of!(Entry, read) as i32;
    pub const WRITE_TAG: i32 = offset_of!(Entry, write) as i32;
    pub const ADDEND: i32 = offset_of!(Entry, addend) as i32;
}

impl Tlb {
    pub fn new() -> Tlb {
        Tlb {
            key: 2,
            entries: filled(EMPTY),
            way: 0,
            fetch: filled(FetchEntry { tag: NO_TAG, gpa: 0 }),
            contexts: filled(0),
            next_context: 1,
            large: 0,
            epoch: 0,
            fetched: [0; 64],
        }
    }

    /// What distinguishes linear addresses now: context, privilege and epoch.
    #[inline(always)]
    pub fn address_space(&self) -> u64 {
        self.key | self.epoch
    }

    fn next_epoch(&mut self) {
        self.epoch = (self.epoch + EPOCH) & (EPOCH_END - 1);
    }

    fn new_epoch(&mut self) {
        self.next_epoch();
        self.fetched.fill(0);
    }

    /// Where the bit of a linear page is in `fetched`.
    fn fetched_bit(va: u64) -> (usize, u64) {
        let page = va >> 12 & 4095;
        ((page >> 6) as usize, 1 << (page & 63))
    }

    fn clear(&mut self) {
        self.entries.fill(EMPTY);
        self.fetch.fill(FetchEntry { tag: NO_TAG, gpa: 0 });
        self.contexts.fill(0);
        self.next_context = 1;
        self.large = 0;
        self.new_epoch();
    }

    /// The context of `pcid`; a new one when it has none or when `fresh`.
    fn context(&mut self, pcid: usize, fresh: bool) -> u64 {
        if fresh || self.contexts[pcid] == 0 {
            if self.next_context >= CONTEXTS {
                self.clear();
            }
            self.contexts[pcid] = self.next_context as u16;
            self.next_context += 1;
        }
        u64::from(self.contexts[pcid])
    }

    /// The number of a page's own entry.
    #[inline(always)]
    fn index(va: u64) -> usize {
        (va >> 12) as usize & (TLB_ENTRIES - 1)
    }

    /// The entries that stand in for this one. The next page's own is none of them: an access that goes on in the next page must miss, and it
    /// compares that page's tag with the entry of the first.
    fn neighbours(index: usize) -> [usize; WAYS - 1] {
        [1, 2, 3].map(|way| index ^ way << 1)
    }

    /// Puts what the neighbours know of a page into its own entry.
    fn recall(&mut self, va: u64) {
        let (index, tag) = (Tlb::index(va), va & PAGE_MASK | self.key);
        if let Some(at) = Tlb::neighbours(index).into_iter().find(|&at| self.entries[at].read == tag) {
            self.entries.swap(index, at);
        }
    }

    /// Makes an entry for a page, which has one at most, whatever the context. What was in its place goes to a neighbour.
    fn insert(&mut self, va: u64, entry: Entry) {
        let index = Tlb::index(va);
        let own = self.entries[index];
        if !own.is_of(va) {
            let neighbours = Tlb::neighbours(index);
            if let Some(at) = neighbours.into_iter().find(|&at| self.entries[at].is_of(va)) {
                self.entries[at] = own;
            } else if own.read != NO_TAG {
                self.way = (self.way + 1) % neighbours.len();
                self.entries[neighbours[self.way]] = own;
            }
        }
        self.entries[index] = entry;
    }

    /// Takes the write tags from all entries of a physical page, because it holds decoded instructions now.
    pub fn write_protect(&mut self, gpa: u64) {
        for entry in self.entries.iter_mut() {
            if entry.gpa == gpa {
                entry.write = NO_TAG;
            }
        }
    }
}

/// What a linear page maps to.
#[derive(Clone, Copy)]
struct Mapping {
    gpa: u64,
    /// Writes are allowed at this privilege and the page is marked dirty.
    writable: bool,
    large: bool,
}

/// Kind of access to translate for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Fetch,
}

impl Cpu {
    /// Host address of an access that the TLB knows.
    #[inline(always)]
    pub fn hit<T: Word, const WRITE: bool>(&self, va: u64) -> Option<*mut u8> {
        let entry = &self.tlb.entries[Tlb::index(va)];
        let tag = if WRITE { entry.write } else { entry.read };
        // The page of the *last* byte: an access that crosses into the next page misses.
        if tag == (va.wrapping_add(T::SIZE - 1) & PAGE_MASK) | self.tlb.key { Some(va.wrapping_add(entry.addend) as *mut u8) } else { None }
    }

    /// [`Cpu::hit`], where an access's own entry does not know it.
    #[inline(always)]
    fn hit_neighbour<T: Word, const WRITE: bool>(&mut self, va: u64) -> Option<*mut u8> {
        self.tlb.recall(va);
        self.hit::<T, WRITE>(va)
    }

    /// Loads a word.
    #[inline(always)]
    pub fn load<T: Word>(&mut self, va: u64) -> Result<T, Trap> {
        match self.hit::<T, false>(va) {
            // SAFETY: a TLB entry's addend leads to a mapped page of guest RAM.
            Some(at) => Ok(unsafe { T::read(at) }),
            None => self.load_slow(va),
        }
    }

    /// Stores a word.
    #[inline(always)]
    pub fn store<T: Word>(&mut self, va: u64, value: T) -> Result<(), Trap> {
        match self.hit::<T, true>(va) {
            Some(at) => {
                // SAFETY: a TLB entry's addend leads to a mapped page of guest RAM.
                unsafe { T::write(at, value) };
                Ok(())
            }
            None => self.store_slow(va, value),
        }
    }

    /// Loads a word that will be stored back: a page that cannot be written faults now, as a write.
    #[inline(always)]
    pub fn load_for_write<T: Word>(&mut self, va: u64) -> Result<T, Trap> {
        match self.hit::<T, true>(va) {
            // SAFETY: a TLB entry's addend leads to a mapped page of guest RAM.
            Some(at) => Ok(unsafe { T::read(at) }),
            None => {
                self.check_alignment(va, T::SIZE)?;
                self.check_write(va, T::SIZE)?;
                match self.hit::<T, true>(va) {
                    // SAFETY: as above.
                    Some(at) => Ok(unsafe { T::read(at) }),
                    None => self.load_slow(va),
                }
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn load_slow<T: Word>(&mut self, va: u64) -> Result<T, Trap> {
        if let Some(at) = self.hit_neighbour::<T, false>(va) {
            // SAFETY: a TLB entry's addend leads to a mapped page of guest RAM.
            return Ok(unsafe { T::read(at) });
        }
        let mut bytes = [0; 8];
        let size = T::SIZE as usize;
        self.check_alignment(va, T::SIZE)?;
        self.watch(va, T::SIZE, false);
        if (va & (PAGE - 1)) + T::SIZE <= PAGE {
            let mapping = self.translate(va, Kind::Read, self.cpl == 3)?;
            if let Some(host) = self.fill(va, mapping) {
                // SAFETY: `fill` returns host addresses of guest RAM, and the access stays in the page.
                return Ok(unsafe { T::read(host) });
            }
            self.mmio_read(mapping.gpa | va & (PAGE - 1), &mut bytes[..size])?;
        } else {
            self.load_bytes(va, &mut bytes[..size])?;
        }
        Ok(T::from_u64(u64::from_le_bytes(bytes)))
    }

    #[cold]
    #[inline(never)]
    fn store_slow<T: Word>(&mut self, va: u64, value: T) -> Result<(), Trap> {
        if let Some(at) = self.hit_neighbour::<T, true>(va) {
            // SAFETY: a TLB entry's addend leads to a mapped page of guest RAM.
            unsafe { T::write(at, value) };
            return Ok(());
        }
        let bytes = value.into_u64().to_le_bytes();
        let size = T::SIZE as usize;
        self.check_alignment(va, T::SIZE)?;
        self.watch(va, T::SIZE, true);
        if (va & (PAGE - 1)) + T::SIZE <= PAGE {
            let mapping = self.translate(va, Kind::Write, self.cpl == 3)?;
            if let Some(host) = self.fill(va, mapping) {
                self.note_write(mapping.gpa, va & (PAGE - 1), T::SIZE)?;
                // SAFETY: `fill` returns host addresses of guest RAM, and the access stays in the page.
                unsafe { T::write(host, value) };
                return Ok(());
            }
            self.mmio_write(mapping.gpa | va & (PAGE - 1), &bytes[..size])
        } else {
            self.store_bytes(va, &bytes[..size])
        }
    }

    /// Faults where a store of `size` bytes would.
    #[cold]
    #[inline(never)]
    pub fn check_write(&mut self, va: u64, size: u64) -> Result<(), Trap> {
        if (va & (PAGE - 1)) + size <= PAGE && self.hit_neighbour::<u8, true>(va).is_some() {
            return Ok(());
        }
        self.check_end(va, size)?;
        let mut at = va;
        let end = va.wrapping_add(size);
        loop {
            let mapping = self.translate(at, Kind::Write, self.cpl == 3)?;
            let piece = (PAGE - (at & (PAGE - 1))).min(end.wrapping_sub(at));
            if self.fill(at, mapping).is_some() {
                self.check_alone(mapping.gpa, at & (PAGE - 1), piece)?;
            }
            at = at.wrapping_add(piece);
            if at == end {
                return Ok(());
            }
        }
    }

    /// Loads any number of bytes, which may cross pages.
    pub fn load_bytes(&mut self, va: u64, into: &mut [u8]) -> Result<(), Trap> {
        self.watch(va, into.len() as u64, false);
        self.check_end(va, into.len() as u64)?;
        let mut done = 0;
        while done < into.len() {
            let at = self.wrap(va.wrapping_add(done as u64));
            let piece = (PAGE - (at & (PAGE - 1))).min((into.len() - done) as u64) as usize;
            let mapping = self.translate(at, Kind::Read, self.cpl == 3)?;
            match self.fill(at, mapping) {
                // SAFETY: the piece lies in one page of guest RAM, and `into` is memory of ours.
                Some(host) => unsafe { copy(host, into[done..done + piece].as_mut_ptr(), piece) },
                None => self.mmio_read(mapping.gpa | at & (PAGE - 1), &mut into[done..done + piece])?,
            }
            done += piece;
        }
        Ok(())
    }

    /// Stores any number of bytes, which may cross pages; all pages are checked before the first byte is written.
    pub fn store_bytes(&mut self, va: u64, from: &[u8]) -> Result<(), Trap> {
        if from.is_empty() {
            return Ok(());
        }
        if (va & (PAGE - 1)) + from.len() as u64 > PAGE {
            self.check_write(va, from.len() as u64)?;
        }
        self.watch(va, from.len() as u64, true);
        let mut done = 0;
        while done < from.len() {
            let at = self.wrap(va.wrapping_add(done as u64));
            let piece = (PAGE - (at & (PAGE - 1))).min((from.len() - done) as u64) as usize;
            let mapping = self.translate(at, Kind::Write, self.cpl == 3)?;
            match self.fill(at, mapping) {
                Some(host) => {
                    self.note_write(mapping.gpa, at & (PAGE - 1), piece as u64)?;
                    // SAFETY: the piece lies in one page of guest RAM, and `from` is memory of ours.
                    unsafe { copy(from[done..].as_ptr(), host, piece) };
                }
                None => self.mmio_write(mapping.gpa | at & (PAGE - 1), &from[done..done + piece])?,
            }
            done += piece;
        }
        Ok(())
    }

    /// Host address of `len` bytes at `va` when they lie in one page of RAM and, for writes, no decoded instructions are in the
    /// page; otherwise `None`, and the caller goes by [`Cpu::load_bytes`] and [`Cpu::store_bytes`].
    pub fn host_slice(&mut self, va: u64, len: usize, write: bool) -> Result<Option<*mut u8>, Trap> {
        if (va & (PAGE - 1)) + len as u64 > PAGE {
            return Ok(None);
        }
        self.tlb.recall(va);
        let hit = if write { self.hit::<u8, true>(va) } else { self.hit::<u8, false>(va) };
        if hit.is_some() {
            return Ok(hit);
        }
        let mapping = self.translate(va, if write { Kind::Write } else { Kind::Read }, self.cpl == 3)?;
        let host = self.fill(va, mapping);
        Ok(if self.tlb.key == UNCACHED || self.watches(va) || write && self.tlb.entries[Tlb::index(va)].write == NO_TAG {
            None
        } else {
            host
        })
    }

    /// Loads with supervisor rights whatever the privilege level: descriptor tables, task state.
    pub fn load_system<T: Word>(&mut self, va: u64) -> Result<T, Trap> {
        self.as_supervisor(|cpu| cpu.load(va))
    }

    /// Stores with supervisor rights whatever the privilege level.
    pub fn store_system<T: Word>(&mut self, va: u64, value: T) -> Result<(), Trap> {
        self.as_supervisor(|cpu| cpu.store(va, value))
    }

    fn as_supervisor<R>(&mut self, f: impl FnOnce(&mut Cpu) -> R) -> R {
        let (cpl, key) = (self.cpl, self.tlb.key);
        self.cpl = 0;
        self.tlb.key &= !1;
        let result = f(self);
        self.cpl = cpl;
        // The context cannot have changed in between: only flushes change it, and those come from instructions.
        self.tlb.key = key;
        result
    }

    /// An operand that begins in the canonical range and ends outside it is refused before its first page is looked at.
    fn check_end(&mut self, va: u64, size: u64) -> Result<(), Trap> {
        let canonical = |va: u64| (va as i64) << 16 >> 16 == va as i64;
        if self.long_mode() && canonical(va) && !canonical(va.wrapping_add(size.max(1) - 1)) {
            self.trap = TrapKind::NotCanonical;
            return Err(Trap(()));
        }
        Ok(())
    }

    /// Linear addresses wrap at 4 GiB outside 64-bit code.
    #[inline(always)]
    fn wrap(&self, va: u64) -> u64 {
        if self.width == Width::Bits64 || self.long_mode() { va } else { va & 0xffff_ffff }
    }

    /// Guest physical address of the instruction at linear address `va`.
    #[inline]
    pub fn fetch_address(&mut self, va: u64) -> Result<u64, Trap> {
        let (word, bit) = Tlb::fetched_bit(va);
        self.tlb.fetched[word] |= bit;
        let index = (va >> 12) as usize & (FETCH_ENTRIES - 1);
        let tag = va & PAGE_MASK | self.tlb.key;
        if self.tlb.fetch[index].tag == tag {
            return Ok(self.tlb.fetch[index].gpa | va & (PAGE - 1));
        }
        let mapping = self.translate(va, Kind::Fetch, self.cpl == 3)?;
        if self.tlb.key != UNCACHED {
            self.tlb.fetch[index] = FetchEntry { tag: va & PAGE_MASK | self.tlb.key, gpa: mapping.gpa };
        }
        Ok(mapping.gpa | va & (PAGE - 1))
    }

    /// Enters a mapping into the TLB and returns the host address of `va`; `None` when there is no RAM.
    fn fill(&mut self, va: u64, mapping: Mapping) -> Option<*mut u8> {
        let (host, code, page) = self.vm.ram(mapping.gpa)?;
        if self.tlb.key == UNCACHED || self.watches(va) {
            return Some(host.wrapping_add((va & (PAGE - 1)) as usize));
        }
        let writable = mapping.writable && !code.has_code(page);
        let tag = va & PAGE_MASK | self.tlb.key;
        let write = if writable { tag } else { NO_TAG };
        self.tlb.insert(va, Entry { read: tag, write, addend: (host as u64).wrapping_sub(va & PAGE_MASK), gpa: mapping.gpa });
        if mapping.large {
            self.tlb.large |= 1 << (va >> 30 & 63);
        }
        Some(host.wrapping_add((va & (PAGE - 1)) as usize))
    }

    /// Whether a data breakpoint lies in the page of `va`, so that every access there has to take the slow way and be noted.
    fn watches(&self, va: u64) -> bool {
        if self.dr7 & 0xff == 0 {
            return false;
        }
        (0..4).any(|n| self.dr7 >> (2 * n) & 3 != 0 && self.dr7 >> (16 + 4 * n) & 3 != 0 && (self.dr[n] ^ va) & PAGE_MASK == 0)
    }

    /// Notes which data breakpoints an access hits (Intel SDM vol. 3 section 17.2.5).
    fn watch(&mut self, va: u64, len: u64, write: bool) {
        if self.dr7 & 0xff == 0 {
            return;
        }
        for n in 0..4 {
            let kind = self.dr7 >> (16 + 4 * n) & 3;
            let wanted = kind == 3 || kind == 1 && write;
            let size = [1, 2, 8, 4][(self.dr7 >> (18 + 4 * n) & 3) as usize];
            let start = self.dr[n] & !(size - 1);
            if wanted && self.dr7 >> (2 * n) & 3 != 0 && va < start.saturating_add(size) && start < va.saturating_add(len) {
                self.watch_hits |= 1 << n;
            }
        }
    }

    /// Before a write to RAM that the TLB's write tag did not allow: decoded instructions there become invalid.
    fn note_write(&mut self, gpa: u64, offset: u64, len: u64) -> Result<(), Trap> {
        self.check_alone(gpa, offset, len)?;
        if let Some((_, code, page)) = self.vm.ram(gpa) {
            code.written(page, offset as usize, len as usize);
        }
        Ok(())
    }

    /// An instruction that writes to its own block has to be executed alone, so that what follows is decoded anew.
    fn check_alone(&mut self, gpa: u64, offset: u64, len: u64) -> Result<(), Trap> {
        if !self.alone && self.blocks.runs_in(gpa + offset, gpa + offset + len) {
            self.trap = TrapKind::Alone;
            return Err(Trap(()));
        }
        Ok(())
    }

    /// Whether unaligned accesses are #AC: CR0.AM and RFLAGS.AC at level 3 (Intel SDM vol. 3 section 6.15, interrupt 17).
    fn checks_alignment(&self) -> bool {
        self.cpl == 3 && self.cr0 & cr0::AM != 0 && self.rflags & rflags::AC != 0
    }

    fn check_alignment(&mut self, va: u64, size: u64) -> Result<(), Trap> {
        if va & (size - 1) != 0 && self.checks_alignment() { Err(self.raise_code(vector::AC, 0)) } else { Ok(()) }
    }
}
