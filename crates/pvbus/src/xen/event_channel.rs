//! The shared info page and event channels, two-level ABI (`event_channel.h`).
//!
//! Who is polled looks at its ring whatever port an event came by. So [`Platform::acknowledge`] only clears what is pending, so that the next event is
//! announced again; look at rings after it, never before. All ports belong to processor 0.

use core::sync::atomic::Ordering;

use abi::xen::cpuid;
use abi::xen::event_channel::{AllocUnbound, PORTS, op};
use abi::xen::hvm::{self, UpcallVector};
use abi::xen::hypercall::{DOMID_SELF, memory, number};
use abi::xen::shared_info::{EVTCHN_MASK, EVTCHN_PENDING, vcpu_info};
use zerocopy::little_endian::U32;

use super::hypercall::{Hypervisor, XenError, offset};
use crate::detect::Interface;
use crate::hal::{Dma, Hal, HalError};

/// Ports of a word here, which are half of Xen's.
const PORTS_PER_WORD: usize = 32;
/// Words of pending or masked ports.
const WORDS: usize = PORTS as usize / PORTS_PER_WORD;
/// `evtchn_upcall_pending` in its word.
const UPCALL_PENDING: u32 = 0xff;
/// Offsets in the page, of processor 0's vcpu info too, which is its beginning.
const PENDING_SEL: usize = offset(vcpu_info::PENDING_SEL);
const PENDING: usize = offset(EVTCHN_PENDING);
const MASK: usize = offset(EVTCHN_MASK);

/// The domain as the hypervisor runs it.
pub(super) struct Platform<'h> {
    /// The system.
    pub hal: &'h dyn Hal,
    /// The hypervisor.
    pub hypervisor: Hypervisor<'h>,
    info: Dma,
}

impl<'h> Platform<'h> {
    /// Places the shared info, and asks for upcalls if this system takes them and the hypervisor has a vector for each processor.
    pub fn new(hal: &'h dyn Hal, interface: &Interface) -> Result<Platform<'h>, XenError> {
        let hypervisor = Hypervisor::find(hal)?;
        let info = hal.dma_alloc(1)?;
        if let Err(error) = hypervisor.place(memory::SPACE_SHARED_INFO, 0, &info) {
            hal.dma_free(info);
            return Err(error);
        }
        // Nobody wants to hear of ports that nobody has.
        for word in 0..WORDS {
            info.word(MASK + word * 4)?.store(u32::MAX, Ordering::Relaxed);
        }
        let platform = Platform { hal, hypervisor, info };
        if let Some(vector) = hal.upcall_vector()
            && interface.features.eax & cpuid::hvm::UPCALL_VECTOR != 0
        {
            let mut set = UpcallVector { vector, ..UpcallVector::default() };
            platform.hypervisor.exchange(number::HVM_OP, hvm::op::SET_UPCALL_VECTOR, &mut set)?;
        }
        Ok(platform)
    }

    /// A new port that domain `remote` may bind to.
    pub fn open(&self, remote: u16) -> Result<u32, XenError> {
        let mut alloc = AllocUnbound { dom: DOMID_SELF.into(), remote_dom: remote.into(), ..AllocUnbound::default() };
        self.hypervisor.exchange(number::EVENT_CHANNEL_OP, op::ALLOC_UNBOUND, &mut alloc)?;
        self.listen(alloc.port.get())?;
        Ok(alloc.port.get())
    }

    /// Lets events of a port through.
    pub fn listen(&self, port: u32) -> Result<(), XenError> {
        self.hypervisor.exchange(number::EVENT_CHANNEL_OP, op::UNMASK, &mut U32::new(port))
    }

    /// Sends an event to the other end of a port.
    pub fn notify(&self, port: u32) -> Result<(), XenError> {
        self.hypervisor.exchange(number::EVENT_CHANNEL_OP, op::SEND, &mut U32::new(port))
    }

    /// Gives a port back.
    pub fn close(&self, port: u32) {
        // A port that is not there any more is closed as well.
        let _ = self.hypervisor.exchange(number::EVENT_CHANNEL_OP, op::CLOSE, &mut U32::new(port));
    }

    /// Takes note of all events so far.
    pub fn acknowledge(&self) -> Result<(), HalError> {
        let upcall = self.info.word(0)?;
        if upcall.load(Ordering::Acquire) & UPCALL_PENDING == 0 {
            return Ok(());
        }
        upcall.fetch_and(!UPCALL_PENDING, Ordering::AcqRel);
        for half in [PENDING_SEL, PENDING_SEL + 4] {
            self.info.word(half)?.swap(0, Ordering::AcqRel);
        }
        for word in 0..WORDS {
            let pending = self.info.word(PENDING + word * 4)?;
            // Read first: a locked access to each of them costs more.
            if pending.load(Ordering::Relaxed) != 0 {
                pending.swap(0, Ordering::AcqRel);
            }
        }
        Ok(())
    }
}
