//! The loop that runs a processor, and its face towards the monitor.
//!
//! Before each block one word of flags is looked at ([`crate::attention`]); everything that is not ordinary execution is
//! announced there: interrupts, kicks, single steps, HLT, what other processors want. So the loop itself is: look, find the
//! block, run it.
#![allow(unsafe_code)] // The bus is kept as a pointer while `run` borrows it.

use std::sync::Arc;
use std::time::Instant;

use devices::lapic::PendingInterrupt;
use vmm::registers::Registers;
use vmm::{BackendError, Bus, Entry, Exit, Inject, RegisterMask, Segment, Vcpu, VcpuId, VcpuStats};

use crate::attention::{self, Patience};
use crate::block::BlockCache;
use crate::cpu::{BusPointer, CS, Cpu, TrapKind, Width, cr0, efer, rflags, vector};
use crate::flags::StatusFlags;
use crate::mmu::Tlb;
use crate::native::FxArea;
use crate::op::{Outcome, Trap};
use crate::system::{self, Interrupt, Msrs, Random, Shutdown};
use crate::vm::VmShared;

/// Guest time per instruction in the deterministic mode, in nanoseconds: a round number near what the interpreter does.
const NANOSECONDS_PER_INSTRUCTION: u64 = 10;

/// Host stack that translated code may use up before it returns to the run loop, by way of handlers that call the next one instead of
/// jumping to it. Threads have 2 MiB.
const STACK: usize = 256 << 10;

/// What [`Cpu::attend`] decided.
enum Attended {
    /// Run a block.
    Run,
    /// Run one instruction only.
    RunOne,
    /// Look again.
    Again,
    /// Leave `run`.
    Leave(Exit),
}

// SAFETY: the pointer is set and used by one `Vcpu::run`, on one thread; between runs there is none.
unsafe impl Send for BusPointer {}

impl Cpu {
    /// A processor in power-on state.
    pub fn new(id: VcpuId, vm: Arc<VmShared>) -> Cpu {
        let lapic = vm.apics.as_ref().and_then(|bus| bus.apic(id)).cloned();
        let mut cpu = Cpu {
            regs: [0; 32],
            rip: 0,
            next_rip: 0,
            status_flags: StatusFlags::default(),
            rflags: rflags::FIXED,
            instructions: 0,
            stack_floor: usize::MAX,
            tlb: Tlb::new(),
            trap: TrapKind::Alone,
            alone: false,
            cpl: 0,
            width: Width::Bits16,
            rip_mask: 0xffff_ffff,
            seg: [Segment::default(); 6],
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: Default::default(),
            idtr: Default::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            pdpte: [0; 4],
            efer: 0,
            dr: [0; 4],
            dr6: 0,
            dr7: 0,
            msr: Msrs::default(),
            fx: FxArea::reset(),
            nmi_blocked: false,
            halted: false,
            wait_for_sipi: id != 0 && lapic.is_some(),
            pending_exit: None,
            port_in: None,
            awaits_port_in: false,
            undelivered: None,
            step_over: false,
            random: Random::new(vm.deterministic.then_some(u64::from(id))),
            watch_hits: 0,
            stats: VcpuStats::default(),
            id,
            lapic,
            attention: Arc::clone(&vm.attentions[id as usize]),
            blocks: BlockCache::new(),
            bus: None,
            trace_hash: 0,
            idle_time: 0,
            patience: Patience::default(),
            vm,
        };
        cpu.set_all(&Registers::reset());
        if cpu.wait_for_sipi {
            cpu.attention.set_own(attention::IDLE);
        }
        cpu
    }

    /// The devices and dialects of the machine.
    #[inline(always)]
    pub fn bus(&self) -> &dyn Bus {
        let Some(BusPointer(bus)) = self.bus else { unreachable!("guest code runs only inside `Vcpu::run`, which sets the bus") };
        // SAFETY: set at the start of `Vcpu::run` from a borrow that outlives it, and cleared before it returns.
        unsafe { &*bus }
    }

    /// Guest time-stamp counter: the machine's nanoseconds plus what the guest added.
    pub fn tsc(&self) -> u64 {
        self.vm.timers.clock().now().wrapping_add(self.tsc_offset())
    }

    /// Sets every register, in the order in which they depend on each other.
    fn set_all(&mut self, registers: &Registers) {
        self.cr0 = registers.cr0;
        self.cr4 = registers.cr4;
        self.efer = registers.efer;
        self.cr2 = registers.cr2;
        self.cr3 = registers.cr3;
        self.pdpte = registers.pdpte;
        self.dr = registers.dr;
        self.dr6 = registers.dr6;
        self.dr7 = registers.dr7;
        self.msr.star = registers.star;
        self.msr.lstar = registers.lstar;
        self.msr.cstar = registers.cstar;
        self.msr.sfmask = registers.sfmask;
        self.msr.kernel_gs_base = registers.kernel_gs_base;
        self.seg = [registers.es, registers.cs, registers.ss, registers.ds, registers.fs, registers.gs];
        self.ldtr = registers.ldtr;
        self.tr = registers.tr;
        self.gdtr = registers.gdtr;
        self.idtr = registers.idtr;
        self.set_general(registers);
        self.flush_tlb();
        self.update_mode();
        self.update_step();
    }

    fn set_general(&mut self, registers: &Registers) {
        self.regs[..16].copy_from_slice(&registers.gpr);
        self.rip = registers.rip;
        self.awaits_port_in = false;
        self.set_flags(registers.rflags);
        self.update_step();
    }

    /// Arms or disarms the look at every instruction after a change of RFLAGS.TF or DR7, and that at every access after one of
    /// RFLAGS.AC.
    pub fn update_step(&mut self) {
        if self.cpl == 3 && self.cr0 & cr0::AM != 0 {
            self.update_translation();
        }
        if self.rflags & rflags::TF != 0 || self.dr7 & 0xff != 0 {
            self.attention.set_own(attention::STEP);
        }
    }

    /// INIT: reset state except what INIT keeps (Intel SDM vol. 3 table 10-1); then waits for a start-up IPI.
    fn init(&mut self) {
        let keep = cr0::CD | cr0::NW;
        let mut registers = Registers::reset();
        registers.cr0 = self.cr0 & keep | cr0::ET;
        registers.gpr[vmm::registers::RDX] = system::SIGNATURE.into();
        self.set_all(&registers);
        self.halted = false;
        self.nmi_blocked = false;
        self.pending_exit = None;
        self.undelivered = None;
        self.wait_for_sipi = self.id != 0;
        if self.wait_for_sipi {
            self.attention.set_own(attention::IDLE);
        }
    }

    /// Start-up IPI: real mode at the page it names.
    fn start_up(&mut self, page: u8) {
        self.wait_for_sipi = false;
        self.seg[CS].selector = u16::from(page) << 8;
        self.seg[CS].base = u64::from(page) << 12;
        self.seg[CS].limit = 0xffff;
        self.rip = 0;
        self.update_mode();
    }

    /// Runs until something has to leave `run`.
    fn run_loop<const DETERMINISTIC: bool>(&mut self) -> Result<Exit, BackendError> {
        loop {
            if DETERMINISTIC {
                self.advance_time();
            }
            let flags = self.attention.flags();
            let single = if flags == 0 {
                false
            } else {
                match self.attend(flags) {
                    Attended::Run => false,
                    Attended::RunOne => true,
                    Attended::Again => continue,
                    Attended::Leave(exit) => return Ok(exit),
                }
            };
            if let Some(exit) = self.run_block(single) {
                return Ok(exit);
            }
        }
    }

    /// Runs one block, or one instruction.
    #[inline(always)]
    fn run_block(&mut self, single: bool) -> Option<Exit> {
        let outcome = match self.enter_block(single) {
            Ok(cursor) => (cursor.run)(self, cursor),
            Err(_) => Outcome::Trapped,
        };
        if outcome == Outcome::Done { None } else { self.trapped() }
    }

    /// The last block ended at an instruction that could not be completed.
    #[cold]
    #[inline(never)]
    fn trapped(&mut self) -> Option<Exit> {
        self.blocks.stop_running();
        match self.trap {
            TrapKind::Alone => {
                self.alone = true;
                let exit = self.run_block(true);
                self.alone = false;
                exit
            }
            TrapKind::Exit(exit) => Some(exit),
            TrapKind::NotCanonical => self.deliver(vector::GP, Some(0), 0),
            TrapKind::Exception { vector, error, address } => self.deliver(vector, error, address),
        }
    }

    fn deliver(&mut self, vector: u8, error: Option<u32>, address: u64) -> Option<Exit> {
        self.stats.exceptions += 1;
        match self.deliver_exception(vector, error, address) {
            Ok(()) => None,
            Err(Shutdown) => Some(Exit::Shutdown),
        }
    }

    /// Deals with what was announced; flags are non-zero.
    #[cold]
    #[inline(never)]
    fn attend(&mut self, flags: u32) -> Attended {
        self.blocks.stop_running();
        if flags & attention::CODE_PAGES != 0 {
            self.see_code_pages();
        }
        if flags & attention::FLUSH != 0 {
            self.attention.clear(attention::FLUSH);
            self.flush_tlb();
        }
        if flags & attention::FLUSH_PAGES != 0 {
            self.attention.clear(attention::FLUSH_PAGES);
            self.vm.flushes[self.id as usize].take().into_iter().for_each(|page| self.invalidate_page(page));
        }
        if let Some(exit) = self.pending_exit.take() {
            return Attended::Leave(exit);
        }
        if self.undelivered.is_some() && self.redeliver().is_err() {
            return Attended::Leave(Exit::Shutdown);
        }
        if flags & attention::KICK != 0 {
            self.attention.clear(attention::KICK);
            return Attended::Leave(Exit::Interrupted);
        }
        let shadow = flags & attention::SHADOW != 0;
        if shadow {
            self.attention.clear(attention::SHADOW);
        }
        if flags & attention::APIC != 0
            && let Some(exit) = self.attend_apic(shadow)
        {
            return Attended::Leave(exit);
        }
        if flags & attention::WINDOW != 0 && !shadow && self.rflags & rflags::IF != 0 && !self.wait_for_sipi {
            self.attention.clear(attention::WINDOW);
            return Attended::Leave(Exit::InterruptWindow);
        }
        // It only rouses a sleeper; a processor that does not halt will find out at its next HLT.
        if flags & attention::WAKE != 0 {
            self.attention.clear(attention::WAKE);
        }
        if flags & attention::IDLE != 0 {
            if self.halted || self.wait_for_sipi {
                return self.idle();
            }
            self.attention.clear(attention::IDLE);
        }
        if flags & attention::STEP != 0 {
            return self.step();
        }
        // What had to wait for the shadow's end is looked at again after one instruction.
        if shadow && self.attention.flags() != 0 { Attended::RunOne } else { Attended::Run }
    }

    /// INIT, SIPI, NMI and interrupts from the local APIC.
    fn attend_apic(&mut self, shadow: bool) -> Option<Exit> {
        let lapic = Arc::clone(self.lapic.as_ref()?);
        self.attention.clear(attention::APIC);
        let work = lapic.work();
        if work.has_init() && lapic.take_init() {
            self.init();
        }
        if work.has_sipi()
            && let Some(page) = lapic.take_sipi()
            && self.wait_for_sipi
        {
            self.start_up(page);
        }
        if self.wait_for_sipi {
            return None;
        }
        if work.has_nmi() && (shadow || self.nmi_blocked) {
            // Looked at again before the next block, until it can be taken.
            self.attention.set_own(attention::APIC);
        } else if work.has_nmi() && lapic.take_nmi() {
            self.halted = false;
            self.stats.interrupts += 1;
            if self.deliver_interrupt(vector::NMI, Interrupt::Nmi).is_err() {
                return Some(Exit::Shutdown);
            }
        }
        if work.has_interrupt() {
            if shadow || self.rflags & rflags::IF == 0 {
                // Looked at again before the next block, until it can be taken.
                self.attention.set_own(attention::APIC);
                return None;
            }
            let vector = match lapic.pending_interrupt() {
                Some(PendingInterrupt::Vector(_)) => lapic.acknowledge(),
                Some(PendingInterrupt::ExtInt) => self.bus().acknowledge_extint(),
                None => return None,
            };
            self.halted = false;
            self.stats.interrupts += 1;
            if self.deliver_interrupt(vector, Interrupt::External).is_err() {
                return Some(Exit::Shutdown);
            }
            // There may be more.
            self.attention.set_own(attention::APIC);
        }
        None
    }

    /// HLT, or waiting for a start-up IPI: sleeps until something is announced.
    fn idle(&mut self) -> Attended {
        if self.lapic.is_none() {
            self.halted = false;
            self.attention.clear(attention::IDLE);
            return Attended::Leave(Exit::Halt);
        }
        if self.halted && self.attention.take_woken() {
            self.halted = false;
            return Attended::Again;
        }
        if self.vm.deterministic
            && let Some(deadline) = self.vm.timers.next_deadline()
        {
            // Nothing else moves time: go to the next timer.
            let clock = self.vm.timers.clock();
            self.idle_time += deadline.saturating_sub(clock.now());
            clock.advance_to(deadline);
            self.vm.timers.run_due();
            return Attended::Again;
        }
        // A pending interrupt that RFLAGS.IF masks keeps its flag up; it does not end HLT, what comes anew does.
        self.attention.clear(attention::APIC);
        let pending = self.lapic.as_ref().is_some_and(|lapic| {
            let work = lapic.work();
            work.has_init()
                || work.has_sipi()
                || !self.wait_for_sipi && (work.has_nmi() && !self.nmi_blocked || work.has_interrupt() && self.rflags & rflags::IF != 0)
        });
        if pending {
            self.attention.set_own(attention::APIC);
            return Attended::Again;
        }
        self.attention.set_in_guest(false);
        let start = Instant::now();
        self.attention.wait(attention::ROUSES, self.patience.now());
        self.patience.learn(start.elapsed());
        self.attention.set_in_guest(true);
        Attended::Again
    }

    /// One instruction with everything that debug registers and RFLAGS.TF ask for.
    fn step(&mut self) -> Attended {
        let trap_flag = self.rflags & rflags::TF != 0;
        if !trap_flag && self.dr7 & 0xff == 0 {
            self.attention.clear(attention::STEP);
            return Attended::Run;
        }
        if let Err(Trap(())) = self.debug_check_before() {
            return self.trapped().map_or(Attended::Again, Attended::Leave);
        }
        self.watch_hits = 0;
        let exceptions = self.stats.exceptions;
        if let Some(exit) = self.run_block(true) {
            return Attended::Leave(exit);
        }
        self.blocks.stop_running();
        if self.stats.exceptions == exceptions
            && let Err(Trap(())) = self.debug_check_after(trap_flag)
            && let Some(exit) = self.trapped()
        {
            return Attended::Leave(exit);
        }
        Attended::Again
    }

    /// Deterministic mode: time follows the instruction count.
    fn advance_time(&mut self) {
        let now = self.idle_time + self.instructions * NANOSECONDS_PER_INSTRUCTION;
        self.vm.timers.clock().advance_to(now);
        if self.vm.timers.next_deadline().is_some_and(|deadline| deadline <= now) {
            self.vm.timers.run_due();
        }
        self.trace_hash = (self.trace_hash.rotate_left(5) ^ self.rip).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    /// Delivers what the caller of `run` injects.
    fn inject(&mut self, event: Inject) -> Result<(), Shutdown> {
        self.halted = false;
        match event {
            Inject::Interrupt(vector) => {
                self.stats.interrupts += 1;
                self.deliver_interrupt(vector, Interrupt::External)
            }
            Inject::Nmi => {
                self.stats.interrupts += 1;
                self.deliver_interrupt(vector::NMI, Interrupt::Nmi)
            }
            Inject::Exception(vector, error) => {
                self.stats.exceptions += 1;
                self.deliver_exception(vector, error, self.cr2)
            }
        }
    }

    fn run(&mut self, entry: Entry) -> Result<Exit, BackendError> {
        let here = 0_u8;
        self.stack_floor = (std::ptr::from_ref(&here) as usize).saturating_sub(STACK);
        // The IN that the last run ended with is completed before anything else can come in between.
        self.port_in = if std::mem::take(&mut self.awaits_port_in) { entry.port_in } else { None };
        if self.port_in.is_some() {
            let exit = self.run_block(true);
            self.blocks.stop_running();
            self.port_in = None;
            if exit.is_some() || entry.single_step {
                return Ok(exit.unwrap_or(Exit::SingleStep));
            }
        }
        if let Some(event) = entry.inject
            && self.inject(event).is_err()
        {
            return Ok(Exit::Shutdown);
        }
        if entry.interrupt_window {
            self.attention.set_own(attention::WINDOW);
        } else {
            self.attention.clear(attention::WINDOW);
        }
        if entry.single_step {
            self.run_one()
        } else if self.vm.deterministic {
            self.run_loop::<true>()
        } else {
            self.run_loop::<false>()
        }
    }

    /// [`Entry::single_step`].
    fn run_one(&mut self) -> Result<Exit, BackendError> {
        loop {
            let flags = self.attention.flags();
            if flags != 0 {
                let before = self.instructions;
                match self.attend(flags) {
                    Attended::Run | Attended::RunOne => {}
                    Attended::Again if self.instructions == before => continue,
                    Attended::Again => return Ok(Exit::SingleStep),
                    Attended::Leave(exit) => return Ok(exit),
                }
            }
            let exit = self.run_block(true);
            self.blocks.stop_running();
            return Ok(exit.or_else(|| self.pending_exit.take()).unwrap_or(Exit::SingleStep));
        }
    }
}

/// A processor as the monitor sees it.
pub(crate) struct SoftVcpu {
    cpu: Box<Cpu>,
}

impl SoftVcpu {
    pub fn new(cpu: Cpu) -> SoftVcpu {
        SoftVcpu { cpu: Box::new(cpu) }
    }
}

impl Vcpu for SoftVcpu {
    fn run(&mut self, bus: &dyn Bus, entry: Entry) -> Result<Exit, BackendError> {
        let bus: *const dyn Bus = bus;
        // SAFETY: only the lifetime is changed; the pointer is dropped before this method returns.
        let bus = unsafe { std::mem::transmute::<*const dyn Bus, *const (dyn Bus + 'static)>(bus) };
        self.cpu.bus = Some(BusPointer(bus));
        self.cpu.attention.set_in_guest(true);
        let exit = self.cpu.run(entry);
        self.cpu.attention.set_in_guest(false);
        self.cpu.blocks.stop_running();
        self.cpu.bus = None;
        exit
    }

    fn registers(&self, mask: RegisterMask) -> Result<Registers, BackendError> {
        let cpu = &self.cpu;
        let mut r = Registers::default();
        if mask.contains(RegisterMask::GPR) {
            r.gpr.copy_from_slice(&cpu.regs[..16]);
            r.rip = cpu.rip;
            r.rflags = cpu.flags();
        }
        if mask.contains(RegisterMask::SEGMENT) {
            [r.es, r.cs, r.ss, r.ds, r.fs, r.gs] = cpu.seg;
            (r.ldtr, r.tr, r.gdtr, r.idtr) = (cpu.ldtr, cpu.tr, cpu.gdtr, cpu.idtr);
        }
        if mask.contains(RegisterMask::CONTROL) {
            (r.cr0, r.cr2, r.cr3, r.cr4) = (cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4);
            r.cr8 = cpu.lapic.as_ref().map_or(cpu.cr8, |lapic| lapic.cr8().into());
            r.xcr0 = 1;
            r.pdpte = cpu.pdpte;
        }
        if mask.contains(RegisterMask::MSR) {
            r.efer = cpu.efer;
            (r.star, r.lstar, r.cstar, r.sfmask) = (cpu.msr.star, cpu.msr.lstar, cpu.msr.cstar, cpu.msr.sfmask);
            (r.kernel_gs_base, r.misc_enable) = (cpu.msr.kernel_gs_base, cpu.msr.misc_enable);
        }
        if mask.contains(RegisterMask::DEBUG) {
            (r.dr, r.dr6, r.dr7) = (cpu.dr, cpu.dr6, cpu.dr7);
        }
        Ok(r)
    }

    fn set_registers(&mut self, registers: &Registers, mask: RegisterMask) -> Result<(), BackendError> {
        let mut all = self.registers(RegisterMask::all())?;
        let new = registers;
        if mask.contains(RegisterMask::GPR) {
            (all.gpr, all.rip, all.rflags) = (new.gpr, new.rip, new.rflags);
        }
        if mask.contains(RegisterMask::SEGMENT) {
            (all.es, all.cs, all.ss, all.ds, all.fs, all.gs) = (new.es, new.cs, new.ss, new.ds, new.fs, new.gs);
            (all.ldtr, all.tr, all.gdtr, all.idtr) = (new.ldtr, new.tr, new.gdtr, new.idtr);
        }
        if mask.contains(RegisterMask::CONTROL) {
            (all.cr0, all.cr2, all.cr3, all.cr4, all.cr8, all.pdpte) = (new.cr0, new.cr2, new.cr3, new.cr4, new.cr8, new.pdpte);
        }
        if mask.contains(RegisterMask::MSR) {
            (all.efer, all.star, all.lstar, all.cstar) = (new.efer, new.star, new.lstar, new.cstar);
            (all.sfmask, all.kernel_gs_base, all.misc_enable) = (new.sfmask, new.kernel_gs_base, new.misc_enable);
        }
        if mask.contains(RegisterMask::DEBUG) {
            (all.dr, all.dr6, all.dr7) = (new.dr, new.dr6, new.dr7);
        }
        check(&mut all)?;
        if mask == RegisterMask::GPR {
            self.cpu.set_general(&all);
        } else {
            self.cpu.set_all(&all);
            match &self.cpu.lapic {
                Some(lapic) => lapic.set_cr8((all.cr8 & 15) as u8),
                None => self.cpu.cr8 = all.cr8 & 15,
            }
        }
        Ok(())
    }

    fn msr(&self, index: u32) -> Result<u64, BackendError> {
        self.cpu.peek_msr(index).ok_or_else(|| BackendError::Invalid(format!("no MSR {index:#x}")))
    }

    fn set_msr(&mut self, index: u32, value: u64) -> Result<(), BackendError> {
        self.cpu.poke_msr(index, value).ok_or_else(|| BackendError::Invalid(format!("MSR {index:#x} cannot hold {value:#x}")))
    }

    fn fxsave(&self) -> Result<[u8; 512], BackendError> {
        Ok(self.cpu.fx.to_bytes())
    }

    fn set_fxsave(&mut self, area: &[u8; 512]) -> Result<(), BackendError> {
        if self.cpu.fx.load_bytes(area) { Ok(()) } else { Err(BackendError::Invalid("reserved bits in MXCSR".into())) }
    }

    fn stats(&self) -> VcpuStats {
        let mut stats = self.cpu.stats;
        stats.instructions = Some(self.cpu.instructions);
        stats.trace_hash = self.cpu.vm.deterministic.then_some(self.cpu.trace_hash);
        stats
    }
}

/// Whether a processor can hold these values; completes EFER.LMA, which follows from the others.
fn check(registers: &mut Registers) -> Result<(), BackendError> {
    let paging = registers.cr0 & cr0::PG != 0;
    if paging && registers.cr0 & cr0::PE == 0 {
        return Err(BackendError::Invalid("CR0.PG without CR0.PE".into()));
    }
    if paging && registers.efer & efer::LME != 0 && registers.cr4 & crate::cpu::cr4::PAE == 0 {
        return Err(BackendError::Invalid("long mode without CR4.PAE".into()));
    }
    if paging && registers.efer & efer::LME != 0 {
        registers.efer |= efer::LMA;
    } else {
        registers.efer &= !efer::LMA;
    }
    registers.rflags = registers.rflags & !0xffff_ffff_ffc0_802a | rflags::FIXED;
    Ok(())
}
