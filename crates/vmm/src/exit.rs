//! Why a processor stopped running guest code.

/// What ended [`crate::Vcpu::run`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// IN that the bus declined. The answer goes into [`crate::Entry::port_in`] of the next run.
    PortIn {
        /// Port number.
        port: u16,
        /// Access size in bytes: 1, 2 or 4.
        size: u8,
        /// One element of INS.
        string: bool,
    },
    /// OUT that the bus declined. The instruction is done.
    PortOut {
        /// Port number.
        port: u16,
        /// Access size in bytes: 1, 2 or 4.
        size: u8,
        /// What was written.
        value: u32,
        /// One element of OUTS.
        string: bool,
    },
    /// Access to an address without memory that the bus declined. RIP still points at the instruction.
    Mmio {
        /// Guest physical address.
        gpa: u64,
        /// Access size in bytes.
        size: u8,
        /// What was to be written; `None` for a read.
        write: Option<u64>,
    },
    /// Access that [`crate::BackendVm::protect`] forbids. RIP still points at the instruction.
    Protection {
        /// Guest physical address.
        gpa: u64,
        /// Kind of access.
        access: Access,
    },
    /// HLT, only without a local APIC; RIP is past it.
    Halt,
    /// The guest can take an external interrupt now, as [`crate::Entry::interrupt_window`] asked.
    InterruptWindow,
    /// Somebody called [`crate::BackendVm::kick`], or time has to advance.
    Interrupted,
    /// One instruction was executed, as [`crate::Entry::single_step`] asked.
    SingleStep,
    /// Triple fault: the processor is in shutdown.
    Shutdown,
}

/// Kind of a memory access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch.
    Execute,
}

impl Exit {
    /// Short stable name for counters.
    pub fn name(&self) -> &'static str {
        match self {
            Exit::PortIn { .. } => "port-in",
            Exit::PortOut { .. } => "port-out",
            Exit::Mmio { .. } => "mmio",
            Exit::Protection { .. } => "protection",
            Exit::Halt => "halt",
            Exit::InterruptWindow => "interrupt-window",
            Exit::Interrupted => "interrupted",
            Exit::SingleStep => "single-step",
            Exit::Shutdown => "shutdown",
        }
    }
}
