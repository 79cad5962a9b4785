//! The guest's x87, MMX and SSE registers, in the layout in which FXSAVE64 writes them.
//!
//! This is the state of record: thunks load from it and store to it, FXSAVE and FXRSTOR copy it (Intel SDM vol. 1 table 10-2).
//! x87 registers are held in stack order (`st[0]` is ST0); while TOP is 0, which every MMX instruction sees to, `st[i]` is MMi.

use super::thunk;
use super::xmm::{__m128i, halves, vector, zero};

/// MXCSR bits (Intel SDM vol. 1 section 10.2.3).
pub(super) mod mxcsr {
    /// Sticky exception flags IE DE ZE OE UE PE.
    pub const FLAGS: u32 = 0x3f;
    /// Flags of exceptions that are found before the operation: IE DE ZE.
    pub const BEFORE: u32 = 0x07;
    /// Overflow flag.
    pub const OVERFLOW: u32 = 0x08;
    /// Underflow flag.
    pub const UNDERFLOW: u32 = 0x10;
    /// Inexact result flag.
    pub const PRECISION: u32 = 0x20;
    /// Denormal operands are zero.
    pub const DENORMALS_ARE_ZERO: u32 = 1 << 6;
    /// Tiny results become zero.
    pub const FLUSH_TO_ZERO: u32 = 1 << 15;
    /// Distance between an exception's flag and its mask.
    pub const MASK_SHIFT: u32 = 7;
    /// All six masks; also the value after reset.
    pub const MASKS: u32 = 0x1f80;
}

/// x87 status and control word bits (Intel SDM vol. 1 sections 8.1.3 and 8.1.5).
pub(super) mod x87 {
    /// Exception flags IE DE ZE OE UE PE of the status word; the masks of the control word have the same places.
    pub const FLAGS: u16 = 0x3f;
    /// Stack fault.
    pub const SF: u16 = 1 << 6;
    /// Exception summary: an unmasked exception is pending.
    pub const ES: u16 = 1 << 7;
    /// Place of the three bits of TOP.
    pub const TOP_SHIFT: u16 = 11;
    /// Busy: always the same as ES.
    pub const BUSY: u16 = 1 << 15;
    /// Control word after FNINIT: all masked, extended precision, round to nearest.
    pub const CONTROL_INIT: u16 = 0x37f;
    /// Control word after reset.
    pub const CONTROL_RESET: u16 = 0x40;
    /// Bits of the control word that can be set; bit 6 reads as one.
    pub const CONTROL_BITS: u16 = 0x1f3f;
    /// Bit 6 of the control word, reserved and set by every instruction that loads it.
    pub const CONTROL_FIXED: u16 = 0x40;
    /// Sign and exponent of an x87 register that was written as an MMX register.
    pub const MMX_EXPONENT: u64 = 0xffff;
}

/// x87, MMX and SSE state; see the module.
#[derive(Clone)]
#[repr(C, align(64))]
pub(crate) struct FxArea {
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word.
    pub fsw: u16,
    /// Abridged tag word: one bit for each physical register, set when it is in use.
    pub ftw: u8,
    reserved: u8,
    /// Last x87 opcode (11 bits).
    pub fop: u16,
    /// Last x87 instruction pointer.
    pub fip: u64,
    /// Last x87 data pointer.
    pub fdp: u64,
    /// SSE control and status.
    pub mxcsr: u32,
    /// Which bits of MXCSR may be set: the host's.
    pub mxcsr_mask: u32,
    /// ST0 to ST7: significand, then sign and exponent in the low 16 bits.
    pub st: [[u64; 2]; 8],
    /// XMM0 to XMM15.
    pub xmm: [__m128i; 16],
    unused: [u64; 12],
}

const _: () = assert!(std::mem::size_of::<FxArea>() == 512);
const _: () = assert!(std::mem::offset_of!(FxArea, mxcsr) == 24);
const _: () = assert!(std::mem::offset_of!(FxArea, st) == 32);
const _: () = assert!(std::mem::offset_of!(FxArea, xmm) == 160);

/// Bytes of the FXSAVE layout that hold registers; the rest belongs to software.
pub(super) const FXSAVE_USED: usize = 416;

impl FxArea {
    /// State after power-up and reset (Intel SDM vol. 3 table 10-1). INIT leaves all of it alone.
    pub fn reset() -> FxArea {
        FxArea {
            fcw: x87::CONTROL_RESET,
            fsw: 0,
            ftw: 0xff,
            reserved: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            mxcsr: mxcsr::MASKS,
            mxcsr_mask: thunk::host_mxcsr_mask(),
            st: [[0; 2]; 8],
            xmm: [zero(); 16],
            unused: [0; 12],
        }
    }

    /// FNINIT. The registers keep their contents, though they are empty.
    pub fn initialize_x87(&mut self) {
        self.set_status(0);
        self.fcw = x87::CONTROL_INIT;
        self.ftw = 0;
        self.fop = 0;
        self.fip = 0;
        self.fdp = 0;
    }

    /// All registers as FXSAVE64 writes them.
    pub fn to_bytes(&self) -> [u8; 512] {
        let mut bytes = [0; 512];
        bytes[0..2].copy_from_slice(&self.fcw.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.fsw.to_le_bytes());
        bytes[4] = self.ftw;
        bytes[6..8].copy_from_slice(&self.fop.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.fip.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.fdp.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.mxcsr.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.mxcsr_mask.to_le_bytes());
        let registers = self.st.iter().copied().chain(self.xmm.iter().map(|&x| halves(x)));
        for (slot, [low, high]) in bytes[32..FXSAVE_USED].chunks_exact_mut(16).zip(registers) {
            slot[..8].copy_from_slice(&low.to_le_bytes());
            slot[8..].copy_from_slice(&high.to_le_bytes());
        }
        bytes
    }

    /// Loads all registers as FXRSTOR64 does. `false`, and nothing is changed, when reserved bits of MXCSR are set.
    pub fn load_bytes(&mut self, bytes: &[u8; 512]) -> bool {
        let mut words = bytes.chunks_exact(8).map(|w| w.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)));
        let mut word = || words.next().unwrap_or(0);
        let (control, fip, fdp, sse) = (word(), word(), word(), word());
        let mxcsr = sse as u32;
        if mxcsr & !self.mxcsr_mask != 0 {
            return false;
        }
        self.mxcsr = mxcsr;
        self.fcw = control as u16;
        self.fsw = (control >> 16) as u16;
        self.ftw = (control >> 32) as u8;
        self.fop = (control >> 48) as u16 & 0x7ff;
        self.fip = fip;
        self.fdp = fdp;
        for register in &mut self.st {
            *register = [word(), word() & 0xffff];
        }
        for register in &mut self.xmm {
            let (low, high) = (word(), word());
            *register = vector(low, high);
        }
        self.settle_summary();
        true
    }

    /// Sets the control word as FLDCW does.
    pub fn set_control(&mut self, value: u16) {
        self.fcw = value & x87::CONTROL_BITS | x87::CONTROL_FIXED;
        self.settle_summary();
    }

    /// Sets the status word. The physical registers stay, so what is ST0 changes with TOP.
    pub fn set_status(&mut self, value: u16) {
        let before = self.top();
        self.fsw = value;
        // Physical register i was st[i - before].
        let distance = (self.top() + 8 - before) % 8;
        self.st.rotate_left(distance);
        self.settle_summary();
    }

    /// Makes ES and B follow from the flags and masks, as they always do.
    pub fn settle_summary(&mut self) {
        let pending = self.fsw & !self.fcw & x87::FLAGS != 0;
        self.fsw = self.fsw & !(x87::ES | x87::BUSY) | if pending { x87::ES | x87::BUSY } else { 0 };
    }

    /// Physical register that is ST0.
    pub fn top(&self) -> usize {
        usize::from(self.fsw >> x87::TOP_SHIFT) & 7
    }

    /// What every MMX instruction does first: TOP becomes 0 and all registers valid (Intel SDM vol. 1 section 9.5.1).
    #[inline]
    pub fn enter_mmx(&mut self) {
        self.clear_top();
        self.ftw = 0xff;
    }

    /// The first half of it, which a store of an MMX register has done when it faults.
    #[inline]
    pub fn clear_top(&mut self) {
        if self.top() != 0 {
            self.set_status(self.fsw & !(7 << x87::TOP_SHIFT));
        }
    }

    /// MMX register `r`, once TOP is 0.
    #[inline]
    pub fn mm(&self, r: u8) -> u64 {
        self.st[usize::from(r & 7)][0]
    }

    /// Writes MMX register `r`, once TOP is 0.
    #[inline]
    pub fn set_mm(&mut self, r: u8, value: u64) {
        self.st[usize::from(r & 7)] = [value, x87::MMX_EXPONENT];
    }

    /// XMM register `r`.
    #[inline(always)]
    pub fn x(&self, r: u8) -> __m128i {
        self.xmm[usize::from(r & 15)]
    }

    /// Writes XMM register `r`.
    #[inline(always)]
    pub fn set_x(&mut self, r: u8, value: __m128i) {
        self.xmm[usize::from(r & 15)] = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn area_survives_the_way_through_its_bytes() {
        let mut bytes = [0u8; 512];
        for (i, byte) in bytes.iter_mut().enumerate().take(FXSAVE_USED) {
            *byte = (i * 7 + 1) as u8;
        }
        bytes[5] = 0;
        let mut area = FxArea::reset();
        bytes[24..28].copy_from_slice(&0x1fbf_u32.to_le_bytes());
        bytes[28..32].copy_from_slice(&area.mxcsr_mask.to_le_bytes());
        bytes[7] &= 7;
        for register in bytes[32..160].chunks_exact_mut(16) {
            register[10..].fill(0);
        }
        bytes[0..4].copy_from_slice(&[0x7f, 3, 0x21, 0x38]);
        assert!(area.load_bytes(&bytes));
        assert_eq!(area.to_bytes(), bytes);
        assert_eq!(area.top(), 7);
    }

    #[test]
    fn reserved_mxcsr_bits_are_refused() {
        let mut area = FxArea::reset();
        let mut bytes = area.to_bytes();
        bytes[27] = 0x80;
        bytes[32] = 9;
        assert!(!area.load_bytes(&bytes));
        assert_eq!(area.st[0][0], 0);
    }

    #[test]
    fn mmx_register_is_the_physical_register() {
        let mut area = FxArea::reset();
        area.fsw = 6 << x87::TOP_SHIFT;
        area.st[0] = [66, 1];
        area.st[2] = [10, 2];
        area.enter_mmx();
        assert_eq!((area.mm(6), area.mm(0), area.top()), (66, 10, 0));
    }

    #[test]
    fn unmasked_flag_raises_the_summary() {
        let mut area = FxArea::reset();
        area.initialize_x87();
        area.fsw = 4;
        area.set_control(0x37b);
        assert_eq!(area.fsw, x87::ES | x87::BUSY | 4);
        area.set_control(0x37f);
        assert_eq!(area.fsw, 4);
    }
}
