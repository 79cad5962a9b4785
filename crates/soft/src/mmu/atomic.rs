//! Locked accesses: one host instruction where the TLB knows the page, or else under the machine's bus lock.
#![allow(unsafe_code)] // As in the module above.

use std::arch::asm;

use super::{Kind, PAGE, Word};
use crate::cpu::Cpu;
use crate::op::Trap;

impl Cpu {
    /// Locked read-modify-write; returns the old value. `new` has to own what it uses, as closures have it here: a pointer to a handler's stack
    /// would keep the handler from calling the next in tail position.
    #[inline(always)]
    pub fn atomic_update<T: Word>(&mut self, va: u64, new: impl Fn(T) -> T) -> Result<T, Trap> {
        if let Some(at) = self.hit::<T, true>(va) {
            // SAFETY: a TLB entry's addend leads to a mapped page of guest RAM.
            let mut old = unsafe { T::read(at) };
            loop {
                // SAFETY: as above.
                let seen = unsafe { T::compare_exchange(at, old, new(old)) };
                if seen == old {
                    return Ok(old);
                }
                old = seen;
            }
        }
        self.atomic_slow(va, move |old| Some(new(old)))
    }

    /// Locked compare-exchange; returns the old value.
    #[inline(always)]
    pub fn atomic_compare_exchange<T: Word>(&mut self, va: u64, expected: T, new: T) -> Result<T, Trap> {
        if let Some(at) = self.hit::<T, true>(va) {
            // SAFETY: a TLB entry's addend leads to a mapped page of guest RAM.
            return Ok(unsafe { T::compare_exchange(at, expected, new) });
        }
        self.atomic_slow(va, move |old| if old == expected { Some(new) } else { None })
    }

    /// Locked access that the TLB does not know: fills it, or, across pages and in MMIO, does it under the machine's bus lock.
    #[cold]
    #[inline(never)]
    fn atomic_slow<T: Word>(&mut self, va: u64, new: impl Fn(T) -> Option<T>) -> Result<T, Trap> {
        self.check_alignment(va, T::SIZE)?;
        self.watch(va, T::SIZE, true);
        self.check_write(va, T::SIZE)?;
        if (va & (PAGE - 1)) + T::SIZE <= PAGE
            && let Some(at) = self.checked_host(va, T::SIZE)?
        {
            loop {
                // SAFETY: host addresses of guest RAM, and the access stays in the page.
                let old = unsafe { T::read(at) };
                let Some(value) = new(old) else { return Ok(old) };
                // SAFETY: as above.
                if unsafe { T::compare_exchange(at, old, value) } == old {
                    return Ok(old);
                }
            }
        }
        let vm = std::sync::Arc::clone(&self.vm);
        let _bus = vm.bus_lock.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let old = self.load::<T>(va)?;
        // A compare-exchange that fails writes the old value back (Intel SDM vol. 2, CMPXCHG).
        self.store(va, new(old).unwrap_or(old))?;
        Ok(old)
    }

    /// Host address of a write inside of a page, which [`Cpu::check_write`] has allowed; decoded instructions there become invalid. `None` when
    /// there is no RAM.
    fn checked_host(&mut self, va: u64, size: u64) -> Result<Option<*mut u8>, Trap> {
        if let Some(at) = self.hit::<u8, true>(va) {
            return Ok(Some(at));
        }
        let mapping = self.translate(va, Kind::Write, self.cpl == 3)?;
        let Some(at) = self.fill(va, mapping) else { return Ok(None) };
        self.note_write(mapping.gpa, va & (PAGE - 1), size)?;
        Ok(Some(at))
    }

    /// CMPXCHG16B: compares and exchanges 16 aligned bytes; returns the old ones.
    pub fn atomic_compare_exchange_16(&mut self, va: u64, expected: u128, new: u128) -> Result<u128, Trap> {
        if va & 15 != 0 {
            return Err(self.gp());
        }
        self.check_write(va, 16)?;
        if let Some(at) = self.checked_host(va, 16)? {
            let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
            // SAFETY: 16 aligned bytes of guest RAM. RBX is saved by hand because LLVM reserves it. Every x86-64 processor that this
            // backend offers CX16 on has it.
            unsafe {
                asm!("xchg {new_low}, rbx", "lock cmpxchg16b [{at}]", "mov rbx, {new_low}",
                    at = in(reg) at, new_low = inout(reg) new as u64 => _,
                    inout("rax") low, inout("rdx") high, in("rcx") (new >> 64) as u64, options(nostack))
            };
            return Ok(u128::from(low) | u128::from(high) << 64);
        }
        let mut bytes = [0; 16];
        self.load_bytes(va, &mut bytes)?;
        let old = u128::from_le_bytes(bytes);
        self.store_bytes(va, &(if old == expected { new } else { old }).to_le_bytes())?;
        Ok(old)
    }
}
