//! Segment and system descriptors: reading them from the tables and loading segment registers from them.
//!
//! Intel SDM vol. 3 section 3.4.5 (layout), 3.5 (system descriptors), 5.6 to 5.8 (privilege checks).

use vmm::Segment;

use crate::cpu::{CS, Cpu, FS, GS, SS, access, vector};
use crate::op::Trap;

/// System descriptor types (Intel SDM vol. 3 table 3-2).
pub(super) mod kind {
    pub const TSS16_AVAILABLE: u32 = 1;
    pub const LDT: u32 = 2;
    pub const TSS16_BUSY: u32 = 3;
    pub const CALL_GATE16: u32 = 4;
    pub const TASK_GATE: u32 = 5;
    pub const INTERRUPT_GATE16: u32 = 6;
    pub const TRAP_GATE16: u32 = 7;
    pub const TSS_AVAILABLE: u32 = 9;
    pub const TSS_BUSY: u32 = 11;
    pub const CALL_GATE: u32 = 12;
    pub const INTERRUPT_GATE: u32 = 14;
    pub const TRAP_GATE: u32 = 15;
}

/// Type bit of code and data descriptors: has been used.
pub(super) const ACCESSED: u32 = 1;
/// Type bit: readable code, writable data.
const READ_WRITE: u32 = 2;
/// Type bit: conforming code, expand-down data.
const CONFORMING: u32 = 4;
/// Type bit: code.
const CODE: u32 = 8;
/// The bit of a TSS descriptor's type that says busy.
pub(super) const BUSY: u32 = 2;

/// Access rights of flat code and data, without DPL: present, S, accessed, G; code readable, data writable.
pub(super) const FLAT_CODE: u32 = access::G | access::P | access::S | 0xb;
pub(super) const FLAT_DATA: u32 = access::G | access::DB | access::P | access::S | 0x3;

/// A selector as part of an error code: without RPL.
pub(super) fn selector_error(selector: u16) -> u32 {
    u32::from(selector & 0xfffc)
}

/// Whether a selector is null (whatever its RPL).
pub(super) fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// RPL of a selector.
pub(super) fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

/// A descriptor and where it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptor {
    /// Its first eight bytes.
    pub raw: u64,
    /// Linear address of those.
    pub at: u64,
    /// Access rights as in [`Segment::access`].
    pub access: u32,
}

impl Descriptor {
    fn new(raw: u64, at: u64) -> Descriptor {
        Descriptor { raw, at, access: (raw >> 40) as u32 & 0xf0ff }
    }

    pub fn base(&self) -> u64 {
        self.raw >> 16 & 0xff_ffff | (self.raw >> 56) << 24
    }

    pub fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.access & access::G != 0 { limit << 12 | 0xfff } else { limit }
    }

    pub fn dpl(&self) -> u8 {
        (self.access >> access::DPL_SHIFT) as u8 & 3
    }

    pub fn is_present(&self) -> bool {
        self.access & access::P != 0
    }

    pub fn is_code(&self) -> bool {
        self.access & (access::S | CODE) == access::S | CODE
    }

    pub fn is_conforming_code(&self) -> bool {
        self.is_code() && self.access & CONFORMING != 0
    }

    pub fn is_data(&self) -> bool {
        self.access & (access::S | CODE) == access::S
    }

    pub fn is_writable_data(&self) -> bool {
        self.is_data() && self.access & READ_WRITE != 0
    }

    /// Data, or code that may be read.
    pub fn is_readable(&self) -> bool {
        self.is_data() || self.is_code() && self.access & READ_WRITE != 0
    }

    /// 64-bit code.
    pub fn is_long(&self) -> bool {
        self.access & access::L != 0
    }

    pub fn is_default_big(&self) -> bool {
        self.access & access::DB != 0
    }

    /// Type of a system descriptor; `None` for code and data.
    pub fn system(&self) -> Option<u32> {
        if self.access & access::S == 0 { Some(self.access & access::TYPE) } else { None }
    }

    /// What a segment register holds after it was loaded with this.
    pub fn segment(&self, selector: u16) -> Segment {
        Segment { selector, limit: self.limit(), access: self.access, base: self.base() }
    }

    /// Target of a gate.
    pub fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }

    /// Offset in a gate, without the upper half of 64-bit gates.
    pub fn gate_offset(&self) -> u64 {
        self.raw & 0xffff | self.raw >> 32 & 0xffff_0000
    }
}

/// A segment register that holds the null selector. In 64-bit mode its DPL still counts for SS.
pub(super) fn null_segment(selector: u16, dpl: u8) -> Segment {
    Segment { selector, limit: 0, access: access::UNUSABLE | u32::from(dpl) << access::DPL_SHIFT, base: 0 }
}

impl Cpu {
    /// Reads the descriptor that a selector (not null) names; outside its table it is fault `vector` with the selector, `ext`
    /// being the EXT bit of the error code.
    pub(super) fn descriptor(&mut self, selector: u16, vector: u8, ext: u32) -> Result<Descriptor, Trap> {
        let offset = u32::from(selector & !7);
        let (base, limit) = if selector & 4 != 0 {
            if self.ldtr.access & access::UNUSABLE != 0 || self.ldtr.access & access::P == 0 {
                return Err(self.raise_code(vector, selector_error(selector) | ext));
            }
            (self.ldtr.base, self.ldtr.limit)
        } else {
            (self.gdtr.base, u32::from(self.gdtr.limit))
        };
        if offset + 7 > limit {
            return Err(self.raise_code(vector, selector_error(selector) | ext));
        }
        let at = base.wrapping_add(u64::from(offset));
        let raw = self.load_system::<u64>(at)?;
        Ok(Descriptor::new(raw, at))
    }

    /// Upper half of a 16-byte system descriptor of long mode; #GP(selector) when it does not fit or is not well formed.
    pub(super) fn descriptor_high(&mut self, selector: u16, descriptor: &Descriptor) -> Result<u64, Trap> {
        let limit = if selector & 4 != 0 { self.ldtr.limit } else { u32::from(self.gdtr.limit) };
        if u32::from(selector & !7) + 15 > limit {
            return Err(self.raise_code(vector::GP, selector_error(selector)));
        }
        let high = self.load_system::<u64>(descriptor.at.wrapping_add(8))?;
        // Bits 12:8 of the fourth word must be zero (Intel SDM vol. 3 section 3.5).
        if high >> 40 & 0x1f != 0 {
            return Err(self.raise_code(vector::GP, selector_error(selector)));
        }
        Ok(high & 0xffff_ffff)
    }

    /// Sets the accessed bit in the table, if it is not set yet.
    pub(super) fn mark_accessed(&mut self, descriptor: &mut Descriptor) -> Result<(), Trap> {
        if descriptor.access & ACCESSED == 0 {
            self.write_type(descriptor, descriptor.access | ACCESSED)?;
        }
        Ok(())
    }

    /// Writes the type byte of a descriptor to its table.
    pub(super) fn write_type(&mut self, descriptor: &mut Descriptor, access: u32) -> Result<(), Trap> {
        self.store_system::<u8>(descriptor.at.wrapping_add(5), access as u8)?;
        descriptor.access = access;
        Ok(())
    }

    /// Selector load in real and virtual-8086 mode. Real mode keeps the limit that is there.
    pub(super) fn load_segment_real(&mut self, segment: usize, selector: u16) {
        let old = self.seg[segment];
        let (limit, access) = if self.v86() {
            (0xffff, access::P | 3 << access::DPL_SHIFT | access::S | 3)
        } else if segment == CS {
            // The size of code is 16 bits after a far jump.
            (old.limit, access::P | access::S | CODE | READ_WRITE | ACCESSED)
        } else {
            (old.limit, access::P | access::S | READ_WRITE | ACCESSED | old.access & (access::DB | access::G))
        };
        self.seg[segment] = Segment { selector, limit, access, base: u64::from(selector) << 4 };
        if segment == FS || segment == GS {
            self.set_segment_base(segment, u64::from(selector) << 4);
        }
    }

    /// Loads a data or stack segment register as MOV does, in any mode.
    pub(super) fn load_segment(&mut self, segment: usize, selector: u16) -> Result<(), Trap> {
        if !self.protected() {
            self.load_segment_real(segment, selector);
            return Ok(());
        }
        let loaded = if segment == SS { self.checked_stack_segment(selector)? } else { self.checked_data_segment(selector)? };
        self.seg[segment] = loaded;
        if segment == FS || segment == GS {
            self.set_segment_base(segment, loaded.base);
        }
        Ok(())
    }

    fn checked_stack_segment(&mut self, selector: u16) -> Result<Segment, Trap> {
        if is_null(selector) {
            return if self.is_64bit() && self.cpl != 3 && rpl(selector) == self.cpl {
                Ok(null_segment(selector, self.cpl))
            } else {
                Err(self.gp())
            };
        }
        let mut descriptor = self.descriptor(selector, vector::GP, 0)?;
        if rpl(selector) != self.cpl || !descriptor.is_writable_data() || descriptor.dpl() != self.cpl {
            return Err(self.raise_code(vector::GP, selector_error(selector)));
        }
        if !descriptor.is_present() {
            return Err(self.raise_code(vector::SS, selector_error(selector)));
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    fn checked_data_segment(&mut self, selector: u16) -> Result<Segment, Trap> {
        if is_null(selector) {
            return Ok(null_segment(selector, 0));
        }
        let mut descriptor = self.descriptor(selector, vector::GP, 0)?;
        let privileged = !descriptor.is_conforming_code() && rpl(selector).max(self.cpl) > descriptor.dpl();
        if !descriptor.is_readable() || privileged {
            return Err(self.raise_code(vector::GP, selector_error(selector)));
        }
        if !descriptor.is_present() {
            return Err(self.raise_code(vector::NP, selector_error(selector)));
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// Checks a code segment's bits for what the mode allows: L and D both set exist in no mode.
    pub(super) fn check_code_size(&mut self, selector: u16, descriptor: &Descriptor) -> Result<(), Trap> {
        if self.long_mode() && descriptor.is_long() && descriptor.is_default_big() {
            return Err(self.raise_code(vector::GP, selector_error(selector)));
        }
        Ok(())
    }

    /// Checks that execution can go on at `rip` of a code segment: canonical in 64-bit code, else within the limit.
    pub(super) fn check_target(&mut self, descriptor: &Descriptor, rip: u64, error: u32) -> Result<(), Trap> {
        let good = if self.long_mode() && descriptor.is_long() { super::is_canonical(rip) } else { rip <= u64::from(descriptor.limit()) };
        if good { Ok(()) } else { Err(self.raise_code(vector::GP, error)) }
    }
}
