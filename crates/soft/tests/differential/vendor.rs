//! Where AMD's processors do otherwise than Intel's. The software CPU is an Intel one to its guests, so that such cases have no oracle on an AMD host.
//!
//! AMD APM vol. 1 2.2.3 and vol. 3 (operand-size prefix of near branches, prefixes of string instructions); what an instruction that faults has
//! already done to x87, MMX and SSE state, and which byte of a masked store is told, neither maker specifies.

use iced_x86::{FlowControl, Instruction, Mnemonic};

use crate::generate::Case;
use crate::state::Outcome;

/// Whether the host has its ways from Intel.
pub fn host_is_intel() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    (vendor.ebx, vendor.edx, vendor.ecx) == (0x756e_6547, 0x4965_6e69, 0x6c65_746e)
}

/// Whether makers may differ on this case.
pub fn is_makers_choice(case: &Case, host: &Outcome, guest: &Outcome) -> bool {
    let has = |prefix: u8| legacy_prefixes(&case.bytes).contains(&prefix);
    let instruction = &case.instruction;
    let faulted = host.fault.is_some() || guest.fault.is_some();
    let repeated = has(0xf2) || has(0xf3);
    // In 64-bit mode AMD's near branches with an operand-size prefix go to 16-bit addresses, and a repeat prefix makes LOOPE of LOOPNE; Intel's
    // ignore both.
    let branch = instruction.flow_control() != FlowControl::Next && (has(0x66) || repeated);
    // Which of two repeat prefixes counts; whether a count of 32 bits is extended before the first element; flags when a later one faults.
    let string = instruction.is_string_instruction() && repeated && (has(0xf2) && has(0xf3) || has(0x67) || faulted);
    // PREFETCH of a register is a no-operation for Intel and undefined for AMD.
    let prefetch = format!("{:?}", instruction.code()).ends_with("0F0D");
    // With REX.B it is an exchange of RAX and R8 for AMD.
    let pause = instruction.mnemonic() == Mnemonic::Pause;
    // When a near call to an address that is not canonical faults, Intel's have written the return address and AMD's have not.
    let call = matches!(instruction.flow_control(), FlowControl::Call | FlowControl::IndirectCall) && faulted;
    branch || call || string || prefetch || pause || faulted && has_media_state(instruction)
}

/// Whether it works on x87, MMX or SSE registers.
fn has_media_state(instruction: &Instruction) -> bool {
    let registers = (0..instruction.op_count()).map(|n| instruction.op_register(n));
    instruction.mnemonic() == Mnemonic::Maskmovdqu
        || registers.into_iter().any(|register| register.is_mm() || register.is_xmm() || register.is_st())
        || format!("{:?}", instruction.mnemonic()).starts_with('F')
}

/// The prefixes before the opcode, and REX, of which only one directly before the opcode means anything.
fn legacy_prefixes(bytes: &[u8]) -> &[u8] {
    let is_prefix = |byte: &u8| matches!(byte, 0x40..=0x4f | 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3);
    let end = bytes.iter().position(|byte| !is_prefix(byte)).unwrap_or(bytes.len());
    &bytes[..end]
}
