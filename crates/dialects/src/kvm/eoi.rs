//! The end of an interrupt by a bit in guest memory instead of a write to the local APIC (`MSR_KVM_PV_EOI_EN` in `msr.rst`).
//!
//! The dialect has the word's address; when an interrupt is one whose end nobody waits for, only the local APIC knows. It sets the bit by
//! [`EoiFlag::offer`] and looks at it by [`EoiFlag::take_back`] before anything that depends on what is in service.

use std::sync::Arc;

use abi::kvm as words;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use vmm::backend::EoiFlag;
use vmm::{GuestMemory, MsrFault};

use super::page::holds;

/// Last value that a processor wrote to the MSR.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct EoiMsr(pub(super) u64);

impl EoiMsr {
    /// What a guest writes, if it may.
    pub(super) fn checked(memory: &GuestMemory, value: u64) -> Result<EoiMsr, MsrFault> {
        let enabled = value & words::PV_EOI_ENABLE != 0;
        let good = value & words::PV_EOI_RESERVED == 0 && (!enabled || holds(memory, value & !words::PV_EOI_ENABLE, size_of::<u32>()));
        if good { Ok(EoiMsr(value)) } else { Err(MsrFault) }
    }

    /// The flag for the local APIC, when it is enabled.
    pub(super) fn flag(self, memory: &GuestMemory) -> Option<Arc<dyn EoiFlag>> {
        let enabled = self.0 & words::PV_EOI_ENABLE != 0;
        enabled.then(|| flag_at(memory, self.0 & !words::PV_EOI_ENABLE))
    }
}

/// The lowest bit of the byte at `gpa`, which is in memory, as flag. Hyper-V's is the same.
pub(crate) fn flag_at(memory: &GuestMemory, gpa: u64) -> Arc<dyn EoiFlag> {
    Arc::new(Flag { memory: memory.clone(), at: GuestAddress(gpa) })
}

/// The word's first byte, as KVM has it (`pv_eoi_put_user`).
struct Flag {
    memory: GuestMemory,
    at: GuestAddress,
}

impl EoiFlag for Flag {
    fn offer(&self) -> bool {
        self.memory.write_obj(words::PV_EOI_PENDING, self.at).is_ok()
    }

    fn take_back(&self) -> bool {
        let is_set = self.memory.read_obj::<u8>(self.at).is_ok_and(|flags| flags & words::PV_EOI_PENDING != 0);
        if is_set {
            // Memory that could be read can be written.
            let _ = self.memory.write_obj(0u8, self.at);
        }
        is_set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offer_that_the_guest_did_not_take_comes_back() {
        let memory = vmm::memory::map(&[(0, 0x1000)]).unwrap();
        let flag = EoiMsr::checked(&memory, 0x101).unwrap().flag(&memory).unwrap();
        assert!(flag.offer());
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x100)).unwrap(), 1);
        assert!(flag.take_back());
        assert!(flag.offer());
        memory.write_obj(0u8, GuestAddress(0x100)).unwrap();
        assert!(!flag.take_back());
    }

    #[test]
    fn bad_addresses_fault() {
        let memory = vmm::memory::map(&[(0, 0x1000)]).unwrap();
        for value in [0x1001, 0x103, 0xfff_ffff_fffd] {
            assert_eq!(EoiMsr::checked(&memory, value), Err(MsrFault), "{value:#x}");
        }
        assert!(EoiMsr::checked(&memory, 0).unwrap().flag(&memory).is_none());
    }
}
