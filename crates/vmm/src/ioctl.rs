//! vmm(4)'s operations as its exact command words and structures.
//!
//! [`Vmm::vmm_ioctl`] takes what `ioctl(2)` on `/dev/vmm` takes: a command word, its argument as bytes, and access to the caller's
//! memory for the pointers inside. The words and structures are in [`abi::vmm`]. Only here do exits have the processor's own
//! numbers: SVM's on a backend that runs on SVM, VMX's on all others, the software CPU included.

use abi::vmm::{self as words, svm, vmx};
use rustix::io::Errno;
use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::backend::{Entry, Inject};
use crate::bus::{Bus, MsrFault, VcpuId};
use crate::exit::Exit;
use crate::fetch;
use crate::memory::{PAGE_SIZE, Protection};
use crate::monitor::{CreateRequest, MemoryRange, RangeKind, VmParams, VmParamsMask, Vmm, VmmError};
use crate::registers::{DescriptorTable, RegisterMask, Registers, Segment};

/// The caller's address space, as copyin(9) and copyout(9) see it.
pub trait UserMemory {
    /// Reads `data.len()` bytes at `address`.
    ///
    /// # Errors
    /// `EFAULT` when that is not readable memory of the caller.
    fn copy_in(&self, address: u64, data: &mut [u8]) -> Result<(), Errno>;

    /// Writes `data` at `address`.
    ///
    /// # Errors
    /// `EFAULT` when that is not writable memory of the caller.
    fn copy_out(&mut self, address: u64, data: &[u8]) -> Result<(), Errno>;
}

/// RFLAGS: interrupts are allowed.
const RFLAGS_IF: u64 = 1 << 9;
/// Bits of a memory protection: PROT_READ, PROT_WRITE, PROT_EXEC.
const PROT_MASK: i32 = 7;

impl Vmm {
    /// One `ioctl(2)` on `/dev/vmm`.
    ///
    /// # Errors
    /// `ENOTTY` for a command word that is none of vmm(4)'s, `EFAULT` when the argument or a pointer in it is not what the
    /// command needs, else what the operation says.
    pub fn vmm_ioctl(&self, command: u32, argument: &mut [u8], memory: &mut dyn UserMemory) -> Result<(), Errno> {
        match command {
            words::CREATE => self.ioctl_create(take(argument)?),
            words::RUN => self.ioctl_run(take(argument)?, memory),
            words::INFO => self.ioctl_info(take(argument)?, memory),
            words::TERM => {
                let params: &mut words::TerminateParams = take(argument)?;
                errno(self.terminate(params.vm_id.get()))
            }
            words::RESETCPU => {
                let params: &mut words::ResetCpuParams = take(argument)?;
                errno(self.reset_vcpu(params.vm_id.get(), params.vcpu_id.get(), &from_wire(&params.state)?))
            }
            words::INTR => {
                let params: &mut words::IntrParams = take(argument)?;
                errno(self.interrupt(params.vm_id.get(), params.vcpu_id.get(), params.intr.get() != 0))
            }
            words::READREGS => {
                let params: &mut words::RegistersParams = take(argument)?;
                let mask = RegisterMask::from_bits(params.mask.get()).ok_or(Errno::INVAL)?;
                let registers = errno(self.read_registers(params.vm_id.get(), params.vcpu_id.get(), mask))?;
                params.state = to_wire(&registers);
                Ok(())
            }
            words::WRITEREGS => {
                let params: &mut words::RegistersParams = take(argument)?;
                let mask = RegisterMask::from_bits(params.mask.get()).ok_or(Errno::INVAL)?;
                errno(self.write_registers(params.vm_id.get(), params.vcpu_id.get(), &from_wire(&params.state)?, mask))
            }
            words::READVMPARAMS => {
                let params: &mut words::VmParams = take(argument)?;
                let mask = VmParamsMask::from_bits(params.mask.get()).ok_or(Errno::INVAL)?;
                let values = errno(self.read_vm_params(params.vm_id.get(), params.vcpu_id.get()))?;
                if mask.contains(VmParamsMask::PVCLOCK_GPA) {
                    params.pvclock_gpa = U64::new(values.pvclock_gpa);
                }
                if mask.contains(VmParamsMask::PVCLOCK_VERSION) {
                    params.pvclock_version = U32::new(values.pvclock_version);
                }
                Ok(())
            }
            words::WRITEVMPARAMS => {
                let params: &mut words::VmParams = take(argument)?;
                let mask = VmParamsMask::from_bits(params.mask.get()).ok_or(Errno::INVAL)?;
                let values = VmParams { pvclock_gpa: params.pvclock_gpa.get(), pvclock_version: params.pvclock_version.get() };
                errno(self.write_vm_params(params.vm_id.get(), params.vcpu_id.get(), values, mask))
            }
            words::MPROTECT_EPT => {
                let params: &mut words::MprotectEptParams = take(argument)?;
                let prot = params.prot.get();
                let bits = u8::try_from(prot).map_err(|_| Errno::INVAL)?;
                if prot & !PROT_MASK != 0 {
                    return Err(Errno::INVAL);
                }
                let protection = Protection::from_bits_truncate(bits);
                errno(self.protect(params.vm_id.get(), params.vcpu_id.get(), params.sgpa.get(), params.size.get(), protection))
            }
            words::SHAREMEM => self.ioctl_sharemem(take(argument)?),
            _ => Err(Errno::NOTTY),
        }
    }

    fn ioctl_create(&self, params: &mut words::CreateParams) -> Result<(), Errno> {
        // No SEV here: a machine that needs it must not run without.
        if params.sev.get() != 0 || params.seves.get() != 0 {
            return Err(Errno::INVAL);
        }
        let length = params.name.iter().position(|byte| *byte == 0).ok_or(Errno::INVAL)?;
        let ranges = ranges_from_wire(params.nmemranges.get(), &params.memranges)?;
        let request = CreateRequest {
            name: String::from_utf8_lossy(&params.name[..length]).into_owned(),
            vcpus: u32::try_from(params.ncpus.get()).map_err(|_| Errno::INVAL)?,
            ranges,
        };
        let id = errno(self.create(&request))?;
        let addresses = errno(self.share_memory(id, &request.ranges))?;
        for (range, address) in params.memranges.iter_mut().zip(addresses) {
            range.va = U64::new(address);
        }
        params.id = U32::new(id);
        params.poscbit = U32::ZERO;
        Ok(())
    }

    fn ioctl_info(&self, params: &mut words::InfoParams, memory: &mut dyn UserMemory) -> Result<(), Errno> {
        let machines = self.info();
        let needed = (machines.len() * size_of::<words::InfoResult>()) as u64;
        params.count = U64::new(machines.len() as u64);
        if params.size.get() < needed {
            params.size = U64::new(needed);
            return Ok(());
        }
        let mut results = Vec::with_capacity(machines.len());
        for machine in &machines {
            let mut result = words::InfoResult::zeroed();
            result.memory = U64::new(machine.memory);
            result.resident = U64::new(machine.resident);
            result.ncpus = U64::new(machine.vcpus.len() as u64);
            result.vcpu_state.fill(words::VCPU_UNKNOWN);
            result.vcpu_state[..machine.vcpus.len()].copy_from_slice(&machine.vcpus);
            result.creator = I32::new(machine.creator.cast_signed());
            result.id = U32::new(machine.id);
            result.name[..machine.name.len()].copy_from_slice(machine.name.as_bytes());
            results.push(result);
        }
        memory.copy_out(params.buffer.get(), results.as_bytes())
    }

    fn ioctl_sharemem(&self, params: &mut words::ShareMemParams) -> Result<(), Errno> {
        let ranges = ranges_from_wire(params.nmemranges.get(), &params.memranges)?;
        let addresses = errno(self.share_memory(params.vm_id.get(), &ranges))?;
        for (out, address) in params.va.iter_mut().zip(addresses) {
            *out = U64::new(address);
        }
        Ok(())
    }

    fn ioctl_run(&self, params: &mut words::RunParams, memory: &mut dyn UserMemory) -> Result<(), Errno> {
        let (vm, vcpu) = (params.vm_id.get(), params.vcpu_id.get());
        let svm = self.backend().technology().starts_with("SVM");
        let mut exit = words::VmExit::zeroed();
        memory.copy_in(params.exit.get(), exit.as_mut_bytes())?;
        // What the caller left in the record answers the IN that it was told about; anything else in it is of no account.
        let answer = words::ExitInOut::read_from_prefix(&exit.record).map(|(io, _)| io).map_err(|_| Errno::FAULT)?;
        let entry = Entry {
            inject: inject(&params.inject)?,
            interrupt_window: params.intr_pending != 0,
            port_in: (answer.dir == words::DIRECTION_IN).then(|| answer.data.get()),
            single_step: false,
        };
        let reason = match self.run(vm, vcpu, entry, &NoDevices) {
            Ok(reason) => reason,
            Err(VmmError::Terminated(_)) => {
                params.exit_reason = U16::new(words::EXIT_TERMINATED);
                return Ok(());
            }
            Err(error) => {
                tracing::warn!(vm, vcpu, %error, "RUN");
                return Err(error.errno());
            }
        };
        let registers = errno(self.read_registers(vm, vcpu, RegisterMask::all()))?;
        exit.state = to_wire(&registers);
        exit.cpl = I32::new((registers.ss.access >> 5 & 3).cast_signed());
        exit.record = [0; 24];
        if let Err(error) = self.record_exit(vm, reason, &registers, &mut exit.record) {
            // vmm(4) ends a machine that cannot go on.
            let _ = self.terminate(vm);
            return Err(error);
        }
        params.exit_reason = U16::new(raw_code(reason, svm));
        params.irqready = u8::from(reason == Exit::InterruptWindow || registers.rflags & RFLAGS_IF != 0);
        memory.copy_out(params.exit.get(), exit.as_bytes())
    }

    /// Fills the exit's union. `Err` for exits after which the machine cannot go on.
    fn record_exit(&self, vm: u32, exit: Exit, registers: &Registers, record: &mut [u8; 24]) -> Result<(), Errno> {
        let io = |size, dir, string, port, data| {
            let mut io = words::ExitInOut::zeroed();
            (io.size, io.dir, io.string) = (size, dir, u8::from(string));
            io.port = U16::new(port);
            io.data = U32::new(data);
            io
        };
        match exit {
            Exit::PortIn { port, size, string } => put(record, &io(size, words::DIRECTION_IN, string, port, 0)),
            Exit::PortOut { port, size, value, string } => put(record, &io(size, words::DIRECTION_OUT, string, port, value)),
            Exit::Mmio { gpa, .. } => {
                if errno(self.range_at(vm, gpa))? != Some(RangeKind::Mmio) {
                    tracing::warn!(vm, gpa, "access outside all memory ranges");
                    return Err(Errno::INVAL);
                }
                put(record, &self.ept_record(vm, words::FAULT_MMIO_ASSIST, registers)?);
            }
            Exit::Protection { .. } => put(record, &self.ept_record(vm, words::FAULT_PROTECT, registers)?),
            // Nothing can wake it.
            Exit::Halt if registers.rflags & RFLAGS_IF == 0 => return Err(Errno::IO),
            Exit::Halt | Exit::InterruptWindow | Exit::Interrupted | Exit::SingleStep | Exit::Shutdown => {}
        }
        Ok(())
    }

    fn ept_record(&self, vm: u32, fault: u8, registers: &Registers) -> Result<words::ExitEpt, Errno> {
        let (insn_bytes, insn_len) = fetch::instruction(registers, &errno(self.memory(vm))?);
        let info = if insn_len > 0 { words::EPT_BYTES_VALID } else { 0 };
        Ok(words::ExitEpt { fault_type: fault, info, insn_len, insn_bytes })
    }
}

/// The bus of machines that are run by ioctl: there is nothing on it, so that everything exits.
struct NoDevices;

impl Bus for NoDevices {
    /// vmm(4) ignores writes to MSRs that it does not know.
    fn write_msr(&self, _: VcpuId, index: u32, _: u64) -> Option<Result<(), MsrFault>> {
        (index != abi::kvm::MSR_SYSTEM_TIME_NEW && index != abi::kvm::MSR_WALL_CLOCK_NEW).then_some(Ok(()))
    }
}

/// The processor's number of an exit.
fn raw_code(exit: Exit, svm: bool) -> u16 {
    let (intel, amd) = match exit {
        Exit::PortIn { .. } | Exit::PortOut { .. } => (vmx::IO, svm::IOIO),
        Exit::Mmio { .. } | Exit::Protection { .. } => (vmx::EPT_VIOLATION, svm::NPF),
        Exit::Halt => (vmx::HLT, svm::HLT),
        Exit::InterruptWindow => (vmx::INT_WINDOW, svm::VINTR),
        Exit::Interrupted => (words::EXIT_NONE, words::EXIT_NONE),
        Exit::SingleStep => (vmx::MONITOR_TRAP, svm::EXCEPTION_DB),
        Exit::Shutdown => (vmx::TRIPLE_FAULT, svm::SHUTDOWN),
    };
    if svm { amd } else { intel }
}

fn inject(event: &words::InjectEvent) -> Result<Option<Inject>, Errno> {
    match event.kind {
        words::INJECT_NONE => Ok(None),
        words::INJECT_INTR => Ok(Some(Inject::Interrupt(event.vector))),
        words::INJECT_NMI => Ok(Some(Inject::Nmi)),
        words::INJECT_EXCEPTION if event.vector < 32 => {
            // The exceptions with an error code (Intel SDM vol. 3 table 7-1): #DF, #TS, #NP, #SS, #GP, #PF, #AC, #CP.
            let code = matches!(event.vector, 8 | 10..=14 | 17 | 21).then(|| event.errcode.get());
            Ok(Some(Inject::Exception(event.vector, code)))
        }
        _ => Err(Errno::INVAL),
    }
}

fn ranges_from_wire(count: u64, ranges: &[words::MemRange]) -> Result<Vec<MemoryRange>, Errno> {
    let count = usize::try_from(count).map_err(|_| Errno::INVAL)?;
    let ranges = ranges.get(..count).ok_or(Errno::INVAL)?;
    ranges
        .iter()
        .map(|range| {
            let kind = match range.kind.get() {
                words::MEM_RAM => RangeKind::Ram,
                words::MEM_RESERVED => RangeKind::Reserved,
                words::MEM_MMIO => RangeKind::Mmio,
                _ => return Err(Errno::INVAL),
            };
            if !range.va.get().is_multiple_of(PAGE_SIZE) {
                return Err(Errno::INVAL);
            }
            Ok(MemoryRange { gpa: range.gpa.get(), size: range.size.get(), kind })
        })
        .collect()
}

/// Registers as vmm(4) lays them out.
fn to_wire(r: &Registers) -> words::RegState {
    let mut state = words::RegState::zeroed();
    for (out, value) in state.gpr.iter_mut().zip(r.gpr.into_iter().chain([r.rip, r.rflags])) {
        *out = U64::new(value);
    }
    let [p0, p1, p2, p3] = r.pdpte;
    state.cr = [r.cr0, r.cr2, r.cr3, r.cr4, r.cr8, r.xcr0, p0, p1, p2, p3].map(U64::new);
    state.msr = [r.efer, r.star, r.lstar, r.cstar, r.sfmask, r.kernel_gs_base, r.misc_enable].map(U64::new);
    let [d0, d1, d2, d3] = r.dr;
    state.dr = [d0, d1, d2, d3, r.dr6, r.dr7].map(U64::new);
    state.segment = [r.es, r.cs, r.ss, r.ds, r.fs, r.gs, r.ldtr, r.tr].map(|segment| {
        let mut wire = words::SegmentInfo::zeroed();
        wire.selector = U16::new(segment.selector);
        wire.limit = U32::new(segment.limit);
        wire.access = U32::new(segment.access);
        wire.base = U64::new(segment.base);
        wire
    });
    let table = |t: DescriptorTable| {
        let mut wire = words::SegmentInfo::zeroed();
        wire.limit = U32::new(t.limit.into());
        wire.base = U64::new(t.base);
        wire
    };
    state.gdtr = table(r.gdtr);
    state.idtr = table(r.idtr);
    state
}

/// Registers from vmm(4)'s layout; `EINVAL` for descriptor table limits that no processor can hold.
fn from_wire(state: &words::RegState) -> Result<Registers, Errno> {
    let gpr = state.gpr.map(U64::get);
    let [cr0, cr2, cr3, cr4, cr8, xcr0, p0, p1, p2, p3] = state.cr.map(U64::get);
    let [efer, star, lstar, cstar, sfmask, kernel_gs_base, misc_enable] = state.msr.map(U64::get);
    let [d0, d1, d2, d3, dr6, dr7] = state.dr.map(U64::get);
    let segment =
        |s: words::SegmentInfo| Segment { selector: s.selector.get(), limit: s.limit.get(), access: s.access.get(), base: s.base.get() };
    let table = |t: words::SegmentInfo| {
        let limit = u16::try_from(t.limit.get()).map_err(|_| Errno::INVAL)?;
        Ok::<_, Errno>(DescriptorTable { base: t.base.get(), limit })
    };
    let [es, cs, ss, ds, fs, gs, ldtr, tr] = state.segment.map(segment);
    let mut general = [0; 16];
    general.copy_from_slice(&gpr[..16]);
    Ok(Registers {
        gpr: general,
        rip: gpr[16],
        rflags: gpr[17],
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        xcr0,
        pdpte: [p0, p1, p2, p3],
        efer,
        star,
        lstar,
        cstar,
        sfmask,
        kernel_gs_base,
        misc_enable,
        dr: [d0, d1, d2, d3],
        dr6,
        dr7,
        es,
        cs,
        ss,
        ds,
        fs,
        gs,
        ldtr,
        tr,
        gdtr: table(state.gdtr)?,
        idtr: table(state.idtr)?,
    })
}

fn take<T: FromBytes + IntoBytes + KnownLayout + Immutable>(argument: &mut [u8]) -> Result<&mut T, Errno> {
    T::mut_from_bytes(argument).map_err(|_| Errno::FAULT)
}

fn put<T: IntoBytes + Immutable>(record: &mut [u8; 24], value: &T) {
    let bytes = value.as_bytes();
    record[..bytes.len()].copy_from_slice(bytes);
}

fn errno<T>(result: Result<T, VmmError>) -> Result<T, Errno> {
    result.map_err(|error| {
        tracing::debug!(%error, "vmm ioctl");
        error.errno()
    })
}
