//! Host half of the VMware dialect: the leaf `VMwareVMware`, the backdoor, GuestRPC, and the tools' requests.
//!
//! A guest finds it by CPUID, or by trying the port; each call is one IN or OUT (or VMCALL, VMMCALL) that carries all registers both ways,
//! from any privilege level. Specification: open-vm-tools' headers, and what open-vm-tools, Linux and OpenBSD expect; see the modules.
//!
//! ```text
//!   port 0x5658, hypercall --> backdoor.rs  what the machine is, what time it is
//!                                |  MESSAGE
//!   port 0x5659 (strings) ---> message.rs  channels of bytes
//!                                |          |
//!                             rpci.rs     tclo.rs
//!                             the guest   the host asks: greeting, power  <-- Vmware::request, Vmware::tools
//!                             asks
//!                                |
//!                           guestinfo.rs, Store
//! ```
//!
//! The hypercall form is answered but not promised (CPUID), because KVM keeps VMCALL to itself; it has no high bandwidth, which would need
//! the guest's page tables.

mod backdoor;
pub mod guestinfo;
mod message;
mod rpci;
mod tclo;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use abi::vmware::backdoor as words;
use serde::{Deserialize, Serialize};
use vmm::snapshot::{RestoreError, Saved, Snapshot};
use vmm::time::Clock;
use vmm::{CpuidEntry, CpuidTable, Hypercall, PortCall, VcpuId};

pub use rpci::REPORTS;
pub use tclo::{PowerError, PowerRequest, PowerStatus, Progress, ToolsStatus};

use crate::Dialect;
use crate::store::Store;
use backdoor::Frame;
use message::{ChannelId, Channels, Protocol, Service};
use tclo::Tclo;

/// Name and version in a [`Saved`] state.
const STATE: (&str, u32) = ("vmware", 1);

/// Where cookies come from. A guest's processes must not guess each other's.
pub type Random = Box<dyn FnMut() -> u64 + Send>;

/// What the dialect tells about the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// Ticks a second of the TSC.
    pub tsc_hz: u64,
    /// Ticks a second of the local APICs' timers before they are divided.
    pub bus_hz: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// The machine's UUID as its text form's bytes stand; SMBIOS should tell the same.
    pub uuid: [u8; 16],
}

/// The VMware dialect of one machine.
pub struct Vmware {
    platform: Platform,
    clock: Arc<dyn Clock>,
    store: Arc<dyn Store>,
    inner: Mutex<Inner>,
}

struct Inner {
    random: Random,
    state: State,
}

/// What a snapshot has of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    channels: Channels,
    tclo: Tclo,
}

impl Vmware {
    /// The dialect for this machine, with its clock and its store.
    pub fn new(platform: Platform, clock: Arc<dyn Clock>, store: Arc<dyn Store>, random: Random) -> Vmware {
        Vmware { platform, clock, store, inner: Mutex::new(Inner { random, state: State::default() }) }
    }

    /// Asks the tools in the guest for a power operation. How it goes is in [`Vmware::tools`].
    ///
    /// # Errors
    /// [`PowerError`] when there is nobody to ask.
    pub fn request(&self, request: PowerRequest) -> Result<(), PowerError> {
        self.lock().state.tclo.request(request, self.clock.now())
    }

    /// What is known of the tools in the guest.
    pub fn tools(&self) -> ToolsStatus {
        self.lock().state.tclo.status()
    }

    /// A call with the magic number.
    fn call(&self, frame: &mut Frame) {
        if frame.command() != words::MESSAGE {
            return backdoor::answer(frame, &self.platform, self.clock.as_ref());
        }
        self.with_channels(|channels, service, random| channels.low_bandwidth(frame, service, random));
    }

    /// An element of a string at the high-bandwidth port.
    fn element(&self, frame: &mut Frame, write: bool, data: &mut u32) {
        self.with_channels(|channels, service, _| match write {
            true => channels.high_bandwidth_out(frame, *data as u8, service),
            false => *data = channels.high_bandwidth_in(frame).into(),
        });
    }

    fn with_channels(&self, act: impl FnOnce(&mut Channels, &mut dyn Service, &mut dyn FnMut() -> u64)) {
        let mut inner = self.lock();
        let Inner { random, state } = &mut *inner;
        let mut protocols = Protocols { store: self.store.as_ref(), tclo: &mut state.tclo, now: self.clock.now() };
        act(&mut state.channels, &mut protocols, random);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Dialect for Vmware {
    fn name(&self) -> &'static str {
        "vmware"
    }

    fn add_cpuid(&self, base: u32, table: &mut CpuidTable) {
        let [ebx, ecx, edx] = abi::vmware::SIGNATURE;
        let frequency = base + abi::vmware::LEAF_FREQUENCY;
        table.set(CpuidEntry { leaf: base, subleaf: None, eax: frequency, ebx, ecx, edx });
        let tsc_khz = u32::try_from(self.platform.tsc_hz / 1000).unwrap_or(u32::MAX);
        // Neither hypercall is promised: guests use the port, which works everywhere.
        table.set(CpuidEntry { leaf: frequency, subleaf: None, eax: tsc_khz, ebx: self.platform.bus_hz / 1000, ecx: 0, edx: 0 });
    }

    fn takes_registers(&self, port: u16) -> bool {
        matches!(port, words::PORT | words::PORT_HB)
    }

    fn port_call(&self, _vcpu: VcpuId, call: &mut PortCall) {
        let before = Frame::of(&call.gpr);
        let mut frame = before;
        match (before.eax, call.port, call.string, call.size) {
            (words::MAGIC, words::PORT, false, 4) => self.call(&mut frame),
            (words::MAGIC, words::PORT_HB, true, 1) => self.element(&mut frame, call.write, &mut call.data),
            // As a port without anything behind it.
            _ if call.write => {}
            (.., true, _) => call.data = u32::MAX,
            (.., false, _) => frame.eax = u32::MAX,
        }
        frame.write_changes(&before, &mut call.gpr);
    }

    fn hypercall(&self, _vcpu: VcpuId, call: &mut Hypercall) -> bool {
        let before = Frame::of(&call.gpr);
        if before.eax != words::MAGIC {
            return false;
        }
        let mut frame = before;
        if before.edx as u16 & words::HYPERCALL_HB == 0 {
            self.call(&mut frame);
        } else {
            // No status: not done.
            frame.ebx = backdoor::with_high(frame.ebx, 0);
        }
        frame.write_changes(&before, &mut call.gpr);
        true
    }

    fn reset(&self) {
        self.lock().state = State::default();
    }
}

impl Snapshot for Vmware {
    fn state(&self) -> Saved {
        Saved::new(STATE.0, STATE.1, &self.lock().state)
    }

    /// Messages that were under way go on where they were.
    fn restore(&self, state: &Saved) -> Result<(), RestoreError> {
        let state: State = state.open(STATE.0, STATE.1)?;
        if !state.channels.is_within_limits() {
            return Err(RestoreError::Impossible { device: STATE.0, what: "more channels or bytes than a machine has" });
        }
        self.lock().state = state;
        Ok(())
    }
}

/// What is behind the channels.
struct Protocols<'a> {
    store: &'a dyn Store,
    tclo: &'a mut Tclo,
    now: u64,
}

impl Service for Protocols<'_> {
    fn opened(&mut self, id: ChannelId, protocol: Protocol) {
        if protocol == Protocol::Tclo {
            self.tclo.opened(id, self.now);
        }
    }

    fn closed(&mut self, id: ChannelId) {
        self.tclo.closed(id, self.now);
    }

    fn received(&mut self, id: ChannelId, protocol: Protocol, message: &[u8]) -> Option<Vec<u8>> {
        match protocol {
            Protocol::Rpci => Some(rpci::answer(message, self.store, self.tclo, self.now)),
            Protocol::Tclo => {
                self.tclo.received(id, message, self.now);
                None
            }
        }
    }

    fn offer(&mut self, id: ChannelId) -> Option<Vec<u8>> {
        self.tclo.offer(id, self.now)
    }
}
