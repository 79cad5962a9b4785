//! Hypercalls: arguments out of registers and the guest's memory, answers back.
//!
//! What Linux issues as an HVM or PVH guest is here; everything else is answered with "no such call", as Xen answers what it was built without.
//! Buffers are named by the caller's own addresses.

use abi::xen::event_channel::{self as evtchn, AllocUnbound, BindIpi, BindVcpu, BindVirq, Status};
use abi::xen::grant_table::{self as grant, GetVersion, QuerySize, SetVersion};
use abi::xen::hvm::{self, Param, UpcallVector};
use abi::xen::hypercall::errno::{EFAULT, EINVAL, ENODATA, ENOENT, ENOSPC, ENOSYS, EPERM, ETIME};
use abi::xen::hypercall::{
    AddToPhysmap, CONSOLE_WRITE, DOMID_SELF, Features, RegisterVcpuInfo, SetSingleshot, VM_ASSIST_ENABLE, VM_ASSIST_RUNSTATE_UPDATE,
    feature, memory, number, reason, sched, vcpu, version,
};
use abi::xen::shared_info::vcpu_info;
use vmm::memory::PAGE_SIZE;
use vmm::registers::{RAX, RDI, RDX, RSI};
use vmm::{GuestMemory, Paging, VcpuId};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::shared::Callback;
use super::{DOMAIN, Shutdown, VERSION, Wire, Xen, lock};

/// R10, the fourth argument.
const R10: usize = 10;
/// Longest text that one console write takes.
const CONSOLE_WRITE_MAX: u64 = 4096;
/// What [`version::CAPABILITIES`] says: guests of every width, with hardware virtualization.
const CAPABILITIES: &[u8] = b"hvm-3.0-x86_32 hvm-3.0-x86_32p hvm-3.0-x86_64";
const FEATURES: u32 =
    feature::AUTO_TRANSLATED_PHYSMAP | feature::SUPERVISOR_MODE_KERNEL | feature::HVM_CALLBACK_VECTOR | feature::HVM_SAFE_PVCLOCK;
/// Where the kind is in HVM_PARAM_CALLBACK_IRQ.
const CALLBACK_KIND: u32 = 56;
/// First vector that is no exception and that a local APIC takes.
const FIRST_VECTOR: u8 = 16;

/// An answer, or the number of an error.
type Answer = Result<i64, i64>;

/// One hypercall.
struct Call<'a> {
    memory: &'a GuestMemory,
    paging: Paging,
    vcpu: VcpuId,
    number: u64,
    arguments: [u64; 4],
}

impl Call<'_> {
    fn argument(&self, index: usize) -> u64 {
        self.arguments.get(index).copied().unwrap_or(0)
    }

    /// The structure that argument `index` points at.
    fn read<T: FromBytes + IntoBytes>(&self, index: usize) -> Result<T, i64> {
        let mut value = T::new_zeroed();
        self.paging.read(self.memory, self.argument(index), value.as_mut_bytes()).ok_or(EFAULT)?;
        Ok(value)
    }

    /// Writes to where argument `index` points.
    fn write<T: IntoBytes + Immutable + ?Sized>(&self, index: usize, value: &T) -> Answer {
        self.paging.write(self.memory, self.argument(index), value.as_bytes()).ok_or(EFAULT)?;
        Ok(0)
    }

    /// Where the 64-bit words from `address` on are in memory.
    fn words<const N: usize>(&self, address: u64) -> Option<[u64; N]> {
        let mut words = [address; N];
        for (n, word) in (0..).zip(&mut words) {
            *word = self.paging.translate(self.memory, address.wrapping_add(n * size_of::<u64>() as u64))?;
        }
        Some(words)
    }

    /// Writes a text with zeroes up to `size`.
    fn write_text(&self, index: usize, text: &[u8], size: usize) -> Answer {
        let mut bytes = text.to_vec();
        bytes.resize(size, 0);
        self.write(index, bytes.as_slice())
    }
}

/// Only a domain's own affairs are its to change.
fn own(domid: u16) -> Result<(), i64> {
    if domid == DOMID_SELF || domid == DOMAIN { Ok(()) } else { Err(EPERM) }
}

impl Xen {
    /// Answers a hypercall in the caller's registers.
    pub(super) fn answer(&self, vcpu: VcpuId, gpr: &mut [u64; 16], cpl: u8, long_mode: bool, paging: Paging) {
        let call = Call { memory: &self.memory, paging, vcpu, number: gpr[RAX], arguments: [gpr[RDI], gpr[RSI], gpr[RDX], gpr[R10]] };
        let answer = match (cpl, long_mode) {
            (1.., _) => Err(EPERM),
            (0, false) => Err(ENOSYS),
            (0, true) => self.dispatch(&call),
        };
        let answer = answer.unwrap_or_else(|errno| -errno).cast_unsigned();
        gpr[RAX] = if long_mode { answer } else { answer & 0xffff_ffff };
    }

    fn dispatch(&self, call: &Call<'_>) -> Answer {
        let answer = match call.number {
            number::MEMORY_OP => self.memory_op(call),
            number::SET_TIMER_OP => self.set_timer_op(call),
            number::XEN_VERSION => self.xen_version(call),
            number::CONSOLE_IO => console_io(call),
            number::GRANT_TABLE_OP => self.grant_table_op(call),
            number::VM_ASSIST if call.argument(0) == VM_ASSIST_ENABLE && call.argument(1) == VM_ASSIST_RUNSTATE_UPDATE => {
                lock(&self.runstates).mark();
                Ok(0)
            }
            number::VM_ASSIST => Err(EINVAL),
            number::VCPU_OP => self.vcpu_op(call),
            number::SCHED_OP => self.sched_op(call),
            number::EVENT_CHANNEL_OP => self.event_channel_op(call),
            number::HVM_OP => self.hvm_op(call),
            _ => Err(ENOSYS),
        };
        tracing::trace!(vcpu = call.vcpu, number = call.number, arguments = ?call.arguments, ?answer, "xen: hypercall");
        answer
    }

    fn memory_op(&self, call: &Call<'_>) -> Answer {
        if call.argument(0) != memory::ADD_TO_PHYSMAP {
            return Err(ENOSYS);
        }
        let add: AddToPhysmap = call.read(1)?;
        own(add.domid.get())?;
        let gpa = add.gpfn.get().checked_mul(PAGE_SIZE).ok_or(EINVAL)?;
        let placed = match add.space.get() {
            memory::SPACE_SHARED_INFO if add.idx.get() == 0 => self.lock().shared.place(gpa, &self.clock),
            memory::SPACE_GRANT_TABLE => lock(&self.grants).place(add.idx.get(), gpa),
            _ => false,
        };
        if !placed {
            tracing::debug!(space = add.space.get(), index = add.idx.get(), gpa, "xen: the guest places a page where there is no memory");
            return Err(EINVAL);
        }
        Ok(0)
    }

    fn set_timer_op(&self, call: &Call<'_>) -> Answer {
        let deadline = call.argument(0);
        self.set_timer(call.vcpu, (deadline != 0).then_some(deadline));
        Ok(0)
    }

    fn xen_version(&self, call: &Call<'_>) -> Answer {
        match call.argument(0) {
            version::VERSION => Ok(VERSION.into()),
            version::EXTRA_VERSION => call.write_text(1, b".0-pvbus", version::EXTRA_VERSION_SIZE),
            version::COMPILE_INFO => call.write_text(1, b"", version::COMPILE_INFO_SIZE),
            version::CAPABILITIES => call.write_text(1, CAPABILITIES, version::CAPABILITIES_SIZE),
            version::CHANGE_SET => call.write_text(1, b"unavailable", version::CHANGE_SET_SIZE),
            version::PLATFORM_PARAMETERS => call.write(1, &0u64),
            version::GET_FEATURES => {
                let mut features: Features = call.read(1)?;
                features.bits = if features.submap.get() == 0 { FEATURES } else { 0 }.into();
                call.write(1, &features)
            }
            version::PAGE_SIZE => Ok(PAGE_SIZE as i64),
            version::GUEST_HANDLE => call.write(1, &self.uuid),
            version::BUILD_ID => Err(ENODATA),
            _ => Err(ENOSYS),
        }
    }

    fn grant_table_op(&self, call: &Call<'_>) -> Answer {
        let (operation, count) = (call.argument(0), call.argument(2));
        if matches!(operation, grant::op::QUERY_SIZE | grant::op::SET_VERSION | grant::op::GET_VERSION) && count != 1 {
            return Err(EINVAL);
        }
        match operation {
            grant::op::QUERY_SIZE => {
                let mut query: QuerySize = call.read(1)?;
                if own(query.dom.get()).is_err() {
                    query.status = grant::status::BAD_DOMAIN.cast_unsigned().into();
                } else {
                    query.nr_frames = lock(&self.grants).frames().into();
                    query.max_nr_frames = super::MAX_FRAMES.into();
                    query.status = grant::status::OKAY.cast_unsigned().into();
                }
                call.write(1, &query)
            }
            grant::op::SET_VERSION => {
                let wanted: SetVersion = call.read(1)?;
                if wanted.version.get() != 1 {
                    return Err(ENOSYS);
                }
                call.write(1, &SetVersion { version: 1.into() })
            }
            grant::op::GET_VERSION => {
                let mut query: GetVersion = call.read(1)?;
                own(query.dom.get())?;
                query.version = 1.into();
                call.write(1, &query)
            }
            _ => Err(ENOSYS),
        }
    }

    fn vcpu_op(&self, call: &Call<'_>) -> Answer {
        let target = u32::try_from(call.argument(1)).map_err(|_| ENOENT)?;
        if !self.lock().shared.has_vcpu(target) {
            return Err(ENOENT);
        }
        match call.argument(0) {
            vcpu::IS_UP => Ok(1),
            vcpu::GET_RUNSTATE_INFO => call.write(2, &lock(&self.runstates).of(target)),
            vcpu::REGISTER_RUNSTATE => {
                // The structure begins with the address.
                let address = u64::from_le(call.read(2)?);
                let area = if address == 0 { None } else { Some(call.words(address).ok_or(EFAULT)?) };
                if self.register_runstate(target, area) { Ok(0) } else { Err(EFAULT) }
            }
            vcpu::STOP_PERIODIC_TIMER => Ok(0),
            vcpu::SET_SINGLESHOT_TIMER if target == call.vcpu => {
                let timer: SetSingleshot = call.read(2)?;
                let timeout = timer.timeout.get();
                if timer.flags.get() & vcpu::SINGLESHOT_FUTURE != 0 && timeout < self.clock.now() {
                    return Err(ETIME);
                }
                self.set_timer(target, Some(timeout));
                Ok(0)
            }
            vcpu::STOP_SINGLESHOT_TIMER if target == call.vcpu => {
                self.set_timer(target, None);
                Ok(0)
            }
            vcpu::SET_SINGLESHOT_TIMER | vcpu::STOP_SINGLESHOT_TIMER => Err(EINVAL),
            vcpu::REGISTER_VCPU_INFO => {
                let place: RegisterVcpuInfo = call.read(2)?;
                let fits = u64::from(place.offset.get()) <= PAGE_SIZE - vcpu_info::SIZE;
                let gpa = place.mfn.get().checked_mul(PAGE_SIZE).filter(|_| fits).ok_or(EINVAL)? + u64::from(place.offset.get());
                if self.lock().shared.move_info(target, gpa, &self.clock) { Ok(0) } else { Err(EINVAL) }
            }
            vcpu::REGISTER_VCPU_TIME => {
                let address = u64::from_le(call.read::<u64>(2)?);
                let mut time = self.clock.reading();
                // Even and not zero: complete. Nobody reads it before this call returns.
                time.version = 2.into();
                call.paging.write(call.memory, address, time.as_bytes()).ok_or(EFAULT)?;
                Ok(0)
            }
            _ => Err(ENOSYS),
        }
    }

    fn sched_op(&self, call: &Call<'_>) -> Answer {
        match call.argument(0) {
            // A wait may end early, and the guest looks again: HLT is how it really waits.
            sched::YIELD | sched::BLOCK | sched::POLL => {
                std::thread::yield_now();
                Ok(0)
            }
            sched::SHUTDOWN => {
                let reason = match u32::from_le(call.read::<u32>(1)?) {
                    reason::POWER_OFF => Shutdown::PowerOff,
                    reason::REBOOT => Shutdown::Reboot,
                    reason::CRASH => Shutdown::Crash,
                    _ => return Err(EINVAL),
                };
                if reason == Shutdown::Crash {
                    tracing::error!("xen: the guest's kernel says that it has crashed");
                }
                if let Some(machine) = self.machine.get() {
                    machine.shut_down(reason);
                }
                Ok(0)
            }
            _ => Err(ENOSYS),
        }
    }

    fn event_channel_op(&self, call: &Call<'_>) -> Answer {
        match call.argument(0) {
            evtchn::op::BIND_VIRQ => {
                let mut bind: BindVirq = call.read(1)?;
                let mut state = self.lock();
                if !state.shared.has_vcpu(bind.vcpu.get()) {
                    return Err(ENOENT);
                }
                bind.port = state.channels.bind_virq(bind.virq.get(), bind.vcpu.get()).map_err(|error| error.errno())?.into();
                call.write(1, &bind)
            }
            evtchn::op::BIND_IPI => {
                let mut bind: BindIpi = call.read(1)?;
                let mut state = self.lock();
                if !state.shared.has_vcpu(bind.vcpu.get()) {
                    return Err(ENOENT);
                }
                bind.port = state.channels.bind_ipi(bind.vcpu.get()).map_err(|error| error.errno())?.into();
                call.write(1, &bind)
            }
            evtchn::op::BIND_VCPU => {
                let bind: BindVcpu = call.read(1)?;
                let mut state = self.lock();
                if !state.shared.has_vcpu(bind.vcpu.get()) {
                    return Err(ENOENT);
                }
                state.channels.bind_vcpu(bind.port.get(), bind.vcpu.get()).map(|()| 0).map_err(|error| error.errno())
            }
            evtchn::op::ALLOC_UNBOUND => {
                let mut alloc: AllocUnbound = call.read(1)?;
                own(alloc.dom.get())?;
                let remote = alloc.remote_dom.get();
                let remote = if remote == DOMID_SELF { DOMAIN } else { remote };
                alloc.port = self.lock().channels.allocate(remote).ok_or(ENOSPC)?.into();
                call.write(1, &alloc)
            }
            evtchn::op::CLOSE => {
                let port = u32::from_le(call.read(1)?);
                let mut state = self.lock();
                state.channels.close(port).map_err(|error| error.errno())?;
                state.shared.clear_pending(port);
                Ok(0)
            }
            evtchn::op::SEND => self.send(u32::from_le(call.read(1)?)).map(|()| 0).map_err(|error| error.errno()),
            evtchn::op::UNMASK => {
                let port = u32::from_le(call.read(1)?);
                let state = self.lock();
                let target = state.channels.target(port).ok_or(EINVAL)?;
                if state.shared.unmask(port, target) {
                    state.shared.upcall(target, self.processors.get());
                }
                Ok(0)
            }
            evtchn::op::STATUS => {
                let mut query: Status = call.read(1)?;
                own(query.dom.get())?;
                let (kind, vcpu, detail) = self.lock().channels.status(query.port.get()).map_err(|error| error.errno())?;
                (query.status, query.vcpu, query.first) = (kind.into(), vcpu.into(), detail.into());
                call.write(1, &query)
            }
            _ => Err(ENOSYS),
        }
    }

    fn hvm_op(&self, call: &Call<'_>) -> Answer {
        match call.argument(0) {
            hvm::op::SET_PARAM => {
                let param: Param = call.read(1)?;
                own(param.domid.get())?;
                match param.index.get() {
                    hvm::param::CALLBACK_IRQ => self.set_callback(param.value.get()),
                    _ => Err(EPERM),
                }
            }
            hvm::op::GET_PARAM => {
                let mut param: Param = call.read(1)?;
                own(param.domid.get())?;
                let state = self.lock();
                let page = |port: Option<u32>, page: u64| port.map_or(0, |_| page / PAGE_SIZE);
                let value = match param.index.get() {
                    hvm::param::CALLBACK_IRQ => state.callback,
                    hvm::param::STORE_PFN => page(state.store_port, hvm::STORE_PAGE),
                    hvm::param::STORE_EVTCHN => state.store_port.unwrap_or(0).into(),
                    hvm::param::CONSOLE_PFN => page(state.console_port, hvm::CONSOLE_PAGE),
                    hvm::param::CONSOLE_EVTCHN => state.console_port.unwrap_or(0).into(),
                    _ => return Err(EINVAL),
                };
                param.value = value.into();
                call.write(1, &param)
            }
            hvm::op::SET_UPCALL_VECTOR => {
                let set: UpcallVector = call.read(1)?;
                if set.vector < FIRST_VECTOR {
                    return Err(EINVAL);
                }
                let mut state = self.lock();
                if !state.shared.has_vcpu(set.vcpu.get()) {
                    return Err(ENOENT);
                }
                state.shared.set_vector(set.vcpu.get(), set.vector, self.processors.get());
                Ok(0)
            }
            _ => Err(ENOSYS),
        }
    }

    /// HVM_PARAM_CALLBACK_IRQ. A guest whose processors have vectors of their own sets a line for form's sake, which then stays down.
    fn set_callback(&self, value: u64) -> Answer {
        let number = value as u8;
        let line = |wire: Wire| self.machine.get().and_then(|machine| machine.line(wire)).map(Callback::Line).ok_or(EINVAL);
        let callback = match value >> CALLBACK_KIND {
            hvm::via::VECTOR if number >= FIRST_VECTOR => Callback::Vector(number),
            hvm::via::GSI if number == 0 => Callback::Nothing,
            hvm::via::GSI => line(Wire::Gsi(number))?,
            hvm::via::PCI_INTX => line(Wire::Intx { slot: (value >> 11) as u8 & 0x1f, pin: value as u8 & 3 })?,
            _ => return Err(EINVAL),
        };
        let mut state = self.lock();
        if !state.shared.set_callback(callback, self.processors.get()) {
            return Err(ENOSYS);
        }
        state.callback = value;
        Ok(0)
    }
}

/// The guest writes to the hypervisor's own console, which is our log.
fn console_io(call: &Call<'_>) -> Answer {
    if call.argument(0) != CONSOLE_WRITE {
        return Err(ENOSYS);
    }
    let count = call.argument(1).min(CONSOLE_WRITE_MAX);
    let mut text = vec![0; count as usize];
    call.paging.read(call.memory, call.argument(2), &mut text).ok_or(EFAULT)?;
    tracing::debug!(text = %String::from_utf8_lossy(&text), "xen: the guest writes to the hypervisor's console");
    Ok(count as i64)
}
