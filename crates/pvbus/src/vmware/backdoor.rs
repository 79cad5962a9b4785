//! The backdoor: one instruction that carries all registers to VMware and back.
//!
//! [`Backdoor::find`] tries the gates there are and keeps the first behind which VMware answers. A port without VMware reads as all ones and
//! leaves the other registers alone, so an answer counts only when it brings the magic back in EBX, where we did not put it.

use core::fmt;

use abi::vmware::backdoor::{self as words, HYPERCALL_HB, HYPERCALL_OUT, MAGIC, PORT, PORT_HB};
use abi::vmware::{CPUID_VMCALL, CPUID_VMMCALL};

use crate::detect::Interface;
use crate::hal::{Gate, Hal, HalError, Registers, Transfer};

/// A backdoor with VMware behind it.
#[derive(Clone, Copy)]
pub struct Backdoor<'h> {
    hal: &'h dyn Hal,
    gate: Gate,
}

impl<'h> Backdoor<'h> {
    /// Tries the gates: the hypercall that `interface` offers, then IN, then OUT.
    ///
    /// A processor raises #UD on the hypercall of another maker, so those are tried only where the interface says so, and, as in Linux, only
    /// when it names exactly one.
    ///
    /// # Errors
    /// [`BackdoorError`] of the last gate, or that of one that was denied: there is something behind it.
    pub fn find(hal: &'h dyn Hal, interface: Option<&Interface>) -> Result<Backdoor<'h>, BackdoorError> {
        let bits = interface.map_or(0, |interface| interface.features.ecx) & (CPUID_VMCALL | CPUID_VMMCALL);
        let hypercall = match bits {
            CPUID_VMCALL => Some(Gate::Vmcall),
            CPUID_VMMCALL => Some(Gate::Vmmcall),
            _ => None,
        };
        let mut error = BackdoorError::Silent;
        for gate in hypercall.into_iter().chain([Gate::In, Gate::Out]) {
            match Backdoor::through(hal, gate) {
                Ok(backdoor) => return Ok(backdoor),
                Err(BackdoorError::Hal(HalError::Denied)) => error = BackdoorError::Hal(HalError::Denied),
                Err(other) if error != BackdoorError::Hal(HalError::Denied) => error = other,
                Err(_) => {}
            }
        }
        Err(error)
    }

    /// The backdoor behind one gate.
    ///
    /// # Errors
    /// [`BackdoorError::Silent`] when nobody answers as VMware does, [`BackdoorError::Hal`] when the instruction cannot be executed.
    pub fn through(hal: &'h dyn Hal, gate: Gate) -> Result<Backdoor<'h>, BackdoorError> {
        let backdoor = Backdoor { hal, gate };
        let version = backdoor.command(words::GETVERSION, 0, !MAGIC)?;
        // As OpenBSD's vmt_probe: the version must be there, and the speed must not be the magic, which a port that echoes would return.
        if version.eax == words::UNKNOWN || version.ebx != MAGIC || backdoor.command(words::GETMHZ, 0, 0)?.eax == MAGIC {
            return Err(BackdoorError::Silent);
        }
        Ok(backdoor)
    }

    /// The gate in use.
    #[must_use]
    pub const fn gate(&self) -> Gate {
        self.gate
    }

    /// What carries it.
    #[must_use]
    pub const fn hal(&self) -> &'h dyn Hal {
        self.hal
    }

    /// One command with its subcommand and argument.
    ///
    /// # Errors
    /// [`HalError`]. Whether the command exists is in the answer.
    pub fn command(&self, command: u16, sub: u16, ebx: u32) -> Result<Answer, HalError> {
        self.low(command, sub, [ebx, 0, 0, 0])
    }

    /// The host's time of day; `None` when it has no such command.
    ///
    /// # Errors
    /// [`HalError`].
    pub fn time(&self) -> Result<Option<HostTime>, HalError> {
        let full = self.command(words::GETTIMEFULL, 0, 0)?;
        if full.eax == MAGIC {
            let seconds = u64::from(full.esi) << 32 | u64::from(full.edx);
            return Ok(HostTime::checked(seconds, full.ebx, full.ecx));
        }
        let old = self.command(words::GETTIME, 0, 0)?;
        if old.eax == words::UNKNOWN {
            return Ok(None);
        }
        Ok(HostTime::checked(u64::from(old.eax), old.ebx, old.ecx))
    }

    /// A low-bandwidth call: EBX, the high half of EDX (as a word), ESI and EDI in `arguments`.
    pub(super) fn low(&self, command: u16, sub: u16, arguments: [u32; 4]) -> Result<Answer, HalError> {
        let [ebx, edx_high, esi, edi] = arguments;
        let dx = match self.gate {
            Gate::In | Gate::Out => PORT,
            Gate::Vmcall | Gate::Vmmcall => 0,
        };
        let mut registers = Registers {
            rax: u64::from(MAGIC),
            rbx: u64::from(ebx),
            rcx: u64::from(sub) << 16 | u64::from(command),
            rdx: u64::from(edx_high) << 16 | u64::from(dx),
            rsi: u64::from(esi),
            rdi: u64::from(edi),
            rbp: 0,
        };
        self.hal.call(self.gate, &mut registers, Transfer::None)?;
        Ok(Answer::from(&registers))
    }

    /// A high-bandwidth call. The cookie goes where the transfer leaves room: EBP and EDI towards the host, ESI and EBP from it.
    pub(super) fn high(&self, ebx: u32, channel: u16, cookie: (u32, u32), transfer: Transfer<'_>) -> Result<Answer, HalError> {
        let (high, low) = (u64::from(cookie.0), u64::from(cookie.1));
        let (rbp, rsi, rdi, flags, length) = match &transfer {
            Transfer::Out(data) => (high, 0, low, HYPERCALL_HB | HYPERCALL_OUT, data.len()),
            Transfer::In(data) => (low, high, 0, HYPERCALL_HB, data.len()),
            Transfer::None => (high, 0, low, HYPERCALL_HB, 0),
            // The backdoor moves bytes one way at a time.
            Transfer::Exchange(_) => return Err(HalError::Unavailable),
        };
        let dx = match self.gate {
            Gate::In | Gate::Out => PORT_HB,
            Gate::Vmcall | Gate::Vmmcall => flags,
        };
        let mut registers = Registers {
            rax: u64::from(MAGIC),
            rbx: u64::from(ebx),
            rcx: length as u64,
            rdx: u64::from(channel) << 16 | u64::from(dx),
            rsi,
            rdi,
            rbp,
        };
        self.hal.call(self.gate, &mut registers, transfer)?;
        Ok(Answer::from(&registers))
    }
}

/// Registers of an answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Answer {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
    /// ESI.
    pub esi: u32,
    /// EDI.
    pub edi: u32,
}

impl From<&Registers> for Answer {
    fn from(registers: &Registers) -> Answer {
        // The backdoor's registers are 32 bits wide; the upper halves are nobody's.
        let low = |register: u64| {
            let [a, b, c, d, ..] = register.to_le_bytes();
            u32::from_le_bytes([a, b, c, d])
        };
        Answer {
            eax: low(registers.rax),
            ebx: low(registers.rbx),
            ecx: low(registers.rcx),
            edx: low(registers.rdx),
            esi: low(registers.rsi),
            edi: low(registers.rdi),
        }
    }
}

/// The host's time of day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostTime {
    /// Seconds since 1970.
    pub seconds: u64,
    /// Microseconds of that second.
    pub microseconds: u32,
    /// By how many microseconds the machine's own clock may lag behind before the host wants it corrected.
    pub max_lag: u32,
}

impl HostTime {
    /// A time with microseconds that are none is no time.
    fn checked(seconds: u64, microseconds: u32, max_lag: u32) -> Option<HostTime> {
        (microseconds < 1_000_000).then_some(HostTime { seconds, microseconds, max_lag })
    }
}

/// Why there is no backdoor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackdoorError {
    /// The instruction works, but nobody answers as VMware does.
    Silent,
    /// The instruction cannot be executed.
    Hal(HalError),
}

impl From<HalError> for BackdoorError {
    fn from(error: HalError) -> BackdoorError {
        BackdoorError::Hal(error)
    }
}

impl fmt::Display for BackdoorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BackdoorError::Silent => f.write_str("nobody answers at VMware's backdoor"),
            BackdoorError::Hal(error) => write!(f, "VMware's backdoor cannot be reached: {error}"),
        }
    }
}

impl core::error::Error for BackdoorError {}
