//! What the TLB forgets, and when: CR3, INVLPG and INVPCID (Intel SDM vol. 3 section 4.10).

use super::{EMPTY, FETCH_ENTRIES, NO_TAG, Tlb, UNCACHED};
use crate::cpu::{Cpu, cr0, cr4};
use crate::op::Trap;

impl Cpu {
    /// Recomputes the TLB context from CR3, CR4.PCIDE and the privilege level.
    pub fn update_translation(&mut self) {
        let context = self.tlb.context(self.pcid(), false);
        self.tlb.key = context << 1 | u64::from(self.cpl == 3);
        if self.checks_alignment() {
            self.tlb.key = UNCACHED;
            self.tlb.next_epoch();
        }
    }

    fn pcid(&self) -> usize {
        if self.cr4 & cr4::PCIDE != 0 { (self.cr3 & 0xfff) as usize } else { 0 }
    }

    /// Forgets all translations.
    pub fn flush_tlb(&mut self) {
        self.tlb.clear();
        self.update_translation();
    }

    /// Forgets the translations of the current PCID. Global pages go too, which the architecture allows.
    pub fn flush_tlb_context(&mut self) {
        let pcid = self.pcid();
        self.tlb.context(pcid, true);
        self.update_translation();
    }

    /// INVLPG.
    pub fn invalidate_page(&mut self, va: u64) {
        if self.tlb.large & 1 << (va >> 30 & 63) != 0 {
            self.flush_tlb();
            return;
        }
        let index = Tlb::index(va);
        for at in Tlb::neighbours(index).into_iter().chain([index]) {
            if self.tlb.entries[at].is_of(va) {
                self.tlb.entries[at] = EMPTY;
            }
        }
        self.tlb.fetch[(va >> 12) as usize & (FETCH_ENTRIES - 1)].tag = NO_TAG;
        let (word, bit) = Tlb::fetched_bit(va);
        if self.tlb.fetched[word] & bit != 0 {
            self.tlb.new_epoch();
        }
    }

    /// INVPCID, after its operands were checked (Intel SDM vol. 2).
    pub fn invpcid(&mut self, kind: u64, pcid: u64, va: u64) {
        match kind {
            0 => self.invalidate_page(va),
            1 => {
                self.tlb.context((pcid & 0xfff) as usize, true);
                self.update_translation();
            }
            _ => self.flush_tlb(),
        }
    }

    /// MOV to CR3, after reserved bits were checked: bit 63 keeps the PCID's translations; PAE paging loads the PDPTEs.
    pub fn load_cr3(&mut self, value: u64) -> Result<(), Trap> {
        let keep = self.cr4 & cr4::PCIDE != 0 && value >> 63 != 0;
        let value = value & !(1 << 63);
        if self.cr0 & cr0::PG != 0 && self.cr4 & cr4::PAE != 0 && !self.long_mode() {
            self.load_pdptes(value)?;
        }
        self.cr3 = value;
        if keep {
            self.update_translation();
        } else {
            self.flush_tlb_context();
        }
        Ok(())
    }
}
