//! Registers, port and memory accesses, protection, and the ways a processor stops.

use std::time::Duration;

use abi::kvm::feature;
use iced_x86::code_asm::*;
use vm_memory::{Bytes, GuestAddress};
use vmm::exit::Access;
use vmm::registers::{RAX, RBX, RCX, RDI, RDX};
use vmm::{Backend, BackendError, Entry, Exit, Protection, RegisterMask};

use crate::guest::*;
use crate::layout::*;

/// Encodings of registers that only these tests look at.
const R8: usize = 8;
const R9: usize = 9;
/// A port that is on no bus: the guest says with it where it got to.
const REPORT: u16 = 0x99;

fn report(value: u32) -> Exit {
    Exit::PortOut { port: REPORT, size: 4, value, string: false }
}

pub fn registers() -> Result<(), String> {
    let mut guest = Guest::new(|a| a.hlt())?;
    let mut wanted = long_mode(CODE);
    for (index, value) in (1u64..).zip(&mut wanted.gpr) {
        *value = index << 40 | index;
    }
    wanted.rflags = 0x202;
    wanted.cr2 = 0xdead_b000;
    wanted.cr8 = 5;
    wanted.star = 0x0023_0010_0000_0000;
    wanted.lstar = 0xffff_8000_0000_1000;
    wanted.cstar = 0xffff_8000_0000_2000;
    wanted.sfmask = 0x700;
    wanted.kernel_gs_base = 0x1234_5000;
    wanted.dr = [0x1000, 0x2000, 0x3000, 0x4000];
    wanted.fs.base = 0x7fff_0000;
    wanted.efer |= 1;
    guest.vcpu.set_registers(&wanted, RegisterMask::all()).map_err(text)?;
    let found = guest.vcpu.registers(RegisterMask::all()).map_err(text)?;
    same("registers", found, wanted)?;
    let only = guest.vcpu.registers(RegisterMask::GPR).map_err(text)?;
    same("groups not asked for", (only.rip, only.cr0), (CODE, 0))?;
    wanted.cr0 &= !1;
    match guest.vcpu.set_registers(&wanted, RegisterMask::CONTROL) {
        Err(BackendError::Invalid(_)) => Ok(()),
        other => Err(format!("paging without protection was answered with {other:?}")),
    }
}

pub fn fxsave() -> Result<(), String> {
    let mut guest = Guest::new(|a| {
        a.movaps(xmmword_ptr(DATA), xmm3)?;
        a.hlt()
    })?;
    let mut area = guest.vcpu.fxsave().map_err(text)?;
    // XMM3 is at 160 + 3 * 16.
    area[208..224].copy_from_slice(b"sixteen bytes ok");
    guest.vcpu.set_fxsave(&area).map_err(text)?;
    guest.expect(Exit::Halt)?;
    same("xmm3 low", guest.read_u64(DATA)?, u64::from_le_bytes(*b"sixteen "))?;
    same("fxsave", guest.vcpu.fxsave().map_err(text)?[208..224].to_vec(), b"sixteen bytes ok".to_vec())?;
    area[24..28].fill(0xff);
    match guest.vcpu.set_fxsave(&area) {
        Err(BackendError::Invalid(_)) => Ok(()),
        other => Err(format!("reserved MXCSR bits were answered with {other:?}")),
    }
}

pub fn cpuid() -> Result<(), String> {
    let guest = Guest::with(false, 3, |a| a.hlt())?;
    let mut vcpu = guest.vm.create_vcpu(2).map_err(text)?;
    let code = assemble(64, CODE, |a| {
        a.mov(eax, 1)?;
        a.xor(ecx, ecx)?;
        a.cpuid()?;
        a.hlt()
    })?;
    write(&guest.memory, CODE, &code)?;
    vcpu.set_registers(&long_mode(CODE), RegisterMask::all()).map_err(text)?;
    same("exit", vcpu.run(&guest.bus, Entry::default()).map_err(text)?, Exit::Halt)?;
    let registers = vcpu.registers(RegisterMask::GPR).map_err(text)?;
    same("APIC id", registers.gpr[RBX] >> 24, 2)?;
    same("hypervisor bit", registers.gpr[RCX] >> 31, 0)
}

pub fn declined_ports() -> Result<(), String> {
    let mut guest = Guest::new(|a| {
        a.mov(eax, -1)?;
        a.in_(al, 0x60)?;
        a.mov(edx, u32::from(REPORT))?;
        a.out(dx, eax)?;
        a.hlt()
    })?;
    guest.expect(Exit::PortIn { port: 0x60, size: 1, string: false })?;
    let exit = guest.enter(Entry { port_in: Some(0x42), ..Entry::default() })?;
    same("exit", exit, report(0xffff_ff42))?;
    // OUT is done when its exit comes: RIP is at HLT.
    let rip = guest.rip()?;
    guest.expect(Exit::Halt)?;
    same("RIP after OUT", rip + 1, guest.rip()?)
}

pub fn string_ports() -> Result<(), String> {
    let mut guest = Guest::new(|a| {
        a.mov(edx, 0x70)?;
        a.mov(rdi, DATA)?;
        a.mov(ecx, 3)?;
        a.rep().insw()?;
        a.mov(edx, 0x71)?;
        a.mov(rsi, DATA)?;
        a.mov(ecx, 3)?;
        a.rep().outsw()?;
        a.hlt()
    })?;
    let mut exit = guest.run()?;
    let mut written = Vec::new();
    for value in [0x1111, 0x2222, 0x3333] {
        let Exit::PortIn { port: 0x70, size: 2, .. } = exit else { return Err(format!("expected IN, found {exit:?}")) };
        exit = guest.enter(Entry { port_in: Some(value), ..Entry::default() })?;
    }
    while let Exit::PortOut { port: 0x71, size: 2, value, .. } = exit {
        written.push(value);
        exit = guest.run()?;
    }
    same("exit", exit, Exit::Halt)?;
    same("what came back", written, vec![0x1111, 0x2222, 0x3333])?;
    same("RCX", guest.gpr(RCX)?, 0)
}

pub fn register_port() -> Result<(), String> {
    let mut guest = Guest::new(|a| {
        a.mov(edx, u32::from(REGISTER_PORT))?;
        a.mov(rax, 0x1111_2222_564d_5868u64)?;
        a.mov(ebx, 5)?;
        a.in_(eax, dx)?;
        a.mov(r8, rax)?;
        a.mov(r9, rcx)?;
        a.mov(eax, 0x77)?;
        a.out(dx, eax)?;
        a.hlt()
    })?;
    guest.expect(Exit::Halt)?;
    let calls = std::mem::take(&mut *guest.bus.calls.lock().map_err(text)?);
    same("calls", calls.len(), 2)?;
    same("IN", (calls[0].write, calls[0].string, calls[0].size, calls[0].gpr[RBX]), (false, false, 4, 5))?;
    same("OUT", (calls[1].write, calls[1].string, calls[1].data, calls[1].gpr[RBX]), (true, false, 0x77, 6))?;
    same("RAX after IN", guest.gpr(R8)?, u64::from(u32::MAX))?;
    same("RCX after IN", guest.gpr(R9)?, 0x99)?;
    same("RAX and RBX after OUT", (guest.gpr(RAX)?, guest.gpr(RBX)?), (u64::MAX, 7))
}

pub fn register_port_strings() -> Result<(), String> {
    /// More than KVM brings in one exit.
    const COUNT: u64 = 1500;
    let mut guest = Guest::new(|a| {
        a.mov(edx, u32::from(REGISTER_PORT))?;
        a.mov(rsi, DATA)?;
        a.mov(ecx, 3)?;
        a.xor(ebx, ebx)?;
        a.rep().outsb()?;
        a.mov(rdi, DATA)?;
        a.mov(ecx, COUNT as u32)?;
        a.rep().insb()?;
        a.mov(r8, rcx)?;
        a.insb()?;
        a.hlt()
    })?;
    write(&guest.memory, DATA, b"xyz")?;
    guest.expect(Exit::Halt)?;
    let calls = std::mem::take(&mut *guest.bus.calls.lock().map_err(text)?);
    let sent: Vec<u32> = calls.iter().filter(|call| call.write && call.string).map(|call| call.data).collect();
    same("what was sent", sent, b"xyz".map(u32::from).to_vec())?;
    same("elements", calls.len() as u64, 3 + COUNT + 1)?;
    same("RBX", guest.gpr(RBX)?, 3 + COUNT + 1)?;
    same("RCX", (guest.gpr(R8)?, guest.gpr(RCX)?), (0, 0))?;
    same("RDI", guest.gpr(RDI)?, DATA + COUNT + 1)?;
    let mut stored = vec![0; COUNT as usize + 1];
    guest.memory.read_slice(&mut stored, GuestAddress(DATA)).map_err(text)?;
    let letters: Vec<u8> = (3..=COUNT + 3).map(|index| b'A'.wrapping_add(index as u8)).collect();
    same("what was stored", stored, letters)
}

pub fn mmio() -> Result<(), String> {
    let mut guest = Guest::new(|a| {
        a.mov(rbx, NOWHERE)?;
        a.mov(eax, dword_ptr(rbx))?;
        a.add(eax, 1)?;
        a.mov(dword_ptr(rbx + 8), eax)?;
        a.hlt()
    })?;
    guest.bus.mmio.lock().map_err(text)?.extend([(NOWHERE, 0x1234_5677), (NOWHERE + 8, 0)]);
    guest.expect(Exit::Halt)?;
    let written = guest.bus.mmio.lock().map_err(text)?.get(&(NOWHERE + 8)).copied();
    same("written", written, Some(0x1234_5678))
}

pub fn declined_mmio() -> Result<(), String> {
    let mut guest = Guest::new(|a| {
        a.mov(rbx, NOWHERE)?;
        a.mov(rax, 0x77u64)?;
        a.mov(eax, dword_ptr(rbx))?;
        a.hlt()
    })?;
    guest.expect(Exit::Mmio { gpa: NOWHERE, size: 4, write: None })?;
    same("RAX", guest.gpr(RAX)?, 0x77)?;
    let rip = guest.rip()?;
    // Again, from the same place, and answered this time.
    guest.bus.mmio.lock().map_err(text)?.insert(NOWHERE, 0x88);
    guest.expect(Exit::Halt)?;
    same("RAX", guest.gpr(RAX)?, 0x88)?;
    same("length of the read", guest.rip()? - rip, 3)
}

pub fn write_protection() -> Result<(), String> {
    let mut guest = Guest::new(|a| {
        a.mov(rbx, DATA)?;
        a.mov(rcx, qword_ptr(rbx + 8))?;
        a.mov(eax, 0x55)?;
        a.mov(qword_ptr(rbx + 8), rax)?;
        a.mov(rdx, qword_ptr(rbx + 8))?;
        a.hlt()
    })?;
    write(&guest.memory, DATA + 8, &7u64.to_le_bytes())?;
    guest.vm.protect(DATA, 0x1000, Protection::READ | Protection::EXECUTE).map_err(text)?;
    guest.expect(Exit::Protection { gpa: DATA + 8, access: Access::Write })?;
    same("memory", guest.read_u64(DATA + 8)?, 7)?;
    same("what the guest read before", guest.gpr(RCX)?, 7)?;
    guest.vm.protect(DATA, 0x1000, Protection::all()).map_err(text)?;
    guest.expect(Exit::Halt)?;
    same("memory after the write was let through", guest.read_u64(DATA + 8)?, 0x55)?;
    same("what the guest read after", guest.gpr(RDX)?, 0x55)?;
    match guest.vm.protect(DATA, 0x1000, Protection::READ) {
        Err(BackendError::Unsupported(_)) => Ok(()),
        other => Err(format!("read without execute was answered with {other:?}")),
    }
}

pub fn no_access() -> Result<(), String> {
    let mut guest = Guest::new(|a| {
        a.mov(rbx, DATA)?;
        a.mov(rcx, qword_ptr(rbx))?;
        a.jmp(rbx)
    })?;
    // HLT, which the guest gets to when it may.
    write(&guest.memory, DATA, &0xf4u64.to_le_bytes())?;
    guest.vm.protect(DATA, 0x1000, Protection::empty()).map_err(text)?;
    guest.expect(Exit::Protection { gpa: DATA, access: Access::Read })?;
    guest.vm.protect(DATA, 0x1000, Protection::all()).map_err(text)?;
    let step = guest.enter(Entry { single_step: true, ..Entry::default() })?;
    same("exit", step, Exit::SingleStep)?;
    guest.vm.protect(DATA, 0x1000, Protection::empty()).map_err(text)?;
    guest.expect(Exit::Protection { gpa: DATA, access: Access::Execute })?;
    guest.vm.protect(DATA, 0x1000, Protection::all()).map_err(text)?;
    guest.expect(Exit::Halt)?;
    same("what the guest read", guest.gpr(RCX)?, 0xf4)
}

pub fn msrs() -> Result<(), String> {
    /// Hyper-V's guest OS id: KVM would answer it itself.
    const DIALECT: u32 = 0x4000_0000;
    const UNKNOWN: u32 = 0x1234_5678;
    let mut guest = Guest::new(|a| {
        a.mov(ecx, DIALECT)?;
        a.rdmsr()?;
        a.mov(ebx, eax)?;
        a.mov(ecx, UNKNOWN)?;
        a.mov(eax, 0x99)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(ecx, UNKNOWN + 1)?;
        a.rdmsr()?;
        a.hlt()
    })?;
    guest.handle(13, |a| {
        a.mov(esi, 13)?;
        a.hlt()
    })?;
    guest.bus.msrs.lock().map_err(text)?.extend([(DIALECT, 0x8100), (UNKNOWN, 0)]);
    guest.expect(Exit::Halt)?;
    same("MSR read", guest.gpr(RBX)?, 0x8100)?;
    let written = guest.bus.msrs.lock().map_err(text)?.get(&UNKNOWN).copied();
    same("MSR written", written, Some(0x99))?;
    same("#GP for an MSR that nobody has", guest.gpr(vmm::registers::RSI)?, 13)
}

pub fn halt() -> Result<(), String> {
    let mut guest = Guest::new(|a| {
        a.hlt()?;
        a.hlt()
    })?;
    guest.expect(Exit::Halt)?;
    same("RIP", guest.rip()?, CODE + 1)?;
    guest.expect(Exit::Halt)?;
    same("RIP", guest.rip()?, CODE + 2)
}

pub fn shutdown() -> Result<(), String> {
    let mut guest = Guest::new(|a| a.ud2())?;
    guest.expect(Exit::Shutdown)
}

pub fn single_step() -> Result<(), String> {
    let mut guest = Guest::new(|a| {
        a.mov(eax, 1)?;
        a.pushfq()?;
        a.pop(rbx)?;
        a.hlt()
    })?;
    for rip in [CODE + 5, CODE + 6, CODE + 7] {
        same("exit", guest.enter(Entry { single_step: true, ..Entry::default() })?, Exit::SingleStep)?;
        same("RIP", guest.rip()?, rip)?;
    }
    guest.expect(Exit::Halt)
}

pub fn internal_error() -> Result<(), String> {
    let mut guest = Guest::new(|a| {
        a.mov(rax, 0x1122_3344u64)?;
        a.mov(rbx, NOWHERE)?;
        // Streaming loads from a device: KVM's emulator does not know them.
        a.movntdqa(xmm0, xmmword_ptr(rbx))?;
        a.hlt()
    })?;
    guest.bus.mmio.lock().map_err(text)?.extend([(NOWHERE, 0), (NOWHERE + 8, 0)]);
    match guest.run() {
        Err(error) => {
            for wanted in ["0000000011223344", "bytes at RIP: 66 0f 38", "[rbx]", "--backend soft", "suberror 1"] {
                if !error.contains(wanted) {
                    return Err(format!("`{wanted}` is not in: {error}"));
                }
            }
            Ok(())
        }
        Ok(exit) => Err(format!("no internal error but {exit:?}")),
    }
}

pub fn dialect() -> Result<(), String> {
    let features = kvm::KvmBackend::new().map_err(text)?.kvm_dialect().ok_or("none at all")?;
    let wanted = feature::CLOCKSOURCE2 | feature::CLOCKSOURCE_STABLE | feature::STEAL_TIME | feature::PV_EOI | feature::PV_UNHALT;
    same("features that every KVM of these years has", features & wanted, wanted)
}

pub fn pvclock() -> Result<(), String> {
    let mut guest = Guest::new(|a| {
        a.mov(ecx, abi::kvm::MSR_SYSTEM_TIME_NEW)?;
        a.mov(eax, DATA as u32 | 1)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.hlt()?;
        a.rdtsc()?;
        a.hlt()
    })?;
    guest.expect(Exit::Halt)?;
    std::thread::sleep(Duration::from_millis(30));
    guest.expect(Exit::Halt)?;
    let tsc = guest.gpr(RDX)? << 32 | guest.gpr(RAX)?;
    let passed = pvclock_time(&guest.memory, DATA, tsc)?;
    // Since the machine was made: no less than it slept, no more than this test takes.
    if (30_000_000..60_000_000_000).contains(&passed) { Ok(()) } else { Err(format!("the clock says {passed} ns")) }
}
