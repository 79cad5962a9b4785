//! The guest's page tables: who may access what, accessed and dirty bits, what a page fault says (Intel SDM vol. 3 chapter 4).

use vmm::Exit;
use vmm::exit::Access;
use vmm::memory::Protection;

use super::{Kind, Mapping, PAGE, PAGE_MASK};
use crate::cpu::{Cpu, TrapKind, cr0, cr4, efer, vector};
use crate::op::Trap;

/// Page-table entry bits (Intel SDM vol. 3 table 4-19).
mod pte {
    pub const P: u64 = 1;
    pub const RW: u64 = 1 << 1;
    pub const US: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const NX: u64 = 1 << 63;
}

/// Page-fault error code bits (Intel SDM vol. 3 section 4.7).
mod fault {
    pub const P: u32 = 1;
    pub const W: u32 = 2;
    pub const U: u32 = 4;
    pub const RSVD: u32 = 8;
    pub const I: u32 = 16;
}

/// Physical address bits that CPUID promises (leaf 0x80000008).
pub(crate) const PHYSICAL_BITS: u32 = 46;
const PHYSICAL_MASK: u64 = (1 << PHYSICAL_BITS) - 1;

impl Cpu {
    /// Walks the page tables and checks the access; sets accessed and dirty bits.
    pub(super) fn translate(&mut self, va: u64, kind: Kind, user: bool) -> Result<Mapping, Trap> {
        let mapping = self.walk(va, kind, user)?;
        if self.vm.has_protections() { self.check_protection(mapping, va, kind) } else { Ok(mapping) }
    }

    fn check_protection(&mut self, mut mapping: Mapping, va: u64, kind: Kind) -> Result<Mapping, Trap> {
        let allowed = self.vm.protection(mapping.gpa);
        let (needed, access) = match kind {
            Kind::Read => (Protection::READ, Access::Read),
            Kind::Write => (Protection::WRITE, Access::Write),
            Kind::Fetch => (Protection::EXECUTE, Access::Execute),
        };
        if !allowed.contains(needed) {
            return Err(self.exit(Exit::Protection { gpa: mapping.gpa | va & (PAGE - 1), access }));
        }
        mapping.writable &= allowed.contains(Protection::WRITE);
        Ok(mapping)
    }

    fn walk(&mut self, va: u64, kind: Kind, user: bool) -> Result<Mapping, Trap> {
        if self.cr0 & cr0::PG == 0 {
            return Ok(Mapping { gpa: va & PAGE_MASK & 0xffff_ffff, writable: true, large: false });
        }
        let nx = self.efer & efer::NXE != 0;
        let reserved = !PHYSICAL_MASK & 0x000f_ffff_ffff_f000 | if nx { 0 } else { pte::NX };
        if self.long_mode() {
            if (va as i64) << 16 >> 16 != va as i64 {
                self.trap = TrapKind::NotCanonical;
                return Err(Trap(()));
            }
            return self.walk_levels(va, kind, user, self.cr3 & PHYSICAL_MASK & PAGE_MASK, 3, reserved);
        }
        if self.cr4 & cr4::PAE != 0 {
            let pdpte = self.pdpte[(va >> 30) as usize & 3];
            if pdpte & pte::P == 0 {
                return Err(self.page_fault(va, kind, user, 0));
            }
            // PDPTEs carry no rights; the two levels below do. Bits 62:52 are reserved in PAE entries.
            return self.walk_levels(va, kind, user, pdpte & PHYSICAL_MASK & PAGE_MASK, 1, reserved | 0x7ff0_0000_0000_0000);
        }
        self.walk_legacy(va, kind, user)
    }

    /// Walks tables of 8-byte entries from `level` (3: PML4, 0: page table) down.
    fn walk_levels(&mut self, va: u64, kind: Kind, user: bool, table: u64, level: u32, reserved: u64) -> Result<Mapping, Trap> {
        let mut table = table;
        let mut level = level;
        let mut rights = pte::RW | pte::US;
        let mut never_execute = 0;
        loop {
            let at = table + (va >> (12 + 9 * level) & 511) * 8;
            let mut entry = self.vm.read_entry(at);
            if entry & pte::P == 0 {
                return Err(self.page_fault(va, kind, user, 0));
            }
            let leaf = level == 0 || level <= 2 && entry & pte::PS != 0;
            let mut wrong = entry & reserved;
            if leaf && level > 0 {
                // Address bits below the page size, except PAT at bit 12.
                wrong |= entry & ((1 << (12 + 9 * level)) - 1) & 0x000f_ffff_ffff_e000;
            } else if level == 3 {
                wrong |= entry & pte::PS;
            }
            if wrong != 0 {
                return Err(self.page_fault(va, kind, user, fault::P | fault::RSVD));
            }
            rights &= entry;
            never_execute |= entry & pte::NX;
            if !leaf {
                if entry & pte::A == 0 {
                    self.vm.set_entry_bits(at, pte::A);
                }
                table = entry & PHYSICAL_MASK & PAGE_MASK;
                level -= 1;
                continue;
            }
            let writable = self.check_rights(va, kind, user, rights, never_execute != 0)?;
            let wanted = pte::A | if kind == Kind::Write { pte::D } else { 0 };
            if entry & wanted != wanted {
                entry |= wanted;
                self.vm.set_entry_bits(at, wanted);
            }
            let size_mask = (1u64 << (12 + 9 * level)) - 1;
            let gpa = entry & PHYSICAL_MASK & !size_mask & PAGE_MASK | va & size_mask & PAGE_MASK;
            return Ok(Mapping { gpa, writable: writable && entry & pte::D != 0, large: level > 0 });
        }
    }

    /// Two levels of 4-byte entries, with 4 MiB pages when CR4.PSE (and PSE-36's 8 more address bits).
    fn walk_legacy(&mut self, va: u64, kind: Kind, user: bool) -> Result<Mapping, Trap> {
        let at = (self.cr3 & 0xffff_f000) + (va >> 22 & 1023) * 4;
        let directory = u64::from(self.vm.read_entry_32(at));
        if directory & pte::P == 0 {
            return Err(self.page_fault(va, kind, user, 0));
        }
        let (at, entry, gpa, rights, large) = if directory & pte::PS != 0 && self.cr4 & cr4::PSE != 0 {
            if directory & 1 << 21 != 0 {
                return Err(self.page_fault(va, kind, user, fault::P | fault::RSVD));
            }
            let gpa = directory & 0xffc0_0000 | (directory >> 13 & 0xff) << 32 | va & 0x3f_f000;
            (at, directory, gpa, directory, true)
        } else {
            let table = (directory & 0xffff_f000) + (va >> 12 & 1023) * 4;
            let entry = u64::from(self.vm.read_entry_32(table));
            if entry & pte::P == 0 {
                return Err(self.page_fault(va, kind, user, 0));
            }
            if directory & pte::A == 0 {
                self.vm.set_entry_bits_32(at, pte::A as u32);
            }
            (table, entry, entry & 0xffff_f000, directory & entry, false)
        };
        let writable = self.check_rights(va, kind, user, rights, false)?;
        let wanted = pte::A | if kind == Kind::Write { pte::D } else { 0 };
        if entry & wanted != wanted {
            self.vm.set_entry_bits_32(at, wanted as u32);
        }
        Ok(Mapping { gpa, writable: writable && (entry | wanted) & pte::D != 0, large })
    }

    /// Whether rights allow the access; returns whether writes are allowed.
    fn check_rights(&mut self, va: u64, kind: Kind, user: bool, rights: u64, never_execute: bool) -> Result<bool, Trap> {
        let writable = rights & pte::RW != 0 || !user && self.cr0 & cr0::WP == 0;
        let denied = user && rights & pte::US == 0
            || kind == Kind::Write && !writable
            || kind == Kind::Fetch && (never_execute || !user && rights & pte::US != 0 && self.cr4 & cr4::SMEP != 0);
        if denied { Err(self.page_fault(va, kind, user, fault::P)) } else { Ok(writable) }
    }

    #[cold]
    fn page_fault(&mut self, va: u64, kind: Kind, user: bool, bits: u32) -> Trap {
        let mut code = bits;
        if kind == Kind::Write {
            code |= fault::W;
        }
        if user {
            code |= fault::U;
        }
        if kind == Kind::Fetch && (self.efer & efer::NXE != 0 || self.cr4 & cr4::SMEP != 0) {
            code |= fault::I;
        }
        self.trap = TrapKind::Exception { vector: vector::PF, error: Some(code), address: va };
        Trap(())
    }

    /// Loads the PAE page-directory pointers that CR3 `value` points at; #GP(0) for reserved bits in a present one.
    pub fn load_pdptes(&mut self, value: u64) -> Result<(), Trap> {
        let mut pdptes = [0; 4];
        for (n, pdpte) in pdptes.iter_mut().enumerate() {
            *pdpte = self.vm.read_entry((value & 0xffff_ffe0) + 8 * n as u64);
            if *pdpte & pte::P != 0 && *pdpte & (!PHYSICAL_MASK | 0x1e6) != 0 {
                return Err(self.gp());
            }
        }
        self.pdpte = pdptes;
        Ok(())
    }
}
