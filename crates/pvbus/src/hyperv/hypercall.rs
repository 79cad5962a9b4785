//! Hypercalls, by the code that the hypervisor puts into a page of the guest's (TLFS 6.0b, 3.13).
//!
//! Control word and input are in RCX and RDX, the answer is in RAX ([`abi::hyperv::hypercall`]). VMBus needs two: messages, whose input is in
//! memory, and events, whose input fits a register.

use core::fmt;

use abi::hyperv::hypercall::{CONNECTION_MASK, PostMessage, Status, code, control};
use abi::hyperv::{msr, vmbus};
use spin::Mutex;
use zerocopy::IntoBytes;

use crate::hal::{Dma, Hal, HalError, Registers};

/// What the hypervisor is told of this system: open source, of no registered kind, version 1.
const OS_ID: u64 = msr::os::OPEN_SOURCE | 1 << msr::os::VERSION_SHIFT;

/// The way to the hypervisor.
pub(super) struct Hypercalls<'h> {
    hal: &'h dyn Hal,
    code: Dma,
    input: Mutex<Dma>,
}

impl<'h> Hypercalls<'h> {
    /// Says who this is, and gets the page with the code.
    pub fn new(hal: &'h dyn Hal) -> Result<Hypercalls<'h>, HypervError> {
        hal.write_msr(msr::GUEST_OS_ID, OS_ID)?;
        let (code, input) = (hal.dma_alloc(1)?, hal.dma_alloc(1)?);
        let calls = Hypercalls { hal, code, input: Mutex::new(input) };
        match calls.enable() {
            Ok(()) => Ok(calls),
            Err(error) => {
                calls.end();
                Err(error)
            }
        }
    }

    fn enable(&self) -> Result<(), HypervError> {
        self.hal.write_msr(msr::HYPERCALL, self.code.gpa() | msr::PAGE_ENABLE)?;
        // Somebody may have locked the register before.
        let is_there = self.hal.read_msr(msr::HYPERCALL)? & !msr::HYPERCALL_LOCKED == self.code.gpa() | msr::PAGE_ENABLE;
        if is_there { Ok(()) } else { Err(HypervError::NoHypercalls) }
    }

    /// Gives the pages back.
    pub fn end(self) {
        // Without a system there are no hypercalls.
        if self.hal.write_msr(msr::HYPERCALL, 0).is_ok() && self.hal.write_msr(msr::GUEST_OS_ID, 0).is_ok() {
            self.hal.dma_free(self.code);
            self.hal.dma_free(self.input.into_inner());
        }
    }

    /// Sends a message of VMBus to a connection.
    pub fn post_message(&self, connection: u32, payload: &[u8]) -> Result<Status, HalError> {
        let size = u32::try_from(payload.len()).map_err(|_| HalError::Fault)?;
        let head =
            PostMessage { connection: connection.into(), kind: vmbus::MESSAGE_TYPE.into(), size: size.into(), ..PostMessage::default() };
        let input = self.input.lock();
        input.write(0, head.as_bytes())?;
        input.write(size_of::<PostMessage>(), payload)?;
        self.call(code::POST_MESSAGE.into(), input.gpa())
    }

    /// Sets flag 0 of a connection, which is the only one that VMBus has.
    pub fn signal_event(&self, connection: u32) -> Result<Status, HalError> {
        self.call(u64::from(code::SIGNAL_EVENT) | control::FAST, u64::from(connection & CONNECTION_MASK))
    }

    fn call(&self, control: u64, input: u64) -> Result<Status, HalError> {
        let mut registers = Registers { rcx: control, rdx: input, ..Registers::default() };
        self.hal.call_code(self.code.gpa(), &mut registers)?;
        let [low, high, ..] = registers.rax.to_le_bytes();
        Ok(Status(u16::from_le_bytes([low, high])))
    }
}

/// Why Hyper-V's interface cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HypervError {
    /// This system cannot call it, or has no memory.
    Hal(HalError),
    /// There is no page with the code of hypercalls.
    NoHypercalls,
    /// The hypervisor refused a message.
    Refused(u16),
    /// There are no connections for messages of VMBus.
    NoBus,
    /// The host speaks no version of VMBus that this driver speaks.
    NoVersion,
    /// The host did not answer in time.
    Timeout,
}

impl From<HalError> for HypervError {
    fn from(error: HalError) -> HypervError {
        HypervError::Hal(error)
    }
}

impl fmt::Display for HypervError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HypervError::Hal(error) => write!(f, "{error}"),
            HypervError::NoHypercalls => f.write_str("the hypervisor gives no page for hypercalls"),
            HypervError::Refused(status) => write!(f, "the hypervisor refused a message: status {status}"),
            HypervError::NoBus => f.write_str("the host has no VMBus behind this interface"),
            HypervError::NoVersion => f.write_str("the host speaks no version of VMBus from 2.4 to 5.3"),
            HypervError::Timeout => f.write_str("the host did not answer in time"),
        }
    }
}

impl core::error::Error for HypervError {}
