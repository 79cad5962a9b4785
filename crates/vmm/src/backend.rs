//! What executes virtual processors: the traits that `soft` and `kvm` implement.
//!
//! A [`Backend`] makes machines ([`BackendVm`]), a machine makes processors ([`Vcpu`]), and each processor is run by one
//! host thread at a time. Everything a processor wants from outside goes through [`Bus`], which the caller passes to
//! [`Vcpu::run`]; what the bus declines comes back as a typed [`Exit`].

use std::sync::Arc;

use crate::bus::{Bus, MsrFault, VcpuId};
use crate::cpuid::CpuidTable;
use crate::exit::Exit;
use crate::memory::{GuestMemory, Protection};
use crate::registers::{RegisterMask, Registers};
use crate::time::Timers;

/// Something that can execute virtual processors.
pub trait Backend: Send + Sync {
    /// Short name, as `--backend` takes it: `soft` or `kvm`.
    fn name(&self) -> &'static str;

    /// What vmm(4) prints when it attaches: `VMX/EPT`, `SVM/RVI` or `soft`.
    fn technology(&self) -> &'static str;

    /// CPUID leaves this backend can give a guest, all features on, hypervisor leaves absent.
    fn supported_cpuid(&self) -> CpuidTable;

    /// Features of the KVM dialect (EAX of its leaf, [`abi::kvm::feature`]) when the backend keeps the dialect by itself, as Linux KVM does in
    /// the kernel. A board must not show others then.
    fn kvm_dialect(&self) -> Option<u32> {
        None
    }

    /// How fast the processors' clocks run.
    ///
    /// # Errors
    /// [`BackendError`] when the host does not tell.
    fn frequencies(&self) -> Result<Frequencies, BackendError>;

    /// Makes a machine without processors.
    ///
    /// # Errors
    /// [`BackendError`] when the host refuses memory, or what the configuration asks for is not to be had.
    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn BackendVm>, BackendError>;
}

/// Ticks a second of a processor's clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frequencies {
    /// The time-stamp counter.
    pub tsc_hz: u64,
    /// The local APIC's timer, before it is divided.
    pub apic_hz: u32,
}

/// What a machine is made from.
#[derive(Clone)]
pub struct VmConfig {
    /// Guest physical memory: RAM and ROM; everything else is MMIO.
    pub memory: GuestMemory,
    /// Number of processors that will be made, 1 to 64.
    pub vcpus: u32,
    /// Whether each processor has a local APIC. Without one (as in vmm(4)) interrupts come only by [`Entry::inject`], and HLT
    /// leaves [`Vcpu::run`].
    pub local_apic: bool,
    /// What CPUID answers; the backend fills in what differs by processor (APIC id) or by state (OSXSAVE).
    pub cpuid: CpuidTable,
    /// The machine's clock and timers. The software CPU takes its TSC and LAPIC timer from here.
    pub timers: Arc<Timers>,
    /// Time advances by instructions executed and not by the host's clock, so that equal runs are equal (software CPU only).
    pub deterministic: bool,
}

/// A machine as its backend sees it.
pub trait BackendVm: Send + Sync {
    /// Makes processor `id`; each id once. It is in power-on state: id 0 runnable, the others waiting for INIT/SIPI when there
    /// is a local APIC.
    ///
    /// # Errors
    /// [`BackendError`] when the id is taken or out of range or the host refuses.
    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn Vcpu>, BackendError>;

    /// Delivers a message-signalled interrupt: a write of `data` to `address` (0xFEExxxxx), Intel SDM vol. 3 section 11.11.
    fn signal_msi(&self, address: u64, data: u32);

    /// Level of the 8259 pair's INTR output, wired to LINT0 of the processors' local APICs.
    fn set_extint(&self, asserted: bool);

    /// Which messages the I/O APIC's pins send, so that a backend with the LAPIC in the kernel can tell an EOI apart. Software
    /// backends ignore it and call [`Bus::end_of_interrupt`] for every level-triggered vector.
    fn set_ioapic_routes(&self, routes: &[Option<IoapicRoute>]) {
        let _ = routes;
    }

    /// Makes processor `id` leave [`Vcpu::run`] with [`Exit::Interrupted`] soon, also when it is halted or not yet in it.
    fn kick(&self, id: VcpuId);

    /// Ends the HLT of processor `id`, whether its interrupts are on or off; if it does not halt now, its next HLT. Not called where
    /// [`Backend::kvm_dialect`] is there.
    fn wake(&self, id: VcpuId) {
        let _ = id;
    }

    /// Whether no processor executes guest code, nor has been given a reason to: then nothing new comes from the guest before it is told something.
    /// For a device's thread that decides what to wait for; it may have changed when the answer is read. `false` where the backend cannot tell.
    fn is_idle(&self) -> bool {
        false
    }

    /// Sets, changes or removes the flag by which processor `id` may end interrupts without its local APIC. Called on the thread of the
    /// processor, or while it does not run. Not called where [`Backend::kvm_dialect`] is there.
    fn set_eoi_flag(&self, id: VcpuId, flag: Option<Arc<dyn EoiFlag>>) {
        let _ = (id, flag);
    }

    /// Whether interrupts of processor `id` with this vector end by themselves when they are delivered, without a word of the guest to its local
    /// APIC, as some hypervisors' own do. `false` where the backend cannot do that.
    fn set_auto_eoi(&self, id: VcpuId, vector: u8, ends_by_itself: bool) -> bool {
        let _ = (id, vector, ends_by_itself);
        false
    }

    /// Reads a register of processor `id`'s local APIC by its offset ([`abi::apic::offset`]), in whatever mode that is; the ICR as one of 64 bits.
    /// Called on the thread of the processor. Not called where [`Backend::kvm_dialect`] is there.
    ///
    /// # Errors
    /// [`MsrFault`] for what is not there or cannot be read.
    fn read_local_apic(&self, id: VcpuId, offset: u64) -> Result<u64, MsrFault> {
        let _ = (id, offset);
        Err(MsrFault)
    }

    /// Writes a register as [`BackendVm::read_local_apic`] reads it. A vector comes back when its level-triggered interrupt ended by this write:
    /// the I/O APIC is to be told.
    ///
    /// # Errors
    /// [`MsrFault`] for what is not there or cannot be written.
    fn write_local_apic(&self, id: VcpuId, offset: u64, value: u64) -> Result<Option<u8>, MsrFault> {
        let _ = (id, offset, value);
        Err(MsrFault)
    }

    /// Makes processors (bit by id) forget how linear addresses translate, in all their address spaces: those of `pages`, or all. None of them uses
    /// what it has forgotten when this returns. Called on the thread of processor `caller`, which may be among them. Not called where
    /// [`Backend::kvm_dialect`] is there.
    fn flush_translations(&self, caller: VcpuId, processors: u64, pages: Option<&[u64]>) {
        let _ = (caller, processors, pages);
    }

    /// Sets what guest accesses to `[gpa, gpa + size)` may do; both page aligned and inside RAM. An access that is not allowed
    /// leaves [`Vcpu::run`] with [`Exit::Protection`].
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] where the host cannot do it, [`BackendError::Invalid`] for a bad range.
    fn protect(&self, gpa: u64, size: u64, protection: Protection) -> Result<(), BackendError>;
}

/// A flag in guest memory that offers a guest to end the interrupt in service without a word to its local APIC. The guest accepts by clearing
/// it, which need not be atomic: a flag is only touched on its processor's own thread, or while that does not run.
pub trait EoiFlag: Send + Sync {
    /// Sets the flag. `false` when it cannot be written.
    fn offer(&self) -> bool;

    /// Clears the flag. `true` when it was still set; otherwise the guest has ended its interrupt.
    fn take_back(&self) -> bool;
}

/// One I/O APIC pin as a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoapicRoute {
    /// Message address, 0xFEExxxxx.
    pub address: u64,
    /// Message data: vector, delivery mode, trigger mode.
    pub data: u32,
}

/// One virtual processor. It belongs to one host thread while it runs.
pub trait Vcpu: Send {
    /// Runs guest code until something happens that `bus` does not take care of.
    ///
    /// # Errors
    /// [`BackendError`] when the host cannot go on; the message holds registers and the bytes at RIP where they help.
    fn run(&mut self, bus: &dyn Bus, entry: Entry) -> Result<Exit, BackendError>;

    /// Reads the register groups in `mask`; the others are left at their default.
    ///
    /// # Errors
    /// [`BackendError::Host`] when the host refuses.
    fn registers(&self, mask: RegisterMask) -> Result<Registers, BackendError>;

    /// Writes the register groups in `mask`.
    ///
    /// # Errors
    /// [`BackendError::Invalid`] for values that no processor can hold.
    fn set_registers(&mut self, registers: &Registers, mask: RegisterMask) -> Result<(), BackendError>;

    /// Reads a model-specific register, as RDMSR would.
    ///
    /// # Errors
    /// [`BackendError::Invalid`] where RDMSR would raise #GP.
    fn msr(&self, index: u32) -> Result<u64, BackendError>;

    /// Writes a model-specific register, as WRMSR would.
    ///
    /// # Errors
    /// [`BackendError::Invalid`] where WRMSR would raise #GP.
    fn set_msr(&mut self, index: u32, value: u64) -> Result<(), BackendError>;

    /// Reads x87, MMX and SSE state in FXSAVE64's layout (Intel SDM vol. 1 table 10-2).
    ///
    /// # Errors
    /// [`BackendError::Host`] when the host refuses.
    fn fxsave(&self) -> Result<[u8; 512], BackendError>;

    /// Writes x87, MMX and SSE state from FXSAVE64's layout.
    ///
    /// # Errors
    /// [`BackendError::Invalid`] for reserved MXCSR bits.
    fn set_fxsave(&mut self, area: &[u8; 512]) -> Result<(), BackendError>;

    /// Counters since the processor was made.
    fn stats(&self) -> VcpuStats;
}

/// What the caller hands a processor on entry, as vmm(4)'s RUN does.
#[derive(Debug, Clone, Copy, Default)]
pub struct Entry {
    /// An event to deliver first.
    pub inject: Option<Inject>,
    /// Leave with [`Exit::InterruptWindow`] as soon as the guest can take an external interrupt.
    pub interrupt_window: bool,
    /// Answer to the [`Exit::PortIn`] that the last run ended with.
    pub port_in: Option<u32>,
    /// Execute one instruction and leave with [`Exit::SingleStep`]. The guest does not see it.
    pub single_step: bool,
}

/// An event to inject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inject {
    /// External interrupt with this vector. The guest must be able to take it.
    Interrupt(u8),
    /// Exception, with the error code where the vector has one.
    Exception(u8, Option<u32>),
    /// Non-maskable interrupt.
    Nmi,
}

/// Counters of one processor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VcpuStats {
    /// Guest instructions executed, where the backend counts them.
    pub instructions: Option<u64>,
    /// Port accesses.
    pub port: u64,
    /// Memory-mapped accesses.
    pub mmio: u64,
    /// Model-specific register accesses that left the guest's fast path.
    pub msr: u64,
    /// CPUID instructions, where the backend sees them.
    pub cpuid: u64,
    /// VMCALL and VMMCALL instructions.
    pub hypercalls: u64,
    /// Times the processor halted.
    pub halts: u64,
    /// Interrupts delivered, where the backend counts them.
    pub interrupts: u64,
    /// Exceptions delivered, where the backend counts them.
    pub exceptions: u64,
    /// Running hash of the instruction pointers executed, in deterministic mode.
    pub trace_hash: Option<u64>,
}

/// Why a backend could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The backend, or this host under it, has no such ability.
    #[error("{0}")]
    Unsupported(String),
    /// An argument that cannot be right.
    #[error("{0}")]
    Invalid(String),
    /// The host's operating system refused.
    #[error("{what}: {source}")]
    Host {
        /// What was asked of the host.
        what: String,
        /// Its answer.
        source: std::io::Error,
    },
    /// The processor cannot go on; the text says where it stood.
    #[error("{0}")]
    Internal(String),
}
