//! Host half of the Xen dialect: a guest of HVM or PVH kind finds Xen 4.17 and itself as domain 1.
//!
//! Specification: the public headers of xen-project/xen below `xen/include/public`; the words are in [`abi::xen`]. What the guest reaches:
//!
//! ```text
//!   CPUID, MSR (hypercall page), OUT of its entries, VMCALL/VMMCALL --> hypercall.rs
//!     memory_op, vcpu_op, set_timer_op      shared.rs          shared info, vcpu info, clock, timers
//!                                           runstate.rs        time that the host took
//!     event_channel_op                      event_channel.rs   ports; upcalls by the local APIC --> Processors
//!     grant_table_op                        grant_table.rs     pages that backends may use
//!     hvm_op, xen_version, sched_op         hypercall.rs
//!   ring pages                              console.rs         hvc0
//!                                           xenstore.rs        XenStore
//!   rings in granted pages, by XenStore     xenbus.rs          how frontend and backend find together
//!                                           block.rs, net/     disks, network cards
//! ```
//!
//! Backends (the other ends of event channels, the users of grants) reach the guest through [`Xen::bind`], [`Xen::notify`] and [`Xen::map`].
//! Only 64-bit callers are answered. Events are announced by a vector of each processor (`HVMOP_set_evtchn_upcall_vector`), an ordinary interrupt to
//! its local APIC, which Linux takes since 6.0; or by `HVM_PARAM_CALLBACK_IRQ`: one vector for all, which ends by itself, or a line of the board.

pub mod block;
mod console;
mod event_channel;
mod grant_table;
mod hypercall;
pub mod net;
mod ring;
mod runstate;
mod shared;
#[cfg(test)]
mod tests;
pub mod xenbus;
pub mod xenstore;

use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use abi::xen::{cpuid, hvm};
use vm_memory::{Bytes, GuestAddress};
use vmm::memory::PAGE_SIZE;
use vmm::time::{Timer, TimerClient, Timers};
use vmm::{CpuidEntry, CpuidTable, GuestMemory, Hypercall, MsrFault, PortCall, VcpuId};

use crate::kvm::StealSource;
use crate::kvm::clock::PvClock;
use crate::{Dialect, Processors};
use console::Console;
use event_channel::{Channels, Sent};
pub use event_channel::{Peer, PortError};
use grant_table::GrantTable;
pub use grant_table::{Access, GrantError, MAX_FRAMES};
pub use ring::BrokenRing;
use runstate::{Area, Runstates};
use shared::Shared;

/// The version that is shown, major in the upper half: 4.17, which Debian 12 has.
const VERSION: u32 = 4 << 16 | 17;
/// The guest's own number.
pub const DOMAIN: u16 = 1;
/// The number of the domain that backends are in.
pub const BACKEND_DOMAIN: u16 = 0;
/// Where the entries of the hypercall page go. A port that no PC has, with a number that fits into the instruction.
const HYPERCALL_PORT: u16 = 0xe6;

/// Command and mask registers of the two 8259, at which a guest ends interrupts and lets them come again.
const PIC_PORTS: [u16; 4] = [0x20, 0x21, 0xa0, 0xa1];
/// The timer that is no processor's: areas with runstates are due.
const RUNSTATES: u64 = u64::MAX;

/// Why the guest's kernel wants to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shutdown {
    /// Power off.
    PowerOff,
    /// Reboot.
    Reboot,
    /// It cannot go on.
    Crash,
}

/// An interrupt line of the board.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// A global interrupt; those below 16 are ISA's.
    Gsi(u8),
    /// A pin (0 for INTA) of the PCI device in a slot.
    Intx {
        /// The slot.
        slot: u8,
        /// The pin.
        pin: u8,
    },
}

/// Sets the level of a line.
pub type SetLine = Box<dyn Fn(bool) + Send + Sync>;

/// What the dialect does to the whole machine.
pub trait Machine: Send + Sync {
    /// The guest's kernel is down.
    fn shut_down(&self, reason: Shutdown);

    /// The guest has Xen's drivers and wants the emulated disks, which are the same, to be gone; the first of them only `with_first`.
    fn unplug_disks(&self, with_first: bool);

    /// A new source on a line, down until it is set and when it is dropped; `None` when there is no such line.
    fn line(&self, wire: Wire) -> Option<SetLine>;
}

/// The Xen dialect of one machine.
pub struct Xen {
    memory: GuestMemory,
    clock: Arc<PvClock>,
    uuid: [u8; 16],
    timers: Arc<Timers>,
    /// The single-shot timer of each processor.
    singleshot: OnceLock<Vec<Timer>>,
    runstates: Mutex<Runstates>,
    runstate_timer: OnceLock<Timer>,
    processors: OnceLock<Arc<dyn Processors>>,
    machine: OnceLock<Arc<dyn Machine>>,
    state: Mutex<State>,
    grants: Mutex<GrantTable>,
    console: Mutex<Option<Console>>,
}

struct State {
    shared: Shared,
    channels: Channels,
    /// `HVM_PARAM_CALLBACK_IRQ`.
    callback: u64,
    /// The guest's ports of the XenStore ring and the console, where there are any.
    store_port: Option<u32>,
    console_port: Option<u32>,
}

impl Xen {
    /// The dialect for `vcpus` processors. `memory` has to have the special pages ([`hvm::SPECIAL_PAGES`]). Without a `steal` source no time is stolen.
    pub fn new(
        memory: GuestMemory,
        clock: Arc<PvClock>,
        timers: Arc<Timers>,
        steal: Option<Arc<dyn StealSource>>,
        uuid: [u8; 16],
        vcpus: u32,
    ) -> Arc<Xen> {
        let shared = Shared::new(memory.clone(), vcpus);
        let state = State { shared, channels: Channels::default(), callback: 0, store_port: None, console_port: None };
        let xen = Arc::new(Xen {
            grants: Mutex::new(GrantTable::new(memory.clone())),
            runstates: Mutex::new(Runstates::new(memory.clone(), Arc::clone(&clock), steal, vcpus)),
            runstate_timer: OnceLock::new(),
            memory,
            clock,
            uuid,
            timers,
            singleshot: OnceLock::new(),
            processors: OnceLock::new(),
            machine: OnceLock::new(),
            state: Mutex::new(state),
            console: Mutex::new(None),
        });
        let weak: Weak<dyn TimerClient> = Arc::<Xen>::downgrade(&xen);
        let timers = (0..vcpus).map(|vcpu| xen.timers.timer(weak.clone(), vcpu.into())).collect();
        let _ = xen.singleshot.set(timers);
        let _ = xen.runstate_timer.set(xen.timers.timer(weak, RUNSTATES));
        xen
    }

    /// Connects the dialect with the machine's processors, which are made after it. Before that nothing reaches them.
    pub fn connect(&self, processors: Arc<dyn Processors>, machine: Arc<dyn Machine>) {
        // The first are the machine's.
        let _ = self.processors.set(processors);
        let _ = self.machine.set(machine);
    }

    /// Gives the guest a console whose output goes to `output`.
    pub fn open_console(self: &Arc<Xen>, output: Box<dyn Write + Send>) {
        *lock(&self.console) = Some(Console::new(self.memory.clone(), output));
        let xen = Arc::downgrade(self);
        let port = self.offer(Arc::new(move || {
            if let Some(xen) = xen.upgrade() {
                xen.console_written();
            }
        }));
        self.lock().console_port = port;
    }

    /// Bytes for the guest's console; how many were taken.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        let taken = lock(&self.console).as_mut().map_or(0, |console| console.push(bytes));
        if taken > 0
            && let Some(port) = self.console_port()
        {
            self.notify(port);
        }
        taken
    }

    /// Gives the guest a XenStore whose ring is served by who is behind `peer`; the guest's port.
    pub fn open_store(&self, peer: Peer) -> Option<u32> {
        let port = self.offer(peer);
        self.lock().store_port = port;
        port
    }

    /// Binds a backend to a port that the guest has allocated for it: `peer` is called when the guest sends. Must not block.
    ///
    /// # Errors
    /// [`PortError`] when the guest did not allocate the port for backends, or gave it away already.
    pub fn bind(&self, port: u32, peer: Peer) -> Result<(), PortError> {
        self.lock().channels.connect(port, peer)
    }

    /// Unbinds a backend; the port waits for the next one.
    pub fn unbind(&self, port: u32) {
        self.lock().channels.disconnect(port);
    }

    /// Sends an event to the guest on a bound port.
    pub fn notify(&self, port: u32) {
        self.lock().deliver(port, self.processors.get());
    }

    /// Begins to use a page that the guest has granted; its address.
    ///
    /// # Errors
    /// [`GrantError`] says what is wrong with the grant.
    pub fn map(&self, grant_ref: u32, access: Access) -> Result<u64, GrantError> {
        lock(&self.grants).map(grant_ref, access)
    }

    /// Ends one use that [`Xen::map`] began.
    pub fn unmap(&self, grant_ref: u32, access: Access) {
        lock(&self.grants).unmap(grant_ref, access);
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Whether the guest's processors are at rest until they are told something.
    fn is_idle(&self) -> bool {
        self.processors.get().is_some_and(|processors| processors.is_idle())
    }

    fn offer(&self, peer: Peer) -> Option<u32> {
        let mut state = self.lock();
        let port = state.channels.allocate(BACKEND_DOMAIN)?;
        state.channels.connect(port, peer).ok()?;
        Some(port)
    }

    fn console_port(&self) -> Option<u32> {
        self.lock().console_port
    }

    /// The guest has written to its console's ring, or read from it.
    fn console_written(&self) {
        let moved = lock(&self.console).as_mut().is_some_and(Console::drain);
        if moved && let Some(port) = self.console_port() {
            self.notify(port);
        }
    }

    /// Sends on a port as the guest does.
    fn send(&self, port: u32) -> Result<(), PortError> {
        let peer = {
            let mut state = self.lock();
            match state.channels.send(port)? {
                Sent::Itself => {
                    state.deliver(port, self.processors.get());
                    return Ok(());
                }
                Sent::Nobody => return Ok(()),
                Sent::Peer(peer) => peer,
            }
        };
        // Without the lock: it may answer at once.
        peer();
        Ok(())
    }

    /// Arms a processor's single-shot timer, or stops it.
    fn set_timer(&self, vcpu: VcpuId, deadline: Option<u64>) {
        if let Some(&timer) = self.singleshot.get().and_then(|timers| timers.get(vcpu as usize)) {
            self.timers.arm(timer, deadline);
        }
    }

    /// A processor has an area for its runstate, or none any more. `false` when it is not in memory.
    fn register_runstate(&self, vcpu: VcpuId, area: Option<Area>) -> bool {
        let mut runstates = lock(&self.runstates);
        let registered = runstates.register(vcpu, area);
        self.look_soon(&mut runstates);
        registered
    }

    /// Brings the areas up to date, and arms the timer for the next time if there is one.
    fn look_soon(&self, runstates: &mut Runstates) {
        let next = runstates.update();
        if let Some(&timer) = self.runstate_timer.get() {
            self.timers.arm(timer, next.map(|interval| self.timers.clock().now().saturating_add(interval)));
        }
    }

    /// Fills the hypercall page: each entry loads its number and writes it to [`HYPERCALL_PORT`], where the dialect finds all registers.
    fn write_hypercall_page(&self, value: u64) -> Result<(), MsrFault> {
        /// Breakpoints between the entries, as Xen has them.
        const INT3: u8 = 0xcc;
        if !value.is_multiple_of(PAGE_SIZE) {
            // The low bits number the page, and there is one.
            return Err(MsrFault);
        }
        let mut page = [INT3; PAGE_SIZE as usize];
        for (number, entry) in (0..u8::MAX).zip(page.chunks_exact_mut(cpuid::HYPERCALL_ENTRY)) {
            // mov eax, number; out HYPERCALL_PORT, eax; ret
            entry[..8].copy_from_slice(&[0xb8, number, 0, 0, 0, 0xe7, HYPERCALL_PORT as u8, 0xc3]);
        }
        self.memory.write_slice(&page, GuestAddress(value)).map_err(|_| MsrFault)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl State {
    /// Sets a port pending and interrupts its processor if it has to look.
    fn deliver(&mut self, port: u32, processors: Option<&Arc<dyn Processors>>) {
        if let Some(vcpu) = self.channels.target(port)
            && self.shared.set_pending(port, vcpu)
        {
            self.shared.upcall(vcpu, processors);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Dialect for Xen {
    fn name(&self) -> &'static str {
        "xen"
    }

    fn add_cpuid(&self, base: u32, table: &mut CpuidTable) {
        let mut set = |leaf: u32, subleaf: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]| {
            table.set(CpuidEntry { leaf: base + leaf, subleaf, eax, ebx, ecx, edx });
        };
        let [ebx, ecx, edx] = cpuid::SIGNATURE;
        let (hz, scale) = self.clock.tsc();
        let khz = (hz / 1000) as u32;
        set(0, None, [base + cpuid::PV, ebx, ecx, edx]);
        set(cpuid::VERSION, None, [VERSION, 0, 0, 0]);
        set(cpuid::HYPERCALL_PAGE, None, [1, cpuid::MSR_HYPERCALL_PAGE, 0, 0]);
        set(cpuid::TIME, Some(0), [cpuid::tsc::HOST_RELIABLE, cpuid::tsc::MODE_NATIVE, khz, 0]);
        set(cpuid::TIME, Some(1), [0, 0, scale.mul, i32::from(scale.shift).cast_unsigned()]);
        set(cpuid::TIME, Some(2), [khz, 0, 0, 0]);
        set(cpuid::HVM, None, [cpuid::hvm::DOMID_PRESENT | cpuid::hvm::UPCALL_VECTOR, 0, DOMAIN.into(), 0]);
        set(cpuid::PV, None, [0; 4]);
    }

    fn has_clock(&self) -> bool {
        true
    }

    fn read_msr(&self, _vcpu: VcpuId, index: u32) -> Option<Result<u64, MsrFault>> {
        // Xen answers reads of it with a fault, too.
        (index == cpuid::MSR_HYPERCALL_PAGE).then_some(Err(MsrFault))
    }

    fn write_msr(&self, _vcpu: VcpuId, index: u32, value: u64) -> Option<Result<(), MsrFault>> {
        (index == cpuid::MSR_HYPERCALL_PAGE).then(|| self.write_hypercall_page(value))
    }

    fn port_in(&self, _vcpu: VcpuId, port: u16, _size: u8) -> Option<u32> {
        match port {
            hvm::unplug::PORT => Some(hvm::unplug::MAGIC),
            hvm::unplug::PORT_VERSION => Some(hvm::unplug::PROTOCOL),
            _ => None,
        }
    }

    fn port_out(&self, _vcpu: VcpuId, port: u16, size: u8, value: u32) -> bool {
        match (port, size) {
            (hvm::unplug::PORT, 2) => {
                let all = value as u16 & hvm::unplug::DISKS != 0;
                if let Some(machine) = self.machine.get()
                    && (all || value as u16 & hvm::unplug::MORE_DISKS != 0)
                {
                    machine.unplug_disks(all);
                }
                true
            }
            (hvm::unplug::PORT | hvm::unplug::PORT_VERSION, _) => true,
            _ => {
                if PIC_PORTS.contains(&port) {
                    self.lock().shared.settle_line();
                }
                false
            }
        }
    }

    fn takes_registers(&self, port: u16) -> bool {
        port == HYPERCALL_PORT
    }

    fn port_call(&self, vcpu: VcpuId, call: &mut PortCall) {
        if call.write && !call.string {
            self.answer(vcpu, &mut call.gpr, call.cpl, call.long_mode, call.paging);
        }
    }

    fn hypercall(&self, vcpu: VcpuId, call: &mut Hypercall) -> bool {
        self.answer(vcpu, &mut call.gpr, call.cpl, call.long_mode, call.paging);
        true
    }

    fn end_of_interrupt(&self) {
        self.lock().shared.settle_line();
    }

    fn reset(&self) {
        for vcpu in 0..self.singleshot.get().map_or(0, Vec::len) as VcpuId {
            self.set_timer(vcpu, None);
        }
        let mut state = self.lock();
        let kept = [state.store_port, state.console_port];
        state.shared.reset(self.processors.get());
        state.channels.reset(&kept);
        state.callback = 0;
        lock(&self.grants).reset();
        let mut runstates = lock(&self.runstates);
        runstates.reset();
        self.look_soon(&mut runstates);
    }
}

impl TimerClient for Xen {
    fn timer_due(&self, token: u64) {
        if token == RUNSTATES {
            return self.look_soon(&mut lock(&self.runstates));
        }
        let mut state = self.lock();
        if let Some(port) = state.channels.timer_of(token as VcpuId) {
            state.deliver(port, self.processors.get());
        }
    }
}
