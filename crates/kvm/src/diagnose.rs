//! What to tell a person when KVM gives up.
//!
//! KVM_EXIT_INTERNAL_ERROR and KVM_EXIT_FAIL_ENTRY say nothing that helps: the text here adds the registers, the bytes at RIP (found
//! through the guest's page tables by KVM_TRANSLATE), what instruction they are, and the way out.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::sync::{Mutex, PoisonError};

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};
use vmm::{GuestMemory, RegisterMask, Registers, VcpuId};

use crate::restart::Linear;
use crate::state;

/// The longest instruction there is (Intel SDM vol. 2 section 2.3.11).
pub(crate) const LONGEST_INSTRUCTION: usize = 15;
/// Bits of [`vmm::Segment::access`]: 64-bit code, 32-bit code.
const ACCESS_L: u32 = 1 << 13;
const ACCESS_DB: u32 = 1 << 14;
const EFER_LMA: u64 = 1 << 10;
const CR0_PE: u64 = 1;
/// Logged MSRs are remembered so that a guest cannot fill the log; and so is not more than this of them.
const MSRS_LOGGED: usize = 256;

/// KVM's suberrors (linux/kvm.h, KVM_INTERNAL_ERROR_*).
pub(crate) fn internal(suberror: u32) -> String {
    let meaning = match suberror {
        1 => "emulation failure: it cannot execute the instruction at RIP",
        2 => "two events at once",
        3 => "an event could not be delivered",
        4 => "an exit that it does not know",
        _ => "unknown",
    };
    format!("internal error of KVM, suberror {suberror} ({meaning})")
}

/// The whole text for a processor that cannot go on.
pub(crate) fn report(fd: &VcpuFd, memory: &GuestMemory, id: VcpuId, what: &str) -> String {
    let mut text = format!("processor {id} cannot go on: {what}\n");
    match state::read(fd, memory, RegisterMask::all()) {
        Ok(registers) => {
            let _ = writeln!(text, "{registers}");
            let linear = linear_rip(&registers);
            let bytes = Guest { fd, memory }.read(linear, LONGEST_INSTRUCTION);
            text.push_str(&instruction_text(&bytes, linear, bitness(&registers)));
        }
        Err(error) => {
            let _ = writeln!(text, "its registers cannot be read: {error}");
        }
    }
    text.push_str("The software CPU executes everything: try --backend soft");
    text
}

/// Guest physical address that RIP points at.
pub(crate) fn rip_address(fd: &VcpuFd) -> Option<u64> {
    let regs = fd.get_regs().ok()?;
    let special = fd.get_sregs().ok()?;
    let base = if special.cs.l != 0 { 0 } else { special.cs.base };
    translate(fd, base.wrapping_add(regs.rip))
}

/// Logs an MSR that nobody has, once for each.
pub(crate) fn unknown_msr(index: u32, written: Option<u64>) {
    static LOGGED: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());
    let mut logged = LOGGED.lock().unwrap_or_else(PoisonError::into_inner);
    if logged.len() < MSRS_LOGGED && logged.insert(index) {
        tracing::info!(msr = format_args!("{index:#x}"), ?written, "unknown MSR: #GP");
    }
}

fn linear_rip(registers: &Registers) -> u64 {
    if bitness(registers) == 64 { registers.rip } else { registers.cs.base.wrapping_add(registers.rip) & 0xffff_ffff }
}

/// Width of the code that runs: 16, 32 or 64.
pub(crate) fn bitness(registers: &Registers) -> u32 {
    if registers.efer & EFER_LMA != 0 && registers.cs.access & ACCESS_L != 0 {
        64
    } else if registers.cr0 & CR0_PE != 0 && registers.cs.access & ACCESS_DB != 0 {
        32
    } else {
        16
    }
}

fn translate(fd: &VcpuFd, linear: u64) -> Option<u64> {
    fd.translate_gva(linear).ok().filter(|t| t.valid != 0).map(|t| t.physical_address)
}

/// A guest's memory as its processor sees it.
pub(crate) struct Guest<'a> {
    pub fd: &'a VcpuFd,
    pub memory: &'a GuestMemory,
}

impl Linear for Guest<'_> {
    fn translate(&self, linear: u64) -> Option<u64> {
        translate(self.fd, linear)
    }

    fn read(&self, linear: u64, length: usize) -> Vec<u8> {
        let byte = |offset: usize| {
            let gpa = translate(self.fd, linear.wrapping_add(offset as u64))?;
            self.memory.read_obj(GuestAddress(gpa)).ok()
        };
        (0..length).map_while(byte).collect()
    }
}

fn instruction_text(bytes: &[u8], linear: u64, bitness: u32) -> String {
    if bytes.is_empty() {
        return format!("no memory is mapped at {linear:#x}, where RIP points\n");
    }
    let mut text = String::from("bytes at RIP:");
    for byte in bytes {
        let _ = write!(text, " {byte:02x}");
    }
    let instruction = Decoder::with_ip(bitness, bytes, linear, DecoderOptions::NONE).decode();
    text.push_str("\ninstruction:  ");
    if instruction.is_invalid() {
        text.push_str("none that is known");
    } else {
        IntelFormatter::new().format(&instruction, &mut text);
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_with_their_instruction() {
        let text = instruction_text(&[0xf0, 0x48, 0x0f, 0xc7, 0x0f], 0x1000, 64);
        assert_eq!(text, "bytes at RIP: f0 48 0f c7 0f\ninstruction:  lock cmpxchg16b [rdi]\n");
    }

    #[test]
    fn unmapped_and_undecodable_places_are_said_to_be_so() {
        assert!(instruction_text(&[], 0xdead, 64).contains("no memory is mapped at 0xdead"));
        assert!(instruction_text(&[0x06], 0, 64).contains("none that is known"));
    }

    #[test]
    fn mode_decides_the_instruction_width() {
        let mut registers = Registers::reset();
        assert_eq!((bitness(&registers), linear_rip(&registers)), (16, 0xffff_fff0));
        registers.cr0 |= 1;
        registers.cs.access = 0x409b;
        assert_eq!(bitness(&registers), 32);
        registers.efer = EFER_LMA;
        registers.cs.access = 0xa09b;
        assert_eq!(bitness(&registers), 64);
    }
}
