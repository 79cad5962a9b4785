//! vmm(4)'s operations as methods, over any backend.
//!
//! A [`Vmm`] holds numbered machines. Each operation of the manual page is one method: CREATE, RUN, INFO, TERM, RESETCPU, INTR,
//! READREGS, WRITEREGS, READVMPARAMS, WRITEVMPARAMS, MPROTECT_EPT and SHAREMEM; `ioctl.rs` puts the exact command words on top.
//! Limits and errors are those of OpenBSD's `sys/dev/vmm/vmm.c`, with one difference: a machine may have up to 64 processors, where OpenBSD to
//! 7.9 takes exactly one.
//!
//! ```text
//!   stopped --RUN--> running --exit--> stopped          RUN, READREGS, ... while running: Busy
//!      |                |
//!      +-----TERM-------+--> (kicked out) --> gone      RUN under way: Terminated
//! ```

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};

use abi::kvm::{MSR_SYSTEM_TIME_NEW, SYSTEM_TIME_ENABLE};
use abi::vmm::{
    MAX_MEM_RANGES, MAX_NAME_LEN, MAX_VCPUS, MAX_VCPUS_PER_VM, MAX_VM_MEM_SIZE, VCPU_REQTERM, VCPU_RUNNING, VCPU_STOPPED, VCPU_TERMINATED,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::backend::{Backend, BackendError, BackendVm, Entry, Vcpu, VmConfig};
use crate::bus::{Bus, Hypercall, MsrFault, PortCall, VcpuId};
use crate::exit::Exit;
use crate::memory::{GuestMemory, PAGE_SIZE, Protection};
use crate::registers::{RegisterMask, Registers};
use crate::time::{HostClock, Timers};

/// Number of a machine. Never 0, never used twice.
pub type VmId = u32;

/// Hands out the paravirtual half of a machine's bus (see [`Vmm::with_paravirtual`]).
pub type ParavirtualFactory = Box<dyn Fn(&VmConfig) -> Arc<dyn Bus> + Send + Sync>;

/// All machines of one monitor.
pub struct Vmm {
    backend: Arc<dyn Backend>,
    paravirtual: Option<ParavirtualFactory>,
    machines: Mutex<BTreeMap<VmId, Arc<Machine>>>,
    last_id: AtomicU32,
}

struct Machine {
    id: VmId,
    name: String,
    creator: u32,
    ranges: Vec<MemoryRange>,
    memory: GuestMemory,
    // Before `vm`: processors go before their machine.
    vcpus: Vec<Slot>,
    vm: Arc<dyn BackendVm>,
    paravirtual: Mutex<Option<Arc<dyn Bus>>>,
    dying: AtomicBool,
    /// Processors inside RUN, and the news that one came out.
    running: Mutex<usize>,
    stopped: Condvar,
}

struct Slot {
    vcpu: Mutex<Box<dyn Vcpu>>,
    state: AtomicU8,
    /// INTR's word: an interrupt waits, leave as soon as the guest can take it.
    interrupt: AtomicBool,
}

/// What CREATE is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateRequest {
    /// Name, at most 63 bytes.
    pub name: String,
    /// Processors, 1 to 64.
    pub vcpus: u32,
    /// Guest physical memory, ascending, at most 16 ranges.
    pub ranges: Vec<MemoryRange>,
}

/// One range of guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// First address.
    pub gpa: u64,
    /// Size in bytes.
    pub size: u64,
    /// What is there.
    pub kind: RangeKind,
}

/// What is behind a range of guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeKind {
    /// Memory.
    Ram,
    /// Memory that is not for the guest's general use, as firmware.
    Reserved,
    /// Nothing: accesses exit.
    Mmio,
}

/// What INFO tells about one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmInfo {
    /// Number.
    pub id: VmId,
    /// Name.
    pub name: String,
    /// Process that made it.
    pub creator: u32,
    /// Bytes of guest memory.
    pub memory: u64,
    /// Bytes of it that are resident on the host.
    pub resident: u64,
    /// State of each processor, as vmm(4) numbers them ([`abi::vmm::VCPU_STOPPED`] and so on).
    pub vcpus: Vec<u8>,
}

/// What READVMPARAMS and WRITEVMPARAMS carry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VmParams {
    /// Guest physical address of pvclock's page with its enable bit, as the guest wrote it to MSR 0x4b564d01.
    pub pvclock_gpa: u64,
    /// `version` field of that page.
    pub pvclock_version: u32,
}

bitflags::bitflags! {
    /// Which of [`VmParams`] to write.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct VmParamsMask: u32 {
        /// `pvclock_gpa`.
        const PVCLOCK_GPA = 1;
        /// `pvclock_version`.
        const PVCLOCK_VERSION = 2;
    }
}

/// Why an operation failed. [`VmmError::errno`] is vmm(4)'s number for it.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// ENOENT.
    #[error("there is no machine {0}")]
    NoSuchVm(VmId),
    /// ENOENT.
    #[error("machine {0} has no processor {1}")]
    NoSuchVcpu(VmId, VcpuId),
    /// EBUSY: the processor is running.
    #[error("processor {1} of machine {0} is running")]
    Busy(VmId, VcpuId),
    /// EBUSY: TERM came first. RUN's ioctl turns it into an exit reason.
    #[error("machine {0} was terminated")]
    Terminated(VmId),
    /// ENOMEM.
    #[error("{wanted} more processors would be too many: {used} of {MAX_VCPUS} are in use")]
    TooManyVcpus {
        /// Asked for.
        wanted: usize,
        /// In use by all machines.
        used: usize,
    },
    /// ENOMEM.
    #[error("no memory for the machine: {0}")]
    NoMemory(std::io::Error),
    /// EINVAL.
    #[error("{0}")]
    Invalid(String),
    /// EINVAL, EOPNOTSUPP or EIO.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl VmmError {
    /// The error number vmm(4) answers with.
    pub fn errno(&self) -> rustix::io::Errno {
        use rustix::io::Errno;
        match self {
            VmmError::NoSuchVm(_) | VmmError::NoSuchVcpu(..) => Errno::NOENT,
            VmmError::Busy(..) | VmmError::Terminated(_) => Errno::BUSY,
            VmmError::TooManyVcpus { .. } | VmmError::NoMemory(_) => Errno::NOMEM,
            VmmError::Invalid(_) | VmmError::Backend(BackendError::Invalid(_)) => Errno::INVAL,
            VmmError::Backend(BackendError::Unsupported(_)) => Errno::OPNOTSUPP,
            VmmError::Backend(BackendError::Host { source, .. }) if source.kind() == std::io::ErrorKind::OutOfMemory => Errno::NOMEM,
            VmmError::Backend(BackendError::Host { .. } | BackendError::Internal(_)) => Errno::IO,
        }
    }
}

impl Vmm {
    /// A monitor without machines.
    pub fn new(backend: Arc<dyn Backend>) -> Vmm {
        Vmm { backend, paravirtual: None, machines: Mutex::default(), last_id: AtomicU32::new(0) }
    }

    /// Gives every machine that [`Vmm::create`] makes a paravirtual bus: what the caller's bus declines of MSRs and hypercalls
    /// goes there. It is how pvclock comes to machines on a backend that does not keep it by itself.
    #[must_use]
    pub fn with_paravirtual(mut self, factory: ParavirtualFactory) -> Vmm {
        self.paravirtual = Some(factory);
        self
    }

    /// What executes the processors.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// CREATE: a machine as vmm(4) makes them, without local APICs, its processors stopped in power-on state.
    ///
    /// # Errors
    /// [`VmmError::Invalid`] for ranges or a number of processors outside the limits, [`VmmError::TooManyVcpus`] and
    /// [`VmmError::NoMemory`] when the host has no room.
    pub fn create(&self, request: &CreateRequest) -> Result<VmId, VmmError> {
        check_ranges(&request.ranges)?;
        check_vcpus(request.vcpus)?;
        let backed: Vec<(u64, u64)> =
            request.ranges.iter().filter(|range| range.kind != RangeKind::Mmio).map(|range| (range.gpa, range.size)).collect();
        if backed.is_empty() {
            return Err(VmmError::Invalid("a machine needs memory".into()));
        }
        let config = VmConfig {
            memory: crate::memory::map(&backed).map_err(VmmError::NoMemory)?,
            vcpus: request.vcpus,
            local_apic: false,
            cpuid: crate::attach::guest_cpuid(self.backend.as_ref(), self.paravirtual.is_some()),
            timers: Timers::new(Arc::new(HostClock::new())),
            deterministic: false,
        };
        let paravirtual = self.paravirtual.as_ref().map(|factory| factory(&config));
        self.add(config, &request.name, request.ranges.clone(), paravirtual)
    }

    /// CREATE with the caller's own configuration: local APICs, CPUID, memory. Not part of vmm(4).
    ///
    /// # Errors
    /// As [`Vmm::create`].
    pub fn create_with(&self, config: VmConfig, name: &str) -> Result<VmId, VmmError> {
        check_vcpus(config.vcpus)?;
        let ranges = config
            .memory
            .iter()
            .map(|region| MemoryRange { gpa: region.start_addr().0, size: region.len(), kind: RangeKind::Ram })
            .collect();
        self.add(config, name, ranges, None)
    }

    fn add(&self, config: VmConfig, name: &str, ranges: Vec<MemoryRange>, paravirtual: Option<Arc<dyn Bus>>) -> Result<VmId, VmmError> {
        if name.len() >= MAX_NAME_LEN || name.contains('\0') {
            return Err(VmmError::Invalid(format!("a machine's name has at most {} bytes, none of them zero", MAX_NAME_LEN - 1)));
        }
        // Held until the machine is in the table, so that the number of processors cannot pass the limit in between.
        let mut machines = lock(&self.machines);
        let used: usize = machines.values().map(|machine| machine.vcpus.len()).sum();
        let wanted = config.vcpus as usize;
        if used + wanted > MAX_VCPUS {
            return Err(VmmError::TooManyVcpus { wanted, used });
        }
        let memory = Arc::clone(&config.memory);
        let vm = self.backend.create_vm(config)?;
        let vcpus = (0..wanted as u32)
            .map(|id| {
                Ok(Slot { vcpu: Mutex::new(vm.create_vcpu(id)?), state: AtomicU8::new(VCPU_STOPPED), interrupt: AtomicBool::new(false) })
            })
            .collect::<Result<Vec<Slot>, BackendError>>()?;
        let id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let machine = Machine {
            id,
            name: name.to_owned(),
            creator: std::process::id(),
            ranges,
            memory,
            vcpus,
            vm,
            paravirtual: Mutex::new(paravirtual),
            dying: AtomicBool::new(false),
            running: Mutex::new(0),
            stopped: Condvar::new(),
        };
        machines.insert(id, Arc::new(machine));
        Ok(id)
    }

    /// RUN: runs a processor until it exits for a reason that `bus` does not take care of.
    ///
    /// # Errors
    /// [`VmmError::Busy`] when it runs already, [`VmmError::Terminated`] when TERM ended it, [`VmmError::Backend`] when the
    /// guest cannot go on.
    pub fn run(&self, vm: VmId, vcpu: VcpuId, entry: Entry, bus: &dyn Bus) -> Result<Exit, VmmError> {
        let machine = self.find(vm)?;
        let slot = machine.slot(vcpu)?;
        let mut processor = machine.stopped_vcpu(vcpu)?;
        *lock(&machine.running) += 1;
        slot.state.store(VCPU_RUNNING, Ordering::SeqCst);
        let paravirtual = lock(&machine.paravirtual).clone();
        // After the state, and TERM and INTR write the other way round: none of them gets lost.
        let result = if machine.dying.load(Ordering::SeqCst) {
            Err(VmmError::Terminated(vm))
        } else {
            let window = entry.interrupt_window || slot.interrupt.load(Ordering::SeqCst);
            let entry = Entry { interrupt_window: window, ..entry };
            match paravirtual {
                Some(paravirtual) => processor.run(&Joined { first: bus, then: paravirtual.as_ref() }, entry),
                None => processor.run(bus, entry),
            }
            .map_err(VmmError::from)
        };
        drop(processor);
        let dying = machine.dying.load(Ordering::SeqCst);
        slot.state.store(if dying { VCPU_TERMINATED } else { VCPU_STOPPED }, Ordering::SeqCst);
        *lock(&machine.running) -= 1;
        machine.stopped.notify_all();
        if dying { Err(VmmError::Terminated(vm)) } else { result }
    }

    /// INFO: all machines, by number.
    pub fn info(&self) -> Vec<VmInfo> {
        let machines: Vec<Arc<Machine>> = lock(&self.machines).values().cloned().collect();
        machines
            .iter()
            .map(|machine| VmInfo {
                id: machine.id,
                name: machine.name.clone(),
                creator: machine.creator,
                memory: machine.memory.iter().map(|region| region.len()).sum(),
                resident: machine.memory.iter().map(crate::resident::bytes).sum(),
                vcpus: machine.vcpus.iter().map(|slot| slot.state.load(Ordering::SeqCst)).collect(),
            })
            .collect()
    }

    /// TERM: asks the processors that run to leave, waits for them, and forgets the machine. Not to be called from a bus.
    ///
    /// # Errors
    /// [`VmmError::NoSuchVm`].
    pub fn terminate(&self, vm: VmId) -> Result<(), VmmError> {
        let machine = lock(&self.machines).remove(&vm).ok_or(VmmError::NoSuchVm(vm))?;
        machine.dying.store(true, Ordering::SeqCst);
        for (id, slot) in (0..).zip(&machine.vcpus) {
            if slot.state.compare_exchange(VCPU_RUNNING, VCPU_REQTERM, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                machine.vm.kick(id);
            }
        }
        let mut running = lock(&machine.running);
        while *running > 0 {
            running = machine.stopped.wait(running).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    /// RESETCPU: power-on state of everything, then the registers given.
    ///
    /// # Errors
    /// [`VmmError::Busy`] while it runs, [`VmmError::Invalid`] for values no processor can hold.
    pub fn reset_vcpu(&self, vm: VmId, vcpu: VcpuId, registers: &Registers) -> Result<(), VmmError> {
        let machine = self.find(vm)?;
        machine.slot(vcpu)?.interrupt.store(false, Ordering::SeqCst);
        let mut processor = machine.stopped_vcpu(vcpu)?;
        processor.set_registers(registers, RegisterMask::all())?;
        processor.set_fxsave(&initial_fxsave())?;
        Ok(())
    }

    /// INTR: `true` says that an interrupt waits for the processor: it leaves RUN as soon as its guest can take one.
    ///
    /// # Errors
    /// [`VmmError::NoSuchVm`], [`VmmError::NoSuchVcpu`].
    pub fn interrupt(&self, vm: VmId, vcpu: VcpuId, waits: bool) -> Result<(), VmmError> {
        let machine = self.find(vm)?;
        let slot = machine.slot(vcpu)?;
        slot.interrupt.store(waits, Ordering::SeqCst);
        if waits && slot.state.load(Ordering::SeqCst) == VCPU_RUNNING {
            machine.vm.kick(vcpu);
        }
        Ok(())
    }

    /// READREGS.
    ///
    /// # Errors
    /// [`VmmError::Busy`] while it runs.
    pub fn read_registers(&self, vm: VmId, vcpu: VcpuId, mask: RegisterMask) -> Result<Registers, VmmError> {
        let machine = self.find(vm)?;
        let processor = machine.stopped_vcpu(vcpu)?;
        Ok(processor.registers(mask)?)
    }

    /// WRITEREGS.
    ///
    /// # Errors
    /// [`VmmError::Busy`] while it runs, [`VmmError::Invalid`] for values no processor can hold.
    pub fn write_registers(&self, vm: VmId, vcpu: VcpuId, registers: &Registers, mask: RegisterMask) -> Result<(), VmmError> {
        let machine = self.find(vm)?;
        let mut processor = machine.stopped_vcpu(vcpu)?;
        Ok(processor.set_registers(registers, mask)?)
    }

    /// READVMPARAMS: where the guest keeps pvclock's page, and the page's version.
    ///
    /// # Errors
    /// [`VmmError::Busy`] while it runs.
    pub fn read_vm_params(&self, vm: VmId, vcpu: VcpuId) -> Result<VmParams, VmmError> {
        let machine = self.find(vm)?;
        let processor = machine.stopped_vcpu(vcpu)?;
        let pvclock_gpa = machine.pvclock_gpa(processor.as_ref(), vcpu);
        let pvclock_version = if pvclock_gpa & SYSTEM_TIME_ENABLE == 0 {
            0
        } else {
            machine.memory.read_obj(GuestAddress(pvclock_gpa & !SYSTEM_TIME_ENABLE)).map(u32::from_le).unwrap_or(0)
        };
        Ok(VmParams { pvclock_gpa, pvclock_version })
    }

    /// WRITEVMPARAMS: puts pvclock's page somewhere, as if the guest had, and sets its version.
    ///
    /// # Errors
    /// [`VmmError::Busy`] while it runs, [`VmmError::Invalid`] when the address is not memory or nobody keeps a pvclock.
    pub fn write_vm_params(&self, vm: VmId, vcpu: VcpuId, params: VmParams, mask: VmParamsMask) -> Result<(), VmmError> {
        let machine = self.find(vm)?;
        let mut processor = machine.stopped_vcpu(vcpu)?;
        // The version first: whoever writes the page counts on from what is there.
        if mask.contains(VmParamsMask::PVCLOCK_VERSION) {
            let gpa =
                if mask.contains(VmParamsMask::PVCLOCK_GPA) { params.pvclock_gpa } else { machine.pvclock_gpa(processor.as_ref(), vcpu) };
            if gpa & SYSTEM_TIME_ENABLE != 0 {
                let at = GuestAddress(gpa & !SYSTEM_TIME_ENABLE);
                machine
                    .memory
                    .write_obj(params.pvclock_version.to_le(), at)
                    .map_err(|_| VmmError::Invalid(format!("pvclock's page at {:#x} is not in memory", at.0)))?;
            }
        }
        if mask.contains(VmParamsMask::PVCLOCK_GPA) {
            let written = match machine.paravirtual() {
                Some(bus) => bus.write_msr(vcpu, MSR_SYSTEM_TIME_NEW, params.pvclock_gpa),
                None => None,
            };
            match written {
                Some(Ok(())) => {}
                Some(Err(MsrFault)) => return Err(VmmError::Invalid(format!("pvclock cannot be at {:#x}", params.pvclock_gpa))),
                None => processor.set_msr(MSR_SYSTEM_TIME_NEW, params.pvclock_gpa)?,
            }
        }
        Ok(())
    }

    /// MPROTECT_EPT: what the guest may do with its memory at `[gpa, gpa + size)`.
    ///
    /// # Errors
    /// [`VmmError::Invalid`] for a range that is not whole pages of memory, and for write-only and for no access, as vmm(4);
    /// [`BackendError::Unsupported`] where the backend cannot; [`VmmError::Busy`] while the processor runs.
    pub fn protect(&self, vm: VmId, vcpu: VcpuId, gpa: u64, size: u64, protection: Protection) -> Result<(), VmmError> {
        let machine = self.find(vm)?;
        let _processor = machine.stopped_vcpu(vcpu)?;
        if protection.is_empty() || protection == Protection::WRITE {
            return Err(VmmError::Invalid(format!("{protection:?} is no protection that memory can have")));
        }
        if size == 0 || !(gpa | size).is_multiple_of(PAGE_SIZE) || gpa.checked_add(size).is_none() {
            return Err(VmmError::Invalid(format!("{size:#x} bytes at {gpa:#x} are not whole pages")));
        }
        Ok(machine.vm.protect(gpa, size, protection)?)
    }

    /// SHAREMEM: the host addresses of a machine's memory, in the order of `ranges`, which have to be those of CREATE. A range without
    /// memory has address 0.
    ///
    /// # Errors
    /// [`VmmError::Invalid`] when the ranges are others.
    pub fn share_memory(&self, vm: VmId, ranges: &[MemoryRange]) -> Result<Vec<u64>, VmmError> {
        let machine = self.find(vm)?;
        if machine.ranges != ranges {
            return Err(VmmError::Invalid(format!("these are not the memory ranges of machine {vm}")));
        }
        Ok(ranges
            .iter()
            .map(|range| {
                machine
                    .memory
                    .find_region(GuestAddress(range.gpa))
                    .filter(|region| region.start_addr().0 == range.gpa)
                    .and_then(|region| region.get_host_address(MemoryRegionAddress(0)).ok())
                    .map_or(0, |address| address as u64)
            })
            .collect())
    }

    /// The backend's machine, for devices that send interrupts.
    ///
    /// # Errors
    /// [`VmmError::NoSuchVm`].
    pub fn machine(&self, vm: VmId) -> Result<Arc<dyn BackendVm>, VmmError> {
        Ok(Arc::clone(&self.find(vm)?.vm))
    }

    /// The memory of a machine.
    ///
    /// # Errors
    /// [`VmmError::NoSuchVm`].
    pub fn memory(&self, vm: VmId) -> Result<GuestMemory, VmmError> {
        Ok(Arc::clone(&self.find(vm)?.memory))
    }

    /// What kind of range holds a guest physical address.
    ///
    /// # Errors
    /// [`VmmError::NoSuchVm`].
    pub fn range_at(&self, vm: VmId, gpa: u64) -> Result<Option<RangeKind>, VmmError> {
        let machine = self.find(vm)?;
        Ok(machine.ranges.iter().find(|range| (range.gpa..range.gpa + range.size).contains(&gpa)).map(|range| range.kind))
    }

    /// Tells where the machine's clock is asked for that READVMPARAMS and WRITEVMPARAMS are about, when its backend does not
    /// keep one: the board's bus.
    ///
    /// # Errors
    /// [`VmmError::NoSuchVm`].
    pub fn set_paravirtual(&self, vm: VmId, bus: Arc<dyn Bus>) -> Result<(), VmmError> {
        *lock(&self.find(vm)?.paravirtual) = Some(bus);
        Ok(())
    }

    /// Gives `action` a stopped processor: for its counters, its x87 state, single registers.
    ///
    /// # Errors
    /// [`VmmError::Busy`] while it runs.
    pub fn with_vcpu<T>(&self, vm: VmId, vcpu: VcpuId, action: impl FnOnce(&mut dyn Vcpu) -> T) -> Result<T, VmmError> {
        let machine = self.find(vm)?;
        let mut processor = machine.stopped_vcpu(vcpu)?;
        Ok(action(processor.as_mut()))
    }

    fn find(&self, vm: VmId) -> Result<Arc<Machine>, VmmError> {
        lock(&self.machines).get(&vm).cloned().ok_or(VmmError::NoSuchVm(vm))
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let ids: Vec<VmId> = lock(&self.machines).keys().copied().collect();
        for id in ids {
            let _ = self.terminate(id);
        }
    }
}

impl Machine {
    fn slot(&self, vcpu: VcpuId) -> Result<&Slot, VmmError> {
        self.vcpus.get(vcpu as usize).ok_or(VmmError::NoSuchVcpu(self.id, vcpu))
    }

    /// The processor, if nobody else has it.
    fn stopped_vcpu(&self, vcpu: VcpuId) -> Result<MutexGuard<'_, Box<dyn Vcpu>>, VmmError> {
        match self.slot(vcpu)?.vcpu.try_lock() {
            Ok(processor) => Ok(processor),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(VmmError::Busy(self.id, vcpu)),
        }
    }

    fn paravirtual(&self) -> Option<Arc<dyn Bus>> {
        lock(&self.paravirtual).clone()
    }

    /// What the guest wrote to pvclock's MSR: the backend knows, or whoever keeps the clock in its place.
    fn pvclock_gpa(&self, processor: &dyn Vcpu, vcpu: VcpuId) -> u64 {
        match processor.msr(MSR_SYSTEM_TIME_NEW) {
            Ok(value) => value,
            Err(_) => self.paravirtual().and_then(|bus| bus.read_msr(vcpu, MSR_SYSTEM_TIME_NEW)).and_then(Result::ok).unwrap_or(0),
        }
    }
}

/// The caller's bus, and behind it the paravirtual one for MSRs and hypercalls.
struct Joined<'a> {
    first: &'a dyn Bus,
    then: &'a dyn Bus,
}

impl Bus for Joined<'_> {
    fn port_in(&self, vcpu: VcpuId, port: u16, size: u8) -> Option<u32> {
        self.first.port_in(vcpu, port, size)
    }

    fn port_out(&self, vcpu: VcpuId, port: u16, size: u8, value: u32) -> bool {
        self.first.port_out(vcpu, port, size, value)
    }

    fn takes_registers(&self, port: u16) -> bool {
        self.first.takes_registers(port)
    }

    fn port_call(&self, vcpu: VcpuId, call: &mut PortCall) {
        self.first.port_call(vcpu, call);
    }

    fn mmio_read(&self, vcpu: VcpuId, gpa: u64, data: &mut [u8]) -> bool {
        self.first.mmio_read(vcpu, gpa, data)
    }

    fn mmio_write(&self, vcpu: VcpuId, gpa: u64, data: &[u8]) -> bool {
        self.first.mmio_write(vcpu, gpa, data)
    }

    fn read_msr(&self, vcpu: VcpuId, index: u32) -> Option<Result<u64, MsrFault>> {
        self.first.read_msr(vcpu, index).or_else(|| self.then.read_msr(vcpu, index))
    }

    fn write_msr(&self, vcpu: VcpuId, index: u32, value: u64) -> Option<Result<(), MsrFault>> {
        self.first.write_msr(vcpu, index, value).or_else(|| self.then.write_msr(vcpu, index, value))
    }

    fn hypercall(&self, vcpu: VcpuId, call: &mut Hypercall) -> bool {
        self.first.hypercall(vcpu, call) || self.then.hypercall(vcpu, call)
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.first.end_of_interrupt(vector);
    }

    fn acknowledge_extint(&self) -> u8 {
        self.first.acknowledge_extint()
    }
}

fn check_vcpus(vcpus: u32) -> Result<(), VmmError> {
    if vcpus == 0 || vcpus as usize > MAX_VCPUS_PER_VM {
        return Err(VmmError::Invalid(format!("{vcpus} processors, but a machine has 1 to {MAX_VCPUS_PER_VM}")));
    }
    Ok(())
}

/// vmm(4)'s rules for memory ranges (`vm_create_check_mem_ranges`).
fn check_ranges(ranges: &[MemoryRange]) -> Result<(), VmmError> {
    if ranges.is_empty() || ranges.len() > MAX_MEM_RANGES {
        return Err(VmmError::Invalid(format!("{} memory ranges, but a machine has 1 to {MAX_MEM_RANGES}", ranges.len())));
    }
    let mut end_of_last = 0;
    for MemoryRange { gpa, size, .. } in ranges {
        let wrong = |what: &str| Err(VmmError::Invalid(format!("the memory range of {size:#x} bytes at {gpa:#x} {what}")));
        if *size == 0 || !(gpa | size).is_multiple_of(PAGE_SIZE) {
            return wrong("is not whole pages");
        }
        if gpa.checked_add(*size).is_none_or(|end| end > MAX_VM_MEM_SIZE) {
            return wrong("ends above 128 GiB");
        }
        if *gpa < end_of_last {
            return wrong("overlaps the one before it, or is out of order");
        }
        end_of_last = gpa + size;
    }
    Ok(())
}

/// x87 and SSE state after FNINIT and reset: FCW 0x37f, MXCSR 0x1f80 (Intel SDM vol. 1 table 10-2).
fn initial_fxsave() -> [u8; 512] {
    let mut area = [0; 512];
    area[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    area
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
