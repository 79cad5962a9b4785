//! Kicks, injection, and everything that a local APIC takes part in.

use std::time::{Duration, Instant};

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use vmm::backend::IoapicRoute;
use vmm::registers::RBX;
use vmm::{BackendVm, Entry, Exit, Inject, RegisterMask};

use crate::guest::*;
use crate::layout::*;

/// Local APIC registers (Intel SDM vol. 3 table 12-1).
const APIC: u64 = 0xfee0_0000;
const APIC_EOI: i32 = 0xb0;
const APIC_SVR: i32 = 0xf0;
const APIC_ICR: i32 = 0x300;
const APIC_LINT0: i32 = 0x350;

/// Port by which a guest says that it is ready for what the test does next; the bus takes it.
const READY: u16 = 0x80;
/// Port by which it says that it is done; nobody takes it.
const DONE: u16 = 0x81;

fn done(value: u32) -> Exit {
    Exit::PortOut { port: DONE, size: 1, value, string: false }
}

/// Enables the local APIC.
fn apic_on(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rbx, APIC)?;
    a.mov(dword_ptr(rbx + APIC_SVR), 0x1ff)
}

/// A handler that ends the interrupt and says so.
fn acknowledge(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dword_ptr(rbx + APIC_EOI), 0)?;
    a.mov(al, 0x77)?;
    a.out(DONE as u32 as i32, al)?;
    a.iretq()
}

/// Runs `guest` and does `action` to its machine once it has said READY, a moment later.
fn run_and(guest: &mut Guest, action: impl FnOnce(&dyn BackendVm) + Send) -> Result<Exit, String> {
    guest.bus.ports.lock().map_err(text)?.insert(READY, 0);
    let (vm, bus) = (&guest.vm, &guest.bus);
    std::thread::scope(|scope| {
        let (done, watch) = std::sync::mpsc::channel::<()>();
        scope.spawn(move || {
            let start = Instant::now();
            while bus.outs.lock().is_ok_and(|outs| outs.is_empty()) && start.elapsed() < Duration::from_secs(5) {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(10));
            action(vm.as_ref());
            // Whatever goes wrong, the test ends.
            if watch.recv_timeout(Duration::from_secs(5)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                vm.kick(0);
            }
        });
        let exit = guest.vcpu.run(bus, Entry::default()).map_err(text);
        drop(done);
        exit
    })
}

pub fn kick_spinning() -> Result<(), String> {
    let mut guest = Guest::new(|a| {
        a.out(READY as u32 as i32, al)?;
        let mut here = a.create_label();
        a.set_label(&mut here)?;
        a.jmp(here)
    })?;
    same("exit", run_and(&mut guest, |vm| vm.kick(0))?, Exit::Interrupted)?;
    same("RIP", guest.rip()?, CODE + 2)
}

pub fn kick_halted() -> Result<(), String> {
    let mut guest = Guest::with(true, 1, |a| {
        a.out(READY as u32 as i32, al)?;
        a.hlt()
    })?;
    same("exit", run_and(&mut guest, |vm| vm.kick(0))?, Exit::Interrupted)?;
    same("RIP", guest.rip()?, CODE + 3)
}

pub fn kick_before() -> Result<(), String> {
    let mut guest = Guest::new(|a| a.hlt())?;
    guest.vm.kick(0);
    guest.expect(Exit::Interrupted)?;
    same("RIP", guest.rip()?, CODE)?;
    guest.expect(Exit::Halt)
}

pub fn window() -> Result<(), String> {
    let mut guest = Guest::new(|a| {
        a.nop()?;
        a.sti()?;
        let mut here = a.create_label();
        a.set_label(&mut here)?;
        a.cmp(ebx, 0x40)?;
        a.jne(here)?;
        a.hlt()
    })?;
    guest.handle(0x40, |a| {
        a.mov(ebx, 0x40)?;
        a.iretq()
    })?;
    same("exit", guest.enter(Entry { interrupt_window: true, ..Entry::default() })?, Exit::InterruptWindow)?;
    let rip = guest.rip()?;
    if rip < CODE + 3 {
        return Err(format!("the window opened at {rip:#x}, in the shadow of STI or before it"));
    }
    same("exit", guest.enter(Entry { inject: Some(Inject::Interrupt(0x40)), ..Entry::default() })?, Exit::Halt)?;
    same("RBX", guest.gpr(RBX)?, 0x40)
}

pub fn exception() -> Result<(), String> {
    let mut guest = Guest::new(|a| a.hlt())?;
    guest.handle(13, |a| {
        a.pop(rbx)?;
        a.hlt()
    })?;
    same("exit", guest.enter(Entry { inject: Some(Inject::Exception(13, Some(0x18))), ..Entry::default() })?, Exit::Halt)?;
    same("error code", guest.gpr(RBX)?, 0x18)
}

pub fn msi() -> Result<(), String> {
    let mut guest = Guest::with(true, 1, |a| {
        apic_on(a)?;
        a.sti()?;
        a.out(READY as u32 as i32, al)?;
        a.hlt()?;
        a.hlt()
    })?;
    guest.handle(0x50, acknowledge)?;
    same("exit", run_and(&mut guest, |vm| vm.signal_msi(APIC, 0x50))?, done(0x77))
}

pub fn extint() -> Result<(), String> {
    let mut guest = Guest::with(true, 1, |a| {
        apic_on(a)?;
        a.mov(dword_ptr(rbx + APIC_LINT0), 0x700)?;
        a.sti()?;
        a.out(READY as u32 as i32, al)?;
        a.hlt()?;
        a.hlt()
    })?;
    guest.handle(0x30, acknowledge)?;
    guest.bus.extint.lock().map_err(text)?.push(0x30);
    same("exit", run_and(&mut guest, |vm| vm.set_extint(true))?, done(0x77))?;
    guest.vm.set_extint(false);
    same("acknowledged", guest.bus.extint.lock().map_err(text)?.len(), 0)
}

pub fn end_of_interrupt() -> Result<(), String> {
    /// Level triggered, asserted (Intel SDM vol. 3 section 11.11.2).
    const LEVEL: u32 = 0xc000;
    let mut guest = Guest::with(true, 1, |a| {
        apic_on(a)?;
        a.sti()?;
        a.out(READY as u32 as i32, al)?;
        a.hlt()?;
        a.hlt()
    })?;
    guest.handle(0x60, acknowledge)?;
    guest.vm.set_ioapic_routes(&[None, Some(IoapicRoute { address: APIC, data: LEVEL | 0x60 })]);
    same("exit", run_and(&mut guest, |vm| vm.signal_msi(APIC, LEVEL | 0x60))?, done(0x77))?;
    same("EOIs", guest.bus.eois.lock().map_err(text)?.clone(), vec![0x60])
}

pub fn sipi() -> Result<(), String> {
    /// Page at which the second processor starts.
    const START: u64 = 0x9000;
    let mut guest = Guest::with(true, 2, |a| {
        apic_on(a)?;
        a.mov(dword_ptr(rbx + (APIC_ICR + 0x10)), 1 << 24)?;
        // INIT, then SIPI with the page number.
        a.mov(dword_ptr(rbx + APIC_ICR), 0x4500)?;
        a.mov(dword_ptr(rbx + APIC_ICR), 0x4600 | (START >> 12) as i32)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(byte_ptr(DATA), 0)?;
        a.je(wait)?;
        a.mov(al, byte_ptr(DATA))?;
        a.out(DONE as u32 as i32, al)
    })?;
    let code = assemble(16, START, |a| {
        a.mov(ax, (DATA >> 4) as i32)?;
        a.mov(ds, ax)?;
        a.mov(byte_ptr(0), 0x21)?;
        a.hlt()
    })?;
    write(&guest.memory, START, &code)?;
    let mut second = guest.vm.create_vcpu(1).map_err(text)?;
    let (vm, bus) = (std::sync::Arc::clone(&guest.vm), TestBus::default());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(move || second.run(&bus, Entry::default()).map_err(text).map(|exit| (exit, second)));
        let exit = guest.run();
        // It is halted now.
        vm.kick(1);
        let (second_exit, second) = waiting.join().map_err(|_| "the second processor's thread panicked".to_owned())??;
        same("first processor's exit", exit?, done(0x21))?;
        same("second processor's exit", second_exit, Exit::Interrupted)?;
        let registers = second.registers(RegisterMask::SEGMENT).map_err(text)?;
        same("second processor's CS", u64::from(registers.cs.selector), START >> 4)
    })
}
