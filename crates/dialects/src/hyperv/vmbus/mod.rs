//! VMBus, host half: offers devices to the guest and connects their channels. See [`abi::hyperv::vmbus`] for the messages.
//!
//! ```text
//!   HvPostMessage  --> state.rs    version, offers, opens, closes, the end
//!                        gpadl.rs  memory that the guest lends
//!   HvSignalEvent  --> the bell of the channel's device
//!
//!   device's thread:   device.rs   Attached: hears of channels, lets the device work
//!                        channel.rs  packet.rs, ring.rs, range.rs
//! ```
//!
//! The guest's memory is the guest's again only when nobody here uses it any more: a GPADL is reported torn down, and a connection over or begun anew,
//! when the last [`Channel`] and [`Buffer`] of it are gone. So a kernel that another one left behind by kexec never finds its memory written to.
//!
//! Specification: Linux `drivers/hv` and OpenVMM `vm/devices/vmbus`, as the modules cite them. Versions 0.13 to 5.3. Not there: channels
//! between processes (`hvsock`), and what version 6 adds.

mod channel;
mod device;
mod gpadl;
mod packet;
mod range;
mod ring;
mod state;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError, Weak};

use abi::hyperv::hypercall::Status;
use abi::hyperv::vmbus::{EVENT_CONNECTION, MESSAGE_CONNECTION, MESSAGE_CONNECTION_5, MESSAGE_TYPE};
use vmm::GuestMemory;
use vmm::time::{Timer, TimerClient, Timers};

pub use channel::Channel;
pub use device::{Attached, Device, Offer, Peer};
pub use gpadl::Buffer;
pub use packet::{GpaRanges, Kind, Outgoing, Packet, PacketBuf};
pub use range::{GuestRange, NotMemory};
pub use ring::BrokenRing;

use super::connections::{Connections, Synic};
use device::Mailbox;
use state::State;

/// Connection of a channel's events: this and the channel's number.
const CHANNEL_CONNECTIONS: u32 = 0x2000;

/// Nanoseconds between two looks at the monitor page, while a guest that signals by it has a channel open.
const MONITOR_PERIOD: u64 = 500_000;

/// Number of a device on the bus.
pub(crate) type DeviceId = u64;

/// The bus of one machine.
pub struct VmBus(Arc<Shared>);

/// What channels and buffers reach, too.
struct Shared {
    state: Mutex<State>,
    /// Something is not in use any more, and nobody has looked yet what follows from that.
    is_unsettled: AtomicBool,
    /// By which the monitor page is looked at.
    monitor: OnceLock<(Arc<Timers>, Timer)>,
}

impl VmBus {
    /// A bus without devices. It does not keep `synic` alive, as the platform has the bus.
    pub fn new(memory: GuestMemory, synic: Arc<dyn Synic>) -> Arc<VmBus> {
        let shared = Arc::new_cyclic(|bus| Shared {
            state: Mutex::new(State::new(memory, Arc::downgrade(&synic), Weak::clone(bus))),
            is_unsettled: AtomicBool::new(false),
            monitor: OnceLock::new(),
        });
        Arc::new(VmBus(shared))
    }

    /// Lets the bus look at the monitor page of guests that signal by it, by a timer of `timers`.
    pub fn watch_monitor(&self, timers: &Arc<Timers>) {
        let client: Weak<dyn TimerClient> = Arc::<Shared>::downgrade(&self.0);
        // The first is the machine's.
        let _ = self.0.monitor.set((Arc::clone(timers), timers.timer(client, 0)));
    }

    /// Puts a device on the bus, also while the guest runs: it is offered at once then. `bell` rings when the device's thread shall call
    /// [`Attached::work`].
    pub fn attach<D: Device>(self: &Arc<VmBus>, device: D, bell: Peer) -> Attached<D> {
        let mailbox = Arc::new(Mailbox::new(bell));
        let id = self.0.with(|state| state.attach(device.offer(), Arc::clone(&mailbox)));
        Attached::new(device, Arc::clone(self), id, mailbox)
    }

    fn begin_to_leave(&self, id: DeviceId) {
        self.0.with(|state| state.begin_to_leave(id));
    }

    fn is_known(&self, id: DeviceId) -> bool {
        self.0.with(|state| state.is_known(id))
    }

    /// Takes a device from the bus: the guest is told that it is gone.
    fn detach(&self, id: DeviceId) {
        self.0.with(|state| state.detach(id));
    }
}

impl Connections for VmBus {
    fn post_message(&self, connection: u32, kind: u32, payload: &[u8]) -> Status {
        if !matches!(connection, MESSAGE_CONNECTION | MESSAGE_CONNECTION_5) {
            return Status::INVALID_CONNECTION_ID;
        }
        if kind != MESSAGE_TYPE {
            return Status::INVALID_PARAMETER;
        }
        self.0.with(|state| state.on_message(payload));
        Status::SUCCESS
    }

    fn signal_event(&self, connection: u32, flag: u16) -> Status {
        if flag != 0 {
            return Status::INVALID_PARAMETER;
        }
        let is_known = self.0.with(|state| match connection {
            EVENT_CONNECTION => state.signal_page(),
            _ => connection.checked_sub(CHANNEL_CONNECTIONS).is_some_and(|relid| state.signal(relid)),
        });
        if is_known { Status::SUCCESS } else { Status::INVALID_CONNECTION_ID }
    }

    fn reset(&self) {
        self.0.with(State::reset);
    }
}

impl TimerClient for Shared {
    fn timer_due(&self, _token: u64) {
        // A device that is called may be done with something before the scan is.
        if self.with(State::scan_monitor) {
            self.look_later();
        }
    }
}

impl Shared {
    fn with<R>(&self, act: impl FnOnce(&mut State) -> R) -> R {
        let (done, begins_scan) = {
            let mut state = self.lock();
            (act(&mut state), state.begins_scan())
        };
        if begins_scan {
            self.look_later();
        }
        self.settle_if_needed();
        done
    }

    /// Sets the timer for the monitor page.
    fn look_later(&self) {
        if let Some((timers, timer)) = self.monitor.get() {
            timers.arm(*timer, Some(timers.clock().now() + MONITOR_PERIOD));
        }
    }

    /// Something is not in use any more. Also called by whoever has the lock, which is why it may not wait for it: then [`Shared::with`] does the
    /// rest.
    fn settle(&self) {
        self.is_unsettled.store(true, Ordering::SeqCst);
        self.settle_if_needed();
    }

    fn settle_if_needed(&self) {
        while self.is_unsettled.load(Ordering::SeqCst) {
            let mut state = match self.state.try_lock() {
                Ok(state) => state,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                // It comes here when it is done.
                Err(TryLockError::WouldBlock) => return,
            };
            self.is_unsettled.store(false, Ordering::SeqCst);
            state.settle();
        }
    }

    fn gpadl(&self, relid: u32, number: u32) -> Option<Buffer> {
        self.with(|state| state.gpadl(relid, number))
    }

    fn offer_sub_channels(&self, relid: u32, count: u16) {
        self.with(|state| state.offer_sub_channels(relid, count));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
