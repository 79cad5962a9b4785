//! RFLAGS of the processor.
//!
//! The six arithmetic flags are kept as the host's processor made them: guest and host are the same architecture, so an ALU
//! handler executes the guest's own instruction and takes the result's flags with `LAHF` and `SETO`. That is as cheap as saving
//! operands for later, needs no case analysis when somebody asks, is exact at every instruction (exception frames show it), and
//! makes undefined flags what this processor makes of them. All other bits live in `Cpu::rflags`.
//!
//! ```text
//!   bit   15 14 13 12 11 10  9  8   7..1   0
//!         SF ZF  0 AF  0 PF  1 CF    0    OF     = AX after LAHF; SETO AL
//! ```

use crate::cpu::{Cpu, rflags};

/// The arithmetic flags; the picture is in the module's description.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub(crate) struct StatusFlags(pub(crate) u16);

impl StatusFlags {
    /// SF ZF AF PF CF as `LAHF` leaves them in AH: RFLAGS bits 7:0.
    const LOW_SHIFT: u32 = 8;
    /// Where RFLAGS has OF.
    const OVERFLOW_SHIFT: u32 = 11;
    /// CF in this layout.
    pub const CARRY: u16 = 1 << Self::LOW_SHIFT;
    /// ZF in this layout.
    pub const ZERO: u16 = 1 << (6 + Self::LOW_SHIFT);

    /// What logic operations leave for a result of zero: ZF and PF.
    pub const ZERO_RESULT: StatusFlags = StatusFlags(Self::ZERO | 1 << (2 + Self::LOW_SHIFT));

    /// From RFLAGS; the other bits are ignored.
    #[inline(always)]
    pub fn from_rflags(flags: u64) -> StatusFlags {
        let low = (flags & (rflags::STATUS & 0xff)) << Self::LOW_SHIFT;
        StatusFlags(low as u16 | ((flags >> Self::OVERFLOW_SHIFT) & 1) as u16)
    }

    /// As bits of RFLAGS.
    #[inline(always)]
    pub fn rflags(self) -> u64 {
        let low = u64::from(self.0 >> Self::LOW_SHIFT) & (rflags::STATUS & 0xff);
        low | u64::from(self.0 & 1) << Self::OVERFLOW_SHIFT
    }

    /// CF.
    #[inline(always)]
    pub fn carry(self) -> bool {
        self.0 & Self::CARRY != 0
    }

    /// The same with another CF.
    #[inline(always)]
    pub fn with_carry(self, carry: bool) -> StatusFlags {
        StatusFlags(self.0 & !Self::CARRY | u16::from(carry) << Self::LOW_SHIFT)
    }

    /// The same with another ZF.
    #[inline(always)]
    pub fn with_zero(self, zero: bool) -> StatusFlags {
        StatusFlags(self.0 & !Self::ZERO | u16::from(zero) << (6 + Self::LOW_SHIFT))
    }

    /// Whether a condition that is known beforehand holds; `CC` as in [`StatusFlags::condition`].
    #[inline(always)]
    pub fn holds<const CC: u8>(self) -> bool {
        let has = |flag: u64| self.0 & StatusFlags::from_rflags(flag).0 != 0;
        let less = || has(rflags::SF) != has(rflags::OF);
        let holds = match CC >> 1 {
            0 => has(rflags::OF),
            1 => has(rflags::CF),
            2 => has(rflags::ZF),
            3 => has(rflags::CF | rflags::ZF),
            4 => has(rflags::SF),
            5 => has(rflags::PF),
            6 => less(),
            _ => less() || has(rflags::ZF),
        };
        holds != (CC & 1 != 0)
    }

    /// Whether a condition holds, `cc` being the low four bits of the Jcc opcode (Intel SDM vol. 1 appendix B.1).
    #[inline(always)]
    pub fn condition(self, cc: u8) -> bool {
        let index = self.0.rotate_left(Self::LOW_SHIFT) & 0x1ff;
        CONDITIONS[usize::from(index)] >> (cc & 15) & 1 != 0
    }
}

/// For each combination of flags (LAHF's byte, OF in bit 8) the set of conditions that hold, condition code `cc` in bit `cc`.
static CONDITIONS: [u16; 512] = {
    let mut table = [0; 512];
    let mut index = 0;
    while index < 512 {
        let flags = index as u64;
        let carry = flags & rflags::CF != 0;
        let zero = flags & rflags::ZF != 0;
        let sign = flags & rflags::SF != 0;
        let parity = flags & rflags::PF != 0;
        let overflow = flags & 0x100 != 0;
        let less = sign != overflow;
        let holds = [overflow, carry, zero, carry || zero, sign, parity, less, less || zero];
        let mut cc = 0;
        while cc < 8 {
            table[index] |= if holds[cc] { 1 << (2 * cc) } else { 2 << (2 * cc) };
            cc += 1;
        }
        index += 1;
    }
    table
};

impl Cpu {
    /// All of RFLAGS.
    #[inline(always)]
    pub fn flags(&self) -> u64 {
        self.rflags | self.status_flags.rflags()
    }

    /// Sets all of RFLAGS, without any checks.
    #[inline(always)]
    pub fn set_flags(&mut self, flags: u64) {
        self.rflags = flags & !rflags::STATUS | rflags::FIXED;
        self.status_flags = StatusFlags::from_rflags(flags);
    }

    /// The six arithmetic flags, in their places in RFLAGS.
    #[inline(always)]
    pub fn status(&self) -> u64 {
        self.status_flags.rflags()
    }

    /// Sets the six arithmetic flags from their places in RFLAGS; the other bits of `flags` are ignored.
    #[inline(always)]
    pub fn set_status(&mut self, flags: u64) {
        self.status_flags = StatusFlags::from_rflags(flags);
    }

    /// Whether the condition with this code (low four bits of the Jcc opcode) holds.
    #[inline(always)]
    pub fn condition(&self, cc: u8) -> bool {
        self.status_flags.condition(cc)
    }

    /// CF.
    #[inline(always)]
    pub fn carry(&self) -> bool {
        self.status_flags.carry()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_survives_the_round_trip() {
        for bits in 0..1 << 12 {
            let flags = bits & rflags::STATUS;
            assert_eq!(StatusFlags::from_rflags(bits).rflags(), flags);
        }
    }

    #[test]
    fn conditions_follow_the_manual() {
        for bits in 0..1u64 << 12 {
            let status = StatusFlags::from_rflags(bits);
            let has = |flag| bits & flag != 0;
            let less = has(rflags::SF) != has(rflags::OF);
            let expected = [
                has(rflags::OF),
                has(rflags::CF),
                has(rflags::ZF),
                has(rflags::CF) || has(rflags::ZF),
                has(rflags::SF),
                has(rflags::PF),
                less,
                less || has(rflags::ZF),
            ];
            for (pair, &holds) in expected.iter().enumerate() {
                let cc = 2 * pair as u8;
                assert_eq!(status.condition(cc), holds, "flags {bits:x} condition {cc}");
                assert_eq!(status.condition(cc + 1), !holds, "flags {bits:x} condition {}", cc + 1);
            }
        }
    }
}
