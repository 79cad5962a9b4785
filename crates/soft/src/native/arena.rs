//! Executable memory, for thunks and for translations.
//!
//! The same memory is mapped twice, once to write and once to execute, so no page is ever both and adding code needs no system
//! call. Hosts that refuse executable shared memory (`vm.memfd_noexec`, some SELinux policies) get one private mapping whose
//! protection is changed around every addition. Code is only ever added; all of it goes together.
#![allow(unsafe_code)] // Maps memory and writes code into it.

use std::io;
use std::ptr::{self, NonNull};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mmap_anonymous, mprotect, munmap};

/// What is added starts at multiples of this: half a line of the instruction cache's fetch.
const ALIGN: usize = 16;

/// Memory that code is put into.
#[derive(Debug)]
pub(crate) struct Arena {
    execute: NonNull<u8>,
    /// Where the same bytes can be written; `None` when protection has to be changed instead.
    write: Option<NonNull<u8>>,
    capacity: usize,
    used: usize,
}

// SAFETY: the arena owns its mappings, nothing about them belongs to a thread.
unsafe impl Send for Arena {}

impl Arena {
    /// Reserves `capacity` bytes, a multiple of the page size; memory is used as code is added.
    pub fn new(capacity: usize) -> io::Result<Arena> {
        match Arena::dual(capacity) {
            Ok(arena) => Ok(arena),
            Err(_) => Arena::single(capacity),
        }
    }

    fn dual(capacity: usize) -> io::Result<Arena> {
        // Kernels before 6.3 do not know MFD_EXEC, newer ones may want it.
        let file = memfd_create(c"pvbus-code", MemfdFlags::CLOEXEC | MemfdFlags::EXEC)
            .or_else(|_| memfd_create(c"pvbus-code", MemfdFlags::CLOEXEC))?;
        ftruncate(&file, capacity as u64)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let execute = unsafe { mmap(ptr::null_mut(), capacity, ProtFlags::READ | ProtFlags::EXEC, MapFlags::SHARED, &file, 0) }?;
        let mut arena = Arena { execute: pointer(execute)?, write: None, capacity, used: 0 };
        // SAFETY: as above.
        let write = unsafe { mmap(ptr::null_mut(), capacity, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0) }?;
        arena.write = Some(pointer(write)?);
        Ok(arena)
    }

    fn single(capacity: usize) -> io::Result<Arena> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let execute = unsafe { mmap_anonymous(ptr::null_mut(), capacity, ProtFlags::READ | ProtFlags::EXEC, MapFlags::PRIVATE) }?;
        Ok(Arena { execute: pointer(execute)?, write: None, capacity, used: 0 })
    }

    /// Adds code and returns where it can be executed. `None` when it does not fit, or the host refuses.
    pub fn add(&mut self, code: &[u8]) -> Option<NonNull<u8>> {
        let start = self.used.next_multiple_of(ALIGN);
        let end = start.checked_add(code.len()).filter(|&end| end <= self.capacity)?;
        // SAFETY: start is inside the mapping.
        let entry = unsafe { self.execute.add(start) };
        match self.write {
            Some(write) => {
                // SAFETY: start..end is inside the mapping, which is writable, and nothing executes there yet.
                unsafe { ptr::copy_nonoverlapping(code.as_ptr(), write.as_ptr().add(start), code.len()) };
            }
            None => {
                self.protect(MprotectFlags::READ | MprotectFlags::WRITE).ok()?;
                // SAFETY: start..end is inside the mapping, which is writable now; its owner runs no thunk meanwhile (`&mut self`).
                unsafe { ptr::copy_nonoverlapping(code.as_ptr(), entry.as_ptr(), code.len()) };
                self.protect(MprotectFlags::READ | MprotectFlags::EXEC).ok()?;
            }
        }
        self.used = end;
        Some(entry)
    }

    /// Where code is in the arena, if it is one of its own.
    pub fn offset_of(&self, code: *const u8) -> Option<usize> {
        code.addr().checked_sub(self.execute.addr().get()).filter(|&offset| offset < self.used)
    }

    /// Changes the distance at a multiple of 4 from the start, of a jump that leads to `target` from now on. It may be seen later.
    pub fn redirect(&mut self, site: usize, target: usize) {
        debug_assert!(site.is_multiple_of(4) && site + 4 <= self.used && target < self.used);
        // From the instruction's end; the capacity is below 2 GiB.
        let distance = (target.wrapping_sub(site + 4) as u32).to_le();
        if self.write.is_none() && self.protect(MprotectFlags::READ | MprotectFlags::WRITE).is_err() {
            return;
        }
        let at = self.write.unwrap_or(self.execute);
        // SAFETY: the site is inside of the mapping, which is writable, and aligned. The thread that is here is the only one that executes this, and
        // whatever the processor has fetched already has the old distance or the new one.
        unsafe { at.add(site).cast::<u32>().write_volatile(distance) };
        if self.write.is_none() {
            self.protect(MprotectFlags::READ | MprotectFlags::EXEC).expect("as when the code was added");
        }
    }

    /// Forgets all code, whose place is used again.
    pub fn clear(&mut self) {
        self.used = 0;
        // The bytes are written at other addresses than they are executed at, and then the processor sees the change only after an
        // instruction that serialises (Intel SDM vol. 3 section 8.1.3); CPUID is one.
        std::arch::x86_64::__cpuid(0);
    }

    /// Bytes that are left.
    #[cfg(test)]
    pub fn free(&self) -> usize {
        self.capacity - self.used
    }

    fn protect(&mut self, flags: MprotectFlags) -> io::Result<()> {
        // SAFETY: the mapping is the arena's own, and no code in it runs during this call.
        unsafe { mprotect(self.execute.as_ptr().cast(), self.capacity, flags) }?;
        Ok(())
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mappings are the arena's own; who owns the arena owns what could call into it.
        unsafe {
            let _ = munmap(self.execute.as_ptr().cast(), self.capacity);
            if let Some(write) = self.write {
                let _ = munmap(write.as_ptr().cast(), self.capacity);
            }
        }
    }
}

fn pointer(address: *mut core::ffi::c_void) -> io::Result<NonNull<u8>> {
    NonNull::new(address.cast()).ok_or_else(|| io::Error::other("the kernel mapped code at address 0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `lea eax, [rdi + 7]; ret`
    const ADD_SEVEN: [u8; 4] = [0x8d, 0x47, 0x07, 0xc3];

    fn call(entry: NonNull<u8>, argument: u32) -> u32 {
        // SAFETY: the bytes are those of ADD_SEVEN, a function of this type.
        let function: extern "sysv64" fn(u32) -> u32 = unsafe { std::mem::transmute(entry) };
        function(argument)
    }

    #[test]
    fn code_added_to_either_kind_of_arena_runs() {
        for mut arena in [Arena::dual(4096).unwrap(), Arena::single(4096).unwrap()] {
            let first = arena.add(&ADD_SEVEN).unwrap();
            let second = arena.add(&ADD_SEVEN).unwrap();
            assert_eq!((call(first, 1), call(second, 2)), (8, 9));
        }
    }

    #[test]
    fn jump_that_is_changed_leads_elsewhere() {
        // `mov eax, edi; nop; jmp $+5`; then `add eax, 1; ret` and `add eax, 2; ret`.
        let jump = [0x89, 0xf8, 0x90, 0xe9, 0, 0, 0, 0];
        let code = [&jump[..], &[0x83, 0xc0, 0x01, 0xc3], &[0x83, 0xc0, 0x02, 0xc3]].concat();
        for mut arena in [Arena::dual(4096).unwrap(), Arena::single(4096).unwrap()] {
            let entry = arena.add(&code).unwrap();
            let start = arena.offset_of(entry.as_ptr()).unwrap();
            assert_eq!(call(entry, 5), 6);
            arena.redirect(start + 4, start + 12);
            // The processor may still have the old one.
            std::arch::x86_64::__cpuid(0);
            assert_eq!(call(entry, 5), 7);
        }
    }

    #[test]
    fn full_arena_says_so_and_keeps_what_it_has() {
        let mut arena = Arena::new(4096).unwrap();
        let first = arena.add(&ADD_SEVEN).unwrap();
        let added = (1..).take_while(|_| arena.add(&ADD_SEVEN).is_some()).count();
        assert_eq!(added, 4096 / ALIGN - 1);
        assert_eq!(call(first, 3), 10);
    }
}
