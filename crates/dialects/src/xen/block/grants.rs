//! The pages of a queue's requests: mapped for a request, or kept mapped for the next (persistent grants).
//!
//! `io/blkif.h`, notes of `feature-persistent`: a frontend that has the feature names the same grants again and again, and the backend maps each once, for
//! writing whatever it is used for. The frontend sees the mark of use in the grant's entry and knows that it must not end it. How many are kept is
//! bounded, and beyond that the least recently used go, as in Linux (`drivers/block/xen-blkback/blkback.c`, `purge_persistent_gnt`).
//!
//! A kept page stays what it was when it was mapped, as with Xen: a guest that changes the entry meanwhile has its data moved to and from the page it
//! granted before, which is memory of its own.

use std::collections::HashMap;
use std::sync::Arc;

use super::super::{Access, GrantError, Xen};

/// Most grants that a queue keeps, Linux' `max_persistent_grants`: three times the `RING_SIZE * BLKIF_MAX_SEGMENTS_PER_REQUEST` of a ring of one page.
pub(in super::super) const MOST_KEPT: usize = 1056;
/// How many go when there would be more: `LRU_PERCENT_CLEAN` of them, so that the oldest are not looked for each time.
const PURGED: usize = MOST_KEPT * 5 / 100;

/// A page that stays mapped.
struct Kept {
    gpa: u64,
    /// When it was last used, by [`Grants::uses`].
    last: u64,
}

/// The grants in use of one queue.
pub(super) struct Grants {
    xen: Arc<Xen>,
    /// By reference; `None` when the frontend does not have the feature.
    kept: Option<HashMap<u32, Kept>>,
    /// How often pages were used.
    uses: u64,
    /// Mapped until the request is done.
    borrowed: Vec<(u32, Access)>,
}

impl Grants {
    pub fn new(xen: Arc<Xen>, persistent: bool) -> Grants {
        Grants { xen, kept: persistent.then(HashMap::new), uses: 0, borrowed: Vec::new() }
    }

    /// Begins to use a page in a request; its address.
    ///
    /// # Errors
    /// [`GrantError`].
    pub fn map(&mut self, grant: u32, access: Access) -> Result<u64, GrantError> {
        if let Some(kept) = &mut self.kept {
            self.uses += 1;
            if let Some(known) = kept.get_mut(&grant) {
                known.last = self.uses;
                return Ok(known.gpa);
            }
            match self.xen.map(grant, Access::Write) {
                Ok(gpa) => {
                    if kept.len() >= MOST_KEPT {
                        purge(&self.xen, kept);
                    }
                    kept.insert(grant, Kept { gpa, last: self.uses });
                    return Ok(gpa);
                }
                // Not one of those that are kept, but good enough for this once.
                Err(GrantError::ReadOnly(_)) if access == Access::Read => {}
                Err(error) => return Err(error),
            }
        }
        let gpa = self.xen.map(grant, access)?;
        self.borrowed.push((grant, access));
        Ok(gpa)
    }

    /// The request is done.
    pub fn release(&mut self) {
        for (grant, access) in self.borrowed.drain(..) {
            self.xen.unmap(grant, access);
        }
    }
}

impl Drop for Grants {
    fn drop(&mut self) {
        self.release();
        for grant in self.kept.iter().flat_map(HashMap::keys) {
            self.xen.unmap(*grant, Access::Write);
        }
    }
}

/// Lets the least recently used go. Those of a request under way are fewer than stay, and the latest.
fn purge(xen: &Xen, kept: &mut HashMap<u32, Kept>) {
    let mut uses: Vec<u64> = kept.values().map(|kept| kept.last).collect();
    // There are as many as may be kept.
    let (_, &mut oldest, _) = uses.select_nth_unstable(PURGED);
    kept.retain(|grant, kept| {
        let stays = kept.last >= oldest;
        if !stays {
            xen.unmap(*grant, Access::Write);
        }
        stays
    });
}
