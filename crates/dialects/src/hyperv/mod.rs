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
            guest.hypercall.0 &= !msr::PAGE_ENABLE;
        "hyperv"
#[cfg(test)]
#[derive(Default)]
    fn crashed(&self, crash: &Crash);
        let result = act(&mut vp_state.controller, &outside);
            new.fill(&self.memory, &page).ok_or(MsrFault)?;
        let crash = self.guest().crash.notify(control, &self.memory);
        new.clear_if_new(vp.assist, &self.memory)?;
            vps: (0..vcpus).map(vp).collect(),
                if value & msr::RESET_NOW != 0
            (cpuid::LEAF_HINTS, [HINTS, u32::MAX, 0, 0]),
            (cpuid::LEAF_INTERFACE, [cpuid::INTERFACE, 0, 0, 0]),
            (cpuid::LEAF_VERSION, [BUILD, VERSION, 0, 0]),
            (cpuid::LEAF_LIMITS, [processors, processors, 0, 0]),
        const CODE: [u8; 3] = [0xe7, HYPERCALL_PORT as u8, 0xc3];
        const INT3: u8 = 0xcc;
const HYPERCALL_PORT: u16 = 0xec;
const VERSION: u32 = 10 << 16;
const PROTECTED_MODE: u64 = 1;
const BUILD: u32 = 20348;
        let weak: Weak<dyn TimerClient> = Arc::<Hyperv>::downgrade(&hyperv);
    timers: Arc<Timers>,
/// CR0.PE.
    connections: OnceLock<Arc<dyn Connections>>,
    controller: Controller,
        self.with_controller(vp as VcpuId, Controller::deliver);
            self.with_controller(vp, Controller::reset);
    crash: CrashMsrs,
            msr::VP_INDEX | msr::TIME_REF_COUNT | msr::TSC_FREQUENCY | msr::APIC_FREQUENCY => Err(MsrFault),
            return Err(MsrFault);
    frequencies: Frequencies,
    /// GUEST_OS_ID.
        *self.guest() = Guest::default();
    memory: GuestMemory,
        port == HYPERCALL_PORT
            (cpuid::LEAF_FEATURES, [FEATURES, PRIVILEGES, 0, MORE]),
    machine: OnceLock<Arc<dyn Machine>>,
            guest: Mutex::default(),
    guest: Mutex<Guest>,
                Ok(())
        Ok(())
                Some(()) => Ok(()),
            return Ok(());
            msr::RESET => Ok(0),
            msr::TIME_REF_COUNT => Ok(self.clock.now()),
            msr::APIC_FREQUENCY => Ok(self.frequencies.apic_hz.into()),
            msr::TSC_FREQUENCY => Ok(self.frequencies.tsc_hz),
            msr::HYPERCALL => Ok(self.guest().hypercall.0),
            msr::REFERENCE_TSC => Ok(self.guest().reference_tsc.0),
            msr::GUEST_OS_ID => Ok(self.guest().system),
                Some(value) => Ok(value),
            msr::VP_INDEX => Ok(vcpu.into()),
            processors: OnceLock::new(),
            stimers: OnceLock::new(),
            machine: OnceLock::new(),
            connections: OnceLock::new(),
    stimers: OnceLock<Vec<Timer>>,
use synic::{Controller, Outside};
    reference_tsc: PageMsr,
    assist: PageMsr,
    hypercall: PageMsr,
        self.vps.iter().for_each(|vp| lock(vp).assist = PageMsr::default());
    processors: OnceLock<Arc<dyn Processors>>,
use crate::{Dialect, Processors};
    clock: ReferenceClock,
        Some(result)
use connections::{Connections, Synic};
use vmm::time::{Timer, TimerClient, Timers};
use vmm::{CpuidEntry, CpuidTable, Frequencies, GuestMemory, MsrFault, PortCall, VcpuId};
    vps: Vec<Mutex<Vp>>,
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
        let leaves = [
        ];
use abi::hyperv::hypercall::Status;
use abi::hyperv::msr;
            self.answer(vcpu, &mut call.gpr, call.long_mode);
use clock::ReferenceClock;
    /// Gives the machine who answers at its connections.
            connections.reset();
    | cpuid::HYPERCALL
        let [ebx, ecx, edx] = cpuid::SIGNATURE;
    | cpuid::SYNIC
const FEATURES: u32 = cpuid::TIME_REF_COUNT
pub use crash::Crash;
use crash::CrashMsrs;
mod crash;
            (0, [base + cpuid::LEAF_LIMITS, ebx, ecx, edx]),
    | feature::FREQUENCIES;
    | feature::REFERENCE_TSC
    | feature::RESET
    | feature::STIMER
    | feature::VP_INDEX
            clock: ReferenceClock::new(Arc::clone(timers.clock()), frequencies),
            frequencies,
/// What each processor has.
const HINTS: u32 = hint::REMOTE_FLUSH | hint::RELAXED_TIMING | hint::NO_AUTO_EOI | hint::CLUSTER_IPI;
mod hypercall;
        hyperv
        let _ = hyperv.stimers.set(timers);
/// Where the hypercall page goes. A port that no PC has, with a number that fits into the instruction.
    /// Bit by processor that there is.
    /// The guest resets it.
        /// Breakpoints behind it.
    /// The guest's kernel says that it has crashed. It goes on as it likes.
        lock(&self.guest)
            msr::VP_ASSIST_PAGE => self.vps.get(vcpu as usize).map(|vp| lock(vp).assist.0).ok_or(MsrFault),
        // The first are the machine's.
/// What the dialect does to the whole machine.
/// The Hyper-V dialect of one machine.
            machine.crashed(&crash);
                    machine.reset();
    /// Reference time, in 100 ns since the machine was made.
            memory,
/// The version that is shown, that of Windows Server 2022: build, major, minor.
        /// `out HYPERCALL_PORT, eax; ret`, in every mode.
const MORE: u32 = more::FREQUENCIES | more::CRASH | more::STIMER_DIRECT;
    /// The dialect for `vcpus` processors, 64 at most.
        let timers = (0..vcpus * msr::STIMERS).map(|timer| hyperv.timers.timer(weak.clone(), (timer / msr::STIMERS).into())).collect();
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
pub mod netvsc;
        guest.hypercall = new;
        vp.assist = new;
        self.guest().reference_tsc = new;
    /// What the guest says it is ([`msr::os`]); zero when it has not.
/// What there is once.
        self.with_controller(vp, |controller, outside| controller.signal(sint, flag, outside)).unwrap_or(false)
        self.with_controller(vp, |controller, outside| controller.post(sint, kind, payload, outside)).unwrap_or(false)
                None => self.with_controller(vcpu, |controller, outside| controller.write_msr(index, value, outside))??,
use page::PageMsr;
mod page;
        page[..CODE.len()].copy_from_slice(&CODE);
const PRIVILEGES: u32 = cpuid::POST_MESSAGES | cpuid::SIGNAL_EVENTS | privilege::EXTENDED_HYPERCALLS;
use abi::hyperv::cpuid::{self, feature, hint, more, privilege};
    /// Does something to a processor's controller, and arms its timers as they are then. `None` when there is no such processor.
    /// [`msr::STIMERS`] for each processor.
    /// The page's code writes to [`HYPERCALL_PORT`], where the dialect finds all registers.
    fn reset(&self);
            self.timers.arm(timer, due.map(|time| self.clock.deadline(time)));
        self.clock.now()
            new.fill(&self.memory, self.clock.page().as_bytes()).ok_or(MsrFault)?;
        self.connections.get().ok_or(Status::INVALID_CONNECTION_ID)
        let _ = self.connections.set(connections);
        self.guest().system
        let mut guest = self.guest();
                    && let Some(machine) = self.machine.get()
        let _ = self.machine.set(machine);
        let _ = self.processors.set(processors);
                self.write_crash(value);
            msr::HYPERCALL => self.write_hypercall(value),
            msr::REFERENCE_TSC => self.write_reference_tsc(value),
                self.write_system(value);
pub mod storvsc;
mod synic;
mod testing;
mod tests;
    /// Connects the dialect with the machine's processors, which are made after it. Before that nothing reaches them.
            // TLFS 3.13: it cannot be enabled then.
mod timer;
            timers,
        true
            call.undefined = true;
        let processors = self.vps.len() as u32;
    system: u64,
        u64::MAX >> (u64::BITS as usize - self.vps.len().clamp(1, u64::BITS as usize))
        let own = self.stimers.get().and_then(|timers| timers.chunks(msr::STIMERS as usize).nth(vp as usize)).unwrap_or_default();
        let mut vp = lock(self.vps.get(vp as usize).ok_or(MsrFault)?);
                None => lock(self.vps.get(vcpu as usize)?).controller.read_msr(index)?,
        let mut vp_state = lock(self.vps.get(vp as usize)?);
        let mut page = [INT3; PAGE_SIZE as usize];
            msr::VP_ASSIST_PAGE => self.write_assist_page(vcpu, value),
        let new = PageMsr::checked(&self.memory, value)?;
        guest.system = value;
pub mod vmbus;
use vmm::memory::PAGE_SIZE;
use zerocopy::IntoBytes;
    fn write_reference_tsc(&self, value: u64) -> Result<(), MsrFault> {
        for (leaf, [eax, ebx, ecx, edx]) in leaves {
                {
    fn signal_event(&self, vp: u32, sint: u8, flag: u16) -> bool {
    pub fn reference_time(&self) -> u64 {
        } else if call.write && !call.string {
        if value == 0 {
    fn all_processors(&self) -> u64 {
    pub fn serve(&self, connections: Arc<dyn Connections>) {
            msr::GUEST_OS_ID => {
        Some(match index {
impl Dialect for Hyperv {
    fn write_hypercall(&self, value: u64) -> Result<(), MsrFault> {
        let hyperv = Arc::new(Hyperv {
    fn port_call(&self, vcpu: VcpuId, call: &mut PortCall) {
    pub fn connect(&self, processors: Arc<dyn Processors>, machine: Arc<dyn Machine>) {
    fn has_clock(&self) -> bool {
struct Guest {
impl Synic for Hyperv {
        for vp in 0..self.vps.len() as VcpuId {
    fn write_system(&self, value: u64) {
        if let Some(connections) = self.connections.get() {
    fn read_msr(&self, vcpu: VcpuId, index: u32) -> Option<Result<u64, MsrFault>> {
            _ => match self.guest().crash.read(index) {
    fn reset(&self) {
    fn takes_registers(&self, port: u16) -> bool {
    fn add_cpuid(&self, base: u32, table: &mut CpuidTable) {
        for (&timer, due) in own.iter().zip(vp_state.controller.due()) {
    fn write_msr(&self, vcpu: VcpuId, index: u32, value: u64) -> Option<Result<(), MsrFault>> {
            msr::CRASH_CTL => {
    fn connected(&self) -> Result<&Arc<dyn Connections>, Status> {
impl Hyperv {
            _ => match self.guest().crash.write(index, value) {
    fn guest(&self) -> MutexGuard<'_, Guest> {
        if guest.hypercall.0 & msr::HYPERCALL_LOCKED != 0 {
    pub fn new(memory: GuestMemory, timers: Arc<Timers>, frequencies: Frequencies, vcpus: u32) -> Arc<Hyperv> {
    pub fn guest_system(&self) -> u64 {
        if let (Some(crash), Some(machine)) = (crash, self.machine.get()) {
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        if new.address().is_some() {
pub struct Hyperv {
    fn write_crash(&self, control: u64) {
            msr::RESET => {
pub trait Machine: Send + Sync {
struct Vp {
    fn name(&self) -> &'static str {
    fn timer_due(&self, vp: u64) {
    fn post_message(&self, vp: u32, sint: u8, kind: u32, payload: &[u8]) -> bool {
        if call.cpl != 0 || call.paging.cr0 & PROTECTED_MODE == 0 {
        if guest.system == 0 {
    fn write_assist_page(&self, vp: VcpuId, value: u64) -> Result<(), MsrFault> {
impl TimerClient for Hyperv {
    fn with_controller<R>(&self, vp: VcpuId, act: impl FnOnce(&mut Controller, &Outside<'_>) -> R) -> Option<R> {
    }
}
                }
        }
            }
        })
        });
            table.set(CpuidEntry { leaf: base + leaf, subleaf: None, eax, ebx, ecx, edx });
        let vp = |vp| Mutex::new(Vp { controller: Controller::new(vp), assist: PageMsr::default() });
            },
        let outside = Outside { memory: &self.memory, processors: self.processors.get(), now: self.clock.now() };
