//! Registers between KVM's structures and ours.
//!
//! KVM keeps them in four places: KVM_GET_REGS (general), KVM_GET_SREGS (segments, control registers, EFER),
//! KVM_GET_MSRS, and KVM_GET_DEBUGREGS with KVM_GET_XCRS. What belongs together in the processor (CR0.PG with EFER.LMA, say) has to be
//! written in one KVM_SET_SREGS, so a write reads what is there, changes the groups asked for, and writes it back once.

use kvm_bindings::{Msrs, kvm_debugregs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};
use vmm::{BackendError, DescriptorTable, GuestMemory, RegisterMask, Registers, Segment};

use crate::host_error;

/// Indices of the MSRs in `struct vcpu_reg_state`, without EFER, in [`Registers`]' order (Intel SDM vol. 4 table 2-2).
const MSRS: [u32; 6] = [
    0xc000_0081, // STAR
    0xc000_0082, // LSTAR
    0xc000_0083, // CSTAR
    0xc000_0084, // SFMASK
    0xc000_0102, // KERNEL_GS_BASE
    0x0000_01a0, // MISC_ENABLE
];

const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LMA: u64 = 1 << 10;
/// CR3 bits that hold the page-directory-pointer table's address in PAE paging.
const PAE_TABLE: u64 = 0xffff_ffe0;

/// Access-rights bits of [`Segment::access`] (Intel SDM vol. 3 table 25-2).
const ACCESS_S: u32 = 4;
const ACCESS_DPL: u32 = 5;
const ACCESS_P: u32 = 7;
const ACCESS_AVL: u32 = 12;
const ACCESS_L: u32 = 13;
const ACCESS_DB: u32 = 14;
const ACCESS_G: u32 = 15;
const ACCESS_UNUSABLE: u32 = 16;

/// Reads the groups in `mask`.
pub(crate) fn read(fd: &VcpuFd, memory: &GuestMemory, mask: RegisterMask) -> Result<Registers, BackendError> {
    let mut registers = Registers::default();
    if mask.contains(RegisterMask::GPR) {
        general_from_kvm(&fd.get_regs().map_err(|e| host_error("KVM_GET_REGS", e))?, &mut registers);
    }
    if mask.intersects(RegisterMask::SEGMENT | RegisterMask::CONTROL | RegisterMask::MSR) {
        let special = fd.get_sregs().map_err(|e| host_error("KVM_GET_SREGS", e))?;
        if mask.contains(RegisterMask::SEGMENT) {
            segments_from_kvm(&special, &mut registers);
        }
        if mask.contains(RegisterMask::CONTROL) {
            registers.cr0 = special.cr0;
            registers.cr2 = special.cr2;
            registers.cr3 = special.cr3;
            registers.cr4 = special.cr4;
            registers.cr8 = special.cr8;
            registers.xcr0 = xcr0(fd);
            registers.pdpte = page_directory_pointers(&special, memory);
        }
        if mask.contains(RegisterMask::MSR) {
            registers.efer = special.efer;
            let values = MSRS.map(|index| get_msr(fd, index).unwrap_or(0));
            [registers.star, registers.lstar, registers.cstar, registers.sfmask, registers.kernel_gs_base, registers.misc_enable] = values;
        }
    }
    if mask.contains(RegisterMask::DEBUG) {
        let debug = fd.get_debug_regs().map_err(|e| host_error("KVM_GET_DEBUGREGS", e))?;
        registers.dr = debug.db;
        registers.dr6 = debug.dr6;
        registers.dr7 = debug.dr7;
    }
    Ok(registers)
}

/// Writes the groups in `mask`.
pub(crate) fn write(fd: &VcpuFd, registers: &Registers, mask: RegisterMask) -> Result<(), BackendError> {
    if mask.intersects(RegisterMask::SEGMENT | RegisterMask::CONTROL | RegisterMask::MSR) {
        let mut special = fd.get_sregs().map_err(|e| host_error("KVM_GET_SREGS", e))?;
        if mask.contains(RegisterMask::SEGMENT) {
            segments_to_kvm(registers, &mut special);
        }
        if mask.contains(RegisterMask::CONTROL) {
            special.cr0 = registers.cr0;
            special.cr2 = registers.cr2;
            special.cr3 = registers.cr3;
            special.cr4 = registers.cr4;
            special.cr8 = registers.cr8;
        }
        if mask.contains(RegisterMask::MSR) {
            special.efer = registers.efer;
        }
        // Events under way are kept by KVM_SET_VCPU_EVENTS, not by this bitmap.
        special.interrupt_bitmap = [0; 4];
        fd.set_sregs(&special).map_err(|e| refused("control or segment registers", e))?;
    }
    if mask.contains(RegisterMask::CONTROL) && registers.xcr0 != xcr0(fd) {
        let mut xcrs = fd.get_xcrs().map_err(|e| host_error("KVM_GET_XCRS", e))?;
        xcrs.nr_xcrs = 1;
        xcrs.xcrs[0].xcr = 0;
        xcrs.xcrs[0].value = registers.xcr0;
        fd.set_xcrs(&xcrs).map_err(|e| refused("XCR0", e))?;
    }
    if mask.contains(RegisterMask::MSR) {
        let values = [registers.star, registers.lstar, registers.cstar, registers.sfmask, registers.kernel_gs_base, registers.misc_enable];
        for (index, value) in MSRS.into_iter().zip(values) {
            // Only what changes: some are not writable on every host, MISC_ENABLE above all.
            if get_msr(fd, index)? != value {
                set_msr(fd, index, value)?;
            }
        }
    }
    if mask.contains(RegisterMask::DEBUG) {
        let debug = kvm_debugregs { db: registers.dr, dr6: registers.dr6, dr7: registers.dr7, ..Default::default() };
        fd.set_debug_regs(&debug).map_err(|e| refused("debug registers", e))?;
    }
    if mask.contains(RegisterMask::GPR) {
        fd.set_regs(&general_to_kvm(registers)).map_err(|e| refused("general registers", e))?;
    }
    Ok(())
}

/// Reads one MSR; `Invalid` where KVM has none.
pub(crate) fn get_msr(fd: &VcpuFd, index: u32) -> Result<u64, BackendError> {
    let mut msrs = one_msr(index, 0);
    match fd.get_msrs(&mut msrs) {
        Ok(1) => Ok(msrs.as_slice()[0].data),
        Ok(_) => Err(BackendError::Invalid(format!("KVM has no MSR {index:#x}"))),
        Err(e) => Err(host_error("KVM_GET_MSRS", e)),
    }
}

/// Writes one MSR; `Invalid` where KVM has none or does not take the value.
pub(crate) fn set_msr(fd: &VcpuFd, index: u32, value: u64) -> Result<(), BackendError> {
    match fd.set_msrs(&one_msr(index, value)) {
        Ok(1) => Ok(()),
        Ok(_) => Err(BackendError::Invalid(format!("KVM does not take {value:#x} in MSR {index:#x}"))),
        Err(e) => Err(host_error("KVM_SET_MSRS", e)),
    }
}

fn one_msr(index: u32, data: u64) -> Msrs {
    Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]).expect("one entry is within KVM_MAX_MSR_ENTRIES")
}

/// XCR0, or its reset value where the host has no XSAVE.
fn xcr0(fd: &VcpuFd) -> u64 {
    fd.get_xcrs().ok().filter(|x| x.nr_xcrs > 0).map_or(1, |x| x.xcrs[0].value)
}

/// KVM_GET_SREGS does not tell them; what the guest's memory holds is what the processor loaded, unless the guest changed
/// the table since without reloading CR3.
fn page_directory_pointers(special: &kvm_sregs, memory: &GuestMemory) -> [u64; 4] {
    let pae = special.cr0 & CR0_PG != 0 && special.cr4 & CR4_PAE != 0 && special.efer & EFER_LMA == 0;
    let mut bytes = [0u8; 32];
    if !pae || memory.read_slice(&mut bytes, GuestAddress(special.cr3 & PAE_TABLE)).is_err() {
        return [0; 4];
    }
    let mut pointers = [0; 4];
    for (pointer, chunk) in pointers.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *pointer = u64::from_le_bytes(*chunk);
    }
    pointers
}

fn refused(what: &str, error: kvm_ioctls::Error) -> BackendError {
    if error.errno() == libc::EINVAL {
        BackendError::Invalid(format!("KVM refuses these values of the {what}"))
    } else {
        host_error(what, error)
    }
}

fn general_from_kvm(r: &kvm_regs, out: &mut Registers) {
    out.gpr = [r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15];
    out.rip = r.rip;
    out.rflags = r.rflags;
}

fn general_to_kvm(r: &Registers) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = r.gpr;
    let (rip, rflags) = (r.rip, r.rflags);
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

fn segments_from_kvm(special: &kvm_sregs, out: &mut Registers) {
    out.es = segment_from_kvm(&special.es);
    out.cs = segment_from_kvm(&special.cs);
    out.ss = segment_from_kvm(&special.ss);
    out.ds = segment_from_kvm(&special.ds);
    out.fs = segment_from_kvm(&special.fs);
    out.gs = segment_from_kvm(&special.gs);
    out.ldtr = segment_from_kvm(&special.ldt);
    out.tr = segment_from_kvm(&special.tr);
    out.gdtr = DescriptorTable { base: special.gdt.base, limit: special.gdt.limit };
    out.idtr = DescriptorTable { base: special.idt.base, limit: special.idt.limit };
}

fn segments_to_kvm(r: &Registers, special: &mut kvm_sregs) {
    special.es = segment_to_kvm(&r.es);
    special.cs = segment_to_kvm(&r.cs);
    special.ss = segment_to_kvm(&r.ss);
    special.ds = segment_to_kvm(&r.ds);
    special.fs = segment_to_kvm(&r.fs);
    special.gs = segment_to_kvm(&r.gs);
    special.ldt = segment_to_kvm(&r.ldtr);
    special.tr = segment_to_kvm(&r.tr);
    special.gdt = kvm_dtable { base: r.gdtr.base, limit: r.gdtr.limit, ..Default::default() };
    special.idt = kvm_dtable { base: r.idtr.base, limit: r.idtr.limit, ..Default::default() };
}

fn segment_from_kvm(s: &kvm_segment) -> Segment {
    let bit = |value: u8, position: u32| u32::from(value) << position;
    Segment {
        selector: s.selector,
        limit: s.limit,
        access: u32::from(s.type_)
            | bit(s.s, ACCESS_S)
            | bit(s.dpl, ACCESS_DPL)
            | bit(s.present, ACCESS_P)
            | bit(s.avl, ACCESS_AVL)
            | bit(s.l, ACCESS_L)
            | bit(s.db, ACCESS_DB)
            | bit(s.g, ACCESS_G)
            | bit(s.unusable, ACCESS_UNUSABLE),
        base: s.base,
    }
}

fn segment_to_kvm(s: &Segment) -> kvm_segment {
    let bit = |position: u32| u8::from(s.access >> position & 1 != 0);
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.access & 0xf) as u8,
        present: bit(ACCESS_P),
        dpl: (s.access >> ACCESS_DPL & 3) as u8,
        db: bit(ACCESS_DB),
        s: bit(ACCESS_S),
        l: bit(ACCESS_L),
        g: bit(ACCESS_G),
        avl: bit(ACCESS_AVL),
        unusable: bit(ACCESS_UNUSABLE),
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn segments_survive_the_way_there_and_back(selector: u16, limit: u32, access in 0u32..0x20000, base: u64) {
            // Bits 11:8 are reserved and KVM has no place for them.
            let segment = Segment { selector, limit, access: access & 0x1f0ff, base };
            prop_assert_eq!(segment_from_kvm(&segment_to_kvm(&segment)), segment);
        }

        #[test]
        fn general_registers_survive_the_way_there_and_back(gpr: [u64; 16], rip: u64, rflags: u64) {
            let registers = Registers { gpr, rip, rflags, ..Registers::default() };
            let mut back = Registers::default();
            general_from_kvm(&general_to_kvm(&registers), &mut back);
            prop_assert_eq!(back, registers);
        }
    }
}
