//! Local APIC and I/O APIC: register offsets, model-specific registers and the fields of messages.
//!
//! Intel SDM vol. 3 chapter 11 (local APIC; section and table numbers of the December 2023 edition) and the
//! 82093AA I/O APIC data sheet (order 290566).

/// IA32_APIC_BASE, SDM 11.4.4.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE, SDM 11.5.4.1.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// First x2APIC register MSR, SDM table 11-6: MMIO offset / 16 is added to it.
pub const MSR_X2APIC_FIRST: u32 = 0x800;
/// Last MSR of the x2APIC range that holds a register (SELF IPI).
pub const MSR_X2APIC_LAST: u32 = 0x83f;

/// IA32_APIC_BASE: this processor is the bootstrap processor.
pub const APIC_BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
pub const APIC_BASE_EXTD: u64 = 1 << 10;
/// IA32_APIC_BASE: globally enabled.
pub const APIC_BASE_ENABLE: u64 = 1 << 11;
/// Where the registers are after reset.
pub const APIC_DEFAULT_BASE: u64 = 0xfee0_0000;

/// Offsets of the xAPIC's registers from its base, SDM table 11-1.
pub mod offset {
    /// Local APIC ID.
    pub const ID: u64 = 0x020;
    /// Version.
    pub const VERSION: u64 = 0x030;
    /// Task priority.
    pub const TPR: u64 = 0x080;
    /// Arbitration priority.
    pub const APR: u64 = 0x090;
    /// Processor priority.
    pub const PPR: u64 = 0x0a0;
    /// End of interrupt.
    pub const EOI: u64 = 0x0b0;
    /// Remote read.
    pub const RRD: u64 = 0x0c0;
    /// Logical destination.
    pub const LDR: u64 = 0x0d0;
    /// Destination format.
    pub const DFR: u64 = 0x0e0;
    /// Spurious interrupt vector.
    pub const SVR: u64 = 0x0f0;
    /// First of eight in-service registers.
    pub const ISR: u64 = 0x100;
    /// First of eight trigger mode registers.
    pub const TMR: u64 = 0x180;
    /// First of eight interrupt request registers.
    pub const IRR: u64 = 0x200;
    /// Error status.
    pub const ESR: u64 = 0x280;
    /// Interrupt command, bits 31:0.
    pub const ICR_LOW: u64 = 0x300;
    /// Interrupt command, bits 63:32.
    pub const ICR_HIGH: u64 = 0x310;
    /// LVT timer.
    pub const LVT_TIMER: u64 = 0x320;
    /// LVT thermal sensor.
    pub const LVT_THERMAL: u64 = 0x330;
    /// LVT performance counters.
    pub const LVT_PMC: u64 = 0x340;
    /// LVT LINT0.
    pub const LVT_LINT0: u64 = 0x350;
    /// LVT LINT1.
    pub const LVT_LINT1: u64 = 0x360;
    /// LVT error.
    pub const LVT_ERROR: u64 = 0x370;
    /// Timer initial count.
    pub const INITIAL_COUNT: u64 = 0x380;
    /// Timer current count.
    pub const CURRENT_COUNT: u64 = 0x390;
    /// Timer divide configuration.
    pub const DIVIDE: u64 = 0x3e0;
    /// Self IPI, x2APIC only.
    pub const SELF_IPI: u64 = 0x3f0;
}

/// SVR: APIC software enable.
pub const SVR_ENABLE: u32 = 1 << 8;
/// SVR: focus processor checking off (kept, without effect).
pub const SVR_NO_FOCUS: u32 = 1 << 9;

/// LVT: delivery mode field.
pub const LVT_MODE: u32 = 7 << 8;
/// LVT, LINT0 and LINT1: remote IRR.
pub const LVT_REMOTE_IRR: u32 = 1 << 14;
/// LVT, LINT0 and LINT1: level triggered.
pub const LVT_LEVEL: u32 = 1 << 15;
/// LVT: masked.
pub const LVT_MASKED: u32 = 1 << 16;
/// LVT timer: periodic.
pub const LVT_TIMER_PERIODIC: u32 = 1 << 17;
/// LVT timer: TSC deadline.
pub const LVT_TIMER_DEADLINE: u32 = 1 << 18;

/// ESR: a message with an illegal vector was sent.
pub const ESR_SEND_ILLEGAL: u32 = 1 << 5;
/// ESR: a message with an illegal vector was received.
pub const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
/// ESR: access to a register that does not exist.
pub const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;

/// Delivery modes as the ICR, LVTs, redirection entries and messages hold them, SDM figure 11-12.
pub mod delivery {
    /// The vector goes to the destination.
    pub const FIXED: u8 = 0;
    /// The vector goes to one of the destinations.
    pub const LOWEST_PRIORITY: u8 = 1;
    /// System management interrupt.
    pub const SMI: u8 = 2;
    /// Non-maskable interrupt.
    pub const NMI: u8 = 4;
    /// INIT.
    pub const INIT: u8 = 5;
    /// Start-up; the vector is the page number.
    pub const STARTUP: u8 = 6;
    /// The vector comes from an 8259.
    pub const EXTINT: u8 = 7;
}

/// ICR and messages: destination mode is logical.
pub const ICR_LOGICAL: u32 = 1 << 11;
/// ICR and message data: level is assert.
pub const ICR_ASSERT: u32 = 1 << 14;
/// ICR and message data: trigger mode is level.
pub const ICR_LEVEL: u32 = 1 << 15;

/// Message address of destination 0, physical mode, SDM 11.11.1.
pub const MSI_ADDRESS_BASE: u64 = 0xfee0_0000;
/// Message address: redirection hint.
pub const MSI_ADDRESS_HINT: u64 = 1 << 3;
/// Message address: destination mode is logical.
pub const MSI_ADDRESS_LOGICAL: u64 = 1 << 2;
/// Message address: where the 8-bit destination starts.
pub const MSI_DESTINATION_SHIFT: u32 = 12;
/// Message data: level triggered.
pub const MSI_DATA_LEVEL: u32 = 1 << 15;

/// Where the I/O APIC of a PC is.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Offset of the I/O APIC's index register.
pub const IOAPIC_REGSEL: u64 = 0x00;
/// Offset of its data window.
pub const IOAPIC_WINDOW: u64 = 0x10;
/// Offset of the EOI register of versions 0x20 and later.
pub const IOAPIC_EOI: u64 = 0x40;
/// Index of the identification register.
pub const IOAPIC_REG_ID: u8 = 0x00;
/// Index of the version register.
pub const IOAPIC_REG_VERSION: u8 = 0x01;
/// Index of the arbitration register.
pub const IOAPIC_REG_ARBITRATION: u8 = 0x02;
/// Index of the low half of the first redirection entry.
pub const IOAPIC_REG_REDIRECTION: u8 = 0x10;

/// Redirection entry: destination mode is logical.
pub const REDIRECTION_LOGICAL: u64 = 1 << 11;
/// Redirection entry: delivery status, send pending (read only).
pub const REDIRECTION_PENDING: u64 = 1 << 12;
/// Redirection entry: input is active low (kept; our lines carry the logical level).
pub const REDIRECTION_ACTIVE_LOW: u64 = 1 << 13;
/// Redirection entry: remote IRR (read only).
pub const REDIRECTION_REMOTE_IRR: u64 = 1 << 14;
/// Redirection entry: level triggered.
pub const REDIRECTION_LEVEL: u64 = 1 << 15;
/// Redirection entry: masked.
pub const REDIRECTION_MASKED: u64 = 1 << 16;
