//! CPUID: what this processor says it is, and the instruction.
//!
//! Intel SDM vol. 2, CPUID. Only what is implemented is shown, and of SIMD only what the host has, because it executes it. The
//! model is one of the in-order Atoms (6_36H): true in what matters, for this processor does not speculate either, and operating
//! systems then leave out what they do against speculation, which would cost an interpreter dearly.

use std::arch::is_x86_feature_detected;

use iced_x86::{Instruction, Mnemonic};
use vmm::{CpuidEntry, CpuidTable};

use super::{RAX, RBX, RCX, RDX};
use crate::cpu::Cpu;
use crate::mmu::PHYSICAL_BITS;
use crate::native;
use crate::op::{Flow, Op, Slow, Trap, slow};

/// Family 6, model 36H, stepping 1 (leaf 1 EAX), also in EDX after reset.
pub(crate) const SIGNATURE: u32 = 0x0003_0661;
/// Name in the three brand leaves, at most 47 characters.
const BRAND: &str = "pvbus software x86-64 processor @ 1.00GHz";
/// Last basic and extended leaf.
const LAST_BASIC: u32 = 0x16;
const LAST_EXTENDED: u32 = 0x8000_0008;
const EXTENDED: u32 = 0x8000_0000;
/// Frequency of the time-stamp counter and of the crystal that the APIC timer counts.
const HERTZ: u32 = 1_000_000_000;

/// Leaf 1 EDX and ECX bits that depend on the machine.
const EDX_APIC: u32 = 1 << 9;
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;

/// Makes the op for an instruction of this file.
pub(super) fn lower(insn: &Instruction, op: &mut Op) -> bool {
    if insn.mnemonic() != Mnemonic::Cpuid {
        return false;
    }
    op.run = slow::<Cpuid>;
    true
}

fn bits(list: &[(u32, bool)]) -> u32 {
    list.iter().filter(|(_, on)| *on).fold(0, |bits, (bit, _)| bits | 1 << bit)
}

/// Everything this processor has, on this host.
pub(crate) fn supported() -> CpuidTable {
    let simd = native::features();
    let mut table = CpuidTable::default();
    let mut leaf = |leaf: u32, subleaf: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]| {
        table.set(CpuidEntry { leaf, subleaf, eax, ebx, ecx, edx });
    };
    let text = |text: &[u8], at: usize| u32::from_le_bytes(std::array::from_fn(|n| text.get(at + n).copied().unwrap_or(0)));
    let vendor = b"GenuineIntel";
    leaf(0, None, [LAST_BASIC, text(vendor, 0), text(vendor, 8), text(vendor, 4)]);
    let ecx = bits(&[
        (0, simd.sse3),
        (1, simd.pclmulqdq),
        (9, simd.ssse3),
        (13, is_x86_feature_detected!("cmpxchg16b")),
        (17, true), // PCID
        (19, simd.sse4_1),
        (20, simd.sse4_2),
        (21, true), // x2APIC
        (22, is_x86_feature_detected!("movbe")),
        (23, is_x86_feature_detected!("popcnt")),
        (24, true), // TSC deadline
        (25, simd.aes),
        (30, true), // RDRAND
    ]);
    // FPU DE PSE TSC MSR PAE MCE CX8 APIC SEP MTRR PGE MCA CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2.
    let edx = [0, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26];
    let edx = edx.iter().fold(0, |bits, bit| bits | 1 << bit);
    // Lines of 64 bytes for CLFLUSH.
    leaf(1, None, [SIGNATURE, 8 << 8, ecx, edx]);
    // Caches are described in leaf 4 (descriptor FFH).
    leaf(2, None, [0x00ff_ff01, 0, 0, 0]);
    for (subleaf, [kind, level, kilobytes, ways]) in [[1, 1, 32, 8], [2, 1, 32, 8], [3, 2, 1024, 16]].into_iter().enumerate() {
        let sets = kilobytes * 1024 / 64 / ways;
        // Self-initializing; not shared. Line size, partitions and ways each less one.
        leaf(4, Some(subleaf as u32), [kind | level << 5 | 1 << 8, 63 | (ways - 1) << 22, sets - 1, 0]);
    }
    // The APIC timer always runs.
    leaf(6, None, [1 << 2, 0, 0, 0]);
    let ebx = bits(&[
        (0, true), // FSGSBASE
        (1, true), // TSC_ADJUST
        (3, is_x86_feature_detected!("bmi1")),
        (7, true), // SMEP
        (8, is_x86_feature_detected!("bmi2")),
        (9, true),  // ERMS
        (10, true), // INVPCID
        (18, true), // RDSEED
        (19, is_x86_feature_detected!("adx")),
        (23, true), // CLFLUSHOPT
        (24, true), // CLWB
        (29, simd.sha),
    ]);
    // FSRM, SPEC_CTRL (IBRS, IBPB), STIBP, L1D flush, ARCH_CAPABILITIES, SSBD.
    let edx = bits(&[(4, true), (26, true), (27, true), (28, true), (29, true), (31, true)]);
    leaf(7, Some(0), [0, ebx, 0, edx]);
    // TSC: crystal times 1 / 1. Base and maximum frequency in MHz, bus 100 MHz.
    leaf(0x15, None, [1, 1, HERTZ, 0]);
    leaf(0x16, None, [HERTZ / 1_000_000, HERTZ / 1_000_000, 100, 0]);
    leaf(EXTENDED, None, [LAST_EXTENDED, 0, 0, 0]);
    // LAHF in 64-bit code, LZCNT, PREFETCHW; SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
    let ecx = bits(&[(0, true), (5, is_x86_feature_detected!("lzcnt")), (8, true)]);
    let edx = bits(&[(11, true), (20, true), (26, true), (27, true), (29, true)]);
    leaf(EXTENDED + 1, None, [0, 0, ecx, edx]);
    for n in 0..3 {
        let at = n as usize * 16;
        let brand = BRAND.as_bytes();
        leaf(EXTENDED + 2 + n, None, [text(brand, at), text(brand, at + 4), text(brand, at + 8), text(brand, at + 12)]);
    }
    // L2: 1024 KiB, 16 ways, lines of 64 bytes.
    leaf(EXTENDED + 6, None, [0, 0, 1024 << 16 | 8 << 12 | 64, 0]);
    // The time-stamp counter is invariant.
    leaf(EXTENDED + 7, None, [0, 0, 0, 1 << 8]);
    leaf(EXTENDED + 8, None, [PHYSICAL_BITS | 48 << 8, 0, 0, 0]);
    table
}

struct Cpuid;
impl Slow for Cpuid {
    fn execute(cpu: &mut Cpu, _op: &Op) -> Result<Flow, Trap> {
        cpu.stats.cpuid += 1;
        let [eax, ebx, ecx, edx] = cpu.cpuid(cpu.regs[RAX] as u32, cpu.regs[RCX] as u32);
        cpu.regs[RAX] = eax.into();
        cpu.regs[RBX] = ebx.into();
        cpu.regs[RCX] = ecx.into();
        cpu.regs[RDX] = edx.into();
        Ok(Flow::Next)
    }
}

impl Cpu {
    /// EAX, EBX, ECX and EDX of a leaf, with what differs by processor filled in.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let table = &self.vm.cpuid;
        let last_basic = table.get(0, 0).map_or(0, |entry| entry.eax);
        // A leaf that is too high answers as the last basic one; the hypervisors' range stays empty.
        let leaf = match leaf {
            0x4000_0000..=0x4fff_ffff => leaf,
            0..EXTENDED if leaf > last_basic => last_basic,
            EXTENDED.. if leaf > table.get(EXTENDED, 0).map_or(EXTENDED, |entry| entry.eax) => last_basic,
            _ => leaf,
        };
        if leaf == 0xb {
            return self.topology(subleaf);
        }
        let Some(entry) = table.get(leaf, subleaf) else { return [0; 4] };
        let [eax, mut ebx, mut ecx, mut edx] = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        if leaf == 1 {
            let processors = self.vm.attentions.len() as u32;
            ebx = ebx & 0xffff | self.id << 24 | (processors & 0xff) << 16;
            if processors > 1 {
                /// More than one logical processor in the package: EBX 23:16 says how many.
                const EDX_HTT: u32 = 1 << 28;
                edx |= EDX_HTT;
            }
            match &self.lapic {
                None => {
                    edx &= !EDX_APIC;
                    ecx &= !(ECX_X2APIC | ECX_TSC_DEADLINE);
                }
                Some(lapic) if lapic.apic_base() & abi::apic::APIC_BASE_ENABLE == 0 => edx &= !EDX_APIC,
                Some(_) => {}
            }
        }
        [eax, ebx, ecx, edx]
    }

    /// Leaf 0BH: each processor is a core of one package.
    fn topology(&self, subleaf: u32) -> [u32; 4] {
        let processors = self.vm.attentions.len() as u32;
        let width = processors.next_power_of_two().trailing_zeros();
        let (shift, count, level) = match subleaf {
            0 => (0, 1, 1),
            1 => (width, processors, 2),
            _ => (0, 0, 0),
        };
        [shift, count, level << 8 | subleaf & 0xff, self.id]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_fits_and_the_profile_has_no_xsave() {
        assert!(BRAND.len() < 48);
        let table = supported();
        let one = table.get(1, 0).unwrap();
        assert_eq!(one.ecx & (1 << 26 | 1 << 27 | 1 << 28), 0);
        assert_ne!(one.edx & EDX_APIC, 0);
    }
}
