//! Pages that the guest places by an MSR: bit 0 says that the page is there, bits 63:12 are its number.
//!
//! In the TLFS (5.2.1) such a page lies over what the guest had there. Here it is the guest's own memory: what was in it is lost, and a page that is
//! turned off keeps what it held. A page where no memory is faults.

use abi::hyperv::msr::{PAGE_ENABLE, PAGE_SHIFT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm::memory::PAGE_SIZE;
use vmm::{GuestMemory, MsrFault};

/// Last value that was written to the MSR.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct PageMsr(pub u64);

impl PageMsr {
    /// What a guest writes, if it may.
    pub fn checked(memory: &GuestMemory, value: u64) -> Result<PageMsr, MsrFault> {
        let page = PageMsr(value);
        let is_good = page.address().is_none_or(|gpa| memory.check_range(GuestAddress(gpa), PAGE_SIZE as usize));
        if is_good { Ok(page) } else { Err(MsrFault) }
    }

    /// Where the page is, if it is.
    pub fn address(self) -> Option<u64> {
        (self.0 & PAGE_ENABLE != 0).then_some(self.0 >> PAGE_SHIFT << PAGE_SHIFT)
    }

    /// Empties the page if it was elsewhere, or nowhere, when the MSR held `old`.
    pub fn clear_if_new(self, old: PageMsr, memory: &GuestMemory) -> Result<(), MsrFault> {
        match self.address() {
            Some(gpa) if old.address() != Some(gpa) => self.fill(memory, &[0; PAGE_SIZE as usize]).map(|_| ()).ok_or(MsrFault),
            _ => Ok(()),
        }
    }

    /// Writes the beginning of the page; `None` when it is not there.
    pub fn fill(self, memory: &GuestMemory, content: &[u8]) -> Option<()> {
        memory.write_slice(content, GuestAddress(self.address()?)).ok()
    }
}
