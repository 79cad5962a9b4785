//! What the library needs from the system that carries it: the instructions that reach a hypervisor, memory the host can see, and time.
//!
//! A kernel implements all of [`Hal`]; a program of an operating system what it may do, usually [`Hal::cpuid`], [`Hal::call`] and
//! [`Hal::now`]. What is not implemented answers [`HalError::Unavailable`], and the drivers that need it do not attach.
//!
//! All `unsafe` is on the other side of this trait. Whoever implements it hands out the machine's powers (a model-specific register can
//! make the host write to memory), so a `Hal` is for this library, not for untrusted code.

use core::fmt;

use abi::pci;

pub use crate::dma::{Dma, WordCopy};

/// A point in time: nanoseconds of a clock that never goes back. Where it starts is the system's choice.
pub type Nanos = u64;
/// One millisecond.
pub const MILLISECOND: Nanos = 1_000_000;
/// One second.
pub const SECOND: Nanos = 1_000_000_000;

/// What carries the library.
pub trait Hal: Sync {
    /// CPUID with EAX `leaf` and ECX `subleaf`.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> Cpuid;

    /// Now.
    fn now(&self) -> Nanos;

    /// Lets others run until `deadline`. May come back sooner, must not come back much later. An upcall ends it, also one that came since it came back
    /// last; those before were looked after, and to come back at once for them makes a busy loop of it. The default only tells the processor
    /// that this is a waiting loop.
    fn wait_until(&self, deadline: Nanos) {
        let _ = deadline;
        core::hint::spin_loop();
    }

    /// Executes the instruction of `gate` with `registers` loaded, and stores them back. The direction flag is clear.
    ///
    /// With [`Transfer::Out`] the buffer's address goes to RSI and its length to RCX first, and port gates are `rep outsb`; with
    /// [`Transfer::In`] the address goes to RDI, and port gates are `rep insb`. With [`Transfer::Exchange`] the address goes to RSI, and the
    /// gate is no port.
    ///
    /// # Errors
    /// [`HalError`]. The host's own refusals are in the registers.
    fn call(&self, gate: Gate, registers: &mut Registers, transfer: Transfer<'_>) -> Result<(), HalError> {
        let _ = (gate, registers, transfer);
        Err(HalError::Unavailable)
    }

    /// Calls the code that a hypervisor has put at guest physical address `gpa`, in memory from [`Hal::dma_alloc`], with `registers` loaded, and
    /// stores them back. R8 is zero. The code keeps the stack and what a function keeps.
    ///
    /// # Errors
    /// [`HalError`]. The host's own refusals are in the registers.
    fn call_code(&self, gpa: u64, registers: &mut Registers) -> Result<(), HalError> {
        let _ = (gpa, registers);
        Err(HalError::Unavailable)
    }

    /// RDMSR.
    ///
    /// # Errors
    /// [`HalError::Fault`] when the processor raises #GP.
    fn read_msr(&self, index: u32) -> Result<u64, HalError> {
        let _ = index;
        Err(HalError::Unavailable)
    }

    /// WRMSR.
    ///
    /// # Errors
    /// [`HalError::Fault`] when the processor raises #GP.
    fn write_msr(&self, index: u32, value: u64) -> Result<(), HalError> {
        let _ = (index, value);
        Err(HalError::Unavailable)
    }

    /// IN.
    ///
    /// # Errors
    /// [`HalError`].
    fn port_in(&self, port: u16, width: Width) -> Result<u32, HalError> {
        let _ = (port, width);
        Err(HalError::Unavailable)
    }

    /// OUT.
    ///
    /// # Errors
    /// [`HalError`].
    fn port_out(&self, port: u16, width: Width, value: u32) -> Result<(), HalError> {
        let _ = (port, width, value);
        Err(HalError::Unavailable)
    }

    /// Reads 32 bits of a PCI function's configuration space, `offset` being a multiple of four. The default uses configuration
    /// mechanism #1 (PCI Local Bus 3.0, 3.2.2.3.2); a kernel with a PCI driver of its own takes that one's lock instead.
    ///
    /// # Errors
    /// [`HalError`]. A function that is not there reads as all ones.
    fn pci_read(&self, address: PciAddress, offset: u8) -> Result<u32, HalError> {
        self.port_out(pci::CONFIG_ADDRESS, Width::U32, address.mechanism_1(offset))?;
        self.port_in(pci::CONFIG_DATA, Width::U32)
    }

    /// Writes 32 bits of a PCI function's configuration space.
    ///
    /// # Errors
    /// [`HalError`].
    fn pci_write(&self, address: PciAddress, offset: u8, value: u32) -> Result<(), HalError> {
        self.port_out(pci::CONFIG_ADDRESS, Width::U32, address.mechanism_1(offset))?;
        self.port_out(pci::CONFIG_DATA, Width::U32, value)
    }

    /// `pages` contiguous pages of zeroed ordinary memory that the host may read and write. Drivers of disks and cards copy all their data through
    /// such pages: [`Dma::copied_by`] is for systems that have a better way than the default's.
    ///
    /// # Errors
    /// [`HalError::Unavailable`] also when there is no memory.
    fn dma_alloc(&self, pages: usize) -> Result<Dma, HalError> {
        let _ = pages;
        Err(HalError::Unavailable)
    }

    /// Takes back what [`Hal::dma_alloc`] gave. The host has been told before to leave it alone.
    fn dma_free(&self, dma: Dma) {
        let _ = dma;
    }

    /// Memory at guest physical address `gpa` that the hypervisor has set aside for both, `pages` pages. It is asked for once and never given back.
    ///
    /// # Errors
    /// [`HalError::Unavailable`] also when it cannot be mapped.
    fn map(&self, gpa: u64, pages: usize) -> Result<Dma, HalError> {
        let _ = (gpa, pages);
        Err(HalError::Unavailable)
    }

    /// An interrupt vector by which hypervisors may call: an ordinary interrupt of the first processor's local APIC, which ends
    /// [`Hal::wait_until`] and which the kernel brings to [`crate::Tree::on_upcall`]. Without one, everything works by polling.
    fn upcall_vector(&self) -> Option<u8> {
        None
    }

    /// The processor's time-stamp counter, read after everything before it in program order.
    ///
    /// # Errors
    /// [`HalError`].
    fn tsc(&self) -> Result<u64, HalError> {
        Err(HalError::Unavailable)
    }
}

/// Why the system did not do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HalError {
    /// This system does not offer it at all.
    Unavailable,
    /// The system offers it, but not to this caller.
    Denied,
    /// The processor refused: #GP or #UD.
    Fault,
}

impl fmt::Display for HalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HalError::Unavailable => "this system does not offer it",
            HalError::Denied => "no permission",
            HalError::Fault => "the processor refused the instruction",
        })
    }
}

impl core::error::Error for HalError {}

/// Answer of CPUID.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cpuid {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// The instruction of a call that carries registers both ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// `in eax, dx`; with a transfer `rep insb` or `rep outsb`.
    In,
    /// `out dx, eax`; with a transfer `rep insb` or `rep outsb`.
    Out,
    /// Intel's hypercall instruction.
    Vmcall,
    /// AMD's hypercall instruction.
    Vmmcall,
}

/// General registers of a call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Registers {
    /// RAX.
    pub rax: u64,
    /// RBX.
    pub rbx: u64,
    /// RCX.
    pub rcx: u64,
    /// RDX.
    pub rdx: u64,
    /// RSI.
    pub rsi: u64,
    /// RDI.
    pub rdi: u64,
    /// RBP.
    pub rbp: u64,
}

/// Memory that goes along with a call.
#[derive(Debug)]
pub enum Transfer<'a> {
    /// Registers only.
    None,
    /// To the host.
    Out(&'a [u8]),
    /// From the host.
    In(&'a mut [u8]),
    /// To the host, which changes it.
    Exchange(&'a mut [u8]),
}

/// Width of a port access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// One byte.
    U8,
    /// Two bytes.
    U16,
    /// Four bytes.
    U32,
}

/// Bus, device and function of a PCI function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciAddress {
    /// Bus.
    pub bus: u8,
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

impl PciAddress {
    /// What mechanism #1 wants in its address port.
    const fn mechanism_1(self, offset: u8) -> u32 {
        pci::CONFIG_ENABLE
            | (self.bus as u32) << 16
            | (self.device as u32 & 0x1f) << 11
            | (self.function as u32 & 7) << 8
            | (offset as u32 & 0xfc)
    }
}
