//! What a guest says when it crashes: five parameters, and a message in its memory (TLFS "Guest Crash Enlightenment Interface").
//!
//! What parameters mean is the guest's affair; Linux (`hyperv_report_panic_msg`) gives the end of its log as the message. It is told once until the
//! machine is reset: a guest could crash for ever.

use abi::hyperv::msr::{CRASH_CTL, CRASH_MESSAGE, CRASH_NOTIFY, CRASH_P0, CRASH_PARAMETERS};
use vm_memory::{Bytes, GuestAddress};
use vmm::GuestMemory;
use vmm::memory::PAGE_SIZE;

/// Which parameters are address and length of the message.
const MESSAGE_ADDRESS: usize = 3;
const MESSAGE_LENGTH: usize = 4;

/// A crash as the guest describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crash {
    /// Its parameters.
    pub parameters: [u64; CRASH_PARAMETERS as usize],
    /// Its message, as it is in memory.
    pub message: Vec<u8>,
}

/// The MSRs.
#[derive(Default)]
pub(super) struct CrashMsrs {
    parameters: [u64; CRASH_PARAMETERS as usize],
    is_told: bool,
}

impl CrashMsrs {
    /// RDMSR. `None` when the index is not one of these.
    pub fn read(&self, index: u32) -> Option<u64> {
        match index {
            CRASH_CTL => Some(CRASH_NOTIFY | CRASH_MESSAGE),
            _ => self.parameters.get(index.checked_sub(CRASH_P0)? as usize).copied(),
        }
    }

    /// WRMSR of a parameter. `None` when the index is none.
    pub fn write(&mut self, index: u32, value: u64) -> Option<()> {
        *self.parameters.get_mut(index.checked_sub(CRASH_P0)? as usize)? = value;
        Some(())
    }

    /// WRMSR of [`CRASH_CTL`]: what there is to tell.
    pub fn notify(&mut self, control: u64, memory: &GuestMemory) -> Option<Crash> {
        if control & CRASH_NOTIFY == 0 || std::mem::replace(&mut self.is_told, true) {
            return None;
        }
        let mut message = Vec::new();
        if control & CRASH_MESSAGE != 0 {
            message.resize(self.parameters[MESSAGE_LENGTH].min(PAGE_SIZE) as usize, 0);
            if memory.read_slice(&mut message, GuestAddress(self.parameters[MESSAGE_ADDRESS])).is_err() {
                message.clear();
            }
        }
        Some(Crash { parameters: self.parameters, message })
    }
}
