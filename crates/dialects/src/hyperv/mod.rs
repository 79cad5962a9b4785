//! Host half of the Hyper-V dialect: a guest finds the hypervisor of Windows Server 2022.
//!
//! Specification: the Hypervisor Top-Level Functional Specification (TLFS) 6.0b; the words are in [`abi::hyperv`]. What the guest reaches:
//!
//! ```text
//!   CPUID, MSRs                          mod.rs
//!     pages that MSRs place              page.rs
//!     reference counter, TSC page        clock.rs
//!     messages, event flags, sources     synic.rs --interrupts--> Processors
//!     timers                             timer.rs
//!     crash                              crash.rs             --> Machine
//!   OUT of the hypercall page            hypercall.rs         --flush, IPI--> Processors
//!     PostMessage, SignalEvent           connections.rs       <--> VMBus
//! ```
//!
//! [`Hyperv`] is the platform; who answers at connections is given to it by [`Hyperv::serve`] and reaches the guest by its [`Synic`]. Virtual processor
//! numbers are APIC ids.

mod clock;
pub mod connections;
mod crash;
mod hypercall;
pub mod ic;
pub mod netvsc;
mod page;
pub mod storvsc;
mod synic;
mod testdev;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod timer;
pub mod vmbus;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use abi::apic::offset;
use abi::hyperv::cpuid::{self, feature, hint, more, privilege};
use abi::hyperv::hypercall::Status;
use abi::hyperv::msr;
use vmm::memory::PAGE_SIZE;
use vmm::time::{Timer, TimerClient, Timers};
use vmm::{CpuidEntry, CpuidTable, Frequencies, GuestMemory, MsrFault, PortCall, VcpuId};
use zerocopy::IntoBytes;

use crate::kvm::StealSource;
use crate::kvm::eoi::flag_at;
use crate::{Dialect, Processors};
use clock::ReferenceClock;
use connections::{Connections, Synic};
pub use crash::Crash;
use crash::CrashMsrs;
use page::PageMsr;
use synic::{Controller, Outside};
use testdev::TestDevice;

/// The version that is shown, that of Windows Server 2022: build, major, minor.
const BUILD: u32 = 20348;
const VERSION: u32 = 10 << 16;
/// Where the hypercall page goes. A port that no PC has, with a number that fits into the instruction.
const HYPERCALL_PORT: u16 = 0xec;
/// CR0.PE.
const PROTECTED_MODE: u64 = 1;

const FEATURES: u32 = cpuid::TIME_REF_COUNT
    | cpuid::SYNIC
    | feature::STIMER
    | feature::APIC
    | cpuid::HYPERCALL
    | feature::VP_INDEX
    | feature::RESET
    | feature::REFERENCE_TSC
    | feature::FREQUENCIES;
const PRIVILEGES: u32 = cpuid::POST_MESSAGES | cpuid::SIGNAL_EVENTS | privilege::EXTENDED_HYPERCALLS;
const MORE: u32 = more::FREQUENCIES | more::CRASH | more::EXTENDED_RANGES | more::SINT_POLLING | more::HYPERCALL_LOCK | more::STIMER_DIRECT;
const HINTS: u32 = hint::REMOTE_FLUSH | hint::APIC_MSRS | hint::RELAXED_TIMING | hint::NO_AUTO_EOI | hint::CLUSTER_IPI;

/// What the dialect does to the whole machine.
pub trait Machine: Send + Sync {
    /// The guest resets it.
    fn reset(&self);

    /// See [`vmm::Bus::end_of_interrupt`].
    fn end_of_interrupt(&self, vector: u8);

    /// The guest's kernel says that it has crashed. It goes on as it likes.
    fn crashed(&self, crash: &Crash);
}

/// The Hyper-V dialect of one machine.
pub struct Hyperv {
    memory: GuestMemory,
    clock: ReferenceClock,
    frequencies: Frequencies,
    timers: Arc<Timers>,
    /// How long processors run, where the host knows.
    source: Option<Arc<dyn StealSource>>,
    /// [`msr::STIMERS`] for each processor.
    stimers: OnceLock<Vec<Timer>>,
    processors: OnceLock<Arc<dyn Processors>>,
    machine: OnceLock<Arc<dyn Machine>>,
    connections: OnceLock<Arc<dyn Connections>>,
    tests: OnceLock<TestDevice>,
    guest: Mutex<Guest>,
    vps: Vec<Mutex<Vp>>,
}

/// What there is once.
#[derive(Default)]
struct Guest {
    /// GUEST_OS_ID.
    system: u64,
    hypercall: PageMsr,
    reference_tsc: PageMsr,
    crash: CrashMsrs,
}

/// What each processor has.
struct Vp {
    controller: Controller,
    assist: PageMsr,
}

impl Hyperv {
    /// The dialect for `vcpus` processors, 64 at most. What `source` knows of their threads is told.
    pub fn new(
        memory: GuestMemory,
        timers: Arc<Timers>,
        frequencies: Frequencies,
        source: Option<Arc<dyn StealSource>>,
        vcpus: u32,
    ) -> Arc<Hyperv> {
        let vp = |vp| Mutex::new(Vp { controller: Controller::new(vp), assist: PageMsr::default() });
        let hyperv = Arc::new(Hyperv {
            memory,
            clock: ReferenceClock::new(Arc::clone(timers.clock()), frequencies),
            frequencies,
            timers,
            source,
            stimers: OnceLock::new(),
            processors: OnceLock::new(),
            machine: OnceLock::new(),
            connections: OnceLock::new(),
            tests: OnceLock::new(),
            guest: Mutex::default(),
            vps: (0..vcpus).map(vp).collect(),
        });
        let weak: Weak<dyn TimerClient> = Arc::<Hyperv>::downgrade(&hyperv);
        let timers = (0..vcpus * msr::STIMERS).map(|timer| hyperv.timers.timer(weak.clone(), (timer / msr::STIMERS).into())).collect();
        let _ = hyperv.stimers.set(timers);
        hyperv
    }

    /// Connects the dialect with the machine's processors, which are made after it. Before that nothing reaches them.
    pub fn connect(&self, processors: Arc<dyn Processors>, machine: Arc<dyn Machine>) {
        // The first are the machine's.
        let _ = self.processors.set(processors);
        let _ = self.machine.set(machine);
    }

    /// Gives the machine who answers at its connections.
    pub fn serve(&self, connections: Arc<dyn Connections>) {
        let _ = self.connections.set(connections);
    }

    /// Adds the device of test suites, whose connections come before all others.
    pub fn add_test_device(&self) {
        let _ = self.tests.set(TestDevice::default());
    }

    /// Reference time, in 100 ns since the machine was made.
    pub fn reference_time(&self) -> u64 {
        self.clock.now()
    }

    /// What the guest says it is ([`msr::os`]); zero when it has not.
    pub fn guest_system(&self) -> u64 {
        self.guest().system
    }

    /// The guest has posted a message.
    fn posted(&self, connection: u32, kind: u32, payload: &[u8]) -> Status {
        let by_tests = self.tests.get().and_then(|device| device.post_message(connection, kind, payload, self));
        by_tests.unwrap_or_else(|| match self.connections.get() {
            Some(connections) => connections.post_message(connection, kind, payload),
            None => Status::INVALID_CONNECTION_ID,
        })
    }

    /// The guest has signalled an event.
    fn signalled(&self, connection: u32, flag: u16) -> Status {
        let by_tests = self.tests.get().and_then(|device| device.signal_event(connection, self));
        by_tests.unwrap_or_else(|| match self.connections.get() {
            Some(connections) => connections.signal_event(connection, flag),
            None => Status::INVALID_CONNECTION_ID,
        })
    }

    /// Interrupts by an interrupt source as if there was something at it.
    fn raise(&self, vp: VcpuId, sint: u8) {
        self.with_controller(vp, |controller, outside| controller.raise(sint, outside));
    }

    /// Bit by processor that there is.
    fn all_processors(&self) -> u64 {
        u64::MAX >> (u64::BITS as usize - self.vps.len().clamp(1, u64::BITS as usize))
    }

    /// Does something to a processor's controller, and arms its timers as they are then. `None` when there is no such processor.
    fn with_controller<R>(&self, vp: VcpuId, act: impl FnOnce(&mut Controller, &Outside<'_>) -> R) -> Option<R> {
        let mut vp_state = lock(self.vps.get(vp as usize)?);
        let outside = Outside { memory: &self.memory, processors: self.processors.get(), now: self.clock.now() };
        let result = act(&mut vp_state.controller, &outside);
        let own = self.stimers.get().and_then(|timers| timers.chunks(msr::STIMERS as usize).nth(vp as usize)).unwrap_or_default();
        for (&timer, due) in own.iter().zip(vp_state.controller.due()) {
            self.timers.arm(timer, due.map(|time| self.clock.deadline(time)));
        }
        Some(result)
    }

    fn write_system(&self, value: u64) {
        let mut guest = self.guest();
        guest.system = value;
        if value == 0 {
            guest.hypercall.0 &= !msr::PAGE_ENABLE;
        }
    }

    /// The page's code writes to [`HYPERCALL_PORT`], where the dialect finds all registers.
    fn write_hypercall(&self, value: u64) -> Result<(), MsrFault> {
        /// `out HYPERCALL_PORT, eax; ret`, in every mode.
        const CODE: [u8; 3] = [0xe7, HYPERCALL_PORT as u8, 0xc3];
        /// Breakpoints behind it.
        const INT3: u8 = 0xcc;
        let mut guest = self.guest();
        if guest.hypercall.0 & msr::HYPERCALL_LOCKED != 0 {
            return Err(MsrFault);
        }
        if guest.system == 0 {
            // TLFS 3.13: it cannot be enabled then.
            return Ok(());
        }
        let new = PageMsr::checked(&self.memory, value)?;
        let mut page = [INT3; PAGE_SIZE as usize];
        page[..CODE.len()].copy_from_slice(&CODE);
        if new.address().is_some() {
            new.fill(&self.memory, &page).ok_or(MsrFault)?;
        }
        guest.hypercall = new;
        Ok(())
    }

    fn write_reference_tsc(&self, value: u64) -> Result<(), MsrFault> {
        let new = PageMsr::checked(&self.memory, value)?;
        if new.address().is_some() {
            new.fill(&self.memory, self.clock.page().as_bytes()).ok_or(MsrFault)?;
        }
        self.guest().reference_tsc = new;
        Ok(())
    }

    fn write_assist_page(&self, id: VcpuId, value: u64) -> Result<(), MsrFault> {
        let new = PageMsr::checked(&self.memory, value)?;
        let mut vp = lock(self.vps.get(id as usize).ok_or(MsrFault)?);
        new.clear_if_new(vp.assist, &self.memory)?;
        vp.assist = new;
        if let Some(processors) = self.processors.get() {
            // Its first byte's lowest bit is what msr::ASSIST_NO_EOI says.
            processors.set_eoi_flag(id, new.address().map(|gpa| flag_at(&self.memory, gpa)));
        }
        Ok(())
    }

    fn write_local_apic(&self, vp: VcpuId, offset: u64, value: u64) -> Result<(), MsrFault> {
        let ended = self.processors.get().ok_or(MsrFault)?.write_local_apic(vp, offset, value)?;
        if let (Some(vector), Some(machine)) = (ended, self.machine.get()) {
            machine.end_of_interrupt(vector);
        }
        Ok(())
    }

    fn write_crash(&self, control: u64) {
        let crash = self.guest().crash.notify(control, &self.memory);
        if let (Some(crash), Some(machine)) = (crash, self.machine.get()) {
            machine.crashed(&crash);
        }
    }

    fn guest(&self) -> MutexGuard<'_, Guest> {
        lock(&self.guest)
    }
}

/// Offset of the register of the local APIC that an MSR stands for.
fn local_apic(index: u32) -> Option<u64> {
    match index {
        msr::EOI => Some(offset::EOI),
        msr::ICR => Some(offset::ICR_LOW),
        msr::TPR => Some(offset::TPR),
        _ => None,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Dialect for Hyperv {
    fn name(&self) -> &'static str {
        "hyperv"
    }

    fn add_cpuid(&self, base: u32, table: &mut CpuidTable) {
        let [ebx, ecx, edx] = cpuid::SIGNATURE;
        let processors = self.vps.len() as u32;
        let features = if self.source.is_some() { FEATURES | feature::VP_RUNTIME } else { FEATURES };
        let leaves = [
            (0, [base + cpuid::LEAF_LIMITS, ebx, ecx, edx]),
            (cpuid::LEAF_INTERFACE, [cpuid::INTERFACE, 0, 0, 0]),
            (cpuid::LEAF_VERSION, [BUILD, VERSION, 0, 0]),
            (cpuid::LEAF_FEATURES, [features, PRIVILEGES, 0, MORE]),
            (cpuid::LEAF_HINTS, [HINTS, u32::MAX, 0, 0]),
            (cpuid::LEAF_LIMITS, [processors, processors, 0, 0]),
        ];
        for (leaf, [eax, ebx, ecx, edx]) in leaves {
            table.set(CpuidEntry { leaf: base + leaf, subleaf: None, eax, ebx, ecx, edx });
        }
    }

    fn has_clock(&self) -> bool {
        true
    }

    fn read_msr(&self, vcpu: VcpuId, index: u32) -> Option<Result<u64, MsrFault>> {
        Some(match index {
            msr::GUEST_OS_ID => Ok(self.guest().system),
            msr::HYPERCALL => Ok(self.guest().hypercall.0),
            msr::VP_INDEX => Ok(vcpu.into()),
            msr::RESET => Ok(0),
            msr::VP_RUNTIME => Ok(self.source.as_ref()?.ran(vcpu) / clock::UNIT),
            msr::TIME_REF_COUNT => Ok(self.clock.now()),
            msr::REFERENCE_TSC => Ok(self.guest().reference_tsc.0),
            msr::TSC_FREQUENCY => Ok(self.frequencies.tsc_hz),
            msr::APIC_FREQUENCY => Ok(self.frequencies.apic_hz.into()),
            msr::VP_ASSIST_PAGE => self.vps.get(vcpu as usize).map(|vp| lock(vp).assist.0).ok_or(MsrFault),
            _ if let Some(offset) = local_apic(index) => {
                self.processors.get().ok_or(MsrFault).and_then(|known| known.read_local_apic(vcpu, offset))
            }
            msr::CRASH_P0..=msr::CRASH_CTL => self.guest().crash.read(index).ok_or(MsrFault),
            _ => lock(self.vps.get(vcpu as usize)?).controller.read_msr(index)?,
        })
    }

    fn write_msr(&self, vcpu: VcpuId, index: u32, value: u64) -> Option<Result<(), MsrFault>> {
        Some(match index {
            msr::GUEST_OS_ID => {
                self.write_system(value);
                Ok(())
            }
            msr::HYPERCALL => self.write_hypercall(value),
            msr::RESET => {
                if value & msr::RESET_NOW != 0
                    && let Some(machine) = self.machine.get()
                {
                    machine.reset();
                }
                Ok(())
            }
            msr::REFERENCE_TSC => self.write_reference_tsc(value),
            msr::VP_RUNTIME if self.source.is_none() => return None,
            msr::VP_INDEX | msr::VP_RUNTIME | msr::TIME_REF_COUNT | msr::TSC_FREQUENCY | msr::APIC_FREQUENCY => Err(MsrFault),
            msr::VP_ASSIST_PAGE => self.write_assist_page(vcpu, value),
            msr::CRASH_CTL => {
                self.write_crash(value);
                Ok(())
            }
            msr::CRASH_P0..msr::CRASH_CTL => self.guest().crash.write(index, value).ok_or(MsrFault),
            _ if let Some(offset) = local_apic(index) => self.write_local_apic(vcpu, offset, value),
            _ => self.with_controller(vcpu, |controller, outside| controller.write_msr(index, value, outside))??,
        })
    }

    fn port_in(&self, _vcpu: VcpuId, port: u16, size: u8) -> Option<u32> {
        (self.tests.get().is_some() && (port, size) == (testdev::PORT, 4)).then_some(0)
    }

    fn port_out(&self, _vcpu: VcpuId, port: u16, size: u8, value: u32) -> bool {
        match self.tests.get().filter(|_| (port, size) == (testdev::PORT, 4)) {
            Some(device) => {
                device.command(value, self);
                true
            }
            None => false,
        }
    }

    fn takes_registers(&self, port: u16) -> bool {
        port == HYPERCALL_PORT
    }

    fn port_call(&self, vcpu: VcpuId, call: &mut PortCall) {
        if call.cpl != 0 || call.paging.cr0 & PROTECTED_MODE == 0 {
            call.undefined = true;
        } else if call.write && !call.string {
            self.answer(vcpu, &mut call.gpr, call.long_mode);
        }
    }

    fn reset(&self) {
        *self.guest() = Guest::default();
        for vp in 0..self.vps.len() as VcpuId {
            self.with_controller(vp, Controller::reset);
            // No page is always good.
            let _ = self.write_assist_page(vp, 0);
        }
        if let Some(device) = self.tests.get() {
            device.reset();
        }
        if let Some(connections) = self.connections.get() {
            connections.reset();
        }
    }
}

impl Synic for Hyperv {
    fn post_message(&self, vp: u32, sint: u8, kind: u32, payload: &[u8]) -> bool {
        self.with_controller(vp, |controller, outside| controller.post(sint, kind, payload, outside)).unwrap_or(false)
    }

    fn signal_event(&self, vp: u32, sint: u8, flag: u16) -> bool {
        self.with_controller(vp, |controller, outside| controller.signal(sint, flag, outside)).unwrap_or(false)
    }
}

impl TimerClient for Hyperv {
    fn timer_due(&self, vp: u64) {
        self.with_controller(vp as VcpuId, Controller::deliver);
    }
}
