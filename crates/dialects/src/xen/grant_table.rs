//! Grants: pages of the guest that backends may use (`grant_table.h`, version 1).
//!
//! Backend and hypervisor are one program, so that to map a page is to look it up. The marks "in use for reading" and "for writing" are kept in the
//! guest's entry as Xen keeps them: a guest ends a grant by exchanging the flags for zero, which fails while a mark is set.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use abi::xen::grant_table::{ENTRIES_PER_FRAME, Entry, flag};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm::GuestMemory;
use vmm::memory::PAGE_SIZE;

use super::BACKEND_DOMAIN;
use crate::atomic;

/// Most frames of a table: 64, as Xen's default, which are 32768 grants.
pub const MAX_FRAMES: u32 = 64;

/// What a page is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,
    /// Reading and writing.
    Write,
}

/// Why a grant cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    /// The table has no such entry, or the guest has not mapped that part of it.
    #[error("grant {0} is not in the table")]
    BadReference(u32),
    /// Nothing is granted, or to another domain.
    #[error("grant {0} is not for backends")]
    NotGranted(u32),
    /// The page may only be read.
    #[error("grant {0} is for reading only")]
    ReadOnly(u32),
    /// The entry names a page that the guest does not have.
    #[error("grant {0} is of a page that is not memory")]
    BadFrame(u32),
}

/// How often a page is in use.
#[derive(Debug, Default, Clone, Copy)]
struct Uses {
    all: u32,
    writing: u32,
}

/// The guest's table.
pub(super) struct GrantTable {
    memory: GuestMemory,
    /// Address of each frame, as far as the guest has placed them.
    frames: [Option<u64>; MAX_FRAMES as usize],
    /// By reference, of which there are no more than frames have entries.
    uses: Vec<Uses>,
}

impl GrantTable {
    pub fn new(memory: GuestMemory) -> GrantTable {
        GrantTable { memory, frames: [None; MAX_FRAMES as usize], uses: Vec::new() }
    }

    /// XENMEM_add_to_physmap: frame `index` is at `gpa` from now on. `false` when there is no such frame or no memory.
    pub fn place(&mut self, index: u64, gpa: u64) -> bool {
        let Some(frame) = usize::try_from(index).ok().and_then(|index| self.frames.get_mut(index)) else { return false };
        let mut page = [0; PAGE_SIZE as usize];
        // The frame moves with what is in it; a new one is empty.
        if let Some(old) = *frame
            && self.memory.read_slice(&mut page, GuestAddress(old)).is_err()
        {
            return false;
        }
        if self.memory.write_slice(&page, GuestAddress(gpa)).is_err() {
            return false;
        }
        *frame = Some(gpa);
        true
    }

    /// Frames that are placed.
    pub fn frames(&self) -> u32 {
        self.frames.iter().flatten().count() as u32
    }

    /// GNTTABOP_map_grant_ref.
    pub fn map(&mut self, grant_ref: u32, access: Access) -> Result<u64, GrantError> {
        let entry = self.entry(grant_ref).ok_or(GrantError::BadReference(grant_ref))?;
        let marks = match access {
            Access::Read => flag::READING,
            Access::Write => flag::READING | flag::WRITING,
        };
        // Flags, domain and frame are one word, so that they are judged and marked together.
        let judge = |word: u64| {
            let (flags, domid) = (word as u16, (word >> 16) as u16);
            if flags & flag::TYPE_MASK != flag::PERMIT_ACCESS || domid != BACKEND_DOMAIN {
                Err(GrantError::NotGranted(grant_ref))
            } else if access == Access::Write && flags & flag::READONLY != 0 {
                Err(GrantError::ReadOnly(grant_ref))
            } else {
                Ok(word | u64::from(marks))
            }
        };
        let marked = atomic::with(&self.memory, entry, |word: &AtomicU64| {
            word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| judge(u64::from_le(old)).ok().map(u64::to_le))
        });
        let word = match marked.ok_or(GrantError::BadReference(grant_ref))? {
            Ok(old) => u64::from_le(old),
            Err(old) => judge(u64::from_le(old))?,
        };
        let index = grant_ref as usize;
        if index >= self.uses.len() {
            self.uses.resize(index + 1, Uses::default());
        }
        self.uses[index].all += 1;
        self.uses[index].writing += u32::from(access == Access::Write);
        let gpa = (word >> 32) * PAGE_SIZE;
        if self.memory.check_range(GuestAddress(gpa), PAGE_SIZE as usize) {
            return Ok(gpa);
        }
        self.unmap(grant_ref, access);
        Err(GrantError::BadFrame(grant_ref))
    }

    /// GNTTABOP_unmap_grant_ref.
    pub fn unmap(&mut self, grant_ref: u32, access: Access) {
        let Some(uses) = self.uses.get_mut(grant_ref as usize).filter(|uses| uses.all > 0) else { return };
        uses.all -= 1;
        uses.writing = uses.writing.saturating_sub(u32::from(access == Access::Write));
        let uses = *uses;
        let mut clear = 0;
        if uses.writing == 0 {
            clear |= flag::WRITING;
        }
        if uses.all == 0 {
            clear |= flag::READING;
        }
        if let Some(entry) = self.entry(grant_ref) {
            atomic::with(&self.memory, entry, |flags: &AtomicU16| flags.fetch_and(!clear.to_le(), Ordering::AcqRel));
        }
    }

    /// Forgets where the table is. Backends have to be gone.
    pub fn reset(&mut self) {
        self.frames.fill(None);
        self.uses.clear();
    }

    fn entry(&self, grant_ref: u32) -> Option<u64> {
        let frame = self.frames.get((grant_ref / ENTRIES_PER_FRAME) as usize).copied().flatten()?;
        Some(frame + u64::from(grant_ref % ENTRIES_PER_FRAME) * size_of::<Entry>() as u64)
    }
}
