//! Hypercalls, and what is asked by them about the whole domain.
//!
//! Arguments are in RDI, RSI and RDX, the number and the answer in RAX ([`abi::xen::hypercall`]); nothing here needs the other three. The instruction
//! itself is used and not the hypercall page, as Linux does since XSA-466: Intel's where the processor has it, else AMD's. An argument in memory is a
//! structure that the hypervisor reads and writes at the caller's own address.

use core::fmt;

use abi::xen::hvm::{self, Param};
use abi::xen::hypercall::{AddToPhysmap, DOMID_SELF, Features, memory, number, version};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::hal::{Dma, Gate, Hal, HalError, Registers, Transfer};

/// Size of a page as `xen_add_to_physmap` counts them.
pub(super) const PAGE: u64 = 4096;

/// An offset in a page, for [`Dma`].
#[allow(clippy::cast_possible_truncation, reason = "it is less than a page, or the access fails")]
pub(super) const fn offset(at: u64) -> usize {
    at as usize
}

/// The way to the hypervisor.
pub(super) struct Hypervisor<'h> {
    hal: &'h dyn Hal,
    gate: Gate,
}

impl<'h> Hypervisor<'h> {
    /// Finds out by which instruction it is called.
    pub fn find(hal: &'h dyn Hal) -> Result<Hypervisor<'h>, XenError> {
        let intel = Hypervisor { hal, gate: Gate::Vmcall };
        match intel.call(number::XEN_VERSION, version::VERSION, 0, Transfer::None) {
            Err(XenError::Hal(HalError::Fault)) => {}
            answer => return answer.map(|_| intel),
        }
        let amd = Hypervisor { hal, gate: Gate::Vmmcall };
        amd.call(number::XEN_VERSION, version::VERSION, 0, Transfer::None).map(|_| amd)
    }

    /// Operation `operation` of hypercall `number`, with a structure that holds the answer afterwards.
    pub fn exchange<T: IntoBytes + FromBytes + Immutable>(&self, number: u64, operation: u64, argument: &mut T) -> Result<(), XenError> {
        // Only grant_table_op has a count, and there is always one.
        self.call(number, operation, 1, Transfer::Exchange(argument.as_mut_bytes())).map(drop)
    }

    /// Bits of `abi::xen::hypercall::feature`.
    pub fn features(&self) -> Result<u32, XenError> {
        let mut features = Features::default();
        self.exchange(number::XEN_VERSION, version::GET_FEATURES, &mut features)?;
        Ok(features.bits.get())
    }

    /// An HVM parameter.
    pub fn parameter(&self, index: u32) -> Result<u64, XenError> {
        let mut param = Param { domid: DOMID_SELF.into(), index: index.into(), ..Param::default() };
        self.exchange(number::HVM_OP, hvm::op::GET_PARAM, &mut param)?;
        Ok(param.value.get())
    }

    /// Puts page `index` of `space` in the place of `page`, which is the hypervisor's from then on.
    pub fn place(&self, space: u32, index: u64, page: &Dma) -> Result<(), XenError> {
        let gpfn = page.gpa() / PAGE;
        let mut add =
            AddToPhysmap { domid: DOMID_SELF.into(), space: space.into(), idx: index.into(), gpfn: gpfn.into(), ..AddToPhysmap::default() };
        self.exchange(number::MEMORY_OP, memory::ADD_TO_PHYSMAP, &mut add)
    }

    fn call(&self, number: u64, operation: u64, count: u64, transfer: Transfer<'_>) -> Result<u64, XenError> {
        let mut registers = Registers { rax: number, rdi: operation, rdx: count, ..Registers::default() };
        self.hal.call(self.gate, &mut registers, transfer)?;
        match registers.rax.cast_signed() {
            errno @ ..0 => Err(XenError::Refused { number, operation, errno: errno.saturating_neg() }),
            _ => Ok(registers.rax),
        }
    }
}

/// Why Xen's interface cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XenError {
    /// This system cannot call it, or has no memory.
    Hal(HalError),
    /// The hypervisor refused a call.
    Refused {
        /// Number of the hypercall.
        number: u64,
        /// Its operation.
        operation: u64,
        /// `XEN_E*`.
        errno: i64,
    },
    /// The host offers no XenStore.
    NoStore,
    /// All grants that the host allows are in use.
    NoGrants,
}

impl From<HalError> for XenError {
    fn from(error: HalError) -> XenError {
        XenError::Hal(error)
    }
}

impl fmt::Display for XenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            XenError::Hal(error) => write!(f, "{error}"),
            XenError::Refused { number, operation, errno } => write!(f, "hypercall {number}, operation {operation}: error {errno}"),
            XenError::NoStore => f.write_str("the host offers no XenStore"),
            XenError::NoGrants => f.write_str("all grants are in use"),
        }
    }
}

impl core::error::Error for XenError {}
