//! GPADLs: lists of pages that the guest lends to the host under a number, for rings and buffers.
//!
//! A list comes in one message or, when it is long, in several. A list that was taken back is only out of use when the last [`Buffer`] of it is
//! gone; the guest is told so then, and not before.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use abi::hyperv::vmbus::{GPA_RANGE, GpadlBody, GpadlHeader};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm::GuestMemory;
use vmm::memory::PAGE_SIZE;
use zerocopy::FromBytes;
use zerocopy::little_endian::U64;

use super::Shared;
use super::range::GuestRange;
use super::state::LeftBehind;

/// Most page numbers of all lists together: 4 GiB of lent memory.
const MAX_PAGES: usize = 1 << 20;
/// Most lists.
const MAX_LISTS: usize = 8192;

/// A list.
#[derive(Debug)]
pub(super) struct Gpadl {
    relid: u32,
    byte_count: u32,
    byte_offset: u32,
    pfns: Vec<U64>,
}

impl Gpadl {
    fn range(&self) -> Option<GuestRange<'_>> {
        GuestRange::new(self.byte_count, self.byte_offset, &self.pfns)
    }
}

/// Memory of a GPADL, in use until this is dropped.
pub struct Buffer {
    gpadl: Option<Arc<Gpadl>>,
    bus: Weak<Shared>,
}

impl Buffer {
    /// The bytes.
    pub fn range(&self) -> GuestRange<'_> {
        self.gpadl.as_ref().and_then(|gpadl| gpadl.range()).unwrap_or_default()
    }

    /// Address of a page.
    pub(super) fn page(&self, index: u32) -> Option<u64> {
        self.gpadl.as_ref()?.pfns.get(index as usize).map(|pfn| pfn.get() * PAGE_SIZE)
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Buffer {
        Buffer { gpadl: self.gpadl.clone(), bus: Weak::clone(&self.bus) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.gpadl = None;
        if let Some(bus) = self.bus.upgrade() {
            bus.settle();
        }
    }
}

/// A list was given, or cannot be had.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) relid: u32,
    pub(super) gpadl: u32,
    pub(super) is_good: bool,
}

/// All lists of a connection.
#[derive(Default)]
pub(super) struct Gpadls {
    whole: BTreeMap<u32, Arc<Gpadl>>,
    /// Those of which pages are missing, and how many numbers there will be.
    partial: BTreeMap<u32, (Gpadl, usize)>,
    /// Numbers of pages that all of them have or will have.
    pages: usize,
    /// Taken back by the guest, perhaps still in use.
    leaving: Vec<(u32, Weak<Gpadl>)>,
}

impl Gpadls {
    /// A list for one of the channels that `is_offered` knows begins. `None` when more of it has to come.
    pub(super) fn begin(&mut self, memory: &GuestMemory, message: &[u8], is_offered: impl Fn(u32) -> bool) -> Option<Verdict> {
        let (header, pfns) = GpadlHeader::ref_from_prefix(message).ok()?;
        let (relid, number) = (header.relid.get(), header.gpadl.get());
        let verdict = |is_good| Some(Verdict { relid, gpadl: number, is_good });
        let expected = usize::from(header.range_buflen.get()).saturating_sub(GPA_RANGE) / size_of::<U64>();
        let is_known = self.whole.contains_key(&number) || self.partial.contains_key(&number);
        let is_leaving = self.leaving.iter().any(|(leaving, _)| *leaving == number);
        let lists = self.whole.len() + self.partial.len() + self.leaving.len();
        // Guests use one range; several would be several buffers under one number.
        let has_room = lists < MAX_LISTS && self.pages + expected <= MAX_PAGES;
        if header.range_count.get() != 1 || is_known || is_leaving || !has_room || !is_offered(relid) {
            return verdict(false);
        }
        self.pages += expected;
        let gpadl =
            Gpadl { relid, byte_count: header.byte_count.get(), byte_offset: header.byte_offset.get(), pfns: Vec::with_capacity(expected) };
        self.partial.insert(number, (gpadl, expected));
        self.add(memory, number, pfns)
    }

    /// A list goes on. `None` when more has to come, or there is no such list.
    pub(super) fn go_on(&mut self, memory: &GuestMemory, message: &[u8]) -> Option<Verdict> {
        let (body, pfns) = GpadlBody::ref_from_prefix(message).ok()?;
        self.add(memory, body.gpadl.get(), pfns)
    }

    fn add(&mut self, memory: &GuestMemory, number: u32, pfns: &[u8]) -> Option<Verdict> {
        let (gpadl, expected) = self.partial.get_mut(&number)?;
        let count = (pfns.len() / size_of::<U64>()).min(*expected - gpadl.pfns.len());
        let (pfns, _) = <[U64]>::ref_from_prefix_with_elems(pfns, count).ok()?;
        gpadl.pfns.extend_from_slice(pfns);
        if gpadl.pfns.len() < *expected {
            return None;
        }
        let (gpadl, expected) = self.partial.remove(&number)?;
        let relid = gpadl.relid;
        let is_good = gpadl.range().is_some() && gpadl.pfns.iter().all(|pfn| is_memory(memory, pfn.get()));
        if is_good {
            self.whole.insert(number, Arc::new(gpadl));
        } else {
            self.pages -= expected;
        }
        Some(Verdict { relid, gpadl: number, is_good })
    }

    /// The guest takes a list back.
    pub(super) fn tear_down(&mut self, number: u32) {
        if let Some((_, expected)) = self.partial.remove(&number) {
            self.pages -= expected;
        }
        if let Some(gpadl) = self.whole.remove(&number) {
            self.leaving.push((number, Arc::downgrade(&gpadl)));
            self.pages -= gpadl.pfns.len();
        }
    }

    /// The lists that were taken back and are used by nobody any more.
    pub(super) fn torn_down(&mut self) -> Vec<u32> {
        let (gone, leaving) = self.leaving.drain(..).partition(|(_, gpadl)| gpadl.strong_count() == 0);
        self.leaving = leaving;
        let gone: Vec<(u32, Weak<Gpadl>)> = gone;
        gone.into_iter().map(|(number, _)| number).collect()
    }

    /// Takes all lists of a channel back, without a word. Those that may be in use go to `left`.
    pub(super) fn forget(&mut self, relid: u32, left: &mut Vec<LeftBehind>) {
        let pages = &mut self.pages;
        self.partial.retain(|_, (gpadl, expected)| {
            let stays = gpadl.relid != relid;
            *pages -= if stays { 0 } else { *expected };
            stays
        });
        self.whole.retain(|_, gpadl| {
            let stays = gpadl.relid != relid;
            if !stays {
                *pages -= gpadl.pfns.len();
                left.push(Arc::<Gpadl>::downgrade(gpadl));
            }
            stays
        });
    }

    /// Takes all lists back, without a word. Those that may be in use go to `left`.
    pub(super) fn leave(self, left: &mut Vec<LeftBehind>) {
        left.extend(self.whole.values().map(|gpadl| Arc::<Gpadl>::downgrade(gpadl) as LeftBehind));
        left.extend(self.leaving.into_iter().map(|(_, gpadl)| gpadl as LeftBehind));
    }

    /// The channel's list with this number.
    pub(super) fn get(&self, relid: u32, number: u32, bus: &Weak<Shared>) -> Option<Buffer> {
        let gpadl = self.whole.get(&number).filter(|gpadl| gpadl.relid == relid)?;
        Some(Buffer { gpadl: Some(Arc::clone(gpadl)), bus: Weak::clone(bus) })
    }
}

fn is_memory(memory: &GuestMemory, pfn: u64) -> bool {
    pfn.checked_mul(PAGE_SIZE).is_some_and(|gpa| memory.check_range(GuestAddress(gpa), PAGE_SIZE as usize))
}
