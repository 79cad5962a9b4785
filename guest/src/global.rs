//! State of the kernel that is not on a stack.
#![allow(unsafe_code)] // The one place where a shared value becomes a unique one.

use core::cell::{Cell, UnsafeCell};

/// A value that everybody can reach, one at a time.
///
/// There is one processor, and interrupt handlers touch atomics only, so that the only conflict is a function that comes back
/// to a value it holds already: a bug, which panics.
pub struct Global<T> {
    held: Cell<bool>,
    value: UnsafeCell<T>,
}

// SAFETY: one processor runs this kernel, and handlers of interrupts use none of these.
unsafe impl<T> Sync for Global<T> {}

impl<T> Global<T> {
    /// Holds `value`.
    pub const fn new(value: T) -> Global<T> {
        Global { held: Cell::new(false), value: UnsafeCell::new(value) }
    }

    /// Works on the value.
    pub fn with<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        assert!(!self.held.replace(true), "a global is in use already");
        // SAFETY: nobody else holds it.
        let result = work(unsafe { &mut *self.value.get() });
        self.held.set(false);
        result
    }
}
