//! A processor on KVM: the run loop.
//!
//! KVM finishes an access that left the guest (IN, MMIO, MSR) on the *next* KVM_RUN, from what was written into the run page. While
//! such an access is unfinished the registers are between two instructions, so before the loop hands a processor back it lets KVM
//! finish by one KVM_RUN with `immediate_exit`, which executes no guest code.

// Registers a doorbell, writes extended state and calls KVM_INTERRUPT, which kvm-ioctls lacks.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, kvm_guest_debug, kvm_xsave};
use kvm_ioctls::VcpuFd;
use vmm::exit::Access;
use vmm::registers::{RAX, RCX, RDI, RSI};
use vmm::{BackendError, Bus, Entry, Exit, Inject, Paging, PortCall, RegisterMask, Registers, Vcpu, VcpuId, VcpuStats};

use crate::diagnose::Guest;
use crate::exits::{self, IoExit, RawExit};
use crate::restart::Write;
use crate::slots::Kind;
use crate::vm::Shared;
use crate::{cpuid, diagnose, host_error, restart, state};

/// `_IOW(KVMIO, 0x86, struct kvm_interrupt)` (linux/kvm.h).
const KVM_INTERRUPT: libc::Ioctl = 0x4004_ae86;
/// Bytes of the FXSAVE area, and where the XSAVE header begins (Intel SDM vol. 1 section 13.4).
const FXSAVE_SIZE: usize = 512;
/// XSTATE_BV bits of what the FXSAVE area holds: x87 and SSE.
const XSTATE_LEGACY: u32 = 3;
/// Where MXCSR and MXCSR_MASK are in the FXSAVE area.
const FXSAVE_MXCSR: usize = 24;
/// MXCSR bits that exist on every processor with long mode (Intel SDM vol. 1 section 10.2.3).
const MXCSR_VALID: u32 = 0xffff;

/// A processor.
pub(crate) struct KvmVcpu {
    // Before `shared`: the processor goes before its machine's memory does.
    fd: VcpuFd,
    shared: Arc<Shared>,
    id: VcpuId,
    /// An IN that the bus declined, and the element that waits for its answer; or an OUT string that goes on.
    io: Option<(IoExit, u32)>,
    /// KVM has to be entered to finish an access.
    unfinished: bool,
    stepping: bool,
    stats: VcpuStats,
}

impl KvmVcpu {
    pub(crate) fn new(shared: Arc<Shared>, id: VcpuId) -> Result<KvmVcpu, BackendError> {
        let fd = shared.fd.create_vcpu(u64::from(id)).map_err(|e| host_error("KVM_CREATE_VCPU", e))?;
        fd.set_cpuid2(&cpuid::for_vcpu(&shared.config.cpuid, id)?).map_err(|e| host_error("KVM_SET_CPUID2", e))?;
        Ok(KvmVcpu { fd, shared, id, io: None, unfinished: false, stepping: false, stats: VcpuStats::default() })
    }

    /// The loop of [`Vcpu::run`], with the doorbell in place.
    fn run_loop(&mut self, bus: &dyn Bus, entry: Entry) -> Result<Exit, BackendError> {
        loop {
            exits::set_immediate_exit(&mut self.fd, false);
            let kicked = self.shared.doorbells[self.id as usize].is_kicked();
            if kicked && !self.unfinished {
                self.shared.doorbells[self.id as usize].answer_kick();
                return Ok(Exit::Interrupted);
            }
            if kicked {
                exits::set_immediate_exit(&mut self.fd, true);
            }
            self.offer_interrupts(bus, entry.interrupt_window)?;
            let exit = self.enter()?;
            if let Some(exit) = self.on_exit(exit, bus)? {
                return Ok(exit);
            }
        }
    }

    /// One KVM_RUN.
    fn enter(&mut self) -> Result<RawExit, BackendError> {
        self.shared.gate.enter();
        let exit = exits::enter(&mut self.fd);
        self.shared.gate.leave();
        self.unfinished = false;
        exit.map_err(|e| self.internal_error(&format!("KVM_RUN failed: {}", std::io::Error::from(e))))
    }

    /// Lets KVM finish what is under way, without executing guest code. What it asks for meanwhile is declined.
    fn finish(&mut self) -> Result<(), BackendError> {
        if let Some((io, index)) = self.io.take() {
            // Nobody answered the rest of an IN: as an empty bus would.
            for index in index..io.count {
                if io.input {
                    exits::answer_io(&mut self.fd, &io, index, u32::MAX);
                }
            }
            self.unfinished = true;
        }
        while self.unfinished {
            exits::set_immediate_exit(&mut self.fd, true);
            match self.enter()? {
                RawExit::Io(io) => {
                    self.io = Some((io, 0));
                    self.finish()?;
                }
                RawExit::MmioRead { .. } => {
                    exits::answer_mmio(&mut self.fd, [0; 8]);
                    self.unfinished = true;
                }
                RawExit::MmioWrite { .. } => self.unfinished = true,
                _ => {}
            }
        }
        Ok(())
    }

    /// Hands over the 8259 pair's interrupt, or asks KVM to say when the guest can take one.
    fn offer_interrupts(&mut self, bus: &dyn Bus, window_wanted: bool) -> Result<(), BackendError> {
        let external = self.id == 0 && self.shared.config.local_apic && self.shared.extint.load(Ordering::SeqCst);
        let run = self.fd.get_kvm_run();
        run.request_interrupt_window = u8::from(window_wanted || external);
        // What KVM said when it last came back; nothing has run since. `if_flag` and LINT0's mask are part of it.
        if external && run.ready_for_interrupt_injection != 0 && run.if_flag != 0 && !self.unfinished {
            run.ready_for_interrupt_injection = 0;
            let vector = bus.acknowledge_extint();
            self.interrupt(vector)?;
        }
        Ok(())
    }

    fn on_exit(&mut self, exit: RawExit, bus: &dyn Bus) -> Result<Option<Exit>, BackendError> {
        match exit {
            RawExit::Interrupted => Ok(None),
            RawExit::Io(io) => {
                self.stats.port += u64::from(io.count);
                if bus.takes_registers(io.port) {
                    self.call_port(&io, bus)?;
                    return Ok(None);
                }
                self.io = Some((io, 0));
                self.go_on_with_io(None, bus)
            }
            RawExit::MmioRead { gpa, size } => self.mmio_read(gpa, size, bus),
            RawExit::MmioWrite { gpa, size, data } => self.mmio_write(gpa, &data[..size], bus),
            RawExit::ReadMsr(index) => {
                self.stats.msr += 1;
                let answer = bus.read_msr(self.id, index).unwrap_or_else(|| {
                    diagnose::unknown_msr(index, None);
                    Err(vmm::MsrFault)
                });
                exits::answer_msr(&mut self.fd, answer.ok());
                self.unfinished = true;
                Ok(None)
            }
            RawExit::WriteMsr(index, value) => {
                self.stats.msr += 1;
                let answer = bus.write_msr(self.id, index, value).unwrap_or_else(|| {
                    diagnose::unknown_msr(index, Some(value));
                    Err(vmm::MsrFault)
                });
                exits::answer_msr(&mut self.fd, answer.ok().map(|()| value));
                self.unfinished = true;
                Ok(None)
            }
            RawExit::Halt => {
                self.stats.halts += 1;
                Ok(Some(Exit::Halt))
            }
            // For the 8259 pair the loop goes round and injects; the window of the caller is only open without it.
            RawExit::InterruptWindow if self.shared.config.local_apic && self.shared.extint.load(Ordering::SeqCst) => Ok(None),
            RawExit::InterruptWindow => Ok(Some(Exit::InterruptWindow)),
            RawExit::EndOfInterrupt(vector) => {
                bus.end_of_interrupt(vector);
                Ok(None)
            }
            RawExit::Debug => Ok(Some(Exit::SingleStep)),
            RawExit::Shutdown => Ok(Some(Exit::Shutdown)),
            RawExit::InternalError(suberror) => match self.fetch_from_hole() {
                Some(gpa) => Ok(Some(Exit::Protection { gpa, access: Access::Execute })),
                None => Err(self.internal_error(&diagnose::internal(suberror))),
            },
            RawExit::FailEntry(reason) => {
                Err(self.internal_error(&format!("the processor refuses the guest's state (hardware reason {reason:#x})")))
            }
            RawExit::Unexpected(reason) => Err(self.internal_error(&format!("KVM left with reason {reason}, which means nothing here"))),
        }
    }

    /// Takes the elements of a port access to the bus until it declines one or all are done.
    fn go_on_with_io(&mut self, answer: Option<u32>, bus: &dyn Bus) -> Result<Option<Exit>, BackendError> {
        let Some((io, mut index)) = self.io else { return Ok(None) };
        let string = io.count > 1;
        if let Some(value) = answer {
            exits::answer_io(&mut self.fd, &io, index, value);
            index += 1;
        }
        while index < io.count {
            if io.input {
                let Some(value) = bus.port_in(self.id, io.port, io.size) else {
                    self.io = Some((io, index));
                    return Ok(Some(Exit::PortIn { port: io.port, size: io.size, string }));
                };
                exits::answer_io(&mut self.fd, &io, index, value);
            } else {
                let value = exits::io_element(&mut self.fd, &io, index);
                if !bus.port_out(self.id, io.port, io.size, value) {
                    self.io = Some((io, index + 1));
                    if index + 1 == io.count {
                        self.finish()?;
                    }
                    return Ok(Some(Exit::PortOut { port: io.port, size: io.size, value, string }));
                }
            }
            index += 1;
        }
        self.io = None;
        self.unfinished = true;
        Ok(None)
    }

    /// Takes an access to a port that takes registers to the bus, element by element, and writes back once what became of the registers.
    ///
    /// RIP has to stay: KVM moves it when it finishes an IN or OUT, and has moved it when it tells of OUTS. KVM does not tell strings from
    /// single accesses, but such a port has strings of bytes and single accesses of more: so the size tells.
    fn call_port(&mut self, io: &IoExit, bus: &dyn Bus) -> Result<(), BackendError> {
        let mut registers = state::read(&self.fd, &self.shared.config.memory, RegisterMask::GPR)?;
        let before = registers.gpr;
        let string = io.size == 1 || io.count > 1;
        let special = self.fd.get_sregs().map_err(|e| host_error("KVM_GET_SREGS", e))?;
        let mut call = PortCall {
            gpr: before,
            port: io.port,
            size: io.size,
            write: !io.input,
            string,
            data: u32::MAX,
            cpl: special.ss.dpl,
            long_mode: special.cs.l != 0,
            paging: Paging { cr0: special.cr0, cr3: special.cr3, cr4: special.cr4, efer: special.efer },
            undefined: false,
        };
        for index in 0..io.count {
            if call.write {
                call.data = exits::io_element(&mut self.fd, io, index);
            }
            bus.port_call(self.id, &mut call);
            if io.input {
                let answer = if string { call.data } else { call.gpr[RAX] as u32 };
                exits::answer_io(&mut self.fd, io, index, answer);
            }
            if string {
                for register in [RCX, RSI, RDI] {
                    call.gpr[register] = before[register];
                }
            }
        }
        if io.input && !string {
            // KVM puts the answer into as much of RAX as the instruction changes.
            call.gpr[RAX] = before[RAX];
        }
        if call.gpr != before {
            registers.gpr = call.gpr;
            state::write(&self.fd, &registers, RegisterMask::GPR)?;
        }
        self.unfinished = true;
        Ok(())
    }

    fn mmio_read(&mut self, gpa: u64, size: usize, bus: &dyn Bus) -> Result<Option<Exit>, BackendError> {
        self.stats.mmio += 1;
        let protected = self.shared.kind_at(gpa).is_some();
        let mut data = [0; 8];
        if !protected && bus.mmio_read(self.id, gpa, &mut data[..size]) {
            exits::answer_mmio(&mut self.fd, data);
            self.unfinished = true;
            return Ok(None);
        }
        // KVM has not written anything back yet: let it finish with zeroes, and undo that.
        let before = self.fd.get_regs().map_err(|e| host_error("KVM_GET_REGS", e))?;
        exits::answer_mmio(&mut self.fd, [0; 8]);
        self.unfinished = true;
        self.finish()?;
        self.fd.set_regs(&before).map_err(|e| host_error("KVM_SET_REGS", e))?;
        Ok(Some(if protected { Exit::Protection { gpa, access: Access::Read } } else { Exit::Mmio { gpa, size: size as u8, write: None } }))
    }

    fn mmio_write(&mut self, gpa: u64, data: &[u8], bus: &dyn Bus) -> Result<Option<Exit>, BackendError> {
        self.stats.mmio += 1;
        let protected = self.shared.kind_at(gpa).is_some();
        self.unfinished = true;
        if !protected && bus.mmio_write(self.id, gpa, data) {
            return Ok(None);
        }
        self.finish()?;
        self.go_back(&Write { gpa, data })?;
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        Ok(Some(if protected {
            Exit::Protection { gpa, access: Access::Write }
        } else {
            Exit::Mmio { gpa, size: data.len() as u8, write: Some(u64::from_le_bytes(value)) }
        }))
    }

    /// Puts the processor back to before the instruction that wrote what nobody took.
    fn go_back(&mut self, write: &Write) -> Result<(), BackendError> {
        let memory = &self.shared.config.memory;
        let after = state::read(&self.fd, memory, RegisterMask::all())?;
        match restart::before(&after, write, &Guest { fd: &self.fd, memory }) {
            Some(before) => state::write(&self.fd, &before, RegisterMask::GPR),
            None => {
                tracing::warn!(rip = after.rip, gpa = write.gpa, "a write that was declined cannot be repeated: RIP is behind it");
                Ok(())
            }
        }
    }

    /// Where RIP points when that is memory the guest may not touch at all.
    fn fetch_from_hole(&self) -> Option<u64> {
        let gpa = diagnose::rip_address(&self.fd)?;
        (self.shared.kind_at(gpa)? == Kind::Hole).then_some(gpa)
    }

    fn internal_error(&self, what: &str) -> BackendError {
        BackendError::Internal(diagnose::report(&self.fd, &self.shared.config.memory, self.id, what))
    }

    fn inject(&mut self, inject: Inject) -> Result<(), BackendError> {
        match inject {
            Inject::Interrupt(vector) => self.interrupt(vector),
            Inject::Nmi => self.fd.nmi().map_err(|e| host_error("KVM_NMI", e)),
            Inject::Exception(vector, code) => {
                let mut events = self.fd.get_vcpu_events().map_err(|e| host_error("KVM_GET_VCPU_EVENTS", e))?;
                events.exception.injected = 1;
                events.exception.nr = vector;
                events.exception.has_error_code = u8::from(code.is_some());
                events.exception.error_code = code.unwrap_or(0);
                self.fd.set_vcpu_events(&events).map_err(|e| host_error("KVM_SET_VCPU_EVENTS", e))
            }
        }
    }

    fn interrupt(&mut self, vector: u8) -> Result<(), BackendError> {
        self.stats.interrupts += 1;
        let argument = kvm_bindings::kvm_interrupt { irq: u32::from(vector) };
        // SAFETY: the kernel reads one kvm_interrupt, which lives until the call returns.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_INTERRUPT, &raw const argument) };
        if result == 0 { Ok(()) } else { Err(BackendError::Host { what: "KVM_INTERRUPT".into(), source: std::io::Error::last_os_error() }) }
    }

    fn set_stepping(&mut self, stepping: bool) -> Result<(), BackendError> {
        if stepping != self.stepping {
            let control = if stepping { KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP } else { 0 };
            let debug = kvm_guest_debug { control, ..Default::default() };
            self.fd.set_guest_debug(&debug).map_err(|e| host_error("KVM_SET_GUEST_DEBUG", e))?;
            self.stepping = stepping;
        }
        Ok(())
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, bus: &dyn Bus, entry: Entry) -> Result<Exit, BackendError> {
        if let Some(inject) = entry.inject {
            self.inject(inject)?;
        }
        self.set_stepping(entry.single_step)?;
        // An IN that was declined and then not answered reads as ones.
        let answer = self.io.is_some_and(|(io, _)| io.input).then(|| entry.port_in.unwrap_or(u32::MAX));
        if let Some(exit) = self.go_on_with_io(answer, bus)? {
            return Ok(exit);
        }
        let immediate_exit = exits::immediate_exit(&mut self.fd);
        let shared = Arc::clone(&self.shared);
        // SAFETY: the run page is mapped as long as `self.fd`, which outlives this call; the guard is dropped here.
        let _entered = unsafe { shared.doorbells[self.id as usize].enter(immediate_exit) };
        self.run_loop(bus, entry)
    }

    fn registers(&self, mask: RegisterMask) -> Result<Registers, BackendError> {
        state::read(&self.fd, &self.shared.config.memory, mask)
    }

    fn set_registers(&mut self, registers: &Registers, mask: RegisterMask) -> Result<(), BackendError> {
        self.finish()?;
        state::write(&self.fd, registers, mask)?;
        if mask.contains(RegisterMask::CONTROL) {
            // Without a local APIC in the kernel, KVM_RUN takes the task priority from here.
            self.fd.get_kvm_run().cr8 = registers.cr8;
        }
        Ok(())
    }

    fn msr(&self, index: u32) -> Result<u64, BackendError> {
        state::get_msr(&self.fd, index)
    }

    fn set_msr(&mut self, index: u32, value: u64) -> Result<(), BackendError> {
        state::set_msr(&self.fd, index, value)
    }

    fn fxsave(&self) -> Result<[u8; 512], BackendError> {
        let xsave = self.fd.get_xsave().map_err(|e| host_error("KVM_GET_XSAVE", e))?;
        let mut area = [0; FXSAVE_SIZE];
        for (bytes, word) in area.chunks_exact_mut(4).zip(xsave.region) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Ok(area)
    }

    fn set_fxsave(&mut self, area: &[u8; 512]) -> Result<(), BackendError> {
        let words = area.as_chunks::<4>().0;
        let mxcsr = u32::from_le_bytes(words[FXSAVE_MXCSR / 4]);
        if mxcsr & !MXCSR_VALID != 0 {
            return Err(BackendError::Invalid(format!("MXCSR {mxcsr:#x} has reserved bits set")));
        }
        let mut xsave: kvm_xsave = self.fd.get_xsave().map_err(|e| host_error("KVM_GET_XSAVE", e))?;
        for (word, bytes) in xsave.region.iter_mut().zip(words) {
            *word = u32::from_le_bytes(*bytes);
        }
        xsave.region[FXSAVE_SIZE / 4] |= XSTATE_LEGACY;
        // SAFETY: we enable no dynamic features (arch_prctl), so the state fits the 4096 bytes of kvm_xsave.
        unsafe { self.fd.set_xsave(&xsave) }.map_err(|e| host_error("KVM_SET_XSAVE", e))
    }

    fn stats(&self) -> VcpuStats {
        self.stats
    }
}
