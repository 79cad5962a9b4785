//! Translations that processors are told to forget by others: what a hypervisor's hypercalls do in place of interrupts.
//!
//! A processor looks at its flags before each block, so it is done when its flag is down, or when it is not in the guest: it will look before it is
//! again. The one that waits is not in the guest either, so that two can wait for each other.

use std::sync::{Mutex, PoisonError};

use vmm::VcpuId;

use crate::attention;
use crate::vm::VmShared;

/// Pages beyond which a processor forgets everything instead. One that halts does not look, and its list must not grow.
const MAX_PAGES: usize = 64;

/// Linear pages.
#[derive(Default)]
pub(crate) struct PageList(Mutex<Vec<u64>>);

impl PageList {
    /// Takes all.
    pub fn take(&self) -> Vec<u64> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Adds some. `false` when they are too many.
    fn add(&self, pages: &[u64]) -> bool {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = list.len() + pages.len() <= MAX_PAGES;
        if fits {
            list.extend(pages);
        }
        fits
    }
}

/// See [`vmm::BackendVm::flush_translations`].
pub(crate) fn flush_translations(vm: &VmShared, caller: VcpuId, processors: u64, pages: Option<&[u64]>) {
    let named = |id: usize| processors >> id & 1 != 0;
    let targets = || vm.attentions.iter().enumerate().filter(|&(id, _)| named(id));
    for (id, target) in targets() {
        let listed = pages.is_some_and(|pages| vm.flushes[id].add(pages));
        target.set(if listed { attention::FLUSH_PAGES } else { attention::FLUSH });
    }
    let Some(own) = vm.attentions.get(caller as usize) else { return };
    own.set_in_guest(false);
    for (_, target) in targets().filter(|&(id, _)| id != caller as usize) {
        while target.in_guest() && target.flags() & (attention::FLUSH | attention::FLUSH_PAGES) != 0 {
            std::thread::yield_now();
        }
    }
    own.set_in_guest(true);
}
