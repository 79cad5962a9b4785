//! The synthetic interrupt controller of the processor that attaches the bus (TLFS 6.0b, 11).
//!
//! The hypervisor puts one message at a time into the slot of an interrupt source and sets event flags in another page, a flag for each channel.
//! Who is polled looks at its ring whatever flag was set. So [`Synic::acknowledge`] only clears the flags, so that the next event interrupts again;
//! look at rings after it, never before.

use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

use abi::hyperv::hypercall::MESSAGE_PAYLOAD;
use abi::hyperv::synic::{EVENT_FLAGS, MESSAGE_FLAGS, MessageHeader, SLOT_SIZE, message};
use abi::hyperv::{msr, vmbus};
use zerocopy::{FromZeros, IntoBytes};

use crate::hal::{Dma, Hal, HalError};

/// Where VMBus' slots are in both pages.
const SLOT: usize = vmbus::SINT as usize * slot_size();
/// The register of its interrupt source.
const SINT: u32 = msr::SINT0 + vmbus::SINT as u32;

#[allow(clippy::cast_possible_truncation, reason = "a part of a page")]
const fn slot_size() -> usize {
    SLOT_SIZE as usize
}

/// The controller.
pub(super) struct Synic<'h> {
    hal: &'h dyn Hal,
    messages: Dma,
    events: Dma,
    vp: u32,
}

impl<'h> Synic<'h> {
    /// Turns the controller of this processor on. Without a vector of the system's, interrupts stay masked.
    pub fn new(hal: &'h dyn Hal) -> Result<Synic<'h>, HalError> {
        let vp = u32::try_from(hal.read_msr(msr::VP_INDEX)?).map_err(|_| HalError::Fault)?;
        let synic = Synic { hal, messages: hal.dma_alloc(1)?, events: hal.dma_alloc(1)?, vp };
        match synic.enable() {
            Ok(()) => Ok(synic),
            Err(error) => {
                synic.end();
                Err(error)
            }
        }
    }

    fn enable(&self) -> Result<(), HalError> {
        self.hal.write_msr(msr::SIMP, self.messages.gpa() | msr::PAGE_ENABLE)?;
        self.hal.write_msr(msr::SIEFP, self.events.gpa() | msr::PAGE_ENABLE)?;
        self.hal.write_msr(SINT, self.hal.upcall_vector().map_or(msr::sint::MASKED | msr::sint::POLLING, u64::from))?;
        self.hal.write_msr(msr::SCONTROL, msr::SCONTROL_ENABLE)
    }

    /// Turns it off and gives the pages back.
    pub fn end(self) {
        let off = [(msr::SCONTROL, 0), (SINT, msr::sint::RESET), (msr::SIMP, 0), (msr::SIEFP, 0)];
        if off.into_iter().all(|(register, value)| self.hal.write_msr(register, value).is_ok()) {
            self.hal.dma_free(self.messages);
            self.hal.dma_free(self.events);
        }
    }

    /// The processor's number, as the hypervisor counts.
    pub const fn vp(&self) -> u32 {
        self.vp
    }

    /// Takes the next message of VMBus out of its slot. One that says of itself what cannot be is empty.
    pub fn take_message(&self) -> Result<Option<Vec<u8>>, HalError> {
        let mut header = MessageHeader::new_zeroed();
        let kind = self.messages.word(SLOT)?;
        if kind.load(Ordering::Acquire) == message::NONE {
            return Ok(None);
        }
        self.messages.read(SLOT, header.as_mut_bytes())?;
        let is_vmbus = header.kind.get() == vmbus::MESSAGE_TYPE && usize::from(header.size) <= MESSAGE_PAYLOAD;
        let mut payload = vec![0; if is_vmbus { header.size.into() } else { 0 }];
        self.messages.read(SLOT + size_of::<MessageHeader>(), &mut payload)?;
        kind.store(message::NONE, Ordering::Release);
        // Who queues a message sets the flag and then looks at the slot again; here it is the other way round.
        fence(Ordering::SeqCst);
        let [_, flags, ..] = self.messages.word(SLOT + 4)?.load(Ordering::Relaxed).to_le_bytes();
        const { assert!(MESSAGE_FLAGS == 5) };
        if flags & message::PENDING != 0 {
            self.hal.write_msr(msr::EOM, 0)?;
        }
        Ok(Some(payload))
    }

    /// Takes note of all events so far.
    pub fn acknowledge(&self) -> Result<(), HalError> {
        for at in (SLOT..SLOT + usize::from(EVENT_FLAGS) / 8).step_by(4) {
            let flags = self.events.word(at)?;
            // Read first: a locked access to each of them costs more.
            if flags.load(Ordering::Relaxed) != 0 {
                flags.swap(0, Ordering::AcqRel);
            }
        }
        Ok(())
    }
}
