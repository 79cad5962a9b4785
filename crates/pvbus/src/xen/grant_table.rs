//! Grants, version 1 (`grant_table.h`): pages that another domain may use.
//!
//! The table grows by a frame whenever all entries are in use, up to what the host allows. An entry that its user still has marked cannot be taken
//! back: it waits, and its page with it, until the user has let go.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use abi::xen::grant_table::{ENTRIES_PER_FRAME, Entry, QuerySize, RESERVED, SetVersion, flag, op, status};
use abi::xen::hypercall::{DOMID_SELF, memory, number};

use super::event_channel::Platform;
use super::hypercall::{PAGE, XenError, offset};
use crate::hal::{Dma, HalError};

/// Frames of a host that does not tell (`INITIAL_NR_GRANT_FRAMES` in Linux' `drivers/xen/grant-table.c`).
const FRAMES: u32 = 4;
/// Most frames that are used: 65536 grants.
const FRAMES_MAX: u32 = 128;

/// The domain's table.
pub(super) struct GrantTable<'h> {
    platform: Arc<Platform<'h>>,
    frames: Vec<Dma>,
    max_frames: u32,
    free: Vec<u32>,
    /// What is still in use by those who should have let go.
    waiting: Vec<Granted>,
}

/// Memory that another domain may use: pages that follow each other, each with its grant.
pub(super) struct Granted {
    /// The memory.
    pub dma: Dma,
    /// A grant for each page, in their order.
    pub grants: Vec<u32>,
}

impl Granted {
    /// The grant of memory that is one page.
    pub fn grant(&self) -> u32 {
        self.grants.first().copied().unwrap_or_default()
    }
}

impl<'h> GrantTable<'h> {
    /// A table that is empty so far.
    pub fn new(platform: Arc<Platform<'h>>) -> GrantTable<'h> {
        let mut query = QuerySize { dom: DOMID_SELF.into(), ..QuerySize::default() };
        let asked = platform.hypervisor.exchange(number::GRANT_TABLE_OP, op::QUERY_SIZE, &mut query);
        let told = asked.is_ok() && query.status.get().cast_signed() == status::OKAY;
        let max_frames = if told { query.max_nr_frames.get().min(FRAMES_MAX) } else { FRAMES };
        // It is version 1 unless somebody before us changed it; hosts that know no other refuse the call.
        let _ = platform.hypervisor.exchange(number::GRANT_TABLE_OP, op::SET_VERSION, &mut SetVersion { version: 1.into() });
        GrantTable { platform, frames: Vec::new(), max_frames, free: Vec::new(), waiting: Vec::new() }
    }

    /// Frames that the host allows.
    pub fn max_frames(&self) -> u32 {
        self.max_frames
    }

    /// `pages` pages that `domain` may read and write.
    pub fn share(&mut self, domain: u16, pages: usize) -> Result<Granted, XenError> {
        let dma = self.platform.hal.dma_alloc(pages)?;
        let mut granted = Granted { grants: Vec::with_capacity(pages), dma };
        for gpa in (granted.dma.gpa()..).step_by(offset(PAGE)).take(pages) {
            match self.grant(domain, gpa) {
                Ok(reference) => granted.grants.push(reference),
                Err(error) => {
                    self.take_back(granted);
                    return Err(error);
                }
            }
        }
        Ok(granted)
    }

    /// Takes memory back, at once or when nobody uses it any more.
    pub fn take_back(&mut self, mut granted: Granted) {
        granted.grants.retain(|reference| !self.revoke(*reference));
        if granted.grants.is_empty() {
            self.platform.hal.dma_free(granted.dma);
        } else {
            self.waiting.push(granted);
        }
    }

    /// Tries again to take back what was still in use; whether everything is back.
    pub fn sweep(&mut self) -> bool {
        for granted in core::mem::take(&mut self.waiting) {
            self.take_back(granted);
        }
        self.waiting.is_empty()
    }

    /// Grants the page at `gpa` to `domain`, for reading and writing.
    fn grant(&mut self, domain: u16, gpa: u64) -> Result<u32, XenError> {
        let frame = u32::try_from(gpa / PAGE).map_err(|_| HalError::Fault)?;
        let reference = match self.free.pop() {
            Some(reference) => reference,
            None => self.grow()?,
        };
        let (table, at) = self.entry(reference)?;
        table.word(at + size_of::<u32>())?.store(frame, Ordering::Relaxed);
        // Flags and domain are one word; they make the entry valid.
        table.word(at)?.store(u32::from(domain) << 16 | u32::from(flag::PERMIT_ACCESS), Ordering::Release);
        Ok(reference)
    }

    /// Takes a grant back; `false` while the page is still in use.
    fn revoke(&mut self, reference: u32) -> bool {
        const IN_USE: u32 = (flag::READING | flag::WRITING) as u32;
        let Ok((table, at)) = self.entry(reference) else { return false };
        let Ok(word) = table.word(at) else { return false };
        let revoked = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |flags| (flags & IN_USE == 0).then_some(0)).is_ok();
        if revoked {
            self.free.push(reference);
        }
        revoked
    }

    /// Adds a frame; its first entry, the others are free.
    fn grow(&mut self) -> Result<u32, XenError> {
        let index = u32::try_from(self.frames.len()).map_err(|_| XenError::NoGrants)?;
        if index >= self.max_frames {
            return Err(XenError::NoGrants);
        }
        let frame = self.platform.hal.dma_alloc(1)?;
        if let Err(error) = self.platform.hypervisor.place(memory::SPACE_GRANT_TABLE, index.into(), &frame) {
            self.platform.hal.dma_free(frame);
            return Err(error);
        }
        self.frames.push(frame);
        let first = (index * ENTRIES_PER_FRAME).max(RESERVED);
        self.free.extend((first + 1..(index + 1) * ENTRIES_PER_FRAME).rev());
        Ok(first)
    }

    /// The frame of an entry, and the offset in it.
    fn entry(&self, reference: u32) -> Result<(&Dma, usize), HalError> {
        let frame = self.frames.get((reference / ENTRIES_PER_FRAME) as usize).ok_or(HalError::Fault)?;
        Ok((frame, (reference % ENTRIES_PER_FRAME) as usize * size_of::<Entry>()))
    }
}
