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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    fn machine() -> Arc<VmShared> {
        VmShared::plain(&vmm::memory::map(&[(0, 0x1000)]).unwrap(), 3)
    }

    /// What a processor does before its next block.
    fn attend(vm: &VmShared, id: usize) -> (u32, Vec<u64>) {
        let flags = vm.attentions[id].clear(attention::FLUSH | attention::FLUSH_PAGES);
        (flags, vm.flushes[id].take())
    }

    #[test]
    fn processors_named_are_told_and_no_others() {
        let vm = machine();
        flush_translations(&vm, 0, 0b101, Some(&[0x7000, 0x9000]));
        assert_eq!(attend(&vm, 0), (attention::FLUSH_PAGES, vec![0x7000, 0x9000]));
        assert_eq!(attend(&vm, 1), (0, vec![]));
        assert_eq!(attend(&vm, 2), (attention::FLUSH_PAGES, vec![0x7000, 0x9000]));
        flush_translations(&vm, 1, 0b010, None);
        assert_eq!(attend(&vm, 1), (attention::FLUSH, vec![]));
    }

    #[test]
    fn list_of_a_processor_that_does_not_look_has_a_bound() {
        let vm = machine();
        for page in 0..1000 {
            flush_translations(&vm, 0, 0b100, Some(&[page << 12]));
        }
        let (flags, pages) = attend(&vm, 2);
        assert_eq!((flags, pages.len()), (attention::FLUSH | attention::FLUSH_PAGES, MAX_PAGES));
    }

    #[test]
    fn caller_waits_for_a_processor_in_the_guest_until_it_looks() {
        let vm = machine();
        vm.attentions[1].set_in_guest(true);
        std::thread::scope(|scope| {
            let caller = scope.spawn(|| flush_translations(&vm, 0, 0b010, None));
            while vm.attentions[1].flags() & attention::FLUSH == 0 {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(20));
            assert!(!caller.is_finished());
            attend(&vm, 1);
            caller.join().unwrap();
        });
        assert!(vm.attentions[0].in_guest(), "as before");
    }

    #[test]
    fn processors_that_flush_each_other_do_not_wait_for_ever() {
        let vm = machine();
        std::thread::scope(|scope| {
            for own in 0..3 {
                let vm = &vm;
                scope.spawn(move || {
                    vm.attentions[own].set_in_guest(true);
                    for page in 0..500 {
                        flush_translations(vm, own as VcpuId, 0b111, Some(&[page << 12]));
                        attend(vm, own);
                    }
                    vm.attentions[own].set_in_guest(false);
                });
            }
        });
    }
}
